"""What one forward and backward pass gave, read from the device once and agreed over the ranks."""

from dataclasses import dataclass

import torch


@dataclass
class Attempt:
    """What one forward and backward pass of a window of batches gave."""

    loss: float
    accuracy: float
    norm: float
    loss_finite: bool  # on all ranks
    buffers_finite: bool  # on all ranks
    finite: bool  # all of it
    at_fault: bool  # this rank's own loss or buffers are not finite
    scale: float = 1.0  # the loss scale that it was computed at
    buffer: str = ""  # the first buffer that is bad on this rank, and in what way

    @property
    def only_gradients_overflow(self) -> bool:
        """Whether a lower loss scale may help: loss and buffers are finite, a gradient is not."""
        return not self.finite and self.loss_finite and self.buffers_finite


def read_attempt(results: list, norm, buffers, ranks) -> Attempt:
    """Read the device: ``results`` (loss, accuracy) of each batch, the norm of the gradients, that of the buffers."""
    rows = torch.stack(results)  # (batches, 2)
    own = torch.stack([(~rows[:, 0].isfinite()).any(), ~norm.isfinite(), ~buffers.isfinite()]).float()
    shared = ranks.maximum(own.clone()) if ranks.world > 1 else own
    read = torch.cat([rows.mean(dim=0), norm.float()[None], own, shared]).tolist()
    loss, accuracy, norm, own_loss, _, own_buffers, bad_loss, bad_norm, bad_buffers = read
    # A gradient is summed over the ranks: if no loss and no buffer is bad, the main process speaks for it.
    at_fault = bool(own_loss or own_buffers) or (ranks.main and not (bad_loss or bad_buffers))
    good = not (bad_loss or bad_norm or bad_buffers)
    return Attempt(loss, accuracy, norm, not bad_loss, not bad_buffers, good, at_fault)


def as_scalar(value, like) -> torch.Tensor:
    """Accuracy as plug-ins return it (0-dim or (1,) tensor, or a number) -> 0-dim float tensor beside the loss."""
    return torch.as_tensor(value, dtype=torch.float32, device=like.device).detach().reshape(())


def gradients_of(network) -> dict[str, torch.Tensor]:
    """Gradients by the names of their parameters."""
    return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
