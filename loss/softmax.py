"""Softmax cross-entropy over a linear classifier."""

import torch.nn.functional as F
from torch import nn

from loss.classes import ClassHead


class LossFunction(ClassHead):
    """x (B, nOut), label (B,) -> (loss, accuracy in %)."""

    per_speaker = (1, 1)
    class_weights = ("fc.weight", "fc.bias")

    def __init__(self, nOut, nClasses, **others):  # losses built on this one hand on all their keys
        super().__init__(nClasses)
        self.fc = nn.Linear(nOut, nClasses)

    def loss(self, batch):
        """(loss, accuracy in %) of a batch."""
        return batch.cross_entropy(F.linear(batch.x.float(), batch.weight(self.fc.weight), batch.weight(self.fc.bias)))

    def class_logits(self, x):
        """The logits (B, classes) of embeddings x (B, nOut)."""
        return F.linear(x.float(), self.fc.weight, self.fc.bias)
