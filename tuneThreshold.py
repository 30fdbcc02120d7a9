"""Scores -> EER, minDCF, actDCF, Cllr and thresholds, with intervals. Numbers only: no torch.

python tuneThreshold.py exps/demo/result/trials_epoch_12.txt                       # the figures of a score file
python tuneThreshold.py exps/demo/result/trials_epoch_12.txt --by prefix:2         # and by the beginning of the paths
python tuneThreshold.py exps/demo/result/trials_epoch_12.txt --false_accept 0.01   # and the threshold for 1 % of them

A trial is accepted if its score is at least the threshold. Equal scores are one threshold. Non-finite scores are
left out, and how many is printed; no trials, one class or a label other than 0 and 1 is a ValueError.
"""

import functools
import sys
from pathlib import Path

import numpy as np

from errors import UsageError
from scoring.calibration import calibrated_llrs
from scoring.cautions import wrong_way_round
from scoring.error_rates import ErrorRates
from scoring.figures import condition_table, evaluation_metrics, figures_of, table_lines
from scoring.intervals import bootstrap_interval, trial_speakers
from settings.command_line import Parser, need, run

# What scripts import from here, voxceleb_trainer's among them.
__all__ = [
    "ComputeActDcf",
    "ComputeCllr",
    "ComputeEER",
    "ComputeErrorRates",
    "ComputeMinCllr",
    "ComputeMinDcf",
    "ComputeRocchEER",
    "bootstrap_interval",
    "calibrated_llrs",
    "condition_table",
    "evaluation_metrics",
    "figures_of",
    "table_lines",
    "threshold_at_false_accept",
    "threshold_at_false_reject",
    "trial_speakers",
    "tuneThresholdfromScore",
]


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

    Just above the highest score if none does. A rate needs some 30 errors to be worth its name (Doddington et al.
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
        parser.error(f"--p_target must lie between 0 and 1, got {args.p_target:g}")
    for flag in ("false_accept", "false_reject"):
        for rate in getattr(args, flag):
            if not 0 <= rate <= 1:
                parser.error(f"--{flag}: a rate must lie between 0 and 1, got {rate:g}")
    for flag in ("draws", "prefix"):
        if getattr(args, flag) < 0:
            parser.error(f"--{flag} must not be negative, got {getattr(args, flag)}")
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
