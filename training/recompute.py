"""Activation checkpointing: what blocks of a model compute is not kept for the backward pass, but computed again in it.

The loss, the gradients and everything that a step leaves behind are those of a step that keeps it, bit for bit.
"""

import contextlib
import types
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from errors import UsageError
from training.front_end import plugin_of
from training.module_state import ModuleState


def blocks_of(model: nn.Module, name: str, key: str) -> list[nn.Module]:
    """List the blocks that a model is made of; UsageError for the configuration ``key`` if it does not tell them."""
    tell = getattr(model, "blocks", None)
    if not callable(tell):
        raise UsageError(f"{key}: models/{name}.py does not tell its blocks (docs/extending.md); remove the key")
    return [*getattr(plugin_of(model), "blocks", list)(), *tell()]  # a front end may tell its own too


def recompute_blocks(blocks: list[nn.Module]):
    """Let each block keep its input only, and compute the rest again when its gradients are wanted."""
    for block in blocks:
        block.forward = types.MethodType(recomputed, block)


def is_recomputed(block: nn.Module) -> bool:
    """Whether ``recompute_blocks`` was told of a module."""
    return getattr(block.forward, "__func__", None) is recomputed


def recomputed(block: nn.Module, *inputs, **named):
    """Pass a block forward; in training its activations are given up and computed again in the backward pass."""
    forward = type(block).forward
    if not torch.is_grad_enabled():
        return forward(block, *inputs, **named)
    more = {} if torch.compiler.is_compiling() else {"context_fn": Before(block).contexts}  # a compiler knows itself
    return checkpoint(forward, block, *inputs, use_reentrant=False, preserve_rng_state=True, **more, **named)


class Before:
    """What a block holds beside its weights, as before its forward pass: buffers, generators, plain attributes.

    The second pass must begin from the same, and leave no trace: the statistics of BatchNorm move once a step.
    """

    def __init__(self, block: nn.Module):
        self.state = ModuleState(block)
        self.generators = self.state.generators()
        held = [module._buffers for module in block.modules() if module._buffers]
        self.buffers = [(own, {n: None if b is None else b.clone() for n, b in own.items()}) for own in held]

    def contexts(self):
        """The contexts of the first and of the second pass."""
        return contextlib.nullcontext(), self.again()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Context in which the block is as before its forward pass; afterwards it is as it was found."""
        found = [(vars(module), dict(vars(module))) for _, module in self.state.modules]
        found += [(own, dict(own)) for own, _ in self.buffers]
        drawn = self.state.generators()
        for own, copies in self.buffers:
            own.update(copies)
        self.state.set_generators(self.generators)
        try:
            yield
        finally:
            for own, content in found:
                own.clear()
                own.update(content)
            self.state.set_generators(drawn)
