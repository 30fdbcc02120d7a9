"""Error rates of scored trials, from the scores of both classes sorted once."""

import sys
from functools import cached_property

import numpy as np

LN2 = np.log(2)


def checked_trials(scores, labels):
    """Return finite scores (N,) float64 and labels (N,) int64; ValueError for trials that define no error rate."""
    scores = np.asarray(scores, dtype=np.float64).ravel()
    labels = np.asarray(labels).ravel()
    if len(scores) != len(labels):
        raise ValueError(f"{len(scores)} scores but {len(labels)} labels")
    if len(scores) == 0:
        raise ValueError("no trials")
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"labels must be 0 or 1, got {labels[0]!r}")
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        raise ValueError(f"labels must be 0 or 1, got {labels[wrong][0]!r}")
    finite = np.isfinite(scores)
    left_out = len(scores) - int(finite.sum())
    if left_out == len(scores):
        raise ValueError(f"no trials left: all {left_out} scores are NaN or Inf")
    if left_out:
        scores, labels = scores[finite], labels[finite]
    labels = labels.astype(np.int64, copy=False)
    if labels.min() == labels.max():
        rest = f" once {left_out} with NaN or Inf scores are left out" if left_out else ""
        raise ValueError(f"all trials have label {labels[0]}{rest}; error rates need both classes")
    if left_out:
        print(f"tuneThreshold: filtered {left_out} of {len(finite)} scores that are NaN or Inf", file=sys.stderr)
    return scores, labels


class ErrorRates:
    """Misses and false accepts at every threshold; a threshold accepts the scores that are at least as high.

    ``targets`` (T,) and ``nontargets`` (N,) ascend. ``target_sums`` (..., T + 1) and ``nontarget_sums`` (..., N + 1)
    are the running sums of the trials' weights (default: each trial counts once); leading dimensions are independent
    sets of weights, for which each figure has a value each.
    """

    def __init__(self, targets, nontargets, target_sums=None, nontarget_sums=None):
        self.targets, self.nontargets = targets, nontargets
        self.target_sums = np.arange(len(targets) + 1.0) if target_sums is None else target_sums
        self.nontarget_sums = np.arange(len(nontargets) + 1.0) if nontarget_sums is None else nontarget_sums

    @classmethod
    def of(cls, scores, labels):
        """From scores (N,) and labels (N,) 0 or 1; ValueError if they define no error rate."""
        scores, labels = checked_trials(scores, labels)
        is_target = labels == 1
        return cls(np.sort(scores[is_target]), np.sort(scores[~is_target]))

    @cached_property
    def below(self):
        """Nontargets (T + 1,) under each target's score, and at last all of them.

        Raising a threshold to the next target costs no miss more, so the points at the targets' scores, and the one
        that rejects everything, are the only ones that a minimum of a cost needs.
        """
        return np.append(np.searchsorted(self.nontargets, self.targets), len(self.nontargets))

    @cached_property
    def counts(self):
        """Different scores ascending (K,), and the target and nontarget trials at each (K,) float64."""
        trials = len(self.targets) + len(self.nontargets)
        is_target = np.zeros(trials, bool)
        is_target[np.arange(len(self.targets)) + self.below[:-1]] = True  # equal scores: targets first
        scores = np.empty(trials)
        scores[is_target], scores[~is_target] = self.targets, self.nontargets
        last = np.append(np.flatnonzero(scores[1:] != scores[:-1]), trials - 1)
        targets = np.cumsum(is_target)[last].astype(np.float64)
        nontargets = last + 1 - targets
        return scores[last], np.diff(targets, prepend=0), np.diff(nontargets, prepend=0)

    def at(self, thresholds):
        """Miss rate and false-accept rate at thresholds: any number (...), or one for each set of weights."""
        rates = []
        for scores, sums in ((self.targets, self.target_sums), (self.nontargets, self.nontarget_sums)):
            index = np.asarray(np.searchsorted(scores, thresholds))
            rejected = sums[index] if sums.ndim == 1 else np.take_along_axis(sums, index[..., None], -1)[..., 0]
            rates.append(rejected / sums[..., -1].astype(np.float64))
        return rates[0], 1 - rates[1]

    def _first_crossing(self, scores):
        """First score of an ascending array, for each set of weights, from which misses are no fewer; else inf."""
        low = np.zeros(self.target_sums.shape[:-1], np.int64)
        high = np.full_like(low, len(scores))
        while (low < high).any():
            middle = (low + high) // 2
            miss, alarm = self.at(scores[np.minimum(middle, len(scores) - 1)])
            reached = miss >= alarm
            searching = low < high
            high = np.where(searching & reached, middle, high)
            low = np.where(searching & ~reached, middle + 1, low)
        return np.append(scores, np.inf)[low]

    def eer(self):
        """Equal error rate as a share, and its threshold: linear interpolation where both error rates cross.

        The rates step only at scores, so the crossing is found by bisection; the line runs from the last operating
        point with fewer misses to the first with no fewer. If a whole gap between two scores has equal rates, its
        middle is the threshold.
        """
        after = np.minimum(self._first_crossing(self.targets), self._first_crossing(self.nontargets))
        before = [np.append(-np.inf, s)[np.searchsorted(s, after)] for s in (self.targets, self.nontargets)]
        before = np.maximum(*before)
        (miss_before, alarm_before), (miss_after, alarm_after) = self.at(before), self.at(after)
        gap_before, gap_after = miss_before - alarm_before, miss_after - alarm_after
        share = -gap_before / (gap_after - gap_before)
        rate = miss_before + share * (miss_after - miss_before)
        highest = np.nextafter(max(self.targets[-1], self.nontargets[-1]), np.inf)
        share = np.where(gap_after == 0, 0.5, share)
        return rate, before + share * (np.minimum(after, highest) - before)

    def min_dcf(self, p_target=0.05, c_miss=1.0, c_fa=1.0):
        """Minimum detection cost over that of the better constant answer (NIST SRE), and its threshold."""
        miss, alarm = self._weights(p_target, c_miss, c_fa)
        costs = miss[..., None] * self.target_sums - alarm[..., None] * self.nontarget_sums[..., self.below]
        best = costs.argmin(axis=-1)
        cost = np.take_along_axis(costs, best[..., None], -1)[..., 0] + c_fa * (1 - p_target)
        highest = np.nextafter(max(self.targets[-1], self.nontargets[-1]), np.inf)
        return cost / min(c_miss * p_target, c_fa * (1 - p_target)), np.append(self.targets, highest)[best]

    def _weights(self, p_target, c_miss, c_fa):
        """What a missed target and an accepted nontarget of weight 1 add to the cost."""
        dtype = self.target_sums.dtype
        miss = np.asarray(c_miss * p_target / self.target_sums[..., -1], dtype)
        return miss, np.asarray(c_fa * (1 - p_target) / self.nontarget_sums[..., -1], dtype)

    def act_dcf(self, p_target=0.05, c_miss=1.0, c_fa=1.0):
        """Normalised cost of natural-log LLRs at the Bayes threshold log(c_fa (1 - p) / (c_miss p))."""
        miss, alarm = self.at(np.full(self.target_sums.shape[:-1], np.log(c_fa * (1 - p_target) / (c_miss * p_target))))
        cost = c_miss * p_target * miss + c_fa * (1 - p_target) * alarm
        return cost / min(c_miss * p_target, c_fa * (1 - p_target))

    def cllr(self):
        """Cost of log-likelihood ratios in bits; of trials that count once each."""
        return (softplus(-self.targets).mean() + softplus(self.nontargets).mean()) / 2 / LN2

    @cached_property
    def pools(self):
        """Pool-adjacent-violators blocks: (last score, targets, nontargets) of each (B,); the share of targets rises.

        The best non-decreasing map from score to probability of a target (Ayer et al. 1955; Zadrozny and Elkan 2002).
        Equal scores stay together. Of trials that count once each.
        """
        from sklearn.isotonic import isotonic_regression

        scores, targets, nontargets = self.counts
        fitted = isotonic_regression(targets / (targets + nontargets), sample_weight=targets + nontargets)
        begin = np.append(0, np.flatnonzero(np.diff(fitted)) + 1)
        last = scores[np.append(begin[1:], len(scores)) - 1]
        return last, np.add.reduceat(targets, begin), np.add.reduceat(nontargets, begin)

    def convex_hull(self):
        """Miss and false-accept rates (B + 1,) of the vertices of the ROC convex hull, misses rising."""
        _, targets, nontargets = self.pools
        miss = np.append(0, targets.cumsum()) / len(self.targets)
        return miss, 1 - np.append(0, nontargets.cumsum()) / len(self.nontargets)

    def rocch_eer(self):
        """Equal error rate of the ROC convex hull as a share (Bruemmer and de Villiers 2013, BOSARIS)."""
        miss, alarm = self.convex_hull()
        gap = miss - alarm
        after = int(np.argmax(gap >= 0))
        share = -gap[after - 1] / (gap[after] - gap[after - 1])
        return miss[after - 1] + share * (miss[after] - miss[after - 1])

    def pool_llrs(self):
        """Log-likelihood ratio (natural log) of each PAV block (B,); -inf and inf if it has one class only."""
        _, targets, nontargets = self.pools
        with np.errstate(divide="ignore"):
            return np.log(targets / len(self.targets)) - np.log(nontargets / len(self.nontargets))

    def min_cllr(self):
        """Cllr after the best non-decreasing map, in bits (Bruemmer and du Preez 2006, section 8)."""
        llrs, (_, targets, nontargets) = self.pool_llrs(), self.pools
        mixed = np.isfinite(llrs)  # a block of one class costs nothing
        target = targets[mixed] @ softplus(-llrs[mixed]) / len(self.targets)
        return (target + nontargets[mixed] @ softplus(llrs[mixed]) / len(self.nontargets)) / 2 / LN2


def worst_eer(scores, labels) -> float:
    """EER in % of scores (N,) if each trial without a finite score is an error at every threshold."""
    finite = np.isfinite(scores)
    beyond = scores[finite].min() - 1.0, scores[finite].max() + 1.0  # of a target, of a nontarget
    filled = np.where(finite, scores, np.where(labels == 1, *beyond))
    return 100 * float(ErrorRates.of(filled, labels).eer()[0])


def softplus(x):
    """log(1 + exp(x)) without overflow."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
