"""What modules keep beside parameters and buffers: generators, counters, tensors and lists of them in attributes."""

import collections
import copy
import sys
import types
from typing import Any

import numpy as np
import torch
from torch import nn

from training import generators

PLAIN = (bool, int, float, str, type(None), np.generic)
CONTAINERS = (list, tuple, dict, set, collections.deque)
MOST_ITEMS = 4096  # of a container that is kept, those inside it among them; a larger one is a constant, not a state
MOST_ELEMENTS = 1 << 24  # of a tensor or an array that is kept: a queue of 65,536 embeddings of 256 numbers
OF_FSDP = ("_fsdp", "_is_fsdp")  # what torch's fully_shard notes in modules
OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class ModuleState:
    """Copies the plain attributes of a network's modules, and puts them back after a step that is refused.

    Modules of torch itself keep all their state in parameters and buffers, so only those of plug-ins are looked at, and
    the generators that their files keep as names of their own.
    """

    def __init__(self, network: nn.Module):
        self.modules = [(n, m) for n, m in network.named_modules() if not type(m).__module__.startswith("torch.")]
        files = {type(module).__module__ for _, module in self.modules}
        self.modules += [(f"file {name}", sys.modules[name]) for name in sorted(files & sys.modules.keys())]
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

    def generators(self) -> dict[tuple[str, str], Any]:
        """The states of the generators that modules keep, as they are now."""
        found = ((n, k, v) for n, m in self.modules for k, v in vars(m).items() if isinstance(v, generators.OBJECTS))
        return {(name, key): copied(generator) for name, key, generator in found}

    def set_generators(self, states: dict[tuple[str, str], Any]):
        """Set the generators of modules to states of ``generators``."""
        modules = dict(self.modules)
        for (name, key), state in states.items():
            put_back(modules[name].__dict__, key, state)

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
                if isinstance(module, types.ModuleType) and key not in states_of(module):
                    continue
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


def states_of(module) -> dict[str, Any]:
    """The attributes of a module that may be a state; of a file its generators."""
    if isinstance(module, types.ModuleType):
        return {k: v for k, v in vars(module).items() if isinstance(v, generators.OBJECTS)}
    own = {k: v for k, v in vars(module).items() if k not in OF_EVERY_MODULE and is_state(v)}
    return {k: v for k, v in own.items() if not k.startswith(OF_FSDP)}


def is_state(value) -> bool:
    """Whether an attribute may change from step to step and is small enough to be copied at each."""
    if isinstance(value, torch.Tensor):
        return not isinstance(value, nn.Parameter) and value.numel() <= MOST_ELEMENTS and value.is_leaf
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf" and value.size <= MOST_ELEMENTS
    if isinstance(value, CONTAINERS):
        return len(value) <= MOST_ITEMS and holds_states(value, MOST_ITEMS)
    return isinstance(value, (*PLAIN, *generators.OBJECTS))


def holds_states(container, most: int, elements: int = MOST_ELEMENTS) -> bool:
    """Whether what a container holds, as a memory of embeddings does, is a state as a whole."""
    left = [container]
    while left:
        value = left.pop()
        most -= 1
        inside = isinstance(value, CONTAINERS)
        if inside:
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, (torch.Tensor, np.ndarray)):
            elements -= value.numel() if isinstance(value, torch.Tensor) else value.size
        if most < 0 or elements < 0 or not (inside or is_state(value)) or isinstance(value, generators.OBJECTS):
            return False
    return True


def copied(value):
    """A copy that later changes of the original leave alone; of a generator its state."""
    if isinstance(value, generators.OBJECTS):
        return generators.state_of(value)
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        changed = copy.copy(value)  # of its own kind, as a defaultdict
        changed.update({key: copied(item) for key, item in value.items()})
        return changed
    if isinstance(value, collections.deque):
        return collections.deque(map(copied, value), value.maxlen)
    if type(value) in CONTAINERS:
        return type(value)(map(copied, value))
    return copy.copy(value)


def put_back(own: dict, key: str, value):
    """Set the attribute ``key`` of a module's ``own`` ones to a copy of ``value``, which may come from a file."""
    now = own.get(key)
    if isinstance(now, generators.OBJECTS):
        generators.set_state(now, value)
    elif isinstance(now, torch.Tensor) and isinstance(value, torch.Tensor) and now.shape == value.shape:
        with torch.no_grad():
            now.copy_(value)
    elif isinstance(now, (np.ndarray, np.generic)) and isinstance(value, (torch.Tensor, bool, int, float)):  # of a file
        own[key] = np.asarray(value).astype(now.dtype)[()]
    elif isinstance(now, collections.deque):
        own[key] = collections.deque(map(copied, value), now.maxlen)
    elif isinstance(now, set):
        own[key] = set(value)
    else:
        own[key] = copied(value)


def storables(entries) -> dict[str, dict]:
    """Copies of (module, attribute, value) as a dump or a checkpoint holds them; none of what no file can hold."""
    found: dict[str, dict] = {}
    for name, key, value in entries:
        try:
            found.setdefault(name, {})[key] = storable(copied(value))
        except Unstorable:
            continue
    return {name: values for name, values in found.items() if values}


class Unstorable(ValueError):
    """A value that restricted loading would refuse, and the whole file with it."""


def storable(value):
    """A value in the very types that restricted loading accepts; sets and queues become lists."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, np.generic):
        return storable(value.item())
    if isinstance(value, dict):
        if any(not isinstance(key, (str, int)) for key in value):
            raise Unstorable
        return {storable(key): storable(item) for key, item in value.items()}
    if isinstance(value, CONTAINERS):
        return (tuple if isinstance(value, tuple) else list)(map(storable, value))
    if (isinstance(value, int) and not -(2**63) <= value < 2**63) or (isinstance(value, str) and "\0" in value):
        raise Unstorable
    kinds = (bool, int, float, str)  # a number of an enumeration is an int of its own class
    return next((kind(value) for kind in kinds if isinstance(value, kind)), value)
