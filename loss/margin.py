"""What losses with a margin share: their head, how the margin rises in training, and the cosine of a larger angle."""

import math

import torch
from torch import nn

from loss.classes import ClassHead
from utils import cosine_matrix

# The sine is a root of 1 - cos^2: at |cos| = 1 its slope is infinite. Clamped before the root, gradients stay finite.
MAX_COSINE = 1.0 - 1e-6
SHAPES = ("exponential", "linear")
REST = 1e-3  # share of the margin that the exponential rise has left at its end


class MarginSchedule:
    """Share of the final margin at a moment of training: 0 up to epoch ``start``, 1 from epoch ``end`` on.

    ``warmup`` is (start, end, shape), the key ``margin_warmup``. Between the two the share is 1 - 0.001^p
    (exponential) or p (linear), p being the part of the way that is done: wespeaker's MarginScheduler
    (wespeaker/utils/schedulers.py, increase_type exp and linear). An ``end`` not after ``start`` is no warm-up.
    """

    def __init__(self, warmup):
        start, end, shape = warmup
        if shape not in SHAPES:
            raise ValueError(f"margin_warmup: the shape must be one of {', '.join(SHAPES)}, got '{shape}'")
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) or not 0 <= v < math.inf for v in (start, end)):
            raise ValueError(f"margin_warmup: expected [first epoch, last epoch, shape], got {list(warmup)}")
        self.start, self.end, self.shape = start, end, shape

    def share(self, epoch: float) -> float:
        """The share at ``epoch``, which counts from 1 and has a fraction inside an epoch."""
        if self.end <= self.start or epoch >= self.end:
            return 1.0
        done = max(epoch - self.start, 0.0) / (self.end - self.start)
        return done if self.shape == "linear" else 1.0 - REST**done


class MarginHead(ClassHead):
    """Base of a loss on the cosines of rows (B, nOut) and class centres, with a ``margin`` that may rise in training.

    A loss says the ``logits`` of a softmax: its margin. ``centers``: of each class, row class x centers + centre of
    ``weight``.
    """

    def __init__(self, nOut, nClasses, margin, scale, margin_warmup, centers: int = 1):
        super().__init__(nClasses)
        self.final_margin, self.schedule = margin, MarginSchedule(margin_warmup)
        self.scale, self.centers = scale, centers
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(nClasses * centers, nOut)))
        self.set_epoch(1.0)

    def set_epoch(self, epoch: float):
        """Set the margin for a moment of training; ``epoch`` counts from 1 and has a fraction inside an epoch."""
        self.margin = self.schedule.share(epoch) * self.final_margin

    def cosines(self, batch):
        """The cosine of each row with each class (B, classes), of several centres with the nearest."""
        return self.of_classes(cosine_matrix(batch.x, batch.weight(self.weight, self.centers)))

    def of_classes(self, cosine):
        """The cosine with each class (B, classes) of that with each centre: of several the nearest's."""
        return cosine.unflatten(1, (-1, self.centers)).amax(dim=2) if self.centers > 1 else cosine

    def class_logits(self, x):
        """The logits (B, classes) of embeddings x (B, nOut) without a margin, as a model that is used has them."""
        return self.scale * self.of_classes(cosine_matrix(x, self.weight))

    def loss(self, batch):
        """(loss, accuracy in %) of a batch."""
        return batch.cross_entropy(self.logits(batch, self.cosines(batch)))

    def logits(self, batch, cosine):
        """The logits (B, classes) of cosines."""
        raise NotImplementedError


def add_angle(cosine, angle: float):
    """cos(theta + angle) of cosine = cos(theta), any shape, fp32, with finite gradients up to |cosine| = 1.

    Where theta + angle leaves [0, pi] and the cosine would turn round, it goes on as cosine - (1 - cos(angle)), or
    plus that for a negative angle: continuous, and rising with ``cosine`` everywhere (for a positive angle that is
    wespeaker's form; voxceleb_trainer's cosine - angle sin(pi - angle) jumps there).
    """
    sign = math.copysign(1.0, angle)
    bounded = cosine.clamp(-MAX_COSINE, MAX_COSINE)
    sine = (1.0 - bounded.square()).sqrt()
    inside = bounded * math.cos(angle) - sine * math.sin(angle)
    return torch.where(sign * cosine > -math.cos(angle), inside, cosine - sign * (1.0 - math.cos(angle)))
