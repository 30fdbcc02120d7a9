"""Pictures of an evaluation: DET curve, ROC curve, score histogram and calibration."""

import io
from pathlib import Path

import numpy as np
from scipy.stats import norm

from scoring.error_rates import ErrorRates
from storage.files import write_atomically
from tuneThreshold import calibrated_llrs

TARGET, NONTARGET, MARK, GUIDE = "#1b6ca8", "#d1495b", "#222222", "#999999"
DET_TICKS = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80, 95])
PRIORS = (0.01, 0.05)
RULE = 30  # errors that a rate needs to be worth its name (Doddington et al. 2000)


def _figure(title, xlabel, ylabel, panels=1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.9 + 5.1 * panels, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set(xlabel=xlabel, ylabel=ylabel)
    figure.suptitle(title, fontsize=11)
    return figure, axes[0] if panels == 1 else axes


def draw_all(folder, scores, labels, result: dict, llrs=None, costs=(1.0, 1.0), write=write_atomically) -> list[Path]:
    """Write det.png, roc.png, scores.png and calibration.png into ``folder``; returns their paths.

    ``scores`` (N,) finite, ``labels`` (N,); ``result`` has ``eer`` in %, ``threshold``, ``trials``, ``targets`` and, if
    known, ``eer_low``, ``eer_high`` and ``epoch``. ``llrs`` (N,): default those of ``calibrated_llrs``. ``costs``: of a
    miss and of a false accept. ``write(path, bytes)`` writes a picture.
    """
    folder = Path(folder)
    interval = f" ({result['eer_low']:.2f} to {result['eer_high']:.2f})" if result.get("eer_low") is not None else ""
    epoch = f", epoch {result['epoch']}" if result.get("epoch") else ""
    title = f"EER {result['eer']:.2f} %{interval}, {result['trials']} trials{epoch}"
    rates = ErrorRates.of(scores, labels)
    llr_rates = ErrorRates.of(calibrated_llrs(scores, labels) if llrs is None else llrs, labels)
    drawn = [
        _det(title, rates, result, costs),
        _roc(title, rates, result),
        _histogram(title, rates, result),
        _calibration(title, llr_rates),
    ]
    paths = [folder / name for name in ("det.png", "roc.png", "scores.png", "calibration.png")]
    for figure, path in zip(drawn, paths):
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        write(path, picture.getvalue())
    return paths


def _curve(rates):
    """Miss and false-accept rates (K + 1,) at every threshold, misses rising."""
    _, targets, nontargets = rates.counts
    miss, rejected = (np.append(0, x.cumsum()) / x.sum() for x in (targets, nontargets))
    return miss, 1 - rejected


def _thinned(x, y, steps=2000):
    """The points of a curve that an eye can tell apart on axes of ``steps`` pixels, and both ends."""
    width, height = max(np.ptp(x), 1e-12), max(np.ptp(y), 1e-12)
    cell = np.stack([np.round((x - x[0]) / width * steps), np.round((y - y[0]) / height * steps)])
    keep = np.append(True, np.any(np.diff(cell) != 0, axis=0))
    keep[-1] = True
    return x[keep], y[keep]


def _det(title, rates, result, costs):
    figure, axes = _figure("DET curve\n" + title, "false accepts (%)", "misses (%)")
    miss, alarm = _curve(rates)
    targets, nontargets = len(rates.targets), len(rates.nontargets)
    smallest = 100 / max(targets, nontargets)
    ticks = DET_TICKS[min(smallest, 5) <= DET_TICKS]
    best = [(prior, *rates.min_dcf(prior, *costs)) for prior in PRIORS]
    most = max(float(rates.at(threshold)[0]) for _, _, threshold in best)
    low, high = norm.ppf(ticks[0] / 100 * 0.8), norm.ppf(0.6 if most < 0.6 else 0.95)
    inside = (miss > 0) & (miss < 1) & (alarm > 0) & (alarm < 1)
    if inside.any():
        axes.plot(*_thinned(norm.ppf(alarm[inside]), norm.ppf(miss[inside])), color=TARGET, linewidth=1.8)
    else:
        axes.text(0.55, 0.3, "no threshold makes\nboth kinds of error", transform=axes.transAxes, ha="left")
    axes.plot([low, high], [low, high], color=GUIDE, linewidth=0.8, linestyle="--", label="equal error")
    for count, line in ((nontargets, axes.axvline), (targets, axes.axhline)):
        if RULE / count < 0.6:
            line(norm.ppf(RULE / count), color=GUIDE, linewidth=0.8, linestyle=":")
    axes.plot([], [], color=GUIDE, linewidth=0.8, linestyle=":", label=f"{RULE} errors")
    if result["eer"] > 0:
        eer = norm.ppf(result["eer"] / 100)
        axes.plot([eer], [eer], "o", color=MARK, label=f"EER {result['eer']:.2f} %", zorder=3)
    for (prior, cost, threshold), marker in zip(best, "sD"):
        point = np.clip(norm.ppf(np.maximum(rates.at(threshold), 1e-9)[::-1]), low, high)
        label = f"minDCF({prior:g}) {cost:.3f}"
        axes.plot(*point[:, None], marker, color=NONTARGET, markersize=6, label=label, clip_on=False, zorder=3)
    places = norm.ppf(ticks / 100)
    apart = np.append(True, np.diff(np.floor((places - low) / (high - low) * 17)) > 0)  # labels that do not touch
    ticks, places = ticks[apart], places[apart]
    axes.set_xticks(places, [f"{t:g}" for t in ticks])
    axes.set_yticks(places, [f"{t:g}" for t in ticks])
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.legend(frameon=False, fontsize=9)
    return figure


def _roc(title, rates, result):
    figure, axes = _figure("ROC curve\n" + title, "false accepts (%)", "accepted targets (%)")
    miss, alarm = _curve(rates)
    axes.plot(*_thinned(100 * alarm, 100 * (1 - miss)), color=TARGET, linewidth=1.8)
    axes.plot([0, 100], [100, 0], color=GUIDE, linewidth=0.8, linestyle="--", label="equal error")
    axes.plot([result["eer"]], [100 - result["eer"]], "o", color=MARK, label=f"EER {result['eer']:.2f} %")
    axes.set(xlim=(-1, 101), ylim=(-1, 101), aspect="equal")
    axes.legend(frameon=False, loc="center right")
    return figure


def _histogram(title, rates, result):
    figure, axes = _figure("Scores\n" + title, "score", "share of the trials of a class (%)")
    lowest = min(rates.targets[0], rates.nontargets[0])
    highest = max(rates.targets[-1], rates.nontargets[-1])
    middle, half = (lowest + highest) / 2, max((highest - lowest) / 2, 1e-3)  # a collapsed model has one score
    edges = np.linspace(middle - half, middle + half, 61)
    for scores, name, color in ((rates.nontargets, "nontarget", NONTARGET), (rates.targets, "target", TARGET)):
        share = 100 * np.histogram(scores, edges)[0] / len(scores)
        axes.stairs(share, edges, fill=True, alpha=0.5, color=color, label=f"{name} ({len(scores)})")
        axes.stairs(share, edges, color=color, linewidth=1.0)
    top, label = axes.get_ylim()[1], f"EER threshold {result['threshold']:.3f}"
    axes.plot([result["threshold"]] * 2, [0, top], color=MARK, linewidth=1.2, label=label)
    axes.set_ylim(0, 1.15 * top)
    axes.locator_params(axis="x", nbins=6)
    axes.legend(frameon=False, loc="upper center", ncols=3, fontsize=9, columnspacing=1.2, handlelength=1.5)
    return figure


def _calibration(title, rates):
    """Left: what a log-likelihood ratio stands for. Right: the cost at every prior (BOSARIS)."""
    figure, (left, right) = _figure("Calibration\n" + title, "log-likelihood ratio as given", "as found (PAV)", 2)
    _reliability(left, rates)
    odds = np.linspace(-7, 7, 281)  # of a target; natural logarithm
    prior = 1 / (1 + np.exp(-odds))
    default = np.minimum(prior, 1 - prior)
    miss, alarm = rates.at(-odds)
    hull_miss, hull_alarm = rates.convex_hull()
    best = np.min(prior[:, None] * hull_miss + (1 - prior[:, None]) * hull_alarm, axis=1)
    actual = (prior * miss + (1 - prior) * alarm) / default
    right.plot(odds, actual, color=NONTARGET, linewidth=1.8, label="actual decisions (actDCF)")
    right.plot(odds, best / default, color=TARGET, linewidth=1.8, label="best thresholds (minDCF, hull)")
    right.axhline(1, color=GUIDE, linewidth=0.8, linestyle="--", label="deciding without listening")
    for p in PRIORS:
        right.axvline(np.log(p / (1 - p)), color=GUIDE, linewidth=0.8, linestyle=":")
        right.text(np.log(p / (1 - p)), 0.01, f" {p:g}", color=MARK, fontsize=8, va="bottom")
    right.set(xlabel="log odds of a target", ylabel="normalised cost", ylim=(0, 1.4), xlim=(-7, 7))
    right.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def _reliability(axes, rates):
    """PAV log-likelihood ratios of blocks of trials against the given ones; on the diagonal a ratio means itself."""
    last, targets, nontargets = rates.pools
    llrs = rates.pool_llrs()
    begin = np.append(min(rates.targets[0], rates.nontargets[0]), last[:-1])
    mixed = np.isfinite(llrs)  # a block of one class stands for an infinite ratio
    every = np.concatenate([rates.targets[[0, -1]], rates.nontargets[[0, -1]], [-2.0, 2.0]])
    low, high = max(every.min(), -12), min(every.max(), 12)
    axes.plot([low, high], [low, high], color=GUIDE, linewidth=0.8, linestyle="--", label="calibrated")
    if mixed.any():
        x = np.stack([begin[mixed], last[mixed]], axis=1).ravel()
        axes.plot(x, np.repeat(llrs[mixed], 2), color=TARGET, linewidth=1.8, label="blocks of trials")
        large = mixed & (targets + nontargets >= 2 * RULE) & (np.minimum(targets, nontargets) >= 5)
        large &= large.sum() <= 40
        axes.plot((begin + last)[large] / 2, llrs[large], "o", color=TARGET, markersize=4)
    cost = f"Cllr {rates.cllr():.3f} bit, at best {rates.min_cllr():.3f}"
    axes.plot([], [], " ", label=cost)
    axes.set(xlim=(low, high), ylim=(max(low - 1, -13), min(high + 1, 13)))
    axes.legend(frameon=False, fontsize=9, loc="upper left")
