"""Random trials of a list that stand for all of them."""

import numpy as np


def stratified_subset(labels, speakers, count: int, seed: int) -> np.ndarray:
    """Choose ``count`` trials at random; indices in list order.

    Half of each class, as far as there are that many. Of each class every speaker (``speakers`` (N, 2), or None) keeps
    the same share of its trials, and at least one if there is room, so that the error rates of a subset are those
    of the list but for chance.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))
    targets, nontargets = (order[labels[order] == value] for value in (1, 0))
    half = min(len(targets), max(count // 2, count - len(nontargets), 1))
    chosen = []
    for index, wanted in ((targets, half), (nontargets, count - half)):
        if speakers is not None and len(index):
            index = index[_spread(speakers[index], rng)]
        chosen.append(index[:wanted])
    return np.sort(np.concatenate(chosen))


def _spread(speakers, rng) -> np.ndarray:
    """Order trials (n, 2), which come in random order, so that every beginning holds each speaker's share of it."""
    n = len(speakers)
    owner = speakers[np.arange(n), rng.integers(0, 2, n)]  # a trial of two speakers counts for one of them
    counts = np.bincount(owner)
    rank = np.empty(n, np.int64)
    rank[np.argsort(owner, kind="stable")] = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)
    place = (rank + rng.random(len(counts))[owner]) / counts[owner]
    place[np.unique(speakers, return_index=True)[1] // 2] -= 1  # one trial of each speaker before all others
    return np.argsort(place, kind="stable")
