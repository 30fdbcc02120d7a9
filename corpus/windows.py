"""Embeddings of recordings of any length: several at the same time, and the longest in windows."""

import copy
import math
import queue
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from corpus.audio import MIN_SAMPLES, SAMPLE_RATE

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")  # CUDA's, Linux's, Windows'
MOST_AT_ONCE = 8  # batches that are embedded at the same time on a CPU: each needs memory of its own


def batches_at_once(device) -> int:
    """Batches of recordings to embed at the same time."""
    return min(torch.get_num_threads(), MOST_AT_ONCE) if device.type == "cpu" else 1


class Replicas:
    """A network that ``count`` threads may call at the same time.

    Each call has modules of its own, for a plug-in may keep what a forward pass found in attributes; all share their
    tensors. If a network cannot be copied, calls wait for one another.
    """

    def __init__(self, network, count: int):
        self.free = queue.SimpleQueue()
        self.free.put(network)
        shared = [*network.parameters(), *network.buffers()]
        shared += [each for module in network.modules() for each in vars(module).values() if torch.is_tensor(each)]
        try:
            for _ in range(count - 1):
                self.free.put(copy.deepcopy(network, {id(tensor): tensor for tensor in shared}))
        except Exception:  # what a plug-in holds may refuse in any way; only time is lost
            return

    def __call__(self, x):
        network = self.free.get()
        try:
            return network(x)
        finally:
            self.free.put(network)


def in_order(batches, embed, at_once: int):
    """Pairs (batch, ``embed(batch)``) in the order of the batches; ``at_once`` of them are embedded at the same time.

    They share torch's threads. Recordings of different lengths cannot be one batch, and all threads on one recording
    after the other wait for one another the more of them there are. An exception in place of a batch is passed on.
    """
    threads = torch.get_num_threads()
    if at_once == 1:
        yield from ((batch, None if isinstance(batch, Exception) else embed(batch)) for batch in batches)
        return
    share, waiting = threads // at_once, deque()
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=[share]) as pool:
            for batch in batches:
                waiting.append((batch, None if isinstance(batch, Exception) else pool.submit(embed, batch)))
                if len(waiting) > at_once or isinstance(batch, Exception):
                    yield from _done(waiting, 1 if not isinstance(batch, Exception) else len(waiting))
            yield from _done(waiting, len(waiting))
    finally:
        torch.set_num_threads(threads)  # of threads to come: they would have those of the pool, which were set last


def _done(waiting: deque, count: int):
    """Take the first ``count`` pairs of a batch and its future, when they are done."""
    for _ in range(count):
        batch, future = waiting.popleft()
        yield batch, future and future.result()


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
