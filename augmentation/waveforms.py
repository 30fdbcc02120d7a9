"""Arithmetic on waveforms, float32 throughout, that gives the same bits in every process."""

import functools

import numpy as np
import scipy

from config import SAMPLE_RATE

BLOCK = 4096  # samples of a partition; transforms of twice that fit into a core's cache
MOST_PARTITIONS = 16  # of an impulse response; a longer one has longer partitions
TAPS_SECONDS = 0.025  # of a filter: edges of 130 Hz
SILENT_POWER = 1e-10  # -100 dB of full scale: no signal-to-noise ratio can be set with such a recording


def energy(x: np.ndarray) -> float:
    """Sum the squares of a waveform (samples,) float32.

    In pieces: BLAS splits longer products over its threads, and the sum would depend on their number.
    """
    total = 0.0
    with np.errstate(over="ignore"):
        for begin in range(0, len(x), 8192):
            part = x[begin : begin + 8192]
            total += float(np.dot(part, part))
    return total if total < np.inf else float(np.sum(np.square(x, dtype=np.float64)))


def convolve(x: np.ndarray, rir: np.ndarray) -> np.ndarray:
    """Convolve a waveform (samples,) float32 with an impulse response, cut to the waveform's length.

    Uniformly partitioned overlap-add (Stockham 1966): x and the response are cut into blocks of equal length, which are
    transformed side by side. One transform of the whole takes two to three times as long.
    """
    block = BLOCK
    while len(rir) > MOST_PARTITIONS * block:
        block *= 2
    count, parts = -(-len(x) // block), min(-(-len(rir) // block), -(-len(x) // block))
    blocks = np.zeros((count + parts, 2 * block), np.float32)
    _lay_out(x, blocks[:count], block)
    _lay_out(rir[: parts * block], blocks[count:], block)
    spectra = scipy.fft.rfft(blocks)
    product = spectra[:count] * spectra[count]
    for delay in range(1, parts):
        product[delay:] += spectra[: count - delay] * spectra[count + delay]
    sums = scipy.fft.irfft(product, 2 * block)
    y = sums[:, :block]
    y[1:] += sums[:-1, block:]
    return y.reshape(-1)[: len(x)]


def _lay_out(x: np.ndarray, rows: np.ndarray, block: int):
    """Write a waveform into the first ``block`` places of each row."""
    whole = len(x) // block
    rows[:whole, :block] = x[: whole * block].reshape(whole, block)
    if whole < len(rows):
        rows[whole, : len(x) - whole * block] = x[whole * block :]


def mix(x: np.ndarray, noise: np.ndarray, gain: float) -> np.ndarray:
    """Add noise times ``gain`` to a crop, both (samples,) float32."""
    scaled = np.float32(gain) * noise
    scaled += x
    return scaled


def gain_for(signal: float, noise: np.ndarray, snr_db: float) -> float:
    """The factor of a noise (samples,) that brings it ``snr_db`` below a crop of as many samples and energy ``signal``.

    0 if one of them is silent or not finite.
    """
    signal, power = signal / len(noise), energy(noise) / len(noise)
    if not (SILENT_POWER < signal < np.inf and SILENT_POWER <= power < np.inf):
        return 0.0
    return float(np.sqrt(signal / power / 10 ** (snr_db / 10)))


@functools.lru_cache(maxsize=256)
def band_filter(low: float, high: float, stop: bool = False, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """A linear-phase filter (taps,) that passes what lies between two frequencies in Hz, or stops it."""
    edges = [edge for edge in (low, high) if 0 < edge < sample_rate / 2]
    if not edges:  # what the rate cannot hold is not there to be stopped
        return np.ones(1, np.float32)
    passes_zero = stop if low > 0 else not stop
    taps = 2 * int(TAPS_SECONDS * sample_rate / 2) + 1
    return scipy.signal.firwin(taps, edges, pass_zero=passes_zero, fs=sample_rate).astype(np.float32)


def filtered(x: np.ndarray, taps: np.ndarray) -> np.ndarray:
    """Filter a crop (samples,) without delay."""
    half = len(taps) // 2
    return convolve(np.concatenate([x, np.zeros(half, np.float32)]), taps)[half:]


def resampled(x: np.ndarray, up: int, down: int) -> np.ndarray:
    """Change the rate of a crop (samples,) float32 by ``up`` / ``down``."""
    return scipy.signal.resample_poly(x, up, down).astype(np.float32, copy=False)
