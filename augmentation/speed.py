"""Faster and slower speech of the same speaker."""

import numpy as np

from augmentation.ranges import within
from augmentation.waveforms import resampled


class Augmentation:
    """Plays a crop at a speed drawn from ``factor``, in hundredths; pitch changes too. A shorter one is repeated.

    The speaker keeps his label; ``speed_perturb`` makes new speakers.
    """

    def __init__(self, factor=(0.95, 1.05)):
        self.factor = within("factor", factor, 0.5, 2)

    def draw(self, x, rng, sounds) -> dict:
        """Draw a speed."""
        return {"percent": round(100 * rng.uniform(*self.factor))}

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Resample."""
        if not 50 <= draw["percent"] <= 200:
            raise ValueError(f"a speed of {draw['percent']} %")
        return np.resize(resampled(x, 100, draw["percent"]), len(x)) if draw["percent"] != 100 else x
