"""Embeddings of recordings too long to embed at once."""

import math
import sys

import numpy as np
import torch

from corpus.audio import MIN_SAMPLES, SAMPLE_RATE

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")  # CUDA's, Linux's, Windows'


def window_samples(seconds: float) -> int:
    """Samples of a window of ``embed_window_seconds``, 0 for none."""
    return max(round(seconds * SAMPLE_RATE), MIN_SAMPLES) if seconds else 0


def embed_windows(forward, x, window: int):
    """Embed waveforms (B, samples) by ``forward`` -> (B, D), those longer than ``window`` in windows of that length.

    The windows are evenly spaced and share at least a quarter with the next one. The embedding is the mean of theirs,
    not length-normalised, as Kaldi averages the x-vectors of chunks: of equal windows, so each weighs the same.
    """
    samples = x.shape[1]
    if not 0 < window < samples:
        return forward(x)
    count = math.ceil((samples - window) / (0.75 * window)) + 1
    starts = np.linspace(0, samples - window, count).astype(np.int64)
    return sum(forward(x[:, start : start + window]) for start in starts.tolist()) / count


def embed_rows(forward, x, window: int, dimension: int):
    """Embed waveforms (B, samples) as ``embed_windows`` does, with what memory there is.

    Returns ((B, dimension), {row: reason}): rows of NaN for which memory is too small even alone.
    """
    try:
        return embed_windows(forward, x, window), {}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Outside of the except clause: the error would keep the tensors of the failed attempt alive.
    seconds = f"{x.shape[1] / SAMPLE_RATE:.0f} s"
    if len(x) == 1:
        reason = f"needs more memory than there is ({seconds}); a smaller embed_window_seconds needs less"
        return torch.full((1, dimension), math.nan), {0: reason}
    print(f"not enough memory to embed {len(x)} waveforms of {seconds} at once: one by one", file=sys.stderr)
    parts = [embed_rows(forward, row[None], window, dimension) for row in x]
    problems = {row: part[1][0] for row, part in enumerate(parts) if part[1]}
    return torch.cat([part[0] for part in parts]), problems


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of the machine or of the GPU, is too small."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )
