"""The network as several processes train it: torch averages their gradients, and with ``fsdp`` splits the weights."""

from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from config import Config
from training.recompute import blocks_of, recompute_blocks
from training.sharded import Sharded, is_sharded, shard
from training.sync_norm import synchronise

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


def shared(network: nn.Module, config: Config, ranks) -> nn.parallel.DistributedDataParallel | Sharded:
    """Wrap a network so that a backward pass leaves the mean of all processes' gradients.

    The gradients lie in the memory that is sent (``gradient_as_bucket_view``): whoever keeps one beyond the next
    backward pass copies it. The graph is not called static: a step that is refused and computed once more, and one that
    a process computes alone to find out who is at fault, would count as other ones.
    """
    if is_sharded(network):
        return Sharded(network, ranks)
    parallel = nn.parallel.DistributedDataParallel(
        network,
        device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None,
        find_unused_parameters=config.find_unused_parameters,
        gradient_as_bucket_view=True,
    )
    if config.ddp_compress != "none":
        parallel.register_comm_hook(None, COMPRESSED[config.ddp_compress])
    return parallel
