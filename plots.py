"""Pictures of an evaluation: DET curve, ROC curve and score histogram."""

from pathlib import Path

import numpy as np
from scipy.stats import norm

from tuneThreshold import ComputeErrorRates

TARGET, NONTARGET, MARK = "#1b6ca8", "#d1495b", "#222222"
DET_TICKS = np.array([0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80, 95])


def _figure(title, xlabel, ylabel):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_all(folder, scores, labels, result: dict) -> list[Path]:
    """Write det.png, roc.png and scores.png into ``folder``; returns their paths."""
    folder = Path(folder)
    epoch = f", epoch {result['epoch']}" if "epoch" in result else ""
    title = f"EER {result['eer']:.2f} %, {result['trials']} trials{epoch}"
    miss, alarm, _ = ComputeErrorRates(scores, labels)
    miss, alarm = np.concatenate([[0.0], miss]), np.concatenate([[1.0], alarm])
    drawn = [
        _det(title, miss, alarm, result),
        _roc(title, miss, alarm, result),
        _histogram(title, scores, labels, result),
    ]
    paths = [folder / name for name in ("det.png", "roc.png", "scores.png")]
    for figure, path in zip(drawn, paths):
        figure.savefig(path)
    return paths


def _det(title, miss, alarm, result):
    figure, axes = _figure("DET curve\n" + title, "false alarms (%)", "misses (%)")
    inside = (miss > 0) & (miss < 1) & (alarm > 0) & (alarm < 1)
    axes.plot(norm.ppf(alarm[inside]), norm.ppf(miss[inside]), color=TARGET, linewidth=1.8)
    smallest = 100 / max(result["targets"], result["trials"] - result["targets"])
    ticks = DET_TICKS[min(smallest, 5) <= DET_TICKS]
    places = norm.ppf(ticks / 100)
    axes.plot(places[[0, -1]], places[[0, -1]], color="#999999", linewidth=0.8, linestyle="--", label="equal error")
    if result["eer"] > 0:
        eer = norm.ppf(result["eer"] / 100)
        axes.plot([eer], [eer], "o", color=MARK, label=f"EER {result['eer']:.2f} %")
    axes.set_xticks(places, [f"{t:g}" for t in ticks])
    axes.set_yticks(places, [f"{t:g}" for t in ticks])
    limits = norm.ppf([ticks[0] / 100 * 0.8, 0.6])
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.legend(frameon=False)
    return figure


def _roc(title, miss, alarm, result):
    figure, axes = _figure("ROC curve\n" + title, "false alarms (%)", "accepted targets (%)")
    axes.plot(100 * alarm, 100 * (1 - miss), color=TARGET, linewidth=1.8)
    axes.plot([0, 100], [100, 0], color="#999999", linewidth=0.8, linestyle="--", label="equal error")
    axes.plot([result["eer"]], [100 - result["eer"]], "o", color=MARK, label=f"EER {result['eer']:.2f} %")
    axes.set(xlim=(-1, 101), ylim=(-1, 101), aspect="equal")
    axes.legend(frameon=False, loc="center right")
    return figure


def _histogram(title, scores, labels, result):
    figure, axes = _figure("Scores\n" + title, "score", "share of the trials of a class (%)")
    scores, labels = np.asarray(scores), np.asarray(labels)
    middle, half = (scores.min() + scores.max()) / 2, max(np.ptp(scores) / 2, 1e-3)  # a collapsed model has one score
    edges = np.linspace(middle - half, middle + half, 61)
    for label, name, color in ((0, "nontarget", NONTARGET), (1, "target", TARGET)):
        chosen = scores[labels == label]
        weights = np.full(len(chosen), 100 / len(chosen))
        axes.hist(chosen, edges, weights=weights, alpha=0.6, color=color, label=f"{name} ({len(chosen)})")
    axes.axvline(result["threshold"], color=MARK, linewidth=1.2, label=f"threshold {result['threshold']:.3f}")
    axes.legend(frameon=False)
    return figure
