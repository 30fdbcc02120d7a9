"""Every figure of an evaluation with its interval, of all trials and of groups of them."""

import numpy as np

from scoring.calibration import calibrated_llrs, folds_over
from scoring.error_rates import ErrorRates, checked_trials
from scoring.intervals import bootstrap_interval, enough_speakers


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
    fewer than 4, over trials; ``interval`` says which. ``llrs`` (N,): default ``calibrated_llrs`` at ``p_target``,
    and ``folds`` says over what.
    """
    over = {}
    if llrs is None:
        finite = np.isfinite(np.asarray(scores, np.float64).ravel())
        speakers = None if speakers is None else np.asarray(speakers)[finite]
        scores, labels = checked_trials(scores, labels)
        llrs = calibrated_llrs(scores, labels, enough_speakers(speakers), p_target)
        over = {"folds": folds_over(labels, enough_speakers(speakers))}
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
        **over,
        "interval": "trials" if speakers is None else "speakers",
        "trials": trials,
        "targets": len(rates.targets),
    }


def condition_table(scores, labels, groupings=(), p_target=0.05, speakers=None, draws=0, llrs=None) -> list[dict]:
    """Figures of all trials and of each group: dicts of ``evaluation_metrics``, with ``group`` and two more.

    ``groupings``: lists (N,) of the name of each trial's group. ``miss`` and ``false_accept`` (in %, None without such
    trials) are the errors at the threshold of the pooled EER: if a group's differ from the pooled ones, one
    threshold does not serve all. ``llrs`` (N,): default ``calibrated_llrs`` of all trials; the first row then has
    ``folds``, over what. A group of one class has no other figures; one of fewer than 4 speakers has intervals over
    trials.
    """
    finite = np.isfinite(np.asarray(scores, np.float64).ravel())
    groupings = [np.asarray(groups)[finite] for groups in groupings]
    speakers = None if speakers is None else np.asarray(speakers)[finite]
    scores, labels = checked_trials(scores, labels)
    over = "" if llrs is not None else folds_over(labels, enough_speakers(speakers))
    if llrs is None:
        llrs = calibrated_llrs(scores, labels, enough_speakers(speakers), p_target)
    else:
        llrs = np.asarray(llrs)[finite]
    threshold = float(ErrorRates.of(scores, labels).eer()[1])
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
    rows[0].update({"folds": over} if over else {})
    return rows


def table_lines(rows, p_target=0.05) -> list[str]:
    """The rows of ``condition_table`` as lines for a terminal."""
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
    if "folds" in rows[0]:
        lines.append(
            f"actDCF and Cllr: of scores calibrated on these trials, in folds over {rows[0]['folds']}; not those of "
            "the scores as they are"
        )
    return lines
