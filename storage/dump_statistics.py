"""Statistics of a dump, without running anything: the sections of the NaN debugging guide, as text."""

import math

import torch

from corpus.crop import Crop
from corpus.quality import oddity
from storage.checkpoint import nonfinite_tensors
from storage.dump import BEFORE_THE_STEP, rows_of

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
MANY = 1 << 24  # torch.quantile takes no more elements
SETTINGS = ("lr", "weight_decay", "momentum", "eps")  # of an optimizer: one that is not finite spoils every weight
BLOCKS = " .:-=+*#"


def basic_lines(dump: dict, path) -> list[str]:
    """Basic information: batch, epoch, loss, precision, device, learning rate."""
    lines = [f"File: {path}", f"Batch index: {dump['batch_idx']}", f"Epoch: {dump['epoch']}"]
    if dump.get("format_version"):
        lines += [
            f"Reason: {dump['reason']}, step {dump['step']}, rank {dump['rank']} of {dump.get('world', 1)}",
            f"Computed in {dump['amp_dtype']} on {dump['device']}, loss scale {dump['scaler_scale']:g}",
            f"Learning rate: {dump['lr']:g}",
            *([f"Gradient norm: {dump['grad_norm']:.6g}"] if dump["grad_stats"] else []),
            *([f"Built by: {dump['build']}"] if "build" in dump else []),
        ]
    else:
        lines.append("An old dump: batch, labels and loss only")
    if dump.get("reason") in BEFORE_THE_STEP:
        return [*lines, "Loss value, precision: not computed when the dump was made"]
    accuracy = [] if math.isnan(dump["prec1"]) else [f"Precision (training accuracy in %): {dump['prec1']}"]
    return [*lines, f"Loss value: {dump['loss']}", *accuracy]


def data_lines(dump: dict) -> list[str]:
    """Data tensor analysis: shape, statistics, extremes, percentiles, where NaN and Inf are."""
    data = dump["data"]
    shape = (len(data), *dump["row_shape"]) if "row_shape" in dump else tuple(data.shape)
    lines = [f"Shape: {shape}, dtype {str(data.dtype).removeprefix('torch.')}"]
    if not data.numel():
        why = "an empty batch" if "build" in dump else "nan_dump_audio: false, or an empty batch"
        return [*lines, f"No samples in the dump ({why})"]
    values = data.flatten()
    finite = values[values.isfinite()].double()
    lines.append(f"NaN: {int(values.isnan().sum())}, Inf: {int(values.isinf().sum())} of {values.numel()} values")
    lines += place_lines(dump)
    if not finite.numel():
        return [*lines, "No finite value to take statistics of"]
    figures = {"min": finite.min(), "max": finite.max(), "mean": finite.mean(), "std": finite.std(correction=0)}
    lines.append(", ".join(f"{name} {float(value):.6g}" for name, value in figures.items()).capitalize())
    count = min(10, finite.numel())
    largest, smallest = finite.topk(count).values, finite.topk(count, largest=False).values
    lines.append("Ten largest values:  " + ", ".join(f"{v:.4g}" for v in largest.tolist()))
    lines.append("Ten smallest values: " + ", ".join(f"{v:.4g}" for v in smallest.tolist()))
    lines.append("Percentiles: " + ", ".join(f"{p} %: {v:.4g}" for p, v in zip(PERCENTILES, percentiles(finite))))
    return lines


def percentiles(values) -> list[float]:
    """Percentiles 1/5/25/50/75/95/99 of finite values; of an even sample if there are more than 16 million."""
    values = values[:: -(-values.numel() // MANY)]
    return torch.quantile(values, torch.tensor([p / 100 for p in PERCENTILES], dtype=values.dtype)).tolist()


def place_lines(dump: dict, most: int = 10) -> list[str]:
    """Where NaN and Inf are: row, sample, file, seconds into the file."""
    data = dump["data"]
    files = dump.get("files", [])
    if data.ndim == 0:
        return []
    flat = rows_of(data, dump["label"].numel())
    rows = (~flat.isfinite()).any(dim=1).nonzero().flatten().tolist()
    lines = []
    for row in rows[:most]:
        wrong = (~flat[row].isfinite()).nonzero().flatten()
        first = int(wrong[0])
        unit = "value" if "build" in dump else "sample"
        text = f"  row {row}: {len(wrong)} of {flat.shape[1]}, the first at {unit} {first}"
        if row < len(files):
            crop = Crop.from_dict(files[row])
            text += f", {crop.second_in_file(first):.3f} s into {crop.path}"
        lines.append(text)
    return lines + ([f"  ... and {len(rows) - most} more rows"] if len(rows) > most else [])


def label_lines(dump: dict, classes: int | None) -> list[str]:
    """Label analysis: unique labels, distribution, range, what is out of range."""
    label = dump["label"].flatten()
    if not label.numel():
        return ["No labels"]
    if "build" in dump and (dump["label"].ndim != 1 or label.is_floating_point()):
        kind = str(label.dtype).removeprefix("torch.")
        return [f"Shape: {tuple(dump['label'].shape)}, dtype {kind}, {label.min():.6g} to {label.max():.6g}"]
    values, counts = label.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:10]
    most = ", ".join(f"{int(values[i])}: {int(counts[i])}" for i in order)
    lines = [
        f"Shape: {tuple(dump['label'].shape)}",
        f"Unique labels: {len(values)}, range {int(values[0])} to {int(values[-1])}",
        f"Distribution: {most}" + (", ..." if len(values) > 10 else ""),
    ]
    if classes:
        wrong = wrong_labels(label, classes)
        lines.append(f"Classes: {classes}; out of range: {len(wrong)}" + (f" (rows {wrong[:10]})" if wrong else ""))
    return lines


def wrong_labels(label, classes: int | None) -> list[int]:
    """Rows whose label is below 0 or not below the number of classes."""
    wrong = label < 0
    if classes:
        wrong = wrong | (label >= classes)
    return wrong.nonzero().flatten().tolist()


def gradient_lines(dump: dict, most: int = 10) -> list[str]:
    """Gradients and parameters: non-finite ones first, then the largest."""
    lines = []
    for title, key in (("gradients", "grad_stats"), ("parameters", "param_stats")):
        stats = dump.get(key) or {}
        bad = [name for name, s in stats.items() if s["nan"] or s["inf"]]
        lines.append(f"{len(stats)} {title}, {len(bad)} with NaN or Inf" if stats else f"No {title} recorded")
        largest = sorted((n for n in stats if n not in bad), key=lambda n: -stats[n]["norm"])
        for name in [*bad[:most], *largest[: max(0, 5 if bad else most)]]:
            s = stats[name]
            what = f"NaN {s['nan']}, Inf {s['inf']} of {s['numel']}, " if name in bad else ""
            lines.append(f"  {name}: {what}norm {s['norm']:.4g}, largest {s['abs_max']:.4g}")
        if len(bad) > most:
            lines.append(f"  ... and {len(bad) - most} more with NaN or Inf")
    return lines


def history_lines(dump: dict, width: int = 60) -> list[str]:
    """The steps before it as a small chart of loss and gradient norm."""
    history = dump.get("history") or []
    if not history:
        return ["No step was taken before this one in this process"]
    lines = []
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm"), ("lr", "lr"), ("scale", "loss scale")):
        values = [float(h[key]) for h in history if isinstance(h.get(key), (int, float))][-width:]
        finite = [v for v in values if math.isfinite(v)]
        if not finite or (len(set(finite)) == 1 and len(finite) == len(values) and key in ("lr", "scale")):
            continue
        steps = f"{len(values)} step{'s' if len(values) > 1 else ''}"
        lines.append(f"{name:>13}: [{chart(values)}] {values[0]:.4g} to {values[-1]:.4g} in {steps}")
    return lines


def chart(values: list[float]) -> str:
    """One character a value; logarithmic if the range passes a factor of 100; '!' is not finite."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return "!" * len(values)
    positive = min(finite) > 0 and max(finite) / min(finite) > 100
    height = [math.log(v) if positive and math.isfinite(v) else v for v in values]
    used = [h for h in height if math.isfinite(h)]
    low, span = min(used), (max(used) - min(used)) or 1.0
    return "".join(BLOCKS[int((h - low) / span * (len(BLOCKS) - 1))] if math.isfinite(h) else "!" for h in height)


def odd_rows(rows: torch.Tensor) -> dict[int, str]:
    """What stands out in those of the waveforms (rows, samples) that are finite."""
    finite = rows.isfinite().all(dim=1).nonzero().flatten().tolist()
    return {row: text for row in finite if (text := oddity(rows[row].float().numpy()))}


def row_issues(rows: torch.Tensor, waveforms: bool) -> list[str]:
    """A line on the rows (rows, values) that stand out; of ``waveforms`` more can be told."""
    if not waveforms:
        silent = (rows.abs().amax(dim=1) == 0).nonzero().flatten().tolist()
        return [f"Rows of zeros: {silent[:10]}"] if silent else []
    odd = [f"{row} ({text})" for row, text in odd_rows(rows).items()]
    return [f"Rows that stand out: {', '.join(odd[:10])}{', ...' if len(odd) > 10 else ''}"] if odd else []


def issues(dump: dict, classes: int | None, state: dict | None) -> list[str]:
    """Potential issues that the numbers alone show."""
    data = dump["data"]
    found = []
    if data.numel():
        nan, inf = int(data.isnan().sum()), int(data.isinf().sum())
        found += [f"Input data contains {nan} NaN values"] if nan else []
        found += [f"Input data contains {inf} Inf values"] if inf else []
        finite = data[data.isfinite()]
        peak = float(finite.abs().max()) if finite.numel() else 0.0
        if peak > 100:
            found.append(f"Very large values detected (max: {peak:.2e})")
        if data.ndim > 1:
            found += row_issues(rows_of(data), waveforms=bool(dump.get("format_version")) and "build" not in dump)
    wrong = [] if "build" in dump else wrong_labels(dump["label"].flatten(), classes)
    if wrong:
        worst = dump["label"].flatten()[wrong]
        above = int(worst.max()) >= (classes or math.inf)
        text = f"max label {int(worst.max())} >= {classes}" if above else f"label {int(worst.min())} < 0"
        found.append(f"Label out of range: {text}")
    for title, key in (("Gradients", "grad_stats"), ("Parameters", "param_stats")):
        bad = [name for name, s in (dump.get(key) or {}).items() if s["nan"] or s["inf"]]
        found += [f"{title} with NaN or Inf: {', '.join(bad[:3])}{', ...' if len(bad) > 3 else ''}"] if bad else []
    if state is not None:
        names = bad_state(state)
        found += [f"State that was bad before the step: {', '.join(names[:5])}"] if names else []
    failed = dump.get("reason", "loss_nonfinite") == "loss_nonfinite"
    if not found and failed and not math.isfinite(float(dump["loss"])):
        found.append("Input looks normal but NaN in loss: model or loss instability")
    return found


def number(values: dict, key: str, default: float = 0.0) -> float:
    """A number of a configuration or parameter group; the default if there is none under that name."""
    value = values.get(key, default)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def bad_state(state: dict) -> list[str]:
    """Names of weights, buffers and optimizer entries that are not finite."""
    tensors = dict(state["model_state_dict"])
    for index, entries in state.get("optimizer_state_dict", {}).get("state", {}).items():
        tensors.update({f"optimizer.{index}.{k}": v for k, v in entries.items() if isinstance(v, torch.Tensor)})
    return nonfinite_tensors(tensors)
