"""Multiply the learning rate by ``lr_decay`` every few epochs."""

from torch.optim.lr_scheduler import StepLR


def Scheduler(optimizer, test_interval=10, lr_decay=0.95, lr_step=0, **others):
    """Step by epoch. ``lr_step`` epochs between steps; 0 is voxceleb_trainer's coupling to ``test_interval``."""
    if lr_step < 0:
        raise ValueError(f"lr_step: must be a number of epochs, or 0; got {lr_step}")
    return StepLR(optimizer, step_size=lr_step or test_interval, gamma=lr_decay), "epoch"
