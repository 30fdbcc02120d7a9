"""What one forward and backward pass gave, agreed over the ranks and read from the device at once."""

import math
from dataclasses import dataclass

import torch

from training.slices import local

FLAGS = 4  # loss, gradients, buffers, update: whether each is not finite


@dataclass
class Attempt:
    """What one forward and backward pass of a window of batches gave.

    ``loss`` and ``accuracy`` are of this rank's rows, ``mean_loss`` and ``mean_accuracy`` of those of all ranks.
    """

    loss: float
    accuracy: float
    norm: float
    loss_finite: bool  # on all ranks
    buffers_finite: bool  # on all ranks
    finite: bool  # all of it
    at_fault: bool  # this rank's own loss or buffers are not finite
    scale: float = 1.0  # the loss scale that it was computed at
    buffer: str = ""  # the first buffer that is bad on this rank, and in what way
    update_finite: bool = True  # on all ranks, where the figures were read after the update
    mean_loss: float = math.nan
    mean_accuracy: float = math.nan

    @property
    def only_gradients_overflow(self) -> bool:
        """Whether a lower loss scale may help: loss and buffers are finite, a gradient is not."""
        return not self.finite and self.loss_finite and self.buffers_finite


@dataclass
class Figures:
    """What one forward and backward pass gave, still on the device.

    ``results``: (loss, accuracy) of each batch; ``norm``: of the gradients; ``buffers``: their norm. ``shares``: how
    many rows of each batch this rank has, relative to an equal part of those of all ranks.
    """

    results: list[torch.Tensor]
    shares: list[float]
    norm: torch.Tensor
    buffers: torch.Tensor

    def shared(self, ranks, spoilt: torch.Tensor | None = None) -> torch.Tensor:
        """All numbers that an ``attempt_of`` needs, (13,), the last six of all ranks; nothing is waited for.

        ``spoilt``: a flag on the device, whether the update made something non-finite.
        """
        rows = torch.stack(self.results)  # (batches, 2)
        spoilt = torch.zeros_like(self.norm, dtype=torch.bool) if spoilt is None else spoilt
        own = torch.stack([(~rows[:, 0].isfinite()).any(), ~self.norm.isfinite(), ~self.buffers.isfinite(), spoilt])
        weighted = torch.stack([result * share for result, share in zip(self.results, self.shares)]).mean(dim=0)
        everyone = ranks.everyone(torch.cat([own.float(), weighted]))  # (ranks, 6)
        shared = torch.cat([everyone[:, :FLAGS].amax(dim=0), everyone[:, FLAGS:].mean(dim=0)])
        return torch.cat([rows.mean(dim=0), self.norm.float()[None], own.float(), shared])


def attempt_of(numbers: list[float], main: bool) -> Attempt:
    """The attempt that the numbers of ``Figures.shared`` tell of; ``main``: whether this is the main process."""
    loss, accuracy, norm, own_loss, _, own_buffers, _, bad_loss, bad_norm, bad_buffers, bad_update, *means = numbers
    # A gradient is summed over the ranks: if no loss and no buffer is bad, the main process speaks for it.
    at_fault = bool(own_loss or own_buffers) or (main and not (bad_loss or bad_buffers))
    good = not (bad_loss or bad_norm or bad_buffers or bad_update)
    attempt = Attempt(loss, accuracy, norm, not bad_loss, not bad_buffers, good, at_fault)
    attempt.update_finite = not bad_update
    attempt.mean_loss, attempt.mean_accuracy = means
    return attempt


def as_scalar(value, like) -> torch.Tensor:
    """Accuracy as plug-ins return it (0-dim or (1,) tensor, or a number) -> 0-dim float tensor beside the loss."""
    return torch.as_tensor(value, dtype=torch.float32, device=like.device).detach().reshape(())


def gradients_of(network) -> dict[str, torch.Tensor]:
    """Gradients by the names of their parameters; of split ones this process's rows."""
    return {name: local(p.grad) for name, p in network.named_parameters() if p.grad is not None}
