"""Where in the data a run is, and what that place is worth where the batches are dealt otherwise."""

from dataclasses import dataclass, field

from corpus.lists import list_hash

# What the rows of a batch depend on; a position counts batches, so it means the same rows only where all agree.
DEALT_BY = ("batch_size", "gradient_accumulation_steps", "max_seg_per_spk", "nPerSpeaker", "seed")
NAMES = {"world": "processes", "list": "the train list", "version": "the order of rows"}
SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "momentum", "betas", "max_momentum", "base_momentum")


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


def plan_of(config, sampler, world: int) -> dict:
    """What decides which rows a batch has, and in how many batches and rows an epoch is dealt."""
    facts = {key: getattr(config, key) for key in DEALT_BY}
    size = {"batches": len(sampler), "rows": sampler.rows}
    return {**facts, "world": world, "version": sampler.VERSION, "list": list_hash(config.train_list), **size}


def capture_position(trainer) -> dict:
    """The place to go on from: where the open window began, and the plan that this place belongs to."""
    batch = trainer.window.position(trainer.batch)
    refused = [number for number in trainer.window.refused if number > batch]
    place = {"epoch": trainer.epoch, "batch": batch, "trained": trainer.trained}
    return {**place, "refused": refused, "plan": dict(trainer.plan)}


def restore_position(trainer, state: dict) -> list[str]:
    """Go to the saved place; returns in which facts its plan differs, as words ('2 processes before, 1 now').

    Under the same plan the very next batch follows. Under another one the epoch goes on at the same share of its
    batches. A checkpoint without a plan tells of it by its configuration and its number of generators.
    """
    place, now = state["sampler_state"], trainer.plan
    old = {"world": len(state["rng_state"]), **{k: state["config"].get(k, now[k]) for k in DEALT_BY}}
    before = place.get("plan") or old
    differing = [k for k in (*DEALT_BY, *NAMES) if before.get(k, now[k]) != now[k]]
    trainer.epoch, trainer.batch, trainer.trained = place["epoch"], place["batch"], place["trained"]
    trainer.window = Window(refused=list(place.get("refused", [])))
    if differing:
        batches = before.get("batches") or -(-now["rows"] // (before["batch_size"] * before["world"]))
        trainer.batch = int(min(place["batch"] / batches, 1.0) * now["batches"])
        trainer.window.close()
    unsaid = ("list", "version")  # what these were tells nothing
    return [
        f"{NAMES[k]} changed" if k in unsaid else f"{NAMES.get(k, k)} {before[k]} before, {now[k]} now"
        for k in differing
    ]


def describe_change(trainer, differing: list[str], generators: bool) -> str:
    """Say in one line what became of the position, the schedule and the generators under another plan."""
    share = round(100 * trainer.batch / trainer.plan["batches"])
    parts = [f"the batches are not those of the run before ({'; '.join(differing)})"]
    if trainer.batch and not trainer.trained:
        text = (
            f"epoch {trainer.epoch} goes on after {share} % of its batches, some rows come twice in it and some never"
        )
        parts.append(text)
    if trainer.scheduler_unit == "iteration":
        parts.append("the schedule stands at the same share of the run")
    if not generators:
        parts.append("the random generators begin from the seed")
    return ": ".join([parts[0], "; ".join(parts[1:])]) if parts[1:] else parts[0]


def place_schedule(trainer, fresh: list[dict]):
    """Move a new schedule by iteration to where the run is, in its own steps an epoch.

    ``fresh``: the groups of the new optimizer, whose rates the schedule began with.
    """
    for group, new in zip(trainer.optimizer.param_groups, fresh):
        group.update({key: new[key] for key in SCHEDULED if key in new})
    done = trainer.epoch - 1 + (1.0 if trainer.trained else trainer.batch / trainer.plan["batches"])
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.optimizer.step()  # moves nothing without gradients; torch wants one before the schedule's first
    for _ in range(round(done * trainer.steps_per_epoch)):
        trainer.scheduler.step()
