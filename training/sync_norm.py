"""Batch normalisation by the batch of all processes, so that several give what one gives with all of their rows."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from errors import UsageError


class OverAll(_BatchNorm):
    """A BatchNorm whose mean and variance in training are those of the rows of all processes.

    ``alone`` takes the rows of this process only.
    """

    alone = False

    def forward(self, x):
        """Normalise (B, C, ...) by the statistics of each channel."""
        if not self.training or self.alone or not dist.is_initialized():
            return _BatchNorm.forward(self, x)
        return self.over_all(x)

    def over_all(self, x):
        """Normalise by the statistics over all processes."""
        raise NotImplementedError


class OnGPU(OverAll, nn.SyncBatchNorm):
    """torch's own, which knows no CPU."""

    def over_all(self, x):
        """Normalise by the statistics over all processes."""
        return nn.SyncBatchNorm.forward(self, x)


class OnCPU(OverAll):
    """The same by gloo."""

    def _check_input_dim(self, x):
        if x.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {x.dim()}")

    def over_all(self, x):
        """Normalise by the statistics over all processes."""
        self._check_input_dim(x)
        return NormOverAll.apply(x, self.weight, self.bias, self)

    @torch.no_grad()
    def track(self, mean, variance, count: float):
        """Move the running statistics, as torch's BatchNorm does; ``variance`` is the biased one."""
        if self.running_mean is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.mul_(1.0 - share).add_(mean, alpha=share)
        self.running_var.mul_(1.0 - share).add_(variance * (count / max(count - 1.0, 1.0)), alpha=share)


class NormOverAll(torch.autograd.Function):
    """Batch normalisation over the rows of all processes, on the CPU.

    The gradient of the input is that of the sum of all processes' losses; weight and bias get this process's part.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, norm):
        """Normalise x (B, C, ...) in fp32; the statistics of all are put together in fp64, alike on each process."""
        values, dims = x.float(), [0, *range(2, x.dim())]
        variance, mean = torch.var_mean(values, dims, correction=0)
        own = torch.cat([mean.double(), variance.double(), mean.new_tensor([x.numel() // x.shape[1]]).double()])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        means, variances, counts = torch.stack(everyone).split([len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(dim=0) / count
        variance = (counts * (variances + (means - mean).square())).sum(dim=0) / count  # Chan et al. 1979
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = (variance + norm.eps).rsqrt().float()
        normal = (values - mean.float().view(shape)) * scale.view(shape)
        norm.track(mean.float(), variance.float(), float(count))
        ctx.save_for_backward(normal, scale, weight)
        ctx.dims, ctx.shape, ctx.count, ctx.dtype = dims, shape, float(count), x.dtype
        result = normal if weight is None else normal * weight.view(shape) + bias.view(shape)
        return result.to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of x, weight and bias."""
        normal, scale, weight = ctx.saved_tensors
        gradient = gradient.float()
        own = torch.stack([gradient.sum(ctx.dims), (gradient * normal).sum(ctx.dims)])
        total = own.to(torch.float64, copy=True)
        dist.all_reduce(total)
        mean, slope = (total / ctx.count).float().view(2, *ctx.shape).unbind()
        scale = scale if weight is None else scale * weight
        of_x = (gradient - mean - normal * slope) * scale.view(ctx.shape)
        return of_x.to(ctx.dtype), None if weight is None else own[1], None if weight is None else own[0], None


def synchronise(network: nn.Module, device: torch.device):
    """Make every BatchNorm of a network one over all processes; parameters, buffers and names stay as they are."""
    for name, module in network.named_modules():
        if not isinstance(module, _BatchNorm):
            continue
        if type(module).forward is not _BatchNorm.forward:
            kind = type(module).__name__
            raise UsageError(f"sync_batchnorm: '{name}' is a {kind}, which normalises in its own way; remove the key")
        module.__class__ = OnGPU if device.type == "cuda" else OnCPU
        module.process_group = None


def is_synchronised(network: nn.Module) -> bool:
    """Whether the rows of one process reach what another one computes."""
    return any(isinstance(module, OverAll) for module in network.modules())


@contextlib.contextmanager
def by_own_rows(network: nn.Module):
    """Context in which each process normalises by its own rows, so that none waits for another or hears from it."""
    norms = [module for module in network.modules() if isinstance(module, OverAll)]
    for norm in norms:
        norm.alone = True
    try:
        yield
    finally:
        for norm in norms:
            norm.alone = False
