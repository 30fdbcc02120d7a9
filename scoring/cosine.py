"""Cosine and distance scores of pairs of embeddings, in blocks that stay in the processor's cache."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK = 512  # trials at a time: two blocks of 512 x 192 float32 fit a second-level cache
SHORTEST = 1e-12  # a shorter vector is divided by this
DISTANCE_ELEMENTS = 1 << 20  # differences at a time in minus_mean_distances: 8 MB of float64


def thread_count() -> int:
    """Cores that this process may use; OMP_NUM_THREADS limits them as it does for the matrix products."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(cores, int(limit))) if limit.isdigit() else cores


def in_threads(work, items: int, least: int = 1):
    """Call ``work(begin, end)`` on equal shares of ``items``, a thread each of at least ``least`` items."""
    threads = min(thread_count(), max(1, items // least))
    if threads == 1:
        work(0, items)
        return
    edges = np.linspace(0, items, threads + 1).astype(int).tolist()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, edges[:-1], edges[1:]))


def length_normalize(x) -> np.ndarray:
    """Divide the vectors along the last axis (..., D) by their length; a zero vector stays zero, a NaN one NaN.

    Float64 stays float64, everything else becomes float32.
    """
    x = np.asarray(x)
    x = x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
    length = np.sqrt(np.einsum("...d,...d->...", x, x))
    with np.errstate(invalid="ignore"):  # Inf / Inf is the NaN that the caller counts
        return x / np.maximum(length, SHORTEST)[..., None]


def paired_products(a, b, pairs) -> np.ndarray:
    """Dot products of rows: a (A, D), b (B, D), pairs (N, 2) of a row of ``a`` and a row of ``b`` -> (N,) float64.

    The rows are gathered block by block, so the memory beyond the result is two blocks of ``BLOCK`` rows a thread.
    """
    a, b, pairs = np.asarray(a), np.asarray(b), np.asarray(pairs)
    left, right = (np.ascontiguousarray(pairs[:, side]) for side in (0, 1))
    for name, index, rows in (("first", left, len(a)), ("second", right, len(b))):
        if len(index) and not 0 <= index.min() <= index.max() < rows:
            raise ValueError(f"pairs: the {name} column must lie between 0 and {rows - 1}")
    products = np.empty(len(pairs))

    def score(begin, end):
        block_a, block_b = (np.empty((min(BLOCK, end - begin), x.shape[1]), x.dtype) for x in (a, b))
        for first in range(begin, end, BLOCK):
            part = slice(first, min(first + BLOCK, end))
            count = part.stop - part.start
            # mode "clip" writes straight into the block; the indices were checked above.
            np.take(a, left[part], axis=0, out=block_a[:count], mode="clip")
            np.take(b, right[part], axis=0, out=block_b[:count], mode="clip")
            with np.errstate(invalid="ignore"):  # 0 x Inf is a NaN too
                products[part] = np.einsum("nd,nd->n", block_a[:count], block_b[:count])

    in_threads(score, len(pairs), 8 * BLOCK)
    return products


def cosine_scores(x, pairs, mean=None) -> np.ndarray:
    """Cosine of pairs (N, 2) of rows of embeddings (files, D) -> (N,) float64; a zero embedding scores 0.

    ``mean`` (D,), of a cohort or of the training set, is subtracted first (sub-mean). Products of float32 embeddings
    are summed in float32 (error near 1e-7), of float64 ones in float64.
    """
    x = np.asarray(x)
    x = x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
    x = x if mean is None else x - np.asarray(mean, x.dtype)
    pairs = np.asarray(pairs)
    scores = paired_products(x, x, pairs)
    # dividing the products by the lengths spares a normalised copy of x
    inverse = 1 / np.maximum(np.sqrt(np.einsum("nd,nd->n", x, x)), SHORTEST).astype(np.float64)
    with np.errstate(invalid="ignore"):  # Inf / Inf is the NaN that the caller counts
        for side in (0, 1):
            scores *= inverse[pairs[:, side]]
    return scores


def minus_mean_distances(x, pairs, normalize: bool = False) -> np.ndarray:
    """Minus the mean Euclidean distance over all pairs of crops: x (files, crops, D), pairs (N, 2) -> (N,) float64.

    ``normalize`` divides each crop's embedding by its length first.
    """
    scores = np.empty(len(pairs))
    block = max(1, DISTANCE_ELEMENTS // (x.shape[1] ** 2 * x.shape[2]))
    for begin in range(0, len(pairs), block):
        part = slice(begin, begin + block)
        a, b = (np.asarray(x[pairs[part, side]], np.float64) for side in (0, 1))
        if normalize:
            a, b = length_normalize(a), length_normalize(b)
        difference = a[:, :, None] - b[:, None]
        # differences rather than |a|^2 + |b|^2 - 2ab, which loses the distance of near embeddings to cancellation
        scores[part] = -np.sqrt(np.einsum("nijd,nijd->nij", difference, difference)).mean(axis=(1, 2))
    return scores


def reduce_crops(embeddings, mode: str = "cosine") -> np.ndarray:
    """What a score needs of each file's embeddings (files, crops, D), so that no evaluation keeps more.

    'cosine': the mean of the length-normalised crops, (files, D) float64, for the mean of products is the product of
    means. 'euclidean' compares all pairs of crops: the embeddings as they are.
    """
    x = np.asarray(embeddings)
    return length_normalize(x.astype(np.float64)).mean(axis=1) if mode == "cosine" else x


def score_reduced(x, pairs, normalize: bool = True) -> np.ndarray:
    """Score pairs (N, 2) of rows of what ``reduce_crops`` gave -> (N,) float64, computed in float64."""
    x = np.asarray(x)
    return paired_products(x, x, pairs) if x.ndim == 2 else minus_mean_distances(x, pairs, normalize)


def score_pairs(embeddings, pairs, mode: str = "cosine", normalize: bool = True) -> np.ndarray:
    """Score pairs (N, 2) of rows of embeddings (files, crops, D) -> (N,) float64, computed in float64.

    'cosine': mean cosine over all pairs of crops. 'euclidean': minus the mean distance over all pairs of crops, of
    length-normalised embeddings if ``normalize`` (voxceleb_trainer's score). A zero embedding scores 0.
    """
    return score_reduced(reduce_crops(embeddings, mode), pairs, normalize)
