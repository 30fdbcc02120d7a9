"""Everything that makes the next training step identical: collect it, and continue from it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import KEYS, Config
from corpus.sources import shown
from errors import SharedError, UsageError
from settings import plugins
from settings.reader import in_words
from settings.user_code import changed_since
from storage import checkpoint
from training import equality
from training.distillation import facts_of_teacher
from training.drift import refuse_drift
from training.generators import drawn_elsewhere, generator_state, restore_generators, seed_everything
from training.optimizer_state import attributes_of, restore_attributes
from training.progress import new_best
from training.protocol import differences, list_before
from training.restart import is_full, newest_whole, sound_or_offered
from training.slices import cut, put_together, taken_apart
from utils import plain_names

# Options that are the configuration's, although load_state_dict restores the old run's: configuration key -> attribute.
OPTIONS = {key: key for key in ("weight_decay", "momentum", "nesterov", "eps")}
OPTIONS |= {"beta1": "betas", "beta2": "betas", "lr_decay": "gamma", "lr_step": "step_size"}
TEACHER = {"teacher_checkpoint", "teacher_config"}  # keys that choose its files


@dataclass
class RunState:
    """The parts of a run that have a state, in the keys of its checkpoints."""

    config: Config
    ranks: Any
    files: Any
    step: Any  # network, optimizer, loss scaler, buffers
    scheduler: Any
    scheduler_unit: str
    average: Any
    progress: Any
    sampler: Any
    incidents: Any
    file_events: Any
    protocol: dict
    speakers: str  # hash of the speakers and their order
    log: Any

    def capture(self, evaluated: bool = False) -> dict:
        """Collect the state of every part; a collective under several processes, which must hold the same.

        With ``evaluated`` and a moving average, ``model_state_dict`` is what an evaluation saw, the averaged weights,
        and ``raw_model_state_dict`` what training goes on from.
        """
        refuse_drift(self.ranks, self.step, self.average, self.files.model)
        parts = {
            "model": self.step.network,
            "ema": self.average,
            "optimizer": self.step.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.step.scaler,
        }
        state = {f"{name}_state_dict": part.state_dict() for name, part in parts.items()}
        if evaluated and self.average.updates > 0:
            state["raw_model_state_dict"] = state["model_state_dict"]
            state["model_state_dict"] = self.average.model_state()
        state = put_together(state, self.step.network, self.step.optimizer, self.ranks, to=0)
        schedule = state["scheduler_state_dict"]
        state["scheduler_state_dict"] = {key: value for key, value in schedule.items() if not callable(value)}
        return {
            "format_version": checkpoint.FORMAT_VERSION,
            **state,
            "optimizer_attributes": attributes_of(self.step.optimizer),
            **self.progress.state_dict(),
            "rng_state": self.ranks.gather(generator_state(self.step.device)),
            "module_state": self.ranks.gather(self.step.module_state.state_dict()),
            "incidents": self.ranks.gather(self.incidents.state_dict()),
            "file_events": self.file_events.state_dict(),
            "file_sizes": self.files.sizes(),
            "evaluated": evaluated,
            "protocol": self.protocol,
            "arithmetic": equality.arithmetic_of(self.step.device),
            "config": self.config.values(),
            "speakers": self.speakers,
            **facts_of_teacher(self.step.network),
        }

    def refuse_unreadable(self):
        """Raise SharedError if a checkpoint of the run could not be gone on from, as one with sparse buffers.

        A collective.
        """
        state = self.capture()
        fault = self.ranks.from_main(checkpoint.unreadable(state) if self.ranks.main else "")
        if fault:
            raise SharedError(
                f"a checkpoint of this run could not be read again: {plain_names(fault)}; keep it out of what is saved "
                "(of a buffer persistent=False), or in numbers, texts and real tensors"
            )

    def resume(self) -> Path | None:
        """Continue from model/last.model, else from the newest model0*.model; returns its path, None without one."""
        found = None
        if self.ranks.main:
            found = newest_whole(self.files.model, self.log), list_before(self.files.result)
        path, listed = self.ranks.from_main(found)  # the one collective: what follows may fail on a process alone
        if path is None:
            return None
        state = sound_or_offered(path, self.step.buffers.nonfinite_by_design)
        if not is_full(state) and path.name != "last.model":
            self.continue_older(state, path)
            return path
        if "optimizer_state_dict" not in state:  # a mean of checkpoints, or another trainer's file
            raise UsageError(f"{path}: holds no state to go on from; move it away and start from it with initial_model")
        if not is_full(state):
            raise UsageError(f"{path}: is of format {state.get('format_version')}; choose another save_path")
        self.refuse_another_run(state, path)
        self.load_weights(state, path)
        self.refuse_other_weights(state, path)
        self.load(state, path, listed)
        return path

    def load_weights(self, state: dict, path):
        """Take over the weights; UsageError if they do not fit."""
        weights = checkpoint.weights_of(state, path, self.step.network.state_dict())
        faults = checkpoint.load_weights(self.step.network, cut(weights, self.step.network), path)
        differing = faults["model"] + faults["loss"]
        if differing:
            raise UsageError(f"{path}: does not fit this configuration ({differing[0]}); choose another save_path")

    def load(self, state: dict, path, listed: str):
        """Take over everything but the weights of a full state, and say what has changed since.

        ``listed``: what ``list_before`` says.
        """
        state = taken_apart(state, self.step.network, self.step.optimizer)
        old = state["config"]
        changed = {k for k, v in self.config.values().items() if k in old and old[k] != v}
        kind = self.progress.load_state_dict(state, self.sampler)
        anew = self.scheduler_unit == "iteration" and self.progress.other_steps(state)
        self.restore_optimizer(state, changed, anew=anew)
        self.step.scaler.load_state_dict(state["scaler_state_dict"])
        self.average.load_state_dict(state.get("ema_state_dict", {}))
        self.file_events.load_state_dict(state.get("file_events", {"known": {}, "reported": []}))
        self.step.module_state.load_state_dict(own_part(state.get("module_state", {}), self.ranks))
        history = parts_of(state["incidents"])[0]["history"]
        self.incidents.load_state_dict({**own_part(state["incidents"], self.ranks), "history": history})
        worlds = len(state["rng_state"]), self.ranks.world
        if self.ranks.rank < worlds[0]:
            restore_generators(state["rng_state"][self.ranks.rank], self.step.device)
        else:  # a process that was not there: not the numbers that the first ones of the run had
            seed_everything(self.config.seed + 1000003 * self.ranks.rank + 7919 * self.progress.step)
        progress = self.progress
        if progress.epoch <= self.config.max_epoch:
            self.files.cut_back(state["file_sizes"], progress.epoch)
        where = f"batch {progress.batch} of" if progress.batch else "the start of"
        self.log(f"resuming from {path}: {where} epoch {progress.epoch}, step {progress.step}")
        sources, teacher = self.changed_files(state, changed)
        if progress.epoch <= self.config.max_epoch:
            text = equality.describe(
                *(kind, progress.changes_of_plan(state), progress),
                left_out=self.sampler.plan(progress.epoch, progress.dealt).left_out if progress.dealt else 0,
                anew=anew,
                worlds=worlds,
                elsewhere=drawn_elsewhere(state["rng_state"][0], self.step.device),
                exact=self.step.device.type == "cpu" or self.config.deterministic,
                arithmetic=equality.changes_of_arithmetic(
                    state.get("arithmetic", {}), equality.arithmetic_of(self.step.device), changed
                ),
                others=equality.deciding(changed) + sources + teacher,
            )
            self.log(f"  {text}")
        for name in sorted(changed - {"config", "preflight"}):
            self.log(f"  {name}: {in_words(old[name])} before, {in_words(getattr(self.config, name))} now")
        if sources:
            self.log(f"  source changed since this state was saved: {', '.join(sources)}")
        if teacher:
            files = " and ".join(teacher)
            self.log(f"  {files} changed since this state was saved: the student goes on with another teacher")
        self.begin_anew(differences(self.protocol, state, listed))

    def changed_files(self, state: dict, changed: set[str]) -> tuple[list[str], list[str]]:
        """Sources, and files of a teacher that the keys name as before, that are others than those of a state."""
        sources = changed_since(own_part(state["incidents"], self.ranks).get("sources", {}), [], plugins.ROOT)
        if facts_of_teacher(self.step.network).get("teacher") == state.get("teacher") or changed & TEACHER:
            return list(sources), []
        return list(sources), [name for name in (self.config.teacher_checkpoint, self.config.teacher_config) if name]

    def begin_anew(self, differing: list[str]):
        """Forget the best evaluation if it cannot be compared with those to come, by the keys in which they differ."""
        if not differing:
            return
        best, self.progress.best = self.progress.best, new_best()
        if best["eer"] is not None:
            self.log(
                f"  the best EER so far, {best['eer']:.2f} % at epoch {best['epoch']}, is of another protocol "
                f"({', '.join(differing)}): best and patience start anew, and the next evaluation replaces model_best"
            )

    def restore_optimizer(self, state: dict, changed: set[str], anew: bool):
        """Take over optimizer and schedule; options among the ``changed`` keys are the configuration's.

        ``anew``: a schedule by iteration whose steps an epoch are others is not loaded but moved to where the run is.
        """
        optimizer, scheduler = self.step.optimizer, self.scheduler
        fresh = [dict(group) for group in optimizer.param_groups]
        saved = state["optimizer_state_dict"]
        # Before it is loaded: where the counters of a fused update lie depends on it.
        groups = [
            {**group, "fused": values["fused"]} if "fused" in values else group
            for group, values in zip(saved["param_groups"], fresh)
        ]
        optimizer.load_state_dict({**saved, "param_groups": groups})
        restore_attributes(optimizer, state.get("optimizer_attributes", {}))
        schedule = dict(vars(scheduler))
        if not anew:
            scheduler.load_state_dict(state["scheduler_state_dict"])
        for key, option in OPTIONS.items():
            for group, values in zip(optimizer.param_groups, fresh):
                if key in changed and option in values:
                    group[option] = values[option]
            if key in changed and option in schedule and not anew:
                setattr(scheduler, option, schedule[option])
        if anew:
            self.progress.place_schedule(optimizer, scheduler, fresh)
        else:
            self.apply_new_learning_rates(fresh, state["config"].get("lr"))

    def apply_new_learning_rates(self, fresh: list[dict], old_lr):
        """Scale the restored rate of each group if the configuration gives it another one than it began with.

        ``fresh``: the groups of the new optimizer. A schedule of torch keeps where a group began as ``initial_lr``;
        without one the configured lr is compared with ``old_lr``, that of the run before.
        """
        for index, (group, new) in enumerate(zip(self.step.optimizer.param_groups, fresh)):
            before, now = group.get("initial_lr"), new.get("initial_lr")
            if not before or not now:
                before, now = old_lr, self.config.lr
            if not before or before == now:
                continue
            group["lr"] *= now / before
            if "initial_lr" in group:
                group["initial_lr"] *= now / before
            if hasattr(self.scheduler, "base_lrs"):
                self.scheduler.base_lrs[index] *= now / before

    def refuse_another_run(self, state: dict, path):
        """Raise UsageError if a full state is of other speakers, another optimizer or schedule, or other groups."""
        if state["speakers"] != self.speakers:
            raise UsageError(
                f"{path}: was trained with other speakers than those of {shown(self.config.train_list)}, so its labels "
                "mean others; choose another save_path and start from it with initial_model"
            )
        rate = state["config"].get("sample_rate", KEYS["sample_rate"].default)
        if rate != self.config.sample_rate:
            raise UsageError(
                f"{path}: was trained with sample_rate {rate}, not {self.config.sample_rate}; choose another save_path"
            )
        for name in ("optimizer", "scheduler"):
            if state["config"][name] != getattr(self.config, name):
                raise UsageError(
                    f"{path}: was trained with {name} '{state['config'][name]}', not '{getattr(self.config, name)}'; "
                    "choose another save_path and start from it with initial_model"
                )
        if len(self.step.optimizer.param_groups) != len(state["optimizer_state_dict"]["param_groups"]):
            raise UsageError(
                f"{path}: was trained with other groups of learning rates; keep backbone_lr_factor, "
                "frontend_lr_factor and head_lr_factor at 1 or away from 1 as they were, or choose another save_path "
                "and start from it with initial_model"
            )

    def refuse_other_weights(self, state: dict, path):
        """Raise UsageError if the weights that a full state trains are more or fewer than those of this run."""
        both = state["optimizer_state_dict"]["param_groups"], self.step.optimizer.param_groups
        before, now = ([len(group["params"]) for group in groups] for groups in both)
        if before != now:
            raise UsageError(
                f"{path}: {sum(before)} tensors were trained, with this configuration {sum(now)} are; choose another "
                "save_path and start from it with initial_model"
            )

    def continue_older(self, state: dict, path: Path):
        """Take the weights of a checkpoint without a full state; the epoch is in its name (model000000012.model)."""
        self.load_weights(state, path)
        number = path.stem[5:]
        if not number.isdigit():
            raise UsageError(f"{path}: its name does not end in an epoch number; move it away to start anew")
        self.progress.epoch = int(number) + 1
        weights = f"with the weights of {path}; optimizer and schedule start fresh"
        self.log(f"continuing at epoch {self.progress.epoch} {weights}")


def parts_of(parts) -> list:
    """What each rank saved, the main one first."""
    return parts if isinstance(parts, list) else [parts]  # format 1 had at first the main process's alone


def own_part(parts, ranks) -> dict:
    """This rank's part of what each rank saved; the main one's if the number of processes was another."""
    parts = parts_of(parts)
    return parts[ranks.rank] if len(parts) == ranks.world else parts[0]
