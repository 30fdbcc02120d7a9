"""Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

import torch


def Optimizer(parameters, lr=0.001, weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8, fused=True, **others):
    """Build torch's AdamW; ``fused`` updates all weights in one pass over memory."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(beta1, beta2), eps=eps, fused=fused)
