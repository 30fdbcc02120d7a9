"""The x-vector TDNN (Snyder et al. 2018) in wespeaker's layout: ReLU, then BN without scale and shift, as Kaldi's."""

import torch.nn.functional as F
from torch import nn

from models.frontend import FrontEnd, repeat_to
from models.pooling import make_pooling

CONTEXT = 15  # frames that the unpadded convolutions see together: 1 + 4 + 4 + 6


class TDNNLayer(nn.Module):
    """Unpadded dilated convolution over time, ReLU, BN: (B, C, T) -> (B, C', T - dilation * (kernel_size - 1))."""

    def __init__(self, inputs, outputs, kernel_size, dilation):
        super().__init__()
        self.conv_1d = nn.Conv1d(inputs, outputs, kernel_size, dilation=dilation)
        self.bn = nn.BatchNorm1d(outputs, affine=False)

    def forward(self, x):
        return self.bn(F.relu(self.conv_1d(x)))


class XVector(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    def __init__(self, nOut, n_mels, channels, stats_channels, pooling, embedding_layer, frontend):
        super().__init__()
        self.frontend, self.embedding_layer = frontend, embedding_layer
        self.frame_1 = TDNNLayer(n_mels, channels, 5, 1)
        self.frame_2 = TDNNLayer(channels, channels, 3, 2)
        self.frame_3 = TDNNLayer(channels, channels, 3, 3)
        self.frame_4 = TDNNLayer(channels, channels, 1, 1)
        self.frame_5 = TDNNLayer(channels, stats_channels, 1, 1)
        self.pool = make_pooling(pooling, stats_channels)
        self.seg_1 = nn.Linear(self.pool.output_channels, nOut)
        self.seg_bn_1 = nn.BatchNorm1d(nOut, affine=False)
        self.seg_2 = nn.Linear(nOut, nOut)

    def forward(self, x):
        x = repeat_to(self.frontend(x), CONTEXT)
        x = self.frame_5(self.frame_4(self.frame_3(self.frame_2(self.frame_1(x)))))
        first = self.seg_1(self.pool(x))
        if self.embedding_layer == 1 and not self.training:
            return first
        return self.seg_2(self.seg_bn_1(F.relu(first)))


def MainModel(
    nOut=512,
    n_mels=80,
    channels=512,
    stats_channels=1500,
    pooling="TSTP",
    embedding_layer=2,
    features="wespeaker",
    input_norm="mean",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model; ``stats_channels`` is the width that is pooled, ``pooling`` one of models/pooling.py.

    Training is always on the last layer; ``embedding_layer`` 1 gives the one before it in evaluation, which suits PLDA,
    2 the last, which suits cosine scores.
    """
    if embedding_layer not in (1, 2):
        raise ValueError(f"embedding_layer: must be 1 or 2, got {embedding_layer}")
    frontend = FrontEnd(
        features, n_mels, input_norm, spec_augment=tuple(spec_augment), sample_rate=sample_rate, plugin=frontend
    )
    return XVector(nOut, n_mels, channels, stats_channels, pooling, embedding_layer, frontend)
