"""Stochastic gradient descent with momentum, Nesterov's by default."""

import torch


def Optimizer(parameters, lr=0.001, weight_decay=0.0, momentum=0.9, nesterov=True, fused=False):
    """Build torch's SGD.

    ``fused`` updates all weights in one pass over memory. It takes no sparse gradients, and weights that train from a
    later step on than others, as after ``freeze_epochs``, end it.
    """
    nesterov = nesterov and momentum > 0
    options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "fused": fused}
    return torch.optim.SGD(parameters, **options)
