"""SphereFace2: a binary classifier for each class in the place of a softmax over them (Wen et al. 2022).

For speaker verification Han et al. 2023, "Exploring binary classification loss for speaker verification".
"""

import torch
import torch.nn.functional as F
from torch import nn

from loss.margin import MarginSchedule, add_angle
from utils import accuracy, cosine_matrix


class LossFunction(nn.Module):
    """x (B, nOut), label (B,) -> (loss, accuracy in %). Computes in fp32.

    With s = ``scale`` and the learnt ``bias`` b, g(z) = 2 ((z + 1) / 2)^t - 1 (t: ``similarity_power``) and lambda =
    ``positive_weight``, the loss of a row is lambda log(1 + exp(-(s p + b))) + (1 - lambda) sum over the other classes
    of log(1 + exp(s n + b)). ``margin_type`` C: p = g(cos(theta)) - margin, n = g(cos(theta)) + margin; A: p =
    g(cos(theta + margin)), n = g(cos(theta - margin)), as in wespeaker. Its margins: C 0.2, A 0.15; large-margin stage
    C 0.3, A 0.25. softplus is log(1 + exp(.)) without its overflow.
    """

    per_speaker = (1, 1)
    margin_range = (0.0, 1.0)

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
    ):
        super().__init__()
        if margin_type not in ("A", "C"):
            raise ValueError(f"margin_type: must be A or C, got '{margin_type}'")
        if not 0 < positive_weight < 1 or similarity_power < 1:
            values = f"positive_weight {positive_weight}, similarity_power {similarity_power}"
            raise ValueError(f"{values}: the first must be between 0 and 1, the second at least 1")
        self.test_normalize = True
        self.final_margin, self.schedule = margin, MarginSchedule(margin_warmup)
        self.scale, self.margin_type = scale, margin_type
        self.positive_weight, self.similarity_power = positive_weight, similarity_power
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(nClasses, nOut)))
        self.bias = nn.Parameter(torch.zeros(1))
        self.set_epoch(1.0)

    def set_epoch(self, epoch: float):
        """Set the margin for a moment of training; ``epoch`` counts from 1 and has a fraction inside an epoch."""
        self.margin = self.schedule.share(epoch) * self.final_margin

    def similarity(self, cosine):
        """g: spreads the cosines that matter, the large ones. With an angle added the cosine may lie below -1."""
        return 2.0 * ((cosine + 1.0) / 2.0).clamp(min=0.0).pow(self.similarity_power) - 1.0

    def forward(self, x, label):
        cosine = cosine_matrix(x, self.weight)  # (B, nClasses)
        with torch.autocast(x.device.type, enabled=False):
            rows = torch.arange(len(label), device=label.device)
            target = cosine[rows, label]  # (B,)
            if self.margin_type == "A":
                positive, negative = (
                    self.similarity(add_angle(c, m)) for c, m in ((target, self.margin), (cosine, -self.margin))
                )
            else:
                positive, negative = self.similarity(target) - self.margin, self.similarity(cosine) + self.margin
            bias = self.bias.float()
            own = F.softplus(-(self.scale * positive + bias))  # (B,)
            others = F.softplus(self.scale * negative + bias)  # (B, nClasses), of which the target's column is left out
            others = others.index_put((rows, label), others.new_zeros(())).sum(dim=1)
            loss = (self.positive_weight * own + (1.0 - self.positive_weight) * others).mean()
            guess = cosine.detach().index_put((rows, label), target.detach() - self.margin)
            return loss, accuracy(guess, label)[0]
