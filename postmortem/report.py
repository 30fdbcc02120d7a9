"""The analysis as text, in the words of the NaN debugging guide."""

import collections
import linecache

from errors import ROOT
from storage.dump_statistics import basic_lines, data_lines, gradient_lines, history_lines, label_lines
from storage.restricted import printable
from utils import plain_names

WIDTH = 80
MARKS = {"verified": "VERIFIED", "refuted": "refuted ", "untested": "untested"}


def text_report(analysis) -> list[str]:
    """The report of one dump: verdict first, then what it rests on."""
    a = analysis
    lines = ["=" * WIDTH, f"NaN debug analysis: {a.path}", "=" * WIDTH, *verdict_lines(a)]
    sections = {
        "BASIC INFORMATION": basic_lines(a.dump, a.path),
        "DATA TENSOR ANALYSIS": data_lines(a.dump),
        "LABEL ANALYSIS": label_lines(a.dump, a.classes),
        "GRADIENTS AND PARAMETERS": gradient_lines(a.dump) if a.dump.get("format_version") else [],
        "HISTORY": history_lines(a.dump) if a.dump.get("format_version") else [],
        "POTENTIAL ISSUES": [f"- {issue}" for issue in a.issues] or ["none in the numbers alone"],
        "RECOMMENDATIONS": recommendation_lines(a.verdict["recommendations"]),
    }
    for title, content in sections.items():
        if content:
            lines += ["", f"--- {title} ---", *content]
    return [plain_names(printable(line)) for line in lines]  # a dump may name files with control characters


def verdict_lines(a) -> list[str]:
    """Cause, place and replay."""
    v, place = a.verdict, a.verdict["location"]
    lines = [f"Cause: {v['cause']} ({v['detail']})", a.summary]
    parts = {
        "Module": place["module"],
        "Operation": place["op"] and f"{place['op']} ({place['phase']})",
        "Source": place["source"],
        "State": place["parameter"],
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
        lines.append(f"{'':11}... and {len(place['files']) - 5} more files")
    replayed = {"bit_equal": "the step was replayed bit for bit", "same_fault": "the step was replayed, the same fault"}
    replayed["vanished"] = "the step was replayed and is finite"
    how = replayed.get(v["replay"]["reproduced"], a.refusal)
    lines.append(f"{'Replay:':11}{how} ({v['replay']['seconds']:.1f} s)")
    return lines + ["Evidence:", *(f"- {text}" for text in v["evidence"])]


def code_at(source: str | None) -> str:
    """The line of code at 'loss/x.py:42', a file of this checkout; '' if it has none."""
    file, _, line = (source or "").rpartition(":")
    path = (ROOT / file).resolve()
    return linecache.getline(str(path), int(line)).strip() if line.isdigit() and path.is_relative_to(ROOT) else ""


def recommendation_lines(advice: list[dict]) -> list[str]:
    """Each fix with what came of it: verified first."""
    lines = []
    for number, fix in enumerate(advice, 1):
        lines.append(f"{number}. {MARKS[fix['verdict']]}  {fix['text']}")
        lines.append(f"             {fix['outcome']}")
        if fix["action"] == "set" and fix["change"] and fix["verdict"] == "verified":
            lines += [f"             YAML: {key}: {yaml_value(value)}" for key, value in fix["change"].items()]
    return lines or ["Nothing to recommend."]


def yaml_value(value) -> str:
    """A value as it is written in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return '""' if value == "" else str(value)


def summary_lines(analyses: list) -> list[str]:
    """Several dumps grouped by cause: does it always happen at the same epoch, batch or file?"""
    groups = collections.defaultdict(list)
    for a in analyses:
        place = a.verdict["location"]
        files = tuple(sorted({f["path"] for f in place["files"]})[:3])
        groups[a.verdict["cause"], a.verdict["detail"], place["source"] or place["parameter"] or files].append(a)
    lines = ["=" * WIDTH, f"{len(analyses)} dumps, {len(groups)} causes", "=" * WIDTH]
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
