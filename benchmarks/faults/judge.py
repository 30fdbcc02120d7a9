"""Compare what the trainer and the analyser said with the truth of a fault."""

import json
import re
from dataclasses import dataclass, field

from sources import marked_lines


@dataclass
class Score:
    """A fault's line of the table; cause, place and fix are None where there is nothing to ask."""

    id: str
    title: str
    detected: bool = False
    cause: bool | None = None
    place: bool | None = None
    fix: bool | None = None
    wrong_fixes: int = 0
    reasons: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    seconds: float = 0.0


def detection_problems(fault, workspace, statuses, reasons) -> list[str]:
    """What the run itself did wrong: status, dumps missing or too many, names not said, checkpoints not finite."""
    problems = []
    wanted = [fault.status, *(stage.status for stage in fault.more)]
    if statuses != wanted:
        problems.append(f"exit status {statuses}, not {wanted}")
    allowed = {reason for truth in fault.truths for reason in truth.reasons}
    problems += [f"no dump of {' or '.join(t.reasons)}" for t in fault.truths if not set(t.reasons) & set(reasons)]
    problems += [f"unexpected dump: {reason}" for reason in sorted(set(reasons) - allowed)]
    text = workspace.terminal()
    problems += [f"not said: {pattern}" for pattern in fault.said if not re.search(pattern, text)]
    problems += [f"said: {pattern}" for pattern in fault.forbidden if re.search(pattern, text)]
    if "Traceback (most recent call last)" in text:
        last = [line for line in text.splitlines() if re.match(r"\w*(Error|Exception)\b", line)]
        problems.append(f"traceback: {last[-1] if last else '?'}")
    if not fault.truths and (workspace.incidents() or reasons):
        problems.append("an incident where there is none")
    problems += [f"not finite: {line}" for line in workspace.nonfinite_checkpoints()]
    if fault.check is not None:
        found = fault.check(workspace)
        problems += [found] if found else []
    return problems


def plain_op(text) -> str:
    """'aten.sqrt.default', 'SqrtBackward0' and 'torch.sqrt_' -> 'sqrt'; 'NllLossBackward0' -> 'nll_loss'."""
    name = re.sub(r"Backward\d*$", "", str(text or "").split("(")[0].strip())
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    name = re.sub(r"^(torch[.]|aten(::|[.])|ops[.])+", "", name)
    return name.split(".")[0].strip("_")


def right_place(place, report: dict, workspace, lines) -> bool:
    """Whether the report's location satisfies every field of a place."""
    where = report.get("location") or {}
    files = where.get("files") or []
    named = {str(f.get("path")) for f in files}
    checks = []
    if place.files:
        checks.append(named == {str(workspace.data / name) for name in place.files})
    if place.among:
        checks.append(bool(named) and named <= {str(workspace.data / name) for name in place.among})
    if place.sample is not None:
        checks.append(bool(files) and all(f.get("sample") == place.sample for f in files))
    if place.code:
        checks.append(where.get("source") in lines)
    if place.ops and where.get("op") is not None:
        checks.append(plain_op(where["op"]) in place.ops)
    if place.modules and where.get("module") is not None:
        checks.append(where["module"] in place.modules)
    if place.parameters:
        checks.append(where.get("parameter") in place.parameters)
    if place.keys:
        checks.append(bool({where.get("parameter"), report.get("detail")} & set(place.keys)))
    if place.rank is not None:
        checks.append(where.get("rank") == place.rank)
    if place.named_rank:
        named_rank = re.search(r"_rank(\d+)[.]pt$", str(report.get("file")))
        checks.append(named_rank is not None and where.get("rank") == int(named_rank[1]))
    return bool(checks) and all(checks)


def right_fix(fix, recommendation, workspace) -> bool:
    """Whether a recommendation is this true fix."""
    if recommendation.get("action") != fix.action:
        return False
    text, change = json.dumps(recommendation), recommendation.get("change") or {}
    if fix.action == "exclude_file":
        return any(str(workspace.data / name) in text for name in fix.files)
    if fix.action == "set":
        return fix.key in change and fix.good(change[fix.key])
    if fix.action == "fix_code":  # on which line it stands does not matter: it has been applied and trained with
        return bool(change.get("diff"))
    return True


def judge(truth, report: dict, workspace, plugins, failed) -> dict:
    """Score one report against one truth: cause, place, fix, and what was said.

    ``failed``: the recommendations with which the fault came again when they were applied and trained with.
    """
    lines = marked_lines(plugins)
    where = report.get("location") or {}
    verified = [r for r in report.get("recommendations") or [] if r.get("verdict") == "verified" and r not in failed]
    cause = report.get("cause") in truth.causes
    place = any(right_place(p, report, workspace, lines) for p in truth.places) if truth.places else None
    if truth.bit_equal:
        place = bool(place) and (report.get("replay") or {}).get("reproduced") == "bit_equal"
    fix = any(right_fix(f, r, workspace) for f in truth.fixes for r in verified) if truth.fixes else None
    said = []
    if not cause:
        said.append(f"cause {report.get('cause')}/{report.get('detail')}, not {' or '.join(truth.causes)}")
    if place is False:
        shown = {key: value for key, value in where.items() if value not in (None, [], "")}
        shown["replay"] = (report.get("replay") or {}).get("reproduced")
        said.append(f"place {json.dumps(shown)[:300]}, not {lines or [p.files or p.parameters for p in truth.places]}")
    if fix is False:
        said.append(f"verified {[(r.get('action'), str(r.get('change'))[:100]) for r in verified]}")
    return {"cause": cause, "place": place, "fix": fix, "said": said}


def totals(scores) -> list[tuple[str, float, float, str]]:
    """(name, reached, goal, figures) of each goal; the first number is compared with the second."""
    faults = [s for s in scores if not s.id.startswith("C")]
    controls = [s for s in scores if s.id.startswith("C")]
    rows = [share("detected", [s.detected for s in faults], 100.0)]
    alarms = sum(not s.detected for s in controls)
    rows.append(("false alarms", -alarms, 0, f"{alarms} of {len(controls)} controls"))
    for name, goal in (("cause", 95.0), ("place", 90.0), ("fix", 85.0)):
        rows.append(share(name, [v for s in faults if (v := getattr(s, name)) is not None], goal))
    wrong = sum(s.wrong_fixes for s in scores)
    rows.append(("verified but wrong", -wrong, 0, f"{wrong} fixes"))
    return rows


def share(name: str, values: list[bool], goal: float):
    """A goal in per cent."""
    if not values:
        return name, goal, goal, "not scored"
    reached = 100.0 * sum(values) / len(values)
    return name, reached, goal, f"{sum(values)} of {len(values)} ({reached:.1f} %, goal {goal:g} %)"


def mark(value) -> str:
    """yes, NO, or - where there is nothing to ask."""
    return "-" if value is None else ("yes" if value else "NO")


def table(scores) -> str:
    """The table with aligned columns, what went wrong below each line, and the totals."""
    width = max([len(s.title) for s in scores] + [5])
    head = f"{'id':5} {'title':{width}} {'detected':8} {'cause':5} {'place':5} {'fix':4} {'wrong':5} {'s':>6}  dumps"
    lines = [head, "-" * len(head)]
    for s in scores:
        marks = f"{mark(s.detected):8} {mark(s.cause):5} {mark(s.place):5} {mark(s.fix):4} {s.wrong_fixes:<5d}"
        kinds = [f"{s.reasons.count(r)}x {r}" if s.reasons.count(r) > 1 else r for r in dict.fromkeys(s.reasons)]
        lines.append(f"{s.id:5} {s.title:{width}} {marks} {s.seconds:6.1f}  {', '.join(kinds) or '-'}")
        lines += [f"      > {text}" for text in s.problems]
    lines.append("")
    lines += [
        f"{name:18} {figures}{'' if reached >= goal else '   MISSED'}"
        for name, reached, goal, figures in totals(scores)
    ]
    return "\n".join(lines)
