"""Arithmetic on waveforms, float32 throughout, that gives the same bits in every process."""

import numpy as np
import scipy

BLOCK = 4096  # samples of a partition; transforms of twice that fit into a core's cache
MOST_PARTITIONS = 16  # of an impulse response; a longer one has longer partitions


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
