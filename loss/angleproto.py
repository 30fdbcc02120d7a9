"""Angular prototypical loss (Chung et al. 2020, "In defence of metric learning", eq. 8 and 9)."""

import torch
import torch.nn.functional as F
from torch import nn

from utils import accuracy, cosine_matrix


class LossFunction(nn.Module):
    """x (B, M, D) with M utterances of B different speakers -> (loss, accuracy in %).

    The first utterance is the query, the mean of the others its speaker's prototype. ``label`` is not used.
    """

    per_speaker = (2, None)

    def __init__(self, init_w=10.0, init_b=-5.0, **others):  # losses built on this one hand on all their keys
        super().__init__()
        self.test_normalize = True
        self.w = nn.Parameter(torch.tensor(float(init_w)))
        self.b = nn.Parameter(torch.tensor(float(init_b)))

    def forward(self, x, label=None):
        with torch.autocast(x.device.type, enabled=False):
            prototypes = x[:, 1:].float().mean(dim=1)  # (B, D)
            logits = cosine_matrix(x[:, 0], prototypes) * self.w.float().clamp(min=1e-6) + self.b.float()
            own = torch.arange(len(x), device=x.device)
            return F.cross_entropy(logits, own), accuracy(logits.detach(), own)[0]
