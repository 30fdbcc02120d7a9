"""Steps that do not wait for the device: whether one was good is read while the next one computes."""

from dataclasses import dataclass
from typing import Any

import torch

from config import Config
from training.attempt import Attempt, Figures, attempt_of
from training.faults import Fault
from training.module_state import ModuleState
from training.precision import BufferSnapshot
from training.step import Step
from training.update import UpdateGuard

KEPT = ("generators", "buffers", "module_state", "guard")  # of a Step: what there was before the step
WAITED = "each step is checked before the next begins (nan_check: now)"  # without memory for a second copy


class Reading:
    """Numbers on their way to the host: the copy is queued on the device, and waited for when they are asked for."""

    def __init__(self, numbers: torch.Tensor):
        self.numbers, self.arrived = numbers, None
        if numbers.is_cuda:
            self.numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self.numbers.copy_(numbers, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def wait(self) -> list[float]:
        """The numbers, once they have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist()


@dataclass
class Launched:
    """A window of batches whose step is on its way.

    ``place``: where the run was, of Progress; ``epoch`` and ``poison``: as for Step.take.
    """

    window: list[dict]
    place: tuple
    epoch: float
    poison: str
    figures: Figures | None = None  # of its forward and backward pass
    reading: Reading | None = None  # after its update


class LateStep:
    """Takes the steps of a Step without waiting for the device, and finds out one step later whether each was good.

    The order, for a step N: what it may change is copied; its forward and backward pass are queued; only now the
    figures of step N-1 are waited for, which the device has computed long since; then the update of N is queued. Two
    sets of copies alternate. If step N-1 was bad, ``discard`` and ``undo`` go back to before it, bit for bit, and the
    caller takes it again with Step.take, which waits, and tells why. So no bad step leaves a trace, as with Step.take.
    """

    def __init__(self, step: Step):
        self.step = step
        self.pending: Launched | None = None  # updated, and not known to be good
        self.begun: Launched | None = None  # not updated yet
        self.swapped = False  # whether the step's copies are those of a pass that followed ``pending``
        self.spare: dict[str, Any] = {}

    @property
    def possible(self) -> bool:
        """Whether both sets of copies have room, and no loss scale is searched for, which asks after every attempt."""
        kept = self.step.guard.keeps and (not self.spare or self.spare["guard"].keeps)
        return kept and not self.step.scaler.enabled

    def forward(self, launched: Launched):
        """Copy what the step may change, and queue its forward and backward pass: it has ``begun``.

        Without memory for the copies it has not, and from now on late steps are not ``possible``.
        """
        if self.pending is not None:
            self.swap()
        self.begun = launched
        self.step.begin(launched.epoch)
        if not self.step.guard.keeps:
            self.begun = None
            if self.swapped:  # back to the copies of the step before
                self.swap()
            return
        results = self.step.forward_backward(launched.window, poison=launched.poison)
        launched.figures = self.step.figures(results, poison=launched.poison)

    def update(self, launched: Launched) -> bool:
        """Queue the update of a step that has begun, and send its figures to the host; returns whether it had begun."""
        step = self.step
        if self.begun is None:
            return False
        step.guard.take_settings()
        step.try_apply(launched.figures.norm, poison=launched.poison)
        launched.reading = Reading(launched.figures.shared(step.ranks, step.guard.suspicious(step.refused)))
        self.begun, self.pending, self.swapped = None, launched, False
        return True

    def outcome(self) -> Attempt:
        """Wait for the figures of the pending step, which is pending no more."""
        launched, self.pending = self.pending, None
        return attempt_of(launched.reading.wait(), self.step.ranks.main)

    def discard(self) -> bool:
        """Take back the step that has begun, if there is one; returns whether all is as before it."""
        if self.begun is None:
            return True
        if not self.step.updating:
            self.step.guard.take_settings()  # a schedule has moved on since the step has begun
        undone = self.step.undo()
        self.step.network.zero_grad(set_to_none=True)
        self.begun = None
        if self.swapped:
            self.swap()
        return undone

    def undo(self):
        """Go back to before the step that ``outcome`` told of; nothing may have begun since, or it was discarded."""
        self.step.updating = True
        self.step.undo()

    def swap(self):
        """Exchange the two sets of copies."""
        step = self.step
        if not self.spare:
            self.spare = {
                "generators": None,
                "buffers": BufferSnapshot(step.network, step.buffers.nonfinite_by_design),
                "module_state": ModuleState(step.network),
                "guard": UpdateGuard(step.optimizer, step.network, step.guard.log, step.ranks, WAITED),
            }
        for name in KEPT:
            mine = getattr(self.step, name)
            setattr(self.step, name, self.spare[name])
            self.spare[name] = mine
        self.swapped = not self.swapped

    def release(self):
        """Give the memory of the copies of weights and moments back until the next step."""
        self.step.guard.release()
        if self.spare:
            self.spare["guard"].release()


def checks_late(config: Config, step: Step, log) -> bool:
    """Whether ``nan_check`` lets steps be checked while the next one computes; ``log(text)`` prints a line."""
    chosen, searches = config.nan_check, step.scaler.enabled
    if chosen == "late" and searches:
        log("nan_check: float16 searches for its loss scale, so each step is checked before the next")
    return not searches and (chosen == "late" or (chosen == "auto" and step.device.type == "cuda"))


def transient_fault(first: Attempt) -> Fault:
    """The fault of a step that was bad when it was read late, and good when it was taken again."""
    if not first.loss_finite:
        reason, what = "loss_nonfinite", f"loss is {first.loss}"
    elif not first.buffers_finite:
        reason, what = "state_nonfinite", "a buffer became non-finite"
    elif not first.update_finite and first.norm < float("inf"):
        reason, what = "state_nonfinite", "the update made something non-finite"
    else:
        reason, what = "grad_nonfinite", f"the gradient norm is {first.norm}"
    fault = Fault(reason, what, loss=first.loss, accuracy=first.accuracy, norm=first.norm, at_fault=first.at_fault)
    fault.recheck = {"finite": True, "same": False}
    return fault
