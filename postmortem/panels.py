"""The panels of a NaN dump's page that show data: rows at fault, activations, gradients, history and statistics."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from corpus.audio import SAMPLE_RATE
from postmortem.charts import (
    Dot,
    bad_runs,
    crop_chart,
    dot_table,
    feature_chart,
    histogram,
    line_chart,
    number,
    number_text,
)
from storage.dump_statistics import PERCENTILES, percentiles
from web.charts import escape
from web.report import section, terms

PICTURES = 4  # rows of a batch that are drawn
FP16_MAX = torch.finfo(torch.float16).max
MODULES, PARAMETERS = 40, 20  # shown; the rest is folded
MAX_NUMBERS = 1 << 28  # of a batch; a view without storage may claim any size
FOLDED = 400  # rows of a folded table
STEPS = 1000  # of the history
CURVES = (("Loss", "loss"), ("Gradient norm", "grad_norm"), ("Learning rate", "lr"), ("Loss scale", "scale"))
DRAWN = (  # of an augmentation draw
    *(("snr_db", "SNR", " dB"), ("start", "from sample", ""), ("gain", "gain", ""), ("gain_db", "", " dB")),
    *(
        ("limit", "limit", ""),
        ("low", "from", " Hz"),
        ("high", "to", " Hz"),
        ("rate", "at", " Hz"),
        ("kbps", "", " kbit/s"),
        ("bit_rate", "", " bit/s"),
        ("percent", "", " %"),
    ),
)


def as_dict(value) -> dict:
    """The value if it is a dict, else an empty one: what a dump or a verdict leaves out."""
    return value if isinstance(value, dict) else {}


def as_list(value) -> list:
    """The value as a list, an empty one if it is no sequence."""
    return list(value) if isinstance(value, (list, tuple)) else []


def _quiet(words: str) -> str:
    return f'<p class="quiet">{words}</p>' if words else ""


def _tensor(value) -> torch.Tensor | None:
    """A tensor of at least one number as float or int, or None of what no picture can be drawn of."""
    if not isinstance(value, torch.Tensor) or not 0 < value.numel() <= MAX_NUMBERS:
        return None
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return None
    return value.detach().abs() if value.is_complex() else value.detach()


def _guilty(verdict, data: torch.Tensor) -> list[int]:
    """Rows the verdict names, else those with non-finite values."""
    rows = as_list(as_dict(verdict.get("location")).get("rows"))
    named = [row for row in rows if isinstance(row, int) and 0 <= row < len(data)]
    return named or (~data.float().isfinite()).flatten(1).any(1).nonzero().flatten().tolist()


def rows_at_fault(dump, verdict) -> str:
    """Pictures of the rows at fault, or of the first row."""
    data = _tensor(dump.get("data"))
    if "build" in dump:  # rows of another loop are no waveforms
        return ""
    if data is None:
        return section("Audio", _quiet("The dump holds no audio (nan_dump_audio), or none that can be drawn."))
    if not data.dim():
        return ""
    if "format_version" not in dump and data.shape[-1] < SAMPLE_RATE // 4:
        return _features(data, verdict)  # too short for a crop: the old trainer could dump features
    data = data.reshape(-1, data.shape[-1])  # (M, B, samples) -> (rows, samples), the order of the dump's files
    guilty = _guilty(verdict, data)
    chosen = guilty[:PICTURES] or [0]
    rest = len(guilty) - len(chosen)
    title = ("Rows at fault" if len(guilty) > 1 else "Row at fault") if guilty else "First row of the batch"
    note = "No row is known to be at fault." if not guilty else f"{rest} more are not drawn." if rest > 0 else ""
    return section(title, _quiet(note) + "".join(_crop(dump, verdict, data[row], row) for row in chosen))


def _features(data: torch.Tensor, verdict) -> str:
    features = data.reshape(-1, *data.shape[-2:]) if data.dim() > 1 else data[None, None]
    row = (_guilty(verdict, features) or [0])[0]
    words = f"Row {row} of {len(features)}; red is NaN or Inf."
    return section("Features", _quiet(words) + feature_chart(f"Features of row {row}", features[row]))


@dataclass(frozen=True)
class Origin:
    """Where in its file a crop lies: first sample at the file's rate, that rate, the speed of reading, its own rate."""

    first: float
    rate: float
    speed: float
    sample_rate: float = SAMPLE_RATE

    @classmethod
    def of(cls, info: dict) -> "Origin":
        """Read it from a row's provenance; ``first`` is NaN if that is unknown."""
        first, rate, speed, own = (number(info.get(key)) for key in ("start", "rate", "speed", "sample_rate"))
        pairs = (rate, SAMPLE_RATE), (speed, 1.0), (own, SAMPLE_RATE)
        usable = [value if 0 < value < math.inf else usual for value, usual in pairs]
        return cls(first if math.isfinite(first) else math.nan, *map(float, usable))

    @property
    def start(self) -> float | None:
        """Second of the file where the crop begins."""
        return None if math.isnan(self.first) else self.first / self.rate

    def file_sample(self, sample: int) -> int:
        """Sample of the file, at its own rate, that a sample of the crop comes from."""
        return round(self.first + sample / self.sample_rate * self.speed * self.rate)

    def crop_sample(self, sample: float) -> float:
        """The inverse; NaN if the origin is unknown."""
        return (sample - self.first) / self.rate / self.speed * self.sample_rate


def _crop(dump, verdict, x: torch.Tensor, row: int) -> str:
    """One row: waveform, log-mel, and what is known of it beside them."""
    files, label = as_list(dump.get("files")), _tensor(dump.get("label"))
    info = as_dict(files[row]) if row < len(files) else {}
    origin = Origin.of(info)
    runs = bad_runs(~x.float().isfinite())
    marks = [(runs[0][0], _bad_words(x, *runs[0]))] if runs else _named_samples(verdict, info, origin, len(x))
    shown = [("Label", "" if label is None else number_text(label.flatten()[row % label.numel()]))]
    shown += [("List", escape(info.get("list_path", ""))), ("List line", escape(info.get("line", "")))]
    resampled = f", the crop {number_text(origin.sample_rate)}" if "sample_rate" in info else ""
    shown.append(("Sample rate", escape(f"{info.get('rate', '')}{resampled}")))
    if origin.start is not None:
        shown.append(("Crop begins", f"file sample {number_text(origin.first)}, {origin.start:.3f} s"))
    shown.append(("Speed", number_text(origin.speed) if origin.speed != 1 else ""))
    shown += [(term, number_text(info[key])) for term, key in (("Peak", "peak"), ("RMS", "rms")) if key in info]
    draws = [_draw(as_dict(draw)) for draw in as_list(info.get("augment"))[:8]]
    shown.append(("Augmented", "<br>".join(draws) or ("no" if "augment" in info else "")))
    shown.append(("Bad samples", _bad_list(x, runs, origin)))
    title, rate = f"Waveform and log-mel of row {row}", int(origin.sample_rate)
    chart = crop_chart(title, x, rate, origin.start, origin.speed, marks)
    path = f'<p class="path"><code>{escape(info["path"])}</code></p>' if "path" in info else ""
    return f'<div class="crop"><h4>Row {row}</h4>{path}<figure>{chart}</figure>{terms(shown, "place")}</div>'


def _named_samples(verdict, info, origin: Origin, samples: int) -> list[tuple[int, str]]:
    """Samples of this row's file that the verdict names and the crop holds, to mark a finite but absurd value."""
    marks = []
    for named in map(as_dict, as_list(as_dict(verdict.get("location")).get("files"))):
        place = origin.crop_sample(number(named.get("sample")))
        if named.get("path") == info.get("path") and 0 <= place < samples:
            marks.append((round(place), f"file sample {named['sample']}"))
    return marks[:5]


def _bad_words(x: torch.Tensor, first: int, last: int) -> str:
    kind = "NaN" if bool(x[first].isnan()) else "Inf"
    return f"{kind} at sample {first}" if first == last else f"{kind}, samples {first} to {last}"


def _bad_list(x: torch.Tensor, runs, origin: Origin) -> str:
    """The first runs of bad samples: place in the crop and in the file."""
    lines = []
    for first, last in runs[:5]:
        place = f"{_bad_words(x, first, last)}, {first / origin.sample_rate:.4f} s"
        if origin.start is not None:
            sample = origin.file_sample(first)
            place += f" (file: sample {sample}, {sample / origin.rate:.4f} s)"
        lines.append(place)
    return "<br>".join(lines + ([f"and {len(runs) - 5} more runs"] if len(runs) > 5 else []))


def _draw(draw: dict) -> str:
    """An augmentation draw in words."""
    words = [f"{name} {number_text(draw[key])}{unit}" for key, name, unit in DRAWN if key in draw]
    words += [escape(draw["reason"])] if draw.get("reason") else []
    file = f" <code>{escape(draw['path'])}</code>" if "path" in draw else ""
    return f"{escape(draw.get('kind'))}{file} {', '.join(words)}"


def _fold(dots: list[Dot], keep: set[int], caption: str, heads, limit=None) -> str:
    """A dot table of the kept rows in their order, gaps said in words, and all rows folded below."""
    keep = keep | {i for i in range(1, len(dots) - 1) if i - 1 in keep and i + 1 in keep}  # no gap of a single row
    shown, last = [], -1
    for i in [*sorted(keep), len(dots)]:
        shown += [Dot("", math.nan, note=f"{i - last - 1} more")] if i - last > 1 else []
        shown += dots[i : i + 1]
        last = i
    table = dot_table(caption, heads, shown, limit)
    if len(keep) == len(dots):
        return table
    rows = "".join(
        f'<tr><th scope="row"><code>{escape(dot.name, 160)}</code></th>'
        f'<td class="n">{number_text(dot.value)}</td><td>{escape(dot.note)}</td></tr>'
        for dot in dots[:FOLDED]
    )
    cut = f", the first {FOLDED}" if len(dots) > FOLDED else ""
    head = "".join(f'<th scope="col">{words}</th>' for words in heads)
    whole = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f"{table}<details><summary>All {len(dots)} as numbers{cut}</summary>{whole}</details>"


def activations(entries) -> str:
    """Largest |activation| of each module, in the order of execution."""
    dots = []
    for entry in map(as_dict, as_list(entries)):
        bad, first = number(entry.get("nonfinite")) > 0, bool(entry.get("first"))
        note = (f"{number_text(entry['nonfinite'])} NaN/Inf" if bad else "") + ", the first" * first
        name, kind = str(entry.get("name") or "(whole)"), str(entry.get("kind") or "")
        dots.append(Dot(name, number(entry.get("abs_max")), kind, note.removeprefix(", "), bad or first, first))
    if not dots:
        return ""
    first_bad = next((i for i, dot in enumerate(dots) if dot.first), None)
    # The way to the first bad module tells most, then the largest values wherever they are.
    near = [] if first_bad is None else list(range(max(0, first_bad - 12), min(len(dots), first_bad + 4)))
    large = sorted(range(len(dots)), key=lambda i: -dots[i].value if math.isfinite(dots[i].value) else 0.0)
    keep = set([*dict.fromkeys(near + large)][:MODULES])
    caption = "Largest finite |output| of each module in the order of execution. A cross: it holds NaN or Inf."
    heads = ("Module", "largest", "not finite")
    return section("Activations through the network", _fold(dots, keep, caption, heads, FP16_MAX))


def gradients(dump) -> str:
    """Gradient norms: the non-finite ones in the order of the model, then the largest."""
    bad, good = [], []
    for name, entry in as_dict(dump.get("grad_stats")).items():
        entry = as_dict(entry)
        nan, inf, size, norm = (number(entry.get(key)) for key in ("nan", "inf", "numel", "norm"))
        if nan > 0 or inf > 0:
            note = "all" if nan + inf == size else f"{number_text(nan + inf)} of {number_text(size)}"
            kinds = " and ".join(kind for kind, count in (("NaN", nan), ("Inf", inf)) if count > 0)
            bad.append(Dot(str(name), math.nan if note == "all" else norm, "", f"{note} {kinds}", True))
        else:
            good.append(Dot(str(name), norm))
    if not bad and not good:
        none = _quiet("None: the batch was refused before the forward pass.")
        return section("Gradients", none if "grad_stats" in dump else "")
    good.sort(key=lambda dot: -dot.value if math.isfinite(dot.value) else 0.0)
    keep = {*range(len(bad))[:PARAMETERS], *range(len(bad), len(bad) + len(good))[:PARAMETERS]}
    total = len(bad) + len(good)
    caption = f"All gradients of {total} parameters are finite."
    if bad:
        caption = f"{len(bad)} of {total} parameters have NaN or Inf in their gradient (norm of what is finite)"
        caption += ", then the largest." if good else "."
    return section("Gradients", _fold(bad + good, keep, caption, ("Parameter", "norm", "not finite")))


def history(dump) -> str:
    """Loss, gradient norm, learning rate and loss scale of the last steps."""
    steps = [as_dict(entry) for entry in as_list(dump.get("history"))[-STEPS:]]
    here = number(dump.get("step"))
    figures = []
    for title, key in CURVES:
        points = [(number(entry.get("step")), number(entry[key])) for entry in steps if key in entry]
        points = [point for point in points if math.isfinite(point[0])]
        if points:
            chart = line_chart(f"{title}, last {len(points)} steps", points, here if math.isfinite(here) else None)
            figures.append(f"<figure><figcaption>{title}</figcaption>{chart}</figure>")
    note = _quiet("Up to this step; a cross is NaN or Inf.")
    return section("The last steps", f'{note}<div class="two">{"".join(figures)}</div>' if figures else "")


def data_of_batch(dump) -> str:
    """Histogram and statistics of the batch, and its labels."""
    data, label = _tensor(dump.get("data")), _tensor(dump.get("label"))
    left = right = ""
    if data is not None:
        chart = histogram("Histogram of the values of the batch", data)
        left = f"<figure><figcaption>Values</figcaption>{chart}</figure>"
        right = _statistics(data)
    if label is not None:
        values, counts = label.flatten().double().unique(return_counts=True)
        values = list(map(number_text, values))
        classes = as_dict(dump.get("config")).get("nClasses")
        words = f"{len(values)} different of {label.numel()}, from {values[0]} to {values[-1]}"
        words += f"; nClasses is {escape(classes)}." if classes else "."
        short = _pairs(zip(values, map(str, counts.tolist()))) if len(values) <= 16 else ""
        left += f"<h4>Labels</h4><p>{words}</p>" + (f"<p>Rows of each: {short}</p>" if short else "")
    body = f'<div class="two"><div>{left}</div><div>{right}</div></div>'
    return section("Data of the batch", body if left else "")


def _pairs(pairs) -> str:
    return "".join(f'<span class="pair"><small>{name}:</small> {value}</span> ' for name, value in pairs)


def _statistics(data: torch.Tensor) -> str:
    """Shape, counts, moments, percentiles and extremes as a table."""
    values = data.float().flatten()
    finite = np.sort(values[values.isfinite()].numpy())
    shape = " x ".join(map(str, data.shape)) or "a single number"
    counts = f"{int(values.isnan().sum())} NaN, {int(values.isinf().sum())} Inf of {values.numel()}"
    rows = [("Shape", shape), ("Type", escape(str(data.dtype).removeprefix("torch."))), ("Not finite", counts)]
    if finite.size:
        mean, deviation = finite.mean(dtype=float), finite.std(dtype=float)
        shares = zip(PERCENTILES, percentiles(torch.from_numpy(finite)))
        at = [(f"{p} %", number_text(value)) for p, value in shares]
        rows += [("Mean", number_text(float(mean))), ("Deviation", number_text(float(deviation)))]
        rows.append(("Percentiles", _pairs(at)))
        rows.append(("Ten largest", ", ".join(number_text(float(v)) for v in finite[:-11:-1])))
        rows.append(("Ten smallest", ", ".join(number_text(float(v)) for v in finite[:10])))
    body = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    heads = '<tr><th scope="col">Statistic</th><th scope="col">Value</th></tr>'
    return f'<table class="stats"><thead>{heads}</thead><tbody>{body}</tbody></table>'
