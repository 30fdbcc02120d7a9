"""What an optimizer of a plug-in keeps beside torch's ``state``, in attributes of its own: for checkpoints."""

import torch
from torch import nn

from training.module_state import CONTAINERS, Unstorable, put_back, storable
from training.placement import placed

OF_TORCH = frozenset(vars(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)))
NUMBERED = "parameter "  # what stands for a parameter that is a key


def attributes_of(optimizer) -> dict:
    """The attributes {name: value} that ``state_dict`` does not hold, as slow weights and counters; {} of torch's own.

    Other objects, as an optimizer inside it, are left out.
    """
    if not isinstance(optimizer, torch.optim.Optimizer) or type(optimizer).__module__.startswith("torch."):
        return {}
    numbers = {id(p): n for n, p in enumerate(parameters_of(optimizer))}
    found = {}
    for name, value in vars(optimizer).items():
        try:
            found |= {} if name in OF_TORCH else {name: _stored(value, numbers)}
        except Unstorable:
            continue
    return found


def restore_attributes(optimizer, saved: dict):
    """Put back what ``attributes_of`` gave; names that the optimizer does not have are left alone."""
    parameters, own = parameters_of(optimizer), vars(optimizer)
    for name in saved.keys() & own.keys() - OF_TORCH:
        put_back(own, name, placed(_read(saved[name], parameters), own[name], "", parameters[0].device))


def parameters_of(optimizer) -> list:
    """The parameters of all groups, in their order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _stored(value, numbers: dict[int, int]):
    """A value in types that a file holds; Unstorable if it is none."""
    if isinstance(value, dict):
        named = {NUMBERED + str(numbers[id(k)]) if id(k) in numbers else k: v for k, v in value.items()}
        if any(not isinstance(key, (str, int)) for key in named):
            raise Unstorable
        return {storable(key): _stored(item, numbers) for key, item in named.items()}
    if isinstance(value, CONTAINERS):
        return [_stored(item, numbers) for item in value]
    if isinstance(value, torch.Tensor) and id(value) not in numbers:
        return value.detach()
    if not isinstance(value, (bool, int, float, str, type(None))):
        raise Unstorable
    return storable(value)


def _read(value, parameters: list):
    """A stored value with parameters as keys again, and what belongs to one where it is."""
    if not isinstance(value, dict):
        return value
    found = {}
    for key, item in value.items():
        number = str(key).removeprefix(NUMBERED)
        if str(key).startswith(NUMBERED) and number.isdigit() and int(number) < len(parameters):
            key = parameters[int(number)]
            item = item.to(key.device) if isinstance(item, torch.Tensor) else item
        found[key] = _read(item, parameters)
    return found
