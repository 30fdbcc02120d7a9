"""Recordings as most tests ask for them."""

from fractions import Fraction

from corpus.audio import NORMAL, read_crop


def read_audio(path, samples=0, position=0.0, speed: Fraction = NORMAL, first_channel=False, start=None):
    """Read as ``read_crop`` does -> (x, start, rate, channels); ``first_channel``: the first one, not the mean."""
    crop = read_crop(path, samples, position, speed, start, "1" if first_channel else "mix")
    return crop.x, crop.start, crop.rate, crop.channels
