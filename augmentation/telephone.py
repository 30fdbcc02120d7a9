"""The band of a telephone line."""

from augmentation.operations import OnDevice, Operation, filter_of
from augmentation.waveforms import band_filter, filtered
from config import SAMPLE_RATE


class Augmentation(OnDevice):
    """Passes what lies between ``low`` and ``high`` Hz; 300 and 3,400 is the band of ITU-T G.712."""

    def __init__(self, low=300.0, high=3400.0, sample_rate=SAMPLE_RATE):
        if not 0 < low < high < sample_rate / 2:
            raise ValueError(f"low: {low:g} and high: {high:g}, expected 0 < low < high < {sample_rate / 2:g} Hz")
        self.low, self.high = low, high

    def choose(self, samples, rng, sounds) -> list[dict]:
        """Draw nothing."""
        return [{"low": self.low, "high": self.high}]

    @staticmethod
    def apply(x, draw: dict, sounds, sample_rate=SAMPLE_RATE):
        """Filter."""
        return filtered(x, band_filter(draw["low"], draw["high"], sample_rate=sample_rate))

    def operation(self, draw, samples, sounds) -> Operation:
        """Filter."""
        return filter_of(band_filter(draw["low"], draw["high"], sample_rate=sounds.sample_rate))
