"""What a run that goes on has in common with one that nothing disturbed: bit-equal, or only equivalent."""

import torch

from config import KEYS
from training.progress import Progress

# Keys that decide in which order and precision numbers are added, whatever the run learns.
OF_ARITHMETIC = ["amp_dtype", "augment_on", "compile_model", "deterministic", "float32_matmul", "fused"]
OF_ARITHMETIC += ["memory_format", "mixedprec"]

# Keys that decide over the steps to come, beside those of model, loss, teacher and plug-ins.
OF_STEPS = {"lr", "lr_reference_batch", "lr_decay", "backbone_lr_factor", "frontend_lr_factor", "head_lr_factor"}
OF_STEPS |= {"weight_decay", "grad_clip"}
OF_STEPS |= {"freeze_epochs", "freeze_norms", "augment", "augment_prob", "augmentation", "mixup"}
OF_STEPS |= {"musan_path", "rir_path"}


def deciding(changed: set[str]) -> list[str]:
    """Those of the ``changed`` keys on which later steps depend, sorted."""
    groups = {name: KEYS[name].group if name in KEYS else "" for name in changed}
    learnt = {name for name, group in groups.items() if group in ("Model and loss", "Teacher", "")}
    return sorted((changed & OF_STEPS | learnt) - {*OF_ARITHMETIC})


def arithmetic_of(device: torch.device) -> dict:
    """What else decides over the last bits of a step: a product is added up by as many threads as there are."""
    found = {"torch": str(torch.__version__), "device": device.type, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        return {**found, "device": torch.cuda.get_device_name(device)}
    return {**found, "instructions": torch.backends.cpu.get_cpu_capability()}


def changes_of_arithmetic(before: dict, now: dict, changed: set[str]) -> list[str]:
    """What of ``arithmetic_of`` differs, and which of the ``changed`` keys make a difference, as words."""
    differing = [name for name in now if name in before and before[name] != now[name]]
    keys = [f"{key} changed" for key in OF_ARITHMETIC if key in changed]
    return [f"{name} {before[name]} before, {now[name]} now" for name in differing] + keys


def describe(
    kind: str,
    changes: list[str],
    progress: Progress,
    *,
    left_out: int,
    anew: bool,
    worlds: tuple,
    elsewhere: bool,
    exact: bool,
    arithmetic: list[str],
    others: list[str],
):
    """Say it in one line.

    ``kind`` of ``Progress.load_state_dict``; ``changes``: what decides over batches and was changed; ``left_out``: rows
    of the epoch that wait for another one; ``anew``: the schedule counts other steps than before; ``worlds``: processes
    before and now; ``elsewhere``: of ``drawn_elsewhere``; ``exact``: whether this device gives the same bits in every
    run; ``arithmetic``: what of ``changes_of_arithmetic`` speaks against it; ``others``: keys and files that later
    steps depend on and that have changed.
    """
    if kind == "equal":
        kept = "schedule" if elsewhere else "schedule, random generators"
        same = f"weights, optimizer, {kept} and batches are those of the state"
        if others:
            return f"bit-equal: {same}; what follows is not, for {' and '.join(others)} changed"
        if arithmetic or elsewhere:
            ways = ["random numbers, of another kind of device"] * elsewhere
            ways += [f"what is added up in another way ({'; '.join(arithmetic)})"] * bool(arithmetic)
            return f"bit-equal: {same}; equivalent: {', and '.join(ways)}"
        if exact:
            return f"bit-equal to an uninterrupted run: {same}"
        return f"bit-equal: {same}; equivalent: what the device sums up in another order (deterministic: true keeps it)"
    changed, parts = "; ".join(changes), ["bit-equal: weights and optimizer"]
    open_epoch = progress.batch and not progress.trained
    if kind == "divided":
        parts.append(f"the rows of each batch are those of the run before, divided in another way ({changed})")
    else:
        parts.append(f"the batches are not those of the run before ({changed})")
    if kind == "dealt again" and (progress.dealt or left_out):
        waiting = f", but for {left_out} that wait for another epoch" if left_out else ""
        parts.append(f"the rows that are left of epoch {progress.epoch} are trained once each{waiting}")
    if kind == "share" and open_epoch:
        share = round(100 * progress.batch / progress.batches)
        parts.append(
            f"epoch {progress.epoch} goes on after {share} % of its batches, some rows come twice in it and some never"
        )
    if anew:
        parts.append("the schedule stands at the same share of the run")
    before, now = worlds
    if now > before:
        parts.append(f"random generators of processes from {before} on begin anew")
    return f"{'; '.join(parts)}; what follows is equivalent to an uninterrupted run, and not bit-equal"
