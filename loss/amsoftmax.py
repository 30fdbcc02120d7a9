"""Additive margin softmax: cos(theta) - margin for the target (Wang et al. 2018, "Additive margin softmax", eq. 6)."""

from loss.margin import MarginHead


class LossFunction(MarginHead):
    """x (B, nOut), label (B,) -> (loss, accuracy in %). Computes in fp32. ``margin_warmup`` lets the margin rise."""

    per_speaker = (1, 1)
    margin_range = (0.0, 1.0)  # of a cosine
    class_weights = ("weight",)

    def __init__(
        self,
        nOut,
        nClasses,
        margin=0.3,
        scale=15.0,
        margin_warmup=(0, 0, "exponential"),
        **others,  # losses built on this one hand on all their keys
    ):
        super().__init__(nOut, nClasses, margin, scale, margin_warmup)

    def logits(self, batch, cosine):
        """The logits (B, classes) of cosines."""
        return self.scale * batch.with_target(cosine, batch.target(cosine) - self.margin)
