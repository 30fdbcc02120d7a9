"""Packets of a call over the internet that get lost."""

import numpy as np

from augmentation.ranges import within
from config import SAMPLE_RATE


class Augmentation:
    """Loses a ``share`` of packets of ``ms``; ``repeat`` puts the packet before, at half its level, in its place."""

    def __init__(self, share=(0.02, 0.15), ms=20, repeat=True, sample_rate=SAMPLE_RATE):
        if not 0 < ms <= 10000:
            raise ValueError(f"ms: {ms}, expected the length of a packet from 1 to 10000")
        self.share, self.samples, self.repeat = within("share", share, 0, 1), ms * sample_rate // 1000, repeat

    def draw(self, x, rng, sounds) -> dict:
        """Draw which packets are lost, by a seed."""
        share, seed = float(rng.uniform(*self.share)), int(rng.integers(1 << 62))
        return {"seed": seed, "share": share, "samples": self.samples, "repeat": self.repeat}

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Lose packets."""
        x, size = x.copy(), draw["samples"]
        lost = np.random.default_rng(draw["seed"]).random(-(-len(x) // size)) < draw["share"]
        for start in (np.flatnonzero(lost) * size).tolist():
            part = x[start : start + size]
            part[:] = x[start - size : start][: len(part)] / 2 if draw["repeat"] and start else 0
        return x
