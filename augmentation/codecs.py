"""A crop through an encoder and its decoder, in memory, by libsndfile: what the codecs share."""

import io
from typing import ClassVar

import numpy as np
import soundfile

from augmentation.ranges import within
from augmentation.waveforms import resampled
from config import SAMPLE_RATE

RATES = (8000, 16000)  # that the codecs are run at


def through(
    x: np.ndarray, sample_rate: int, rate: int, container: str, subtype: str, delay: int = 0, **options
) -> np.ndarray:
    """Encode and decode a crop (samples,) float32 at ``sample_rate`` by a codec that works at ``rate`` Hz.

    ``delay``: samples of encoder and decoder that libsndfile leaves at the beginning. The level is lowered to full
    scale for the encoder if it is above, and raised again. A crop that is not finite stays as it is.
    """
    peak = float(np.abs(x).max())
    if not np.isfinite(peak):
        return x
    scale = np.float32(max(peak, 1.0))
    given = np.clip(resampled(x / scale, rate, sample_rate), -1, 1)
    coded = io.BytesIO()
    soundfile.write(coded, np.pad(given, (0, delay)), rate, format=container, subtype=subtype, **options)
    coded.seek(0)
    decoded, _ = soundfile.read(coded, dtype="float32")
    back = resampled(decoded[delay:], sample_rate, rate)[: len(x)]
    return scale * np.pad(back, (0, len(x) - len(back)))


def check_codec(container: str, subtype: str, rate: int):
    """ValueError if the rate is not one of RATES, or if the libsndfile here lacks the codec."""
    if rate not in RATES:
        raise ValueError(f"rate: {rate}, expected {' or '.join(map(str, RATES))}")
    if container not in soundfile.available_formats() or subtype not in soundfile.available_subtypes(container):
        version = soundfile.__libsndfile_version__
        raise ValueError(f"libsndfile {version} has no {subtype} in {container}; pip install -U soundfile brings one")


class Codec:
    """A codec at a fixed bit rate; ``rate`` is 8000 (telephony) or 16000 Hz."""

    container, subtype = "WAV", ""

    def __init__(self, rate=8000):
        check_codec(self.container, self.subtype, rate)
        self.rate = rate

    def draw(self, x, rng, sounds) -> dict:
        """Draw nothing."""
        return {"rate": self.rate}

    @classmethod
    def apply(cls, x, draw: dict, sounds, sample_rate=SAMPLE_RATE):
        """Encode and decode."""
        return through(x, sample_rate, draw["rate"], cls.container, cls.subtype)


class VariableCodec:
    """A codec at a bit rate drawn from ``kbps``, in kbit/s."""

    container, subtype = "", ""
    options: ClassVar[dict] = {}
    limits = (0.0, 0.0)  # kbit/s that libsndfile's level of compression spans, from 1 to 0
    delay = 0

    def __init__(self, kbps, rate):
        check_codec(self.container, self.subtype, rate)
        self.kbps, self.rate = within("kbps", kbps, *self.limits), rate

    def draw(self, x, rng, sounds) -> dict:
        """Draw a bit rate."""
        return {"rate": self.rate, "kbps": float(rng.uniform(*self.kbps))}

    @classmethod
    def apply(cls, x, draw: dict, sounds, sample_rate=SAMPLE_RATE):
        """Encode and decode."""
        low, high = cls.limits
        level = min(max((high - draw["kbps"]) / (high - low), 0.0), 0.999)  # LAME takes no 1
        how = {"compression_level": level, **cls.options}
        return through(x, sample_rate, draw["rate"], cls.container, cls.subtype, cls.delay, **how)
