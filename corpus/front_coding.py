"""Texts of which neighbours are alike, as the paths of a train list, in a third of the room of their bytes.

Front coding, in blocks (Witten, Moffat and Bell, Managing Gigabytes, 1999, section 4.1): of a text is kept how many
bytes at its begin are those of the text before, and the rest of it. The first text of a block is whole, so that any
text is found by reading a block at most.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from corpus.texts import ERRORS, TextSequence, encoded, lengths_of

BLOCK = 8  # texts: fewer are found faster, more take less room
MOST = 255  # bytes shared with the text before: what a byte can say
LONG = 255  # in place of the length of a rest that is as long or longer: it follows in four bytes
AT_ONCE = 1 << 13  # texts that are coded together, which fit into the cache


class FrontCodedTexts(TextSequence):
    """Texts, each as bytes shared with the one before, length of the rest, rest; ``begins``: the places of blocks.

    Shared are bytes, not characters: a prefix may end within one.
    """

    def __init__(self, content: bytearray, begins: np.ndarray, count: int):
        self.content, self.begins, self.count = content, begins, count

    @classmethod
    def of(cls, texts) -> "FrontCodedTexts":
        """Make it of any texts."""
        coder = FrontCoder()
        for slab in encoded(texts):
            coder.add(b"".join(slab), lengths_of(slab))
        return coder.done()

    def __len__(self):
        return self.count

    def text(self, index: int) -> str:
        block, number = divmod(index, BLOCK)
        return next(itertools.islice(self._decoded(block), number, None)).decode("utf-8", ERRORS)

    def between(self, first: int, last: int) -> Iterator[str]:
        if first >= last:
            return
        block, number = divmod(first, BLOCK)
        for text in itertools.islice(self._decoded(block), number, number + last - first):
            yield text.decode("utf-8", ERRORS)

    def _decoded(self, block: int) -> Iterator[bytes]:
        """The texts from a block on; whoever takes more than there are gets an IndexError."""
        content, place, text = self.content, int(self.begins[block]), b""
        while True:
            shared, length = content[place], content[place + 1]
            place += 2
            if length == LONG:
                length = int.from_bytes(content[place : place + 4], "little")
                place += 4
            text = text[:shared] + content[place : place + length]
            yield text
            place += length


class FrontCoder:
    """Codes texts as they come; what it has coded grows in place, so that it is never there twice."""

    def __init__(self):
        self.content, self.begins, self.count, self.last = bytearray(), [], 0, b""

    def add(self, content: bytes, lengths: np.ndarray):
        """Add texts in UTF-8, joined to one piece, of which each has so many bytes (n,)."""
        ends = np.append(0, sums_of(lengths.astype(np.int64)))
        for first in range(0, len(lengths), AT_ONCE):
            last = min(first + AT_ONCE, len(lengths))
            self._add(content[ends[first] : ends[last]], lengths[first:last])

    def _add(self, content: bytes, lengths: np.ndarray):
        whole = np.arange(self.count, self.count + len(lengths)) % BLOCK == 0
        lengths = np.append(len(self.last), lengths)
        starts = sums_of(lengths) - lengths
        padded = np.frombuffer(self.last + content + bytes(MOST), np.uint8)
        shared = np.where(whole, 0, shared_with_last(padded, starts, lengths))
        rest = lengths[1:] - shared
        heads = np.where(rest < LONG, 2, 6)
        sizes = heads + rest
        places = sums_of(sizes) - sizes
        # Where each byte comes from, if those of the heads came from what is before a rest.
        source = np.arange(sizes.sum()) + np.repeat(starts[1:] + shared - heads - places, sizes)
        code = padded[np.maximum(source, 0)]
        code[places] = shared
        code[places + 1] = np.minimum(rest, LONG)
        long = np.flatnonzero(rest >= LONG)
        code[places[long, None] + np.arange(2, 6)] = rest[long].astype("<u4").view(np.uint8).reshape(-1, 4)
        self.begins.append(len(self.content) + places[whole])
        self.content += code.data
        self.count += len(whole)
        self.last = content[len(content) - lengths[-1] :]

    def done(self) -> FrontCodedTexts:
        """All texts that were added."""
        begins = np.concatenate([np.empty(0, np.int64), *self.begins])
        small = len(self.content) < 1 << 32
        return FrontCodedTexts(self.content, begins.astype(np.uint32) if small else begins, self.count)


def sums_of(numbers: np.ndarray) -> np.ndarray:
    """Sums (N,) of the first 1 to N numbers.

    ``np.cumsum`` makes a text at each call to look up a method by. CPython's cache of methods keeps thousands of such,
    and each of them a part of the memory in which the texts of a list lay: 80 MB of ten million lines.
    """
    return np.add.accumulate(numbers)


def shared_with_last(padded: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Bytes, MOST at most, that each of N texts but the first begins with as the one before does -> (N - 1,).

    ``padded``: the texts, uint8, and MOST bytes.
    """
    width = min(max(int(lengths.max()), 1), MOST)
    rows = sliding_window_view(padded, width)[starts]
    differ = np.ones((len(rows) - 1, width + 1), bool)
    np.not_equal(rows[1:], rows[:-1], out=differ[:, :width])
    return np.minimum(differ.argmax(axis=1), np.minimum(lengths[1:], lengths[:-1]))
