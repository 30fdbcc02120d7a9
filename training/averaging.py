"""Averages of weights: the exponential moving average of a run, and the mean of finished checkpoints."""

import contextlib

import torch

from errors import UsageError
from storage import checkpoint
from training.slices import local


class MovingAverage:
    """Exponential moving average of a network's parameters in fp32; ``decay`` 0 is none.

    The first update takes the parameters as they are; update t + 1 is average := d average + (1 - d) parameters with
    d = min(decay, (1 + t) / (10 + t)), so that the first steps are soon forgotten (TensorFlow's
    train.ExponentialMovingAverage with num_updates). Buffers, as BatchNorm's statistics, are the network's own.
    """

    def __init__(self, network, decay: float):
        self.network, self.decay, self.updates = network, decay, 0
        named = network.named_parameters(remove_duplicate=False)  # a shared parameter has several names in a checkpoint
        self.parameters = {name: p for name, p in named if p.is_floating_point()} if decay else {}
        self.tensors = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self):
        """Update the average after an optimizer step."""
        if not self.decay:
            return
        kept = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        current = [local(p).float() for p in self.parameters.values()]
        torch._foreach_lerp_([local(tensor) for tensor in self.tensors.values()], current, 1.0 - kept)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self):
        """The network with the averaged parameters, for an evaluation; afterwards it is bit for bit as before."""
        if not self.updates:
            yield
            return
        own = [p.detach().clone() for p in self.parameters.values()]
        try:
            self._set(self.tensors.values())
            yield
        finally:
            self._set(own)

    @torch.no_grad()
    def _set(self, values):
        for parameter, value in zip(self.parameters.values(), values):
            parameter.copy_(value)

    def model_state(self) -> dict:
        """The state of the network that an evaluation sees: averaged parameters, its own buffers."""
        averaged, own = self.tensors if self.updates else {}, self.network.state_dict()
        return {name: averaged[name].to(t.dtype) if name in averaged else t for name, t in own.items()}

    def state_dict(self) -> dict:
        """What a resumed run needs; empty if there is no average."""
        return {"updates": self.updates, "parameters": dict(self.tensors)} if self.decay else {}

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        """Take over a saved average; without one the next step begins anew."""
        self.updates = state.get("updates", 0) if self.decay else 0
        for name, tensor in self.tensors.items() if self.updates else ():
            tensor.copy_(state["parameters"][name])


def mean_of_checkpoints(paths: list) -> dict:
    """The mean of checkpoints as a checkpoint: weights, and the newest's epoch, step, config and speakers.

    ``paths``: oldest first; ``averaged`` in the result lists them. Floating-point tensors, BatchNorm's statistics among
    them, are summed in fp64, one checkpoint in memory at a time; integer ones are the newest's. UsageError if
    names, shapes, architectures, first weights or speakers differ, or a tensor is not finite.
    """
    first, sums, newest = None, {}, {}
    for path in paths:
        newest = checkpoint.load(path)
        weights = checkpoint.weights_of(newest, path)
        checkpoint.refuse_nonfinite(weights, path)
        facts = _facts(newest, weights)
        first = first or facts
        _refuse_other(first, facts, paths[0], path)
        for name, tensor in weights.items():
            if tensor.is_floating_point():
                sums[name] = sums[name] + tensor.double() if name in sums else tensor.double()
    mean = {n: (sums[n] / len(paths)).to(t.dtype) if n in sums else t for n, t in weights.items()}
    kept = {key: newest[key] for key in ("epoch", "step", "config", "speakers") if key in newest}
    names = [str(path) for path in paths]
    return {"format_version": checkpoint.FORMAT_VERSION, "model_state_dict": mean, **kept, "averaged": names}


def _facts(state: dict, weights: dict) -> dict:
    """What checkpoints that are averaged must have in common."""
    config = state["config"] if isinstance(state.get("config"), dict) else {}
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in weights.items()}
    named = {key: config.get(key) for key in ("model", "trainfunc")}
    # Only weights that began as the same ones lie in one valley of the loss, where a mean of them is a model too.
    named["start"] = config.get("initial_model") or f"seed {config.get('seed')}"
    return {**named, "speakers": state.get("speakers"), "shapes": shapes}


def _refuse_other(first: dict, other: dict, first_path, path):
    """Raise UsageError in one line if a checkpoint is of another network than the first."""
    for key, what in (("model", "model"), ("trainfunc", "loss"), ("start", "begun from")):
        if other[key] != first[key]:
            raise UsageError(f"{path}: {what} {other[key]}, but {first_path} has {first[key]}; average one run's files")
    if other["speakers"] != first["speakers"]:
        raise UsageError(f"{path}: trained with other speakers than {first_path}, so its classes mean others")
    ours, theirs = other["shapes"], first["shapes"]
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differing:
        name = differing[0]
        text = f"{name} is {_say(ours.get(name))} here and {_say(theirs.get(name))} in {first_path}"
        raise UsageError(f"{path}: {len(differing)} tensors differ in name, shape or type, the first: {text}")


def _say(fact) -> str:
    return f"{fact[0]} {str(fact[1]).removeprefix('torch.')}" if fact else "missing"
