"""The model of a plug-in: built, its lazy weights made, and passed one row before a run trains it."""

from typing import Any

import torch
from torch import nn

from config import Config
from corpus.audio import samples_of
from errors import UsageError, refuses_numbers
from settings import plugins
from training.faults import nan_from_the_start
from training.front_end import empty_bands, with_front_end
from training.generators import generator_state, restore_generators
from training.module_state import CONTAINERS, ModuleState
from training.precision import BufferSnapshot
from training.returned import in_words
from training.schedules import untrained

NOISE = 0.1  # deviation of what a model is tried on
ROWS = 2  # that lazy weights are made by


def build_model(values: dict) -> nn.Module:
    """Build the model of models/ that configuration values name; UsageError if what its MainModel returns is none."""
    model = plugins.build("models", values["model"], with_front_end(values))
    if isinstance(model, nn.Module):
        return model
    hint = " - call the class" if isinstance(model, type) else " - is there a 'return'?" if model is None else ""
    found = f"the class {model.__name__}" if isinstance(model, type) else in_words(model)
    raise UsageError(f"models/{values['model']}.py: MainModel must return a torch.nn.Module; it returns {found}{hint}")


def make_lazy_weights(network: nn.Module, values: dict):
    """Let noise through a network whose lazy layers, as nn.LazyLinear, have no weights yet, so that they have.

    Then an optimizer can be given them, and a checkpoint be loaded into them.
    """
    if not _is_lazy(network):
        return
    samples = samples_of(values.get("max_frames", 200), values["sample_rate"])
    label = torch.arange(ROWS) % max(values["nClasses"], 1) if _is_lazy(network.loss) else None
    with torch.no_grad():
        network.eval()(noise(network.per_row, ROWS, samples), label)
    network.train()
    left = [name for name, tensor in network.named_parameters() if nn.parameter.is_lazy(tensor)]
    if left:
        raise UsageError(f"models/{values['model']}.py: '{left[0]}' is lazy and not used in the forward pass")


def _is_lazy(module) -> bool:
    """Whether a module has a tensor without a shape yet; a loss may be a plain function."""
    tensors = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
    return any(nn.parameter.is_lazy(tensor) for tensor in tensors)


def noise(*shape: int) -> torch.Tensor:
    """Noise that no generator of the run is asked for."""
    return NOISE * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def try_model(network: nn.Module, config: Config, device: torch.device):
    """Pass one row as an evaluation does, so that what a model does not return is said before anything slow.

    UsageError too if weights are made in the forward pass. Generators, buffers and attributes are as before.
    """
    frames = config.eval_frames or round(1.25 * config.max_frames)  # not the length of a crop, as whole files
    before, training = dict(network.named_parameters()), network.training
    kept: tuple[Any, ...] = BufferSnapshot(network), ModuleState(network)
    for state in kept:
        state.take()
    drawn = generator_state(device)
    try:
        with torch.no_grad():
            network.eval()(noise(1, samples_of(frames, config.sample_rate)).to(device))
    except Exception as error:  # of a plug-in
        if not refuses_numbers(error):  # as a factorisation may: a step that does is dumped, and tells more
            raise
    finally:
        network.train(training)
        for state in kept:
            state.restore()
        restore_generators(drawn, device)
    made = [name for name, parameter in network.named_parameters() if before.get(name) is not parameter]
    if made:
        raise UsageError(
            f"models/{config.model}.py: makes '{made[0].removeprefix('__S__.')}' in its forward pass, where no "
            "optimizer gets it and no checkpoint is loaded into it: make it in __init__, or as a lazy layer of torch.nn"
        )


def cautions(network: nn.Module, optimizer) -> list[str]:
    """What is odd of a network and an optimizer and ends no run, a line each."""
    found = nan_from_the_start(network), empty_bands(network), hidden_weights(network), untrained(optimizer, network)
    return [text for text in found if text]


def hidden_weights(network: nn.Module) -> str:
    """What to say of layers in plain lists, which are neither trained nor saved; '' if there are none."""
    own = {id(module) for module in network.modules()} | {id(parameter) for parameter in network.parameters()}
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            if key.startswith("_") or not isinstance(value, CONTAINERS):
                continue
            for item in value.values() if isinstance(value, dict) else value:
                if id(item) not in own and _trains(item):
                    kind = "ParameterList" if isinstance(item, nn.Parameter) else "ModuleList"
                    kind = kind.replace("List", "Dict") if isinstance(value, dict) else kind
                    place = f"'{name}.{key}'" if name else f"'{key}'"
                    return (
                        f"{place} is a plain {type(value).__name__} of layers: their weights are neither trained nor "
                        f"saved, and another process draws others; make it an nn.{kind}"
                    )
    return ""


def _trains(item) -> bool:
    if isinstance(item, nn.Parameter):
        return item.requires_grad
    return isinstance(item, nn.Module) and any(parameter.requires_grad for parameter in item.parameters())
