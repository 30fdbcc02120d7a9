"""CAM++ (Wang et al. 2023): a densely connected TDNN with context-aware masking behind a 2-D residual head.

The tensors have the names of 3D-Speaker's and wespeaker's checkpoints.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from models.frontend import FrontEnd, exporting
from models.pooling import TSTP
from models.ResNet import BasicBlock

SEGMENT = 100  # frames (of 20 ms) whose mean is the local context of each of them


class ResidualHead(nn.Module):
    """Features (B, mels, T) -> (B, m_channels * ceil(mels / 8), T): convolutions striding over frequency only."""

    def __init__(self, m_channels, n_mels):
        super().__init__()
        self.conv1 = nn.Conv2d(1, m_channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(m_channels)
        self.layer1 = nn.Sequential(*(BasicBlock(m_channels, m_channels, stride) for stride in ((2, 1), 1)))
        self.layer2 = nn.Sequential(*(BasicBlock(m_channels, m_channels, stride) for stride in ((2, 1), 1)))
        self.conv2 = nn.Conv2d(m_channels, m_channels, 3, stride=(2, 1), padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(m_channels)
        self.output_channels = m_channels * -(-n_mels // 8)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x.unsqueeze(1))))
        x = F.relu(self.bn2(self.conv2(self.layer2(self.layer1(x)))))
        return x.flatten(1, 2)


def norm_relu(channels):
    """BN and ReLU, by the names of the checkpoints."""
    return nn.Sequential(OrderedDict(batchnorm=nn.BatchNorm1d(channels), relu=nn.ReLU(inplace=True)))


class ContextAwareMask(nn.Module):
    """Convolution whose channels are gated by the means of the utterance and of each segment of 100 frames.

    The gate is computed once a segment, for its frames share it; the last segment may be shorter.
    """

    def __init__(self, inputs, outputs, dilation, reduction=2):
        super().__init__()
        self.linear_local = nn.Conv1d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
        self.linear1 = nn.Conv1d(inputs, inputs // reduction, 1)
        self.linear2 = nn.Conv1d(inputs // reduction, outputs, 1)

    def forward(self, x):
        if exporting():
            return self.linear_local(x) * self.gate_by_frame(x)
        # Nothing is padded; torch 2.4 exports a wrong mean of the last segment unless told not to count what is.
        segments = F.avg_pool1d(x, SEGMENT, SEGMENT, ceil_mode=True, count_include_pad=False)  # (B, C, segments)
        context = x.mean(dim=2, keepdim=True) + segments
        gate = torch.sigmoid(self.linear2(F.relu(self.linear1(context))))
        return self.linear_local(x) * gate.repeat_interleave(SEGMENT, dim=2).narrow(2, 0, x.shape[2])

    def gate_by_frame(self, x):
        """The same gate computed for each frame: torch.export would fix the number of the segments."""
        frames = x.shape[2]
        begin = torch.arange(frames, device=x.device) // SEGMENT * SEGMENT
        end = (begin + SEGMENT).clamp(max=frames)
        sums = F.pad(x.double().cumsum(dim=2), (1, 0))  # in fp32 the sums of hours would cancel
        segments = ((sums[:, :, end] - sums[:, :, begin]) / (end - begin)).to(x.dtype)
        context = x.mean(dim=2, keepdim=True) + segments
        return torch.sigmoid(self.linear2(F.relu(self.linear1(context))))


class DenseTDNNLayer(nn.Module):
    """(B, C, T) -> (B, C + growth_rate, T): what it computes is appended to what it is given."""

    def __init__(self, inputs, growth_rate, bottleneck, dilation):
        super().__init__()
        self.nonlinear1 = norm_relu(inputs)
        self.linear1 = nn.Conv1d(inputs, bottleneck, 1, bias=False)
        self.nonlinear2 = norm_relu(bottleneck)
        self.cam_layer = ContextAwareMask(bottleneck, growth_rate, dilation)

    def forward(self, x):
        new = self.cam_layer(self.nonlinear2(self.linear1(self.nonlinear1(x))))
        return torch.cat([x, new], dim=1)


class CAMPPlus(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    channels_last = True

    def __init__(self, nOut, n_mels, m_channels, init_channels, growth_rate, bn_size, blocks, frontend):
        super().__init__()
        self.frontend = frontend
        self.head = ResidualHead(m_channels, n_mels)
        inputs, channels = self.head.output_channels, init_channels
        first = nn.Conv1d(inputs, channels, 5, stride=2, padding=2, bias=False)
        parts = OrderedDict(tdnn=nn.Sequential(OrderedDict(linear=first, nonlinear=norm_relu(channels))))
        for i, (count, dilation) in enumerate(zip(blocks, (1, 2, 2)), 1):
            layers = OrderedDict()
            for j in range(1, count + 1):
                layers[f"tdnnd{j}"] = DenseTDNNLayer(channels, growth_rate, bn_size * growth_rate, dilation)
                channels += growth_rate
            parts[f"block{i}"] = nn.Sequential(layers)
            halve = nn.Conv1d(channels, channels // 2, 1, bias=False)
            parts[f"transit{i}"] = nn.Sequential(OrderedDict(nonlinear=norm_relu(channels), linear=halve))
            channels //= 2
        parts["out_nonlinear"] = norm_relu(channels)
        parts["stats"] = TSTP()
        parts["column"] = nn.Unflatten(1, (2 * channels, 1))
        norm = nn.Sequential(OrderedDict(batchnorm=nn.BatchNorm1d(nOut, affine=False)))
        last = nn.Conv1d(2 * channels, nOut, 1, bias=False)
        parts["dense"] = nn.Sequential(OrderedDict(linear=last, nonlinear=norm))
        self.xvector = nn.Sequential(parts)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again."""
        return [part for part in self.modules() if isinstance(part, (BasicBlock, DenseTDNNLayer))]

    def forward(self, x):
        return self.xvector(self.head(self.frontend(x))).squeeze(2)


def MainModel(
    nOut=512,
    n_mels=80,
    m_channels=32,
    init_channels=128,
    growth_rate=32,
    bn_size=4,
    blocks=(12, 24, 16),
    features="wespeaker",
    input_norm="mean",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model; ``m_channels`` is the width of the 2-D head, ``init_channels`` that of the first TDNN layer.

    Each of the three ``blocks`` counts its layers; a layer adds ``growth_rate`` channels through a bottleneck of
    ``bn_size`` times as many.
    """
    if len(blocks) != 3:
        raise ValueError(f"blocks: CAMPPlus has three, got {len(blocks)}")
    frontend = FrontEnd(
        features, n_mels, input_norm, spec_augment=tuple(spec_augment), sample_rate=sample_rate, plugin=frontend
    )
    return CAMPPlus(nOut, n_mels, m_channels, init_channels, growth_rate, bn_size, tuple(blocks), frontend)
