"""Everything that makes the next training step identical: capture it, and continue from it."""

from pathlib import Path

from errors import UsageError
from storage import checkpoint
from training.position import capture_position, describe_change, place_schedule, restore_position
from training.protocol import differences, new_best
from training.restart import is_full, sound_or_offered

# Options that load_state_dict would bring back from the old run: configuration key -> attribute.
OPTIONS = {key: key for key in ("weight_decay", "momentum", "nesterov", "eps")}
OPTIONS |= {"beta1": "betas", "beta2": "betas", "lr_decay": "gamma", "lr_step": "step_size"}


def capture(trainer, evaluated: bool = False) -> dict:
    """Collect the state of a trainer; a collective under several processes.

    With ``evaluated`` and a moving average, ``model_state_dict`` is what an evaluation saw, the averaged weights, and
    ``raw_model_state_dict`` what training goes on from.
    """
    own = trainer.network.state_dict()
    averaged = evaluated and trainer.average.updates > 0
    return {
        "format_version": checkpoint.FORMAT_VERSION,
        "model_state_dict": trainer.average.model_state() if averaged else own,
        **({"raw_model_state_dict": own} if averaged else {}),
        "ema_state_dict": trainer.average.state_dict(),
        "optimizer_state_dict": trainer.optimizer.state_dict(),
        "scheduler_state_dict": {k: v for k, v in trainer.scheduler.state_dict().items() if not callable(v)},
        "scaler_state_dict": trainer.scaler.state_dict(),
        "rng_state": trainer.ranks.gather(checkpoint.rng_state(trainer.device)),
        "sampler_state": capture_position(trainer),
        "evaluated": evaluated,
        "epoch": trainer.epoch,
        "step": trainer.step,
        "best": trainer.best,
        "protocol": trainer.protocol,
        "totals": trainer.totals,
        "incidents": trainer.ranks.gather(trainer.incidents.state()),
        "nonfinite_in_a_row": trainer.nonfinite_in_a_row,
        "file_events": trainer.file_events.state(),
        "file_sizes": trainer.files.sizes(),
        "config": trainer.config.values(),
        "speakers": trainer.dataset.speakers_hash(),
    }


def resume(trainer) -> bool:
    """Continue from model/last.model, else from the newest model0*.model; returns whether there was one."""
    path = trainer.ranks.from_main(newest(trainer.files.model))
    if path is None:
        return False
    state = sound_or_offered(path, trainer.buffers.masks)
    if not is_full(state) and path.name != "last.model":
        return continue_older(trainer, state, path)
    if "optimizer_state_dict" not in state:  # a mean of checkpoints, or another trainer's file
        raise UsageError(f"{path}: holds no state to go on from; move it away and start from it with initial_model")
    if not is_full(state):
        raise UsageError(f"{path}: is of format {state.get('format_version')}; choose another save_path")
    refuse_another_run(trainer, state, path)
    faults = checkpoint.load_weights(trainer.network, state, path)
    differing = faults["model"] + faults["loss"]
    if differing:
        raise UsageError(f"{path}: does not fit this configuration ({differing[0]}); choose another save_path")
    changed = {k for k, v in trainer.config.values().items() if k in state["config"] and state["config"][k] != v}
    differing = restore_position(trainer, state)
    restore_optimizer(trainer, state, changed, anew=bool(differing) and trainer.scheduler_unit == "iteration")
    trainer.scaler.load_state_dict(state["scaler_state_dict"])
    trainer.average.load_state_dict(state.get("ema_state_dict", {}))
    trainer.saver.saved_step = state["step"]
    trainer.step, trainer.best, trainer.totals = state["step"], state["best"], state["totals"]
    trainer.last_point = trainer.step
    if state.get("evaluated"):  # the checkpoint of an evaluation: the next epoch follows
        trainer.begin_epoch(trainer.epoch + 1)
    trainer.nonfinite_in_a_row = state["nonfinite_in_a_row"]
    trainer.file_events.load_state(state.get("file_events", {"known": {}, "reported": []}))
    trainer.incidents.load_state(own_part(state["incidents"], trainer.ranks))
    generators = len(state["rng_state"]) == trainer.ranks.world
    if generators:
        checkpoint.restore_rng(state["rng_state"][trainer.ranks.rank], trainer.device)
    if trainer.epoch <= trainer.config.max_epoch:
        trainer.files.cut_back(state["file_sizes"])
    where = f"batch {trainer.batch} of" if trainer.batch else "the start of"
    trainer.say(f"resuming from {path}: {where} epoch {trainer.epoch}, step {trainer.step}")
    if differing:
        trainer.say(f"  {describe_change(trainer, differing, generators)}")
    for name in sorted(changed - {"config", "preflight"}):
        trainer.say(f"  {name}: {state['config'][name]} before, {getattr(trainer.config, name)} now")
    begin_anew(trainer, differences(trainer.protocol, state, trainer.files.result))
    return True


def begin_anew(trainer, differing: list[str]):
    """Forget the best evaluation if it cannot be compared with those to come, by the keys in which they differ."""
    if not trainer.ranks.from_main(differing):
        return
    best, trainer.best = trainer.best, new_best()
    if best["eer"] is not None:
        trainer.say(
            f"  the best EER so far, {best['eer']:.2f} % at epoch {best['epoch']}, is of another protocol "
            f"({', '.join(differing)}): best and patience start anew, and the next evaluation replaces model_best"
        )


def newest(folder: Path) -> Path | None:
    """The checkpoint to go on from: last.model, else the one of the newest epoch, None if there is neither."""
    last = folder / "last.model"
    return last if last.is_file() else max(folder.glob("model0*.model"), default=None)


def restore_optimizer(trainer, state: dict, changed: set[str], anew: bool):
    """Take over optimizer and schedule; options among the ``changed`` keys are the configuration's.

    ``anew``: a schedule by iteration whose steps an epoch are others is not loaded but moved to where the run is.
    """
    fresh = [dict(group) for group in trainer.optimizer.param_groups]
    trainer.optimizer.load_state_dict(state["optimizer_state_dict"])
    schedule = dict(vars(trainer.scheduler))
    if not anew:
        trainer.scheduler.load_state_dict(state["scheduler_state_dict"])
    for key, option in OPTIONS.items():
        for group, values in zip(trainer.optimizer.param_groups, fresh):
            if key in changed and option in values:
                group[option] = values[option]
        if key in changed and option in schedule and not anew:
            setattr(trainer.scheduler, option, schedule[option])
    if anew:
        place_schedule(trainer, fresh)
    else:
        apply_new_learning_rates(trainer, fresh, state["config"].get("lr"))


def own_part(parts, ranks) -> dict:
    """This rank's part of what each rank saved; the main one's if the number of processes was another."""
    parts = parts if isinstance(parts, list) else [parts]  # format 1 had at first the main process's alone
    return parts[ranks.rank] if len(parts) == ranks.world else parts[0]


def refuse_another_run(trainer, state: dict, path):
    """Raise UsageError where a full state is of other speakers, another optimizer or schedule, or other groups."""
    if state["speakers"] != trainer.dataset.speakers_hash():
        raise UsageError(
            f"{path}: was trained with other speakers than those of '{trainer.config.train_list}', so its labels mean "
            "others; choose another save_path and start from it with initial_model"
        )
    for name in ("optimizer", "scheduler"):
        if state["config"][name] != getattr(trainer.config, name):
            raise UsageError(
                f"{path}: was trained with {name} '{state['config'][name]}', not '{getattr(trainer.config, name)}'; "
                "choose another save_path and start from it with initial_model"
            )
    if len(trainer.optimizer.param_groups) != len(state["optimizer_state_dict"]["param_groups"]):
        raise UsageError(
            f"{path}: was trained with other groups of learning rates; keep backbone_lr_factor and head_lr_factor at 1 "
            "or away from 1 as they were, or choose another save_path and start from it with initial_model"
        )


def continue_older(trainer, state: dict, path: Path) -> bool:
    """Take the weights of a checkpoint that holds no full state; the epoch is in its name (model000000012.model)."""
    faults = checkpoint.load_weights(trainer.network, state, path)
    differing = faults["model"] + faults["loss"]
    if differing:
        raise UsageError(f"{path}: does not fit this configuration ({differing[0]}); choose another save_path")
    number = path.stem[5:]
    if not number.isdigit():
        raise UsageError(f"{path}: its name does not end in an epoch number; move it away to start anew")
    trainer.epoch = int(number) + 1
    trainer.say(f"continuing at epoch {trainer.epoch} with the weights of {path}; optimizer and schedule start fresh")
    return True


def apply_new_learning_rates(trainer, fresh: list[dict], old_lr):
    """Scale the restored rate of each group where the configuration gives it another one than it began with.

    ``fresh``: the groups of the new optimizer. A schedule of torch keeps where a group began as ``initial_lr``; without
    one the configured lr is compared with ``old_lr``, that of the run before.
    """
    for index, (group, new) in enumerate(zip(trainer.optimizer.param_groups, fresh)):
        before, now = group.get("initial_lr"), new.get("initial_lr")
        if not before or not now:
            before, now = old_lr, trainer.config.lr
        if not before or before == now:
            continue
        group["lr"] *= now / before
        if "initial_lr" in group:
            group["initial_lr"] *= now / before
        if hasattr(trainer.scheduler, "base_lrs"):
            trainer.scheduler.base_lrs[index] *= now / before
