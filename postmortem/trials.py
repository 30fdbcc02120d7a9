"""A change that is tried on the step of a dump, and what came of it, as ``--json`` prints it."""

from postmortem.replay import ReplayError


def recommendation(text, action, change, verdict, outcome) -> dict:
    """Return a recommendation as ``--json`` prints it; ``verdict`` is True, False or None."""
    verdict = {True: "verified", False: "refuted", None: "untested"}[verdict]
    return {"text": text, "action": action, "change": change, "verdict": verdict, "outcome": outcome}


def attempt(case, text, action, change, **how) -> dict:
    """Replay the step with one change and report its outcome; of a large batch a few rows that fail are tried first."""
    if case.replay is None:
        return recommendation(text, action, change, None, case.refusal)
    if case.base.finite:
        return recommendation(text, action, change, None, "not needed: the replayed step is finite without it")
    try:
        whole = not case.small or {"columns", "data", "label"} & set(how)
        outcome = case.replay.run(**how) if whole else case.replay.run(columns=case.small, **how)
        if not whole and outcome.finite:
            outcome = case.replay.run(**how)
    except ReplayError as error:
        return recommendation(text, action, change, None, str(error))
    how_tried = "without it" if action == "exclude_file" else "with it"
    return recommendation(text, action, change, outcome.finite, f"{how_tried}: {outcome}")
