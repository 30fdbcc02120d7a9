"""Words and fixes for loops that are not the trainer's: no keys of its configuration, no audio."""

from postmortem.fixes import VERDICTS, attempt, shown


def fitting(case, finding, advice: list[dict]) -> list[dict]:
    """The fixes that apply to a loop which is not the trainer's, in its own terms."""
    applicable = []
    for fix in advice:
        if fix["action"] == "set" and fix["change"]:
            ((key, value),) = fix["change"].items()
            if key == "mixedprec" and case.dump["amp_dtype"] == "float32":
                continue
            if key in ("mixedprec", "amp_dtype"):
                name = f"torch.{value}" if key == "amp_dtype" else "None"
                fix = {**fix, "text": f"NumericGuard(.., amp_dtype={name})", "action": "none", "change": None}
            elif key == "grad_clip":
                fix = {**fix, "text": f"NumericGuard(.., grad_clip={value:g})", "action": "none", "change": None}
            elif case.replay is None or key not in case.replay.settings:
                continue
            else:
                fix = {**fix, "text": f"{key} {shown(value)} in the optimizer", "action": "none", "change": None}
        applicable.append(fix)
    left = [c for c in range(len(case.label())) if c not in finding.columns]
    if finding.columns and left and case.replay is not None:
        rows = ", ".join(map(str, finding.rows[:16]))
        change = {"rows": finding.rows}
        text = f"repair or leave out what is in row {rows} of the batch"
        applicable.append(attempt(case, text, "exclude_file", change, columns=left))
    return sorted(applicable, key=lambda fix: VERDICTS.index(fix["verdict"]))


def without_audio(finding):
    """Say of rows that are no waveforms what a finding says of silence."""
    finding.evidence = [text.replace("silent rows:", "rows of zeros:") for text in finding.evidence]
    finding.detail = finding.detail.removesuffix("_of_silence")
    finding.summary = finding.summary.replace(" The audio of its rows is silent.", " Its rows are zero throughout.")
    for place in ("optimizer", "scheduler"):
        finding.summary = finding.summary.replace(f"{place}/?.py", f"the {place}")
