"""The network as several processes train it: torch averages their gradients, and with ``fsdp`` splits the weights."""

import math
import re

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from config import Config
from errors import SharedError, plural, refuses_numbers
from training.recompute import blocks_of, recompute_blocks
from training.sharded import Sharded, is_sharded, shard
from training.slices import slices_of
from training.sync_norm import is_synchronised, synchronise

UNUSED = re.compile(r"did not receive grad for rank \d+: ([\d ]+)")  # torch's words, before numbers of parameters
COMPRESSED = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}


def prepare(network: nn.Module, config: Config, ranks, log):
    """Let norms go over all processes, blocks be computed again, weights be split, where the keys say so."""
    if ranks.world == 1:
        say_without_effect(config, log)
    if config.sync_batchnorm and ranks.world > 1:
        synchronise(network, ranks.device)
    if config.gradient_checkpointing:
        recompute_blocks(blocks_of(network.__S__, config.model, "gradient_checkpointing"))
    if config.fsdp and ranks.world > 1:
        shard(network, blocks_of(network.__S__, config.model, "fsdp"), log)


def say_without_effect(config: Config, log):
    """Name the keys that a single process passes over."""
    reasons = {
        "fsdp": (config.fsdp, "which keeps all weights"),
        "sync_batchnorm": (config.sync_batchnorm, "whose rows are all rows"),
        "ddp_compress": (config.ddp_compress != "none", "which sends no gradients"),
    }
    for key, (is_set, reason) in reasons.items():
        if is_set:
            log(f"{key}: does nothing in one process, {reason}")


class Answering(nn.Module):
    """A network whose forward pass gives a loss even where an operation refuses its numbers: NaN, as do its gradients.

    For the other processes wait for gradients of this one. ``note(error)`` is told why.
    """

    def __init__(self, network: nn.Module, note):
        super().__init__()
        self.network, self.note = network, note

    def forward(self, *given):
        """Loss and accuracy of a batch, as the network gives them."""
        try:
            return self.network(*given)
        except Exception as error:  # of an operation, or of a plug-in
            if not refuses_numbers(error):
                raise
            self.note(error)
            sums = [p.float().sum() for p in self.network.parameters() if p.requires_grad]
            return torch.stack(sums).sum() * math.nan, 0.0


class Averaging(nn.parallel.DistributedDataParallel):
    """A network whose backward pass leaves the mean of all processes' gradients; it must use all of its parameters."""

    def forward(self, *given):
        """As the network; SharedError if the pass before left parameters unused, which torch finds out only now."""
        try:
            return super().forward(*given)
        except RuntimeError as error:
            found = UNUSED.search(str(error))
            if found is None:
                raise
            names = [name for name, p in self.module.named_parameters() if p.requires_grad]
            unused = [names[int(number)].removeprefix("network.") for number in found[1].split()]
            listing = ", ".join(unused[:5]) + (", ..." if unused[5:] else "")
            what = f"the loss does not depend on {plural(len(unused), 'parameter')} of the network: {listing}"
            raise SharedError(f"{what}; take them out, or set find_unused_parameters: true") from error


def shared(network: nn.Module, config: Config, ranks, note) -> Averaging | Sharded:
    """Wrap a network so that a backward pass leaves the mean of all processes' gradients.

    ``note(error)`` is told if an operation refuses its numbers. It ends the run where processes meet within a forward
    pass, as with ``sync_batchnorm``: there the others wait in the middle of it.

    The gradients lie in the memory that is sent (``gradient_as_bucket_view``): whoever keeps one beyond the next
    backward pass copies it. The graph is not called static: a step that is refused and computed once more, and one that
    a process computes alone to find out who is at fault, would count as other ones.
    """
    if is_sharded(network):
        return Sharded(network, ranks)
    meets_within = is_synchronised(network) or slices_of(network)
    parallel = Averaging(
        network if meets_within else Answering(network, note),
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        find_unused_parameters=config.find_unused_parameters,
        gradient_as_bucket_view=True,
    )
    if config.ddp_compress != "none":
        parallel.register_comm_hook(None, COMPRESSED[config.ddp_compress])
    return parallel
