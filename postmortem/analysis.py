"""Take a dump from file to verdict: read, replay, diagnose, try the fixes."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from postmortem.built_report import fitting, without_audio
from postmortem.case import Case
from postmortem.diagnosis import diagnose
from postmortem.fixes import recommendations, shown
from postmortem.spikes import spike_fixes
from storage.dump import DumpError, read_dump, read_state
from storage.dump_statistics import issues


@dataclass
class Analysis:
    """The result for one dump; ``verdict`` is the object that ``--json`` prints."""

    path: Path
    dump: dict
    verdict: dict
    summary: str
    activations: list = field(default_factory=list)
    issues: list = field(default_factory=list)
    classes: int | None = None
    refusal: str = ""


def analyse(path, replay: bool = True, trust: bool = False, seconds: float = 60.0, roots=()) -> Analysis:
    """Analyse a dump file; DumpError if it cannot be read.

    ``seconds`` bounds the trials of the replay. ``roots``: pairs (old, new) of folders of data that were moved since.
    """
    begin, threads = time.perf_counter(), torch.get_num_threads()
    dump = read_dump(path)
    follow_moved_files(dump, roots, run_folder(path, dump))
    state, missing = None, ""
    if dump.get("state"):
        try:
            state = read_state(path, dump["state"])
        except DumpError as error:
            missing = str(error)
    try:
        case = Case(path, dump, state, replay, trust, seconds)
        finding = diagnose(case)
        advice = (spike_fixes if dump.get("reason") == "spike" else recommendations)(case, finding)
        advice = fitting(case, finding, advice) if case.built else advice
    finally:
        torch.set_num_threads(threads)
    if case.reproduced == "nondeterministic":
        advice = [unproven(fix) for fix in advice]
    if case.built:
        without_audio(finding)
    else:
        name_setting(finding, advice, case.config)
    found = issues(dump, case.classes, state)
    evidence = [*finding.evidence, *case.evidence, *([missing] if missing else [])]
    if case.refusal and case.refusal not in evidence:
        evidence.append(case.refusal)
    place = {k: getattr(finding, k) for k in ("module", "op", "phase", "source", "parameter", "rows", "files", "rank")}
    verdict = {
        "file": str(path),
        "reason": dump.get("reason"),
        "cause": finding.cause,
        "detail": finding.detail,
        "location": place,
        "evidence": evidence or found,
        "replay": {
            "reproduced": case.reproduced if case.replay is not None else None,
            "seconds": round(time.perf_counter() - begin, 2),
        },
        "recommendations": advice,
    }
    return Analysis(
        Path(path), dump, plain(verdict), finding.summary, case.activations, found, case.classes, case.refusal
    )


def run_folder(path, dump: dict) -> Path | None:
    """The folder in which a run was started, by where its dump lies; None if that is not below its ``save_path``."""
    saved, folder = Path(str(dump.get("config", {}).get("save_path", ""))), Path(path).absolute().parent.parent
    inside = saved.parts and not saved.is_absolute() and folder.parts[-len(saved.parts) :] == saved.parts
    return Path(*folder.parts[: -len(saved.parts)]) if inside else None


def follow_moved_files(dump: dict, roots, started_in: Path | None = None):
    """Write the new folders into the paths of a dump's rows, and of what was mixed into them.

    A relative path that is not there is one of the folder that the run was ``started_in``.
    """
    entries = [
        entry for row in dump.get("files", []) for entry in (row, *row.get("augment", []), *row.get("replaced", []))
    ]
    for entry in entries:
        path = entry.get("path") if isinstance(entry, dict) else None
        for old, new in roots:
            if isinstance(path, str) and Path(path).is_relative_to(old):
                entry["path"] = str(Path(new) / Path(path).relative_to(old))
                break
        else:
            if isinstance(path, str) and started_in and not Path(path).exists() and (started_in / path).exists():
                entry["path"] = str(started_in / path)


def unproven(fix: dict) -> dict:
    """A fix of a step that gives different results each time: what was seen once proves nothing."""
    if fix["verdict"] != "verified":
        return fix
    return {**fix, "verdict": "untested", "outcome": f"{fix['outcome']} (once; the step differs from run to run)"}


def name_setting(finding, advice, config: dict):
    """Name a setting of a plug-in as the place if it alone fixes a fault of code."""
    if finding.parameter is None and finding.cause in ("loss", "model_forward", "model_backward", "frontend"):
        for fix in advice:
            if (
                fix["action"] == "set"
                and fix["verdict"] == "verified"
                and not {"mixedprec", "lr", "teacher_checkpoint"} & set(fix["change"])
            ):
                key = finding.parameter = next(iter(fix["change"]))
                value, now = shown(fix["change"][key]), shown(config.get(key))
                finding.summary += f" With {key} {value} (now {now}) the step is finite."
                return


def plain(value):
    """Make a nested value strict JSON: numbers that are not finite become their names."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
