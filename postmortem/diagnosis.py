"""Name the cause of a fault: test hypotheses in order, those nearest to the origin of the value first.

Each hypothesis is a function of the case that returns a finding, or None if a test refutes it.
"""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from corpus.quality import HUGE, LOUD
from errors import plural
from postmortem.augmentation_fixes import line_at_fault
from postmortem.finding import Finding, detail_of, first_result, result_of
from postmortem.modes import Casts, WholeNumbers
from postmortem.probe import is_front_end
from postmortem.provenance import first_bad_sample, origin_of, same_as_files
from postmortem.replay import OutOfTime
from postmortem.spikes import spike
from postmortem.state_faults import (
    bad_scaler,
    bad_state_before_step,
    diverged,
    impossible_statistic,
    negative_moment,
    nonfinite_update,
    outlier,
)
from postmortem.teacher_faults import bad_teacher, say_teacher
from storage.dump import rows_of
from training.precision import is_emulated

SILENT = 1e-6  # peak of a silent row
ABSURD = 1e4  # peak of a row that may be at fault, if it is 100 times the usual one


def diagnose(case) -> Finding:
    """Return the finding of the first hypothesis that holds, else one of cause 'unknown'."""
    for hypothesis in HYPOTHESES:
        try:
            finding = hypothesis(case)
        except OutOfTime as error:
            case.evidence.append(f"{hypothesis.__name__.replace('_', ' ')}: {error}")
            continue
        if finding is not None:
            if finding.cause != "distributed":
                finding.rank = case.dump.get("rank")
            say_teacher(case, finding)
            if case.replay is not None and case.replay.emulated:
                finding.evidence.append("the dump is from a GPU; this replay emulated its casts on the CPU")
            return finding
    text = "Cause not found. Ruled out: data, labels, state, precision, optimizer. See the statistics below."
    if case.refusal and case.dump.get("injected"):
        return Finding("environment", "injected", rehearsal(case), [case.refusal])
    if case.reproduced == "nondeterministic":
        text = "Replays of the same step differ, and none of those that were watched failed: its line is not known."
        return Finding("environment", "nondeterministic", text)
    if case.refusal:
        text = "Cause not found: the step was not replayed. See the statistics below."
    return Finding("unknown", "unknown", text, [case.refusal] if case.refusal else [])


# ------------------------------------------------------------------------------------------------ data and labels


def unusable_file(case):
    """Check for a file that the run could not use and left out; the step was taken."""
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
            instead = "another file took its place" if cause == "input" else "the row was used without it"
            evidence = [f"row {row}: {entry['path']}: {entry['reason']}; {instead}" for row, entry in entries[:10]]
            rows = sorted({row for row, _ in entries})
            # Of a plug-in that refused its numbers, the line.
            line = re.match(r"augmentation/[^:]+\.py:\d+(?=: )", first["reason"])
            source, detail = (line[0], "refused") if line else (None, detail)
            evidence += [f"row {row} is of {case.files[row]['path']}" for row in rows[:10]] if line else []
            return Finding(cause, detail, text, evidence, phase="data", rows=rows, files=files, source=source)
    return None


def label_outside(case):
    """Check for a label below 0 or not below the number of classes."""
    columns = case.wrong_labels()
    if not columns:
        return None
    rows, label = case.to_rows(columns), case.label()
    evidence, files = [], []
    for column, row in list(zip(columns, rows))[:10]:
        info = case.files[row] if row < len(case.files) else {}
        place = f": {info['path']} (list line {info.get('line')})" if info else ""
        evidence.append(f"row {row} has label {int(label[column])}{place}")
        files += [{"path": info["path"], "sample": None}] if info else []
    worst = max((int(v) for v in label[columns]), key=lambda v: abs(v))
    valid = f"the classes are 0 to {case.classes - 1}" if case.classes else "a label is at least 0"
    text = f"Label out of range: {worst} in {plural(len(columns), 'row')}; {valid}."
    if case.dump.get("injected") == "label":
        text = f"nan_inject wrote label {worst}; {valid}. A rehearsal: the list is fine."
    return Finding("label", "out_of_range", text, evidence, phase="data", columns=columns, rows=rows, files=files)


def bad_samples(case):
    """Check for samples that are NaN or Inf, and whether the file or its augmentation brought them."""
    rows = case.bad_rows()
    if not rows:
        return None
    flat = rows_of(case.dump["data"])
    finding = Finding("input", "nonfinite", "", phase="data", rows=rows)
    finding.columns = sorted({row % max(len(case.label()), 1) for row in rows})
    wrong = int((~flat[rows].isfinite()).sum())
    finding.evidence.append(
        f"{plural(wrong, 'sample')} in {len(rows)} of {plural(len(flat), 'row')}: NaN or Inf; all others are finite"
    )
    if case.dump.get("injected") == "data":
        finding.evidence.append("nan_inject wrote it; the file is fine")
    if not case.files:
        finding.summary = f"The batch has {plural(wrong, 'NaN or Inf sample')} in {plural(len(rows), 'row')}."
        return finding
    trace_files(case, finding, flat, rows, math.inf)
    if case.dump.get("injected") == "data":
        finding.cause = "input"
        finding.summary = f"nan_inject wrote NaN into {finding.files[0]['path']}: a rehearsal, the file is fine."
    return finding


def trace_files(case, finding, flat, rows, limit):
    """Rebuild rows from their files and set cause, files and summary: a bad file goes before a bad augmentation."""
    origins = [origin_of(flat[row].float().numpy(), case.files[row], limit) for row in rows]
    finding.evidence += [f"row {row}: {origin.text}" for row, origin in zip(rows, origins)][:10]
    causes = [o.cause for o in origins]
    finding.cause = next((c for c in ("input", "augmentation", "environment") if c in causes), "input")
    chosen = [o for o in origins if o.cause in (finding.cause, "unknown")] or origins
    chosen += [o for o in origins if o not in chosen and o.cause != "environment"]
    finding.files = [{"path": o.path, "sample": o.sample} for o in chosen]
    newer = [o.path for o in origins if o.cause == "environment" and changed_since(o.path, case.path)]
    finding.evidence += [f"files changed since the dump was written: {', '.join(newer[:5])}"] if newer else []
    first = finding.files[0]
    at = f" at sample {first['sample']}" if first["sample"] is not None else ""
    more = f" and {len(finding.files) - 1} more" if len(finding.files) > 1 else ""
    what = "NaN or Inf" if limit == math.inf else f"samples beyond {limit:g}, where full scale is 1,"
    brings = "brings" if first["path"].endswith(".py") else "has"  # a plug-in of augmentation/, or a recording
    finding.summary = {
        "input": f"{first['path']}{more} has {what}{at}.",
        "augmentation": f"The augmentation file {first['path']}{more} {brings} {what}{at}; the speech file is fine.",
        "environment": f"The batch has {what}, but its files do not: {first['path']}{more} reads fine.",
    }[finding.cause]
    if finding.cause == "augmentation":
        guilty = next(row for row, origin in zip(rows, origins) if origin.cause == "augmentation")
        finding.source, said = line_at_fault(case, guilty)
        finding.source = finding.source or None
        finding.evidence += [f"first NaN or Inf: {said} at {finding.source}"] if said else []
        finding.summary += f" It is made at {finding.source}: {said}." if said else ""
    if all(o.cause == "unknown" for o in origins):
        not_attributed(case, finding, rows, f"{what}{at}")


def not_attributed(case, finding, rows, what: str):
    """List the candidates if no file can be read here: the speech files, and what was mixed in."""
    draws = [d for row in rows for d in case.files[row].get("augment", []) if "reason" not in d and "path" in d]
    mixed = list(dict.fromkeys(d["path"] for d in draws))
    first = finding.files[0]["path"]
    finding.detail = "unattributed"
    finding.summary = (
        f"The row of {first} has {what}. The file cannot be read here: --root OLD=NEW names its folder now."
    )
    if mixed:
        finding.cause = "unknown"
        finding.files += [
            {"path": path, "sample": None} for path in mixed if path not in (f["path"] for f in finding.files)
        ]
        finding.summary = (
            f"The row of {first}, augmented with {mixed[0]}, has {what}. Neither file can be read here, so which"
            " of them brought it is not known: --root OLD=NEW names their folder now."
        )


def changed_since(path, dump) -> bool:
    """Whether a file is newer than the dump."""
    return Path(path).is_file() and Path(path).stat().st_mtime > Path(dump).stat().st_mtime


# ------------------------------------------------------------------------------------------------ replay experiments


def rehearsal(case) -> str:
    """What is said of a step that ``nan_inject`` spoiled."""
    return f"nan_inject spoiled this step (kind: {case.dump['injected']}): a rehearsal, not a fault."


def vanished(case):
    """Check for a finite replay: another rank, a rehearsal, or the machine is the cause."""
    if case.replay is None or not case.base.finite:
        return None
    injected, changed = case.dump.get("injected"), case.replay.changed
    if changed and not injected:
        text = f"The step is finite with the changed code: the change to {', '.join(changed)} fixes it."
        return Finding("unknown", "code_changed", text, [f"with the changed code: {case.base}"])
    recheck = case.dump.get("recheck") or {}
    known = recheck.get("finite") or recheck.get("cpu_finite")
    if case.replay.emulated and not injected and not known:
        text = "On this CPU, which emulates the casts of a GPU, the step is finite. Run the analysis on a GPU."
        return Finding("unknown", "other_device", text, [f"on the CPU: {case.base}"])
    evidence = [f"replay in {case.dump['amp_dtype']}, same state and generators: {case.base}"]
    if injected:
        return Finding("environment", "injected", rehearsal(case), evidence)
    if case.dump.get("world", 1) > 1 and case.dump["reason"].startswith("grad"):
        rank, where = guilty_rank(case)
        other = "another rank" if rank is None else f"rank {rank}"
        text = f"This rank's own step is finite: {other} sent a NaN or Inf gradient. Read {where}."
        return Finding("distributed", "other_rank", text, evidence, rank=rank)
    rounded = case.dump.get("config", {}).get("augment_on") == "device"
    same = same_as_files(case.dump["data"], case.files, range(len(case.files)), rounded)
    if same is not None:
        evidence.append("the batch equals its files" if same else "the batch differs from what its files give")
    return Finding("environment", *transient(case), evidence + rechecks_of(recheck))


def rechecks_of(recheck: dict) -> list[str]:
    """What the run saw when it computed the step again, as evidence."""
    lines = []
    if recheck:
        result = (
            "finite" if recheck.get("finite") else "the same" if recheck.get("same") else "not finite with other values"
        )
        lines.append(f"computed once more in the run, the step was {result}")
    if "cpu_finite" in recheck:
        lines.append(f"computed on the CPU in the run, it was {'' if recheck['cpu_finite'] else 'not '}finite")
    if recheck.get("cpu_error"):
        lines.append(f"on the CPU the run could not compute it: {recheck['cpu_error']}")
    return lines


def transient(case) -> tuple[str, str]:
    """(detail, summary) of a step whose replay is finite."""
    recheck = case.dump.get("recheck") or {}
    if recheck.get("finite"):
        return "transient", (
            "The run computed this step once more at once, and it was finite: a transient fault. Check the device"
            " (memory errors, temperature) and threads that write to shared tensors."
        )
    compiled = case.dump.get("config", {}).get("compile_model", "off")
    if compiled in ("on", "auto"):
        run = "The run's model was compiled" if compiled == "on" else "If the run's model was compiled, as its log says"
        return "compiled", (
            f"As the source says the step is finite. {run} (compile_model: {compiled}): what torch.compile made of it"
            " is at fault, or adds up in another order. Train on with compile_model: off."
        )
    if recheck.get("cpu_finite"):
        return "device", (
            f"On {case.dump['device']} this step failed twice, on the CPU it was finite, and the replay is finite too:"
            " the device is broken, or an operation of it is at fault. Run the batch on another device of its kind."
        )
    return "transient", (
        "Replayed twice, the step was finite both times. The cause is not in the dump: a hardware error, another"
        " process, or state outside the dump (a hook, a Python attribute)."
    )


def guilty_rank(case) -> tuple[int | None, str]:
    """The other rank that wrote a dump of the same batch, or the only other one; and where to read on."""
    own, path = case.dump.get("rank"), Path(case.path)
    step = re.compile(rf"nan_batch_{case.dump['batch_idx']}_epoch_{case.dump['epoch']}(?:_\d+)?_rank(\d+)\.pt")
    found = ((step.fullmatch(file.name), file) for file in sorted(path.parent.iterdir()))
    others = {int(match[1]): file for match, file in found if match}
    others.pop(own, None)
    if len(others) == 1:
        ((rank, file),) = others.items()
        return rank, str(file)
    if case.dump.get("world") == 2 and own in (0, 1):
        return 1 - own, f"the dump of rank {1 - own}"
    return None, "that rank's dump"


def absurd_amplitude(case):
    """Check for finite samples of absurd size that are harmless if scaled to an ordinary peak."""
    if case.replay is None or case.base.finite:
        return None
    flat = rows_of(case.dump["data"]).float()
    peaks = flat.abs().amax(dim=1)
    usual = float(peaks.median())
    whole = usual > LOUD and not case.built  # a set of integers stored as float; the data of other loops has any scale
    limit = LOUD if whole else max(ABSURD, 100 * usual)
    rows = (peaks > limit).nonzero().flatten().tolist()
    rows = rows or (peaks > HUGE).nonzero().flatten().tolist()
    if not rows:
        return None
    scaled = flat.clone()
    scaled[rows] *= 0.5 / peaks[rows].unsqueeze(1)
    if not case.replay.run(data=scaled.view_as(case.replay.data)).finite:
        return None
    finding = Finding("input", "amplitude", "", phase="data", rows=rows)
    finding.columns = sorted({row % case.replay.columns for row in rows})
    worst = float(peaks[rows].max())
    finding.evidence.append(
        f"Very large values detected (max: {worst:.2e}); with their rows scaled to a peak of 0.5 the step is finite"
    )
    if case.files:
        trace_files(case, finding, flat, rows, limit)
    if finding.cause == "environment" or not case.files:
        finding.cause = finding.cause if case.files else "input"
        finding.summary = finding.summary or f"Row {rows[0]} has samples up to {worst:.2e}."
    return finding


def too_little_precision(case):
    """Check for a step that is finite in fp32 but not under autocast."""
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
    result = result_of(case.origin) if case.origin is not None else "a value becomes NaN or Inf"
    finding.summary = f"{place_of(finding)}: in {dtype}, {result}. In float32 the step is finite."
    finding.evidence.append(f"in float32: {exact}")
    finding.evidence += in_other_precisions(case)
    if finding.module:
        island = case.replay.run(islands=(finding.module,))
        finding.evidence.append(f"with only {finding.module} in float32: {island}")
    return finding


def whole_numbers_that_wrap(case):
    """Check for whole numbers outside of their type, whose sign and size are then any; without them it is finite."""
    record = case.origin
    if case.replay is None or case.base.finite or record is None or record.backward or not case.probe.whole_numbers:
        return None
    mode = WholeNumbers()
    exact = case.replay.run(modes=[mode])
    if not exact.finite or not mode.found:
        return None
    op, source, dtype = mode.found[0]
    module = record.site.module if record.site.source.partition(":")[0] == source.partition(":")[0] else ""
    case.origin = replace(
        record, op=op, site=replace(record.site, source=source, module=module), dtype=dtype, wraps=True
    )
    case.origin.operands, case.origin.rows, case.origin.parents = [], [], []
    finding = failing_operation(case)
    finding.evidence.append(f"it makes what fails later: {first_result(record, record.site.source)}")
    finding.evidence.append(f"with whole numbers that do not wrap around: {exact}")
    return finding


def failing_operation(case):
    """Name the operation that makes it in fp32 too: in the features, the loss or the model."""
    if case.replay is None or case.base.finite:
        return None
    finding = finding_at_origin(case)
    if case.origin is None:
        if not (case.base.error or case.base.refused):
            return None
        finding.cause, finding.detail = "model_forward", "refused" if case.base.refused else "error"
        finding.summary = f"The step raises an error: {case.base}"
        place = re.match(r"[^:]+\.py:\d+(?=: )", case.base.refused)
        finding.source = place[0] if place else None
        finding.cause = "loss" if finding.source and finding.source.startswith("loss/") else finding.cause
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
    silent = " The audio of its rows is silent." if finding.detail.endswith("_of_silence") else ""
    finding.summary = f"{place_of(finding)}: {result_of(record)}.{silent}"
    finding.evidence += in_other_precisions(case)
    return finding


def in_other_precisions(case) -> list[str]:
    """Replay the step in other types if time allows, and list the modules nearest to float16's largest number.

    A few rows with which it fails are enough. A processor that only emulates bfloat16 takes too long in it.
    """
    lines, rows = [], f" with {len(case.small)} of the rows" if case.small else ""
    for dtype in ("float64", *([] if is_emulated(torch.bfloat16, case.replay.device) else ["bfloat16"])):
        if dtype != case.dump["amp_dtype"] and case.time_left() > 10 * case.base.seconds:
            outcome = case.replay.run(columns=case.small, dtype=dtype)
            lines += [f"in {dtype}{rows}: {outcome}"] if not outcome.error else []
    if case.dump["amp_dtype"] == "float16":
        beyond = {a["name"] for a in case.activations if a["nonfinite"]}
        sizes = [(a["abs_max"], a["name"]) for a in case.activations if a["abs_max"] > 0 and a["name"] not in beyond]
        tops = [f"{name} {size:.3g}" for size, name in sorted(sizes)[-3:][::-1]]
        lines += [f"largest outputs of modules (float16 ends at 65504): {', '.join(tops)}"] if tops else []
    return lines


def place_of(finding) -> str:
    """Return the place of a finding, to begin a sentence: 'loss/bad.py:30 (loss)'."""
    parts = {"__S__": "model", "__L__": "loss", None: "network"}
    return f"{finding.source or 'Source line unknown'} ({parts.get(finding.module, finding.module)})"


def finding_at_origin(case) -> Finding:
    """Return a finding with the place of the first bad operation and the rows at fault."""
    finding = Finding("unknown", "nonfinite", "")
    record = case.origin
    if record is None:
        return finding
    finding.module = record.site.module or None
    finding.op = record.node or record.op or None
    finding.phase = "backward" if record.backward else "forward"
    finding.source = record.site.source or None
    named = [*filter(None, [record.made]), *record.nonfinite_inputs, *record.finite_inputs[:1]]
    finding.parameter = next((name for name in named if name != "data"), None)
    finding.detail = detail_of(record)
    finding.columns = case.guilty_columns()
    finding.rows = case.to_rows(finding.columns)
    if finding.columns and record.size == len(case.files) and set(record.rows) & set(finding.rows):
        finding.rows = sorted(set(record.rows) & set(finding.rows))  # of several crops of a row the one at fault
    finding.evidence.append(first_result(record, finding.source))
    if finding.rows:
        finding.evidence.append(f"without rows {finding.rows[:16]} the step is finite")
        if case.files:
            finding.files = [{"path": case.files[row]["path"], "sample": None} for row in finding.rows]
        flat = rows_of(case.dump["data"])
        silent = [row for row in finding.rows if float(np.abs(flat[row].float().numpy()).max()) < SILENT]
        if silent:
            finding.evidence.append(f"silent rows: {silent[:16]}")
            if finding.phase == "forward":
                finding.detail = f"{finding.detail}_of_silence"
    return finding


HYPOTHESES = (
    unusable_file,
    spike,
    label_outside,
    bad_samples,
    bad_teacher,
    bad_state_before_step,
    bad_scaler,
    negative_moment,
    nonfinite_update,
    vanished,
    absurd_amplitude,
    outlier,
    impossible_statistic,
    diverged,
    too_little_precision,
    whole_numbers_that_wrap,
    failing_operation,
)
