"""ResNet34 in wespeaker's layout: basic blocks [3, 4, 6, 3], statistics pooling over (channels x frequency), one FC."""

import torch.nn.functional as F
from torch import nn

from models.frontend import FrontEnd
from models.pooling import TSTP


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN; 1x1 projection when the shape changes; ReLU after the sum."""

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or inplanes != planes:
            self.shortcut = nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet34(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    def __init__(self, nOut, m_channels, blocks, n_mels, frontend):
        super().__init__()
        self.frontend = frontend
        self.conv1 = nn.Conv2d(1, m_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(m_channels)
        planes = [m_channels * 2**i for i in range(4)]
        self.layer1 = _stage(m_channels, planes[0], blocks[0], 1)
        self.layer2 = _stage(planes[0], planes[1], blocks[1], 2)
        self.layer3 = _stage(planes[1], planes[2], blocks[2], 2)
        self.layer4 = _stage(planes[2], planes[3], blocks[3], 2)
        self.pool = TSTP()
        bands = -(-n_mels // 8)  # mel filters left after three strides of 2
        self.seg_1 = nn.Linear(planes[3] * bands * 2, nOut)

    def forward(self, x):
        x = self.frontend(x).unsqueeze(1)  # (B, 1, mels, frames)
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.seg_1(self.pool(x))


def _stage(inplanes, planes, blocks, stride):
    return nn.Sequential(
        BasicBlock(inplanes, planes, stride), *(BasicBlock(planes, planes, 1) for _ in range(blocks - 1))
    )


def MainModel(
    nOut=256,
    n_mels=80,
    m_channels=32,
    blocks=(3, 4, 6, 3),
    frontend="fbank",
    input_norm="mean",
    spec_augment=(0, 0),
):
    """Build the model; ``m_channels`` is the width of the first stage, ``blocks`` the residual blocks of each stage."""
    features = FrontEnd(frontend, n_mels, input_norm, spec_augment=tuple(spec_augment))
    return ResNet34(nOut, m_channels, tuple(blocks), n_mels, features)
