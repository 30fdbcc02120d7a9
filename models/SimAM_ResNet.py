"""wespeaker's SimAM-ResNets: parameter-free attention (Yang et al. 2021) in each block, attentive statistics."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from models.frontend import FrontEnd
from models.pooling import ChannelAttention
from models.ResNet import block_counts
from models.ResNetBlocks import make_stage

DEPTHS = {34: (3, 4, 6, 3), 100: (6, 16, 24, 3)}


def simam(x, stabilizer=1e-4):
    """Scale each value of (B, C, F, T) by the sigmoid of its inverse energy (Yang et al. 2021, equation 5).

    In fp32: a squared distance overflows fp16 from 256. A constant map is scaled by sigmoid(1/2).
    """
    with torch.autocast(x.device.type, enabled=False):
        distance = x.float()
        distance = (distance - distance.mean(dim=(2, 3), keepdim=True)).square()
        count = max(x.shape[2] * x.shape[3] - 1, 1)
        variance = distance.sum(dim=(2, 3), keepdim=True) / count
        gate = torch.sigmoid(distance / (4.0 * (variance + stabilizer)) + 0.5)
    return x * gate.to(x.dtype)


class SimAMBlock(nn.Module):
    """Two 3x3 convolutions with BN, SimAM, shortcut, ReLU."""

    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(simam(self.bn2(self.conv2(out))) + shortcut)


class SimAM_ResNet(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    def __init__(self, nOut, blocks, m_channels, n_mels, frontend):
        super().__init__()
        self.frontend = frontend
        front = OrderedDict(conv1=nn.Conv2d(1, m_channels, 3, padding=1, bias=False))
        front |= {"bn1": nn.BatchNorm2d(m_channels), "relu": nn.ReLU()}
        inplanes = m_channels
        for i, (count, stride) in enumerate(zip(blocks, (1, 2, 2, 2))):
            front[f"layer{i + 1}"] = make_stage(SimAMBlock, inplanes, m_channels * 2**i, count, stride)
            inplanes = m_channels * 2**i
        self.front = nn.Sequential(front)
        channels = inplanes * -(-n_mels // 8)  # mel filters left after three strides of 2
        self.pooling = ChannelAttention(channels, statistics=True)
        self.bottleneck = nn.Linear(channels * 2, nOut)

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again."""
        return [part for part in self.front.modules() if isinstance(part, SimAMBlock)]

    def forward(self, x):
        x = self.front(self.frontend(x).unsqueeze(1))  # (B, C, mels / 8, frames / 8)
        return self.bottleneck(self.pooling(x))


def MainModel(
    nOut=256,
    n_mels=80,
    depth=34,
    m_channels=64,
    blocks=(0, 0, 0, 0),
    features="wespeaker",
    input_norm="mean",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model of ``depth`` 34 or 100; ``m_channels`` is the width of the first stage.

    ``blocks`` counts the residual blocks of each stage if they are not those of the depth.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth: must be one of {', '.join(map(str, DEPTHS))}; got {depth}")
    blocks = block_counts(blocks, DEPTHS[depth])
    frontend = FrontEnd(
        features, n_mels, input_norm, spec_augment=tuple(spec_augment), sample_rate=sample_rate, plugin=frontend
    )
    return SimAM_ResNet(nOut, blocks, m_channels, n_mels, frontend)
