"""Triangular2 cyclic learning rate: each cycle's peak is half the one before (Smith 2017)."""

from torch.optim.lr_scheduler import LambdaLR


def Scheduler(optimizer, steps_per_epoch, lr, lr_min=1e-8, cycle_epochs=10.0, **others):
    """Step by iteration: every ``cycle_epochs`` epochs rise linearly from ``lr_min`` to the peak and fall back."""
    cycle = max(cycle_epochs * steps_per_epoch, 2.0)
    floor = lr_min / lr

    def factor(step):
        number, position = divmod(step, cycle)
        rise = 1.0 - abs(2.0 * position / cycle - 1.0)
        return floor + (1.0 - floor) * rise * 0.5**number

    return LambdaLR(optimizer, factor), "iteration"
