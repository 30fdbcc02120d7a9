"""Pictures for the page of a NaN dump, from tensors that may hold NaN."""

import base64
import io
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from config import SAMPLE_RATE, frame_samples
from web.charts import Scale, bars, escape, grid, percent, stretched, svg, text, tick_text

COLUMNS = 600  # of a waveform or a spectrogram: what a screen resolves


def number(value) -> float:
    """A float of anything: NaN of what is no number."""
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.device.type == "cpu":
        value = value.item()
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:  # an int beyond the doubles
        return math.inf


def number_text(value) -> str:
    """A number as people read it: 12, 0.0312, 65504, 6.1e+07, NaN, -Inf."""
    value = number(value)
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    return f"{value:.0f}" if abs(value) < 1e6 and (value.is_integer() or abs(value) >= 1e3) else f"{value:.4g}"


def line_chart(title: str, points: list[tuple[float, float]], here: float | None = None, height: int = 140) -> str:
    """A curve of (step, value); non-finite values are marked at the top, the step ``here`` by a dashed line."""
    finite = [y for _, y in points if math.isfinite(y)]
    steps = [x for x, _ in points] + ([here] if here is not None else [])
    if len(points) == len(finite) > 1 and len(set(finite)) == 1:
        return f'<p class="quiet">{number_text(finite[0])} throughout.</p>'
    x = Scale(min(steps), max(max(steps), min(steps) + 1))
    y = Scale.fit(finite)
    parts, run, runs, wrong = grid(x, y, height), [], [], []
    for step, value in [*points, (0.0, math.nan)]:
        if math.isfinite(value):
            run.append((x.at(step) * 10, height * (1 - y.at(value) / 100)))
            continue
        runs, run = runs + [run] if run else runs, []
        wrong.append(step)
    paths = "".join(
        f'<path class="line" d="M{" L".join(f"{a:.1f} {b:.1f}" for a, b in run)}"/>' for run in runs if run[1:]
    )
    parts.append(stretched(0, height, paths))
    for run in runs:
        if len(run) == 1 or run is runs[-1]:
            parts.append(f'<circle class="dot" cx="{percent(run[-1][0] / 10)}" cy="{run[-1][1]:.1f}" r="3"/>')
    for step in wrong[:-1][-200:]:
        parts.append(cross(percent(x.at(step)), 5))
    if here is not None:
        place = percent(x.at(here))
        parts.append(f'<line class="limit" x1="{place}" x2="{place}" y1="-4" y2="{height}"/>')
        parts.append(text(place, -8, "this step", "", "end" if x.at(here) > 50 else "start"))
    parts.append(text("50%", height + 32, "step"))
    return svg(title + (", logarithmic" if y.log else ""), height + 40, parts)


def cross(x: str, y: float) -> str:
    """The mark of a non-finite value: a shape, so that it does not depend on colour."""
    shape = '<path d="M-4-4 4 4M4-4-4 4"/>'
    return f'<svg x="{x}" y="{y:g}" width="1" height="1" class="cross" aria-hidden="true">{shape}</svg>'


def histogram(title: str, values: torch.Tensor, bins: int = 60, height: int = 140) -> str:
    """Counts of finite values on a logarithmic axis, for speech is peaked at zero and the fault is in the tails."""
    values = values.flatten().double()
    values = values[values.isfinite()]
    if not values.numel():
        return '<p class="quiet">No finite value.</p>'
    low, high = float(values.min()), float(values.max())
    pad = 0.0 if high > low else abs(high) * 0.1 or 1.0
    x = Scale(low - pad, high + pad)
    counts = torch.histc(values, bins, x.low, x.high).tolist()
    return bars(title, counts, x, "value (count is logarithmic)", log=True, height=height)


@dataclass(frozen=True)
class Dot:
    """A row of a dot table: what, its size, words on it, whether it is bad and whether it is the one to look at."""

    name: str
    value: float
    kind: str = ""
    note: str = ""
    bad: bool = False
    first: bool = False


def dot_table(caption: str, heads: tuple[str, str, str], dots: list[Dot], limit: float | None = None) -> str:
    """A table with a logarithmic dot plot in its second column; a Dot named '' is a gap with its note."""
    values = [d.value for d in dots if d.value > 0 and math.isfinite(d.value)]
    scale = Scale.fit(values + ([limit] if limit else []), log=True)
    ticks = scale.ticks(6)
    lines = "".join(
        f'<line class="grid" x1="{p}" x2="{p}" y1="0" y2="100%"/>' for p in map(percent, map(scale.at, ticks))
    )
    axis = "".join(text(percent(scale.at(value)), 28, tick_text(value)) for value in ticks)
    if limit:
        place = percent(scale.at(limit))
        lines += f'<line class="limit" x1="{place}" x2="{place}" y1="0" y2="100%"/>'
        axis += text(place, 11, f"fp16 limit {limit:g}", "bad")
    rows = [_dot_row(dot, scale, lines) for dot in dots]
    name, value, note = map(escape, heads)
    return (
        f'<table class="dots"><caption>{escape(caption)}</caption><thead><tr><th scope="col">{name}</th>'
        f'<th scope="col" class="plot"><svg height="32" role="img"><title>Logarithmic axis: {value}</title>{axis}</svg>'
        f'</th><th scope="col" class="n">{value}</th><th scope="col" class="note">{note}</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _dot_row(dot: Dot, scale: Scale, lines: str) -> str:
    if not dot.name:
        return f'<tr class="gap"><td colspan="4">{escape(dot.note)}</td></tr>'
    at = scale.at(dot.value) if dot.value > 0 else 0.0  # NaN: no finite value, a mark without a place
    mark = f'<line class="stem" x1="0" x2="{percent(at)}" y1="10" y2="10"/>'
    mark += cross(percent(at), 10) if dot.bad else f'<circle class="dot" cx="{percent(at)}" cy="10" r="4"/>'
    kind = f" <small>{escape(dot.kind)}</small>" if dot.kind else ""
    size = "" if math.isnan(dot.value) else number_text(dot.value)
    style = " ".join(name for name, on in (("bad", dot.bad), ("first", dot.first)) if on)
    return (
        f'<tr class="{style}"><th scope="row"><code>{escape(dot.name, 160)}</code>{kind}</th>'
        f'<td class="plot"><svg height="20" aria-hidden="true">{lines}{mark}</svg></td>'
        f'<td class="n">{size}</td><td class="note">{escape(dot.note)}</td></tr>'
    )


def bad_runs(bad: torch.Tensor) -> list[tuple[int, int]]:
    """First and last index of each run of True in a mask."""
    places = bad.nonzero().flatten()
    if not places.numel():
        return []
    ends = (places.diff() > 1).nonzero().flatten()
    first = torch.cat([places[:1], places[ends + 1]])
    last = torch.cat([places[ends], places[-1:]])
    return list(zip(first.tolist(), last.tolist()))


def _pooled(x: torch.Tensor, size: int) -> torch.Tensor:
    """(samples,) -> (columns, size), the last column filled up with the last sample."""
    short = -len(x) % size
    return torch.cat([x, x[-1:].expand(short)]).view(-1, size)


def png(values: torch.Tensor, low: float, high: float) -> str:
    """A picture of (rows, columns) as a data URI, row 0 at the bottom; non-finite values are red, as no data is."""
    import matplotlib
    from matplotlib.image import imsave

    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#e5383b")
    file = io.BytesIO()
    share = (
        (values - low) / (high - low) if high > low else torch.where(values.isfinite(), 0.0, values)
    )  # silence: dark
    rgb = colours(share.numpy(), bytes=True)[..., :3]
    imsave(file, rgb, origin="lower", format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def mel_filters(bands: int, bins: int, sample_rate: int = SAMPLE_RATE) -> torch.Tensor:
    """Triangular filters of equal width on the mel scale: (bands, bins)."""
    top = 2595 * math.log10(1 + sample_rate / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2) / 2595) - 1)[:, None]
    frequency = torch.linspace(0, sample_rate / 2, bins)
    up = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return torch.minimum(up, down).clamp(min=0)


def log_mel(x: torch.Tensor, sample_rate: int = SAMPLE_RATE, bands: int = 48) -> torch.Tensor:
    """Log-mel energies of a waveform in dB below its maximum, for the eye: (bands, frames), NaN if a sample is."""
    hop, width = frame_samples(sample_rate)
    hop, size = max(hop, math.ceil(len(x) / COLUMNS)), 1 << (2 * width - 1).bit_length()
    bad = ~x.isfinite()
    x = x.nan_to_num(0.0, 0.0, 0.0)
    x = x / x.abs().max().clamp(min=1e-30)
    window = torch.hamming_window(width, device=x.device)
    spectrum = torch.stft(x, size, hop, width, window, pad_mode="constant", return_complex=True).abs().square()
    energy = mel_filters(bands, size // 2 + 1, sample_rate) @ spectrum
    result = 10 * energy.clamp(min=1e-12).log10()
    touched = F.max_pool1d(F.pad(bad.float(), (width // 2, width // 2 + hop))[None, None], width, hop)[0, 0] > 0
    result[:, touched[: result.shape[1]].nonzero().flatten()] = math.nan
    return result


def crop_chart(
    title: str,
    x: torch.Tensor,
    sample_rate: int,
    start: float | None,
    speed: float,
    marks: list[tuple[int, str]],
) -> str:
    """Waveform over log-mel of a crop (samples,), bad samples as bands through both.

    ``start`` is the second of the file where the crop begins, if that is known; ``marks`` are (sample, words).
    """
    x, tall, mel_top, mel_tall = x.float(), 110, 118, 100
    seconds = len(x) / sample_rate
    axis = Scale(0.0, seconds)
    clean = x.nan_to_num(0.0, 0.0, 0.0)
    peak = float(clean.abs().max())
    blocks = _pooled(clean / (peak or 1.0), math.ceil(len(x) / COLUMNS))
    places = torch.linspace(0, 1000, len(blocks)).tolist()
    middle, reach = tall / 2, tall / 2 - 3
    upper = [f"{a:.1f} {middle - reach * b:.1f}" for a, b in zip(places, blocks.amax(1).tolist())]
    lower = [f"{a:.1f} {middle - reach * b:.1f}" for a, b in zip(places, blocks.amin(1).tolist())]
    shape = f'<path class="wave" d="M{" ".join(upper)} {" ".join(reversed(lower))}Z"/>'
    parts = [f'<line class="base" x1="0" x2="100%" y1="{middle:g}" y2="{middle:g}"/>', stretched(0, tall, shape)]
    parts += [
        text(-8, middle - reach + 8, tick_text(float(f"{peak:.2g}")), anchor="end"),
        text(-8, middle + 4, "0", anchor="end"),
    ]
    mel = log_mel(x, sample_rate)
    finite = mel[mel.isfinite()]
    high = float(finite.max()) if finite.numel() else 0.0
    image = png(mel, high - 70, high)
    parts.append(
        f'<image x="0" y="{mel_top}" width="100%" height="{mel_tall}" preserveAspectRatio="none" href="{image}"/>'
    )
    for hertz in (hertz for hertz in (1000, 2000, 4000, 8000, 16000) if hertz <= sample_rate / 2):
        place = mel_top + mel_tall * (1 - math.log10(1 + hertz / 700) / math.log10(1 + sample_rate / 2 / 700))
        parts.append(text(-8, place + 4, f"{hertz / 1000:g} kHz", anchor="end"))
    parts += _bands(x, marks, mel_top + mel_tall)
    foot = mel_top + mel_tall
    parts += [text(percent(axis.at(t)), foot + 16, tick_text(t)) for t in axis.ticks(6)]
    parts.append(text("50%", foot + 32, "seconds of the crop"))
    if start is not None:
        inside = Scale(start, start + seconds * speed)
        parts += [text(percent(inside.at(t)), foot + 50, tick_text(t)) for t in inside.ticks(6)]
        parts.append(text("50%", foot + 66, "seconds of the file"))
    return svg(title, foot + (72 if start is not None else 38), parts)


def _bands(x: torch.Tensor, marks, height: float) -> list[str]:
    """Bands over the bad samples of a crop, at the resolution of the screen, and lines at marked samples."""
    size = math.ceil(len(x) / COLUMNS)
    parts = []
    for first, last in bad_runs(_pooled(~x.isfinite(), size).any(1)):
        left, right = 100 * first * size / len(x), min(100 * (last + 1) * size / len(x), 100)
        where = f'x="{percent(left)}" y="0" width="{percent(right - left)}" height="{height:g}"'
        parts.append(f'<rect class="band" {where}/>')
    for sample, words in marks:
        place = 100 * (sample + 0.5) / len(x)
        parts.append(f'<line class="mark" x1="{percent(place)}" x2="{percent(place)}" y1="-4" y2="{height:g}"/>')
        parts.append(text(percent(place), -8, words, "bad", "end" if place > 60 else "start"))
    return parts


def feature_chart(title: str, features: torch.Tensor) -> str:
    """Features (frames, bands) of an old dump as a picture, non-finite values red."""
    features = features.float()
    finite = features[features.isfinite()]
    low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
    shown = features[:2000, :512].T
    image = png(shown, low, high)
    tall = 130
    x = Scale(0, max(shown.shape[1], 1))
    parts = [f'<image x="0" y="0" width="100%" height="{tall}" preserveAspectRatio="none" href="{image}"/>']
    parts += [text(percent(x.at(t)), tall + 16, tick_text(t)) for t in x.ticks(5)]
    parts += [text("50%", tall + 32, "second dimension (frames)"), text(-8, 12, str(shown.shape[0]), anchor="end")]
    return svg(title, tall + 40, parts + [text(-8, tall, "0", anchor="end")])
