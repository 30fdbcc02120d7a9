"""Additive margin softmax: cos(theta) - margin for the target (Wang et al. 2018, "Additive margin softmax", eq. 6)."""

import torch
import torch.nn.functional as F
from torch import nn

from utils import accuracy, cosine_matrix


class LossFunction(nn.Module):
    """x (B, nOut), label (B,) -> (loss, accuracy in %). Computes in fp32."""

    per_speaker = (1, 1)

    def __init__(self, nOut, nClasses, margin=0.3, scale=15.0):
        super().__init__()
        self.test_normalize = True
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(nClasses, nOut)))

    def forward(self, x, label):
        cosine = cosine_matrix(x, self.weight)  # (B, nClasses)
        with torch.autocast(x.device.type, enabled=False):
            target = F.one_hot(label, cosine.shape[1]).to(cosine.dtype)
            logits = self.scale * (cosine - self.margin * target)
            return F.cross_entropy(logits, label), accuracy(logits.detach(), label)[0]
