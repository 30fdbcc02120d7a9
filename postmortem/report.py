"""Write the analysis as text, in the sections of the NaN debugging guide."""

import collections
import linecache

from errors import plural
from postmortem.code_fixes import FAILS_LATER
from postmortem.places import path_of
from storage.dump_statistics import basic_lines, data_lines, gradient_lines, history_lines, label_lines
from storage.restricted import printable
from utils import plain_names

WIDTH = 80
NOT_APPLICABLE = "not applicable"
MARKS = {"verified": "VERIFIED", "untested": "untested"}
REPLAYED = {
    "bit_equal": "bit for bit the step of the run",
    "same_fault": "the same fault, but not bit for bit",
    "other_fault": "another fault than that of the run: what follows explains the replay only",
    "nondeterministic": "different results each time: nothing that is tried proves anything",
    "vanished": "finite: the fault did not recur",
}


def text_report(analysis) -> list[str]:
    """Return the report of one dump: the verdict, then the numbers."""
    a = analysis
    lines = ["=" * WIDTH, f"NaN debug analysis: {a.path}", "=" * WIDTH, *verdict_lines(a)]
    sections = {
        "BASIC INFORMATION": basic_lines(a.dump, a.path),
        "DATA TENSOR ANALYSIS": data_lines(a.dump),
        "LABEL ANALYSIS": label_lines(a.dump, a.classes),
        "GRADIENTS AND PARAMETERS": gradient_lines(a.dump) if a.dump.get("format_version") else [],
        "HISTORY": history_lines(a.dump) if a.dump.get("format_version") else [],
        "POTENTIAL ISSUES": [f"- {issue}" for issue in a.issues] or ["none found in the numbers alone"],
        "RECOMMENDATIONS": recommendation_lines(a.verdict["recommendations"]),
    }
    for title, content in sections.items():
        if content:
            lines += ["", f"--- {title} ---", *content]
    return [plain_names(printable(line)) for line in lines]  # a dump may name files with control characters


def verdict_lines(a) -> list[str]:
    """Return the lines on cause, place, replay and evidence."""
    v, place = a.verdict, a.verdict["location"]
    cause = "gone with the code as it is now" if v["detail"] == "code_changed" else v["cause"]
    lines = [f"Cause: {cause} ({v['detail']})", a.summary]
    parts = {
        "Module": place["module"],
        "Operation": place["op"] and f"{place['op']} ({place['phase']})",
        "Source": place["source"],
        parameter_title(place, a.dump.get("config", {})): place["parameter"],
    }
    lines += [f"{name + ':':11}{value}" for name, value in parts.items() if value]
    code = code_at(place["source"])
    lines += [f"{'Code:':11}{code}"] if code else []
    if place["rows"]:
        more = ", ..." if len(place["rows"]) > 16 else ""
        lines.append(f"{'Rows:':11}{', '.join(map(str, place['rows'][:16]))}{more}")
    for file in place["files"][:5]:
        at = f", sample {file['sample']}" if file["sample"] is not None else ""
        lines.append(f"{'File:':11}{file['path']}{at}")
    if len(place["files"]) > 5:
        lines.append(f"{'':11}... and {plural(len(place['files']) - 5, 'more file')}")
    how = REPLAYED.get(v["replay"]["reproduced"], a.refusal)
    lines.append(f"{'Replay:':11}{how} ({v['replay']['seconds']:.1f} s)")
    return lines + ["Evidence:", *(f"- {text}" for text in v["evidence"])]


def parameter_title(place: dict, config: dict) -> str:
    """Name what ``parameter`` of a location is: a bad tensor, a key of the configuration, or a tensor used there."""
    if place.get("phase") in ("state", "update"):
        return "Bad state"
    return "Setting" if str(place.get("parameter")) in config else "Reads"


def code_at(source: str | None) -> str:
    """The line of code at 'loss/x.py:42', a file of this checkout; '' if there is none."""
    file, _, line = (source or "").rpartition(":")
    path = path_of(file)
    return linecache.getline(str(path), int(line)).strip() if line.isdigit() and path is not None else ""


def recommendation_lines(advice: list[dict]) -> list[str]:
    """Return each fix with its outcome, verified first; refuted ones share a line, and so do untested settings.

    If none was tried, each has lines of its own, and why stands once.
    """
    lines, refuted, idle, untested = [], [], [], collections.defaultdict(list)  # untested: outcome -> short names
    why = {fix["outcome"] for fix in advice}
    why = why if len(advice) > 1 == len(why) and all(fix["verdict"] == "untested" for fix in advice) else set()
    number = 0
    for fix in advice:
        if fix["outcome"].startswith(NOT_APPLICABLE):
            idle.append(short_name(fix))
            continue
        if fix["verdict"] == "refuted":
            refuted.append(short_name(fix) + (" (this step only)" if fix["outcome"] == FAILS_LATER else ""))
            continue
        if fix["verdict"] == "untested" and fix["action"] == "set" and not why:
            untested[fix["outcome"]].append(short_name(fix))
            continue
        number += 1
        lines.append(f"{number}. {MARKS[fix['verdict']]}  {fix['text']}")
        lines += [] if why else [f"             {fix['outcome']}"]
        if fix["action"] == "set" and fix["change"]:
            lines += [f"             YAML: {key}: {yaml_value(value)}" for key, value in fix["change"].items()]
        if fix["action"] == "fix_code" and fix["change"]:
            lines += [f"             {line}" for line in changed_lines(fix["change"]["diff"])]
    lines += [f"tried, no effect: {', '.join(refuted)}"] if refuted else []
    lines += [f"not applicable: {', '.join(idle)} (the step ran in float32)"] if idle else []
    lines += [f"untested: {', '.join(names)} ({outcome})" for outcome, names in untested.items()]
    lines += [f"none of them was tried ({outcome})" for outcome in why]
    return lines or ["Nothing to recommend."]


def changed_lines(diff: str) -> list[str]:
    """The lines that a unified diff takes out and puts in, without its heads and what stands around them."""
    return [line for line in diff.splitlines() if line[:1] in ("-", "+") and line[:3] not in ("---", "+++")]


def short_name(fix: dict) -> str:
    """Name a fix in a word or two: 'lr 0.0005', 'clip 1', 'fp32'; a fix that is no setting by its text."""
    if fix["action"] == "fix_code":
        source, _, words = fix["text"].partition(": ")
        return f"{words} ({source})"
    if fix["action"] != "set" or not fix["change"]:
        return fix["text"]
    ((key, value),) = fix["change"].items()
    if key in ("mixedprec", "amp_dtype", "nan_inject"):
        return {"mixedprec": "fp32", "amp_dtype": value, "nan_inject": "no nan_inject"}[key]
    key = {"grad_clip": "clip", "weight_decay": "weight decay"}.get(key, key)
    return f"{key} {value:g}" if isinstance(value, (int, float)) else f"{key} {value}"


def yaml_value(value) -> str:
    """Return a value as it is written in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value == "" else str(value)


def summary_lines(analyses: list) -> list[str]:
    """Group several dumps by cause, with the epochs and batches of each and its first verified fix."""
    groups = collections.defaultdict(list)
    for a in analyses:
        place = a.verdict["location"]
        files = tuple(sorted({f["path"] for f in place["files"]})[:3])
        groups[a.verdict["cause"], a.verdict["detail"], place["source"] or place["parameter"] or files].append(a)
    lines = ["=" * WIDTH, f"{plural(len(analyses), 'dump')}, {plural(len(groups), 'cause')}", "=" * WIDTH]
    for (cause, detail, where), members in sorted(groups.items(), key=lambda item: -len(item[1])):
        place = ", ".join(where) if isinstance(where, tuple) else where
        lines.append(f"{len(members)} x {cause} ({detail}){': ' + place if place else ''}")
        spots = [f"epoch {a.dump['epoch']} batch {a.dump['batch_idx']}" for a in members]
        lines.append("    at " + ", ".join(spots[:8]) + (", ..." if len(spots) > 8 else ""))
        batches, epochs = {a.dump["batch_idx"] for a in members}, {a.dump["epoch"] for a in members}
        if len(members) > 1:
            same = [f"always batch {batches.pop()}"] if len(batches) == 1 else []
            same += [f"always epoch {epochs.pop()}"] if len(epochs) == 1 else []
            lines.append("    " + (", ".join(same) or "at different epochs and batches"))
        fix = next((r for r in members[0].verdict["recommendations"] if r["verdict"] == "verified"), None)
        lines += [f"    verified: {fix['text']}"] if fix else []
    return lines
