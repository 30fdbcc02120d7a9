"""Try each fix on the dump before recommending it: one change, the same batch."""

import math
import os

import torch

from corpus.sources import entries_of
from corpus.sources import shown as lists_shown
from corpus.tars import ENDING
from errors import plural
from postmortem import from_numbers
from postmortem.augmentation_fixes import for_augmentation
from postmortem.code_fixes import FAILS_LATER, CodeSearch, RetrainingSearch, UpdateSearch, advice_for, survives
from postmortem.replay import OutOfTime
from postmortem.retraining import NOT_TRIED, trained_with
from postmortem.schedule_fixes import schedule_fix, zero_settings
from postmortem.state_faults import positive_moments, repaired, sound_update_settings
from postmortem.teacher_faults import NAME as TEACHER
from postmortem.trials import attempt, recommendation
from settings import plugins
from storage.dump import rows_of
from storage.dump_statistics import number

FIXED = ("nOut", "nClasses", "nPerSpeaker", "sample_rate")  # what they say is so, whatever comes of it
VERDICTS = ("verified", "untested", "refuted")  # in the order in which they are listed
REHEARSAL = "remove nan_inject: this was a rehearsal"


def recommendations(case, finding) -> list[dict]:
    """Return the fixes of the cause and the four quick fixes: verified first, the smallest change first."""
    try:
        found = CAUSES.get(finding.cause, lambda case, finding: [])(case, finding)
    except OutOfTime as error:
        found = []
        case.evidence.append(f"fixes: {error}")
    if (finding.module or "").startswith(TEACHER):
        change = {"teacher_checkpoint": ""}
        text = "train without this teacher: leave teacher_checkpoint out, or name another"
        found.append(attempt(case, text, "set", change, settings=change))
    if finding.detail == "code_changed":
        return [recommendation("keep the code as it is now", "none", None, True, f"with it: {case.base}")]
    quick = quick_fixes(case, finding) if case.dump.get("reason", "data_error") != "data_error" else []
    if not case.dump.get("format_version"):
        shown_by = from_numbers.advice(case.dump, finding.cause)
        quick = [recommendation(text, action, change, None, case.refusal) for text, action, change in shown_by]
    present = {_key(r) for r in found}
    found += [r for r in quick if _key(r) not in present]
    found = [trained_with(case, r) for r in found]
    size = {"exclude_file": 0, "restore": 1, "set": 2, "fix_code": 3, "none": 4}
    if finding.cause in ("frontend", "model_forward", "model_backward", "loss"):
        size["fix_code"] = -1  # the line itself, before settings that go round it
    return sorted(found, key=lambda r: (VERDICTS.index(r["verdict"]), size[r["action"]]))


def _key(rec):
    return (rec["action"], repr(rec["change"]))


def shown(value) -> str:
    """Return a setting as text, a number without superfluous digits."""
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


# ------------------------------------------------------------------------------------------- the four quick fixes


def quick_fixes(case, finding) -> list[dict]:
    """Try a lower lr, a lower scale, mixed precision off and harder clipping: in every replayed report."""
    config, fixes = case.config, []
    lr = case.dump["lr"] if math.isfinite(case.dump["lr"]) and case.dump["lr"] > 0 else config.get("lr", 0.001)
    base = number(config, "lr") or lr
    for change in ({"lr": float(f"{base / 2:.3g}")}, {"lr": float(f"{base / 10:.3g}")}):
        text = f"lower the learning rate to {change['lr']:g} (now {base:g})"
        fixes.append(try_update_setting(case, finding, text, change, "lr"))
    if isinstance(config.get("scale"), (int, float)):
        for lower in (20 if config["scale"] > 20 else float(f"{config['scale'] * 2 / 3:.3g}"), 10):
            if lower < config["scale"] and not any(f["verdict"] == "verified" for f in fixes):
                text = f"lower the scale of the loss to {lower:g} (now {config['scale']:g})"
                fixes.append(lasting(case, attempt(case, text, "set", {"scale": lower}, settings={"scale": lower})))
    if case.dump["amp_dtype"] == "float32" and case.replay is not None and not case.base.finite:
        outcome = f"not applicable: the step ran in float32 ({case.base})"
        fixes.append(recommendation("switch mixed precision off", "set", {"mixedprec": False}, False, outcome))
    elif case.dump["amp_dtype"] != "float32":
        fixes.append(attempt(case, "switch mixed precision off", "set", {"mixedprec": False}, dtype="float32"))
    clip = number(config, "grad_clip")
    harder = 1.0 if not clip or clip > 1.0 else clip / 5
    text = f"clip gradients harder, at {harder:g} (now {shown(clip or 'off')})"
    fixes.append(try_update_setting(case, finding, text, {"grad_clip": harder}, "grad_clip"))
    return fixes


def try_update_setting(case, finding, text, change, key) -> dict:
    """Try a setting of the update: by retraining for an optimizer fault, else it cannot change this step."""
    if case.replay is None:
        return recommendation(text, "set", change, None, case.refusal)
    if case.base.by_update:
        return attempt(case, text, "set", change, settings=change)
    if finding.cause == "optimizer":
        retraining = case.retraining
        if retraining.train().sound:
            return recommendation(text, "set", change, None, "not testable: retraining does not diverge")
        tried = dict(change)
        if key == "lr":
            tried["lr"] = retraining.learning_rate() * change["lr"] / float(case.config.get("lr") or 1)
        trajectory = retraining.train(**tried)
        return recommendation(text, "set", change, trajectory.sound, f"retrained from {retraining.start}: {trajectory}")
    if case.base.finite:
        return recommendation(text, "set", change, None, "not needed: the replayed step is finite without it")
    step = case.base  # neither of these settings is read before the update
    if step.error:
        return recommendation(
            text, "set", change, False, f"no effect: the step raises an error before the update ({step.error})"
        )
    why = "a NaN gradient stays NaN when it is clipped" if key == "grad_clip" else "the step fails before lr is used"
    outcome = f"no effect: {why} ({step})"
    return recommendation(text, "set", change, False, outcome)


# ------------------------------------------------------------------------------------------------------- by cause


def for_input(case, finding) -> list[dict]:
    """Try the step without the file; for an absurd level, also with the file scaled."""
    fixes = []
    left = [c for c in range(len(case.label())) if c not in finding.columns]
    paths = list(dict.fromkeys(f["path"] for f in finding.files))
    if paths:
        text = "; ".join(f"repair {path}, or {excluded(case, path)}" for path in paths)
        change = {"file": paths[0]} if len(paths) == 1 else {"files": paths}
        if case.dump.get("reason") == "data_error":
            outcome = "the run left it out of this batch, and the step was finite"
            fixes.append(recommendation(text, "exclude_file", change, True, outcome))
        elif case.replay is None and case.bad_rows():
            clean = not set(case.bad_rows()) - set(finding.rows)
            outcome = f"{case.refusal}; the other rows are finite" if clean else case.refusal
            fixes.append(recommendation(text, "exclude_file", change, None, outcome))
        elif len(left) < 2:
            sound = torch.nan_to_num(case.replay.data, nan=0.0, posinf=0.0, neginf=0.0)
            fixes.append(attempt(case, text, "exclude_file", change, data=sound))
            fixes[-1]["outcome"] = f"fewer than two rows are left; with its bad samples at 0, {fixes[-1]['outcome']}"
        else:
            fixes.append(attempt(case, text, "exclude_file", change, columns=left))
            note_another_fault(case, finding, fixes[-1], left)
    if case.dump.get("injected") == "data":
        for fix in fixes:
            fix.update(verdict="refuted", outcome="the file is fine: nan_inject wrote the NaN")
        fixes.append(without_injection(case, finding))
    if finding.detail == "amplitude" and case.replay is not None:
        flat = rows_of(case.dump["data"]).float().clone()
        flat[finding.rows] *= 0.5 / flat[finding.rows].abs().amax(dim=1, keepdim=True)
        text = "scale the file to a peak below 1"
        fixes.append(attempt(case, text, "none", None, data=flat.view_as(case.replay.data)))
    return fixes


def note_another_fault(case, finding, fix, left):
    """Verify a fix without which another fault remains: the batch is then finite in float32, not under autocast."""
    if fix["verdict"] == "refuted" and case.bad_rows() and not set(case.bad_rows()) - set(finding.rows):
        exact = case.replay.run(columns=left, dtype="float32")
        if exact.finite:
            dtype, other = case.dump["amp_dtype"], fix["outcome"]
            fix["verdict"] = "verified"
            fix["outcome"] = f"without it, finite in float32 ({exact}); a second fault remains in {dtype}: {other}"


def excluded(case, path) -> str:
    """Name the list line to remove, or the member of a tar file, in words."""
    listing = str(case.config.get("train_list", "the training list"))
    tar, member, name = path.partition(f"{ENDING}/")
    if member and (listing.endswith(ENDING) or os.path.isdir(listing)):
        return f"leave '{name}' out of {tar}{ENDING}"
    if entries_of(listing) is not None:
        listing = f"the one of {lists_shown(listing)} that names it"
    entries = [entry for info in case.files for entry in (info, *info.get("replaced", []))]
    line = next((entry.get("line") for entry in entries if entry["path"] == path), None)
    return f"remove line {line} of {listing}" if line is not None else f"remove it from {listing}"


def without_injection(case, finding) -> dict:
    """Try the batch without the NaN that nan_inject wrote into it."""
    text = REHEARSAL
    flat = rows_of(case.dump["data"]).float().clone()
    flat[finding.rows] = torch.nan_to_num(flat[finding.rows], nan=0.0, posinf=0.0, neginf=0.0)
    if case.replay is None:
        return recommendation(text, "set", {"nan_inject": ""}, None, case.refusal)
    return attempt(case, text, "set", {"nan_inject": ""}, data=flat.view_as(case.replay.data))


def for_label(case, finding) -> list[dict]:
    """Try the step with more classes, and without the rows of the wrong labels."""
    fixes = []
    left = [c for c in range(len(case.label())) if c not in finding.columns]
    if case.dump.get("injected") == "label":
        text = REHEARSAL
        label = case.label().clone()
        label[finding.columns] = 0
        fixes.append(attempt(case, text, "set", {"nan_inject": ""}, label=label))
    worst = max(int(v) for v in case.label()[finding.columns])
    if case.dump.get("injected") != "label" and (case.classes or 0) <= worst < 10 * (case.classes or 10) + 1000:
        change = {"nClasses": worst + 1}
        text = f"set nClasses to {worst + 1} or more (now {case.classes}), or to 0 to count the train list"
        fixes.append(attempt(case, text, "set", change, settings=change))
    for path in dict.fromkeys(f["path"] for f in finding.files if case.dump.get("injected") != "label"):
        text = f"correct the speaker of {path}, or {excluded(case, path)}"
        if len(left) > 1:
            fixes.append(attempt(case, text, "exclude_file", {"file": path}, columns=left))
        else:
            fixes.append(
                recommendation(text, "exclude_file", {"file": path}, None, "not testable: fewer than two rows are left")
            )
    return fixes


def for_code(case, finding) -> list[dict]:
    """Try a change of the line at fault, and settings of the plug-in."""
    fixes = changes_of_code(case, finding, CodeSearch)
    if "silence" in finding.detail and finding.columns:
        fixes += for_input(case, finding)
    return [*fixes, *settings_of_plugins(case, finding)]


def changes_of_code(case, finding, kind, record=None) -> list[dict]:
    """Look for a change of the source; without one say what a person can do there. ``kind``: a CodeSearch."""
    record = record or case.origin
    if finding.detail == "refused" and record is None and finding.source:
        return [recommendation(f"{finding.source}: {advice_for(None)}", "fix_code", None, None, "no change is known")]
    if case.replay is None or record is None or not finding.source:
        return []
    search = kind(case, finding.columns)
    found = search.run(finding.source, record)
    if found is not None:
        text = f"{finding.source}: {'; '.join(dict.fromkeys(found.words))}"
        return [recommendation(text, "fix_code", {"diff": found.patch.diff()}, True, found.outcome)]
    none = "no change is known" if case.time_left() > 0 else "no change was tried: no time left (--seconds)"
    tried = f"{plural(search.tried, 'change')} of the line tried, none verified" if search.tried else none
    outcome = "; ".join([tried, *search.objections[:3]])
    return [recommendation(f"{finding.source}: {advice_for(record)}", "fix_code", None, None, outcome)]


def settings_of_plugins(case, finding) -> list[dict]:
    """Try settings of model and loss at their defaults, and the margin at 0.1."""
    trials, config = [], case.config
    if case.replay is None:
        return []
    concerned = {"loss": ["loss"], "precision": ["models", "loss"], "frontend": ["models", "frontend"]}
    for folder, chosen in (("models", "model"), ("frontend", "frontend"), ("loss", "trainfunc")):
        if folder not in concerned.get(finding.cause, ["models"]):
            continue
        declared = plugins.declaration(folder, str(config.get(chosen, "")))
        for key, default in (declared.keys if declared else {}).items():
            plain = isinstance(default, (int, float)) and not isinstance(default, bool)
            value = number(config, key, math.nan)
            if plain and (abs(value) > 1e4 or (value <= 1e-12 and "eps" in key)) and key not in FIXED:
                trials.append({key: 1e-5 if "eps" in key else 1.0})
            if plain and key in config and config[key] != default and case.replay.fits({key: default}):
                trials.append({key: default})
    if isinstance(config.get("margin"), (int, float)) and finding.cause == "loss" and config["margin"] > 0.1:
        trials.append({"margin": 0.1})
    fixes = []
    for change in trials:
        ((key, value),) = change.items()
        text = f"set {key} to {shown(value)} (now {shown(config[key])})"
        fixes.append(lasting(case, attempt(case, text, "set", change, settings=change)))
    return fixes


def lasting(case, fix: dict) -> dict:
    """Refute a verified setting if one of the following steps fails with it."""
    try:
        if fix["verdict"] == "verified" and not survives(case, fix["change"]):
            fix.update(verdict="refuted", outcome=FAILS_LATER)
    except OutOfTime:
        fix["outcome"] += NOT_TRIED
    return fix


def for_precision(case, finding) -> list[dict]:
    """Try bfloat16, a change of the line, and settings of plug-ins."""
    fixes = []
    if case.dump["amp_dtype"] == "float16":
        fixes.append(attempt(case, "compute in bfloat16", "set", {"amp_dtype": "bfloat16"}, dtype="bfloat16"))
    fixes += changes_of_code(case, finding, CodeSearch)
    if finding.module and not any(fix["verdict"] == "verified" and fix["action"] == "fix_code" for fix in fixes):
        island = attempt(case, "", "fix_code", None, islands=(finding.module,))
        if island["verdict"] == "verified":
            how = "torch.autocast(.., enabled=False) around it, .float() on its input"
            text = f"compute {finding.module} in float32: {how}"
            outcome = f"{island['outcome']}; tried in the replay, not as a change of the source"
            fixes = [fix for fix in fixes if fix["action"] != "fix_code"]
            fixes.append(recommendation(f"{finding.source}: {text}", "fix_code", None, None, outcome))
    return [*fixes, *settings_of_plugins(case, finding)]


def for_state(case, finding) -> list[dict]:
    """Try the weights of a checkpoint, or the bad tensors restored."""
    fixes = []
    if finding.detail == "teacher_weight":
        path = finding.files[0]["path"]
        text, verdict = f"run the same command again: it loads the teacher anew from {path}", None
        if case.replay is not None:
            verdict = case.base.finite
        outcome = case.refusal or f"with the weights of that file: {case.base}"
        return [recommendation(text, "restore", {"teacher_checkpoint": path}, verdict, outcome)]
    if finding.detail == "scaler":
        outcome = case.replay.run(scale=1.0) if case.replay else None
        text = "resume from the last checkpoint with a loss scale above 0"
        verdict = None if outcome is None else outcome.finite
        return [recommendation(text, "restore", {"scaler_scale": 65536.0}, verdict, f"with scale 1: {outcome}")]
    retraining = case.retraining
    if retraining is not None and retraining.checkpoint:
        path, weights = retraining.checkpoint, retraining.weights
        text, change = f"start from {path} (initial_model)", {"initial_model": str(path)}

        def older(network):
            case.replay.load(network, weights, strict=False)

        fixes.append(attempt(case, text, "restore", change, edit=older))
    if case.replay is None:
        text = f"restore '{finding.parameter}' from a sound checkpoint"
        return [*fixes, recommendation(text, "restore", {"tensor": finding.parameter}, None, case.refusal)]
    if finding.detail == "optimizer_moment":
        weights = [n for n in case.bad_state if not n.startswith("optimizer.")]
        also = f" and restore {', '.join(weights[:3])}" if weights else ""
        text = f"reset the optimizer's moments{also}: '{finding.parameter}' makes every update NaN or Inf"
        change = {"tensor": finding.parameter}
        if weights:
            return [*fixes, attempt(case, text, "restore", change, edit=repaired(case, weights))]
        outcome = f"not testable: the step before the update does not read it ({case.base})"
        return [*fixes, recommendation(text, "restore", change, None, outcome)]
    if finding.detail == "negative_moment":
        text = f"reset the moment '{finding.parameter}', or start from another checkpoint"
        change = {"tensor": finding.parameter}
        return [*fixes, attempt(case, text, "restore", change, moments=positive_moments)]
    names = [finding.parameter] if finding.detail in ("outlier", "negative_variance") else case.bad_state
    repair = repaired(case, names)
    text = f"restore {', '.join(repr(n) for n in names[:3])}{', ...' if len(names) > 3 else ''} from a sound checkpoint"
    return [*fixes, attempt(case, text, "restore", {"tensor": finding.parameter}, edit=repair)]


def for_optimizer(case, finding) -> list[dict]:
    """Try the setting that the fault depends on, by retraining."""
    config, setting = case.config, finding.setting
    if setting != "schedule" and case.replay is not None and case.base.by_update:
        return for_update_of_dump(case, finding)
    if setting == "schedule":
        retraining = case.retraining
        fixes = for_schedule(case, finding)
        other = {"scheduler": "cosine" if config.get("scheduler") != "cosine" else "steplr"}
        text = f"set scheduler to {other['scheduler']} (now {config.get('scheduler')})"
        if retraining is None:
            return [*fixes, recommendation(text, "set", other, None, case.refusal)]
        trajectory = retraining.train(**other)
        now = retraining.train(scheduler=config["scheduler"])
        outcome = f"retrained with it: {trajectory}; with the present one: {now}"
        return [*fixes, recommendation(text, "set", other, trajectory.sound, outcome)]
    if setting is None:
        return for_update(case, finding)
    retraining = case.retraining
    if retraining is None:
        text = f"set {setting} to an ordinary value"
        return [recommendation(text, "set", {setting: 1e-8} if setting == "eps" else None, None, case.refusal)]
    if setting == "eps":
        changes = [{"eps": 1e-8}]
    elif setting == "momentum":
        changes = [{"momentum": 0.9}]
    elif setting == "weight_decay":
        changes = [{"weight_decay": 5e-5}]
    else:
        lr = min(retraining.learning_rate(), number(config, "lr", math.inf))
        changes = [{"lr": float(f"{lr * f:.3g}")} for f in (0.1, 0.01)] + ([{"lr": 0.001}] if lr > 0.001 else [])
    fixes, control = [], retraining.train()
    for change in changes:
        trajectory = retraining.train(**change)
        ((key, value),) = change.items()
        text = f"set {key} to {value:g} (now {shown(config.get(key))})"
        verdict = trajectory.sound if not control.sound else None
        outcome = f"retrained from {retraining.start}: {trajectory}; unchanged: {control}"
        fixes.append(recommendation(text, "set", change, verdict, outcome))
        if trajectory.sound:
            break
    return fixes if any(f["verdict"] == "verified" for f in fixes) else fixes + for_update(case, finding)


def for_schedule(case, finding) -> list[dict]:
    """Try the schedule's settings that are 0 at 1, and changes of its code; without one, say what it must return."""
    fixes = []
    for key, outcome in zero_settings(case).items():
        fixes.append(recommendation(f"set {key} to 1 (now 0)", "set", {key: 1}, True, outcome))
    found = schedule_fix(case)
    if found is not None:
        text = f"{finding.source}: {'; '.join(dict.fromkeys(found.words))}"
        return [*fixes, recommendation(text, "fix_code", {"diff": found.patch.diff()}, True, found.outcome)]
    text = f"{finding.source}: return a finite, smaller learning rate"
    outcome = "no change of its code is known that keeps the other rates"
    return [*fixes, recommendation(text, "fix_code", None, None, outcome)]


def for_update_of_dump(case, finding) -> list[dict]:
    """Try options of the optimizer, a change of its line, and another optimizer on the dump's own update."""
    fixes = []
    for change in sound_update_settings(case):
        ((key, value),) = change.items()
        text = f"set {key} to {value:g} (now {shown(case.config.get(key))})"
        fixes.append(attempt(case, text, "set", change, settings=change))
    fixes += changes_of_code(case, finding, UpdateSearch, case.update_site)
    other = {"optimizer": "adamw" if case.config.get("optimizer") != "adamw" else "sgd"}
    return [*fixes, attempt(case, f"set optimizer to {other['optimizer']}", "set", other, settings=other)]


def for_update(case, finding) -> list[dict]:
    """Try a change of the optimizer's line, or another optimizer, by retraining."""
    retraining = case.retraining
    fixes = changes_of_code(case, finding, RetrainingSearch, retraining.train().record)
    other = {"optimizer": "adamw" if case.config.get("optimizer") != "adamw" else "sgd"}
    trajectory = retraining.train(**other)
    outcome = f"retrained from {retraining.start}: {trajectory}"
    return [*fixes, recommendation(f"set optimizer to {other['optimizer']}", "set", other, trajectory.sound, outcome)]


def for_environment(case, finding) -> list[dict]:
    """Recommend to change nothing in code or data."""
    if finding.detail == "injected":
        verdict, outcome = (None, case.refusal) if case.replay is None else (True, f"without it: {case.base}")
        return [recommendation(REHEARSAL, "set", {"nan_inject": ""}, verdict, outcome)]
    if finding.detail == "compiled":
        outcome = f"replayed, which compiles nothing: {case.base}"
        return [recommendation("compute as the source says", "set", {"compile_model": "off"}, None, outcome)]
    text = "change nothing; if it recurs, test this machine's memory and disk"
    if finding.cause == "distributed":
        text = "change nothing here; read the dump of the rank that sent the gradient"
    if finding.detail == "nondeterministic":
        text = "draw from the generators of torch, numpy and Python alone, and fill what torch.empty gives"
    if case.replay is None or not case.base.finite:
        return [recommendation(text, "none", None, None, case.refusal or "see the evidence")]
    return [recommendation(text, "none", None, None, f"replayed unchanged: {case.base}; that proves no fix")]


CAUSES = {
    "input": for_input,
    "augmentation": for_augmentation,
    "label": for_label,
    **dict.fromkeys(("frontend", "model_forward", "model_backward", "loss"), for_code),
    "precision": for_precision,
    "optimizer": for_optimizer,
    "state": for_state,
    "distributed": for_environment,
    "environment": for_environment,
}
