"""ERes2Net (Chen et al. 2023) and ERes2NetV2 (Chen et al. 2024) in 3D-Speaker's layout: Res2Net blocks and attention.

Attentional feature fusion joins the channel groups inside the blocks of the last two stages, and the outputs of the
stages: of all four in ERes2Net, of the last two in ERes2NetV2.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from models.frontend import FrontEnd
from models.ResNet import ResNet, block_counts, projection


@dataclass(frozen=True)
class Size:
    """A published size: width of the first stage, of a channel group (in 64ths), groups of a block, its expansion."""

    m_channels: int
    base_width: int
    scale: int
    expansion: int
    last_stages_only: bool = False  # ERes2NetV2


SIZES = {
    "base": Size(32, 32, 2, 2),
    "large": Size(64, 32, 2, 2),
    "huge": Size(64, 24, 3, 4),
    "V2": Size(64, 26, 2, 2, True),
    "V2_w24s4ep4": Size(64, 24, 4, 4, True),
}
BLOCKS = (3, 4, 6, 3)


class AttentionalFusion(nn.Module):
    """Mix x and y (B, C, F, T) by weights 1 + a and 1 - a, where a in (-1, 1) is of both (Dai et al. 2021)."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.local_att = nn.Sequential(
            nn.Conv2d(channels * 2, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.SiLU(),
            nn.Conv2d(hidden, channels, 1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x, y):
        attention = torch.tanh(self.local_att(torch.cat([x, y], dim=1)))
        return x * (1.0 + attention) + y * (1.0 - attention)


def clipped_relu(x):
    """ReLU that saturates at 20."""
    return F.hardtanh(x, 0.0, 20.0)


class Res2Block(nn.Module):
    """1x1 convolution (with the stride), 3x3 ones over channel groups in turn, 1x1, shortcut; BN after each.

    A group takes in the output of the one before it: by a sum, or by attentional fusion if ``fuse``.
    """

    def __init__(self, inplanes, planes, stride, size: Size, fuse: bool):
        super().__init__()
        self.expansion = size.expansion
        width, groups = planes * size.base_width // 64, size.scale
        self.conv1 = nn.Conv2d(inplanes, width * groups, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width * groups)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(groups))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(groups))
        self.fuse_models = nn.ModuleList(AttentionalFusion(width) for _ in range(groups - 1)) if fuse else None
        self.conv3 = nn.Conv2d(width * groups, planes * size.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * size.expansion)
        self.shortcut = projection(inplanes, planes * size.expansion, stride)

    def forward(self, x):
        groups = clipped_relu(self.bn1(self.conv1(x))).chunk(len(self.convs), dim=1)
        outputs = []
        for i, (group, conv, bn) in enumerate(zip(groups, self.convs, self.bns)):
            if outputs and self.fuse_models is None:
                group = outputs[-1] + group
            elif outputs:
                group = self.fuse_models[i - 1](outputs[-1], group)
            outputs.append(clipped_relu(bn(conv(group))))
        out = self.bn3(self.conv3(torch.cat(outputs, dim=1)))
        return clipped_relu(out + self.shortcut(x))


def halve(channels: int):
    """3x3 convolution of stride 2 to twice the channels."""
    return nn.Conv2d(channels, channels * 2, 3, stride=2, padding=1, bias=False)


class ERes2Net(ResNet):
    """Waveform (B, T) -> embedding (B, nOut), the outputs of all stages fused from the bottom up."""

    def __init__(self, nOut, size: Size, blocks, m_channels, n_mels, pooling, two_emb_layer, frontend):
        kinds = [partial(Res2Block, size=size, fuse=fuse) for fuse in (False, False, True, True)]
        super().__init__(nOut, kinds, blocks, m_channels, n_mels, pooling, two_emb_layer, frontend)
        self.add_fusion(m_channels * size.expansion)

    def add_fusion(self, width: int):
        """Make the layers that fuse stages; ``width`` is the number of channels out of the first stage."""
        self.layer1_downsample = halve(width)
        self.layer2_downsample = halve(width * 2)
        self.layer3_downsample = halve(width * 4)
        self.fuse_mode12 = AttentionalFusion(width * 2)
        self.fuse_mode123 = AttentionalFusion(width * 4)
        self.fuse_mode1234 = AttentionalFusion(width * 8)

    def stages(self, x):
        out1 = self.layer1(x)
        out2 = self.layer2(out1)
        out3 = self.layer3(out2)
        out4 = self.layer4(out3)
        fused = self.fuse_mode12(out2, self.layer1_downsample(out1))
        fused = self.fuse_mode123(out3, self.layer2_downsample(fused))
        return self.fuse_mode1234(out4, self.layer3_downsample(fused))


class ERes2NetV2(ERes2Net):
    """Waveform (B, T) -> embedding (B, nOut), the outputs of the last two stages fused."""

    def add_fusion(self, width: int):
        self.layer3_ds = halve(width * 4)
        self.fuse34 = AttentionalFusion(width * 8)

    def stages(self, x):
        out3 = self.layer3(self.layer2(self.layer1(x)))
        return self.fuse34(self.layer4(out3), self.layer3_ds(out3))


def MainModel(
    nOut=192,
    n_mels=80,
    size="base",
    m_channels=0,
    blocks=(0, 0, 0, 0),
    pooling="TSTP",
    two_emb_layer=False,
    features="3dspeaker",
    input_norm="mean",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build ERes2Net of ``size`` base, large or huge, or ERes2NetV2 of size V2 or V2_w24s4ep4.

    ``m_channels`` is the width of the first stage and ``blocks`` counts the blocks of each if they are not those of
    the size. ``pooling`` is one of models/pooling.py. ``two_emb_layer`` adds ReLU, BN and a second embedding layer.
    """
    if size not in SIZES:
        raise ValueError(f"size: must be one of {', '.join(SIZES)}; got '{size}'")
    chosen = SIZES[size]
    m_channels = m_channels or chosen.m_channels
    least = -(-64 // chosen.base_width)  # one channel a group
    if m_channels < least:
        raise ValueError(f"m_channels: ERes2Net of size {size} needs at least {least}, got {m_channels}")
    blocks = block_counts(blocks, BLOCKS)
    frontend = FrontEnd(
        features, n_mels, input_norm, spec_augment=tuple(spec_augment), sample_rate=sample_rate, plugin=frontend
    )
    network = ERes2NetV2 if chosen.last_stages_only else ERes2Net
    return network(nOut, chosen, blocks, m_channels, n_mels, pooling, two_emb_layer, frontend)
