"""Weights in the safetensors format, which other tools read and which runs nothing when it is loaded."""

import importlib.util
import json

from errors import UsageError, first_line

ENDING = ".safetensors"
KEPT = ("config", "epoch", "step", "speakers", "format_version", "protocol")  # of a state, in the file's metadata


def is_available() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("safetensors") is not None


def encoded(state: dict) -> bytes:
    """The bytes of a safetensors file: the weights of a checkpoint and, as JSON, what --initial_model asks of one.

    The names are those of ``model_state_dict``, with the prefixes ``__S__.`` and ``__L__.``.
    """
    from safetensors.torch import save

    weights = {name: tensor.contiguous() for name, tensor in state["model_state_dict"].items()}
    return save(weights, {key: json.dumps(state[key]) for key in KEPT if key in state})


def load(path) -> dict:
    """Read a safetensors file, ours or another's, as a checkpoint; UsageError if it cannot be."""
    if not is_available():
        raise UsageError(f"{path}: needs the package safetensors: pip install safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            metadata = file.metadata() or {}
    except OSError as error:
        raise UsageError(f"{path}: cannot read the checkpoint: {error.strerror or first_line(error)}") from error
    except SafetensorError as error:
        raise UsageError(f"{path}: damaged, or not a safetensors file: {first_line(error)}") from error
    return {"model_state_dict": weights, **{key: _json(path, key, metadata[key]) for key in KEPT if key in metadata}}


def _json(path, key: str, text: str):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: its metadata '{key}' is not JSON: {first_line(error)}") from error
