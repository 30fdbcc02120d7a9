"""Softmax plus angular prototypical loss (Heo et al. 2020, "Clova baseline system", section 2.2)."""

from torch import nn

from loss import angleproto, softmax


class LossFunction(nn.Module):
    """x (B, M, nOut) with M utterances of B different speakers, label (B,) -> (sum of both losses, accuracy in %)."""

    per_speaker = (2, None)
    class_weights = ("softmax.fc.weight", "softmax.fc.bias")

    def __init__(
        self,
        nOut,
        nClasses,
        init_w=10.0,
        init_b=-5.0,
        **others,  # losses built on this one hand on all their keys
    ):
        super().__init__()
        self.test_normalize = True
        self.softmax = softmax.LossFunction(nOut, nClasses)
        self.angleproto = angleproto.LossFunction(init_w, init_b)

    def forward(self, x, label):
        speakers, utterances, size = x.shape
        classified, accuracy = self.softmax(x.reshape(speakers * utterances, size), label.repeat_interleave(utterances))
        compared, _ = self.angleproto(x)
        return classified + compared, accuracy

    def class_logits(self, x):
        """The softmax's logits (B, classes) of embeddings x (B, nOut)."""
        return self.softmax.class_logits(x)
