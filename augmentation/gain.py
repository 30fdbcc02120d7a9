"""Another level."""

import numpy as np

from augmentation.operations import MULTIPLY, OnDevice, Operation
from augmentation.ranges import decibels


class Augmentation(OnDevice):
    """Multiplies by a factor drawn from ``db``, in dB."""

    def __init__(self, db=(-10, 10)):
        self.db = decibels("db", db)

    def choose(self, samples, rng, sounds) -> list[dict]:
        """Draw a gain."""
        return [{"gain_db": float(rng.uniform(*self.db))}]

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Multiply."""
        return x * np.float32(10 ** (draw["gain_db"] / 20))

    def operation(self, draw, samples, sounds) -> Operation:
        """Multiply."""
        return Operation(MULTIPLY, 10 ** (draw["gain_db"] / 20))
