"""Score normalisation against a cohort: S-norm and adaptive S-norm (AS-norm), in blocks of bounded memory."""

import numpy as np

from scoring.cosine import in_threads, length_normalize

BLOCK = 4096  # embeddings at a time; with a cohort of 5,994 their scores take 98 MB
SELECTED_ROWS = 64  # of a block at a time: their scores, 1.5 MB, stay in a second-level cache
DEVIATION_FLOOR = 1e-6  # a cohort that scores the same everywhere has no scale to normalise by


def speaker_means(x, speakers):
    """Mean of the length-normalised embeddings (N, D) of each speaker.

    Returns (sorted speaker names, means (S, D)); the means are not length-normalised again.
    """
    names, index = np.unique(np.asarray(speakers), return_inverse=True)
    x = length_normalize(x)
    sums = np.stack([np.bincount(index, column) for column in x.T], axis=1)
    return names.tolist(), (sums / np.bincount(index)[:, None]).astype(x.dtype)


def cohort_statistics(x, cohort, top_n: int = 300, block: int = BLOCK):
    """Mean and standard deviation of each embedding's ``top_n`` largest scores against a cohort.

    x (N, D) and cohort (C, D): the score of two rows is their dot product, so cosine takes length-normalised rows.
    ``top_n`` 0, or at least C, takes the whole cohort (S-norm). Returns (mean (N,), deviation (N,)) in float64, exactly
    those of the sorted scores, ties or not. A row with a NaN gets NaN. The memory beyond x and the cohort is
    ``block`` x C numbers.
    """
    x, cohort = np.asarray(x), np.asarray(cohort)
    if not len(cohort):
        raise ValueError("the cohort is empty")
    if not np.isfinite(cohort).all():
        raise ValueError("the cohort holds NaN or Inf")
    count = len(cohort) if top_n < 1 else min(top_n, len(cohort))
    mean, deviation = np.empty(len(x)), np.empty(len(x))
    scores = np.empty((min(block, len(x)), len(cohort)), np.result_type(x, cohort))

    def select(begin, end):  # rows of the block that starts at embedding ``row``
        for first in range(begin, end, SELECTED_ROWS):
            part = slice(first, min(first + SELECTED_ROWS, end))
            with np.errstate(invalid="ignore"):  # rows with NaN or Inf become NaN below
                top = largest(scores[part], count)
                mean[row + part.start : row + part.stop] = top.mean(axis=1, dtype=np.float64)
                deviation[row + part.start : row + part.stop] = top.std(axis=1, dtype=np.float64)

    for row in range(0, len(x), block):
        rows = min(block, len(x) - row)
        with np.errstate(invalid="ignore"):
            np.matmul(x[row : row + rows], cohort.T, out=scores[:rows])  # by all cores of itself
        in_threads(select, rows, SELECTED_ROWS)
    lost = ~np.isfinite(x).all(axis=1)
    mean[lost] = deviation[lost] = np.nan
    return mean, deviation


def largest(scores, count: int) -> np.ndarray:
    """The ``count`` largest values of each row of scores (R, C), in no order -> (R, count).

    The columns are dealt into about 2 x ``count`` groups; of their maxima, the ``count``-th largest is no larger than
    the ``count``-th largest score. Only the few scores from there up are partitioned: half the time or less of a
    partition of whole rows.
    """
    rows, columns = scores.shape
    size = columns // (2 * count)
    if size < 2:
        return np.partition(scores, columns - count, axis=1)[:, columns - count :]
    groups = columns // size
    maxima = scores[:, : groups * size].reshape(rows, size, groups).max(axis=1)
    maxima.partition(groups - count, axis=1)
    chosen = np.flatnonzero(scores >= maxima[:, groups - count, None])
    found = np.diff(np.searchsorted(chosen, np.arange(rows + 1) * columns))
    width = max(int(found.max()), count)
    candidates = np.full((rows, width), -np.inf, scores.dtype)  # a row with NaN may have none
    candidates[np.arange(width) < found[:, None]] = scores.ravel().take(chosen)
    candidates.partition(width - count, axis=1)
    return candidates[:, width - count :]


def symmetric_norm(scores, enrolled_statistics, test_statistics) -> np.ndarray:
    """Mean of the scores (N,) normalised by the enrolled side's and by the test side's cohort statistics -> (N,).

    Each statistics is (mean (N,), deviation (N,)), a trial's own. A deviation below ``DEVIATION_FLOOR`` counts as that.
    With top-N statistics this is AS-norm1 (Matejka et al. 2017, "Analysis of score normalization in multilingual
    speaker recognition", eq. 6), with those of the whole cohort S-norm (Kenny 2010).
    """
    normalised = [
        (scores - mean) / np.maximum(deviation, DEVIATION_FLOOR)
        for mean, deviation in (enrolled_statistics, test_statistics)
    ]
    return (normalised[0] + normalised[1]) / 2


def as_norm(x, pairs, scores, cohort, top_n: int = 300, block: int = BLOCK) -> np.ndarray:
    """AS-norm of scores (N,) of pairs (N, 2) of rows of x (files, D), by a cohort (C, D); dot-product scores."""
    used, index = np.unique(np.asarray(pairs), return_inverse=True)
    mean, deviation = cohort_statistics(np.asarray(x)[used], cohort, top_n, block)
    sides = [(mean[i], deviation[i]) for i in index.reshape(-1, 2).T]
    return symmetric_norm(np.asarray(scores), *sides)


def s_norm(x, pairs, scores, cohort, block: int = BLOCK) -> np.ndarray:
    """S-norm of scores (N,): ``as_norm`` with the whole cohort."""
    return as_norm(x, pairs, scores, cohort, 0, block)
