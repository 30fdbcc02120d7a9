"""The band of a telephone line."""

from augmentation.waveforms import band_filter, filtered


class Augmentation:
    """Passes what lies between ``low`` and ``high`` Hz; 300 and 3,400 is the band of ITU-T G.712."""

    def __init__(self, low=300.0, high=3400.0):
        if not 0 < low < high < 8000:
            raise ValueError(f"low: {low:g} and high: {high:g}, expected 0 < low < high < 8000 Hz")
        self.low, self.high = low, high

    def draw(self, x, rng, sounds) -> dict:
        """Draw nothing."""
        return {"low": self.low, "high": self.high}

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Filter."""
        return filtered(x, band_filter(draw["low"], draw["high"]))
