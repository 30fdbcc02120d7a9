"""wespeaker's ResNets of 18 to 293 layers: pooling over (channels x frequency), one FC (He et al. 2016)."""

import torch.nn.functional as F
from torch import nn

from models.frontend import FrontEnd
from models.pooling import make_pooling


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN; 1x1 projection when the shape changes; ReLU after the sum."""

    expansion = 1

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = projection(inplanes, planes, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 convolutions with BN; four times ``planes`` channels come out."""

    expansion = 4

    def __init__(self, inplanes, planes, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * 4, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * 4)
        self.shortcut = projection(inplanes, planes * 4, stride)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def projection(inplanes, planes, stride):
    """Identity, or a 1x1 convolution with BN if the shape changes."""
    if stride == 1 and inplanes == planes:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


# Depth: the block, and how many in each stage.
DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    221: (Bottleneck, (6, 16, 48, 3)),
    293: (Bottleneck, (10, 20, 64, 3)),
}


def block_counts(blocks, standard):
    """The blocks of each stage: ``standard`` if all of ``blocks`` are 0; ValueError for a stage without one."""
    if not any(blocks):
        return standard
    if min(blocks) < 1:
        raise ValueError(f"blocks: each stage needs at least 1, got {list(blocks)}; all 0 takes the usual ones")
    return tuple(blocks)


class ResNet(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut); ``kinds`` makes the blocks of each of the four stages."""

    channels_last = True

    def __init__(self, nOut, kinds, blocks, m_channels, n_mels, pooling, two_emb_layer, frontend):
        super().__init__()
        self.frontend = frontend
        self.conv1 = nn.Conv2d(1, m_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(m_channels)
        inplanes = m_channels
        for i, (block, count, stride) in enumerate(zip(kinds, blocks, (1, 2, 2, 2))):
            planes = m_channels * 2**i
            parts = [block(inplanes, planes, stride)]
            inplanes = planes * parts[0].expansion
            parts += [block(inplanes, planes, 1) for _ in range(count - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*parts))
        bands = -(-n_mels // 8)  # mel filters left after three strides of 2
        self.pool = make_pooling(pooling, inplanes * bands)
        self.seg_1 = nn.Linear(self.pool.output_channels, nOut)
        self.seg_bn_1 = nn.BatchNorm1d(nOut, affine=False) if two_emb_layer else None
        self.seg_2 = nn.Linear(nOut, nOut) if two_emb_layer else None

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again."""
        return [block for stage in (self.layer1, self.layer2, self.layer3, self.layer4) for block in stage]

    def stages(self, x):
        """What the last stage gives, (B, C, mels / 8, frames / 8), of the output of the first convolution."""
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x):
        x = self.frontend(x).unsqueeze(1)  # (B, 1, mels, frames)
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        x = self.seg_1(self.pool(x))
        return x if self.seg_2 is None else self.seg_2(self.seg_bn_1(F.relu(x)))


def MainModel(
    nOut=256,
    n_mels=80,
    depth=34,
    m_channels=32,
    blocks=(0, 0, 0, 0),
    pooling="TSTP",
    two_emb_layer=False,
    features="wespeaker",
    input_norm="mean",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model of ``depth`` 18, 34, 50, 101, 152, 221 or 293; ``m_channels`` is the width of the first stage.

    ``blocks`` counts the residual blocks of each stage if they are not those of the depth. ``pooling`` is one of
    models/pooling.py. ``two_emb_layer`` adds ReLU, BN and a second embedding layer.
    """
    if depth not in DEPTHS:
        raise ValueError(f"depth: must be one of {', '.join(map(str, DEPTHS))}; got {depth}")
    block, standard = DEPTHS[depth]
    blocks = block_counts(blocks, standard)
    frontend = FrontEnd(
        features, n_mels, input_norm, spec_augment=tuple(spec_augment), sample_rate=sample_rate, plugin=frontend
    )
    return ResNet(nOut, (block,) * 4, blocks, m_channels, n_mels, pooling, two_emb_layer, frontend)
