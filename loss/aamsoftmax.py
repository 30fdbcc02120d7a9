"""Additive angular margin softmax: cos(theta + margin) for the target (Deng et al. 2019, "ArcFace", eq. 3)."""

import torch
import torch.nn.functional as F
from torch import nn

from loss.margin import MarginSchedule, add_angle
from utils import accuracy, cosine_matrix


class LossFunction(nn.Module):
    """x (B, nOut), label (B,) -> (loss, accuracy in %). Computes in fp32.

    ``easy_margin`` applies the margin only where cos(theta) > 0. ``margin_warmup`` lets it rise (loss/margin.py).
    ``sub_centers``: each class has that many centres and its cosine is that of the nearest, so that a noisy or
    many-sided class need not gather round one (Deng et al. 2020, "Sub-center ArcFace", section 3.3); row
    class x sub_centers + centre of ``weight``.
    ``top_k``: the logits of the nearest ``top_k`` other classes are cos(theta - top_k_penalty), which pushes them away
    (Zhao et al. 2022, "Multi-query multi-head attention pooling and inter-topK penalty for speaker verification",
    section 3.2); the penalty rises with the margin, as in wespeaker.
    """

    per_speaker = (1, 1)
    margin_range = (0.0, 1.5)  # rad; from pi / 2 on no angle is small enough

    def __init__(
        self,
        nOut,
        nClasses,
        margin=0.3,
        scale=15.0,
        easy_margin=False,
        margin_warmup=(0, 0, "exponential"),
        sub_centers=1,
        top_k=0,
        top_k_penalty=0.06,
    ):
        super().__init__()
        if sub_centers < 1 or top_k < 0 or top_k_penalty < 0:
            values = f"sub_centers {sub_centers}, top_k {top_k}, top_k_penalty {top_k_penalty}"
            raise ValueError(f"{values}: the first must be at least 1, the others at least 0")
        self.test_normalize = True
        self.final_margin, self.schedule = margin, MarginSchedule(margin_warmup)
        self.scale, self.easy_margin, self.sub_centers = scale, easy_margin, sub_centers
        self.top_k, self.final_penalty = top_k, top_k_penalty
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(nClasses * sub_centers, nOut)))
        self.set_epoch(1.0)

    def set_epoch(self, epoch: float):
        """Set margin and penalty for a moment of training; ``epoch`` counts from 1 and has a fraction inside one."""
        share = self.schedule.share(epoch)
        self.margin, self.penalty = share * self.final_margin, share * self.final_penalty

    def forward(self, x, label):
        cosine = cosine_matrix(x, self.weight)  # (B, nClasses sub_centers)
        with torch.autocast(x.device.type, enabled=False):
            if self.sub_centers > 1:
                cosine = cosine.unflatten(1, (-1, self.sub_centers)).amax(dim=2)
            rows = torch.arange(len(label), device=label.device)
            target = cosine[rows, label]  # (B,)
            shifted = add_angle(target, self.margin)
            if self.easy_margin:
                shifted = torch.where(target > 0, shifted, target)
            logits = cosine.index_put((rows, label), shifted)
            if self.top_k:
                others = cosine.detach().index_put((rows, label), cosine.new_full((), -2.0))
                nearest = others.topk(min(self.top_k, cosine.shape[1] - 1), dim=1).indices  # (B, top_k)
                logits = logits.scatter(1, nearest, add_angle(cosine.gather(1, nearest), -self.penalty))
            logits = self.scale * logits
            return F.cross_entropy(logits, label), accuracy(logits.detach(), label)[0]
