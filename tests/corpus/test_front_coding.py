"""Texts that are kept front-coded, against plain lists of them."""

import pickle
import random

import numpy as np
import pytest

from corpus.front_coding import BLOCK, FrontCodedTexts, FrontCoder
from corpus.texts import lengths_of

DRAW = random.Random(3)
VIDEOS = ["21Uxsk56VDQ", "Yd-ZUnFVd90", "_RkpUoSdMl4", "0qQ9kkFlGxE"]
PATHS = [f"id{s:05}/{video}/{clip:05}.wav" for s in range(40) for video in VIDEOS for clip in range(s % 11)]
SIZES = (0, 1, 253, 254, 255, 256, 257, 511, 70000)
LONG = ["x" * size + end for size in SIZES for end in ("", "", "a", "é", "\udcff")]
ODD = ["", "é.wav", "è.wav", "\udcc3.wav", "\udcc3", "日本", "日木", "日本", "\0", "a\nb", "\U0001f600", ""]
LISTS = {
    "sorted": PATHS,
    "shuffled": DRAW.sample(PATHS, len(PATHS)),
    "long": LONG,
    "long, shuffled": DRAW.sample(LONG * 3, len(LONG) * 3),
    "odd": ODD * 3,
    "all": DRAW.sample(PATHS + LONG + ODD, len(PATHS + LONG + ODD)),
    "alike": ["same"] * 50,
    "empty texts": [""] * 33,
    "one": ["a.wav"],
    "none": [],
}


@pytest.fixture(params=LISTS)
def texts(request):
    return LISTS[request.param]


def plainly_coded(texts: list[bytes]) -> bytes:
    """What the texts are coded as, one after the other."""
    coded = b""
    for number, text in enumerate(texts):
        shared, most = 0, min(255, len(text)) if number % BLOCK else 0
        while shared < most and text[: shared + 1] == texts[number - 1][: shared + 1]:
            shared += 1
        rest = text[shared:]
        length = bytes([len(rest)]) if len(rest) < 255 else b"\xff" + len(rest).to_bytes(4, "little")
        coded += bytes([shared]) + length + rest
    return coded


def test_front_coded_texts_are_those_of_a_list(texts):
    coded = FrontCodedTexts.of(texts)
    assert len(coded) == len(texts) and list(coded) == texts and coded[:] == texts
    assert [coded[i] for i in np.arange(-len(texts), len(texts))] == texts * 2
    assert coded[3:70:7] == texts[3:70:7] and coded[::-1] == texts[::-1]
    for first, last in ((0, 0), (0, 1), (7, 29), (15, 17), (16, 33), (5, 4), (len(texts), len(texts))):
        last = min(last, len(texts))
        assert list(coded.between(first, last)) == texts[first:last]
    for index in (len(texts), -len(texts) - 1):
        with pytest.raises(IndexError):
            coded[index]
    again = pickle.loads(pickle.dumps(coded))  # as loader processes get it that are spawned
    assert list(again) == texts


def test_any_pieces_are_coded_as_the_whole_is(texts, monkeypatch):
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    expected = plainly_coded(encoded)
    for at_once in (1 << 13, 5):
        monkeypatch.setattr("corpus.front_coding.AT_ONCE", at_once)
        draw, coder, left = random.Random(at_once), FrontCoder(), encoded
        while left:
            count = draw.choice([0, 1, 2, 16, 40])
            coder.add(b"".join(left[:count]), lengths_of(left[:count]))
            left = left[count:]
        assert coder.content == expected and list(coder.done()) == texts


def test_paths_of_a_sorted_list_take_little_room():
    coded = FrontCodedTexts.of(PATHS)
    assert len(coded.content) + coded.begins.nbytes < sum(map(len, PATHS)) * 0.45
