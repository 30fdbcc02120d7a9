"""Linear warm-up times an exponential fall from ``lr`` to ``lr_min``: wespeaker's ExponentialDecrease."""

import math

from torch.optim.lr_scheduler import LambdaLR


def Scheduler(optimizer, steps_per_epoch, max_epoch, lr, lr_min=5e-5, warmup_epochs=6.0, **others):
    """Step by iteration. The fall runs from the first step, the warm-up multiplies it from 0 to 1."""
    if lr_min <= 0:
        raise ValueError(f"lr_min: must be above 0, an exponential fall never gets there; got {lr_min:g}")
    warmup = max(warmup_epochs * steps_per_epoch, 1e-9)
    total = max(max_epoch * steps_per_epoch, 1)

    def factor(step):
        fall = math.exp(min(step / total, 1.0) * math.log(lr_min / lr))
        return fall * min(step / warmup, 1.0) if step < warmup else fall

    return LambdaLR(optimizer, factor), "iteration"
