"""Bands of frequencies that are missing."""

from augmentation.operations import OnDevice, Operation, filter_of
from augmentation.ranges import counts, within
from augmentation.waveforms import band_filter, filtered
from config import SAMPLE_RATE


class Augmentation(OnDevice):
    """Takes out ``count`` bands of a ``width`` in Hz, whose middle is drawn from ``frequency``, up to half the rate."""

    def __init__(self, count=(1, 3), frequency=(100, 7500), width=(200, 800), sample_rate=SAMPLE_RATE):
        self.half = sample_rate / 2
        highest = max(self.half, 8000)
        self.count, self.width = counts("count", count), within("width", width, 0, highest)
        self.frequency = [min(edge, self.half) for edge in within("frequency", frequency, 0, highest)]

    def choose(self, samples, rng, sounds) -> list[dict]:
        """Draw bands, in whole Hz."""
        draws = []
        for _ in range(int(rng.integers(self.count[0], self.count[1] + 1))):
            middle, half = rng.uniform(*self.frequency), rng.uniform(*self.width) / 2
            low, high = min(max(middle - half, 20), self.half - 40), min(middle + half, self.half - 20)
            draws.append({"low": round(low), "high": round(max(high, low + 20))})
        return draws

    @staticmethod
    def apply(x, draw: dict, sounds, sample_rate=SAMPLE_RATE):
        """Filter."""
        return filtered(x, band_filter(draw["low"], draw["high"], stop=True, sample_rate=sample_rate))

    def operation(self, draw, samples, sounds) -> Operation:
        """Filter."""
        return filter_of(band_filter(draw["low"], draw["high"], stop=True, sample_rate=sounds.sample_rate))
