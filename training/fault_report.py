"""The report of a fault on the terminal, in the words of the NaN debugging guide."""

import math

import torch

from corpus.crop import Crop
from errors import plural
from settings.command_line import picture
from storage.dump_statistics import odd_rows
from training.faults import Fault

BANNERS = {
    "loss_nonfinite": "NaN/Inf LOSS",
    "grad_nonfinite": "NaN/Inf GRADIENT",
    "grad_norm_overflow": "GRADIENT NORM OVERFLOW",
    "scale_collapse": "LOSS SCALE COLLAPSE",
    "batch_nonfinite": "NaN/Inf DATA",
    "label_out_of_range": "LABEL OUT OF RANGE",
    "state_nonfinite": "NaN/Inf STATE",
    "data_error": "UNUSABLE FILE",
}
ALARM = "\U0001f6a8"


def report(dump: dict, fault: Fault, classes: int | None) -> list[str]:
    """The report on the terminal, in the words of the NaN debugging guide; ``classes`` if they are known."""
    data = dump["data"].float()
    finite = data[data.isfinite()]
    shape = torch.Size([len(data), *dump["row_shape"]]) if "row_shape" in dump else data.shape
    lines = [
        "=" * 80,
        f"{picture(ALARM)}{BANNERS[fault.reason]} DETECTED AT BATCH {dump['batch_idx']}",
        "=" * 80,
        f"Reason: {fault.reason}: {fault.what}",
        *(["rehearsal: this fault was injected by nan_inject"] if fault.injected else []),
        f"Loss value: {dump['loss']}",
        *([] if math.isnan(dump["prec1"]) else [f"Precision: {dump['prec1']}"]),
        f"Epoch {dump['epoch']}, computed in {dump['amp_dtype']}, scale {dump['scaler_scale']:g}, lr {dump['lr']:g}",
        "",
        "--- DATA STATISTICS ---",
        f"Data shape: {shape}",
    ]
    if finite.numel():
        lines.append(f"Data min: {finite.min():.6f}, max: {finite.max():.6f}, mean: {finite.mean():.6f}")
    lines += [
        f"Data NaN: {int(data.isnan().sum())}, Inf: {int(data.isinf().sum())}",
        "",
        "--- LABEL STATISTICS ---",
        *label_lines(dump["label"], classes),
        "",
        "--- GRADIENT STATISTICS ---",
        *gradient_lines(dump["grad_stats"]),
        "",
    ]
    if "build" not in dump:
        return [*lines, "--- ROWS AND FILES ---", *row_lines(dump, fault), ""]
    wrong = (~data.isfinite()).any(dim=1).nonzero().flatten().tolist()
    return [*lines, f"Rows with NaN or Inf: {wrong[:10]} of {len(data)}", ""] if wrong else lines


def label_lines(label, classes: int | None) -> list[str]:
    """How many labels there are, their range and the most frequent; of targets of another kind the shape."""
    if label.ndim != 1 or label.is_floating_point():
        return [f"Label shape: {tuple(label.shape)}, {str(label.dtype).removeprefix('torch.')}"]
    values, counts = label.unique(return_counts=True)
    common = ", ".join(f"{v}: {c}" for v, c in list(zip(values.tolist(), counts.tolist()))[:10])
    common += ", ..." if len(values) > 10 else ""
    spread = f"range {int(values.min())} to {int(values.max())}"
    known = f", {classes} classes" if classes else ""
    return [f"Unique labels: {len(values)} of {len(label)}, {spread}{known}", f"Label distribution: {common}"]


def gradient_lines(stats: dict) -> list[str]:
    """Which parameters have NaN or Inf gradients, and how many."""
    if not stats:
        return ["No gradients: the batch was refused before the forward pass"]
    bad = {name: s for name, s in stats.items() if s["nan"] or s["inf"]}
    if not bad:
        return [f"All gradients of {len(stats)} parameters are finite"]
    lines = [f"{len(bad)} of {len(stats)} parameters have NaN/Inf gradients:"]
    lines += [f"  {name}: NaN {s['nan']}, Inf {s['inf']} of {s['numel']}" for name, s in list(bad.items())[:10]]
    return lines + ([f"  ... and {len(bad) - 10} more"] if len(bad) > 10 else [])


def row_lines(dump: dict, fault: Fault) -> list[str]:
    """The rows at fault, or those that look odd, with their files; some files of the batch if no row stands out."""
    flat = dump["data"].flatten(0, 1)
    odd = {} if fault.rows else odd_rows(flat)
    rows, lines = fault.rows or list(odd) or range(len(dump["files"])), []
    if not fault.rows:
        lines.append("Rows that stand out:" if odd else "No row stands out before the model; the batch:")
    shown = list(rows)[: 10 if fault.rows or odd else 5]
    for row in shown:
        crop = Crop.from_dict(dump["files"][row])
        text = f"  row {row}: {crop.path} ({crop.place}), from sample {crop.start}"
        text += f"; {odd[row]}" if row in odd else ""
        if flat.shape[1]:
            wrong = (~flat[row].isfinite()).nonzero().flatten()
            text += f"; {len(wrong)} non-finite, the first at sample {int(wrong[0])}" if len(wrong) else ""
        if fault.reason == "label_out_of_range":
            text += f"; label {int(dump['label'][row % len(dump['label'])])}"
        for draw in crop.augment:
            text += f"; {draw['kind']} {draw.get('path', '')}".rstrip()
        lines.append(text)
    rest = len(list(rows)) - len(shown)
    return lines + ([f"  ... and {plural(rest, 'more row')}"] if rest > 0 else [])
