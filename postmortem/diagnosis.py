"""Name the cause of a fault: hypotheses, in the order of how near they are to where the value came from.

Each hypothesis says what must hold if it is true and tries it; the first that survives is the diagnosis.
"""

import math
from pathlib import Path

import numpy as np
import torch

from postmortem.finding import Finding, detail_of
from postmortem.patches import Casts
from postmortem.probe import is_front_end
from postmortem.provenance import ABSURD, first_bad_sample, origin_of, same_as_files
from postmortem.state_faults import (
    bad_scaler,
    bad_state_before_step,
    diverged,
    impossible_statistic,
    outlier,
    spoiled_update,
)
from storage.dump import rows_of

SILENT = 1e-6  # peak of a row that holds nothing


def diagnose(case) -> Finding:
    """The first hypothesis that survives, else 'unknown'."""
    for hypothesis in HYPOTHESES:
        finding = hypothesis(case)
        if finding is not None:
            finding.rank = case.dump.get("rank")
            if case.replay is not None and case.replay.emulated:
                finding.evidence.append("the dump is of a GPU: its casts were emulated on the CPU")
            return finding
    text = "Cause not found: no hypothesis survives, the statistics are all there is to go by."
    if case.refusal:
        text = "Cause not found: the step could not be run again, the statistics are all there is to go by."
    return Finding("unknown", "unknown", text, [case.refusal] if case.refusal else [])


# ------------------------------------------------------------------------------------------- what was given to it


def unusable_file(case):
    """A file that could not be used gave way to another; the step was taken."""
    if case.dump.get("reason") != "data_error":
        return None
    for cause, key in (("input", "replaced"), ("augmentation", "augment")):
        entries = [
            (row, entry)
            for row, info in enumerate(case.files)
            for entry in info.get(key, [])
            if isinstance(entry, dict) and entry.get("reason", "silent") != "silent" and "path" in entry
        ]
        if entries:
            first = entries[0][1]
            place = f" (list line {first['line']})" if "line" in first else ""
            unique = {entry["path"]: entry for _, entry in entries}
            more = f", and {len(unique) - 1} more" if len(unique) > 1 else ""
            text = f"{first['path']}{place} cannot be used: {first['reason']}{more}."
            files = [{"path": path, "sample": first_bad_sample(entry)} for path, entry in unique.items()]
            detail = "empty" if "no samples" in first["reason"] else "unreadable"
            instead = "another file stands in its place" if cause == "input" else "the row is without it"
            evidence = [f"row {row}: {entry['path']}: {entry['reason']}; {instead}" for row, entry in entries[:10]]
            rows = sorted({row for row, _ in entries})
            return Finding(cause, detail, text, evidence, phase="data", rows=rows, files=files)
    return None


def label_outside(case):
    """A label below 0 or not below the number of classes."""
    columns = case.wrong_labels()
    if not columns:
        return None
    rows, label = case.to_rows(columns), case.label()
    evidence, files = [], []
    for column, row in list(zip(columns, rows))[:10]:
        info = case.files[row] if row < len(case.files) else {}
        where = f", {info['path']} (list line {info.get('line')})" if info else ""
        evidence.append(
            f"row {row} has label {int(label[column])}; the classes are 0 to {(case.classes or 0) - 1}{where}"
        )
        files += [{"path": info["path"], "sample": None}] if info else []
    worst = max((int(v) for v in label[columns]), key=lambda v: abs(v))
    text = f"Label out of range: {worst} with {case.classes} classes, in {len(columns)} row(s)."
    if case.dump.get("injected") == "label":
        text = f"nan_inject wrote label {worst} ({case.classes} classes): a rehearsal, the list is fine."
    return Finding("label", "out_of_range", text, evidence, phase="data", columns=columns, rows=rows, files=files)


def bad_samples(case):
    """Samples that are not finite: the file, its augmentation, or neither."""
    rows = case.bad_rows()
    if not rows:
        return None
    flat = rows_of(case.dump["data"])
    finding = Finding("input", "nonfinite", "", phase="data", rows=rows)
    finding.columns = sorted({row % max(len(case.label()), 1) for row in rows})
    wrong = int((~flat[rows].isfinite()).sum())
    finding.evidence.append(f"{wrong} samples of {len(rows)} row(s) are not finite, those of the other rows are")
    if case.dump.get("injected") == "data":
        finding.evidence.append("nan_inject put it there; the file itself is sound")
    if not case.files:
        finding.summary = f"The batch itself holds {wrong} non-finite samples, in {len(rows)} row(s)."
        return finding
    blame_files(case, finding, flat, rows, math.inf)
    if case.dump.get("injected") == "data":
        finding.cause = "input"
        finding.summary = f"nan_inject wrote NaN into {finding.files[0]['path']}: a rehearsal, the file is fine."
    return finding


def blame_files(case, finding, flat, rows, limit):
    """Trace rows through their provenance; the cause that most of the origin explains wins."""
    origins = [origin_of(flat[row].float().numpy(), case.files[row], limit) for row in rows]
    finding.evidence += [f"row {row}: {origin.text}" for row, origin in zip(rows, origins)][:10]
    causes = [o.cause for o in origins]
    finding.cause = next((c for c in ("input", "augmentation", "environment") if c in causes), "input")
    chosen = [o for o in origins if o.cause in (finding.cause, "unknown")] or origins
    chosen += [o for o in origins if o not in chosen and o.cause != "environment"]
    finding.files = [{"path": o.path, "sample": o.sample} for o in chosen]
    newer = [o.path for o in origins if o.cause == "environment" and changed_since(o.path, case.path)]
    finding.evidence += [f"changed since the dump was written: {', '.join(newer[:5])}"] if newer else []
    first = finding.files[0]
    at = f" at sample {first['sample']}" if first["sample"] is not None else ""
    more = f" and {len(finding.files) - 1} more" if len(finding.files) > 1 else ""
    what = "NaN or Inf" if limit == math.inf else "samples of absurd size"
    finding.summary = {
        "input": f"{first['path']} holds {what}{at}{more}.",
        "augmentation": f"The augmentation with {first['path']} brings {what}{at}{more}; the speech is sound.",
        "environment": f"The step was given {what} that its file does not hold: {first['path']} reads sound{more}.",
    }[finding.cause]
    unknown = [o for o in chosen if o.cause == "unknown"]
    if unknown and any(d for r in rows for d in case.files[r].get("augment", []) if "reason" not in d):
        finding.evidence.append(
            "the row was augmented and its files are not at hand: the augmentation may have done it"
        )


def changed_since(path, dump) -> bool:
    """Whether a file is newer than the dump."""
    return Path(path).is_file() and Path(path).stat().st_mtime > Path(dump).stat().st_mtime


# ------------------------------------------------------------------------------------------------ replay experiments


def vanished(case):
    """The replay is finite: another rank, the injection of a rehearsal, or the machine."""
    if case.replay is None or not case.base.finite:
        return None
    injected, changed = case.dump.get("injected"), case.replay.changed
    if changed and not injected:
        text = f"With the code as it is now the step is finite: the change to {', '.join(changed)} cures it."
        return Finding("unknown", "code_changed", text, [f"replayed with the changed code: {case.base}"])
    if case.replay.emulated and not injected:
        text = (
            "On a CPU, with the casts of a GPU emulated, the step is finite: run the analysis on a machine with a GPU."
        )
        return Finding("unknown", "other_device", text, [f"replayed on a CPU: {case.base}"])
    evidence = [f"replayed in {case.dump['amp_dtype']} with the same state and generators: {case.base}"]
    if injected:
        text = f"nan_inject made the {injected} of this step NaN: a rehearsal, not a fault."
        return Finding("environment", "injected", text, evidence)
    if case.dump.get("world", 1) > 1 and case.dump["reason"].startswith("grad"):
        text = "This rank's own step is finite: another rank brought the fault through the sum of the gradients."
        return Finding("distributed", "other_rank", text, evidence)
    same = same_as_files(case.dump["data"], case.files, range(len(case.files)))
    if same is not None:
        known = "is just what its files give" if same else "is not what its files give"
        evidence.append(f"the batch {known}")
    text = "The same step computed again is finite: the fault was of the moment (memory, another process, a hook)."
    return Finding("environment", "transient", text, evidence)


def absurd_amplitude(case):
    """Finite samples of absurd size; at an ordinary peak the same rows are harmless."""
    if case.replay is None or case.base.finite:
        return None
    flat = rows_of(case.dump["data"]).float()
    peaks = flat.abs().amax(dim=1)
    rows = (peaks > max(ABSURD, 100 * float(peaks.median()))).nonzero().flatten().tolist()
    rows = rows or (peaks > 1e6).nonzero().flatten().tolist()
    if not rows:
        return None
    calm = flat.clone()
    calm[rows] *= 0.5 / peaks[rows].unsqueeze(1)
    if not case.replay.run(data=calm.view_as(case.replay.data)).finite:
        return None
    finding = Finding("input", "amplitude", "", phase="data", rows=rows)
    finding.columns = sorted({row % case.replay.columns for row in rows})
    worst = float(peaks[rows].max())
    finding.evidence.append(
        f"Very large values detected (max: {worst:.2e}); with these rows at a peak of 0.5 the step is finite"
    )
    if case.files:
        blame_files(case, finding, flat, rows, ABSURD)
    if finding.cause == "environment" or not case.files:
        finding.cause = finding.cause if case.files else "input"
        finding.summary = finding.summary or f"Row {rows[0]} has samples up to {worst:.2e}."
    return finding


def too_little_precision(case):
    """Finite in fp32, not under autocast."""
    if case.replay is None or case.base.finite:
        return None
    short = case.origin is not None and case.origin.dtype in ("float16", "bfloat16")
    if case.dump["amp_dtype"] == "float32" and not short:
        return None
    exact = case.replay.run(dtype="float32")
    if not exact.finite and short:  # code that casts to 16 bit itself
        exact = case.replay.run(dtype="float32", modes=[Casts(torch.float32)])
    if not exact.finite:
        return None
    finding = finding_at_origin(case)
    dtype = case.origin.dtype if short else case.dump["amp_dtype"]
    finding.cause = "precision"
    small = any(word in (finding.op or "").lower() for word in ("div", "log", "sqrt", "reciprocal", "acos"))
    finding.detail = "underflow" if small else "overflow"
    name = case.origin.op_name if case.origin is not None else "an operation"
    finding.summary = f"{place_of(finding)}, {name} is not finite in {dtype}; in float32 the same step is."
    finding.evidence.append(f"float32: {exact}")
    finding.evidence += in_other_precisions(case)
    if finding.module:
        island = case.replay.run(islands=(finding.module,))
        finding.evidence.append(f"with {finding.module} alone in float32: {island}")
    return finding


def place(case):
    """The operation that made it, in fp32 too: features, loss, or model."""
    if case.replay is None or case.base.finite:
        return None
    finding = finding_at_origin(case)
    if case.origin is None:
        if not case.base.error:
            return None
        finding.cause, finding.detail = "model_forward", "error"
        finding.summary = f"The step raises: {case.base.error}"
        return finding
    record = case.origin
    network = case.replay.network()
    loss = record.site.module.startswith("__L__") or record.site.source.startswith("loss/")
    if loss:
        finding.cause = "loss"
    elif is_front_end(record, network):
        finding.cause = "frontend"
    else:
        finding.cause = "model_backward" if record.backward else "model_forward"
    made = "the gradient of " if record.backward else ""
    what = "" if finding.detail == "nonfinite" else f": {finding.detail.replace('_', ' ')}"
    bad = "is not finite although its operands are"
    bad = "overflows the norm" if finding.detail == "steep_gradient" else bad
    finding.summary = f"{place_of(finding)}, {made}{record.op_name} {bad}{what}."
    finding.evidence += in_other_precisions(case)
    return finding


def in_other_precisions(case) -> list[str]:
    """The step in other types, as far as time allows, and how near each module comes to float16's largest number."""
    lines = []
    for dtype in ("float64", "bfloat16"):
        if dtype != case.dump["amp_dtype"] and case.time_left() > 10 * case.base.seconds:
            outcome = case.replay.run(dtype=dtype)
            lines += [f"{dtype}: {outcome}"] if not outcome.error else []
    if case.dump["amp_dtype"] == "float16":
        sizes = [(a["abs_max"], a["name"]) for a in case.activations if a["abs_max"] > 0]  # also leaves out NaN
        tops = [
            f"{name} {size:.3g} ({math.log2(65504 / size):.1f} bits left)" for size, name in sorted(sizes)[-3:][::-1]
        ]
        lines += [f"largest outputs against float16's 65504: {', '.join(tops)}"] if tops else []
    return lines


def place_of(finding) -> str:
    """The place of a finding as the beginning of a sentence."""
    parts = {"__S__": "the model", "__L__": "the loss", None: "the network"}
    return f"At {finding.source or 'no line of a plug-in'}, in {parts.get(finding.module, finding.module)}"


def finding_at_origin(case) -> Finding:
    """The place of the first bad operation, and the rows that it needs."""
    finding = Finding("unknown", "nonfinite", "")
    record = case.origin
    if record is None:
        return finding
    finding.module = record.site.module or None
    finding.op = record.node or record.op
    finding.phase = "backward" if record.backward else "forward"
    finding.source = record.site.source or None
    finding.parameter = next((g for g in [*record.nonfinite_inputs, *record.known[:1]] if g != "data"), None)
    finding.detail = detail_of(record)
    finding.columns = case.guilty_columns()
    finding.rows = case.to_rows(finding.columns)
    if finding.columns and record.size == len(case.files) and set(record.rows) & set(finding.rows):
        finding.rows = sorted(set(record.rows) & set(finding.rows))  # of several crops in a row the guilty one
    line, operands = (
        finding.source or "no line of a plug-in",
        f", operands {record.operands}" if record.operands else "",
    )
    first = "first operation with a non-finite result"
    first = "operation that multiplies the gradient most" if finding.detail == "steep_gradient" else first
    finding.evidence.append(f"{first}: {finding.op} ({record.dtype}) at {line}{operands}")
    if finding.rows:
        finding.evidence.append(f"rows {finding.rows[:16]}: without them the step is finite")
        if case.files:
            finding.files = [{"path": case.files[row]["path"], "sample": None} for row in finding.rows]
        flat = rows_of(case.dump["data"])
        silent = [row for row in finding.rows if float(np.abs(flat[row].float().numpy()).max()) < SILENT]
        if silent:
            finding.evidence.append(f"rows {silent[:16]} are silent")
            if finding.phase == "forward":
                finding.detail = f"{finding.detail}_of_silence"
    return finding


HYPOTHESES = (
    *(unusable_file, label_outside, bad_samples, bad_state_before_step, bad_scaler, spoiled_update),
    *(vanished, absurd_amplitude, outlier, impossible_statistic, diverged, too_little_precision, place),
)
