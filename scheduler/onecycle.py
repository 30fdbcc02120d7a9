"""One cycle: rise to ``lr`` and fall again by a cosine (Smith and Topin 2018)."""

import math

from torch.optim.lr_scheduler import LambdaLR


def Scheduler(optimizer, steps_per_epoch, max_epoch, lr, lr_min=1e-6, warmup_share=0.3, **others):
    """Step by iteration: ``warmup_share`` of all steps rise from lr/25, the rest fall to ``lr_min``."""
    total = max(max_epoch * steps_per_epoch - 1, 1)
    peak = max(warmup_share * total, 1.0)

    def blend(start, end, share):
        return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))

    def factor(step):
        if step < peak:
            return blend(1.0 / 25.0, 1.0, step / peak)
        return blend(1.0, lr_min / lr, (step - peak) / max(total - peak, 1))

    return LambdaLR(optimizer, factor), "iteration"
