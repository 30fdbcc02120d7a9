"""Faster and slower speech of the same pitch."""

import math

import numpy as np

from augmentation.ranges import within
from config import SAMPLE_RATE

WINDOW, REACH = 0.032, 0.01  # seconds of a window, and that it may be moved by


def layout(sample_rate: int) -> tuple[int, int, int]:
    """Samples between windows, of a window, and that one may be moved by."""
    hop = int(WINDOW * sample_rate) // 2
    return hop, 2 * hop, int(REACH * sample_rate)


class Augmentation:
    """Plays a crop at a tempo drawn from ``factor``, in hundredths; the pitch stays. A shorter one is repeated.

    By waveform similarity overlap-add (Verhelst and Roelands 1993): windows of the crop are laid closer together or
    further apart, each moved so that it goes on as the one before would have. The moves are part of the draw.
    """

    def __init__(self, factor=(0.9, 1.1), sample_rate=SAMPLE_RATE):
        self.factor, self.sample_rate = within("factor", factor, 0.5, 2), sample_rate

    def draw(self, x, rng, sounds) -> dict:
        """Draw a tempo, and find the moves."""
        percent = round(100 * rng.uniform(*self.factor))
        if percent == 100:
            return {"percent": percent, "moves": ""}
        hop, size, reach = layout(self.sample_rate)
        places, padded = _places(len(x), percent, hop, reach), _padded(x, hop, reach)
        moves, before = [], None
        for place in places:
            move = 0
            if before is not None:
                region = padded[place - reach : place + size + reach]
                move = int(np.argmax(np.correlate(region, padded[before + hop : before + hop + size]))) - reach
            before = min(place + move, len(padded) - hop - size)
            moves.append(before - place)
        return {"percent": percent, "moves": " ".join(map(str, moves))}

    @staticmethod
    def apply(x, draw: dict, sounds, sample_rate=SAMPLE_RATE):
        """Lay the windows."""
        percent = draw["percent"]
        if not 50 <= percent <= 200:
            raise ValueError(f"a tempo of {percent} %")
        if percent == 100:
            return x
        hop, size, reach = layout(sample_rate)
        places, padded = _places(len(x), percent, hop, reach), _padded(x, hop, reach)
        moves = [int(move) for move in draw["moves"].split()]
        if len(moves) != len(places) or max(map(abs, moves)) > reach:
            raise ValueError("moves that are not those of the crop")
        window = np.hanning(size + 1)[:-1].astype(np.float32)  # its halves add up to 1
        y = np.zeros(len(places) * hop + hop, np.float32)
        for number, (place, move) in enumerate(zip(places, moves)):
            y[number * hop : number * hop + size] += window * padded[place + move : place + move + size]
        return np.resize(y[hop : hop + math.ceil(100 * len(x) / percent)], len(x))


def _places(samples: int, percent: int, hop: int, reach: int) -> list[int]:
    """First samples of the windows in the padded crop, before they are moved."""
    count = -(-math.ceil(100 * samples / percent) // hop) + 1
    return [reach + number * hop * percent // 100 for number in range(count)]


def _padded(x: np.ndarray, hop: int, reach: int) -> np.ndarray:
    """The crop with silence around it for windows that reach beyond."""
    return np.pad(x, (reach + hop, 2 * reach + 8 * hop))
