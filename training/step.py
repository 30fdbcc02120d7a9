"""The training step: one in which something is not finite leaves no trace in weights, buffers, moments, generators."""

import contextlib
import math
from dataclasses import replace
from typing import Any

import torch

from config import Config
from errors import refuses_numbers, with_place
from training import class_parallel, precision
from training.attempt import Attempt, Figures, as_scalar, attempt_of, gradients_of
from training.batches import on_device
from training.distillation import distillation_of, fault_of_teacher
from training.faults import Fault, bad_setting, classify, nonfinite_before, update_fault
from training.generators import generator_state, restore_generators
from training.module_state import ModuleState, cpu_copy
from training.ranks import SingleProcess
from training.sharded import is_sharded, whole
from training.slices import heads_of, local, norm_over_ranks, slices_of
from training.sync_norm import by_own_rows, is_synchronised
from training.update import UpdateGuard
from utils import total_norm


class Step:
    """Takes steps on a network, in the only safe order:

    forward, backward, unscale, one norm over all gradients, one finite check agreed over the processes, clip, update,
    a check of what the update made, loss scale. If fp16 gradients overflow, lower loss scales are tried first.

    The trainer takes its steps with it, the dry step tries each precision with one, the post-mortem replays a dump and
    trains again with it. ``ranks``: the processes. ``amp_dtype``: autocast's type, None for fp32. ``grad_clip``: the
    largest gradient norm, 0 for any. ``log(text)`` prints a line. Without an ``optimizer`` it only makes attempts.
    """

    def __init__(self, network, ranks, amp_dtype=None, optimizer=None, grad_clip: float = 0.0, log=print):
        self.network, self.ranks, self.device = network, ranks, ranks.device
        self.parallel = network  # as it is called: with several processes it shares the gradients
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.find_classes()
        self.taught = distillation_of(network)
        self.amp_dtype = amp_dtype
        self.scaler = precision.LossScaler(amp_dtype is torch.float16)
        self.buffers = precision.BufferSnapshot(network)
        self.module_state = ModuleState(network)
        self.rechecks = "same"  # how a step that fails is computed once more: 'none', 'same', or then on the 'cpu' too
        self.optimizer: torch.optim.Optimizer | None = None
        self.guard: UpdateGuard | None = None
        if optimizer is not None:
            self.set_optimizer(optimizer, grad_clip, log)
        self.generators: dict | None = None  # as before the forward pass
        self.drawn: tuple[dict, dict] | None = None  # the generators and the modules' own after a failed attempt
        self.updating = False
        self.whole_gradients: dict[str, torch.Tensor] | None = None  # of a failed step, where weights are sharded
        self.refused = ""  # why an operation of the last pass or update refused its numbers
        self.nothing = torch.full((), math.nan, device=self.device)  # the loss of such a pass
        self.alone: Attempt | None = None  # what this process's rows alone gave, if they were found at fault

    def take(self, window: list[dict], epoch: float | None = None, poison: str = "") -> Attempt | Fault:
        """Train on a window of batches; returns what the step gave, or the fault for which it was taken back.

        ``epoch`` is what a margin schedule goes by. ``poison``: a kind of ``nan_inject``, a testing aid.
        """
        self.begin(epoch)
        for scale in [self.scaler.scale, *self.scaler.retries()]:
            attempt = self.attempt(window, scale, poison)
            attempt.scale = scale
            if attempt.finite:
                break
            attempt.buffer = "" if attempt.buffers_finite else self.buffers.first_bad()
            self.remember_draws()
            self.rewind()
            if not attempt.only_gradients_overflow:
                break
        if attempt.finite:
            fault = self.update(window, scale, attempt, poison)
        else:
            counts = self.count_nonfinite()  # before fault_of, which may leave the gradients of this process's own rows
            fault = self.fault_of(attempt, window, scale, poison)
            fault.recheck = self.recheck(attempt, counts, window, scale, poison) if self.rechecks != "none" else {}
            if self.rechecks == "cpu" and fault.recheck and fault.at_fault and not fault.transient:
                fault.recheck |= self.recheck_on_cpu(window, scale, poison)
        if fault is None:
            self.scaler.stepped(scale)
            return attempt
        fault.injected = poison
        self.rewind()
        return fault

    def begin(self, epoch: float | None = None):
        """Remember everything that the step may change."""
        self.set_epoch(epoch)
        self.generators = generator_state(self.device)
        self.buffers.take()
        self.module_state.take()
        if self.guard is not None:
            self.guard.take()
        self.updating, self.drawn, self.whole_gradients, self.alone = False, None, None, None

    def set_epoch(self, epoch: float | None):
        """Tell a loss whose margin follows a schedule how far the run is."""
        if epoch is not None and hasattr(self.network.loss, "set_epoch"):
            self.network.loss.set_epoch(epoch)

    def attempt(self, window, scale: float = 1.0, poison: str = "", alone: bool = False) -> Attempt:
        """Forward and backward over a window of batches; leaves unscaled gradients and reads the device once.

        ``alone`` leaves the gradients as they are on this process.
        """
        return self.measure(self.forward_backward(window, scale, poison, alone), scale, poison)

    def forward_backward(self, window, scale: float = 1.0, poison: str = "", alone: bool = False) -> list[tuple]:
        """(loss, accuracy, share of the rows) of each batch of a window; leaves gradients times ``scale``.

        If an operation refuses its numbers, as of a matrix without factors, the loss is NaN, and ``refused`` says why.
        """
        self.refused = ""
        try:
            return self.passes(window, scale, poison, alone)
        except Exception as error:
            if self.ranks.world > 1 or not refuses_numbers(error):  # other processes wait for this one's gradients
                raise
            self.note(error)
            return [(self.nothing, 0.0, 1.0)]

    def note(self, error: Exception):
        """Keep why an operation refused its numbers, and in which line."""
        self.refused = with_place(error, without="postmortem").rstrip(":")  # whose modes may watch the step

    def passes(self, window, scale: float, poison: str, alone: bool) -> list[tuple]:
        """``forward_backward``, with the exceptions of its operations."""
        self.network.zero_grad(set_to_none=True)
        for head in self.heads:
            head.notes.clear()
        if self.taught is not None:
            self.taught.bad_rows.clear()
        results = []
        for index, batch in enumerate(window):
            shares = index == len(window) - 1 and not alone
            with contextlib.ExitStack() as stack:
                if not shares and self.parallel is not self.network:
                    stack.enter_context(self.parallel.no_sync())
                if alone:
                    stack.enter_context(by_own_rows(self.network))
                data, label = on_device(batch, self.device)
                with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                    loss, accuracy = self.parallel(data, label)
                if poison == "loss":
                    loss = loss * math.nan
                share = 1.0 if alone else batch.get("share", 1.0)  # of the rows of all, times the number of processes
                (loss.float() * (share * scale / len(window))).backward()
            results.append((loss.detach(), accuracy, share))
        return results

    @property
    def shares(self) -> bool:
        """Whether gradients are to be averaged over several processes: a slice's are not."""
        named = self.network.named_parameters()
        own = () if is_sharded(self.network) else self.slices
        return self.ranks.world > 1 and any(p.requires_grad for name, p in named if name not in own)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients that there are, in the order of the parameters; of split ones this process's rows."""
        return [local(p.grad) for p in self.parameters if p.grad is not None]

    def measure(self, results: list[tuple], scale: float = 1.0, poison: str = "") -> Attempt:
        """Unscale the gradients, take their norm, and read the device once."""
        return attempt_of(self.figures(results, scale, poison).shared(self.ranks).tolist(), self.ranks.main)

    def figures(self, results: list[tuple], scale: float = 1.0, poison: str = "") -> Figures:
        """Unscale the gradients and take one norm over all of them; the device is not asked."""
        shares = [share for *_, share in results]
        results = [torch.stack([loss.float(), as_scalar(accuracy, loss)]) for loss, accuracy, _ in results]
        if poison == "buffer":
            self.buffers.floating[0].view(-1)[0] = math.inf
        gradients = self.gradients()
        if poison == "grad":
            next(g for g in gradients if g.numel()).view(-1)[0] = math.nan
        if scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm = self.norm(gradients)
        buffers = total_norm(self.buffers.floating) if self.buffers.floating else norm.new_zeros(())
        return Figures(results, shares, norm, buffers)

    def norm(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        """The norm over all gradients, those of other processes' slices of the class weights among them."""
        if not self.slices:
            return total_norm(gradients).to(self.device)  # without gradients it is on the CPU
        return norm_over_ranks(self.parameters, self.sliced, self.ranks)

    def update(self, window, scale: float, attempt: Attempt, poison: str = "") -> Fault | None:
        """Clip and take the optimizer's step; if it makes something non-finite, take it back and return why."""
        figures: dict[str, Any] = {"loss": attempt.loss, "accuracy": attempt.accuracy, "norm": attempt.norm}
        wrong = bad_setting(self.optimizer)
        if wrong:
            fault = Fault("state_nonfinite", wrong, module="optimizer", phase="setting", **figures)
            fault.at_fault = self.ranks.main
            return fault
        self.try_apply(attempt.norm, poison=poison)
        spoiled, refused = self.guard.spoiled(self.refused)
        if not spoiled and not refused:
            return None
        undone = self.undo()
        if undone and self.ranks.any(bool(self.bad_state())):
            fault = self.named(attempt)
        else:
            fault = update_fault(spoiled, refused, undone, **figures)
            if undone:
                self.attempt(window, scale)  # the optimizer may have changed the gradients, which the report is about
        self.put_gradients_together()
        fault.at_fault = self.ranks.main
        return fault

    def try_apply(self, norm: float | torch.Tensor, mode=None, poison: str = ""):
        """``apply``; if the optimizer refuses its numbers, ``refused`` says why."""
        try:
            self.apply(norm, mode, poison)
        except Exception as error:
            if not refuses_numbers(error):
                raise
            self.note(error)

    def apply(self, norm: float | torch.Tensor, mode=None, poison: str = ""):
        """Scale the gradients down to ``grad_clip`` if their ``norm`` is larger, and take the optimizer's step.

        A ``norm`` on the device is not read, and gives the same bits. ``mode``: a context manager around the
        optimizer's step.
        """
        gradients = self.gradients()
        if self.grad_clip and gradients:
            if isinstance(norm, torch.Tensor):  # in double precision, as Python's numbers are
                factor = (self.grad_clip / norm.float().double()).clamp(max=1.0)
                torch._foreach_mul_(gradients, factor.float())
            elif norm > self.grad_clip:
                torch._foreach_mul_(gradients, self.grad_clip / norm)
        self.updating = True
        with mode or contextlib.nullcontext(), class_parallel.drawn_rows_only(self.heads, self.optimizer, self.ranks):
            self.optimizer.step()
        if poison == "update":
            next(p for p in map(local, self.parameters) if p.numel()).data.view(-1)[0] = math.nan

    def set_optimizer(self, optimizer, grad_clip: float, log=print):
        """Take updates with this optimizer from now on."""
        self.optimizer, self.grad_clip = optimizer, grad_clip
        self.guard = UpdateGuard(optimizer, self.network, log, self.ranks)

    def find_classes(self):
        """Find the weights of which this process has a slice, and the heads with weights for each class."""
        self.slices = slices_of(self.network)
        self.sliced = {id(p) for name, p in self.network.named_parameters() if name in self.slices}
        self.heads = list(heads_of(self.network).values())
        self.heads_are_split = any(head.share.world > 1 for head in self.heads)

    def renew(self):
        """Find parameters, buffers and modules again after a change to the network that may have replaced them."""
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.find_classes()
        self.buffers = precision.BufferSnapshot(self.network, self.buffers.nonfinite_by_design)
        self.module_state = ModuleState(self.network)

    def rewind(self):
        """Put back what a forward pass may change: buffers, generators, plain attributes, weights that it wrote."""
        if self.guard is not None and not self.updating:
            self.guard.undo()
        self.buffers.restore()
        self.module_state.restore()
        restore_generators(self.generators, self.device)

    def remember_draws(self):
        """Keep the generators as a failed attempt has left them."""
        self.drawn = generator_state(self.device), self.module_state.generators()

    def state_before(self) -> dict[str, torch.Tensor]:
        """Weights and buffers as before the step that was taken last, on the CPU; {} if there is no copy of them."""
        if self.guard is None or not self.guard.copies or self.slices:  # of slices nobody has all
            return {}
        groups = [*self.guard.copies, *self.buffers.groups]
        before = {id(now): copy for tensors, copies in groups for now, copy in zip(tensors, copies)}
        before |= {id(parameter): copy for parameter, copy in self.buffers.frozen.kept}
        owned = [*self.network.named_parameters(remove_duplicate=False)]
        owned += self.network.named_buffers(remove_duplicate=False)
        kept = self.network.state_dict().keys()
        return {n: before.get(id(t), t).detach().cpu().clone() for n, t in owned if n in kept}

    def keep_draws(self):
        """Let the generators go on as if the last failed step had been taken.

        A step is refused without a trace, so that the next one draws the same numbers. If those are at fault, as a mask
        that drops every frame, all steps to come would fail.
        """
        if self.drawn is not None:
            generators, own = self.drawn
            restore_generators(generators, self.device)
            self.module_state.set_generators(own)

    def undo(self) -> bool:
        """Put back everything that the step has changed so far; returns whether all is as before it."""
        undone = self.guard.undo() if self.updating else True
        self.updating = False
        self.rewind()
        return undone

    def fault_of(self, attempt: Attempt, window, scale: float, poison: str) -> Fault:
        """The fault of an attempt that is not finite, and whether this process brought it."""
        at_fault = attempt.at_fault
        self.put_gradients_together()
        own = attempt.loss_finite and attempt.buffers_finite
        if self.ranks.world > 1 and (own or is_synchronised(self.network)):
            at_fault = self.own_step_nonfinite(window, scale, poison)
        if self.alone is not None:  # of the same computation as the gradients that are reported
            attempt = replace(attempt, loss=self.alone.loss, accuracy=self.alone.accuracy, norm=self.alone.norm)
        fault = self.named(attempt)
        fault.at_fault = class_parallel.guilty(self, at_fault) if self.heads_are_split else at_fault
        return fault

    def named(self, attempt: Attempt) -> Fault:
        """What made an attempt non-finite, the last that was made; a collective where weights are sharded."""
        teacher = fault_of_teacher(self.network)
        fault = classify(attempt, self.bad_state(), self.seen(), self.scaler, teacher)
        fault.what = self.refused or fault.what
        return fault

    def seen(self) -> dict[str, torch.Tensor]:
        """The gradients of the attempt that failed, by name: whole ones, or class weights' own rows."""
        return gradients_of(self.network) if self.whole_gradients is None else self.whole_gradients

    def bad_state(self) -> list[str]:
        """Names of ``nonfinite_before``; a collective where weights are sharded, of whose shares all tell."""
        own = nonfinite_before(self.network, self.buffers)
        if not is_sharded(self.network):
            return own
        names = set().union(*self.ranks.gather(own))
        return [name for name in self.network.state_dict() if name in names]

    def put_gradients_together(self):
        """Keep the whole gradients of a failed step on every process, where they are sharded."""
        if is_sharded(self.network):
            named = self.network.named_parameters()
            self.whole_gradients = {name: p.grad.full_tensor() for name, p in named if p.grad is not None}

    @contextlib.contextmanager
    def by_itself(self):
        """Context in which a process makes attempts without the others; sharded weights are whole in it."""
        shared = self.parameters, self.slices, self.sliced
        with whole(self.network):
            if is_sharded(self.network):
                self.parameters = [p for p in self.network.parameters() if p.requires_grad]
                self.slices, self.sliced = {}, set()
            try:
                yield
            finally:
                self.parameters, self.slices, self.sliced = shared

    def recheck(self, attempt: Attempt, counts: list[int], window, scale: float, poison: str) -> dict:
        """Compute a failed attempt once more in place: is it ``finite`` now, does it give the ``same`` values?

        ``counts``: what ``count_nonfinite`` gave of it. A transient fault, as of a broken device, is told from a
        lasting one. {} if there is no memory for it.
        """
        kept = self.ranks.world == 1  # the next backward pass of several processes writes into the same memory
        gradients = [(p, p.grad if kept or p.grad is None else p.grad.clone()) for p in self.parameters]
        first = [attempt.loss, attempt.accuracy, attempt.norm, *counts]
        self.rewind()
        try:
            again = self.attempt(window, scale, poison)
            second = [again.loss, again.accuracy, again.norm, *self.count_nonfinite()]
        except torch.cuda.OutOfMemoryError:
            return {}
        finally:
            self.rewind()
            for parameter, gradient in gradients:
                parameter.grad = gradient
        return {"finite": again.finite, "same": [repr(x) for x in first] == [repr(x) for x in second]}

    def recheck_on_cpu(self, window, scale: float, poison: str) -> dict:
        """Compute a failed attempt on the CPU, with a copy of the network: {'cpu_finite': bool}, or {'cpu_error': why}.

        A device that is broken is told from a fault of the numbers. Random numbers on the device are drawn anew.
        """
        try:
            step = Step(cpu_copy(self.network), SingleProcess(torch.device("cpu")), self.amp_dtype)
            return {"cpu_finite": step.attempt(window, scale, poison, alone=True).finite}
        except Exception as error:  # code of a plug-in that knows one device only may raise anything
            return {"cpu_error": f"{type(error).__name__}: {error}"[:200]}
        finally:
            self.rewind()

    def count_nonfinite(self) -> list[int]:
        """How many gradient values are NaN, and how many are infinite."""
        return [sum(int(count(g).sum()) for g in self.gradients()) for count in (torch.isnan, torch.isinf)]

    def own_step_nonfinite(self, window, scale: float, poison: str) -> bool:
        """Whether this process's own rows are at fault: the gradients of a failed step are already summed over all.

        So are the statistics of norms over all processes. Leaves a guilty process's own gradients, for its report.
        """
        shared = {p: p.grad for p in self.parameters}
        with self.by_itself():
            alone = self.attempt(window, scale, poison, alone=True)
            # The gradients of a slice of the class weights are of all processes' rows: others say more.
            own = [
                [p.grad for p in self.parameters if p.grad is not None and (id(p) in self.sliced) is kind]
                for kind in (False, True)
            ]
            bad = [not math.isfinite(total_norm(gradients)) for gradients in own]
            if not self.slices and not (alone.loss_finite and alone.buffers_finite):
                bad[0] |= alone.at_fault
            found = gradients_of(self.network)
        level = 2 if bad[0] else int(bad[1])
        self.rewind()
        highest = self.ranks.highest(level)
        mine = level == highest if highest else self.ranks.main
        if is_sharded(self.network):
            self.whole_gradients = found if mine and highest else self.whole_gradients
        self.alone = alone if mine and highest and not self.heads_are_split else None
        if not is_sharded(self.network) and not (mine and highest):
            for parameter, gradient in shared.items():
                parameter.grad = gradient
        return mine


def chosen_recheck(config: Config, step: Step, log) -> str:
    """How a step that fails is computed once more: 'cpu' may be no more than 'same'."""
    if config.nan_recheck != "cpu" or not (step.device.type == "cpu" or step.slices):
        return config.nan_recheck
    key = "weights (fsdp)" if is_sharded(step.network) else "classes (class_parallel)"
    why = f"no process has all {key}" if step.slices else "this run is on the CPU"
    log(f"nan_recheck: cpu does no more than same here: {why}")
    return "same"
