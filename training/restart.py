"""Which checkpoint of a run can be gone on from, and which to take in the place of one that cannot."""

import os
import shlex
from pathlib import Path

from errors import UsageError
from storage import checkpoint


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
    others = [*sorted(path.parent.glob("model0*.model"), reverse=True), path.with_name("model_best.model")]
    for other in others:
        try:
            found = other != path and is_full(sound_state(other, nonfinite_by_design))
        except UsageError:  # not there, or no better
            continue
        if found:
            command = "copy" if os.name == "nt" else "cp"
            paths = f"{shlex.quote(str(other))} {shlex.quote(str(path.with_name('last.model')))}"
            return f"the newest sound one is {other}: '{command} {paths}', then the same command goes on from it"
    return "the run has no sound one; move its model folder away to begin anew"
