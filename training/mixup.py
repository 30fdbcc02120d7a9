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
