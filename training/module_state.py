"""What modules keep beside parameters and buffers: generators, counters, tensors and lists of them in attributes."""

import collections
import copy
import dis
import functools
import sys
import types
import weakref
from typing import Any

import numpy as np
import torch
from torch import nn

from training import generators
from training.placement import GENERATOR, PLACES, device_of, place_of, placed

PLAIN = (bool, int, float, str, type(None), np.generic)
CONTAINERS = (list, tuple, dict, set, collections.deque)
CHANGEABLE = (list, dict, set, collections.deque, torch.Tensor, np.ndarray)
MOST_ITEMS = 4096  # of a container that is kept, those inside it among them; a larger one is a constant, not a state
MOST_ELEMENTS = 1 << 24  # of a tensor or an array that is kept: a queue of 65,536 embeddings of 256 numbers
OF_FSDP = ("_fsdp", "_is_fsdp")  # what torch's fully_shard notes in modules
OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class ModuleState:
    """Copies the plain attributes of a network's modules, and puts them back after a step that is refused.

    Modules of torch itself keep all their state in parameters and buffers, so only those of plug-ins are looked at, and
    what their files keep as names of their own: generators, lists, dicts, tensors, and what a function calls global.
    """

    def __init__(self, network: nn.Module):
        self.network = network
        self.modules = [(n, m) for n, m in network.named_modules() if not type(m).__module__.startswith("torch.")]
        files = {type(module).__module__ for _, module in self.modules}
        self.modules += [(f"file {name}", sys.modules[name]) for name in sorted(files & sys.modules.keys())]
        self.at_first = {name: at_first(sys.modules[name]) for name in files & sys.modules.keys()}
        self.copies: dict[tuple[str, str], Any] = {}
        self.originals: dict[tuple[str, str], Any] = {}  # what was copied, which other objects may hold too

    def take(self):
        """Copy every attribute that may be a state."""
        self.originals = {(name, key): v for name, module in self.modules for key, v in states_of(module).items()}
        self.copies = {place: copied(value) for place, value in self.originals.items()}

    def restore(self):
        """Put every object back where it was, with the content that it had; an attribute that is new is removed."""
        for name, module in self.modules:
            for key in states_of(module):
                if (name, key) not in self.copies:
                    del module.__dict__[key]
        modules = dict(self.modules)
        for (name, key), value in self.copies.items():
            own = modules[name].__dict__
            own[key] = self.originals[name, key]
            put_back(own, key, value)

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
        """{module: {attribute: value}} as it is now, for a dump or a checkpoint: plain values and CPU tensors.

        Without the names of files that no step has changed: a constant that is edited stays as it is written.
        """
        return self.saved((n, k, v) for n, module in self.modules for k, v in states_of(module).items())

    def kept(self) -> dict[str, dict]:
        """``state_dict`` as it was when the copies were taken."""
        return self.saved((name, key, value) for (name, key), value in self.copies.items())

    def saved(self, entries) -> dict[str, dict]:
        """Of (module, attribute, value) what a dump or a checkpoint holds."""
        firsts = {f"file {name}": values for name, values in self.at_first.items()}
        kept = [e for e in entries if not (e[1] in firsts.get(e[0], {}) and alike(e[2], firsts[e[0]][e[1]]))]
        found, places = storables(kept), self.places(kept)
        return {**found, PLACES: places} if places else found

    def places(self, entries: list[tuple]) -> dict[str, dict[str, str]]:
        """{module: {attribute: place}} of those (module, attribute, value) that have one."""
        modules, device, found = dict(self.modules), device_of(self.network), {}
        for name, key, value in entries:
            now = vars(modules[name]).get(key)
            place = place_of(now if isinstance(now, torch.Generator) else value, device)
            if place:
                found.setdefault(name, {})[key] = place
        return found

    def load_state_dict(self, state: dict[str, dict]):
        """Put saved attributes back into modules; names of methods are left alone."""
        device, places = device_of(self.network), state.get(PLACES, {})
        for name, module in self.modules:
            for key, value in state.get(name, {}).items():
                if isinstance(module, types.ModuleType) and key not in states_of(module):
                    continue
                own, place = vars(module), places.get(name, {}).get(key, "")
                if key in OF_EVERY_MODULE or hasattr(type(module), key) or not is_state(own.get(key)):
                    continue
                if place == GENERATOR and own.get(key) is None:
                    own[key] = torch.Generator(device)
                now = own.get(key)
                given = value if place == GENERATOR else placed(value, now, place, device)
                if isinstance(now, torch.Tensor) and isinstance(given, torch.Tensor) and now.device != given.device:
                    own[key] = None  # which a copy into it would leave where it is
                put_back(own, key, given)


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
    """The attributes of a module that may be a state; of a file the names that may be one."""
    if isinstance(module, types.ModuleType):
        names, kinds = global_names(module), (*generators.OBJECTS, *CHANGEABLE)
        found = {k: v for k, v in vars(module).items() if isinstance(v, kinds) or k in names}
        return {k: v for k, v in found.items() if not k.startswith("__") and is_state(v)}
    own = {k: v for k, v in vars(module).items() if k not in OF_EVERY_MODULE and is_state(v)}
    return {k: v for k, v in own.items() if not k.startswith(OF_FSDP)}


def once_a_file(function):
    """Remember what a function says of a file while its module lives: the analysis imports changed ones many times."""
    known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def remembered(module):
        if module not in known:
            known[module] = function(module)
        return known[module]

    return remembered


@once_a_file
def global_names(module: types.ModuleType) -> frozenset[str]:
    """The names of a file that one of its functions sets, as it may where it calls them global."""
    own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
    own += [value for kind in own if isinstance(kind, type) for value in vars(kind).values()]
    codes = [value.__code__ for value in own if isinstance(value, types.FunctionType)]
    found = set()
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        found |= {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_GLOBAL"}
    return frozenset(found)


@once_a_file
def at_first(module: types.ModuleType) -> dict[str, Any]:
    """The names of a file that may be a state, as they were when a network of its modules was first looked at."""
    states = states_of(module).items()
    return {key: copied(value) for key, value in states if not isinstance(value, generators.OBJECTS)}


def alike(a, b) -> bool:
    """Whether two states are the same, NaN and NaN too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (torch.Tensor, np.ndarray)):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        same = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return same and bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b or (a != a and b != b)


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
    elif isinstance(now, dict) and isinstance(value, dict):
        kept = copied(value)
        now.clear()
        now.update(kept)
    elif isinstance(now, (list, collections.deque)) and isinstance(value, (list, tuple, collections.deque)):
        kept = list(map(copied, value))
        now.clear()
        now.extend(kept)
    elif isinstance(now, set) and isinstance(value, CONTAINERS):
        kept = set(value)
        now.clear()
        now.update(kept)
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
