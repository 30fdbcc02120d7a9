"""On which device tensors in plain attributes of modules and optimizers are: a file holds them on the CPU."""

import collections

import torch
from torch import nn

PLACES = "(places)"  # beside the names of modules in a saved state: {module: {attribute: place}}
GENERATOR = "generator"  # the place of a torch.Generator, which a module may make in its first step


def device_of(network: nn.Module) -> torch.device:
    """The device of a network, that of its first parameter."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def place_of(value, device: torch.device) -> str:
    """The place of an attribute's value beside a network on ``device``: the type of its device, or GENERATOR.

    '' if it has no place of its own: all of a network on the CPU is there, so that tells nothing.
    """
    if isinstance(value, torch.Generator):
        return GENERATOR
    found = next(tensors_of(value), None)
    return "" if found is None or device.type == "cpu" else found.device.type


def tensors_of(value):
    """The tensors of a value, those in its containers among them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict, collections.deque)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


def placed(value, now, place: str, device: torch.device):
    """A value of a file where the attribute, which is ``now``, needs it beside a network on ``device``.

    What was on the network's device goes to that of the network, whatever it is now, and what was on the host stays
    there. If the file does not say, a tensor goes to where it is already, and one that is not there yet to the network.
    """
    if place == "cpu":
        return value
    if not place and isinstance(value, torch.Tensor) and isinstance(now, torch.Tensor):
        return value.to(now.device)
    return moved(value, device)


def moved(value, device: torch.device):
    """A value with the tensors that it holds on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return type(value)(moved(item, device) for item in value) if type(value) in (list, tuple) else value
