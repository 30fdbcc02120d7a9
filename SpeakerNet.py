"""SpeakerNet (model and loss) and ModelTrainer (the one training loop, fp32, bf16 and fp16 alike).

python trainSpeakerNet.py --config configs/demo.yaml                                  # CPU or one GPU
python trainSpeakerNet.py --config configs/ResNet34_AAM.yaml --mixedprec              # 16 bit
torchrun --nproc_per_node 2 trainSpeakerNet.py --config configs/demo.yaml             # two processes
"""

import contextlib
import sys
import time

from torch import nn
from tqdm import tqdm

from config import KEYS
from corpus.loader import Loader, LoaderFailed
from DatasetLoader import collate
from errors import Finished, UsageError, rank_prefix
from settings import plugins
from training import class_parallel, display, distillation, finetuning, parallel, precision
from training.attempt import Attempt
from training.averaging import MovingAverage
from training.compilation import as_it_is, compile_model
from training.dumps import StepRecord
from training.endings import Endings
from training.evaluation import describe, write_evaluation
from training.failures import raise_explained
from training.faults import Fault, bad_setting, check_batch, inject_batch
from training.file_events import FileEvents
from training.generators import seed_everything
from training.incidents import Incidents
from training.late import LateStep, Launched, checks_late, transient_fault
from training.memory_format import lay_out
from training.mixup import Mix
from training.model import build_model, cautions, make_lazy_weights, try_model
from training.profiling import ModuleRanges
from training.progress import Progress, plan_of, step_schedule
from training.protocol import protocol_of
from training.returned import called, checked_embeddings, checked_loss
from training.saving import Saver
from training.sharded import whole
from training.signals import StopSignal
from training.spikes import SpikeReports
from training.state import RunState
from training.step import Step, chosen_recheck
from utils import plain_names

SAME_DRAWS = 3  # steps in a row that are refused with the same random numbers; after that others are drawn


class SpeakerNet(nn.Module):
    """Model and loss as one module: (data, label) -> (loss, accuracy in %); (data) -> embeddings."""

    distillation = None  # a teacher, which training/distillation.py attaches

    def __init__(self, values: dict | None = None, **keys):  # the keys of a configuration, in either way
        super().__init__()
        values = {name: key.default for name, key in KEYS.items()} | (values or {}) | keys
        self.per_row, self.size, self.model = values["nPerSpeaker"], values["nOut"], values["model"]
        self.trainfunc, self.mixup = values["trainfunc"], values["mixup"]
        self.__S__ = build_model(values)
        self.__L__ = plugins.build("loss", values["trainfunc"], values) if values["trainfunc"] else None
        make_lazy_weights(self, values)
        class_parallel.draw_classes(self, values)

    @property
    def loss(self):
        """The loss module, None if only the model was built."""
        return self.__L__

    def forward(self, data, label=None):
        """Embed data (..., samples), or with label (B,) return the loss of data (nPerSpeaker, B, samples)."""
        mix = Mix(self.mixup, label) if label is not None and self.mixup and self.training else None
        waves = (data if mix is None else mix.waves(data)).reshape(-1, data.shape[-1])
        embeddings = checked_embeddings(called(self.__S__, f"models/{self.model}.py", waves), waves, self)
        if label is None:
            return embeddings
        rows = embeddings.reshape(self.per_row, -1, embeddings.shape[-1])
        rows = rows[0] if self.per_row == 1 else rows.transpose(0, 1)  # (B, D) or (B, M, D)
        loss, accuracy = mix.result(self._loss_of, rows, label) if mix else self._loss_of(rows, label)
        if self.distillation is not None and self.training:
            loss = self.distillation(loss, waves, embeddings, self.__L__)
        return loss, accuracy

    def _loss_of(self, embeddings, label):
        """(loss, accuracy in %) of embeddings; UsageError if the loss gives anything else."""
        plugin = f"loss/{self.trainfunc}.py"
        return checked_loss(called(self.__L__, plugin, embeddings, label), plugin)


class Interrupted(Exception):
    """A signal asked the run to stop; the state has been saved."""


class ModelTrainer:
    """Trains a SpeakerNet: epochs of steps, each followed by an evaluation and a checkpoint."""

    def __init__(self, config, ranks, dataset, sampler, evaluator, files, log=None):
        self.config, self.ranks, self.evaluator, self.files = config, ranks, evaluator, files
        self.dataset, self.sampler = dataset, sampler
        self.device = ranks.device
        self.log = log or self.print
        self.progress = Progress(plan_of(config, sampler, ranks.world), config.gradient_accumulation_steps)
        seed_everything(config.seed)
        self.network = SpeakerNet(config.values())
        class_parallel.split_classes(self.network, config, ranks, self.log)
        distillation.attach(self.network, config, dataset, self.log)
        self.network.to(self.device)
        try_model(self.network, config, self.device)
        parallel.prepare(self.network, config, ranks, self.log)
        seed_everything(config.seed + 1000003 * ranks.rank)  # dropout differs between ranks, weights do not
        built = finetuning.build_optimizer(config, self.network, self.progress.steps_per_epoch, ranks.world)
        self.optimizer, self.scheduler, self.scheduler_unit = built
        class_parallel.check_optimizer(self.optimizer, config)
        amp_dtype = precision.choose_amp_dtype(config, self.device)
        lay_out(self.network, config.memory_format, amp_dtype, self.device)
        self.step = Step(self.network, ranks, amp_dtype, self.optimizer, config.grad_clip, self.log)
        self.step.rechecks = chosen_recheck(config, self.step, self.log)
        self.late, self.reads_late = LateStep(self.step), checks_late(config, self.step, self.log)
        self.average = MovingAverage(self.network, config.ema_decay)
        self.backbone = finetuning.FrozenBackbone(self.network, config.freeze_epochs, config.freeze_norms)
        pin = config.pin_memory and self.device.type == "cuda"
        workers = config.nDataLoaderThread
        self.loader = Loader(dataset, sampler, collate, config, workers, pin, config.persistent_workers)
        self.file_events = FileEvents(config, dataset.list, ranks, files, self.log)
        self.incidents = Incidents(config, ranks, files, max(config.nClasses, dataset.classes))
        self.endings = Endings(config, files, self.step, self.incidents.writer)
        self.display = display.Display(config, self.progress, files, self.log, self.device)
        self.stop_signal = StopSignal()
        self.spikes = SpikeReports(config, ranks, files, self.step, self.incidents, self.log)
        self.profiler, self.profiling = None, config.enable_profiling
        self.state = RunState(
            config=config,
            ranks=ranks,
            files=files,
            step=self.step,
            scheduler=self.scheduler,
            scheduler_unit=self.scheduler_unit,
            average=self.average,
            progress=self.progress,
            sampler=sampler,
            incidents=self.incidents,
            file_events=self.file_events,
            protocol=protocol_of(config),
            speakers=dataset.speakers_hash(),
            log=self.log,
        )
        self.saver = Saver(config, ranks, files, self.state.capture, self.step.buffers.nonfinite_by_design, self.log)

    # ---------------------------------------------------------------------------------------------- the epochs

    def run(self):
        """Train to ``max_epoch``; raises Finished or Interrupted if it stops before."""
        progress = self.progress
        if progress.epoch <= self.config.max_epoch:
            compile_model(self.step, self.config, self.log, self.backbone)
            if self.ranks.any(self.stop_signal.number is not None):  # compiling takes minutes
                self.save_if_due()
        while progress.epoch <= self.config.max_epoch:
            if not progress.trained:
                steps = self.profiled_steps()
                with (
                    ModuleRanges(self.network if steps else None, progress.accumulation) as ranges,
                    self.files.profiler(steps, ranges.flops) as self.profiler,
                ):
                    self.train_epoch()
                self.require_a_step()
                self.finish_epoch()
            if progress.epoch % self.config.test_interval == 0 or progress.epoch == self.config.max_epoch:
                self.saver.last(soon=True)
                self.evaluate()
            progress.begin_epoch(progress.epoch + 1)
            self.saver.last(soon=progress.epoch <= self.config.max_epoch)
            self.stop_early()

    def train_epoch(self):
        """Train on the batches of the epoch that are left."""
        progress, window = self.progress, []
        self.enter_epoch()
        self.sampler.set_position(progress.epoch, progress.batch, progress.dealt)
        progress.window.accepted = 0
        waiting = time.perf_counter()
        self.display.begin(hidden=not self.ranks.main or not sys.stderr.isatty())
        for batch in self.loader if progress.batch < progress.batches else ():
            waiting = progress.lap(waiting, waited=True)
            progress.batch += 1
            if self.accept(batch):
                window.append(batch)
            if progress.accumulation > 1 and self.ranks.any(self.stop_signal.number is not None):
                self.save_if_due()  # the next call goes on from where the window opened
            if len(window) == progress.accumulation or (window and progress.batch == progress.batches):
                self.train_step(window)
                window = []
                waiting = progress.lap(waiting)
                self.display.write_point(self.incidents.history, self.optimizer, self.device)
                if self.profiler is not None:
                    self.profiler.step()
                    waiting = time.perf_counter()  # what a profile takes to write is no time of the epoch
                self.save_if_due()
            waiting = progress.lap(waiting)
            self.display.show()
        self.settle()
        progress.lap(waiting)
        self.display.end()

    def train_step(self, window: list[dict]) -> Attempt | None:
        """Train on a window of batches; a step in which something is not finite leaves no trace.

        Returns the step that is known to be good now: this one, or with late checks the one before; or None.
        """
        poison = self.incidents.injections.pop(self.progress.window_number, "")
        epoch = self.progress.fractional_epoch
        step = Launched(window, self.progress.leave(), epoch, poison)
        settled = None
        if self.reads_late and self.late.possible and not bad_setting(self.optimizer):
            with self.progress.at(step.place), self.saved_if_it_fails():
                self.late.forward(step)
            settled = self.settle()
            if self.late.possible and not bad_setting(self.optimizer):
                with self.progress.at(step.place), self.saved_if_it_fails():
                    if self.late.begun is None:  # the step before was looked at, or taken again
                        self.late.forward(step)
                    if self.late.update(step):
                        return settled
            self.late.discard()
        self.settle()
        with self.progress.at(step.place):
            return self.conclude(step, self.take(step))

    def settle(self) -> Attempt | None:
        """Wait for the step whose outcome is not known yet, if there is one, and do what it asks for."""
        late, step = self.late, self.late.pending
        if step is None:
            return None
        attempt = late.outcome()
        with self.progress.at(step.place):
            if not attempt.finite:
                late.discard()
                late.undo()
                return self.conclude(step, self.take(step, attempt))
            settled = self.conclude(step, attempt)
        self.display.write_point(self.incidents.history, self.optimizer, self.device)
        return settled

    def take(self, launched: Launched, first: Attempt | None = None) -> Attempt | Fault:
        """Take a step and wait for it; ``first``: what was read of it late, not finite."""
        window, epoch, poison = launched.window, launched.epoch, launched.poison
        with self.saved_if_it_fails():
            result = self.step.take(window, epoch, poison)
            if first is not None and isinstance(result, Attempt):
                self.late.undo()
                result = transient_fault(first)
            if isinstance(result, Fault) and result.transient:
                self.incidents.handle(self.record(), window, result)
                result = self.step.take(window, epoch, poison)
        return result

    def conclude(self, launched: Launched, result: Attempt | Fault) -> Attempt | None:
        """Do what a step asks for that was taken, or refused: returns the first, None for the other."""
        window, progress = launched.window, self.progress
        if isinstance(result, Fault):
            self.refuse(window, result)
            return None
        spike = self.spikes.find(result)
        if spike:
            if self.late.begun is not None:  # what this step began with is looked at
                self.late.discard()
                self.step.set_epoch(launched.epoch)
            self.spikes.report(spike, window, result, self.record())
        self.incidents.remember(progress.step, float(self.optimizer.param_groups[0]["lr"]), result)
        if self.scheduler_unit == "iteration":
            with self.saved_if_it_fails():
                step_schedule(self.scheduler, self.optimizer, f"scheduler/{self.config.scheduler}.py")
        self.average.update()
        progress.step += 1
        progress.nonfinite_in_a_row = 0
        progress.window.close()
        progress.count(window, result)
        return result

    def accept(self, batch) -> bool:
        """Check a batch on the host, before the device sees it; a bad one is left out on all ranks.

        Raises Finished on all ranks if one of them can load no more.
        """
        progress = self.progress
        failed, refused_before = isinstance(batch, LoaderFailed), progress.batch in progress.window.refused
        fault = None if failed or refused_before else self.examine(batch)
        rows = 0 if failed else batch["label"].shape[0]
        everyone = self.ranks.each([2 if failed else int(fault is not None), rows])
        worst = max(flag for flag, _ in everyone)
        if worst:
            self.settle()
        if worst == 2:
            progress.batch -= 1
            self.saver.last()
            failures = self.ranks.gather(f"{rank_prefix()}loader: {batch}" if failed else None)
            raise self.endings.no_batches(next(filter(None, failures)))
        if refused_before:  # and counted, by the call of the command that a signal ended inside this window
            return False
        if worst == 1:
            self.refuse([batch], fault or Fault("", "", at_fault=False), whole=False)
            return False
        batch["rows"] = sum(count for _, count in everyone)  # of all processes
        batch["share"] = rows * len(everyone) / batch["rows"]
        progress.window.accept(progress.batch)
        return True

    def examine(self, batch) -> Fault | None:
        """Take note of a batch's files and look for what must not reach the device."""
        self.file_events.note(batch, lambda *found: self.incidents.file_faults(self.record(), *found))
        self.file_events.replace_rows(batch)
        number = self.progress.window_number
        poison = self.incidents.injections.get(number)
        if poison not in ("data", "label"):
            return check_batch(batch, self.incidents.classes)
        self.incidents.injections.pop(number)
        batch.update(inject_batch(batch, poison, self.incidents.classes))
        fault = check_batch(batch, self.incidents.classes)
        fault.injected = poison
        return fault

    def refuse(self, window: list[dict], fault: Fault, whole: bool = True):
        """Leave out the ``whole`` window, or one batch of it: the model is as it was before it.

        Ends the run after ``nan_patience`` in a row, and after an update that could not be taken back.
        """
        progress = self.progress
        progress.last_fault = self.incidents.handle(self.record(), window, fault)
        if not fault.undone:
            raise self.endings.spoilt_by_an_update(fault, self.saver.saved_step)
        self.optimizer.zero_grad(set_to_none=True)
        progress.totals["skipped"] += len(window)
        progress.nonfinite_in_a_row += 1
        if whole:
            progress.window.close()
            if progress.nonfinite_in_a_row >= SAME_DRAWS:
                self.step.keep_draws()
        else:
            progress.window.refuse(progress.batch)
        if progress.nonfinite_in_a_row >= self.config.nan_patience:
            in_a_row, progress.nonfinite_in_a_row = progress.nonfinite_in_a_row, 0  # the next call counts anew
            self.saver.last()
            raise self.endings.patience_is_over(in_a_row, progress.last_fault)

    def record(self) -> StepRecord:
        """What a dump tells of the step at hand."""
        progress = self.progress
        return StepRecord.of(
            self.step,
            epoch=progress.epoch,
            batch=progress.batch,
            number=progress.step,
            fractional_epoch=progress.fractional_epoch,
            lr=float(self.optimizer.param_groups[0]["lr"]),
        )

    # ------------------------------------------------------------------------------------- around the epochs

    def enter_epoch(self):
        """Freeze or free the backbone, and share the gradients of what trains now between several processes."""
        self.network.train()
        changed = self.backbone.enter(self.progress.epoch)
        if changed:
            self.log(str(self.backbone))
            self.step.parallel = self.network
        if self.step.shares and self.step.parallel is self.network:
            self.step.parallel = parallel.shared(self.network, self.config, self.ranks, self.step.note)

    def profiled_steps(self) -> int:
        """Steps of the coming epoch that ``enable_profiling`` wants: up to 20 in the first epoch of this process."""
        left = -(-(self.progress.batches - self.progress.batch) // self.progress.accumulation)
        wanted, self.profiling = self.profiling, self.profiling and not left
        return min(left, 20) if wanted else 0

    def require_a_step(self):
        """End the run after an epoch without a step; the next call trains this epoch from its start."""
        progress = self.progress
        if progress.totals["utterances"]:
            return
        skipped, progress.nonfinite_in_a_row = progress.totals["skipped"], 0
        progress.begin_epoch(progress.epoch)
        self.saver.last()
        raise self.endings.no_step_in_epoch(progress.epoch, skipped, progress.last_fault)

    def finish_epoch(self):
        """Step the schedule and write the epoch's line everywhere."""
        rates = display.learning_rates(self.optimizer)
        if self.scheduler_unit == "epoch":
            try:
                step_schedule(self.scheduler, self.optimizer, f"scheduler/{self.config.scheduler}.py")
            except UsageError:  # the same command steps it again
                self.saver.last()
                raise
        self.progress.trained = True
        self.display.report_epoch(rates)
        self.file_events.share()
        self.file_events.report_conversions()

    def evaluate(self):
        """Evaluate, write the checkpoint of the epoch, keep the best."""
        progress = self.progress
        self.late.release()
        try:
            with self.average.applied(), whole(self.network), as_it_is(self.network.__S__):
                stop, best = lambda: self.stop_signal.number is not None, progress.best["eer"]
                result = self.evaluator.run(self.network, progress.epoch, stop, best)
        except LoaderFailed as error:
            raise self.endings.no_batches(error) from error
        if result.get("stopped"):
            raise Interrupted(self.ranks.highest(self.stop_signal.number or 0))
        for line in describe(result, self.config):
            self.log(line)
        write_evaluation(self.files, self.evaluator, result, self.config, progress.step)
        better = not result["failed"] and (progress.best["eer"] is None or result["eer"] < progress.best["eer"])
        improved = better and progress.step > 0  # weights that no step has trained are never the best
        if improved:
            best = {"eer": result["eer"], "epoch": progress.epoch, "threshold": result["threshold"], "waited": 0}
            progress.best = best
        else:
            progress.best["waited"] += 1
        self.saver.evaluated(progress.epoch, result, self.evaluator, improved)

    def stop_early(self):
        """End the run if ``patience`` evaluations brought nothing better."""
        waited = self.progress.best["waited"]
        if self.config.patience and waited >= self.config.patience:
            line = f"Early stopping at epoch {self.progress.epoch - 1}."
            previous = self.files.scores.read_text(encoding="utf-8") if self.files.scores.is_file() else ""
            if line not in previous:
                self.files.score_line(line)
            raise Finished([f"{line} No better EER in {waited} evaluations (patience)."], 0)

    # ------------------------------------------------------------------------------------------ save and resume

    def begin(self):
        """Go on from the newest checkpoint of the run; without one start from ``initial_model``, if there is one."""
        if not self.resume():
            finetuning.load_initial(self.network, self.dataset, self.config, self.log)
        elif self.config.initial_model:
            self.log("initial_model is not used: the run continues from its own state")
        for warning in cautions(self.network, self.optimizer):
            self.log(f"WARNING: {warning}")

    def resume(self) -> bool:
        """Go on from the newest checkpoint of the run; returns whether there was one."""
        if self.state.resume() is None:
            return False
        self.saver.saved_step = self.display.last_point = self.progress.step
        return True

    @contextlib.contextmanager
    def saved_if_it_fails(self):
        """Context of a step: the state before it is saved if an exception ends it; a plug-in may raise anything."""
        try:
            yield
        except Exception as error:
            self.save_before_step()
            raise_explained(error, self.config)
            raise

    def save_before_step(self):
        """Save the state as it was before a step that an exception ends, if the other processes need not be asked."""
        try:
            undone = self.late.discard() if self.late.begun else self.step.undo()
            if undone and self.ranks.world == 1:
                self.settle()
                self.saver.last()
                self.log(f"the state before this step is in {self.files.model / 'last.model'}")
        except RuntimeError as error:  # after an error of the device nothing can be read from it
            self.log(f"the state before this step cannot be saved: {error}")

    def save_if_due(self):
        """Save inside an epoch by steps or minutes, and on a signal; stop with too many bad files. The ranks agree."""
        number = self.stop_signal.number or 0
        due = self.saver.due(self.progress.step + (self.late.pending is not None)) or self.loader.restarted
        due, number, found = self.ranks.highest_of([int(due), number, int(bool(self.file_events.found))])
        if found:
            self.file_events.share()
        if due or number or self.file_events.too_many():
            self.settle()
            self.saver.last(soon=not number and not self.file_events.too_many())
            self.loader.restarted = False
        if self.file_events.too_many():
            raise Finished([self.file_events.verdict()], 2)
        if number:
            raise Interrupted(number)

    def close(self):
        """End the loader processes and finish writing dumps and checkpoints."""
        self.incidents.writer.close()
        self.saver.close()
        self.loader = self.evaluator.loader = None

    def print(self, text: str):
        """Print a line from the main process, above the progress bar."""
        if self.ranks.main:
            tqdm.write(display.folded(plain_names(text), display.columns()), file=sys.stdout)
            sys.stdout.flush()
