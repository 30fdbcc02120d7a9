"""Stochastic gradient descent with momentum, Nesterov's by default."""

import torch


def Optimizer(parameters, lr=0.001, weight_decay=0.0, momentum=0.9, nesterov=True):
    """Build torch's SGD."""
    nesterov = nesterov and momentum > 0
    return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
