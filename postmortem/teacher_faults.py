"""Faults of the teacher that a run learnt from: its weights, or what it gave for the rows of a batch."""

from errors import plural
from postmortem.finding import Finding

NAME = "distillation."  # modules and tensors of a teacher begin with it


def bad_teacher(case) -> Finding | None:
    """Check for a teacher whose weights were not finite in the run, or, without a replay, whose embeddings were not."""
    told = case.dump.get("teacher")
    if not told:
        return None
    file, source, rows = next(iter(told["files"]), "?"), f"models/{told['model']}.py", rows_of_teacher(case)
    if told["nonfinite"]:
        names = list(told["nonfinite"])
        more = f" and {len(names) - 1} more" if names[1:] else ""
        text = f"The teacher's '{names[0]}'{more} was NaN or Inf before this step: {source}, loaded from {file}."
        evidence = [
            f"{name}: NaN {stats['nan']}, Inf {stats['inf']} of {stats['numel']}; all were finite when it was loaded"
            for name, stats in list(told["nonfinite"].items())[:5]
        ]
        finding = Finding("state", "teacher_weight", text, evidence, phase="state", parameter=f"{NAME}{names[0]}")
        finding.source, finding.files = source, [{"path": file, "sample": None}]
        return finding
    if not rows or case.replay is not None:
        return None
    text = f"The teacher's embedding of {plural(len(rows), 'row')} is NaN or Inf: {source}, loaded from {file}."
    finding = Finding("model_forward", "teacher_embedding", text, phase="forward", rows=rows, source=source)
    finding.module = f"{NAME}teacher"
    finding.files = [{"path": case.files[row]["path"], "sample": None} for row in rows if row < len(case.files)]
    return finding


def rows_of_teacher(case) -> list[int]:
    """The rows of which the teacher's embedding was not finite in the run."""
    told = case.dump.get("teacher") or {"rows": []}
    return [row for row in told["rows"] if row >= 0]


def say_teacher(case, finding):
    """Say of a finding in the teacher that it is there, and what the run saw of the teacher."""
    told = case.dump.get("teacher")
    if not told:
        return
    file = next(iter(told["files"]), "?")
    if (finding.module or "").startswith(NAME) and finding.detail != "teacher_embedding":
        finding.summary += f" It is the teacher's, loaded from {file}; the student is not at fault."
    rows = rows_of_teacher(case)
    if rows:
        finding.evidence.append(f"in the run the teacher's embedding was not finite for rows {rows[:16]}")
