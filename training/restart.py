"""Which checkpoint of a run can be gone on from, and which to take in the place of one that cannot."""

import os
from pathlib import Path

from errors import UsageError, shell_path
from storage import checkpoint, seal


def newest(folder: Path) -> Path | None:
    """The checkpoint to go on from: last.model, else the one of the newest epoch, None if there is neither."""
    last = folder / "last.model"
    return last if last.is_file() else max(folder.glob("model0*.model"), default=None)


def newest_whole(folder: Path, log) -> Path | None:
    """The checkpoint to go on from as ``newest`` has it; a damaged last.model gives way to the state saved before it.

    ``log`` is told of both. If that is damaged too, or there is none, it is the damaged one, for the caller to refuse.
    """
    path = newest(folder)
    if path is None or path.name != "last.model":
        return path
    why, previous = damage_of(path), seal.previous_of(path)
    if not why or damage_of(previous):
        return path
    log(f"WARNING: {why}; the run goes on from {previous}, the state that was saved before it")
    return previous


def damage_of(path: Path) -> str:
    """What is damaged about a checkpoint, in a line with its name; '' if nothing is."""
    try:
        with open(path, "rb") as file:
            if seal.is_whole(file, os.fstat(file.fileno()).st_size):
                return ""
        checkpoint.load(path)
    except checkpoint.Damaged as damage:
        return str(damage)
    except OSError as error:
        return f"{path}: cannot read the checkpoint: {error.strerror or error}"
    except UsageError:  # of a newer version, say: the caller says so
        return ""
    return ""


def sound_state(path, nonfinite_by_design=()) -> dict:
    """Read a checkpoint to go on from; UsageError if it is damaged or holds tensors that are not finite.

    ``nonfinite_by_design`` names buffers that hold infinities by design. ``model_state_dict`` of the result is what
    training goes on from, of the checkpoint of an evaluation too.
    """
    state = checkpoint.load(path)
    if "raw_model_state_dict" in state:
        state["model_state_dict"] = state["raw_model_state_dict"]
    checkpoint.refuse_nonfinite(checkpoint.weights_of(state, path), path, nonfinite_by_design)
    if is_full(state):
        checkpoint.refuse_nonfinite(checkpoint.optimizer_tensors(state["optimizer_state_dict"]), path)
        checkpoint.refuse_nonfinite(state.get("ema_state_dict", {}).get("parameters", {}), path)
    return state


def is_full(state: dict) -> bool:
    """Whether a checkpoint holds all that training goes on from, not just weights."""
    return "optimizer_state_dict" in state and state.get("format_version") == checkpoint.FORMAT_VERSION


def sound_or_offered(path, nonfinite_by_design=()) -> dict:
    """Read a checkpoint as ``sound_state`` does; its UsageError names the newest one to take in its place."""
    try:
        return sound_state(path, nonfinite_by_design)
    except UsageError as error:
        raise UsageError(f"{error}; {offer(Path(path), nonfinite_by_design)}") from error


def offer(path: Path, nonfinite_by_design=()) -> str:
    """Say what to do about a checkpoint that cannot be used, with the newest sound one of its folder."""
    previous = [seal.previous_of(path)] if path.name == "last.model" else []
    epochs = sorted(path.parent.glob("model0*.model"), reverse=True)
    for other in [*previous, *epochs, path.with_name("model_best.model")]:
        try:
            found = other != path and is_full(sound_state(other, nonfinite_by_design))
        except UsageError:  # not there, or no better
            continue
        if found:
            command = "copy" if os.name == "nt" else "cp"
            paths = f"{shell_path(other)} {shell_path(path.with_name('last.model'))}"
            return f"the newest sound one is {other}: '{command} {paths}', then the same command goes on from it"
    return "the run has no sound one; move its model folder away to begin anew"
