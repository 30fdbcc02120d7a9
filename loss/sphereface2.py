"""SphereFace2: a binary classifier for each class in the place of a softmax over them (Wen et al. 2022).

For speaker verification Han et al. 2023, "Exploring binary classification loss for speaker verification".
"""

import torch
import torch.nn.functional as F
from torch import nn

from loss.classes import FAR
from loss.margin import MarginHead, add_angle


class LossFunction(MarginHead):
    """x (B, nOut), label (B,) -> (loss, accuracy in %). Computes in fp32.

    With s = ``scale`` and the learnt ``bias`` b, g(z) = 2 ((z + 1) / 2)^t - 1 (t: ``similarity_power``) and lambda =
    ``positive_weight``, the loss of a row is lambda log(1 + exp(-(s p + b))) + (1 - lambda) sum over the other classes
    of log(1 + exp(s n + b)). ``margin_type`` C: p = g(cos(theta)) - margin, n = g(cos(theta)) + margin; A: p =
    g(cos(theta + margin)), n = g(cos(theta - margin)), as in wespeaker. Its margins: C 0.2, A 0.15; large-margin stage
    C 0.3, A 0.25. softplus is log(1 + exp(.)) without its overflow. Where a share of the classes is drawn, the sum
    is divided by it.
    """

    per_speaker = (1, 1)
    margin_range = (0.0, 1.0)
    class_weights = ("weight",)
    class_logits = None  # a teacher's classes are followed by their softmax, and here each is a question of its own

    def __init__(
        self,
        nOut,
        nClasses,
        margin=0.2,
        scale=32.0,
        margin_warmup=(0, 0, "exponential"),
        margin_type="C",
        positive_weight=0.7,
        similarity_power=3.0,
        **others,  # losses built on this one hand on all their keys
    ):
        if margin_type not in ("A", "C"):
            raise ValueError(f"margin_type: must be A or C, got '{margin_type}'")
        if not 0 < positive_weight < 1 or similarity_power < 1:
            values = f"positive_weight {positive_weight}, similarity_power {similarity_power}"
            raise ValueError(f"{values}: the first must be between 0 and 1, the second at least 1")
        super().__init__(nOut, nClasses, margin, scale, margin_warmup)
        self.margin_type, self.positive_weight, self.similarity_power = margin_type, positive_weight, similarity_power
        self.bias = nn.Parameter(torch.zeros(1))

    def similarity(self, cosine):
        """g: spreads the cosines that matter, the large ones. With an angle added the cosine may lie below -1."""
        return 2.0 * ((cosine + 1.0) / 2.0).clamp(min=0.0).pow(self.similarity_power) - 1.0

    def loss(self, batch):
        """(loss, accuracy in %) of a batch."""
        cosine = self.cosines(batch)  # (B, classes)
        target = batch.target(cosine)  # (B,)
        if self.margin_type == "A":
            positive, negative = (
                self.similarity(add_angle(c, m)) for c, m in ((target, self.margin), (cosine, -self.margin))
            )
        else:
            positive, negative = self.similarity(target) - self.margin, self.similarity(cosine) + self.margin
        bias = self.bias.float()
        own = F.softplus(-(self.scale * positive + bias))  # (B,)
        others = F.softplus(self.scale * negative + bias)  # (B, classes), of which the target's column is left out
        others = batch.with_target(batch.hide(others, 0.0), 0.0).sum(dim=1) / batch.rate
        rows = self.positive_weight * batch.where_own(own) + (1.0 - self.positive_weight) * others
        guess = batch.with_target(cosine.detach(), target.detach() - self.margin)
        return batch.mean(batch.sum(rows)), batch.accuracy(batch.hide(guess, FAR))
