"""Read checkpoints, those of other trainers too, and everything else that goes into one."""

import errno
import io
import os
import zipfile

import torch

from corpus.plain import plain
from errors import UsageError, first_line
from storage import interop, redimnet, safetensors_file
from storage.archive import Refusal, check_checkpoint

FORMAT_VERSION = 1
MODEL, LOSS = "__S__.", "__L__."
WRAPPERS = ("module.", "_orig_mod.")


class Damaged(UsageError):
    """The bytes of a checkpoint are not those that were written."""


def load(path) -> dict:
    """Read a checkpoint with restricted loading; UsageError if it is missing, none or newer, Damaged if it is cut."""
    if str(path).endswith(safetensors_file.ENDING):
        return _of_our_format(safetensors_file.load(path), path)
    try:
        with open(path, "rb") as file:
            check_checkpoint(file, os.fstat(file.fileno()).st_size)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        kind = Damaged if error.errno == errno.EIO else UsageError
        raise kind(f"{path}: cannot read the checkpoint: {error.strerror or error}") from error
    except Refusal as refusal:
        if str(refusal).startswith(("damaged", "is empty", "not a zip")):
            raise Damaged(f"{path}: {refusal}") from refusal
        raise UsageError(f"{path}: not a checkpoint that restricted loading accepts: {refusal}") from refusal
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise Damaged(f"{path}: damaged, or not a checkpoint: {first_line(error)}") from error
    except Exception as error:  # torch passes on what its unpickler raises, of no common class
        raise UsageError(f"{path}: not a checkpoint that restricted loading accepts: {_refusal(error)}") from error
    return _of_our_format(state, path)


def _of_our_format(state, path) -> dict:
    if not isinstance(state, dict):
        raise UsageError(f"{path}: holds a {type(state).__name__}, not a state dictionary")
    version = state.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UsageError(
            f"{path}: a checkpoint of format {version}, this version reads up to {FORMAT_VERSION}; "
            "use the newer version of the trainer that wrote it"
        )
    theirs = {} if "config" in state else redimnet.keys_of(state, path)
    return {**state, "config": theirs} if theirs else state


def _refusal(error) -> str:
    """What the restricted unpickler met, without torch's advice around it to load the file unrestricted."""
    _, mark, reason = str(error).partition("WeightsUnpickler error:")
    return reason.strip().splitlines()[0].split(". ")[0] if mark and reason.strip() else first_line(error)


def weights_of(state: dict, path, own=()) -> dict[str, torch.Tensor]:
    """Return {name: tensor} with `__S__.` and `__L__.` prefixes from any of the known layouts.

    Known: ``model_state_dict``, ``{"model": ..}``, ``{"state_dict": ..}``, s3prl's ``{"model_weight": ..}``, a bare
    state_dict; with or without ``module.`` and ``_orig_mod.`` in the names. Names without prefix are the model's.
    Names in ``own``, those of the network, are kept as they are. The names of other toolkits are translated
    (interop.py), but if the model's are just those of ``own``: its file may be one of that toolkit's, dropped in.
    Without ``own`` a checkpoint of ours is left as it is.
    """
    tensors = _tensors(state, own)
    ours = _is_of(tensors, own) if own else "format_version" in state
    weights = _prefixed(tensors if ours else interop.translate(tensors))
    if not weights:
        raise UsageError(f"{path}: holds no tensors")
    return weights


def _prefixed(tensors: dict) -> dict:
    return {name if name.startswith((MODEL, LOSS)) else MODEL + name: tensor for name, tensor in tensors.items()}


def _of_model(names) -> set[str]:
    """Names of the model's tensors, without the batch counters that older files lack and nothing depends on."""
    return {name for name in names if name.startswith(MODEL) and not name.endswith("num_batches_tracked")}


def _is_of(tensors: dict, own) -> bool:
    """Whether tensors have the names of those of a model, ``own``, as they are."""
    return _of_model(own) == _of_model(_prefixed(tensors))


def toolkit_of(state: dict, own=()) -> interop.Toolkit | None:
    """The other toolkit that a checkpoint is of, None for our own and for an unknown one.

    ``own``: the names of a network. A file that has just these is its own, as that of a plug-in which was dropped in.
    """
    tensors = _tensors(state, own)
    return None if own and _is_of(tensors, own) else interop.recognise(tensors)


def embedding_size(state: dict, path, network, size: int) -> int:
    """The embedding size of a checkpoint that differs from ``network``, which has ``size``, in nothing else.

    ``size`` itself if more or nothing differs.
    """
    own, differing = network.state_dict(), set()
    for name, tensor in weights_of(state, path, own).items():
        if name.startswith(MODEL) and name in own and tensor.dim() >= own[name].dim():
            differing |= {(a, b) for a, b in zip(own[name].shape, tensor.shape) if a != b}
    (here, there), *more = differing or {(size, size)}
    return there if here == size and not more else size


def _tensors(state: dict, own=()) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by name, without wrappers."""
    for key in ("model_state_dict", "model", "state_dict", "model_weight"):
        if isinstance(state.get(key), dict):
            state = state[key]
            break
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if name not in own and MODEL + name not in own:
            for wrapper in WRAPPERS:
                name = name.removeprefix(wrapper).replace(f".{wrapper}", ".")
        tensors[name] = tensor
    return tensors


def load_weights(network, state: dict, path) -> dict[str, list[str]]:
    """Copy the weights of a checkpoint that fit by name and shape.

    Returns lines on the rest: ``model`` (missing or of another shape), ``loss`` (likewise), ``unused`` (of the file).
    """
    own = network.state_dict()
    weights = weights_of(state, path, own)
    faults = {"model": [], "loss": [], "unused": sorted(set(weights) - set(own))}
    fitting = {}
    for name, tensor in own.items():
        part = faults["model" if name.startswith(MODEL) else "loss"]
        if name not in weights:
            if not name.endswith("num_batches_tracked"):  # older files lack it, and nothing depends on it
                part.append(f"{name}: not in the file")
        elif weights[name].shape == (*tensor.shape, 1):  # a convolution over one frame is a linear layer
            fitting[name] = weights[name].squeeze(-1)
        elif weights[name].shape != tensor.shape:
            part.append(f"{name}: {tuple(weights[name].shape)} in the file, {tuple(tensor.shape)} in the model")
        else:
            fitting[name] = weights[name]
    network.load_state_dict(fitting, strict=False)
    return faults


def load_model_exactly(network, state: dict, path, name: str):
    """Load the model's weights, all of them; UsageError if some are missing, of another shape, unknown or NaN.

    Buffers that are not finite before loading, as a mask of -inf, are so by design and are not checked.
    """
    nonfinite_by_design = nonfinite_tensors(dict(network.named_buffers()))
    theirs = toolkit_of(state, network.state_dict())
    if theirs and theirs.part:
        raise UsageError(f"{path}: is a {theirs.name}, a front end alone; train a model on it first (docs/models.md)")
    faults = load_weights(network, state, path)
    unknown = [weight for weight in faults["unused"] if weight.startswith(MODEL)]
    if faults["model"] or unknown:
        own = sum(weight.startswith(MODEL) for weight in network.state_dict())
        listing = "; ".join((faults["model"] + [f"{weight}: not in the model" for weight in unknown])[:5])
        raise UsageError(
            f"{path}: {own - len(faults['model'])} of {own} tensors of {name} match,"
            f" {len(unknown)} of the file are unknown to it: {listing}; the file is of another model or of other keys"
            " (sizes, features): give those that it was trained with"
        )
    weights = {weight: t for weight, t in network.state_dict().items() if weight.startswith(MODEL)}
    refuse_nonfinite(weights, path, nonfinite_by_design)


def nonfinite_tensors(weights: dict) -> list[str]:
    """Names of the tensors that hold a NaN or Inf."""
    numbers = {name: t for name, t in weights.items() if t.is_floating_point() or t.is_complex()}
    return [name for name, t in numbers.items() if not t.isfinite().all()]


def refuse_nonfinite(weights: dict, path, nonfinite_by_design=()):
    """Raise UsageError that names tensors which are not finite, but for those that are so by design."""
    bad = [name for name in nonfinite_tensors(weights) if name not in nonfinite_by_design]
    if bad:
        listing = ", ".join(bad[:5]) + (", ..." if len(bad) > 5 else "")
        raise UsageError(f"{path}: {len(bad)} tensors are not finite ({listing}); start from another checkpoint")


def optimizer_tensors(state: dict) -> dict[str, torch.Tensor]:
    """Name the tensors of an optimizer state: 'optimizer.3.exp_avg'."""
    items = ((f"optimizer.{i}.{k}", v) for i, s in state["state"].items() for k, v in s.items())
    return {name: value for name, value in items if isinstance(value, torch.Tensor)}


def unreadable(state, name: str = "") -> str:
    """What of a state ``load`` would refuse once it is written, and why: 'schedule: helper: asks for ..'; else ''.

    The values of tensors are not looked at.
    """
    reason = _reading_of(state)
    if not reason:
        return ""
    inside = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    found = (unreadable(value, f"{name}: {key}" if name else str(key)) for key, value in inside)
    return next(filter(None, found), f"{name}: {reason}")


def _reading_of(state) -> str:
    stream = io.BytesIO()
    try:
        torch.save(plain(_without_values(state)), stream)
        stream.seek(0)
        check_checkpoint(stream, len(stream.getbuffer()))
    except Refusal as refusal:
        return str(refusal)
    except Exception as error:  # what a plug-in keeps may refuse to be pickled in any way
        return first_line(error)
    return ""


def _without_values(state):
    if type(state) in (torch.Tensor, torch.nn.Parameter) and state.layout == torch.strided:  # others are shown
        return torch.empty(0, dtype=state.dtype)
    if isinstance(state, dict):
        return {key: _without_values(value) for key, value in state.items()}
    return [_without_values(value) for value in state] if isinstance(state, (list, tuple)) else state
