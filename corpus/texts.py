"""Millions of texts in two arrays, which processes that are forked share."""

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

ERRORS = "surrogateescape"  # bytes of a name that are not UTF-8 stand for themselves
SLAB = 1 << 16  # texts decoded at once


class Texts(Sequence):
    """A sequence of texts, kept as one array of UTF-8 bytes and the offsets (N + 1,) at which they begin.

    A Python list of as many would take four times the memory, and every loader process would copy it page by page.
    """

    def __init__(self, content: np.ndarray, offsets: np.ndarray):
        self.content, self.offsets = content, offsets

    @classmethod
    def of(cls, texts) -> "Texts":
        """Make it of any texts."""
        builder, texts = TextsBuilder(), iter(texts)
        while slab := [text.encode("utf-8", ERRORS) for text in itertools.islice(texts, SLAB)]:
            builder.add(slab)
        return builder.done()

    def __len__(self):
        return len(self.offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = int(index) % len(self)
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.content[begin:end].tobytes().decode("utf-8", ERRORS)

    def __iter__(self):
        return self.between(0, len(self))

    def between(self, first: int, last: int):
        """Yield the texts from ``first`` to before ``last``; faster than one by one."""
        for begin in range(first, last, SLAB):
            offsets = self.offsets[begin : min(begin + SLAB, last) + 1].tolist()
            slab, first = self.content[offsets[0] : offsets[-1]].tobytes(), offsets[0]
            for start, end in itertools.pairwise(offsets):
                yield slab[start - first : end - first].decode("utf-8", ERRORS)


class TextsBuilder:
    """Gathers texts for a ``Texts``; buffers grow in place, so that the content is never there twice."""

    def __init__(self):
        self.content, self.lengths = bytearray(), bytearray()

    def add(self, texts: list[bytes]):
        """Add texts in UTF-8."""
        self.add_joined(b"".join(texts), np.fromiter(map(len, texts), np.int32, len(texts)))

    def add_joined(self, content: bytes, lengths: np.ndarray):
        """Add texts in one piece, of which each has so many bytes (n,)."""
        self.content += content
        self.lengths += np.ascontiguousarray(lengths, np.int32).tobytes()

    def done(self, small: bool = False) -> Texts:
        """All texts that were added; ``small``: with offsets in half of the room, uint32, where they fit."""
        lengths = np.frombuffer(self.lengths, np.int32)
        kind = np.uint32 if small and len(self.content) < 1 << 32 else np.int64
        offsets = np.zeros(len(lengths) + 1, kind)
        np.cumsum(lengths, dtype=kind, out=offsets[1:])
        self.lengths = bytearray()
        return Texts(np.frombuffer(self.content, np.uint8), offsets)


def keys_of(paths) -> np.ndarray:
    """64-bit keys (N,) of paths: by these a list finds its files in a pack of another list."""
    encoded = (path.encode("utf-8", ERRORS) for path in paths)
    digests = (hashlib.blake2b(path, digest_size=8).digest() for path in encoded)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64)


def find_keys(keys, order, wanted) -> np.ndarray:
    """The rows (N,) of wanted keys (N,) among ``keys`` (M,), which ``order`` (M,) sorts; -1 where there is none."""
    if not len(keys):
        return np.full(len(wanted), -1)
    rows = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return np.where(keys[rows] == wanted, rows, -1)
