"""Look for a change of a schedule's code with which every learning rate of the run is finite."""

import math

import torch

from postmortem.code_fixes import TOLERANCE, CodeFix
from postmortem.places import path_of
from postmortem.rewrites import rewrites_of_file
from postmortem.source_patch import SourcePatch
from settings import plugins
from training.progress import step_schedule

MOST_STEPS = 20_000
MOST_CHANGES = 60


def schedule_fix(case) -> CodeFix | None:
    """Return the first change of the scheduler's file that is verified; None if there is none.

    With it all rates of the run are finite, those that were finite are the same, and none is far above them.
    """
    place = f"scheduler/{case.config.get('scheduler', '?')}.py"
    file = path_of(place)
    if case.replay is None or file is None:
        return None
    original = rates_of(case)
    sound = [rate for rate in original if math.isfinite(rate)]
    if len(sound) == len(original):
        return None
    highest = max([*sound, float(case.config.get("lr") or 0.001)])
    text = file.read_text(encoding="utf-8")
    for words, after in rewrites_of_file(text)[:MOST_CHANGES]:
        if case.time_left() < 0:
            return None
        patch = SourcePatch(place, text, after)
        with patch.applied():
            rates = rates_of(case)
        finite = len(rates) >= len(original) and all(0 <= rate <= 10 * highest for rate in rates)
        pairs = zip(original, rates)
        if finite and any(rates) and all(abs(a - b) <= TOLERANCE * abs(a) for a, b in pairs if math.isfinite(a)):
            outcome = f"with it all {len(rates)} rates of the run are finite, {min(rates):.3g} to {max(rates):.3g}"
            return CodeFix(patch, [words], f"{outcome}; the {len(sound)} that were finite are the same")
    return None


def zero_settings(case) -> dict[str, str]:
    """Settings of the schedule that are 0 and with which at 1 all rates are finite: {key: what came of it}."""
    declared = plugins.declaration("scheduler", str(case.config.get("scheduler")))
    found = {}
    for key in declared.keys if declared and case.replay is not None else ():
        if case.config.get(key) == 0 and not isinstance(case.config[key], bool):
            rates = rates_of(case, {key: 1})
            if all(math.isfinite(rate) for rate in rates) and any(rates):
                found[key] = f"with it all {len(rates)} rates of the run are finite"
    return found


def refusal_of(case) -> str:
    """Why the schedule cannot compute one of its rates, with the line; '' if it raises no exception for its numbers."""
    refusals: list[str] = []
    if case.replay is not None:
        rates_of(case, refusals=refusals)
    return next(filter(None, refusals), "")


def rates_of(case, settings: dict | None = None, refusals: list | None = None) -> list[float]:
    """Return the learning rates that the schedule gives, one for each of its steps; NaN where it raises an error.

    ``refusals`` gets what ``step_schedule`` says of each.
    """
    config, dump = {**case.config, **(settings or {})}, case.dump
    epochs = max(1, int(config.get("max_epoch") or 1))
    done = max(1, int(dump["epoch"]))
    per_epoch = max(1, int(dump["batch_idx"]), int(dump["step"]) // max(1, done - 1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=float(config.get("lr") or 0.001))
    rates = []
    try:
        values = {**config, "steps_per_epoch": per_epoch}
        schedule, unit = plugins.build("scheduler", str(config.get("scheduler")), values, optimizer)
        steps = epochs if unit == "epoch" else min(MOST_STEPS, epochs * per_epoch)
        for _ in range(steps):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            optimizer.step()
            said = step_schedule(schedule, optimizer)
            if refusals is not None:
                refusals.append(said)
    except Exception:  # a plug-in may raise anything; a rate that it does not give is not finite
        rates.append(math.nan)
    return rates
