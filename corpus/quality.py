"""What makes a waveform unfit although each of its samples is a number: silent, constant, clipped, far too loud."""

import numpy as np

from corpus.audio import SILENT_DB, decibels

HUGE, LOUD = 1e6, 10.0  # largest |sample|: above HUGE it is no audio, above LOUD probably integers
FULL_SCALE, CLIPPED_SHARE = 0.999, 1e-3  # neighbours that are equal at full scale, of all samples


def flat_tops(x: np.ndarray, magnitude: np.ndarray) -> int:
    """How many samples of x (samples, ...), whose ``magnitude`` is |x|, are equal to the one before at full scale."""
    return int(((magnitude[1:] >= FULL_SCALE) & (x[1:] == x[:-1])).sum())


def oddity(x: np.ndarray) -> str:
    """What stands out in a waveform (samples,) of finite numbers, in a few words; '' if nothing does."""
    if not x.size:
        return ""
    magnitude = np.abs(x)
    peak = float(magnitude.max())
    if peak == 0:
        return "all zero"
    if np.ptp(x) == 0:
        return f"{float(x[0]):.6g} all along"
    if peak > LOUD:
        return f"far too loud: largest sample {peak:.6g}, full scale is 1"
    level = decibels(x)
    if level < SILENT_DB:
        return f"silent: {level:.0f} dBFS"
    share = flat_tops(x, magnitude) / len(x)
    return f"clipped: {100 * share:.2g} % of the samples" if share > CLIPPED_SHARE else ""
