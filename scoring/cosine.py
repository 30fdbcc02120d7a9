"""Cosine and distance scores of pairs of embeddings, in blocks that stay in the processor's cache."""

import numpy as np

BLOCK = 512  # trials at a time: two blocks of 512 x 192 float32 fit a second-level cache
DISTANCE_ELEMENTS = 1 << 20  # differences at a time in minus_mean_distances: 8 MB of float64


def length_normalize(x) -> np.ndarray:
    """Divide the vectors along the last axis (..., D) by their length; a zero vector stays zero, a NaN one NaN.

    Float64 stays float64, everything else becomes float32.
    """
    x = np.asarray(x)
    x = x if x.dtype == np.float64 else x.astype(np.float32, copy=False)
    length = np.sqrt(np.einsum("...d,...d->...", x, x, dtype=np.float64))
    with np.errstate(invalid="ignore"):  # Inf / Inf is the NaN that the caller counts
        return x / np.maximum(length, 1e-12).astype(x.dtype)[..., None]


def paired_products(a, b, pairs) -> np.ndarray:
    """Dot products of rows: a (A, D), b (B, D), pairs (N, 2) of a row of ``a`` and a row of ``b`` -> (N,) float64.

    The rows are gathered block by block, so the memory beyond the result is two blocks of ``BLOCK`` rows.
    """
    a, b, pairs = np.asarray(a), np.asarray(b), np.asarray(pairs)
    left, right = (np.ascontiguousarray(pairs[:, side]) for side in (0, 1))
    for name, index, rows in (("first", left, len(a)), ("second", right, len(b))):
        if len(index) and not 0 <= index.min() <= index.max() < rows:
            raise ValueError(f"pairs: the {name} column must lie between 0 and {rows - 1}")
    products = np.empty(len(pairs))
    block_a = np.empty((min(BLOCK, len(pairs)), a.shape[1]), a.dtype)
    block_b = np.empty((min(BLOCK, len(pairs)), b.shape[1]), b.dtype)
    for begin in range(0, len(pairs), BLOCK):
        part = slice(begin, begin + BLOCK)
        count = len(left[part])
        # mode "clip" writes straight into the block; the indices were checked above.
        np.take(a, left[part], axis=0, out=block_a[:count], mode="clip")
        np.take(b, right[part], axis=0, out=block_b[:count], mode="clip")
        products[part] = np.einsum("nd,nd->n", block_a[:count], block_b[:count])
    return products


def cosine_scores(x, pairs, mean=None) -> np.ndarray:
    """Cosine of pairs (N, 2) of rows of embeddings (files, D) -> (N,) float64; a zero embedding scores 0.

    ``mean`` (D,), of a cohort or of the training set, is subtracted first (sub-mean). Products of float32 embeddings
    are summed in float32 (error near 1e-7), of float64 ones in float64.
    """
    x = length_normalize(x if mean is None else np.asarray(x) - np.asarray(mean, np.asarray(x).dtype))
    return paired_products(x, x, pairs)


def minus_mean_distances(x, pairs) -> np.ndarray:
    """Minus the mean Euclidean distance over all pairs of crops: x (files, crops, D), pairs (N, 2) -> (N,) float64."""
    x = np.asarray(x, np.float64)
    scores = np.empty(len(pairs))
    block = max(1, DISTANCE_ELEMENTS // (x.shape[1] ** 2 * x.shape[2]))
    for begin in range(0, len(pairs), block):
        part = slice(begin, begin + block)
        a, b = (x[pairs[part, side]] for side in (0, 1))
        difference = a[:, :, None] - b[:, None]
        # differences rather than |a|^2 + |b|^2 - 2ab, which loses the distance of near embeddings to cancellation
        scores[part] = -np.sqrt(np.einsum("nijd,nijd->nij", difference, difference)).mean(axis=(1, 2))
    return scores


def score_pairs(embeddings, pairs, mode: str = "cosine", normalize: bool = True) -> np.ndarray:
    """Score pairs (N, 2) of rows of embeddings (files, crops, D) -> (N,) float64, computed in float64.

    'cosine': mean cosine over all pairs of crops. 'euclidean': minus the mean distance over all pairs of crops, of
    length-normalised embeddings where ``normalize`` (voxceleb_trainer's score). A zero embedding scores 0.
    """
    x = np.asarray(embeddings, np.float64)
    if mode == "cosine":
        x = length_normalize(x).mean(axis=1)  # the mean of products is the product of means
        return paired_products(x, x, pairs)
    return minus_mean_distances(length_normalize(x) if normalize else x, pairs)
