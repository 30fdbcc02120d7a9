"""Report a scored trial list: figures with intervals, a table, one JSON, pictures."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from corpus.lists import list_hash
from errors import UsageError
from scoring import plots
from scoring.cautions import wrong_way_round
from scoring.error_rates import ErrorRates, worst_eer
from scoring.figures import condition_table, figures_of, table_lines
from scoring.files import write_scores
from scoring.intervals import bootstrap_interval, speaker_of, trial_speakers
from storage.files import write_atomically

OVER_SPEAKERS = "95 % intervals by bootstrap over speakers"
LISTS = ("trials", "embeddings", "durations", "enroll", "backend", "cohort", "cohort_speakers", "plda", "calibrate")


def evaluate(trials, values, a, models) -> dict:
    """Figures of a trial list with their 95 % intervals over speakers; non-finite values are counted, never silent.

    Returns counts, ``figures`` {name: value}, ``intervals`` {name: (low, high)}, ``interval``: over what they are,
    ``eer_worst`` if trials were lost (those counted as errors), ``failed`` None or why it is all.
    """
    finite, labels = np.isfinite(values), trials.labels
    lost = int((~finite).sum())
    result = {"trials": len(values), "targets": int(labels.sum()), "nan_scores": lost, "failed": None}
    result["nan_targets"] = int(labels[~finite].sum())
    left, share = np.unique(labels[finite]), 100 * lost / len(values)
    if len(left) < 2:
        result["failed"] = "every score is non-finite" if not len(left) else "one class of trials is left"
    elif share > a.max_nan_score_pct:
        result["failed"] = f"{share:.1f} % of the scores are non-finite (--max_nan_score_pct {a.max_nan_score_pct:g})"
    if result["failed"]:
        return {**result, "figures": None, "intervals": None}
    result["figures"], result["intervals"], result["interval"] = figures(trials, values, finite, a, models)
    if lost:
        result["eer_worst"] = worst_eer(values, labels)
    return result


def summarise(a, trials, llrs, chain: str, models=None) -> dict:
    """Everything of result.json but the notes: options, versions, list hashes, figures of scores and of llrs."""
    options = {key: value for key, value in vars(a).items() if value not in ("", [], None, False)}
    hashes = {}
    for key in (*LISTS, "fuse", "fuse_calibrate"):
        for path in np.atleast_1d(getattr(a, key)):
            if path:
                hashes[str(path)] = list_hash(path)
    packages = ("numpy", "scipy", "scikit-learn", "torch")
    return {
        "chain": chain,
        "scores": evaluate(trials, trials.scores, a, models),
        "calibrated": None if llrs is None else evaluate(trials, llrs, a, models),
        "problems": [{"name": n, "reason": r, "trials": s} for n, (r, s) in trials.problems.items()],
        "command": sys.argv,
        "options": options,
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        "sha256": hashes,
    }


def table(result: dict) -> list[str]:
    """The figures of a result in lines for the terminal."""
    columns = [(name, result[key]) for name, key in (("scores", "scores"), ("calibrated", "calibrated")) if result[key]]
    first = columns[0][1]
    lines = [f"{first['trials']} trials, {first['targets']} of them target; {result['chain']}"]
    for name, part in columns:
        if part["failed"]:
            lines.append(f"no figures of the {name}: {part['failed']}")
        elif part["nan_scores"]:
            lines.append(
                f"{part['nan_scores']} {name} are non-finite ({part['nan_targets']} of target trials): EER "
                f"{part['figures']['eer']:.2f} % without them, {part['eer_worst']:.2f} % counting them as errors"
            )
    columns = [(name, part) for name, part in columns if not part["failed"]]
    if not columns:
        return lines
    eer = columns[0][1]["figures"]["eer"]
    interval = columns[0][1]["intervals"].get("eer", (None, None))
    caution = wrong_way_round(eer, interval[0])
    lines += [caution] if caution else []
    lines.append(f"{'':<14}" + "".join(f"{name:<32}" for name, _ in columns).rstrip())
    names = {"eer": "EER %", "cllr": "Cllr", "min_cllr": "minCllr", "threshold": "EER threshold"}
    for key in columns[0][1]["figures"]:
        kind, _, prior = key.rpartition("_")
        title = names.get(key) or f"{kind.replace('min_dcf', 'minDCF').replace('act_dcf', 'actDCF')}({prior})"
        cells = [
            _cell(part["figures"][key], part["intervals"].get(key), 2 if key == "eer" else 4) for _, part in columns
        ]
        lines.append((f"{title:<14}" + "".join(f"{cell:<32}" for cell in cells)).rstrip())
    return [*lines, columns[0][1]["interval"], "actDCF and Cllr take a score for a natural-log likelihood ratio"]


def _cell(value, interval, digits: int) -> str:
    interval = "" if interval is None else f" ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
    return f"{value:.{digits}f}{interval}"


def figures(trials, values, finite, a, models):
    """Figures of the finite values, and their intervals; the actual costs take values for log-likelihood ratios."""
    labels = trials.labels[finite]
    first, second = ([side[i] for i in np.flatnonzero(finite)] for side in (trials.first, trials.second))
    rates = ErrorRates.of(values[finite], labels)
    priors = sorted({*plots.PRIORS, a.p_target})
    speakers, reason = trial_speakers(labels, first, second, speakers_of(models, second))
    basis = f"95 % intervals over trials as if independent, too narrow: {reason}" if reason else OVER_SPEAKERS
    try:
        intervals = bootstrap_interval(values[finite], labels, speakers, priors=priors, draws=a.draws)
    except ValueError as error:  # a handful of trials
        intervals = {}
        basis = f"no intervals: {error}"
    return figures_of(rates, rates, priors), intervals, basis


def speakers_of(models, tests):
    """The mapping that ``trial_speakers`` takes if the first names are models: each by its first utterance."""
    if models is None:
        return None
    return {**{t: speaker_of(t) for t in tests}, **{name: speaker_of(of[0]) for name, of in models.items()}}


def by_condition(a, groupings, trials, llrs, models, result: dict) -> list[str]:
    """Lines of the tables by condition, of which each grouping has the groups; their rows go into the result."""
    mapping = speakers_of(models, trials.second)
    speakers, _ = trial_speakers(trials.labels, trials.first, trials.second, mapping)
    values = trials.scores if llrs is None else llrs
    rows = condition_table(values, trials.labels, groupings, a.p_target, speakers, a.draws, llrs)
    result["by_condition"] = rows
    return ["", *table_lines(rows, a.p_target)]


def write(a, trials, llrs, result: dict):
    """Write scores.txt, llrs.txt, nan_trials.txt, result.json and the pictures into the folder --out."""
    folder = Path(a.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = [f"{name}.{ending}" for name in plots.NAMES for ending in plots.FORMATS]
        for stale in ("scores.txt", "llrs.txt", "nan_trials.txt", *pictures):  # of an earlier run
            (folder / stale).unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot write into '{folder}': {error.strerror}") from error
    lost = ~np.isfinite(trials.scores if llrs is None else llrs)
    for name, values in (("scores", trials.scores), ("llrs", llrs)):
        if values is not None and np.isfinite(values).any():
            _write_part(folder / f"{name}.txt", trials, values, np.isfinite(values), a.form)
    if lost.any():
        _write_part(folder / "nan_trials.txt", trials, trials.scores, lost, "voxceleb")
    draw(folder, trials, llrs, result, a.pictures)
    write_atomically(folder / "result.json", (json.dumps(result, indent=1) + "\n").encode())


def draw(folder, trials, llrs, result: dict, formats=()):
    """Write the pictures: of the log-likelihood ratios if there are any, else of the scores."""
    part = result["calibrated"] or result["scores"]
    if part["failed"]:
        return
    values = trials.scores if llrs is None else llrs
    good = np.isfinite(values)
    labels = trials.labels[good]
    counts = {"trials": len(labels), "targets": int(labels.sum())}
    low, high = part["intervals"].get("eer", (None, None))
    shown = {**part["figures"], **counts, "eer_low": low, "eer_high": high}
    plots.draw_all(folder, values[good], labels, shown, None if llrs is None else values[good], formats=formats)


def _write_part(path, trials, values, chosen, form):
    rows = np.flatnonzero(chosen)
    first, second = ([side[i] for i in rows] for side in (trials.first, trials.second))
    write_scores(path, values[rows], trials.labels[rows], first, second, form)
