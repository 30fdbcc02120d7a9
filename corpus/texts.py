"""Millions of texts in two arrays, which processes that are forked share."""

import hashlib
import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np

ERRORS = "surrogateescape"  # bytes of a name that are not UTF-8 stand for themselves
SLAB = 1 << 16  # texts worked on at once


class TextSequence(Sequence):
    """A sequence of texts that are kept as bytes of UTF-8.

    A Python list of as many would take four times the memory, and every loader process would copy it page by page.
    """

    @abstractmethod
    def text(self, index: int) -> str:
        """The text at an index from 0 to before the length."""

    @abstractmethod
    def between(self, first: int, last: int) -> Iterator[str]:
        """Yield the texts from ``first`` to before ``last``; faster than one by one."""

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.text(i) for i in range(*index.indices(len(self)))]
        index, count = int(index), len(self)
        if not -count <= index < count:
            raise IndexError(index)
        return self.text(index % count)

    def __iter__(self):
        return self.between(0, len(self))


class Texts(TextSequence):
    """Texts in one array of bytes, and the offsets (N + 1,) at which they begin."""

    def __init__(self, content: np.ndarray, offsets: np.ndarray):
        self.content, self.offsets = content, offsets

    @classmethod
    def of(cls, texts) -> "Texts":
        """Make it of any texts."""
        content, lengths = bytearray(), bytearray()  # which grow in place, so that the content is never there twice
        for slab in encoded(texts):
            content += b"".join(slab)
            lengths += lengths_of(slab).tobytes()
        offsets = np.zeros(len(lengths) // 4 + 1, np.int64)
        np.cumsum(np.frombuffer(lengths, np.int32), out=offsets[1:])
        return cls(np.frombuffer(content, np.uint8), offsets)

    def __len__(self):
        return len(self.offsets) - 1

    def text(self, index: int) -> str:
        begin, end = int(self.offsets[index]), int(self.offsets[index + 1])
        return self.content[begin:end].tobytes().decode("utf-8", ERRORS)

    def between(self, first: int, last: int) -> Iterator[str]:
        for begin in range(first, last, SLAB):
            offsets = self.offsets[begin : min(begin + SLAB, last) + 1].tolist()
            slab, first = self.content[offsets[0] : offsets[-1]].tobytes(), offsets[0]
            for start, end in itertools.pairwise(offsets):
                yield slab[start - first : end - first].decode("utf-8", ERRORS)


def encoded(texts) -> Iterator[list[bytes]]:
    """Yield any texts in UTF-8, many at a time."""
    texts = iter(texts)
    while slab := [text.encode("utf-8", ERRORS) for text in itertools.islice(texts, SLAB)]:
        yield slab


def lengths_of(texts: list[bytes]) -> np.ndarray:
    """The bytes (n,) int32 of each text."""
    return np.fromiter(map(len, texts), np.int32, len(texts))


def keys_of(paths) -> np.ndarray:
    """64-bit keys (N,) of paths: by these a list finds its files in a pack of another list."""
    digests = (hashlib.blake2b(path, digest_size=8).digest() for slab in encoded(paths) for path in slab)
    return np.fromiter((int.from_bytes(digest, "little") for digest in digests), np.uint64)


def find_keys(keys, order, wanted) -> np.ndarray:
    """The rows (N,) of wanted keys (N,) among ``keys`` (M,), which ``order`` (M,) sorts; -1 where there is none."""
    if not len(keys):
        return np.full(len(wanted), -1)
    rows = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    return np.where(keys[rows] == wanted, rows, -1)
