"""How far a run is, and what its place in the data is worth if the batches are dealt in another way."""

import contextlib
import math
import time
from dataclasses import dataclass, field, replace

from config import Config
from errors import refuses_numbers, with_place
from settings import plugins

# What the rows of a batch depend on; a position counts batches, so it means the same rows only if all agree.
DEALT_BY = ("batch_size", "gradient_accumulation_steps", "max_seg_per_spk", "nPerSpeaker", "sampling", "seed")
SIZES = {"batch_size", "gradient_accumulation_steps", "world"}  # what changes no row of an epoch, but who has it when
NAMES = {"world": "processes", "list": "the train list", "version": "the order of rows"}
SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "max_momentum", "base_momentum")

DIVERGED = 1000.0  # times the first loss, or 1 if that is smaller


@dataclass
class Window:
    """The batches that are gathered for the next step.

    A window is trained as a whole: a run that stops inside one goes on from where it opened.
    """

    opened: int = 0  # batches of the epoch drawn before it
    accepted: int = 0  # 0: none is open
    refused: list[int] = field(default_factory=list)  # numbers of batches drawn since and left out

    def accept(self, batch: int):
        """Take in a batch by its number in the epoch, counted from 1."""
        if not self.accepted:
            self.opened = batch - 1
        self.accepted += 1

    def refuse(self, batch: int):
        """Take note of a batch that is left out; one before the first that is accepted belongs to no window."""
        if self.accepted:
            self.refused.append(batch)

    def close(self):
        """Its step is over, taken or not."""
        self.accepted, self.refused = 0, []

    def before(self, batch: int) -> int:
        """Batches drawn before the window that this batch is in."""
        return self.opened if self.accepted else max(batch - 1, 0)

    def position(self, batch: int) -> int:
        """The batches that need not be drawn again when ``batch`` were drawn."""
        return self.opened if self.accepted else batch


def plan_of(config: Config, sampler, world: int) -> dict:
    """What decides which rows a batch has, and in how many batches and rows an epoch is dealt."""
    facts = {key: getattr(config, key) for key in DEALT_BY}
    size = {"batches": len(sampler), "rows": sampler.rows}
    return {**facts, "world": world, "version": sampler.VERSION, "list": sampler.dataset.list.hash, **size}


def new_totals() -> dict:
    """Sums of an epoch."""
    return {"loss": 0.0, "accuracy": 0.0, "utterances": 0, "skipped": 0, "seconds": 0.0, "waited": 0.0}


def new_best() -> dict:
    """The best evaluation before there is one."""
    return {"eer": None, "epoch": 0, "threshold": None, "waited": 0}


class Progress:
    """How far a run is: epoch, batch and step, the best evaluation, sums of the epoch, steps refused in a row.

    ``plan`` of ``plan_of``: the position counts the batches of this plan.
    """

    def __init__(self, plan: dict, accumulation: int = 1):
        self.plan, self.batches, self.accumulation = plan, plan["batches"], accumulation
        self.step = 0  # taken in the run
        self.nonfinite_in_a_row, self.last_fault = 0, None
        self.best = new_best()
        self.first_loss: float | None = None  # of the run's first step that was taken
        self.window = Window()
        self.begin_epoch(1)

    def begin_epoch(self, epoch: int):
        """Go to the start of an epoch."""
        self.epoch, self.batch = epoch, 0  # batches drawn in the epoch
        self.trained = False  # whether all of them are done
        # An epoch that was begun with batches of other sizes: [(batches, how many of them are done)] of each dealing
        # before, and the number of the first batch of the present one.
        self.dealt, self.begun = [], 0
        self.totals = new_totals()
        self.window.close()

    @property
    def steps_per_epoch(self) -> int:
        """Windows of an epoch; the last may hold fewer batches."""
        return -(-self.batches // self.accumulation)

    @property
    def fractional_epoch(self) -> float:
        """Epochs trained before the open window, counted from 1: what a margin schedule goes by."""
        return self.epoch + self.window.before(self.batch) / self.batches

    @property
    def window_number(self) -> int:
        """Which step of the run, taken or not, the open window is; counted from 1."""
        return (self.epoch - 1) * self.steps_per_epoch + self.window.before(self.batch) // self.accumulation + 1

    def leave(self) -> tuple[int, Window]:
        """Close the open window; returns the place that it was at, for ``at``."""
        place = self.batch, replace(self.window, refused=list(self.window.refused))
        self.window.close()
        return place

    @contextlib.contextmanager
    def at(self, place: tuple[int, Window]):
        """Context in which the run is at a place that ``leave`` gave, to conclude the step of its window."""
        ahead = self.batch, self.window
        self.batch, self.window = place
        try:
            yield
        finally:
            self.batch, self.window = ahead

    def count(self, window: list[dict], attempt):
        """Add a step that was taken to the sums of the epoch."""
        utterances = sum(batch["data"].shape[0] * batch.get("rows", batch["data"].shape[1]) for batch in window)
        self.first_loss = attempt.mean_loss if self.first_loss is None else self.first_loss
        self.totals["utterances"] += utterances  # of all processes
        self.totals["loss"] += attempt.mean_loss * utterances
        self.totals["accuracy"] += attempt.mean_accuracy * utterances

    def lap(self, since: float, waited: bool = False) -> float:
        """Add the time that has passed to the epoch's, and to what it ``waited`` for data; returns now."""
        now = time.perf_counter()
        self.totals["seconds"] += now - since
        self.totals["waited"] += waited * (now - since)
        return now

    def means(self, since: dict | None = None) -> tuple[float, float, float, float]:
        """Loss and accuracy in % of the epoch; utterances a second over all processes, and % of time without data.

        The latter two are of the epoch too, or of what came after the sums ``since``.
        """
        before = since or new_totals()
        n = self.totals["utterances"]
        done, seconds, waited = (self.totals[key] - before[key] for key in ("utterances", "seconds", "waited"))
        loss, accuracy = (self.totals[key] / n if n else math.nan for key in ("loss", "accuracy"))
        return loss, accuracy, done / max(seconds, 1e-9), 100 * waited / max(seconds, 1e-9)

    def diverges(self, loss: float) -> bool:
        """Whether an epoch's mean loss is finite and far above the loss that the run began with."""
        return self.first_loss is not None and DIVERGED * max(self.first_loss, 1.0) < loss < math.inf

    def state_dict(self) -> dict:
        """The keys of a checkpoint that tell where to go on: from where the open window began.

        ``epoch`` is the last one that has trained the weights, that of ``sampler_state`` where the run goes on.
        """
        batch = self.window.position(self.batch)
        refused = [number for number in self.window.refused if number > batch]
        place = {"epoch": self.epoch, "batch": batch, "trained": self.trained, "refused": refused}
        place |= {"dealt": [list(dealing) for dealing in self.dealt], "begun": self.begun}
        entered = batch > 0 or self.trained or bool(self.dealt)
        return {
            "epoch": self.epoch if entered else self.epoch - 1,
            "step": self.step,
            "best": self.best,
            "first_loss": self.first_loss,
            "totals": self.totals,
            "nonfinite_in_a_row": self.nonfinite_in_a_row,
            "sampler_state": {**place, "plan": dict(self.plan)},
        }

    def load_state_dict(self, state: dict, sampler=None) -> str:
        """Go to the saved place; returns what the batches to come are to those of the run before.

        'equal': the very next batch follows. 'divided': it does, divided in another way over processes or steps.
        'dealt again': the rows that are left of the epoch follow, each once, in other batches of the ``sampler``.
        'share': other rows follow, from the same share of the epoch on.
        """
        place = state["sampler_state"]
        self.step, self.best, self.totals = state["step"], state["best"], state["totals"]
        self.nonfinite_in_a_row, self.first_loss = state["nonfinite_in_a_row"], state.get("first_loss")
        self.epoch, self.batch, self.trained = place["epoch"], place["batch"], place["trained"]
        self.dealt, self.begun = [tuple(dealing) for dealing in place.get("dealt", ())], place.get("begun", 0)
        self.window = Window(refused=list(place.get("refused", [])))
        before, differing = self.plan_before(state), self.differing(state)
        kind = "equal"
        if differing and set(differing) <= SIZES and sampler is not None and "batches" in before:
            kind = self.deal_again(before["batches"], sampler)
        elif differing:
            kind = "share"
            batches = before.get("batches") or -(-self.plan["rows"] // (before["batch_size"] * before["world"]))
            self.dealt, self.begun, self.window = [], 0, Window()
            self.batch = int(min(place["batch"] / batches, 1.0) * self.batches)
        if state.get("evaluated"):  # the checkpoint of an evaluation: the next epoch follows
            self.begin_epoch(self.epoch + 1)
        return kind

    def deal_again(self, batches: int, sampler) -> str:
        """Go to the saved place under another size of batches; ``batches``: those of an epoch before."""
        of, done = batches - self.begun, self.batch - self.begun  # of the dealing that the state was saved in
        whole_epoch = self.trained or not (done or self.dealt)
        history = self.dealt
        if not whole_epoch and len(sampler.plan(self.epoch, history)) != of:
            history = [*history, (of, done)] if done else history
        left = self.batches if whole_epoch else len(sampler.plan(self.epoch, history))
        begun = self.batches - left
        kind = "divided" if left == of and history == self.dealt else "dealt again"
        if kind == "dealt again" or begun != self.begun:
            self.window = Window()  # its numbers are of other batches
        if self.trained:
            history, begun, batch = [], 0, self.batches
        else:
            batch = begun + (done if kind == "divided" else 0)
        self.dealt, self.begun, self.batch = history, begun, batch
        return kind

    def plan_before(self, state: dict) -> dict:
        """The plan of a saved state; one without tells of it by its configuration and its number of generators."""
        dealt = {key: state["config"].get(key, self.plan[key]) for key in DEALT_BY}
        return state["sampler_state"].get("plan") or {"world": len(state["rng_state"]), **dealt}

    def differing(self, state: dict) -> list[str]:
        """In which facts the plan of a saved state differs."""
        before, now = self.plan_before(state), self.plan
        return [k for k in (*DEALT_BY, *NAMES) if before.get(k, now[k]) != now[k]]

    def changes_of_plan(self, state: dict) -> list[str]:
        """In which facts the plan of a saved state differs, as words ('2 processes before, 1 now')."""
        before, now = self.plan_before(state), self.plan
        untold = ("list", "version")  # what these were tells nothing
        return [
            f"{NAMES[k]} changed" if k in untold else f"{NAMES.get(k, k)} {before[k]} before, {now[k]} now"
            for k in self.differing(state)
        ]

    def other_steps(self, state: dict) -> bool:
        """Whether an epoch has another number of steps than it had in a saved state, as far as that is known."""
        before = self.plan_before(state)
        if "batches" not in before:
            return bool(self.differing(state))
        return -(-before["batches"] // before["gradient_accumulation_steps"]) != self.steps_per_epoch

    def place_schedule(self, optimizer, scheduler, fresh: list[dict]):
        """Move a new schedule by iteration to where the run is, in its own steps an epoch.

        ``fresh``: the groups of the new optimizer, whose rates the schedule began with.
        """
        for group, new in zip(optimizer.param_groups, fresh):
            group.update({key: new[key] for key in SCHEDULED if key in new})
        done = self.epoch - 1 + (1.0 if self.trained else self.batch / self.batches)
        optimizer.zero_grad(set_to_none=True)
        optimizer.step()  # moves nothing without gradients; torch wants one before the schedule's first
        for _ in range(round(done * self.steps_per_epoch)):
            step_schedule(scheduler, optimizer)


def step_schedule(scheduler, optimizer, plugin: str = "") -> str:
    """Move a schedule on; returns why it could not compute a rate, with the line, '' if it could.

    A rate that is no real number becomes NaN, with which no update is taken. Python gives a complex number for a
    negative one to a power, as 1 - step / steps is beyond the last step, and an exception for a division by 0. After an
    exception the schedule stands where it was; any that is not for its numbers is raised, as a UsageError if the
    schedule's file ``plugin`` is given.
    """
    before = scheduler.state_dict() if hasattr(scheduler, "state_dict") else {}
    groups, refused = optimizer.param_groups, ""
    try:
        with plugins.explained(plugin) if plugin else contextlib.nullcontext():
            scheduler.step()
    except Exception as error:
        if before:
            scheduler.load_state_dict(before)
        if not refuses_numbers(error.__cause__ or error):
            raise
        refused = with_place(error.__cause__ or error)
    if refused or any(isinstance(group["lr"], complex) for group in groups):
        for group in groups:
            group["lr"] = math.nan if refused or isinstance(group["lr"], complex) else group["lr"]
        if hasattr(scheduler, "_last_lr"):  # of torch's schedules; a checkpoint has it
            scheduler._last_lr = [group["lr"] for group in groups]
    return refused
