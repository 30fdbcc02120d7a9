"""Multi-head factorized attentive pooling of the states of a self-supervised network (Peng et al. 2022)."""

import torch
from torch import nn

from models.frontend import FrontEnd
from models.pooling import softmax_over_time


class MHFA(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut).

    Two learned weightings of the states give keys and values (section 3.1 of the paper). Each head has a weight for
    every frame, which depends on the keys, and the mean of the values by these weights.
    """

    def __init__(self, nOut, width, states, heads, compression, frontend):
        super().__init__()
        self.frontend, self.states = frontend, states
        if states > 1:
            self.weights_k = nn.Parameter(torch.ones(states))
            self.weights_v = nn.Parameter(torch.ones(states))
        self.cmp_linear_k = nn.Linear(width, compression)
        self.cmp_linear_v = nn.Linear(width, compression)
        self.att_head = nn.Linear(compression, heads, bias=False)  # which a softmax over the frames would take away
        self.pooling_fc = nn.Linear(heads * compression, nOut)

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again: those of the front end alone."""
        return []

    def forward(self, x):
        keys = values = self.frontend(x).transpose(1, 2)  # (B, frames, states x width)
        if self.states > 1:
            each = keys.unflatten(2, (self.states, -1))
            keys = torch.einsum("btsw,s->btw", each, self.weights_k.softmax(dim=0))
            values = torch.einsum("btsw,s->btw", each, self.weights_v.softmax(dim=0))
        logits = self.att_head(self.cmp_linear_k(keys)).transpose(1, 2)  # (B, heads, frames)
        pooled = softmax_over_time(logits) @ self.cmp_linear_v(values).float()  # (B, heads, compression)
        return self.pooling_fc(pooled.flatten(1))


def MainModel(
    nOut=256,
    n_mels=80,
    heads=32,
    compression=128,
    features="wespeaker",
    input_norm="none",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model; it is made for ``frontend: ssl`` with ``ssl_output: all``.

    Other features are one state. ``compression`` is the width of keys and values.
    """
    states = getattr(frontend, "states", 1)
    frontend = FrontEnd(
        features, n_mels, input_norm, spec_augment=tuple(spec_augment), sample_rate=sample_rate, plugin=frontend
    )
    return MHFA(nOut, n_mels // states, states, heads, compression, frontend)
