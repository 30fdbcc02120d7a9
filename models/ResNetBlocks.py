"""Residual blocks with squeeze-and-excitation, shared by the ResNetSE models (and by files written for them)."""

from torch import nn


class SELayer(nn.Module):
    """Squeeze-and-excitation (Hu et al. 2018): rescale each channel of (B, C, F, T) by a gate of its mean."""

    def __init__(self, channel: int, reduction: int = 8):
        super().__init__()
        hidden = max(channel // reduction, 1)
        self.fc = nn.Sequential(
            nn.Linear(channel, hidden),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channel),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.fc(x.mean(dim=(2, 3)))[:, :, None, None].to(x.dtype)


class SEBasicBlock(nn.Module):
    """Two 3x3 convolutions with SE; ReLU comes before the first BN, as in voxceleb_trainer."""

    expansion = 1

    def __init__(self, inplanes, planes, stride=1, downsample=None, reduction=8):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.se = SELayer(planes, reduction)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.bn1(self.relu(self.conv1(x)))
        return self.relu(self.se(self.bn2(self.conv2(out))) + shortcut)


class SEBottleneck(nn.Module):
    """1x1, 3x3, 1x1 bottleneck with SE; four times ``planes`` channels come out."""

    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, reduction=8):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.relu = nn.ReLU(inplace=True)
        self.se = SELayer(planes * 4, reduction)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        return self.relu(self.se(self.bn3(self.conv3(out))) + shortcut)


def make_stage(block, inplanes: int, planes: int, blocks: int, stride):
    """Chain ``blocks`` residual blocks; the first may stride and widen through a 1x1 projection with BN."""
    downsample = None
    if stride != 1 or inplanes != planes * block.expansion:
        downsample = nn.Sequential(
            nn.Conv2d(inplanes, planes * block.expansion, 1, stride=stride, bias=False),
            nn.BatchNorm2d(planes * block.expansion),
        )
    first = block(inplanes, planes, stride, downsample)
    return nn.Sequential(first, *(block(planes * block.expansion, planes) for _ in range(blocks - 1)))


def init_convolutions(module):
    """Kaiming initialisation of convolutions, ones and zeros for BN."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.constant_(part.weight, 1)
            nn.init.constant_(part.bias, 0)
