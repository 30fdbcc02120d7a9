"""Faults that do not depend on the batch: bad weights, buffers, moments or scaler, and updates that diverge."""

import math
import re

import torch

from errors import plural
from postmortem.finding import Finding, detail_of, first_result, result_of
from postmortem.retraining import DIVERGED_GROWTH, DIVERGENT_GROWTH
from postmortem.schedule_fixes import refusal_of
from storage.dump_statistics import SETTINGS, number


def bad_state_before_step(case):
    """Check for a weight, buffer or moment that was not finite before the step."""
    names = case.bad_state
    if not case.dump.get("format_version"):
        return None
    update = update_at_fault(case, names)
    if update is not None or not names:
        return update
    weights = [n for n in names if not n.startswith("optimizer.")]
    tried = case.replay is not None and not case.base.finite  # the step that failed reads no moments
    if tried and not (weights and case.replay.run(edit=repaired(case, weights)).finite):
        case.evidence.append(f"NaN or Inf before the step, but not the cause: {', '.join(names[:5])}")
        return None
    moments = [n for n in names if n.startswith("optimizer.")]
    # A bad moment makes its weight bad. A bad weight makes no moment bad, for gradients are checked.
    name = (moments or weights)[0]
    kind = "optimizer moment"
    if not moments:
        kind = "weight" if name in (case.dump.get("param_stats") or {}) else "buffer"
    listing = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    text = f"The {kind} '{name}' was NaN or Inf before this step. The batch is not at fault."
    evidence = [f"{plural(len(names), 'state tensor')} with NaN or Inf before the step: {listing}"]
    return Finding("state", kind.replace(" ", "_"), text, evidence, phase="state", parameter=name)


def repaired(case, names):
    """Return an edit of a network that sets the named tensors to their values at the start of the run."""
    initial = case.retraining.initial_network().state_dict() if case.retraining is not None else {}

    def edit(network):
        own = network.state_dict()
        with torch.no_grad():
            for name in names:
                if name in own:
                    own[name].copy_(initial[name])

    return edit


def bad_scaler(case):
    """Check for a loss scale that is zero or not finite."""
    scale = case.dump.get("scaler_scale", 1.0)
    if case.dump.get("amp_dtype") != "float16" or (scale > 0 and math.isfinite(scale)):
        return None
    text = f"The loss scale is {scale}: no gradient can be computed. The batch is not at fault."
    return Finding("state", "scaler", text, [f"scaler_scale {scale}"], phase="state", parameter="scaler")


def groups_of(case) -> list[dict]:
    """Return the optimizer's parameter groups as saved."""
    return (case.state or {}).get("optimizer_state_dict", {}).get("param_groups", [])


def update_at_fault(case, names) -> Finding | None:
    """Check whether the last updates made the weights bad: a learning rate, eps, or steps that diverge again."""
    groups = groups_of(case)
    rates = [case.dump["lr"], *(number(h, "lr") for h in case.dump["history"]), *(number(g, "lr") for g in groups)]
    source = case.source_of("optimizer")
    wrong = next((r for r in rates if not math.isfinite(r)), None)
    if wrong is not None:
        schedule = case.source_of("scheduler")
        said = refusal_of(case)
        place = re.match(r"scheduler/[^:]+\.py:\d+(?=: )", said)
        schedule = place[0] if place else schedule
        text = f"{schedule} gave a learning rate of {wrong}{at_step(case, wrong)}."
        found = Finding("optimizer", "lr", text, phase="update", source=schedule, parameter="lr", setting="schedule")
        found.evidence += [f"computed again, it says {said}"] if said else []
        return found
    for key in SETTINGS:
        if not all(math.isfinite(number(g, key)) for g in groups):
            text = f"The optimizer's {key} is NaN or Inf: every update makes the weights NaN or Inf."
            return Finding("optimizer", key, text, phase="update", source=source, parameter=key, setting=key)
    if not names or case.state is None:
        return None
    moments = eps_at_zero(case, groups)
    if moments:
        text = f"eps is 0: the update of '{moments}' divides 0 by 0, for part of its gradient has always been 0."
        return Finding("optimizer", "eps", text, phase="update", source=source, parameter=moments, setting="eps")
    if any(not n.startswith("optimizer.") for n in names):
        return divergence(case, math.inf, source)
    return None


def at_step(case, rate: float) -> str:
    """The end of a sentence that says when the run first had a learning rate; '' if neither history nor dump has it."""
    steps = [*case.dump["history"], case.dump]
    found = (s["step"] for s in steps if "step" in s and repr(number(s, "lr")) == repr(float(rate)))
    return next((f" at step {int(step)}" for step in found), "")


SQUARES = ("exp_avg_sq", "square_avg", "sum", "v")  # names of the sums of squared gradients in optimizers


def eps_at_zero(case, groups) -> str:
    """Return a parameter with non-finite elements whose second moment is 0 and whose eps is 0; '' if there is none."""
    optimizer = (case.state or {}).get("optimizer_state_dict", {})
    weights, names = case.state["model_state_dict"], case.dump.get("trainable") or list(case.dump["param_stats"])
    for group in groups:
        if "eps" not in group or number(group, "eps") > 1e-30:
            continue
        for index in group.get("params", []):
            entries = optimizer["state"].get(index, {})
            second = next((entries[key] for key in SQUARES if isinstance(entries.get(key), torch.Tensor)), None)
            weight = weights.get(names[index]) if index < len(names) else None
            if second is None or weight is None or second.shape != weight.shape:
                continue
            wrong = ~weight.isfinite()
            if bool(wrong.any()) and bool((second[wrong] == 0).any()):
                return names[index]
    return ""


def diverged(case):
    """Check for weights that are finite but diverged, so that any batch fails."""
    if case.replay is None or case.bad_state:
        return None
    history = case.dump["history"]
    losses = [h["loss"] for h in history if math.isfinite(h.get("loss", math.nan))]
    retraining = case.retraining
    if retraining is None:
        return None
    growth = retraining.growth()
    rising = len(losses) > 2 and losses[-1] > 20 * max(min(losses), 0.1) and losses[-1] >= 0.2 * max(losses)
    suspicious = growth > DIVERGED_GROWTH or rising
    for group in groups_of(case):
        suspicious |= number(group, "momentum") >= 1 or number(group, "lr") * number(group, "weight_decay") > 1
    if not suspicious or not (growth > HOPELESS_GROWTH or fails_on_noise(case)):
        return None
    return divergence(case, growth, case.source_of("optimizer"))


def fails_on_noise(case) -> bool:
    """Whether the dump's weights also fail on noise at the level of the batch."""
    return not case.replay.run(data=case.noise()).finite


HOPELESS_GROWTH = 1e6  # growth of the weights' norm at which any batch may fail
SETTING_NAMES = {"lr": "learning rate", "weight_decay": "weight decay", "momentum": "momentum"}


def sound_settings(case, retraining) -> dict:
    """Return the configuration keys that an optimizer fault may depend on, each with a sound value."""
    lr, config, groups = retraining.learning_rate(), case.config, groups_of(case)
    decay = max([number(g, "weight_decay") for g in groups], default=0.0)
    momentum = max([number(g, "momentum") for g in groups], default=0.0)
    cures = {}
    if momentum >= 1 and "momentum" in config:
        cures["momentum"] = {"momentum": 0.9}
    if lr * decay > 0.5 and "weight_decay" in config:
        cures["weight_decay"] = {"weight_decay": 5e-5}
    tried = {"lr": lr * 0.1, "lr, hundredth": lr * 0.01, "lr, sound": 0.001}
    cures |= {key: {"lr": rate} for key, rate in tried.items() if rate < lr}
    return cures


def divergence(case, growth: float, source: str) -> Finding | None:
    """Retrain: the optimizer is at fault if the steps diverge as they were and do not with one change."""
    retraining = case.retraining
    if retraining is None:
        return None
    control = retraining.train()
    if control.error or not (control.nonfinite_after_update or control.growth >= DIVERGENT_GROWTH):
        return None  # a step that fails with ordinary weights is not the update's fault
    bad = [n for n in case.bad_state if not n.startswith("optimizer.")]
    few = 2 * len(bad) < len(case.dump["param_stats"]) and control.nonfinite_after_update not in bad
    if bad and few and not retraining.growth_of_finite() >= DIVERGENT_GROWTH:
        return None  # a few bad weights among ordinary ones are not a divergence
    rate = retraining.learning_rate()
    evidence = [f"retrained on this batch from {retraining.start}, lr {rate:g}: {control}"]
    if math.isfinite(growth) and growth > 2:
        evidence.append(f"the dump's weight norm is {growth:.3g} times that of {retraining.start}")
    configured = float(case.config.get("lr") or rate)
    if rate > 2 * configured and retraining.train(lr=configured).sound:
        schedule = case.source_of("scheduler")
        evidence.append(f"the same with the configured lr {configured:g}: {retraining.train(lr=configured)}")
        text = f"{schedule} gave a learning rate of {rate:g}{at_step(case, rate)}; the weights diverge."
        return Finding("optimizer", "lr", text, evidence, phase="update", source=schedule, setting="schedule")
    for key, change in sound_settings(case, retraining).items():
        trajectory = retraining.train(**change)
        if trajectory.sound:
            setting = key.split(",")[0]
            evidence.append(f"the same with {setting} {change[setting]:g}: {trajectory}")
            value = f"{rate if setting == 'lr' else case.config[setting]:g}"
            if setting == "lr" and rate > 2 * configured:
                value += f", which {case.source_of('scheduler')} gave{at_step(case, rate)}; lr is {configured:g}"
            text = f"The {SETTING_NAMES[setting]} ({value}) makes the weights diverge. The batch is not at fault."
            return Finding("optimizer", setting, text, evidence, phase="update", source=source, setting=setting)
    other = {"optimizer": "adamw" if case.config.get("optimizer") != "adamw" else "sgd"}
    if not control.nonfinite_after_update and retraining.train(**other).sound:
        evidence.append(f"the same with {other['optimizer']}: {retraining.train(**other)}")
        text = f"{source} makes the weights diverge; {other['optimizer']} does not."
        return Finding("optimizer", "diverges", text, evidence, phase="update", source=source)
    written = control.record is not None and control.record.constant  # a value from the code, not a computed one
    if written or not control.nonfinite_after_update:
        return None
    return update_itself(control.nonfinite_after_update, control.record, evidence, source)


def update_itself(parameter: str | None, record, evidence, source) -> Finding:
    """Return the finding of an update that makes NaN of finite gradients with any setting: the optimizer's code.

    ``parameter`` is None if the update refuses its numbers. ``record`` is the probe's, of the first operation with a
    non-finite result.
    """
    finding = Finding("optimizer", "update", "", evidence, phase="update", source=source, parameter=parameter)
    if record is not None:
        finding.op, finding.source = record.op or None, record.site.source or source
        finding.detail = detail_of(record)
        finding.evidence.append(first_result(record, finding.source))
    if parameter is None:
        finding.summary = f"{finding.source} (optimizer): {result_of(record) if record is not None else evidence[0]}."
        return finding
    what = f"{result_of(record)}. It" if record is not None else "the update"
    finding.summary = f"{finding.source} (optimizer): {what} makes '{parameter}' NaN or Inf; its gradient is finite."
    return finding


HALF_TINY = 6e-8  # float16 rounds what is smaller to 0


def negative_moment(case):
    """Check for a sum of squared gradients below zero, whose root is NaN: a bad restore, or a wrong plug-in."""
    if case.replay is None or not case.base.by_update:
        return None
    for index, entries in case.state.get("optimizer_state_dict", {}).get("state", {}).items():
        for key in (*SQUARES, "max_exp_avg_sq"):
            tensor = entries.get(key)
            if not isinstance(tensor, torch.Tensor) or not bool((tensor < 0).any()):
                continue
            if not case.replay.run(moments=positive_moments).finite:
                return None
            name, worst = f"optimizer.{index}.{key}", float(tensor.min())
            text = f"The optimizer moment '{name}' has the value {worst:.4g}: a sum of squares cannot be negative."
            evidence = [f"with {plural(int((tensor < 0).sum()), 'element')} of it set to 0 the update is finite"]
            return Finding("state", "negative_moment", text, evidence, phase="state", parameter=name)
    return None


def positive_moments(optimizer):
    """Set the negative elements of an optimizer's sums of squares to 0."""
    for entries in optimizer.state.values():
        for key in (*SQUARES, "max_exp_avg_sq"):
            if isinstance(entries.get(key), torch.Tensor):
                entries[key] = entries[key].clamp(min=0)


def nonfinite_update(case):
    """Check for an update of this step that makes a weight or a moment non-finite; the trainer undid it."""
    if case.replay is None or not case.base.by_update:
        return None
    source = case.source_of("optimizer")
    finding = update_itself(
        case.base.nonfinite_after_update or None, case.update_site, [f"replayed with its update: {case.base}"], source
    )
    for change in sound_update_settings(case):
        if case.replay.run(settings=change).finite:
            finding.setting = next(iter(change))
            finding.evidence.append(f"with {finding.setting} {change[finding.setting]:g} the same update is finite")
            break
    return finding


def sound_update_settings(case) -> list[dict]:
    """Return options of the optimizer that may make its update fail, each with a sound value: one change each."""
    groups, config = groups_of(case), case.config
    keys = [key for key in ("eps", "weight_decay", "momentum") if case.built or key in config]
    given = [key for key in keys if any(key in group for group in groups)]
    worst = {key: max(number(g, key) for g in groups) for key in given if key != "eps"}
    cures = []
    smallest = min([number(g, "eps") for g in groups if "eps" in given], default=math.inf)
    if smallest < 1e-12:
        cures.append({"eps": 1e-8})
    elif smallest < HALF_TINY and any(t.dtype is torch.float16 for t in case.state["model_state_dict"].values()):
        cures.append({"eps": 1e-4})
    if worst.get("momentum", 0) >= 1:
        cures.append({"momentum": 0.9})
    if worst.get("weight_decay", 0) * case.dump["lr"] > 0.5:
        cures.append({"weight_decay": 5e-5})
    lr = number(config, "lr") or case.dump["lr"]
    return cures + [{"lr": float(f"{lr * factor:.3g}")} for factor in (0.1, 0.01)]


def set_elements(name: str, where, value: float):
    """Return an edit of a network that sets the elements of a tensor that ``where`` marks to a value."""

    def edit(network):
        with torch.no_grad():
            network.state_dict()[name][where] = value

    return edit


def outlier(case):
    """Check for a weight or buffer with a few elements far above all others: a flipped bit, a bad restore."""
    if case.replay is None:
        return None
    for name, tensor in case.state["model_state_dict"].items():
        if not tensor.is_floating_point() or tensor.numel() < 8:
            continue
        size = tensor.abs().float().flatten()
        usual, largest = float(size.median()), float(size.max())
        few = size > max(1e4 * usual, 1e3)
        if not usual > 0 or not 1e4 <= largest < math.inf or not 0 < int(few.sum()) <= max(2, tensor.numel() // 100):
            continue

        if case.replay.run(edit=set_elements(name, few.view(tensor.shape), usual)).finite:
            places = few.nonzero().flatten().tolist()
            text = f"'{name}' has an element of {largest:.3g}; the others are about {usual:.3g}. No update does that."
            changed = f"{plural(len(places), 'element')} of '{name}' (at {places[:5]})"
            evidence = [f"with {changed} set to {usual:.3g} the step is finite"]
            return Finding("state", "outlier", text, evidence, phase="state", parameter=name)
    return None


def impossible_statistic(case):
    """Check for a BatchNorm variance below zero; its square root is NaN."""
    if case.replay is None:
        return None
    for name, tensor in case.state["model_state_dict"].items():
        if not name.endswith("running_var") or tensor.is_complex():
            continue
        wrong = tensor < 0
        if not bool(wrong.any()):
            continue
        if case.replay.run(edit=set_elements(name, wrong, 1.0)).finite:
            text = f"'{name}' has the value {float(tensor.min()):.4g}: a variance cannot be negative."
            evidence = [f"with {plural(int(wrong.sum()), 'element')} of '{name}' set to 1 the step is finite"]
            return Finding("state", "negative_variance", text, evidence, phase="state", parameter=name)
    return None
