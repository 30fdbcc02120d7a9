"""ECAPA-TDNN (Desplanques et al. 2020) in wespeaker's layout: SE-Res2 blocks chained plainly, then 1536 channels."""

import torch
import torch.nn.functional as F
from torch import nn

from models.frontend import FrontEnd
from models.pooling import AttentiveStatistics


class ConvReluBN(nn.Module):
    """1-D convolution, ReLU, BN: (B, C, T) -> (B, C', T)."""

    def __init__(self, inputs, outputs, kernel_size=1, dilation=1):
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv1d(inputs, outputs, kernel_size, padding=padding, dilation=dilation)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x):
        return self.bn(F.relu(self.conv(x)))


class Res2Conv(nn.Module):
    """Res2Net convolution (Gao et al. 2019): of ``scale`` channel groups, each adds the one before; the last passes."""

    def __init__(self, channels, kernel_size, dilation, scale):
        super().__init__()
        self.width = channels // scale
        self.parts = nn.ModuleList(ConvReluBN(self.width, self.width, kernel_size, dilation) for _ in range(scale - 1))

    def forward(self, x):
        groups = x.split(self.width, dim=1)
        outputs, previous = [], 0
        for group, part in zip(groups, self.parts):
            previous = part(group + previous)
            outputs.append(previous)
        return torch.cat([*outputs, groups[-1]], dim=1)


class SqueezeExcitation(nn.Module):
    """Rescale each channel of (B, C, T) by a gate of its mean over time."""

    def __init__(self, channels, bottleneck=128):
        super().__init__()
        self.linear1 = nn.Linear(channels, bottleneck)
        self.linear2 = nn.Linear(bottleneck, channels)

    def forward(self, x):
        gate = torch.sigmoid(self.linear2(F.relu(self.linear1(x.mean(dim=2)))))
        return x * gate.unsqueeze(2).to(x.dtype)


class SERes2Block(nn.Module):
    """1x1, Res2 convolution, 1x1, SE, residual sum."""

    def __init__(self, channels, kernel_size, dilation, scale=8):
        super().__init__()
        self.layers = nn.Sequential(
            ConvReluBN(channels, channels),
            Res2Conv(channels, kernel_size, dilation, scale),
            ConvReluBN(channels, channels),
            SqueezeExcitation(channels),
        )

    def forward(self, x):
        return x + self.layers(x)


class ECAPA_TDNN(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    def __init__(self, nOut, channels, aggregate, n_mels, global_context, frontend):
        super().__init__()
        self.frontend = frontend
        self.layer1 = ConvReluBN(n_mels, channels, kernel_size=5)
        self.layer2 = SERes2Block(channels, 3, 2)
        self.layer3 = SERes2Block(channels, 3, 3)
        self.layer4 = SERes2Block(channels, 3, 4)
        self.conv = nn.Conv1d(channels * 3, aggregate, 1)
        self.pool = AttentiveStatistics(aggregate, global_context=global_context)
        self.bn = nn.BatchNorm1d(aggregate * 2)
        self.linear = nn.Linear(aggregate * 2, nOut)

    def forward(self, x):
        x = self.layer1(self.frontend(x))  # (B, channels, frames)
        out2 = self.layer2(x)
        out3 = self.layer3(out2)
        out4 = self.layer4(out3)
        x = F.relu(self.conv(torch.cat([out2, out3, out4], dim=1)))
        return self.linear(self.bn(self.pool(x)))


def MainModel(
    nOut=192,
    channels=512,
    aggregate=1536,
    n_mels=80,
    global_context=True,
    features="wespeaker",
    input_norm="mean",
    spec_augment=(0, 0),
):
    """Build the model; ``channels`` is 512 or 1024 in the published results and must be a multiple of 8.

    ``aggregate`` is the width that the concatenated blocks are projected to before pooling.
    """
    if channels % 8:
        raise ValueError(f"channels: ECAPA_TDNN needs a multiple of 8, got {channels}")
    frontend = FrontEnd(features, n_mels, input_norm, spec_augment=tuple(spec_augment))
    return ECAPA_TDNN(nOut, channels, aggregate, n_mels, global_context, frontend)
