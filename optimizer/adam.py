"""Adam (Kingma and Ba 2015) with L2 regularisation through the gradient."""

import torch


def Optimizer(parameters, lr=0.001, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, fused=True, **others):
    """Build torch's Adam; ``fused`` updates all weights in one pass over memory."""
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps, fused=fused)
