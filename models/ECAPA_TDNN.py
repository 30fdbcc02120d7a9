"""ECAPA-TDNN (Desplanques et al. 2020) in the layouts of the toolkits that publish weights of it.

wespeaker    blocks chained plainly, convolutions padded with zeros
speechbrain  blocks chained plainly, convolutions padded by reflection, BN in aggregation and attention (3D-Speaker too)
taoruijie    each block takes the sum of all before it, BN in the attention and after the embedding (the paper's sums)
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from models.frontend import FrontEnd
from models.pooling import AttentiveStatistics


class ConvReluBN(nn.Module):
    """1-D convolution, ReLU, BN: (B, C, T) -> (B, C', T)."""

    def __init__(self, inputs, outputs, kernel_size=1, dilation=1, padding_mode="zeros"):
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2
        self.conv = nn.Conv1d(
            inputs, outputs, kernel_size, padding=padding, dilation=dilation, padding_mode=padding_mode
        )
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x):
        return self.bn(F.relu(self.conv(x)))


class Res2Conv(nn.Module):
    """Res2Net convolution (Gao et al. 2019): of ``scale`` channel groups, each adds the one before; the last passes."""

    def __init__(self, channels, kernel_size, dilation, scale, padding_mode):
        super().__init__()
        self.width = channels // scale
        self.parts = nn.ModuleList(
            ConvReluBN(self.width, self.width, kernel_size, dilation, padding_mode) for _ in range(scale - 1)
        )

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

    def __init__(self, channels, kernel_size, dilation, padding_mode, scale=8):
        super().__init__()
        self.layers = nn.Sequential(
            ConvReluBN(channels, channels),
            Res2Conv(channels, kernel_size, dilation, scale, padding_mode),
            ConvReluBN(channels, channels),
            SqueezeExcitation(channels),
        )

    def forward(self, x):
        return x + self.layers(x)


@dataclass(frozen=True)
class Layout:
    """What one toolkit's ECAPA-TDNN does its own way."""

    padding_mode: str = "zeros"
    sums: bool = False  # a block takes the sum of all earlier outputs, not the last one
    aggregate_norm: bool = False
    output_norm: bool = False
    attention: dict = field(default_factory=dict)  # arguments of AttentiveStatistics


LAYOUTS = {
    "wespeaker": Layout(),
    "speechbrain": Layout(
        padding_mode="reflect", aggregate_norm=True, attention={"norm": True, "unbiased": False, "min_variance": 1e-12}
    ),
    "taoruijie": Layout(sums=True, output_norm=True, attention={"norm": True, "bottleneck": 256, "min_variance": 1e-4}),
}


class ECAPA_TDNN(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    def __init__(self, nOut, channels, aggregate, n_mels, global_context, layout, frontend):
        super().__init__()
        self.frontend, self.sums = frontend, layout.sums
        mode = layout.padding_mode
        self.layer1 = ConvReluBN(n_mels, channels, kernel_size=5, padding_mode=mode)
        self.layer2 = SERes2Block(channels, 3, 2, mode)
        self.layer3 = SERes2Block(channels, 3, 3, mode)
        self.layer4 = SERes2Block(channels, 3, 4, mode)
        self.conv = nn.Conv1d(channels * 3, aggregate, 1)
        self.bn_aggregate = nn.BatchNorm1d(aggregate) if layout.aggregate_norm else nn.Identity()
        self.pool = AttentiveStatistics(aggregate, global_context=global_context, **layout.attention)
        self.bn = nn.BatchNorm1d(aggregate * 2)
        self.linear = nn.Linear(aggregate * 2, nOut)
        self.bn_output = nn.BatchNorm1d(nOut) if layout.output_norm else nn.Identity()

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def forward(self, x):
        x = self.layer1(self.frontend(x))  # (B, channels, frames)
        out2 = self.layer2(x)
        out3 = self.layer3(x + out2 if self.sums else out2)
        out4 = self.layer4(x + out2 + out3 if self.sums else out3)
        x = self.bn_aggregate(F.relu(self.conv(torch.cat([out2, out3, out4], dim=1))))
        return self.bn_output(self.linear(self.bn(self.pool(x))))


def MainModel(
    nOut=192,
    channels=512,
    aggregate=1536,
    n_mels=80,
    global_context=True,
    layout="wespeaker",
    features="wespeaker",
    input_norm="mean",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model; ``channels`` is 512 or 1024 in the published results and must be a multiple of 8.

    ``aggregate`` is the width that the concatenated blocks are projected to before pooling, 3072 in the large models of
    SpeechBrain and 3D-Speaker. ``layout``: wespeaker, speechbrain or taoruijie.
    """
    if channels % 8:
        raise ValueError(f"channels: ECAPA_TDNN needs a multiple of 8, got {channels}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: must be one of {', '.join(LAYOUTS)}; got '{layout}'")
    frontend = FrontEnd(
        features, n_mels, input_norm, spec_augment=tuple(spec_augment), sample_rate=sample_rate, plugin=frontend
    )
    return ECAPA_TDNN(nOut, channels, aggregate, n_mels, global_context, LAYOUTS[layout], frontend)
