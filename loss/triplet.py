"""Triplet loss on unit-length embeddings with hard negatives (Schroff et al. 2015; Chung et al. 2020, eq. 5)."""

import torch
import torch.nn.functional as F
from torch import nn


class LossFunction(nn.Module):
    """x (B, 2, D), an anchor and a positive of B different speakers -> (loss, accuracy in %).

    The negative of an anchor is, with probability ``hard_prob``, one of the ``hard_rank`` nearest positives of other
    speakers, else any of them. Accuracy is the share of anchors nearer to their positive than to their negative.
    """

    per_speaker = (2, 2)
    margin_range = (0.0, 4.0)  # squared distances of unit vectors

    def __init__(
        self,
        margin=0.1,
        hard_rank=10,
        hard_prob=0.5,
        **others,  # losses built on this one hand on all their keys
    ):
        super().__init__()
        self.test_normalize = True
        self.margin, self.hard_rank, self.hard_prob = margin, hard_rank, hard_prob

    def forward(self, x, label=None):
        if len(x) < 2:
            raise ValueError("triplet: a batch needs at least 2 speakers (batch_size)")
        with torch.autocast(x.device.type, enabled=False):
            x = F.normalize(x.float(), dim=2, eps=1e-6)
            anchor, positive = x[:, 0], x[:, 1]
            negative = positive[self.choose_negatives(anchor.detach(), positive.detach())]
            # Squared distances: the slope of a root at distance 0 (a duplicate pair) is infinite.
            near = (anchor - positive).square().sum(dim=1)
            far = (anchor - negative).square().sum(dim=1)
            return F.relu(near - far + self.margin).mean(), (near < far).float().mean() * 100.0

    def choose_negatives(self, anchor, positive):
        """Index (B,) of each anchor's negative."""
        rows = len(anchor)
        similarity = anchor @ positive.T
        similarity.fill_diagonal_(-torch.inf)
        order = similarity.argsort(dim=1, descending=True)[:, : rows - 1]  # own positive is last and cut off
        hard = torch.rand(rows, device=anchor.device) < self.hard_prob
        reach = torch.where(hard, min(self.hard_rank, rows - 1), rows - 1)
        pick = (torch.rand(rows, device=anchor.device) * reach).long()
        return order.gather(1, pick.unsqueeze(1)).squeeze(1)
