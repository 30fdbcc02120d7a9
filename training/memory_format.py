"""The order in memory in which the 2-D convolutions of a model train: some processors are faster with channels last."""

import torch
from torch import nn


def lay_out(network: nn.Module, memory_format: str, amp_dtype: torch.dtype | None, device: torch.device):
    """Let 2-D convolutions of a network's model take (B, C, H, W) with C last in memory as they train.

    ``memory_format``: the key; auto does so for a model with ``channels_last = True`` in 16 bit on a CPU with AVX512
    (benchmarks/RESULTS.md). Not in fp32, where torch's BatchNorm adds up channels that are last one by one,
    and so loses up to three digits of their mean. Weights stay as they are, and what does not train computes as ever:
    evaluations are exact.
    """
    model = network.__S__
    gains = amp_dtype is not None and device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    known = memory_format == "auto" and gains and getattr(model, "channels_last", False) is True
    if known or memory_format == "channels_last":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(last_in_training)


def last_in_training(module: nn.Module, inputs: tuple) -> tuple:
    """Put the channels of a batch last in memory; where they are last already nothing is copied."""
    if not module.training:
        return inputs
    return tuple(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs)
