"""Mixup: rows of a batch that are mixed with others of it, and so are their losses (Zhang et al. 2018)."""

import torch


def draw_mix(alpha: float, rows: int) -> tuple[float, torch.Tensor]:
    """Draw the share of each row that stays, of Beta(alpha, alpha), and which row (rows,) makes up the rest of it.

    From torch's generator on the CPU, as dropout there: its state before the step is in dumps and checkpoints, so that
    a step that is taken again, resumed or replayed is mixed in the same way, on whatever device.
    """
    concentration = torch.tensor(alpha, dtype=torch.float64)
    share = float(torch.distributions.Beta(concentration, concentration).sample())
    return share, torch.randperm(rows)


class Mix:
    """What is mixed in a batch with labels (B,): drawn for it by ``draw_mix``."""

    def __init__(self, alpha: float, label: torch.Tensor):
        self.share, order = draw_mix(alpha, len(label))
        self.order = order.to(label.device)

    def waves(self, data: torch.Tensor) -> torch.Tensor:
        """The waveforms (nPerSpeaker, B, samples), each mixed with its other."""
        return self.share * data + (1 - self.share) * data[:, self.order]

    def result(self, loss_of, rows: torch.Tensor, label: torch.Tensor) -> tuple:
        """(loss, accuracy in %) of embeddings by both labels: ``loss_of(rows, label)`` of each, mixed alike."""
        both = zip(loss_of(rows, label), loss_of(rows, label[self.order]))
        return tuple(self.share * a + (1 - self.share) * b for a, b in both)
