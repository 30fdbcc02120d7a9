"""Stochastic gradient descent with momentum, Nesterov's by default."""

import torch


def Optimizer(parameters, lr=0.001, weight_decay=0.0, momentum=0.9, nesterov=True, fused=False, **others):
    """Build torch's SGD; ``fused`` updates all weights in one pass over memory, and takes no sparse gradients."""
    nesterov = nesterov and momentum > 0
    options = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "fused": fused}
    optimizer = torch.optim.SGD(parameters, **options)
    if fused and momentum:
        optimizer.register_step_pre_hook(begin_momenta)
    return optimizer


def begin_momenta(optimizer, *arguments):
    """Give weights a momentum of zero whose first gradient comes later than that of others, as of a frozen backbone.

    torch's fused pass wants that all have a momentum or none has. The first step from zero is that without momentum.
    """
    for group in optimizer.param_groups:
        training = [p for p in group["params"] if p.grad is not None]
        new = [p for p in training if optimizer.state[p].get("momentum_buffer") is None]
        for parameter in new if len(new) < len(training) else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
