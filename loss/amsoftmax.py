"""Additive margin softmax: cos(theta) - margin for the target (Wang et al. 2018, "Additive margin softmax", eq. 6)."""

import torch
import torch.nn.functional as F
from torch import nn

from loss.margin import MarginSchedule
from utils import accuracy, cosine_matrix


class LossFunction(nn.Module):
    """x (B, nOut), label (B,) -> (loss, accuracy in %). Computes in fp32. ``margin_warmup`` lets the margin rise."""

    per_speaker = (1, 1)
    margin_range = (0.0, 1.0)  # of a cosine

    def __init__(self, nOut, nClasses, margin=0.3, scale=15.0, margin_warmup=(0, 0, "exponential")):
        super().__init__()
        self.test_normalize = True
        self.final_margin, self.schedule = margin, MarginSchedule(margin_warmup)
        self.scale = scale
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(nClasses, nOut)))
        self.set_epoch(1.0)

    def set_epoch(self, epoch: float):
        """Set the margin for a moment of training; ``epoch`` counts from 1 and has a fraction inside an epoch."""
        self.margin = self.schedule.share(epoch) * self.final_margin

    def forward(self, x, label):
        cosine = cosine_matrix(x, self.weight)  # (B, nClasses)
        with torch.autocast(x.device.type, enabled=False):
            target = F.one_hot(label, cosine.shape[1]).to(cosine.dtype)
            logits = self.scale * (cosine - self.margin * target)
            return F.cross_entropy(logits, label), accuracy(logits.detach(), label)[0]
