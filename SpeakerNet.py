"""SpeakerNet (model and loss) and ModelTrainer (the one training loop, fp32, bf16 and fp16 alike).

python trainSpeakerNet.py --config configs/demo.yaml                                  # CPU or one GPU
python trainSpeakerNet.py --config configs/ResNet34_AAM.yaml --mixedprec              # 16 bit
torchrun --nproc_per_node 2 trainSpeakerNet.py --config configs/demo.yaml             # two processes
"""

import functools
import math
import sys
import time

import torch
from torch import nn
from tqdm import tqdm

from corpus.loader import Loader, LoaderFailed
from DatasetLoader import collate
from errors import Finished, UsageError
from settings import plugins
from storage import checkpoint
from training import finetuning, precision, progress
from training.averaging import MovingAverage
from training.endings import no_batches, no_step_in_epoch
from training.evaluation import describe, write_evaluation
from training.file_events import FileEvents
from training.incidents import Incidents
from training.position import Window, plan_of
from training.protocol import new_best, protocol_of
from training.saving import Saver
from training.signals import catch_signals
from training.state import capture
from training.step import GuardedStep
from training.update import UpdateGuard


class SpeakerNet(nn.Module):
    """Model and loss as one module: (data, label) -> (loss, accuracy in %); (data) -> embeddings."""

    def __init__(self, values: dict):
        super().__init__()
        self.per_row = values["nPerSpeaker"]
        self.__S__ = plugins.build("models", values["model"], values)
        self.__L__ = plugins.build("loss", values["trainfunc"], values) if values["trainfunc"] else None

    @property
    def loss(self):
        """The loss module, None where only the model was built."""
        return self.__L__

    def forward(self, data, label=None):
        """Embed data (..., samples), or with label (B,) return the loss of data (nPerSpeaker, B, samples)."""
        embeddings = self.__S__(data.reshape(-1, data.shape[-1]))
        if label is None:
            return embeddings
        embeddings = embeddings.reshape(self.per_row, -1, embeddings.shape[-1])
        embeddings = embeddings[0] if self.per_row == 1 else embeddings.transpose(0, 1)  # (B, D) or (B, M, D)
        return self.__L__(embeddings, label)


class Interrupted(Exception):
    """A signal asked the run to stop; the state has been saved."""


class ModelTrainer(GuardedStep):
    """Trains a SpeakerNet: the step, the epochs, evaluation, saving and resuming."""

    def __init__(self, config, ranks, dataset, sampler, evaluator, files):
        self.config, self.ranks, self.dataset, self.sampler = config, ranks, dataset, sampler
        self.evaluator, self.files = evaluator, files
        self.device = ranks.device
        checkpoint.seed_everything(config.seed)
        self.network = SpeakerNet(config.values()).to(self.device)
        checkpoint.seed_everything(config.seed + 1000003 * ranks.rank)  # dropout differs between ranks, weights do not
        self.amp_dtype = precision.choose_amp_dtype(config, self.device)
        self.scaler = precision.LossScaler(self.amp_dtype is torch.float16)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.buffers = precision.BufferSnapshot(self.network)
        self.accumulation = config.gradient_accumulation_steps
        self.steps_per_epoch = -(-len(sampler) // self.accumulation)
        self.build_optimizer()
        self.guard = UpdateGuard(self.optimizer, self.network, self.say)
        self.average = MovingAverage(self.network, config.ema_decay)
        self.backbone = finetuning.FrozenBackbone(self.network, config.freeze_epochs)
        if config.compile_model:
            self.network.__S__.compile()
        self.parallel = self.network  # of several processes by ``over_ranks`` when training begins and all are ready
        pin, keep = config.pin_memory and self.device.type == "cuda", config.persistent_workers
        self.loader = Loader(dataset, sampler, collate, config, config.nDataLoaderThread, pin, keep)
        self.plan, self.window = plan_of(config, sampler, ranks.world), Window()
        self.begin_epoch(1)
        self.step, self.nonfinite_in_a_row = 0, 0
        self.best, self.protocol = new_best(), protocol_of(config)
        self.file_events = FileEvents(config, len(dataset), ranks, files, self.say)
        self.incidents = Incidents(self)
        self.signal, self.profiler, self.profiling = None, None, config.enable_profiling
        self.last_fault = None
        self.last_line, self.last_point = time.monotonic(), 0
        self.saver = Saver(config, ranks, files, functools.partial(capture, self), self.buffers.masks, self.say)

    def build_optimizer(self):
        """Optimizer and schedule from their plug-ins."""
        config = self.config
        values = finetuning.scaled(config.values(), finetuning.learning_rate_scale(config, self.ranks.world))
        values["steps_per_epoch"] = self.steps_per_epoch
        groups = finetuning.parameter_groups(self.network, values)
        self.optimizer = plugins.build("optimizer", config.optimizer, values, groups)
        self.scheduler, self.scheduler_unit = plugins.build("scheduler", config.scheduler, values, self.optimizer)
        if self.scheduler_unit not in ("epoch", "iteration"):
            raise UsageError(
                f"scheduler/{config.scheduler}.py: must say 'epoch' or 'iteration', not {self.scheduler_unit}"
            )
        finetuning.check_ratio(self.optimizer, values, config.scheduler)

    def over_ranks(self):
        """The network as the step calls it: under several processes it shares the gradients of what trains now."""
        if self.ranks.world == 1:
            return self.network
        return nn.parallel.DistributedDataParallel(
            self.network,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            find_unused_parameters=self.config.find_unused_parameters,
        )

    # ---------------------------------------------------------------------------------------------- the epochs

    def run(self):
        """Train to ``max_epoch``; raises Finished or Interrupted where it stops before."""
        catch_signals(self)
        while self.epoch <= self.config.max_epoch:
            if not self.trained:
                with self.files.profiler(self.profiled_steps()) as self.profiler:
                    self.train_epoch()
                self.require_a_step()
                self.finish_epoch()
            if self.epoch % self.config.test_interval == 0 or self.epoch == self.config.max_epoch:
                self.save_last()
                self.evaluate()
            self.begin_epoch(self.epoch + 1)
            self.save_last()
            self.stop_early()

    def profiled_steps(self) -> int:
        """Steps of the coming epoch that ``enable_profiling`` wants: up to 20 in the first epoch of this process."""
        left = -(-(len(self.sampler) - self.batch) // self.accumulation)
        wanted, self.profiling = self.profiling, self.profiling and not left
        return min(left, 20) if wanted else 0

    def begin_epoch(self, epoch: int):
        """Go to the start of an epoch."""
        self.epoch, self.batch, self.trained = epoch, 0, False
        self.totals = progress.new_totals()
        self.window.close()

    def train_epoch(self):
        """Train on the batches of the epoch that are left."""
        self.network.train()
        changed = self.backbone.enter(self.epoch)
        if changed or self.parallel is self.network:
            self.parallel = self.over_ranks()
        if changed:
            self.say(str(self.backbone))
        self.sampler.set_position(self.epoch, self.batch)
        self.window.accepted = 0
        window, waiting = [], time.perf_counter()
        bar = progress.progress_bar(self, hidden=not self.ranks.main or not sys.stderr.isatty())
        for batch in self.loader if self.batch < len(self.sampler) else ():
            self.totals["waited"] += time.perf_counter() - waiting
            self.batch += 1
            if self.accept(batch):
                window.append(batch)
            if self.accumulation > 1 and self.ranks.any(self.signal is not None):
                self.save_if_due()  # the next call goes on from where the window opened
            if len(window) == self.accumulation or (window and self.batch == len(self.sampler)):
                attempt = self.train_step(window)
                self.count(window, attempt)
                window = []
                waiting = self.lap(waiting)
                progress.write_point(self)
                if self.profiler is not None:
                    self.profiler.step()
                self.save_if_due()
            waiting = self.lap(waiting)
            progress.show(self, bar)
        bar.close()

    def lap(self, since: float) -> float:
        """Add the time that has passed to the epoch's; returns now."""
        now = time.perf_counter()
        self.totals["seconds"] += now - since
        return now

    def count(self, window, attempt):
        """Add a step that was taken to the epoch's means."""
        if attempt is not None:
            utterances = sum(batch["data"].shape[0] * batch["data"].shape[1] for batch in window)
            self.totals["utterances"] += utterances
            self.totals["loss"] += attempt.loss * utterances
            self.totals["accuracy"] += attempt.accuracy * utterances

    def require_a_step(self):
        """End the run after an epoch without a step; the next call trains this epoch from its start."""
        if self.totals["utterances"]:
            return
        skipped, self.nonfinite_in_a_row = self.totals["skipped"], 0
        self.begin_epoch(self.epoch)
        self.save_last()
        raise no_step_in_epoch(self, skipped)

    def finish_epoch(self):
        """Step the schedule and write the epoch's line everywhere."""
        self.trained = True
        drifted = self.ranks.reconcile([*self.parameters, *self.average.tensors.values()], self.optimizer)
        if drifted:
            self.say(f"rank {drifted}: weights or moments differ from those of rank 0, and are set to them again")
        rates = progress.learning_rates(self.optimizer)
        if self.scheduler_unit == "epoch":
            self.scheduler.step()
        progress.report_epoch(self, rates)
        self.file_events.share()
        self.file_events.report_conversions()

    def means(self):
        """Loss, accuracy in %, utterances a second over all ranks, and % of time spent waiting for data."""
        t, world = self.totals, self.ranks.world
        n = t["utterances"]
        values = (t["loss"] / n, t["accuracy"] / n) if n else (math.nan, math.nan)
        return (*values, world * n / max(t["seconds"], 1e-9), 100 * t["waited"] / max(t["seconds"], 1e-9))

    def evaluate(self):
        """Evaluate, write the checkpoint of the epoch, keep the best."""
        self.guard.release()
        try:
            with self.average.applied():
                result = self.evaluator.run(self.network, self.epoch, lambda: self.signal is not None)
        except LoaderFailed as error:
            raise no_batches(self, error) from error
        if result.get("stopped"):
            number = torch.tensor(float(self.signal or 0), device=self.device)
            raise Interrupted(int(self.ranks.maximum(number)))
        for line in describe(result, self.config):
            self.say(line)
        write_evaluation(self.files, self.evaluator, result, self.config, self.step)
        better = not result["failed"] and (self.best["eer"] is None or result["eer"] < self.best["eer"])
        improved = better and self.step > 0  # weights that no step has trained are never the best
        if improved:
            self.best = {"eer": result["eer"], "epoch": self.epoch, "threshold": result["threshold"], "waited": 0}
        else:
            self.best["waited"] += 1
        self.saver.evaluated(self.epoch, result, self.evaluator, improved)

    def stop_early(self):
        """End the run where ``patience`` evaluations brought nothing better."""
        if self.config.patience and self.best["waited"] >= self.config.patience:
            line = f"Early stopping at epoch {self.epoch - 1}."
            previous = self.files.scores.read_text(encoding="utf-8") if self.files.scores.is_file() else ""
            if line not in previous:
                self.files.score_line(line)
            raise Finished([f"{line} No better EER in {self.best['waited']} evaluations (patience)."], 0)

    # ------------------------------------------------------------------------------------------ save and resume

    def save_last(self):
        """Write model/last.model; a collective under several processes."""
        self.saver.last()

    def save_if_due(self):
        """Save inside an epoch by steps or minutes, and on a signal; stop with too many bad files. The ranks agree."""
        wish = [self.saver.due(self.step) or self.loader.restarted, self.signal or 0, bool(self.file_events.found)]
        wish = torch.tensor(wish, dtype=torch.float32, device=self.device)
        due, number, found = self.ranks.maximum(wish).tolist()
        if found:
            self.file_events.share()
        if due or number or self.file_events.too_many():
            self.save_last()
            self.loader.restarted = False
        if self.file_events.too_many():
            raise Finished([self.file_events.verdict()], 2)
        if number:
            raise Interrupted(int(number))

    def close(self):
        """End the loader processes and finish writing dumps."""
        self.incidents.writer.close()
        self.loader = self.evaluator.loader = None

    # ------------------------------------------------------------------------------------------------- reporting

    def say(self, text: str):
        """Print a line from the main process, above the progress bar."""
        if self.ranks.main:
            tqdm.write(progress.folded(text, progress.columns()), file=sys.stdout)
            sys.stdout.flush()
