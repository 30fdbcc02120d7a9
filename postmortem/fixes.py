"""Try each fix on the dump before recommending it: one change, the same batch, and what came of it."""

import math

import torch

from corpus.audio import AudioError
from corpus.crop import Crop
from postmortem.patches import Casts, LineBound, LineGuard
from postmortem.replay import ReplayError
from postmortem.state_faults import repaired, sound_update_settings
from settings import plugins
from storage.dump import rows_of
from storage.dump_statistics import number
from utils import total_norm

COUNTS = ("nOut", "nClasses", "nPerSpeaker")
LINES = 4  # source lines that are guarded together
FOLLOWING_STEPS = 5  # more steps that a changed setting must survive, of the batch it was tried on


def recommendation(text, action, change, verdict, outcome) -> dict:
    """A recommendation, as ``--json`` prints it."""
    verdict = {True: "verified", False: "refuted", None: "untested"}[verdict]
    return {"text": text, "action": action, "change": change, "verdict": verdict, "outcome": outcome}


def recommendations(case, finding) -> list[dict]:
    """Every fix that fits the cause, and the guide's four quick fixes: verified first, the smallest change first."""
    found = CAUSES.get(finding.cause, lambda case, finding: [])(case, finding)
    if finding.detail == "code_changed":
        return [
            recommendation("go on with the code as it is now", "none", None, True, f"the step with it: {case.base}")
        ]
    seed = quick_fixes(case, finding) if case.dump.get("reason", "data_error") != "data_error" else []
    present = {_key(r) for r in found}
    found += [r for r in seed if _key(r) not in present]
    size = {"exclude_file": 0, "restore": 1, "set": 2, "fix_code": 3, "none": 4}
    rank = {"verified": 0, "untested": 1, "refuted": 2}
    return sorted(found, key=lambda r: (rank[r["verdict"]], r.get("order", size[r["action"]])))


def _key(rec):
    return (rec["action"], repr(rec["change"]))


def attempt(case, text, action, change, always: bool = False, **how) -> dict:
    """Replay the step with one change and say what came of it; ``always``, whatever time is left."""
    if case.replay is None:
        return recommendation(text, action, change, None, case.refusal)
    if case.base.finite:
        return recommendation(text, action, change, None, "the replayed step is finite without it")
    if case.time_left() < 0 and not always:
        return recommendation(text, action, change, None, "the time for trials was used up (--seconds)")
    try:
        outcome = case.replay.run(**how)
    except ReplayError as error:
        return recommendation(text, action, change, None, str(error))
    return recommendation(text, action, change, outcome.finite, f"the step with it: {outcome}")


# ------------------------------------------------------------------------------------------------- the guide's four


def quick_fixes(case, finding) -> list[dict]:
    """Lower lr, lower scale, mixed precision off, harder clipping: tried in every replayed report."""
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
        outcome = f"it is off already: the step was computed in float32 ({case.base})"
        fixes.append(recommendation("switch mixed precision off", "set", {"mixedprec": False}, False, outcome))
    elif case.dump["amp_dtype"] != "float32":
        fixes.append(attempt(case, "switch mixed precision off", "set", {"mixedprec": False}, dtype="float32"))
    clip = number(config, "grad_clip")
    harder = 1.0 if not clip or clip > 1.0 else clip / 5
    text = f"clip gradients harder, at {harder:g} (now {clip:g})"
    fixes.append(try_update_setting(case, finding, text, {"grad_clip": harder}, "grad_clip"))
    return fixes


def try_update_setting(case, finding, text, change, key) -> dict:
    """A fix of the update: for an optimizer fault tried by taking the steps again, else it cannot reach this step."""
    if case.replay is None:
        return recommendation(text, "set", change, None, case.refusal)
    if case.base.nonfinite_after_update:
        return attempt(case, text, "set", change, settings=change)
    if finding.cause == "optimizer":
        retraining = case.retraining
        if retraining is None or retraining.train().sound:
            return recommendation(
                text, "set", change, None, case.refusal or "the steps do not run away in the retraining"
            )
        tried = (
            {**change, "lr": retraining.learning_rate() * change["lr"] / float(case.config.get("lr") or 1)}
            if key == "lr"
            else change
        )
        trajectory = retraining.train(**tried)
        return recommendation(text, "set", change, trajectory.sound, f"steps from {retraining.start}: {trajectory}")
    if case.base.finite:
        return recommendation(text, "set", change, None, "the replayed step is finite without it")
    step = case.repeated  # neither of these settings is read before the update
    if step.error:
        return recommendation(text, "set", change, False, f"never read: the step raises {step.error}")
    clipped = "clipping only spreads what is not finite, and " if key == "grad_clip" else ""
    outcome = f"{clipped}the step fails before the update that reads it: {step}"
    return recommendation(text, "set", change, False, outcome)


# ------------------------------------------------------------------------------------------------------- by cause


def for_input(case, finding) -> list[dict]:
    """Take the file out of the list; or, for a level that is absurd, scale it."""
    fixes = []
    left = [c for c in range(len(case.label())) if c not in finding.columns]
    paths = list(dict.fromkeys(f["path"] for f in finding.files))
    if paths:
        places = "; ".join(f"{path}: {excluded(case, path)}" for path in paths)
        text, change = f"take out or repair {places}", {"file": paths[0]} if len(paths) == 1 else {"files": paths}
        if case.dump.get("reason") == "data_error":
            outcome = "the run did so for this crop and the step was taken"
            fixes.append(recommendation(text, "exclude_file", change, True, outcome))
        elif case.replay is None and case.bad_rows():
            clean = not set(case.bad_rows()) - set(finding.rows)
            outcome = f"{case.refusal}; without it the other rows are finite" if clean else case.refusal
            fixes.append(recommendation(text, "exclude_file", change, None, outcome))
        elif len(left) < 2:
            sound = torch.nan_to_num(case.replay.data, nan=0.0, posinf=0.0, neginf=0.0)
            fixes.append(attempt(case, text, "exclude_file", change, data=sound))
            fixes[-1]["outcome"] = f"no two rows are left; with the bad samples at zero, {fixes[-1]['outcome']}"
        else:
            fixes.append(attempt(case, text, "exclude_file", change, columns=left))
            note_another_fault(case, finding, fixes[-1], left)
    if case.dump.get("injected") == "data":
        for fix in fixes:
            fix.update(verdict="refuted", outcome="the file is sound: nan_inject put it there")
        fixes.append(without_injection(case, finding))
    if finding.detail == "amplitude" and case.replay is not None:
        flat = rows_of(case.dump["data"]).float().clone()
        flat[finding.rows] *= 0.5 / flat[finding.rows].abs().amax(dim=1, keepdim=True)
        text = "scale the file to a peak below 1"
        fixes.append(attempt(case, text, "none", None, data=flat.view_as(case.replay.data)))
    return fixes


def note_another_fault(case, finding, fix, left):
    """A batch that is sound without its bad samples and then fails under autocast alone has another fault as well."""
    if fix["verdict"] == "refuted" and case.bad_rows() and not set(case.bad_rows()) - set(finding.rows):
        exact = case.replay.run(columns=left, dtype="float32")
        if exact.finite:
            dtype, other = case.dump["amp_dtype"], fix["outcome"]
            fix["verdict"] = "verified"
            fix["outcome"] = (
                f"the batch is sound without it ({exact} in float32); another fault waits in {dtype}: {other}"
            )


def excluded(case, path) -> str:
    """The list line to remove, in words."""
    listing = case.config.get("train_list", "the training list")
    entries = [entry for info in case.files for entry in (info, *info.get("replaced", []))]
    line = next((entry.get("line") for entry in entries if entry["path"] == path), None)
    return f"remove line {line} of {listing}" if line is not None else f"remove it from {listing}"


def without_injection(case, finding) -> dict:
    """Try the batch without the NaN that nan_inject wrote into it."""
    text = "take nan_inject out: this was a rehearsal"
    flat = rows_of(case.dump["data"]).float().clone()
    flat[finding.rows] = torch.nan_to_num(flat[finding.rows], nan=0.0, posinf=0.0, neginf=0.0)
    if case.replay is None:
        return recommendation(text, "set", {"nan_inject": ""}, None, case.refusal)
    return attempt(case, text, "set", {"nan_inject": ""}, data=flat.view_as(case.replay.data))


def for_augmentation(case, finding) -> list[dict]:
    """Take the impulse responses and noise files out: the rows made again without them."""
    paths = list(dict.fromkeys(f["path"] for f in finding.files))
    text = f"take out of its folder, or repair: {', '.join(paths)}"
    change = {"file": paths[0]} if len(paths) == 1 else {"files": paths}
    if case.dump.get("reason") == "data_error":
        outcome = "the run left it out of this crop and the step was taken"
        return [recommendation(text, "exclude_file", change, True, outcome)]
    if case.replay is None:
        return [recommendation(text, "exclude_file", change, None, case.refusal)]
    flat = rows_of(case.dump["data"]).float().clone()
    for row in finding.rows:
        info = case.files[row]
        kept = [d for d in info.get("augment", []) if d.get("path") not in paths]
        try:
            flat[row] = torch.from_numpy(Crop.from_dict({**info, "augment": kept}).load(flat.shape[1])[1])
        except (AudioError, OSError, KeyError, ValueError) as error:
            return [recommendation(text, "exclude_file", change, None, f"row {row} cannot be made again: {error}")]
    return [attempt(case, text, "exclude_file", change, data=flat.view_as(case.replay.data))]


def for_label(case, finding) -> list[dict]:
    """Correct the list, or the number of classes."""
    fixes = []
    left = [c for c in range(len(case.label())) if c not in finding.columns]
    if case.dump.get("injected") == "label":
        text = "take nan_inject out: this was a rehearsal"
        label = case.label().clone()
        label[finding.columns] = 0
        fixes.append(attempt(case, text, "set", {"nan_inject": ""}, label=label))
    worst = max(int(v) for v in case.label()[finding.columns])
    if case.dump.get("injected") != "label" and (case.classes or 0) <= worst < 10 * (case.classes or 10) + 1000:
        change = {"nClasses": worst + 1}
        text = f"nClasses must match the data set: {worst + 1} or more (now {case.classes}); 0 counts the train list"
        fixes.append(attempt(case, text, "set", change, settings=change))
    for path in dict.fromkeys(f["path"] for f in finding.files if case.dump.get("injected") != "label"):
        text = f"correct the speaker of {path}, or {excluded(case, path)}"
        if len(left) > 1:
            fixes.append(attempt(case, text, "exclude_file", {"file": path}, columns=left))
        else:
            fixes.append(recommendation(text, "exclude_file", {"file": path}, None, "no two rows would be left"))
    return fixes


def for_code(case, finding) -> list[dict]:
    """Guard the operation where it stands; or a setting of the plug-in that keeps it in bounds."""
    fixes = guard_lines(case, finding, finding.source) if finding.source else []
    if "silence" in finding.detail and finding.columns:
        fixes += for_input(case, finding)
    return [*fixes, *settings_of_plugins(case, finding)]


def guard_lines(case, finding, source: str) -> list[dict]:
    """Guard a line, and while another fails then, that one too; else bound what the first line gives."""
    guards = []
    while source and len(guards) < LINES and source not in [g.source for g in guards]:
        guards.append(LineGuard(source))
        fix = attempt(case, "", "fix_code", {"source": finding.source}, always=True, modes=list(guards))
        applied = [g for g in guards if g.applied]
        if fix["verdict"] == "verified" and applied:
            fix["text"] = "; ".join(f"{g.source}: {', '.join(g.applied)}" for g in applied)
            return [fix]
        source = case.next_bad_line(guards)
    bound = LineBound(finding.source)
    text = f"{finding.source}: keep what this line returns within bounds: mask where {finding.op} is not defined"
    fix = attempt(case, text, "fix_code", {"source": finding.source}, always=True, modes=[bound])
    if fix["verdict"] == "refuted" or bound.share > 0.5:  # a result that is mostly bad is replaced, not guarded
        tried = (
            f"a guard of {finding.op} does not cure it, or cannot be set there; bounding its result: {fix['outcome']}"
        )
        fix.update(verdict="untested", outcome=tried)
    return [fix]


def settings_of_plugins(case, finding) -> list[dict]:
    """Settings of model and loss that are not their defaults, at their defaults; margin and scale at the guide's."""
    trials, config = [], case.config
    concerned = {"loss": ["loss"], "precision": ["models", "loss"]}.get(finding.cause, ["models"])
    for folder, chosen in (("models", "model"), ("loss", "trainfunc")):
        if folder not in concerned:
            continue
        declared = plugins.declaration(folder, str(config.get(chosen, "")))
        for key, default in (declared.keys if declared else {}).items():
            plain = isinstance(default, (int, float)) and not isinstance(default, bool)
            value = number(config, key, math.nan)
            if plain and (abs(value) > 1e4 or (value <= 1e-12 and "eps" in key)) and key not in COUNTS:
                trials.append({key: 1e-5 if "eps" in key else 1.0})
            if plain and key in config and config[key] != default and case.replay.fits({key: default}):
                trials.append({key: default})
    if isinstance(config.get("margin"), (int, float)) and finding.cause == "loss" and config["margin"] > 0.1:
        trials.append({"margin": 0.1})
    fixes = []
    for change in trials:
        ((key, value),) = change.items()
        text = f"{key}: {value} (now {config[key]})"
        fixes.append(lasting(case, attempt(case, text, "set", change, settings=change)))
    return fixes


def lasting(case, fix: dict) -> dict:
    """Refute a verified setting with which one of the next steps fails."""
    if fix["verdict"] == "verified" and not survives(case, fix["change"]):
        fix.update(verdict="refuted", outcome="this step is finite with it, one of the next with the same batch is not")
    return fix


def survives(case, change: dict) -> bool:
    """Whether plain gradient steps with a changed setting, from the dump's weights, stay finite on the batch."""
    weights = {}

    def start(network):
        if weights:
            network.load_state_dict(weights)

    def descend(network):
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        factor = 0.01 / max(1.0, float(total_norm(gradients)))
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter -= factor * parameter.grad
        weights.update({name: tensor.clone() for name, tensor in network.state_dict().items()})

    return all(case.replay.run(settings=change, edit=start, after=descend).finite for _ in range(FOLLOWING_STEPS))


def for_precision(case, finding) -> list[dict]:
    """Another type, one module in fp32, or a smaller scale."""
    fixes = []
    if case.dump["amp_dtype"] == "float16":
        fixes.append(attempt(case, "compute in bfloat16", "set", {"amp_dtype": "bfloat16"}, dtype="bfloat16"))
    if finding.module:
        text = (
            f"{finding.source or finding.module}: compute {finding.module} in float32 (torch.autocast(enabled=False))"
        )
        fixes.append(attempt(case, text, "fix_code", {"source": finding.source}, islands=(finding.module,)))
    if finding.source:
        guard = LineGuard(finding.source)
        fix = attempt(case, "", "fix_code", {"source": finding.source, "guard": True}, modes=[guard])
        if guard.applied and fix["verdict"] == "verified":
            fix["text"] = f"{finding.source}: {'; '.join(guard.applied)}"
            fixes.append(fix)
    if not any(f["verdict"] == "verified" for f in fixes) and finding.source:
        text = f"{finding.source}: take out the cast to 16 bit"
        change = {"source": finding.source}
        fixes.append(attempt(case, text, "fix_code", change, dtype="float32", modes=[Casts(torch.float32)]))
    return [*fixes, *settings_of_plugins(case, finding)]


def for_state(case, finding) -> list[dict]:
    """Go back to a checkpoint, or repair what is bad in place."""
    fixes = []
    if finding.detail == "scaler":
        outcome = case.replay.run(scale=1.0) if case.replay else None
        text = "start again from the last checkpoint with a loss scale above 0"
        verdict = None if outcome is None else outcome.finite
        return [recommendation(text, "restore", {"scaler_scale": 65536.0}, verdict, f"with scale 1: {outcome}")]
    retraining = case.retraining
    if retraining is not None and retraining.checkpoint:
        path, weights = retraining.checkpoint, retraining.weights
        text, change = f"go on from {path}", {"initial_model": str(path)}

        def older(network):
            case.replay.load(network, weights, strict=False)

        fixes.append(attempt(case, text, "restore", change, edit=older))
    if case.replay is None:
        text = f"restore '{finding.parameter}' from a sound checkpoint"
        return [*fixes, recommendation(text, "restore", {"tensor": finding.parameter}, None, case.refusal)]
    if finding.detail == "optimizer_moment":
        weights = [n for n in case.bad_state if not n.startswith("optimizer.")]
        also = f" and restore {', '.join(weights[:3])}" if weights else ""
        text, change = (
            f"reset the optimizer's moments{also}: '{finding.parameter}' spoils every update",
            {"tensor": finding.parameter},
        )
        if weights:
            return [*fixes, attempt(case, text, "restore", change, edit=repaired(case, weights))]
        return [
            *fixes,
            recommendation(text, "restore", change, None, f"the next update reads it, not this step: {case.base}"),
        ]
    names = [finding.parameter] if finding.detail in ("outlier", "negative_variance") else case.bad_state
    repair = repaired(case, names)
    text = f"restore {', '.join(repr(n) for n in names[:3])}{', ...' if len(names) > 3 else ''} from a sound checkpoint"
    return [*fixes, attempt(case, text, "restore", {"tensor": finding.parameter}, edit=repair)]


def for_optimizer(case, finding) -> list[dict]:
    """The setting that the fault hangs on, tried by taking the steps again."""
    config, setting = case.config, finding.setting
    if case.replay is not None and case.base.nonfinite_after_update:
        return for_spoiled_update(case, finding)
    if setting == "schedule":
        text = f"{finding.source}: the schedule returns a learning rate that is not finite; choose another or mend it"
        retraining = case.retraining
        trajectory = retraining.train() if retraining else None
        verdict = None if trajectory is None else trajectory.sound
        rate = f"{retraining.learning_rate():g}" if retraining else "the last finite one"
        change = {"source": finding.source}
        fixes = [recommendation(text, "fix_code", change, verdict, f"steps with lr {rate} throughout: {trajectory}")]
        change = {"scheduler": "cosine" if config.get("scheduler") != "cosine" else "steplr"}
        text = f"choose another schedule: {change['scheduler']} (now {config.get('scheduler')})"
        if retraining is None:
            return [*fixes, recommendation(text, "set", change, None, case.refusal)]
        trajectory = retraining.train(**change)
        now = retraining.train(scheduler=config["scheduler"])
        outcome = f"steps along it: {trajectory}; along the present one: {now}"
        return [*fixes, recommendation(text, "set", change, trajectory.sound, outcome)]
    if setting is None:
        return for_update(case, finding)
    retraining = case.retraining
    if retraining is None:
        text = f"set {setting} back to an ordinary value"
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
        text = f"{key}: {value:g} (now {config.get(key)})"
        verdict = trajectory.sound if not control.sound else None
        outcome = f"steps from {retraining.start}: {trajectory}; as it was: {control}"
        fixes.append(recommendation(text, "set", change, verdict, outcome))
        if trajectory.sound:
            break
    return fixes if any(f["verdict"] == "verified" for f in fixes) else fixes + for_update(case, finding)


def for_spoiled_update(case, finding) -> list[dict]:
    """Options of the optimizer, its line, and another optimizer, each tried on the dump's own update."""
    fixes = []
    for change in sound_update_settings(case):
        ((key, value),) = change.items()
        fixes.append(attempt(case, f"{key}: {value:g} (now {case.config.get(key)})", "set", change, settings=change))
    guard = LineGuard(finding.source or "")
    outcome = case.replay.run(around=guard)
    if guard.applied:
        text, change = f"{finding.source}: {', '.join(guard.applied)}", {"source": finding.source}
        fixes.append(recommendation(text, "fix_code", change, outcome.finite, f"the step with it: {outcome}"))
    other = {"optimizer": "adamw" if case.config.get("optimizer") != "adamw" else "sgd"}
    return [*fixes, attempt(case, f"optimizer: {other['optimizer']}", "set", other, settings=other)]


def for_update(case, finding) -> list[dict]:
    """An optimizer whose own code makes NaN: guard its line, or take another."""
    retraining, change = case.retraining, {"source": finding.source}
    guard = LineGuard(finding.source or "")
    trajectory = retraining.train(guard)
    text = f"{finding.source}: {', '.join(guard.applied) or f'mend {finding.op or chr(39) + chr(39)}'}"
    fixes = [
        recommendation(
            text, "fix_code", change, trajectory.sound or None, f"steps from {retraining.start}: {trajectory}"
        )
    ]
    other = {"optimizer": "adamw" if case.config.get("optimizer") != "adamw" else "sgd"}
    trajectory = retraining.train(**other)
    outcome = f"steps from {retraining.start}: {trajectory}"
    return [*fixes, recommendation(f"optimizer: {other['optimizer']}", "set", other, trajectory.sound, outcome)]


def for_environment(case, finding) -> list[dict]:
    """Nothing to change in code or data."""
    if finding.detail == "injected" and case.replay is not None:
        outcome = f"the step without it: {case.base}"
        return [recommendation("take nan_inject out: this was a rehearsal", "set", {"nan_inject": ""}, True, outcome)]
    text = "go on: nothing to change; if it happens again, check memory, disk and the loader's processes"
    if case.replay is None or not case.base.finite:
        return [recommendation(text, "none", None, None, case.refusal or "see the evidence")]
    return [recommendation(text, "none", None, True, f"the same step, unchanged, replayed: {case.base}")]


CAUSES = {
    **{"input": for_input, "augmentation": for_augmentation, "label": for_label, "precision": for_precision},
    **dict.fromkeys(("frontend", "model_forward", "model_backward", "loss"), for_code),
    **{"state": for_state, "optimizer": for_optimizer},
    **dict.fromkeys(("environment", "distributed"), for_environment),
}
