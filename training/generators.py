"""The random generators that training draws from: seeded, remembered, put back."""

import random

import numpy as np
import torch


def seed_everything(seed: int):
    """Seed every global random generator; plug-ins may draw from any of them."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def generator_state(device: torch.device, torch_only: bool = False) -> dict:
    """The state of every generator as plain types; ``torch_only``: of those that a forward pass draws from."""
    state = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if not torch_only:
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
