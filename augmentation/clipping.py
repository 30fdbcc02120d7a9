"""Overdriven recordings."""

import numpy as np

from augmentation.ranges import within


class Augmentation:
    """Cuts off all above a limit, a part of the largest sample drawn from ``level``."""

    def __init__(self, level=(0.1, 0.7)):
        self.level = within("level", level, 0.001, 1)

    def draw(self, x, rng, sounds) -> dict:
        """Draw a limit."""
        return {"limit": float(rng.uniform(*self.level) * np.abs(x).max())}

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Clip."""
        return np.clip(x, np.float32(-draw["limit"]), np.float32(draw["limit"]))
