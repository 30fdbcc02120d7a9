"""Weights, gradients and moments of which each process keeps a share, by torch's fully_shard (FSDP2).

The blocks of the model are gathered one after the other as they are computed, and given up again; a gradient goes to
the process whose share it is of (Rajbhandari et al. 2020, ZeRO stage 3). The gathered weights are fp32, and
autocast makes 16 bit of them as it does without: a step differs in the order of sums only.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from errors import UsageError


def shard(network: nn.Module, blocks: list[nn.Module], log):
    """Leave each process a share of every parameter; ``blocks`` are gathered one by one, what is left with the network.

    All processes must hold the same parameters. UsageError if torch is too old or a parameter is a single number.
    """
    fully_shard = of_torch()
    for name, parameter in network.named_parameters():
        if not parameter.dim():
            name = name.replace("__S__", "model").replace("__L__", "loss")
            raise UsageError(f"fsdp: '{name}' is a single number, which cannot be shared out; remove the key")
    for module in (*blocks, network):
        kind = type(module)
        fully_shard(module)
        type(module).__module__ = kind.__module__  # it is still the plug-in's
    parameters = list(network.parameters())
    own, total = (sum(p.numel() for p in each) for each in ([p.to_local() for p in parameters], parameters))
    log(f"fsdp: this process keeps {own:,} of {total:,} weights, in {len(blocks) + 1} parts")


def of_torch() -> Callable[[nn.Module], Any]:
    """torch's fully_shard; UsageError if this torch has none whose weights can be kept whole after a forward pass."""
    from torch.distributed import fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), "set_reshard_after_forward"):
        raise UsageError(f"fsdp: needs torch 2.8 or later, this is {torch.__version__}")
    return fsdp.fully_shard


def is_sharded(network: nn.Module) -> bool:
    """Whether ``shard`` was called on a network."""
    return hasattr(network, "set_requires_gradient_sync")


class Sharded:
    """A sharded network as it is called to train, with the interface of DistributedDataParallel.

    Every pass begins with the buffers of the main process, as there. Gradients go to the processes that they belong to
    after each batch of a window, and not after the last alone: kept whole they would take the memory that is to be
    saved.
    """

    def __init__(self, network: nn.Module, ranks):
        self.network, self.ranks, self.shares = network, ranks, True
        with whole(network):  # torch pads the shares when it first gathers them, and may move them in memory
            pass

    def __call__(self, data, label):
        if self.shares:
            self.ranks.share_buffers(self.network)
        return self.network(data, label)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context of passes that begin with this process's buffers."""
        self.shares = False
        try:
            yield
        finally:
            self.shares = True


@contextlib.contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """Context in which every process has the whole weights, and computes without the others; gradients stay its own.

    A collective at the start. Afterwards the gradients are gone and each process has its share again.
    """
    if not is_sharded(network):
        yield
        return
    parts: list[Any] = [module for module in network.modules() if is_sharded(module)]
    exchange(parts, False)
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for parameter in network.parameters():
            parameter.grad = None
        for part in parts:
            part.reshard()
        exchange(parts, True)


def exchange(parts: list, on: bool):
    """Whether the parts of a sharded network are given up after use, and their gradients averaged.

    The first part is the network itself, which torch keeps between forward and backward pass.
    """
    for part in parts:
        part.set_reshard_after_forward(on and part is not parts[0], recurse=False)
        part.set_reshard_after_backward(on, recurse=False)
        part.set_requires_gradient_sync(on, recurse=False)
