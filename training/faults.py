"""What can be wrong with a step: the batch, the state before it, the loss, a gradient, a buffer, the update."""

import math
from dataclasses import dataclass, field

import torch

from errors import plural
from storage.checkpoint import nonfinite_tensors
from storage.dump_statistics import SETTINGS, number
from training.slices import local


@dataclass
class Fault:
    """A step that was not taken: why, on which rank, which rows (numbers into the batch's ``files``), in one phrase."""

    reason: str
    what: str
    rows: list[int] = field(default_factory=list)
    loss: float = math.nan
    accuracy: float = 0.0
    norm: float = math.nan
    module: str = ""
    injected: str = ""  # the kind of ``nan_inject`` that made it
    phase: str = "step"  # or 'setting' or 'update', if the optimizer is at fault and not the batch
    update: dict = field(default_factory=dict)  # statistics of what the update made non-finite, by name
    undone: bool = True  # whether the state is as before
    recheck: dict = field(default_factory=dict)  # what the same step gave, computed once more: see Step.recheck
    at_fault: bool = True  # whether this process is the one to report it

    @property
    def transient(self) -> bool:
        """Whether the same step was finite when it was computed once more: a transient fault."""
        return bool(self.recheck.get("finite"))


def check_batch(batch: dict, classes: int) -> Fault | None:
    """Host checks before the device sees a batch: every row finite, every label inside the classes."""
    peak, label = batch["peak"], batch["label"]
    rows = (~peak.isfinite()).nonzero().flatten().tolist()
    if rows:
        return Fault("batch_nonfinite", f"{plural(len(rows), 'row')} with NaN or Inf samples", rows)
    wrong = ((label < 0) | (label >= classes)).nonzero().flatten().tolist()
    if wrong:
        return Fault("label_out_of_range", f"label {int(label[wrong[0]])} with {classes} classes", wrong)
    return None


def bad_setting(optimizer) -> str:
    """Which setting of the optimizer, after its schedule, float32 does not hold: every weight would be NaN; else ''."""
    for group in optimizer.param_groups:
        for key in SETTINGS:
            if not abs(number(group, key)) <= torch.finfo(torch.float32).max:
                return f"the optimizer's {key} is {number(group, key)}"
    return ""


def update_fault(spoiled: dict, refused: str, undone: bool, **figures) -> Fault:
    """The fault of an update that made non-finite what ``spoiled`` {name: statistics} names, or was ``refused``."""
    common = {"phase": "update", "update": spoiled, "undone": undone, **figures}
    if refused:
        return Fault("state_nonfinite", f"the optimizer's update fails: {refused}", module="optimizer", **common)
    name, stats = next(iter(spoiled.items()))
    more = f" and {len(spoiled) - 1} more" if len(spoiled) > 1 else ""
    count = f"{stats['nan']} NaN, {stats['inf']} Inf of {stats['numel']}"
    what = f"the optimizer's update made '{name}'{more} non-finite ({count}), from finite gradients"
    return Fault("state_nonfinite", what, module=name, **common)


def classify(attempt, bad: list[str], gradients: dict, scaler, teacher: tuple | None) -> Fault:
    """Name what made a step non-finite.

    ``bad``: names of ``nonfinite_before``; ``gradients``: {name: gradient} of the last attempt; ``teacher``: what
    ``fault_of_teacher`` says.
    """
    common = {"loss": attempt.loss, "accuracy": attempt.accuracy, "norm": attempt.norm}
    if bad:
        return Fault("state_nonfinite", f"'{bad[0]}' is not finite", module=bad[0], **common)
    if teacher is not None:
        what, where, rows = teacher
        return Fault("loss_nonfinite" if rows else "state_nonfinite", what, rows, module=where, **common)
    if not attempt.loss_finite:
        return Fault("loss_nonfinite", f"loss is {attempt.loss}", **common)
    if not attempt.buffers_finite and math.isfinite(attempt.norm):
        return Fault("state_nonfinite", f"buffer {attempt.buffer}", **common)
    first = next((n for n, g in gradients.items() if not g.isfinite().all()), "")
    if not first:
        return Fault("grad_norm_overflow", "the gradient norm overflows, no gradient does", **common)
    if scaler.enabled and not any(g.isnan().any() for g in gradients.values()):
        what = f"gradients overflow at every loss scale down to {scaler.lowest():g}"
        return Fault("scale_collapse", what, module=first, **common)
    return Fault("grad_nonfinite", f"gradient of '{first}' is not finite", module=first, **common)


def nonfinite_before(network, buffers) -> list[str]:
    """Weights and buffers that were not finite before a step which has been taken back; of split ones the own rows."""
    own = {name: local(tensor) for name, tensor in network.state_dict().items()}
    return [n for n in nonfinite_tensors(own) if n not in buffers.nonfinite_by_design]


def nan_from_the_start(network) -> str:
    """What to say of buffers that hold NaN before the first step, '' without one.

    Such a buffer is not checked. Infinities may be meant, as in a mask; NaN is at most a placeholder.
    """
    named = [n for n, b in network.named_buffers() if b.is_floating_point() and bool(b.isnan().any())]
    if not named:
        return ""
    names = ", ".join(f"'{name}'" for name in named[:5]) + (", ..." if named[5:] else "")
    head = f"{plural(len(named), 'buffer')} with NaN from the start, which no step checks: {names}"
    return f"{head}; mend what fills it, unless the NaN is a placeholder"


def inject_batch(batch: dict, kind: str, classes: int) -> dict:
    """A copy of a batch with a NaN in its first row, or a label beyond the classes: the testing aid ``nan_inject``."""
    batch = dict(batch)
    if kind == "data":
        batch["data"] = batch["data"].clone()
        batch["data"][0, 0, batch["data"].shape[2] // 2] = math.nan
        batch["peak"] = batch["peak"].clone()
        batch["peak"][0] = math.nan
    if kind == "label":
        batch["label"] = batch["label"].clone()
        batch["label"][0] = classes + 3
    return batch
