"""Arithmetic on waveforms, float32 throughout, that gives the same bits in every process."""

import functools

import numpy as np
import scipy

from config import SAMPLE_RATE

TOGETHER = 4  # rows of float32 that scipy's pocketfft transforms at once, one in each part of a register
TAPS_SECONDS = 0.025  # of a filter: edges of 130 Hz
SILENT_POWER = 1e-10  # -100 dB of full scale: no signal-to-noise ratio can be set with such a recording


def energy(x: np.ndarray) -> float:
    """Sum the squares of a waveform (samples,) float32.

    In pieces: BLAS splits longer products over its threads, and the sum would depend on their number. Who calls it for
    a waveform that may be beyond all measure lets numpy ignore ``over``, once for all that is done to the waveform.
    """
    total = 0.0
    for begin in range(0, len(x), 8192):
        part = x[begin : begin + 8192]
        total += float(part.dot(part))
    return total if total < np.inf else float(np.sum(np.square(x, dtype=np.float64)))


def convolve(x: np.ndarray, rir: np.ndarray) -> np.ndarray:
    """Convolve a waveform (samples,) float32 with an impulse response, cut to the waveform's length.

    Overlap-save (Stockham 1966) in few long pieces, and the response is transformed beside them: for TOGETHER rows of
    one length pocketfft takes less than half of the time that it takes for them one after the other.
    """
    rir = rir[: len(x)]
    before, rows, hop, size = len(rir) - 1, *_pieces(len(x), len(rir))
    padded = np.zeros((rows - 2) * hop + size, np.float32)  # of each piece the samples before it come first
    padded[before : before + len(x)] = x
    blocks = np.empty((rows, size), np.float32)
    blocks[:-1] = np.ndarray((rows - 1, size), np.float32, padded, 0, (4 * hop, 4))
    blocks[-1, : len(rir)] = rir
    blocks[-1, len(rir) :] = 0
    spectra = scipy.fft.rfft(blocks)
    spectra[:-1] *= spectra[-1]
    y = scipy.fft.irfft(spectra, size, overwrite_x=True)
    return y[:-1, before : before + hop].reshape(-1)[: len(x)]


@functools.lru_cache(maxsize=1 << 14)
def _pieces(samples: int, taps: int) -> tuple[int, int, int]:
    """Rows to transform together (pieces of a waveform and the response), samples of a piece, and of a transform."""
    found = []
    for rows in range(TOGETHER, 16 * TOGETHER + 1, TOGETHER):
        hop = -(-samples // (rows - 1))
        size = scipy.fft.next_fast_len(hop + taps - 1, real=True)
        found.append((rows * size, rows, hop, size))
    return min(found)[1:]


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
