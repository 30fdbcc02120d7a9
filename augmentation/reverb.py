"""Reverberation by an impulse response of rir_path."""

import numpy as np

from augmentation.operations import CONVOLVE, OnDevice, Operation
from augmentation.waveforms import convolve


class Augmentation(OnDevice):
    """Convolves with an impulse response of unit energy; ``align`` drops what comes before its direct path."""

    category = "rir"

    def __init__(self, align=True):
        self.align = align

    def choose(self, samples, rng, sounds) -> list[dict]:
        """Draw an impulse response."""
        rir, draw = sounds.response(int(rng.integers(sounds.count("rir"))))
        if rir is not None and self.align:
            draw["delay"] = int(np.argmax(np.abs(rir)))
        return [draw]

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Convolve."""
        return convolve(x, sounds.rir(draw["path"])[draw.get("delay", 0) :])

    def operation(self, draw, samples, sounds) -> Operation:
        """Convolve."""
        return Operation(CONVOLVE, array=sounds.rir(draw["path"])[draw.get("delay", 0) :][:samples])
