"""Generalised end-to-end loss, softmax form (Wan et al. 2018, eq. 5, 6, 8 and 9)."""

import torch
import torch.nn.functional as F
from torch import nn

from utils import accuracy, cosine_matrix


class LossFunction(nn.Module):
    """x (B, M, D) with M utterances of B different speakers -> (loss, accuracy in %).

    Each utterance is compared with every speaker's centroid; its own centroid leaves it out. ``label`` is not used.
    """

    per_speaker = (2, None)

    def __init__(self, init_w=10.0, init_b=-5.0, **others):  # losses built on this one hand on all their keys
        super().__init__()
        self.test_normalize = True
        self.w = nn.Parameter(torch.tensor(float(init_w)))
        self.b = nn.Parameter(torch.tensor(float(init_b)))

    def forward(self, x, label=None):
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            speakers, utterances, size = x.shape
            total = x.sum(dim=1, keepdim=True)
            cosine = cosine_matrix(x.reshape(-1, size), total.squeeze(1) / utterances)  # (B M, B)
            without_own = (total - x) / (utterances - 1)  # (B, M, D)
            own_cosine = cosine_matrix(x.reshape(-1, 1, size), without_own.reshape(-1, 1, size)).flatten()
            own = torch.arange(speakers, device=x.device).repeat_interleave(utterances)
            cosine = cosine.scatter(1, own.unsqueeze(1), own_cosine.unsqueeze(1))
            logits = cosine * self.w.float().clamp(min=1e-6) + self.b.float()
            return F.cross_entropy(logits, own), accuracy(logits.detach(), own)[0]
