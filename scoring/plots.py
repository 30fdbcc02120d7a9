"""Pictures: DET curve, ROC curve, score histogram and calibration of an evaluation, and who speaks when."""

import io
import warnings
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

from scoring.calibration import calibrated_llrs
from scoring.cautions import FEW_ERRORS
from scoring.error_rates import ErrorRates
from storage.files import write_atomically

TARGET, NONTARGET, MARK, GUIDE = "#1b6ca8", "#d1495b", "#222222", "#999999"
DET_TICKS = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80, 95, 99])
MOST_TICKS = 11  # whose labels do not touch
PRIORS = (0.01, 0.05)  # of which costs are told and drawn
# Okabe and Ito's colours that colour-blind people tell apart, but for yellow, which is pale on white.
SPEAKERS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
OTHER, MOST_ROWS, LONGEST_LABEL = "#444444", 15, 30
NAMES = ("det", "roc", "scores", "calibration")
FORMATS = ("png", "pdf", "svg")


def _figure(title, xlabel, ylabel, panels=1):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.9 + 5.1 * panels, 6.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set(xlabel=xlabel, ylabel=ylabel)
    figure.suptitle(title, fontsize=11)
    return figure, axes[0] if panels == 1 else axes


def _legend(axes, columns=2):
    """Put the legend below the axes, where no curve runs."""
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13)}
    axes.legend(frameon=False, fontsize=9, ncols=columns, columnspacing=1.2, handlelength=1.6, **place)


def draw_all(
    folder, scores, labels, result: dict, llrs=None, costs=(1.0, 1.0), write=write_atomically, formats=()
) -> list[Path]:
    """Write det.png, roc.png, scores.png and calibration.png into ``folder``; returns the paths of all pictures.

    ``scores`` (N,) finite, ``labels`` (N,); ``result`` has ``eer`` in %, ``threshold``, ``trials``, ``targets`` and, if
    known, ``eer_low``, ``eer_high`` and ``epoch``. ``llrs`` (N,): default those of ``calibrated_llrs``. ``costs``: of a
    miss and of a false accept. ``write(path, bytes)`` writes a picture. ``formats``: of FORMATS, beside png.
    """
    interval = f" ({result['eer_low']:.2f} to {result['eer_high']:.2f})" if result.get("eer_low") is not None else ""
    epoch = f", epoch {result['epoch']}" if result.get("epoch") else ""
    title = f"EER {result['eer']:.2f} %{interval}, {result['trials']} trials{epoch}"
    rates = ErrorRates.of(scores, labels)
    llr_rates = ErrorRates.of(calibrated_llrs(scores, labels) if llrs is None else llrs, labels)
    drawn = [
        _det(title, rates, result, costs),
        _roc(title, rates, result),
        _histogram(title, rates, result),
        _calibration(title, llr_rates, rates),
    ]
    return [path for figure, name in zip(drawn, NAMES) for path in _save(figure, Path(folder), name, formats, write)]


def _save(figure, folder, name, formats, write) -> list[Path]:
    """Write a picture as PNG and in other formats."""
    from matplotlib import rc_context

    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine(None)  # laid out once for all formats; with an engine each draws twice
    paths = []
    for ending in dict.fromkeys(["png", *formats]):
        picture = io.BytesIO()
        # Text of an SVG and letters of a PDF stay text, to be searched and edited; no dates, so that equal is equal.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "pdf.fonttype": 42}):
            dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(ending)
            figure.savefig(picture, format=ending, metadata=dated)
        paths.append(folder / f"{name}.{ending}")
        write(paths[-1], picture.getvalue())
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


def _probit_axes(axes, low, high):
    """Scale both axes from ``low`` to ``high``, in probits, with ticks in % whose labels do not touch."""
    places, ticks = ndtri(DET_TICKS / 100), []
    for place, tick in zip(places, DET_TICKS):
        if low <= place <= high and (not ticks or place - ticks[-1][0] >= (high - low) / MOST_TICKS):
            ticks.append((place, f"{tick:g}"))
    axes.set_xticks(*zip(*ticks))
    axes.set_yticks(*zip(*ticks))
    axes.set(xlim=(low, high), ylim=(low, high), aspect="equal")
    axes.plot([low, high], [low, high], color=GUIDE, linewidth=0.8, linestyle="--", label="equal error", zorder=1)


def _probit_span(targets: int, nontargets: int, highest: float):
    """The ends of the axes of a DET curve: from the smallest rate that so many trials tell to above ``highest``."""
    smallest = min(100 / max(targets, nontargets), 5)
    low = DET_TICKS[smallest <= DET_TICKS][0] / 100 * 0.8
    return ndtri(low), ndtri(next((top for top in (0.05, 0.2, 0.6, 0.95) if 1.5 * highest < top), 0.999))


def _det_curve(axes, rates, **style) -> bool:
    """Draw a DET curve; returns whether there is one, since separable trials have no threshold with both errors."""
    miss, alarm = _curve(rates)
    inside = (miss > 0) & (miss < 1) & (alarm > 0) & (alarm < 1)
    if inside.any():
        ends = np.convolve(inside, [1, 1, 1], "same") > 0  # with the steps to no error, which leave the picture
        x, y = (ndtri(np.clip(rate[ends], 1e-9, 1 - 1e-9)) for rate in (alarm, miss))
        axes.plot(*_thinned(x, y), linewidth=1.8, **style)
    return bool(inside.any())


def _det(title, rates, result, costs):
    figure, axes = _figure("DET curve\n" + title, "false accepts (%)", "misses (%)")
    targets, nontargets = len(rates.targets), len(rates.nontargets)
    best = [(prior, *rates.min_dcf(prior, *costs)) for prior in PRIORS]
    most = max(float(rates.at(threshold)[0]) for _, _, threshold in best)
    low, high = _probit_span(targets, nontargets, max(most, 1.2 * result["eer"] / 100))
    _probit_axes(axes, low, high)
    if not _det_curve(axes, rates, color=TARGET):
        axes.text(0.5, 0.6, "no threshold makes both kinds of error", transform=axes.transAxes, ha="center")
    style = {"color": GUIDE, "linewidth": 0.8, "linestyle": ":"}
    for count, line in ((nontargets, axes.axvline), (targets, axes.axhline)):
        if low < ndtri(min(FEW_ERRORS / count, 1)) < high:
            line(ndtri(FEW_ERRORS / count), **style)
    axes.plot([], [], **style, label=f"{FEW_ERRORS} errors: rates left of it or below are unreliable")
    if 0 < result["eer"] < 100:
        eer = ndtri(result["eer"] / 100)
        axes.plot([eer], [eer], "o", color=MARK, label=f"EER {result['eer']:.2f} %", zorder=4)
    # The second marker is open and larger: both are seen if they fall together.
    for (prior, cost, threshold), marker in zip(best, ({"ms": 5}, {"ms": 11, "mfc": "none", "mew": 1.6})):
        point = np.clip(ndtri(np.clip(rates.at(threshold), 1e-9, 1 - 1e-9)[::-1]), low, high)
        label = f"minDCF({prior:g}) {cost:.3f}"
        axes.plot(*point[:, None], "s", color=NONTARGET, **marker, label=label, clip_on=False, zorder=3)
    _legend(axes)
    return figure


def draw_comparison(folder, systems, formats=(), write=write_atomically) -> list[Path]:
    """Write compare.png, the DET curves of several systems with their intervals; returns the paths.

    ``systems``: (label, ErrorRates, function of false-accept rates (G,) to the interval of the misses (2, G)) of each.
    """
    figure, axes = _figure("DET curves, with 95 % intervals of the misses", "false accepts (%)", "misses (%)")
    trials = systems[0][1]
    eers = [float(rates.eer()[0]) for _, rates, _ in systems]
    low, high = _probit_span(len(trials.targets), len(trials.nontargets), 3 * max(eers))
    _probit_axes(axes, low, high)
    grid = np.linspace(low, high, 120)
    for (label, rates, interval), eer, color in zip(systems, eers, (TARGET, NONTARGET)):
        _det_curve(axes, rates, color=color)
        bottom, top = np.clip(ndtri(np.clip(interval(ndtr(grid)), 1e-9, 1 - 1e-9)), low - 1, high + 1)
        axes.fill_between(grid, bottom, top, color=color, alpha=0.18, linewidth=0)
        place = np.clip(ndtri(np.clip(eer, 1e-9, 1 - 1e-9)), low, high)
        axes.plot([place], [place], "o-", color=color, label=label, clip_on=False, zorder=4)
    _legend(axes, 1)
    return _save(figure, Path(folder), "compare", formats, write)


def _roc(title, rates, result):
    figure, axes = _figure("ROC curve\n" + title, "false accepts (%), logarithmic", "accepted targets (%)")
    miss, alarm = _curve(rates)
    least = 100 / len(rates.nontargets) / 2  # half an error: if no nontarget is accepted
    x, accepted = np.maximum(100 * alarm, least), 100 * (1 - miss)
    x, accepted = _thinned(np.log10(x), accepted)
    axes.plot(10**x, accepted, color=TARGET, linewidth=1.8)
    even = np.geomspace(least, 100, 200)
    axes.plot(even, 100 - even, color=GUIDE, linewidth=0.8, linestyle="--", label="equal error")
    eer = max(result["eer"], least)
    axes.plot([eer], [100 - result["eer"]], "o", color=MARK, label=f"EER {result['eer']:.2f} %", clip_on=False)
    without = accepted[np.argmin(x)] if len(x) else 0  # targets accepted without any false accept
    bottom = max([edge for edge in (0, 50, 80, 90) if edge <= min(without, 100 - result["eer"]) - 3], default=0)
    axes.set(xlim=(least, 100), ylim=(bottom, 100 + (100 - bottom) / 100), xscale="log")
    from matplotlib.ticker import LogLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if least < 0.5 else (1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _legend(axes)
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
    axes.axvline(result["threshold"], color=MARK, linewidth=1.2, label=f"EER threshold {result['threshold']:.3f}")
    axes.locator_params(axis="x", nbins=6)
    _legend(axes, 3)
    return figure


def _calibration(title, rates, raw):
    """Left: what a log-likelihood ratio stands for. Right: the cost at every prior (BOSARIS).

    What is best is found on the ``raw`` scores: the ratios of several folds are not of one order.
    """
    figure, (left, right) = _figure("Calibration\n" + title, "log-likelihood ratio as given", "as found (PAV)", 2)
    _reliability(left, rates, raw)
    odds = np.linspace(-7, 7, 281)  # of a target; natural logarithm
    prior = 1 / (1 + np.exp(-odds))
    default = np.minimum(prior, 1 - prior)
    miss, alarm = rates.at(-odds)
    hull_miss, hull_alarm = raw.convex_hull()
    best = np.min(prior[:, None] * hull_miss + (1 - prior[:, None]) * hull_alarm, axis=1)
    actual = (prior * miss + (1 - prior) * alarm) / default
    right.plot(odds, actual, color=NONTARGET, linewidth=1.8, label="actual decisions (actDCF)")
    right.plot(odds, best / default, color=TARGET, linewidth=1.8, label="best thresholds (minDCF, hull)")
    right.axhline(1, color=GUIDE, linewidth=0.8, linestyle="--", label="always deciding by the prior")
    for p in PRIORS:
        right.axvline(np.log(p / (1 - p)), color=GUIDE, linewidth=0.8, linestyle=":")
        right.text(np.log(p / (1 - p)), 1.39, f" prior {p:g}", color=MARK, fontsize=8, va="top", rotation=90)
    right.set(xlabel="log odds of a target", ylabel="normalised cost", ylim=(0, 1.4), xlim=(-7, 7))
    _legend(right, 1)
    return figure


def _reliability(axes, rates, raw):
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
        large = mixed & (targets + nontargets >= 2 * FEW_ERRORS) & (np.minimum(targets, nontargets) >= 5)
        large &= large.sum() <= 40
        axes.plot((begin + last)[large] / 2, llrs[large], "o", color=TARGET, markersize=4)
    else:
        axes.text(0.5, 0.7, "no score is that of both classes", transform=axes.transAxes, ha="center")
    cost = f"Cllr {rates.cllr():.3f} bit, at best {raw.min_cllr():.3f}"
    axes.plot([], [], " ", label=cost)
    axes.set(xlim=(low, high), ylim=(max(low - 1, -13), min(high + 1, 13)))
    _legend(axes, 1)


def draw_timeline(path, timeline, title: str, write=write_atomically) -> str:
    """Write a PNG of who speaks when: probabilities over time in s, and below them the decision, a row a speaker.

    Returns what to say of letters that the font lacks, '' if it has all. ``timeline``: a ``scoring.timeline.Timeline``.
    Those who speak longest have a curve and a colour.
    """
    labels = [label for label in timeline.totals() if label in timeline.names][:MOST_ROWS]
    shown = labels[: len(SPEAKERS)] or [timeline.names[int(timeline.posteriors[:, :-1].mean(axis=0).argmax())]]
    rows = (labels or shown) + ["nobody"]
    color = {"nobody": GUIDE, **dict.fromkeys(rows[:-1], OTHER), **dict(zip(shown, SPEAKERS))}
    figure, (top, bottom) = _time_axes(title, timeline.seconds, len(rows))
    for name in ("nobody", *reversed(shown)):
        number = timeline.names.index(name) if name in shown else len(timeline.names)
        style = {"linestyle": "--", "linewidth": 1.0} if name not in shown else {"linewidth": 1.5}
        top.stairs(100 * timeline.posteriors[:, number], timeline.edges, baseline=None, color=color[name], **style)
    for segment in timeline.segments:
        if segment.silence:
            for axes in (top, bottom):
                axes.axvspan(segment.start, segment.end, color="#eeeeee", linewidth=0, zorder=0)
        elif segment.label in rows:
            bar = [(segment.start, segment.end - segment.start)]
            bottom.broken_barh(bar, (rows.index(segment.label) - 0.38, 0.76), color=color[segment.label], linewidth=0)
    words = [name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "\u2026" for name in rows]
    bottom.set_yticks(range(len(rows)), words, parse_math=False)
    for tick, name in zip(bottom.get_yticklabels(), rows):
        tick.set_color(MARK if name == "nobody" else color[name])
    picture = io.BytesIO()
    with warnings.catch_warnings(record=True) as said:
        figure.savefig(picture, format="png")
    missing = [warning for warning in said if str(warning.message).startswith("Glyph")]
    for other in said:
        if other not in missing:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    write(Path(path), picture.getvalue())
    return f"{path}: boxes stand for letters that the font of the picture lacks" if missing else ""


def _time_axes(title, seconds, rows):
    """A figure of two panels over time: probabilities in %, and ``rows`` speakers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = 0.5 + 0.28 * rows
    figure = Figure(figsize=(11, 3.2 + height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, height))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    top.set(ylabel="probability (%)", ylim=(-2, 102), xlim=(0, seconds))
    top.set_title(title, fontsize=11, parse_math=False)
    bottom.set(xlabel="time (s); light bands: silence", ylim=(rows - 0.4, -0.6))
    return figure, (top, bottom)
