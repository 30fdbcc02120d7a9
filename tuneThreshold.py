"""Scores -> EER, minDCF, actDCF, Cllr and thresholds. Numbers only: numpy, scipy and scikit-learn, no torch.

python tuneThreshold.py exps/demo/result/trials_epoch_12.txt                # the figures of a trials file again
python tuneThreshold.py exps/demo/result/trials_epoch_12.txt --prefix 2     # and by the first 2 letters of path A

A trial is accepted where its score is at least the threshold. Equal scores are one threshold. Non-finite scores are
left out, and how many is printed; no trials, one class or a label other than 0 and 1 is a ValueError.
"""

import argparse
import sys

import numpy as np
from sklearn import metrics
from sklearn.linear_model import LogisticRegression


def checked_trials(scores, labels):
    """Return finite scores (N,) float64 and labels (N,) int64; ValueError for trials that define no error rate."""
    scores = np.asarray(scores, dtype=np.float64).ravel()
    labels = np.asarray(labels).ravel()
    if len(scores) != len(labels):
        raise ValueError(f"{len(scores)} scores but {len(labels)} labels")
    if len(scores) == 0:
        raise ValueError("no trials")
    wrong = ~np.isin(labels, (0, 1))
    if wrong.any():
        raise ValueError(f"labels must be 0 or 1, got {labels[wrong][0]!r}")
    finite = np.isfinite(scores)
    if not finite.all():
        left_out = int((~finite).sum())
        print(f"tuneThreshold: filtered {left_out} of {len(scores)} scores that are NaN or Inf", file=sys.stderr)
        scores, labels = scores[finite], labels[finite]
        if len(scores) == 0:
            raise ValueError(f"no trials left: all {left_out} scores are NaN or Inf")
    labels = labels.astype(np.int64)
    if labels.min() == labels.max():
        raise ValueError(f"all trials have label {labels[0]}; error rates need both classes")
    return scores, labels


def _counts(scores, labels):
    """Unique scores ascending (K,), and the target and nontarget trials at each (K,)."""
    thresholds, index = np.unique(scores, return_inverse=True)
    targets = np.bincount(index, weights=labels, minlength=len(thresholds))
    return thresholds, targets, np.bincount(index, minlength=len(thresholds)) - targets


def tuneThresholdfromScore(scores, labels, target_fa, target_fr=None):
    """Pick thresholds at wanted error rates, as voxceleb_trainer does.

    Returns ([[threshold, fpr, fnr] for each target_fr, then each target_fa], EER in %, fpr, fnr). This EER is the
    larger rate at the nearest operating point; ``ComputeEER`` interpolates.
    """
    scores, labels = checked_trials(scores, labels)
    fpr, tpr, thresholds = metrics.roc_curve(labels, scores, pos_label=1)
    fnr = 1 - tpr
    tuned = []
    for rates, wanted in ((fnr, target_fr or []), (fpr, target_fa)):
        for target in wanted:
            nearest = np.argmin(np.abs(target - rates))
            tuned.append([thresholds[nearest], fpr[nearest], fnr[nearest]])
    crossing = np.argmin(np.abs(fnr - fpr))
    return tuned, max(fpr[crossing], fnr[crossing]) * 100, fpr, fnr


def ComputeErrorRates(scores, labels):
    """Return (miss rates, false-alarm rates, thresholds), each (K,), rejecting the scores up to each threshold."""
    thresholds, targets, nontargets = _counts(*checked_trials(scores, labels))
    return targets.cumsum() / targets.sum(), 1 - nontargets.cumsum() / nontargets.sum(), thresholds


def ComputeMinDcf(fnrs, fprs, thresholds, p_target, c_miss, c_fa):
    """Return (minimum detection cost, its threshold), over the cost of the better constant answer (NIST SRE).

    Accepting every trial is always possible, so the cost never exceeds 1.
    """
    costs = c_miss * np.asarray(fnrs) * p_target + c_fa * np.asarray(fprs) * (1 - p_target)
    best = int(np.argmin(costs))
    cost, threshold = costs[best], thresholds[best]
    if c_fa * (1 - p_target) < cost:
        cost, threshold = c_fa * (1 - p_target), -np.inf
    return cost / min(c_miss * p_target, c_fa * (1 - p_target)), threshold


def ComputeActDcf(llrs, labels, p_target, c_miss, c_fa):
    """Return the normalised cost of natural-log LLRs at the Bayes threshold log(c_fa (1 - p) / (c_miss p))."""
    llrs, labels = checked_trials(llrs, labels)
    accept = llrs >= np.log(c_fa * (1 - p_target) / (c_miss * p_target))
    miss, false_alarm = np.mean(~accept[labels == 1]), np.mean(accept[labels == 0])
    cost = c_miss * miss * p_target + c_fa * false_alarm * (1 - p_target)
    return cost / min(c_miss * p_target, c_fa * (1 - p_target))


def ComputeCllr(llrs, labels):
    """Return the cost of log-likelihood ratios (natural log) in bits (Bruemmer and du Preez 2006, eq. 11)."""
    llrs, labels = checked_trials(llrs, labels)
    target = np.logaddexp(0, -llrs[labels == 1]).mean()
    nontarget = np.logaddexp(0, llrs[labels == 0]).mean()
    return (target + nontarget) / 2 / np.log(2)


def _equal_error(targets, nontargets):
    """Crossing of both error rates from counts (..., K) at ascending scores.

    Returns (EER as a share (...), index of the operating point after the crossing (...), share of the way to it).
    Operating point k rejects the first k scores, k = 0 .. K.
    """
    zero = np.zeros((*targets.shape[:-1], 1))
    miss = np.concatenate([zero, targets.cumsum(-1)], -1) / targets.sum(-1, keepdims=True)
    alarm = 1 - np.concatenate([zero, nontargets.cumsum(-1)], -1) / nontargets.sum(-1, keepdims=True)
    gap = miss - alarm  # rises from -1 to 1
    after = np.argmax(gap >= 0, axis=-1)
    ends = [np.take_along_axis(a, np.stack([after - 1, after], -1), -1) for a in (gap, miss)]
    share = -ends[0][..., 0] / (ends[0][..., 1] - ends[0][..., 0])
    return ends[1][..., 0] + share * (ends[1][..., 1] - ends[1][..., 0]), after, share


def ComputeEER(scores, labels):
    """Return (EER in %, its threshold), by linear interpolation where the two error rates cross."""
    thresholds, targets, nontargets = _counts(*checked_trials(scores, labels))
    rate, after, share = _equal_error(targets, nontargets)
    edges = np.append(thresholds, np.nextafter(thresholds[-1], np.inf))
    return float(rate * 100), float(edges[after - 1] + share * (edges[after] - edges[after - 1]))


def eer_interval(scores, labels, draws=1000, seed=0, bins=2000):
    """Return the 95 % bootstrap interval (low, high) of the EER in %, resampling target and nontarget trials.

    Trials that share a file or a speaker are not independent, so the true interval is somewhat wider. More than
    ``bins`` different scores are first counted into bins of equal size.
    """
    _, targets, nontargets = _counts(*checked_trials(scores, labels))
    if len(targets) > bins:
        edges = np.linspace(0, len(targets), bins, endpoint=False).astype(np.int64)
        targets, nontargets = np.add.reduceat(targets, edges), np.add.reduceat(nontargets, edges)
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(0, draws, 100):
        resampled = [rng.multinomial(int(c.sum()), c / c.sum(), 100).astype(np.float64) for c in (targets, nontargets)]
        rates.append(_equal_error(*resampled)[0] * 100)
    low, high = np.percentile(np.concatenate(rates), (2.5, 97.5))
    return float(low), float(high)


def calibrated_llrs(scores, labels, folds=5, seed=0):
    """Map scores to log-likelihood ratios by logistic regression, each fold with a map learnt on the others.

    A cosine is no likelihood ratio; actDCF and Cllr of one are meaningless without this. Natural logarithm.
    """
    scores, labels = checked_trials(scores, labels)
    x = ((scores - scores.mean()) / (scores.std() + 1e-12))[:, None]
    order = np.random.default_rng(seed).permutation(len(scores))
    order = order[np.argsort(labels[order], kind="stable")]  # both classes in every fold
    fold = np.empty(len(scores), np.int64)
    fold[order] = np.arange(len(scores)) % max(2, min(folds, np.bincount(labels).min()))
    llrs = np.empty(len(scores))
    for k in range(fold.max() + 1):
        learn = fold != k
        if len(np.unique(labels[learn])) < 2:  # a single trial of a class: nothing to hold out
            learn = np.ones(len(scores), bool)
        model = LogisticRegression(C=100.0, class_weight="balanced").fit(x[learn], labels[learn])
        llrs[fold == k] = model.decision_function(x[fold == k])
    return llrs


def evaluation_metrics(scores, labels, p_target=0.05, c_miss=1.0, c_fa=1.0) -> dict:
    """Compute every figure of an evaluation; minDCF for priors 0.01, 0.05 and ``p_target``, rates in %."""
    scores, labels = checked_trials(scores, labels)
    eer, threshold = ComputeEER(scores, labels)
    low, high = eer_interval(scores, labels)
    rates = ComputeErrorRates(scores, labels)
    llrs = calibrated_llrs(scores, labels)
    result = {"eer": eer, "eer_low": low, "eer_high": high, "threshold": threshold}
    for prior in sorted({0.01, 0.05, p_target}):
        result[f"min_dcf_{prior:g}"] = float(ComputeMinDcf(*rates, prior, c_miss, c_fa)[0])
    for prior in sorted({0.05, p_target}):
        result[f"act_dcf_{prior:g}"] = float(ComputeActDcf(llrs, labels, prior, c_miss, c_fa))
    result["cllr"] = float(ComputeCllr(llrs, labels))
    result["trials"], result["targets"] = len(labels), int(labels.sum())
    return result


def read_trials_file(path):
    """Read ``score label pathA pathB`` lines; returns (scores, labels, first paths)."""
    with open(path, encoding="utf-8") as f:
        rows = [line.split() for line in f]
    return np.array([float(r[0]) for r in rows]), np.array([int(r[1]) for r in rows]), [r[2] for r in rows]


def main(argv=None) -> int:
    """Print the figures of a trials file, pooled and by the beginning of the first path."""
    parser = argparse.ArgumentParser(description="Print the error rates of a trials file (score label pathA pathB).")
    parser.add_argument("file")
    parser.add_argument(
        "--prefix", type=int, default=0, help="group by this many letters of path A (default 0: pooled only)"
    )
    parser.add_argument("--p_target", type=float, default=0.05, help="prior of a target trial (default 0.05)")
    args = parser.parse_args(argv)
    if not 0 < args.p_target < 1:
        parser.error("--p_target must lie between 0 and 1")
    try:
        scores, labels, first = read_trials_file(args.file)
        groups = {"pooled": np.ones(len(scores), bool)}
        for name in sorted({path[: args.prefix] for path in first}) if args.prefix else ():
            groups[name] = np.array([path.startswith(name) for path in first])
        for name, chosen in groups.items():
            if len(np.unique(labels[chosen])) < 2:
                kind = "targets" if labels[chosen][0] else "nontargets"
                print(f"{name:>8}  only {kind}, {chosen.sum()} trials: no EER")
                continue
            r = evaluation_metrics(scores[chosen], labels[chosen], args.p_target)
            dcf = f"minDCF({args.p_target:g}) {r[f'min_dcf_{args.p_target:g}']:.4f}"
            interval = f"(95 % CI {r['eer_low']:.2f} to {r['eer_high']:.2f})"
            print(f"{name:>8}  EER {r['eer']:5.2f} % {interval}  {dcf}  Cllr {r['cllr']:.4f}  {r['trials']} trials")
    except (OSError, ValueError, IndexError) as error:
        print(f"{args.file}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
