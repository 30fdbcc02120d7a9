"""What modules keep beside parameters and buffers: generators, counters, small tensors in plain attributes."""

import collections
import copy
from typing import Any

import torch
from torch import nn

PLAIN = (bool, int, float, str, type(None))
CONTAINERS = (list, tuple, dict, set, collections.deque)
MOST_ELEMENTS = 4096  # of a tensor or a container that is kept; a larger one is a constant, not a state
OF_FSDP = ("_fsdp", "_is_fsdp")  # what torch's fully_shard notes in modules
OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class ModuleState:
    """Copies the plain attributes of a network's modules, and puts them back after a step that is refused.

    Modules of torch itself keep all their state in parameters and buffers, so only those of plug-ins are looked at.
    """

    def __init__(self, network: nn.Module):
        self.modules = [(n, m) for n, m in network.named_modules() if not type(m).__module__.startswith("torch.")]
        self.copies: dict[tuple[str, str], Any] = {}

    def take(self):
        """Copy every attribute that may be a state."""
        self.copies = {}
        for name, module in self.modules:
            for key, value in states_of(module).items():
                self.copies[name, key] = copied(value)

    def restore(self):
        """Put the copies back; an attribute that was not there is removed again."""
        for name, module in self.modules:
            for key in states_of(module):
                if (name, key) not in self.copies:
                    del module.__dict__[key]
        modules = dict(self.modules)
        for (name, key), value in self.copies.items():
            put_back(modules[name].__dict__, key, value)

    def generators(self) -> dict[tuple[str, str], torch.Tensor]:
        """The states of the generators that modules keep, as they are now."""
        found = ((n, k, v) for n, m in self.modules for k, v in vars(m).items() if isinstance(v, torch.Generator))
        return {(name, key): generator.get_state() for name, key, generator in found}

    def set_generators(self, states: dict[tuple[str, str], torch.Tensor]):
        """Set the generators of modules to states of ``generators``."""
        modules = dict(self.modules)
        for (name, key), state in states.items():
            modules[name].__dict__[key].set_state(state)

    def state_dict(self) -> dict[str, dict]:
        """{module: {attribute: value}} as it is now, for a dump or a checkpoint: plain values and CPU tensors."""
        return storables((n, k, v) for n, module in self.modules for k, v in states_of(module).items())

    def kept(self) -> dict[str, dict]:
        """``state_dict`` as it was when the copies were taken."""
        return storables((name, key, value) for (name, key), value in self.copies.items())

    def load_state_dict(self, state: dict[str, dict]):
        """Put saved attributes back into modules; names of methods are left alone."""
        for name, module in self.modules:
            for key, value in state.get(name, {}).items():
                if key not in OF_EVERY_MODULE and not hasattr(type(module), key) and is_state(vars(module).get(key)):
                    put_back(module.__dict__, key, value)


def cpu_copy(network: nn.Module) -> nn.Module:
    """Copy a network to the CPU, tensors and generators in plain attributes too; needs no memory of its device."""
    made: dict[int, Any] = {}
    for module in network.modules():
        kept = vars(module)
        for value in [*kept["_parameters"].values(), *kept["_buffers"].values(), *kept.values()]:
            if id(value) in made:
                continue
            if isinstance(value, torch.Tensor):
                tensor = value.detach().to("cpu", copy=True)
                learns = isinstance(value, nn.Parameter)
                made[id(value)] = nn.Parameter(tensor, value.requires_grad) if learns else tensor
            elif isinstance(value, torch.Generator):
                made[id(value)] = torch.Generator()
                if value.device.type == "cpu":
                    made[id(value)].set_state(value.get_state())
    copy_of = copy.deepcopy(network, made)
    for module in copy_of.modules():
        vars(module).update({k: torch.device("cpu") for k, v in vars(module).items() if isinstance(v, torch.device)})
    return copy_of


def states_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that may be a state."""
    own = {k: v for k, v in vars(module).items() if k not in OF_EVERY_MODULE and is_state(v)}
    return {k: v for k, v in own.items() if not k.startswith(OF_FSDP)}


def is_state(value) -> bool:
    """Whether an attribute may change from step to step and is small enough to be copied at each."""
    if isinstance(value, torch.Tensor):
        return not isinstance(value, nn.Parameter) and value.numel() <= MOST_ELEMENTS and value.is_leaf
    if isinstance(value, CONTAINERS):
        items = value.values() if isinstance(value, dict) else value
        return len(value) <= MOST_ELEMENTS and all(isinstance(item, PLAIN) for item in items)
    return isinstance(value, (*PLAIN, torch.Generator))


def copied(value):
    """A copy that later changes of the original leave alone."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    return copy.copy(value)


def put_back(own: dict, key: str, value):
    """Set the attribute ``key`` of a module's ``own`` ones to a copy of ``value``."""
    now = own.get(key)
    if isinstance(now, torch.Generator):
        now.set_state(value)
    elif isinstance(now, torch.Tensor) and isinstance(value, torch.Tensor) and now.shape == value.shape:
        with torch.no_grad():
            now.copy_(value)
    elif isinstance(now, collections.deque):
        own[key] = collections.deque(value, now.maxlen)
    else:
        own[key] = copied(value)


def storables(entries) -> dict[str, dict]:
    """Copies of (module, attribute, value) as a dump or a checkpoint holds them; no set, which is none of its types."""
    found: dict[str, dict] = {}
    for name, key, value in entries:
        if not isinstance(value, set):
            found.setdefault(name, {})[key] = storable(copied(value))
    return found


def storable(value):
    """A value in a type that restricted loading accepts."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    return list(value) if isinstance(value, collections.deque) else value
