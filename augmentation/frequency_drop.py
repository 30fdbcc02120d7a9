"""Bands of frequencies that are missing."""

from augmentation.ranges import counts, within
from augmentation.waveforms import band_filter, filtered


class Augmentation:
    """Takes out ``count`` bands of a ``width`` in Hz, whose middle is drawn from ``frequency``."""

    def __init__(self, count=(1, 3), frequency=(100, 7500), width=(200, 800)):
        self.count, self.width = counts("count", count), within("width", width, 0, 8000)
        self.frequency = within("frequency", frequency, 0, 8000)

    def draw(self, x, rng, sounds) -> list[dict]:
        """Draw bands, in whole Hz."""
        draws = []
        for _ in range(int(rng.integers(self.count[0], self.count[1] + 1))):
            middle, half = rng.uniform(*self.frequency), rng.uniform(*self.width) / 2
            low, high = min(max(middle - half, 20), 7960), min(middle + half, 7980)
            draws.append({"low": round(low), "high": round(max(high, low + 20))})
        return draws

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Filter."""
        return filtered(x, band_filter(draw["low"], draw["high"], stop=True))
