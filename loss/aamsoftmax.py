"""Additive angular margin softmax: cos(theta + margin) for the target (Deng et al. 2019, "ArcFace", eq. 3)."""

import torch

from loss.margin import MarginHead, add_angle


class LossFunction(MarginHead):
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
    class_weights = ("weight",)

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
        **others,  # losses built on this one hand on all their keys
    ):
        if sub_centers < 1 or top_k < 0 or top_k_penalty < 0:
            values = f"sub_centers {sub_centers}, top_k {top_k}, top_k_penalty {top_k_penalty}"
            raise ValueError(f"{values}: the first must be at least 1, the others at least 0")
        self.easy_margin, self.top_k, self.final_penalty = easy_margin, top_k, top_k_penalty
        super().__init__(nOut, nClasses, margin, scale, margin_warmup, sub_centers)

    def set_epoch(self, epoch: float):
        """Set margin and penalty for a moment of training; ``epoch`` counts from 1 and has a fraction inside one."""
        super().set_epoch(epoch)
        self.penalty = self.schedule.share(epoch) * self.final_penalty

    def logits(self, batch, cosine):
        """The logits (B, classes) of cosines."""
        target = batch.target(cosine)  # (B,)
        shifted = add_angle(target, self.margin)
        if self.easy_margin:
            shifted = torch.where(target > 0, shifted, target)
        logits = batch.with_target(cosine, shifted)
        if self.top_k:
            near, nearest = batch.nearest_others(cosine, self.top_k)  # (B, top_k)
            pushed = add_angle(cosine.gather(1, near), -self.penalty)
            if nearest is not None:
                pushed = torch.where(nearest, pushed, logits.gather(1, near))
            logits = logits.scatter(1, near, pushed)
        return self.scale * logits
