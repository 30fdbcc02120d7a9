"""The random generators that training draws from: seeded, remembered, put back."""

import random
from typing import Any

import numpy as np
import torch

OBJECTS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)  # kinds that a module may keep
MOST = 1 << 63  # a file holds no larger number


def seed_everything(seed: int):
    """Seed every global random generator; plug-ins may draw from any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generator_state(device: torch.device) -> dict:
    """The state of every global generator as plain types: a plug-in's forward pass may draw from any of them."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state["numpy"] = [name, keys.tolist(), position, has_gauss, gauss]
    version, internal, gauss_next = random.getstate()
    state["python"] = [version, list(internal), gauss_next]
    return state


def restore_generators(state: dict, device: torch.device):
    """Put the generators of a state back to it."""
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    if "numpy" in state:
        name, keys, position, has_gauss, gauss = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    if "python" in state:
        version, internal, gauss_next = state["python"]
        random.setstate((version, tuple(internal), gauss_next))


def drawn_elsewhere(state: dict, device: torch.device) -> bool:
    """Whether the run of a state drew dropout and the like from the generator of another kind of device."""
    return ("cuda" in state) is not (device.type == "cuda")


def state_of(generator) -> Any:
    """The state of one of ``OBJECTS`` as plain types; numbers beyond 64 bits as text."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        version, internal, gauss_next = generator.getstate()
        return [version, list(internal), gauss_next]
    held = generator.bit_generator if isinstance(generator, np.random.Generator) else generator
    return written(held.state if held is not generator else generator.get_state(legacy=False))


def set_state(generator, state):
    """Put a generator back to what ``state_of`` gave of it."""
    if isinstance(generator, torch.Generator):
        of_another = isinstance(state, torch.Tensor) and state.shape != generator.get_state().shape
        if not of_another:  # that of another kind of device says nothing to this one
            generator.set_state(state)
    elif isinstance(generator, random.Random):
        version, internal, gauss_next = state
        generator.setstate((version, tuple(internal), gauss_next))
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = read(state)
    else:
        generator.set_state(read(state))


def written(state):
    """A state of numpy in types that a file holds."""
    if isinstance(state, dict):
        return {key: written(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return [written(value) for value in state.tolist()]
    return str(state) if isinstance(state, int) and state >= MOST else state


def read(state):
    """A state of numpy from what ``written`` made of it."""
    if isinstance(state, dict):
        return {key: read(value) for key, value in state.items()}
    if isinstance(state, list):
        return np.array([read(value) for value in state], dtype=np.uint64 if any_text(state) else None)
    return int(state) if isinstance(state, str) and state.isdigit() else state


def any_text(values: list) -> bool:
    """Whether a list has a number beyond 63 bits in it."""
    return any(isinstance(value, str) for value in values)
