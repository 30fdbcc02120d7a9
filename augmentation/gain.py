"""Another level."""

import numpy as np

from augmentation.ranges import decibels


class Augmentation:
    """Multiplies by a factor drawn from ``db``, in dB."""

    def __init__(self, db=(-10, 10)):
        self.db = decibels("db", db)

    def draw(self, x, rng, sounds) -> dict:
        """Draw a gain."""
        return {"gain_db": float(rng.uniform(*self.db))}

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Multiply."""
        return x * np.float32(10 ** (draw["gain_db"] / 20))
