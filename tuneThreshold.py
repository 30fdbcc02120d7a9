"""Scores -> EER, minDCF, actDCF, Cllr and thresholds, with intervals. Numbers only: no torch.

python tuneThreshold.py exps/demo/result/trials_epoch_12.txt                       # the figures of a score file
python tuneThreshold.py exps/demo/result/trials_epoch_12.txt --by prefix:2         # and by the beginning of the paths
python tuneThreshold.py exps/demo/result/trials_epoch_12.txt --false_accept 0.01   # and the threshold for 1 % of them

A trial is accepted where its score is at least the threshold. Equal scores are one threshold. Non-finite scores are
left out, and how many is printed; no trials, one class or a label other than 0 and 1 is a ValueError.
"""

import functools
import sys
from pathlib import Path

import numpy as np

from errors import UsageError
from scoring.cautions import wrong_way_round
from scoring.error_rates import ErrorRates, checked_trials
from scoring.intervals import bootstrap_interval, enough_speakers, trial_speakers
from settings.command_line import Parser, need, run


def tuneThresholdfromScore(scores, labels, target_fa, target_fr=None):
    """Pick thresholds at wanted error rates, as voxceleb_trainer does.

    Returns ([[threshold, fpr, fnr] for each target_fr, then each target_fa], EER in %, fpr, fnr), the rates at the
    corners of the ROC curve by falling threshold, as scikit-learn's ``roc_curve`` gives them. This EER is the larger
    rate at the corner where both are nearest; ``ComputeEER`` interpolates.
    """
    thresholds, targets, nontargets = (x[::-1] for x in ErrorRates.of(scores, labels).counts)
    hits, alarms = targets.cumsum(), nontargets.cumsum()
    corner = np.r_[True, (np.diff(alarms, 2) != 0) | (np.diff(hits, 2) != 0), True] if len(hits) > 2 else slice(None)
    fpr, tpr = (np.append(0.0, x[corner]) / x[-1] for x in (alarms, hits))
    thresholds, fnr = np.append(np.inf, thresholds[corner]), 1 - tpr
    tuned = []
    for rates, wanted in ((fnr, target_fr or []), (fpr, target_fa)):
        for target in wanted:
            nearest = np.argmin(np.abs(target - rates))
            tuned.append([thresholds[nearest], fpr[nearest], fnr[nearest]])
    crossing = np.argmin(np.abs(fnr - fpr))
    return tuned, max(fpr[crossing], fnr[crossing]) * 100, fpr, fnr


def ComputeErrorRates(scores, labels):
    """Return (miss rates, false-alarm rates, thresholds), each (K,), rejecting the scores up to each threshold."""
    thresholds, targets, nontargets = ErrorRates.of(scores, labels).counts
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
    return float(ErrorRates.of(llrs, labels).act_dcf(p_target, c_miss, c_fa))


def ComputeCllr(llrs, labels):
    """Return the cost of log-likelihood ratios (natural log) in bits (Bruemmer and du Preez 2006, eq. 11)."""
    return float(ErrorRates.of(llrs, labels).cllr())


def ComputeMinCllr(scores, labels):
    """Return Cllr in bits after the best non-decreasing map of the scores (PAV; Bruemmer and du Preez 2006)."""
    return float(ErrorRates.of(scores, labels).min_cllr())


def ComputeEER(scores, labels):
    """Return (EER in %, its threshold), by linear interpolation where the two error rates cross."""
    rate, threshold = ErrorRates.of(scores, labels).eer()
    return float(rate * 100), float(threshold)


def ComputeRocchEER(scores, labels):
    """Return the EER in % of the ROC convex hull, at most that of ``ComputeEER`` (BOSARIS; Bruemmer 2010)."""
    return float(ErrorRates.of(scores, labels).rocch_eer() * 100)


def threshold_at_false_accept(scores, labels, rate: float) -> float:
    """The lowest score of the list that, as threshold, accepts at most this share of the nontarget trials.

    Just above the highest score where none does. A rate needs some 30 errors to be worth its name (Doddington et al.
    2000): with N nontarget trials, no less than 30 / N.
    """
    rates = ErrorRates.of(scores, labels)
    nontargets = rates.nontargets
    accepted = _whole(rate, len(nontargets))
    if accepted == len(nontargets):
        return float(min(nontargets[0], rates.targets[0]))
    refused = nontargets[len(nontargets) - accepted - 1]
    above = [s[np.searchsorted(s, refused, "right") :][:1] for s in (nontargets, rates.targets)]
    return float(min([s[0] for s in above if len(s)], default=np.nextafter(refused, np.inf)))


def threshold_at_false_reject(scores, labels, rate: float) -> float:
    """The highest threshold that rejects at most this share of the target trials; the score of a target trial.

    Just above the highest score for a rate of 1.
    """
    rates = ErrorRates.of(scores, labels)
    highest = np.nextafter(max(rates.targets[-1], rates.nontargets[-1]), np.inf)
    return float(np.append(rates.targets, highest)[_whole(rate, len(rates.targets))])


def _whole(rate: float, trials: int) -> int:
    """How many of ``trials`` are at most a share; 0.01 of 300 is 3 in spite of rounding."""
    if not 0 <= rate <= 1:
        raise ValueError(f"the rate must lie between 0 and 1, got {rate}")
    return int(np.floor(rate * trials * (1 + 1e-12)))


def calibrated_llrs(scores, labels, folds=5, seed=0):
    """Map scores to log-likelihood ratios by logistic regression, each fold with a map learnt on the others.

    A cosine is no likelihood ratio; actDCF and Cllr of one are meaningless without this. Natural logarithm.
    """
    from scoring.calibration import LogisticCalibration

    scores, labels = checked_trials(scores, labels)
    if np.ptp(scores) <= 1e-12 * np.abs(scores).max():
        return np.zeros(len(scores))  # a collapsed model: equal scores say nothing
    order = np.random.default_rng(seed).permutation(len(scores))
    order = order[np.argsort(labels[order], kind="stable")]  # both classes in every fold
    fold = np.empty(len(scores), np.int64)
    fold[order] = np.arange(len(scores)) % max(2, min(folds, np.bincount(labels).min()))
    llrs = np.empty(len(scores))
    for k in range(fold.max() + 1):
        learn = fold != k
        if len(np.unique(labels[learn])) < 2:  # a single trial of a class: nothing to hold out
            learn = np.ones(len(scores), bool)
        llrs[fold == k] = LogisticCalibration.fit(scores[learn], labels[learn]).llrs(scores[fold == k])
    return llrs


def figures_of(rates: ErrorRates, llr_rates: ErrorRates, priors, c_miss=1.0, c_fa=1.0) -> dict:
    """EER in %, minDCF, Cllr at best and the EER's threshold of scores; actDCF and Cllr of their LLRs."""
    eer, threshold = rates.eer()
    found = {"eer": 100 * eer}
    found.update({f"min_dcf_{prior:g}": rates.min_dcf(prior, c_miss, c_fa)[0] for prior in priors})
    found.update({f"act_dcf_{prior:g}": llr_rates.act_dcf(prior, c_miss, c_fa) for prior in priors})
    found.update(cllr=llr_rates.cllr(), min_cllr=rates.min_cllr(), threshold=threshold)
    return {name: float(value) for name, value in found.items()}


def evaluation_metrics(
    scores, labels, p_target=0.05, c_miss=1.0, c_fa=1.0, speakers=None, llrs=None, draws=0, seed=0
) -> dict:
    """Compute every figure of an evaluation, with its 95 % interval; EERs in %, costs at priors 0.01, 0.05, p_target.

    ``speakers`` (N, 2) of ``trial_speakers``: the intervals (``X_low``, ``X_high``) are over speakers, else, or with
    fewer than 4, over trials; ``interval`` says which. ``llrs`` (N,): default ``calibrated_llrs``.
    """
    if llrs is None:
        finite = np.isfinite(np.asarray(scores, np.float64).ravel())
        speakers = None if speakers is None else np.asarray(speakers)[finite]
        scores, labels = checked_trials(scores, labels)
        llrs = calibrated_llrs(scores, labels)
    speakers = enough_speakers(speakers)
    rates, llr_rates = ErrorRates.of(scores, labels), ErrorRates.of(llrs, labels)
    priors = sorted({0.01, 0.05, p_target})
    intervals = bootstrap_interval(scores, labels, speakers, llrs, priors, c_miss, c_fa, draws, seed)
    result = {**figures_of(rates, llr_rates, priors, c_miss, c_fa), "eer_rocch": float(100 * rates.rocch_eer())}
    for name, (low, high) in intervals.items():
        result.update({f"{name}_low": float(low), f"{name}_high": float(high)})
    trials = len(rates.targets) + len(rates.nontargets)
    return {
        **result,
        "interval": "trials" if speakers is None else "speakers",
        "trials": trials,
        "targets": len(rates.targets),
    }


def condition_table(scores, labels, groupings=(), p_target=0.05, speakers=None, draws=0, llrs=None) -> list[dict]:
    """Figures of all trials and of each group: dicts of ``evaluation_metrics``, with ``group`` and two more.

    ``groupings``: lists (N,) of the name of each trial's group. ``miss`` and ``false_accept`` (in %, None without such
    trials) are the errors at the threshold of the pooled EER: where a group's differ from the pooled ones, one
    threshold does not serve all. ``llrs`` (N,): default calibrated on all trials. A group of one class has no other
    figures; one of fewer than 4 speakers has intervals over trials.
    """
    finite = np.isfinite(np.asarray(scores, np.float64).ravel())
    groupings = [np.asarray(groups)[finite] for groups in groupings]
    speakers = None if speakers is None else np.asarray(speakers)[finite]
    scores, labels = checked_trials(scores, labels)
    llrs = calibrated_llrs(scores, labels) if llrs is None else np.asarray(llrs)[finite]
    threshold = ComputeEER(scores, labels)[1]
    chosen = [("pooled", np.ones(len(scores), bool))]
    chosen += [(name, groups == name) for groups in groupings for name in sorted(set(groups.tolist()))]
    rows = []
    for name, mask in chosen:
        s, y = scores[mask], labels[mask]
        row = {"group": name, "trials": len(y), "targets": int(y.sum())}
        row["miss"] = 100 * float(np.mean(s[y == 1] < threshold)) if y.any() else None
        row["false_accept"] = 100 * float(np.mean(s[y == 0] >= threshold)) if not y.all() else None
        if 0 < y.sum() < len(y):
            these = None if speakers is None else speakers[mask]
            row.update(evaluation_metrics(s, y, p_target, speakers=these, llrs=llrs[mask], draws=draws))
        rows.append(row)
    return rows


def table_lines(rows, p_target=0.05, calibrated=True) -> list[str]:
    """The rows of ``condition_table`` as lines for a terminal; ``calibrated``: it was not given ``llrs``."""
    width = max(6, *[len(row["group"]) for row in rows])
    lines = [
        f"{'group':>{width}}    EER %   (95 % interval)  minDCF({p_target:g})  actDCF({p_target:g})   Cllr"
        "   miss %  false accept %   trials  targets"
    ]
    for row in rows:
        miss, alarm = [f"{row[k]:.2f}" if row[k] is not None else "-" for k in ("miss", "false_accept")]
        if "eer" in row:
            interval = f"({row['eer_low']:.2f} to {row['eer_high']:.2f})" + "*" * (row["interval"] == "trials")
            costs = row[f"min_dcf_{p_target:g}"], row[f"act_dcf_{p_target:g}"]
            figures = f"{row['eer']:8.2f}{interval:>18}{costs[0]:14.4f}{costs[1]:14.4f}{row['cllr']:8.4f}"
        else:
            figures = f"{'only targets' if row['targets'] else 'only nontargets'}: no EER".ljust(62)
        lines.append(f"{row['group']:>{width}} {figures} {miss:>8} {alarm:>15} {row['trials']:8d} {row['targets']:8d}")
    if any(row.get("interval") == "trials" for row in rows):
        lines.append("* over trials, as if independent: too narrow where they share speakers")
    lines.append("miss and false accept: at the threshold of the pooled EER")
    if calibrated:
        lines.append(
            "actDCF and Cllr: of scores calibrated on these trials, 5-fold; not those of the scores as they are"
        )
    return lines


def parse_arguments(argv):
    """The options of the command line."""
    parser = Parser("tuneThreshold.py", "Print the error rates of a score file, pooled and by condition.")
    parser.add_argument("file", help="'score label a b', 'a b score label', or without labels (with --trials)")
    parser.add_argument("--trials", default="", metavar="LIST", help="trial list with the labels and columns")
    parser.add_argument(
        "--by",
        action="append",
        default=[],
        metavar="CONDITION",
        help="prefix:N letters of the paths; column:N of the list; FILE.tsv:COLUMN of speakers or files; "
        "duration:2,4 seconds of the shorter file; may be repeated",
    )
    parser.add_argument("--prefix", type=int, default=0, metavar="N", help="the same as --by prefix:N")
    parser.add_argument("--test_path", default="", metavar="FOLDER", help="where the files lie, for --by duration")
    parser.add_argument("--p_target", type=float, default=0.05, help="prior of a target trial (default 0.05)")
    parser.add_argument("--false_accept", type=float, nargs="+", default=[], metavar="RATE", help="give the thresholds")
    parser.add_argument("--false_reject", type=float, nargs="+", default=[], metavar="RATE", help="give the thresholds")
    parser.add_argument("--draws", type=int, default=0, help="bootstrap draws (default 0: 200 to 1,000)")
    parser.add_argument("--out", default="", metavar="FOLDER", help="write det, roc, scores and calibration.png there")
    parser.add_argument(
        "--pictures", nargs="+", default=[], choices=("png", "pdf", "svg"), help="and in these forms too (with --out)"
    )
    args = parser.parse_args(argv)
    if args.pictures and not args.out:
        parser.error("--pictures needs --out FOLDER")
    if args.out:
        need("tuneThreshold.py --out", "matplotlib")
    if not 0 < args.p_target < 1:
        parser.error("--p_target must lie between 0 and 1")
    if any(not 0 <= rate <= 1 for rate in args.false_accept + args.false_reject):
        parser.error("a rate must lie between 0 and 1")
    if args.draws < 0 or args.prefix < 0:
        parser.error("--draws and --prefix must not be negative")
    columns = next((condition for condition in args.by if condition.startswith("column:")), "")
    if columns and not args.trials:  # a fifth word of a score file could be a column or make it another form
        parser.error(f"--by {columns}: needs --trials, the list with the columns")
    args.by += [f"prefix:{args.prefix}"] if args.prefix else []
    return args


def main(argv=None) -> int:
    """Print the figures of a score file, pooled and by condition, and the thresholds asked for."""
    from scoring.conditions import groups_of
    from scoring.files import join_labels, read_scores, read_trials_any

    args = parse_arguments(argv)
    columns = any(condition.startswith("column:") for condition in args.by)
    trials = read_scores(args.file)
    if args.trials:
        trials = join_labels(trials, read_trials_any(args.trials, columns=columns))
    elif trials.labels is None:
        raise UsageError(f"{args.file}: no labels in a file of '{trials.form}' scores: give --trials")
    speakers, why = trial_speakers(trials.labels, trials.first, trials.second)
    if why:
        print(f"intervals over trials, not speakers: {why}")
    try:
        groupings = [groups_of(condition, trials, args.test_path) for condition in args.by]
        rows = condition_table(trials.scores, trials.labels, groupings, args.p_target, speakers, args.draws)
        caution = wrong_way_round(rows[0]["eer"], rows[0]["eer_low"])
        for line in [*table_lines(rows, args.p_target), *([caution] if caution else [])]:
            print(line)
        finite = np.isfinite(trials.scores)  # how many are not was said above
        scores, labels = trials.scores[finite], trials.labels[finite]
        rates = ErrorRates.of(scores, labels)
        for what, wanted in (("accept", args.false_accept), ("reject", args.false_reject)):
            function = threshold_at_false_accept if what == "accept" else threshold_at_false_reject
            for rate in wanted:
                threshold = function(scores, labels, rate)
                miss, alarm = (100 * float(x) for x in rates.at(threshold))
                # All digits: a rounded threshold may accept what it should not.
                print(f"false {what} {rate:g}: threshold {threshold!r}, misses {miss:.2f} %, accepts {alarm:.2f} %")
        if args.out:
            draw(args, scores, labels, rows[0])
    except ValueError as error:
        raise UsageError(f"{args.file}: {error}") from error
    return 0


def draw(args, scores, labels, figures: dict):
    """Write the pictures of a score file."""
    from scoring import plots  # which imports this module

    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot write into '{args.out}': {error.strerror}") from error
    print("pictures: " + ", ".join(map(str, plots.draw_all(args.out, scores, labels, figures, formats=args.pictures))))


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
