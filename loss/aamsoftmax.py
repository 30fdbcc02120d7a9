"""Additive angular margin softmax: cos(theta + margin) for the target (Deng et al. 2019, "ArcFace", eq. 3)."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils import accuracy, cosine_matrix

# The sine is a root of 1 - cos^2: at |cos| = 1 its slope is infinite. Clamped before the root, gradients stay finite.
MAX_COSINE = 1.0 - 1e-6


class LossFunction(nn.Module):
    """x (B, nOut), label (B,) -> (loss, accuracy in %). Computes in fp32.

    Beyond theta = pi - margin, where cos(theta + margin) would rise again, the target logit is
    cos(theta) - (1 + cos(pi - margin)), which is continuous at the switch (wespeaker's form; voxceleb_trainer's
    cos(theta) - margin sin(pi - margin) jumps there). ``easy_margin`` applies the margin only where cos(theta) > 0.
    ``margin_start_epoch``/``margin_end_epoch``: the margin is 0 before the first and ``margin`` from the second on,
    rising exponentially between them (wespeaker's margin scheduler); both 0 is a fixed margin.
    """

    per_speaker = (1, 1)

    def __init__(
        self,
        nOut,
        nClasses,
        margin=0.3,
        scale=15.0,
        easy_margin=False,
        margin_start_epoch=0,
        margin_end_epoch=0,
    ):
        super().__init__()
        self.test_normalize = True
        self.final_margin = margin
        self.scale = scale
        self.easy_margin = easy_margin
        self.ramp = (margin_start_epoch, margin_end_epoch)
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(nClasses, nOut)))
        self.set_epoch(1.0)

    def set_epoch(self, epoch: float):
        """Set the margin for a moment of training; ``epoch`` counts from 1 and has a fraction inside an epoch."""
        start, end = self.ramp
        if end <= start or epoch >= end:
            self.margin = self.final_margin
        elif epoch <= start:
            self.margin = 0.0
        else:
            self.margin = self.final_margin * (1.0 - math.exp((epoch - start) / (end - start) * math.log(1e-3)))

    def forward(self, x, label):
        cosine = cosine_matrix(x, self.weight)  # (B, nClasses)
        with torch.autocast(x.device.type, enabled=False):
            rows = torch.arange(len(label), device=label.device)
            target = cosine[rows, label]  # (B,)
            bounded = target.clamp(-MAX_COSINE, MAX_COSINE)
            sine = (1.0 - bounded.square()).sqrt()
            shifted = bounded * math.cos(self.margin) - sine * math.sin(self.margin)  # cos(theta + margin)
            if self.easy_margin:
                shifted = torch.where(target > 0, shifted, target)
            else:
                beyond = target - (1.0 + math.cos(math.pi - self.margin))
                shifted = torch.where(target > math.cos(math.pi - self.margin), shifted, beyond)
            logits = self.scale * cosine.index_put((rows, label), shifted)
            return F.cross_entropy(logits, label), accuracy(logits.detach(), label)[0]
