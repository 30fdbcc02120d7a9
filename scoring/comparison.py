"""Two systems on the same trials: which makes fewer errors, and whether the difference may be chance."""

import json
from pathlib import Path

import numpy as np

from corpus.lists import list_hash
from errors import UsageError
from scoring import plots
from scoring.cautions import wrong_way_round
from scoring.error_rates import ErrorRates
from scoring.files import join_labels, read_scores, read_trials_any
from scoring.intervals import draw_figures, draw_misses, enough_speakers, percentiles, trial_speakers, without_errors
from storage.files import write_atomically

LEVEL = 0.95
NAMES = ("A", "B")


def read_pair(paths, trials: str):
    """Read two score files of the same trials: (labels (N,), first, second, scores (2, N)); UsageError if they differ.

    ``trials``: a list with the labels, needed if neither file has them.
    """
    one, other = (read_scores(path) for path in paths)
    listed = read_trials_any(trials) if trials else one if one.labels is not None else other
    if listed.labels is None:
        raise UsageError(f"--compare: no labels in {paths[0]} and {paths[1]}: give --trials")
    joined = [join_labels(scored, listed) for scored in (one, other)]
    for scored in (one, other):
        if len(scored) != len(listed) and not trials:
            raise UsageError(f"{scored.path}: {len(scored)} trials, {listed.path} has {len(listed)}: give --trials")
    return listed.labels, listed.first, listed.second, np.stack([scored.scores for scored in joined])


def compare(labels, first, second, scores, priors, draws: int = 0, seed: int = 0) -> dict:
    """Figures of two systems with intervals, and of their differences, drawn for both from the same speakers.

    scores (2, N). Trials without a finite score of either are left out of both. Returns ``trials``, ``targets``,
    ``nan_scores``, ``interval`` (over what), ``A`` and ``B`` {figure: {value, low, high}} and ``difference``
    {figure: {value, low, high, p}}: B less A, and the two-sided share of draws with the opposite sign.
    """
    good = np.isfinite(scores).all(axis=0)
    labels, scores = np.asarray(labels)[good], scores[:, good]
    speakers, why = trial_speakers(labels, *([side[i] for i in np.flatnonzero(good)] for side in (first, second)))
    speakers = enough_speakers(speakers)
    costs = [(prior, 1.0, 1.0) for prior in priors]
    wanted = ["eer", *(f"min_dcf_{prior:g}" for prior in priors)]
    found = {}
    drawn = []
    share = 50 * (1 - LEVEL)
    for name, values in zip(NAMES, scores):
        rates = ErrorRates.of(values, labels)
        figures = [100 * rates.eer()[0], *(rates.min_dcf(*cost)[0] for cost in costs)]
        drawn.append(draw_figures(values, labels, speakers, values, costs, draws, seed))
        ends = {key: percentiles(drawn[-1][key], share) for key in wanted}
        ends.update(without_errors(values, labels, speakers, values, costs, LEVEL))
        found[name] = {key: _with_ends(value, ends[key]) for key, value in zip(wanted, figures)}
    differences = {}
    for key in wanted:
        value = found["B"][key]["value"] - found["A"][key]["value"]
        draw = drawn[1][key] - drawn[0][key]
        draw = draw[np.isfinite(draw)]
        two_sided = 2 * min(np.mean(draw <= 0), np.mean(draw >= 0))
        p = float(np.clip(two_sided, 1 / len(draw), 1))
        differences[key] = {**_with_ends(value, percentiles(draw, share)), "p": p}
    over = f"trials as if independent, too narrow: {why}" if speakers is None else "speakers, the same for both"
    counts = {"trials": len(labels), "targets": int(labels.sum()), "nan_scores": int((~good).sum())}
    return {**counts, "interval": over, **found, "difference": differences}


def _with_ends(value, ends) -> dict:
    return {"value": float(value), "low": float(ends[0]), "high": float(ends[1])}


def lines_of(result: dict, paths) -> list[str]:
    """The comparison for a terminal: a table, and a sentence for each figure."""
    lines = [f"{name}: {path}" for name, path in zip(NAMES, paths)]
    lines.append(
        f"{result['trials']} trials, {result['targets']} of them target; 95 % intervals over {result['interval']}"
    )
    if result["nan_scores"]:
        lines.append(f"{result['nan_scores']} trials without a finite score of both are left out of both")
    lines.append(f"{'':<14}" + "".join(f"{head:<30}" for head in ("A", "B", "B less A")).rstrip())
    for key, change in result["difference"].items():
        digits = 2 if key == "eer" else 4
        cells = [_cell(part, digits) for part in (result["A"][key], result["B"][key])] + [_cell(change, digits, "+")]
        lines.append((f"{_title(key):<14}" + "".join(f"{cell:<30}" for cell in cells)).rstrip())
    lines += [verdict(_title(key).removesuffix(" %"), change) for key, change in result["difference"].items()]
    for name in NAMES:
        caution = wrong_way_round(result[name]["eer"]["value"], result[name]["eer"]["low"])
        lines += [f"{name}: {caution}"] if caution else []
    return lines


def verdict(title: str, change: dict) -> str:
    """What a difference (B less A) of a figure, which is lower for the better system, says."""
    if change["value"] == change["low"] == change["high"] == 0:
        return f"{title}: no difference on these trials"
    better = "B" if change["value"] < 0 else "A"
    if change["low"] <= 0 <= change["high"]:
        return f"{title}: the difference may be chance (p {change['p']:.2g}); more speakers would tell"
    bound = f"p {change['p']:.2g}" if change["p"] >= 0.01 else "p below 0.01"
    return f"{title}: {better} is better, and that is unlikely to be chance ({bound})"


def _title(key: str) -> str:
    return "EER %" if key == "eer" else f"minDCF({key.rpartition('_')[2]})"


def _cell(part, digits: int, sign: str = "") -> str:
    value, low, high = (f"{part[name]:{sign}.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def main(a) -> int:
    """Compare the two score files of score.py's --compare; with --out write result.json and the picture."""
    labels, first, second, scores = read_pair(a.compare, a.trials)
    priors = sorted({0.01, 0.05, a.p_target})
    try:
        result = compare(labels, first, second, scores, priors, a.draws)
    except ValueError as error:
        raise UsageError(f"--compare: {error}") from error
    print("\n".join(lines_of(result, a.compare)))
    if a.out:
        folder = Path(a.out)
        files = {name: {"path": path, "sha256": list_hash(path)} for name, path in zip(NAMES, a.compare)}
        drawn = systems(a.compare, labels, first, second, scores, result, a.draws)
        paths = plots.draw_comparison(folder, drawn, a.pictures)
        write_atomically(folder / "result.json", (json.dumps({**result, "files": files}, indent=1) + "\n").encode())
        print("pictures: " + ", ".join(map(str, paths)))
    return 0


def _ending(path, most: int = 44) -> str:
    """The path, or its last letters if it is longer than a legend is wide."""
    return path if len(path) <= most else "..." + path[3 - most :]


def systems(paths, labels, first, second, scores, result, draws: int) -> list[tuple]:
    """(label, ErrorRates, function of false-accept rates (G,) to the interval of the misses (2, G)) of each system."""
    good = np.isfinite(scores).all(axis=0)
    labels, index = np.asarray(labels)[good], np.flatnonzero(good)
    speakers = enough_speakers(trial_speakers(labels, *([side[i] for i in index] for side in (first, second)))[0])
    share, drawn = 50 * (1 - LEVEL), []
    for name, path, values in zip(NAMES, paths, scores[:, good]):

        def band(alarms, values=values):
            misses = draw_misses(values, labels, speakers, alarms, draws)
            return np.nanpercentile(misses, (share, 100 - share), axis=0)

        eer = result[name]["eer"]
        drawn.append((f"{name}: EER {_cell(eer, 2)} %, {_ending(path)}", ErrorRates.of(values, labels), band))
    return drawn
