"""The training step: what is checked, in which order, and how a step that cannot be taken leaves no trace."""

import contextlib
import math

import torch

from corpus.loader import LoaderFailed
from errors import rank_prefix
from training import precision
from training.attempt import Attempt, as_scalar, read_attempt
from training.endings import no_batches, patience_is_over, spoilt_by_an_update
from training.incidents import Fault, bad_setting, check_batch, inject_batch, update_fault
from utils import total_norm


class GuardedStep:
    """The step of ModelTrainer, which gives it network, optimizer, schedule, ranks and the place in the data."""

    def train_step(self, window) -> Attempt | None:
        """Train on a window of batches; a non-finite step leaves no trace and returns None.

        Order: forward, backward, unscale, one norm over all gradients, one finite check agreed over the ranks, clip,
        step, a check of what it made, average, scaler, schedule. An fp16 overflow of the gradients is retried at lower
        loss scales first.
        """
        if hasattr(self.network.loss, "set_epoch"):
            self.network.loss.set_epoch(self.moment())
        rng = precision.draw_state(self.device)
        self.buffers.take()
        poison = self.incidents.injections.pop(self.window_number(), None)
        for scale in [self.scaler.scale, *self.scaler.retries()]:
            try:
                attempt = self.attempt(window, scale, poison)
            except Exception:  # a plug-in may raise anything
                self.save_before(rng)
                raise
            if attempt.finite:
                break
            attempt.buffer = "" if attempt.buffers_finite else self.buffers.first_bad()
            self.rewind(rng)
            if not (attempt.loss_finite and attempt.buffers_finite):
                break
        if attempt.finite:
            fault, at_fault = self.update(window, scale, attempt, rng, poison), self.ranks.main
        else:
            at_fault = attempt.at_fault
            if self.ranks.world > 1 and attempt.loss_finite and attempt.buffers_finite:
                at_fault = self.brought_it(window, scale, poison)
            fault = self.incidents.classify(attempt)
        if fault is not None:
            fault.injected = poison or ""
            self.rewind(rng)
            self.skip(window, fault, rng, at_fault)
            return None
        self.incidents.remember(attempt, scale)
        self.average.update()
        self.scaler.stepped(scale)
        if self.scheduler_unit == "iteration":
            self.scheduler.step()
        self.step += 1
        self.nonfinite_in_a_row = 0
        self.window.close()
        return attempt

    def save_before(self, rng):
        """Save the state as it was before a step that an exception ends, if the other processes need not be asked."""
        try:
            self.rewind(rng)
            if self.ranks.world == 1:
                self.save_last()
                self.say(f"the state before this step is in {self.files.model / 'last.model'}")
        except RuntimeError as error:  # after an error of the device nothing can be read from it
            self.say(f"the state before this step cannot be saved: {error}")

    def update(self, window, scale: float, attempt: Attempt, rng, poison=None) -> Fault | None:
        """Clip and take the optimizer's step; if it makes something non-finite, take it back and return why."""
        told = {"loss": attempt.loss, "accuracy": attempt.accuracy, "norm": attempt.norm}
        wrong = bad_setting(self.optimizer)
        if wrong:
            return Fault("state_nonfinite", wrong, module="optimizer", phase="setting", **told)
        if self.config.grad_clip and attempt.norm > self.config.grad_clip:
            torch._foreach_mul_(
                [p.grad for p in self.parameters if p.grad is not None], self.config.grad_clip / attempt.norm
            )
        self.guard.take()
        try:
            self.optimizer.step()
        except Exception:  # a plug-in may raise anything
            if self.guard.undo():
                self.save_before(rng)
            raise
        if poison == "update":
            self.parameters[0].data.view(-1)[0] = math.nan
        spoiled = next(filter(None, self.guard.spoiled(self.ranks)), None)
        if spoiled is None:
            return None
        undone = self.guard.undo()
        self.rewind(rng)
        if undone and self.incidents.bad_before():
            return self.incidents.classify(attempt)
        fault = update_fault(spoiled, undone, **told)
        if undone:
            self.attempt(window, scale)  # the optimizer may have changed the gradients, which the report is about
            return fault
        self.incidents.handle(window, fault, rng, self.ranks.main)
        raise spoilt_by_an_update(self, fault)

    def rewind(self, rng):
        """Put buffers and torch's generators back to where they were before the forward pass."""
        self.buffers.restore()
        precision.restore_draw_state(rng, self.device)

    def brought_it(self, window, scale, poison) -> bool:
        """Whether this rank's own gradients are at fault: those of a failed step are already summed over the ranks.

        Leaves a guilty rank's own gradients, for its report.
        """
        rng = precision.draw_state(self.device)
        shared = {p: p.grad for p in self.parameters}
        mine = not math.isfinite(self.attempt(window, scale, poison, alone=True).norm)
        self.rewind(rng)
        if not mine:
            for parameter, gradient in shared.items():
                parameter.grad = gradient
        return mine if self.ranks.any(mine) else self.ranks.main

    def attempt(self, window, scale: float, poison=None, alone=False) -> Attempt:
        """Forward and backward over a window of batches; leaves unscaled gradients and reads the device once.

        ``alone`` leaves the gradients as they are on this rank. ``poison`` is a kind of ``nan_inject``: the testing
        aid spoils the loss, a gradient or a buffer.
        """
        self.optimizer.zero_grad(set_to_none=True)
        results = []
        for index, batch in enumerate(window):
            last = index == len(window) - 1
            together = (
                contextlib.nullcontext() if self.ranks.world == 1 or (last and not alone) else self.parallel.no_sync()
            )
            with together:
                data, label = (batch[k].to(self.device, non_blocking=True) for k in ("data", "label"))
                with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
                    loss, accuracy = self.parallel(data, label)
                if poison == "loss":
                    loss = loss * math.nan
                (loss.float() * (scale / len(window))).backward()
            results.append(torch.stack([loss.detach().float(), as_scalar(accuracy, loss)]))
        if poison == "buffer":
            self.buffers.floating[0].view(-1)[0] = math.inf
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if poison == "grad":
            gradients[0].view(-1)[0] = math.nan
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm = total_norm(gradients)
        buffers = total_norm(self.buffers.floating) if self.buffers.floating else norm.new_zeros(())
        return read_attempt(results, norm, buffers, self.ranks)

    def moment(self) -> float:
        """Epochs trained before the open window, counted from 1: what a margin schedule goes by."""
        return self.epoch + self.window.before(self.batch) / len(self.sampler)

    def window_number(self) -> int:
        """Which step of the run, taken or not, the open window is; counted from 1."""
        return (self.epoch - 1) * self.steps_per_epoch + self.window.before(self.batch) // self.accumulation + 1

    def skip(self, batches, fault, rng, at_fault: bool, whole: bool = True):
        """Leave out the ``whole`` window, or one batch of it: the model is as it was before it.

        Ends the run after ``nan_patience`` in a row.
        """
        told = self.incidents.handle(batches, fault, rng, at_fault)
        self.optimizer.zero_grad(set_to_none=True)
        self.totals["skipped"] += len(batches)
        self.nonfinite_in_a_row += 1
        self.last_fault = told
        if whole:
            self.window.close()
        else:
            self.window.refuse(self.batch)
        if self.nonfinite_in_a_row >= self.config.nan_patience:
            in_a_row, self.nonfinite_in_a_row = self.nonfinite_in_a_row, 0  # the next call starts counting anew
            self.save_last()
            raise patience_is_over(self, in_a_row)

    def accept(self, batch) -> bool:
        """Check a batch on the host, before the device sees it; a bad one is left out on all ranks.

        Raises Finished on all ranks if one of them can load no more.
        """
        failed, refused_before = isinstance(batch, LoaderFailed), self.batch in self.window.refused
        fault = None if failed or refused_before else self.examine(batch)
        worst = self.ranks.highest(2 if failed else int(fault is not None))
        if worst == 2:
            self.batch -= 1
            self.save_last()
            failures = self.ranks.gather(f"{rank_prefix()}loader: {batch}" if failed else None)
            raise no_batches(self, next(filter(None, failures)))
        if refused_before:  # and counted, by the call of the command that a signal ended inside this window
            return False
        if worst == 1:
            self.skip([batch], fault, precision.draw_state(self.device), fault is not None, whole=False)
            return False
        self.window.accept(self.batch)
        return True

    def examine(self, batch) -> Fault | None:
        """Take note of a batch's files and look for what must not reach the device."""
        self.file_events.note(batch, self.incidents.file_faults)
        self.file_events.replace_rows(batch)
        poison = self.incidents.injections.get(self.window_number())
        if poison not in ("data", "label"):
            return check_batch(batch, self.incidents.classes)
        self.incidents.injections.pop(self.window_number())
        batch.update(inject_batch(batch, poison, self.incidents.classes))
        fault = check_batch(batch, self.incidents.classes)
        fault.injected = poison
        return fault
