"""Synthetic noise whose power falls with frequency."""

import functools

import numpy as np
import scipy

from augmentation.operations import OnDevice, Operation, added
from augmentation.ranges import decibels, within
from augmentation.waveforms import energy, gain_for, mix


@functools.lru_cache(maxsize=2)  # to draw and to apply takes the same
def noise_of(samples: int, seed: int, slope: float) -> np.ndarray:
    """Gaussian noise (samples,) with a power of 1 / f ** slope."""
    noise = np.random.default_rng(seed).standard_normal(samples, dtype=np.float32)
    if not slope:
        return noise
    size = scipy.fft.next_fast_len(samples, real=True)
    spectrum = scipy.fft.rfft(noise, size)
    spectrum[1:] *= np.arange(1, len(spectrum), dtype=np.float32) ** np.float32(-slope / 2)
    spectrum[0] = 0
    return scipy.fft.irfft(spectrum, size)[:samples].astype(np.float32, copy=False)


class Augmentation(OnDevice):
    """Adds noise at a ratio of ``snr`` in dB whose ``slope`` is drawn: 0 is white, 1 pink, 2 brown."""

    def __init__(self, snr=(10, 30), slope=(0, 2)):
        self.snr, self.slope = decibels("snr", snr), within("slope", slope, -10, 10)

    def choose(self, samples, rng, sounds) -> list[dict]:
        """Draw a seed, a slope and a ratio."""
        draw = {"seed": int(rng.integers(1 << 62)), "slope": float(rng.uniform(*self.slope))}
        return [{**draw, "snr_db": float(rng.uniform(*self.snr))}]

    def measure(self, x, draws, sounds):
        """Find the factor of the noise."""
        for draw in draws:
            draw["gain"] = gain_for(energy(x), noise_of(len(x), draw["seed"], draw["slope"]), draw["snr_db"])

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Add the noise."""
        return mix(x, noise_of(len(x), draw["seed"], draw["slope"]), draw["gain"])

    def operation(self, draw, samples, sounds) -> Operation:
        """Add the noise."""
        noise = noise_of(samples, draw["seed"], draw["slope"])
        return added(draw, noise, noise)
