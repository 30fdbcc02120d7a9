"""Pieces of time that are missing."""

from augmentation.operations import SILENCE, OnDevice, Operation
from augmentation.ranges import counts, within
from config import SAMPLE_RATE


class Augmentation(OnDevice):
    """Silences ``count`` pieces of a length drawn from ``seconds``."""

    def __init__(self, count=(1, 4), seconds=(0.05, 0.2), sample_rate=SAMPLE_RATE):
        self.count, self.seconds = counts("count", count), within("seconds", seconds, 0, 3600)
        self.sample_rate = sample_rate

    def choose(self, samples, rng, sounds) -> list[dict]:
        """Draw pieces."""
        draws = []
        for _ in range(int(rng.integers(self.count[0], self.count[1] + 1))):
            silent = min(int(rng.uniform(*self.seconds) * self.sample_rate), samples)
            draws.append({"first": int(rng.integers(samples - silent + 1)), "samples": silent})
        return draws

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Silence."""
        x = x.copy()
        x[draw["first"] : draw["first"] + draw["samples"]] = 0
        return x

    def operation(self, draw, samples, sounds) -> Operation:
        """Silence."""
        return Operation(SILENCE, first=draw["first"], count=draw["samples"])
