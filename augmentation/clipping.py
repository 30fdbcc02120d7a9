"""Overdriven recordings."""

import numpy as np

from augmentation.operations import CLIP, OnDevice, Operation
from augmentation.ranges import within


class Augmentation(OnDevice):
    """Cuts off all above a limit, a part of the largest sample drawn from ``level``."""

    def __init__(self, level=(0.1, 0.7)):
        self.level = within("level", level, 0.001, 1)

    def choose(self, samples, rng, sounds) -> list[dict]:
        """Draw a level."""
        return [{"level": float(rng.uniform(*self.level))}]

    def measure(self, x, draws, sounds):
        """Find the limit."""
        for draw in draws:
            draw["limit"] = float(draw["level"] * np.abs(x).max())

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Clip."""
        return np.clip(x, np.float32(-draw["limit"]), np.float32(draw["limit"]))

    def operation(self, draw, samples, sounds) -> Operation:
        """Clip."""
        if "limit" in draw:
            return Operation(CLIP, draw["limit"])
        return Operation(CLIP, draw["level"], relative=True, found="limit")
