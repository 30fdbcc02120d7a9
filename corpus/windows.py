"""Embeddings of recordings of any length: several at the same time, and the longest in windows."""

import copy
import math
import queue
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import torch

from config import SAMPLE_RATE
from corpus.audio import least_samples
from errors import refuses_numbers, with_place

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")  # CUDA's, Linux's, Windows'
MOST_AT_ONCE = 8  # batches that are embedded at the same time on a CPU: each needs memory of its own


def batches_at_once(device) -> int:
    """Batches of recordings to embed at the same time; each has an equal share of the threads."""
    threads = torch.get_num_threads()
    share = -(-threads // MOST_AT_ONCE)
    return threads // share if device.type == "cpu" else 1


class Replicas:
    """A network that ``count`` threads may call at the same time; 1 if it cannot be copied.

    Each call has modules and buffers of its own, for a plug-in may keep what a forward pass found in them; all share
    the parameters.
    """

    def __init__(self, network, device):
        self.count, self.free = batches_at_once(device), queue.SimpleQueue()
        self.free.put(network)
        memo = {id(parameter): parameter for parameter in network.parameters()}
        for module in network.modules():  # tensors in plain attributes: torch does not copy those of a graph
            for value in vars(module).values():
                if torch.is_tensor(value) and id(value) not in memo:
                    memo[id(value)] = value.detach().clone()
        try:
            for _ in range(self.count - 1):
                self.free.put(copy.deepcopy(network, dict(memo)))
        except Exception:  # what a plug-in holds may refuse in any way; only time is lost
            self.count = 1

    def __call__(self, x):
        network = self.free.get()
        try:
            return network(x)
        finally:
            self.free.put(network)


def in_order(batches, embed, at_once: int):
    """Pairs (batch, ``embed(batch, alone)``) in the order of the batches; ``at_once`` are embedded at the same time.

    They share torch's threads. Recordings of different lengths cannot be one batch, and all threads on one recording
    after the other wait for one another the more of them there are. A batch for which memory is too small beside
    others is embedded again ``alone``. An exception in place of a batch is passed on.
    """
    threads = torch.get_num_threads()
    share = max(1, threads // at_once)
    if at_once == 1:
        yield from ((batch, None if isinstance(batch, Exception) else embed(batch, True)) for batch in batches)
        return
    waiting: deque = deque()
    try:
        with ThreadPoolExecutor(at_once, initializer=torch.set_num_threads, initargs=[share]) as pool:
            for batch in batches:
                failed = isinstance(batch, Exception)
                waiting.append((batch, None if failed else pool.submit(embed, batch, False)))
                if len(waiting) > at_once or failed:
                    yield from _done(waiting, embed, len(waiting) if failed else 1)
            yield from _done(waiting, embed, len(waiting))
    finally:
        torch.set_num_threads(threads)  # of threads to come: they would have those of the pool, which were set last


def _done(waiting: deque, embed, count: int):
    """Take the first ``count`` pairs of a batch and its future, when they are done."""
    for _ in range(count):
        batch, future = waiting.popleft()
        if future is not None and is_out_of_memory(future.exception()):
            wait([other for _, other in waiting if other is not None])
            yield batch, embed(batch, True)
        else:
            yield batch, future and future.result()


def window_samples(seconds: float, sample_rate: int = SAMPLE_RATE) -> int:
    """Samples of a window of ``embed_window_seconds``, 0 for none."""
    return max(round(seconds * sample_rate), least_samples(sample_rate)) if seconds else 0


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


def embed_rows(forward, x, window: int, dimension: int, alone: bool = True, sample_rate: int = SAMPLE_RATE):
    """Embed waveforms (B, samples) as ``embed_windows`` does, with what memory there is.

    Returns ((B, dimension), {row: reason}): rows of NaN for which memory is too small even alone, or whose numbers an
    operation refuses. Unless the batch is ``alone``, others have part of the memory, and a lack of it is raised.
    """
    try:
        return embed_windows(forward, x, window), {}
    except Exception as error:  # of memory, or of a plug-in
        refused = with_place(error) if refuses_numbers(error) else ""
        if not refused and not (alone and is_out_of_memory(error)):
            raise
    # Outside of the except clause: the error would keep the tensors of the failed attempt alive.
    seconds = f"{x.shape[1] / sample_rate:.0f} s"
    if len(x) == 1:
        memory = f"needs more memory than there is ({seconds}); a smaller embed_window_seconds needs less"
        return torch.full((1, dimension), math.nan), {0: refused or memory}
    if not refused:
        print(f"not enough memory to embed {len(x)} waveforms of {seconds} at once: one by one", file=sys.stderr)
    parts = [embed_rows(forward, row[None], window, dimension, sample_rate=sample_rate) for row in x]
    problems = {row: part[1][0] for row, part in enumerate(parts) if part[1]}
    return torch.cat([part[0] for part in parts]), problems


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception says that memory, of the machine or of the GPU, is too small."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
    )
