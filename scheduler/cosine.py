"""Linear warm-up, then half a cosine down to ``lr_min`` (Loshchilov and Hutter 2017, eq. 5, without restarts)."""

import math

from torch.optim.lr_scheduler import LambdaLR


def Scheduler(optimizer, steps_per_epoch, max_epoch, lr, lr_min=0.0, warmup_epochs=0.0, **others):
    """Step by iteration; the last step of ``max_epoch`` is at ``lr_min``."""
    warmup = warmup_epochs * steps_per_epoch
    total = max(max_epoch * steps_per_epoch - 1, 1)
    floor = lr_min / lr

    def factor(step):
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min((step - warmup) / max(total - warmup, 1), 1.0)
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor), "iteration"
