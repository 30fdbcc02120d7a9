"""Pieces of time that are missing."""

from augmentation.ranges import counts, within
from config import SAMPLE_RATE


class Augmentation:
    """Silences ``count`` pieces of a length drawn from ``seconds``."""

    def __init__(self, count=(1, 4), seconds=(0.05, 0.2), sample_rate=SAMPLE_RATE):
        self.count, self.seconds = counts("count", count), within("seconds", seconds, 0, 3600)
        self.sample_rate = sample_rate

    def draw(self, x, rng, sounds) -> list[dict]:
        """Draw pieces."""
        draws = []
        for _ in range(int(rng.integers(self.count[0], self.count[1] + 1))):
            samples = min(int(rng.uniform(*self.seconds) * self.sample_rate), len(x))
            draws.append({"first": int(rng.integers(len(x) - samples + 1)), "samples": samples})
        return draws

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Silence."""
        x = x.copy()
        x[draw["first"] : draw["first"] + draw["samples"]] = 0
        return x
