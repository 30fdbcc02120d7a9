"""The teacher of a distillation: a trained model, read whole from its checkpoint before a run begins."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from config import Config
from errors import UsageError
from settings import plugins
from settings.reader import Setting, resolve
from storage import checkpoint
from storage.files import sha256_of
from training.model import build_model
from training.trained import configuration_of, network_of


class Holder(nn.Module):
    """A model, and perhaps its loss, under the names that a checkpoint has for them."""

    def __init__(self, values: dict):
        super().__init__()
        self.__S__ = build_model(values)


@dataclass(frozen=True)
class Teacher:
    """What is read of a teacher: the ``state`` of its checkpoint, and the ``config`` that its model is built with.

    ``files``: {path: SHA-256} of what it was read from.
    """

    path: str
    state: dict
    config: Config
    files: dict[str, str]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of its checkpoint, by name."""
        return checkpoint.weights_of(self.state, self.path)

    def model(self) -> nn.Module:
        """Build the model with its weights; UsageError if not all fit, or one is not finite."""
        with of_key("teacher_checkpoint"), torch.random.fork_rng(devices=[]):
            return network_of(self.state, self.path, self.config, Holder).__S__

    def classifier(self) -> nn.Module:
        """Build the loss with its weights, of a checkpoint that carries its configuration; UsageError as ``model``."""
        carried = self.state["config"]
        with of_key("teacher_checkpoint"), torch.random.fork_rng(devices=[]):
            holder = Holder(self.config.values())
            holder.__L__ = plugins.build("loss", carried["trainfunc"], carried)
            misses = checkpoint.load_weights(holder, self.state, self.path)["loss"]
            if misses:
                raise UsageError(f"{self.path}: the weights of its loss are not whole: {misses[0]}")
            weights = {name: t for name, t in holder.state_dict().items() if name.startswith(checkpoint.LOSS)}
            checkpoint.refuse_nonfinite(weights, self.path)
            return holder.__L__


def read_teacher(config: Config) -> Teacher:
    """Read the teacher that ``teacher_checkpoint`` names, with ``teacher_model`` and ``teacher_config``.

    Its keys are those that its checkpoint carries, else those of the YAML file ``teacher_config``, else those of this
    run, for the plug-in ``teacher_model``. UsageError, a line that begins with the key, if it cannot be this run's.
    """
    path = config.teacher_checkpoint
    with of_key("teacher_checkpoint"):
        files = {file: hash_of(file) for file in (path, config.teacher_config) if file}
        state = checkpoint.load(path)
    if isinstance(state.get("config"), dict) or config.teacher_config or checkpoint.toolkit_of(state):
        with of_key("teacher_config" if config.teacher_config else "teacher_checkpoint"):
            resolved = configuration_of(state, path, config.teacher_config, Holder, "teacher_config")
    else:
        resolved = of_this_run(config)
    if config.teacher_model and config.teacher_model != resolved.model:
        raise UsageError(
            f"teacher_model: {config.teacher_model}, but {path} is of {resolved.model}; leave teacher_model out"
        )
    if resolved.sample_rate != config.sample_rate:
        raise UsageError(
            f"teacher_checkpoint: {path} works at {resolved.sample_rate} Hz, this run at {config.sample_rate} "
            "(sample_rate); both hear the same samples, so take a teacher of this rate"
        )
    return Teacher(path, state, resolved, files)


def of_this_run(config: Config) -> Config:
    """The keys of a teacher whose checkpoint carries none: ``teacher_model`` with those of this run."""
    if not config.teacher_model:
        raise UsageError(
            f"teacher_checkpoint: {config.teacher_checkpoint} carries no configuration; give teacher_config, the YAML "
            "file that it was trained with, or teacher_model, if its other keys are those of this run"
        )
    declared = plugins.declaration("models", config.teacher_model)
    names = {"sample_rate", "frontend", *(declared.keys if declared else ())}
    own = {name: value for name, value in config.values().items() if name in names}
    own |= {"model": config.teacher_model, "eval": True, "allow_unknown": True}
    with of_key("teacher_model"):
        return resolve({name: Setting(value, "this run") for name, value in own.items()}, [])


@contextlib.contextmanager
def of_key(key: str):
    """Context in which each line of a UsageError begins with the key that it is about."""
    try:
        yield
    except UsageError as error:
        raise UsageError("\n".join(f"{key}: {line}" for line in str(error).splitlines())) from error


def hash_of(path) -> str:
    """SHA-256 of a regular file; UsageError if it cannot be read."""
    try:
        if not Path(path).is_file():
            raise UsageError(f"no such file: '{path}'")
        return sha256_of(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
