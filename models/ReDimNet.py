"""ReDimNet (Yakovlev et al. 2024) in wespeaker's sizes B0 to B6: 2-D and 1-D blocks on one volume, reshaped between.

A stage takes a weighted sum of all outputs before it, folds it into (channels, bands), trades bands for channels by its
stride, passes 2-D residual blocks, unfolds to (channels x bands, frames) and mixes over time in a narrow 1-D block.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.frontend import FrontEnd
from models.pooling import make_pooling

HEADS = 4
TIME_KERNELS = (7, 19, 31, 59)


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of (B, C, ...), in fp32."""

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().transpose(1, -1)
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6).transpose(1, -1)


def group_count(channels, group_size):
    """How many groups the channels are cut into: as many as whole ones of ``group_size`` fit, at least one."""
    return max(channels // group_size, 1)


class ConvNeXtLikeBlock(nn.Module):
    """Grouped convolution, BN, GELU, 1x1 convolution, residual sum; in one or two dimensions."""

    def __init__(self, channels, kernel_size, group_size=1, dimensions=2):
        super().__init__()
        conv, norm = ((nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d))[dimensions - 1]
        grouped = conv(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=group_count(channels, group_size)
        )
        self.dwconvs = nn.ModuleList([grouped])
        self.norm = norm(channels)
        self.pwconv1 = conv(channels, channels, 1)

    def forward(self, x):
        return x + self.pwconv1(F.gelu(self.norm(self.dwconvs[0](x))))


class FrequencySE(nn.Module):
    """Rescale each band of (B, C, F, T) by a gate of its mean (Thienpondt et al. 2021)."""

    def __init__(self, bands, bottleneck):
        super().__init__()
        self.squeeze = nn.Linear(bands, bottleneck)
        self.exitation = nn.Linear(bottleneck, bands)  # so spelt in the published weights

    def forward(self, x):
        gate = torch.sigmoid(self.exitation(F.relu(self.squeeze(x.mean(dim=(1, 3))))))
        return x * gate[:, None, :, None].to(x.dtype)


class ResBasicBlock(nn.Module):
    """Twice a grouped 3x3 and a 1x1 convolution, BN after the first ReLU and before the sum; ``bands`` adds an SE."""

    def __init__(self, channels, group_size, bands=0):
        super().__init__()
        groups = group_count(channels, group_size)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.conv1pw = nn.Conv2d(channels, channels, 1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=False)
        self.conv2pw = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.se = FrequencySE(bands, min(64, max(channels, 32))) if bands else nn.Identity()

    def forward(self, x):
        out = self.bn1(F.relu(self.conv1pw(self.conv1(x))))
        return F.relu(self.se(self.bn2(self.conv2pw(self.conv2(out)))) + x)


class ConvBlock2d(nn.Module):
    """A 2-D block of the kind that the size names: ``convnext_like``, ``basic_resnet`` or ``basic_resnet_fwse``."""

    def __init__(self, kind, channels, bands, group_size):
        super().__init__()
        if kind == "convnext_like":
            self.conv_block = ConvNeXtLikeBlock(channels, 3, group_size)
        else:
            self.conv_block = ResBasicBlock(channels, group_size, bands if kind == "basic_resnet_fwse" else 0)

    def forward(self, x):
        return self.conv_block(x)


class SelfAttention(nn.Module):
    """Multi-head attention of every frame to every other, (B, T, C) -> (B, T, C)."""

    def __init__(self, channels):
        super().__init__()
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        # The fused kernels hold no (T, T) matrix and take the softmax in fp32.
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU's tanh approximation between."""

    def __init__(self, channels):
        super().__init__()
        self.intermediate_dense = nn.Linear(channels, channels)
        self.output_dense = nn.Linear(channels, channels)

    def forward(self, x):
        return self.output_dense(F.gelu(self.intermediate_dense(x), approximate="tanh"))


class TransformerEncoderLayer(nn.Module):
    """Self-attention and feed-forward layer, norm after each residual sum: (B, C, T) -> (B, C, T).

    The first norm is of the residual itself, so the second sum adds to normalised frames.
    """

    def __init__(self, channels):
        super().__init__()
        self.attention = SelfAttention(channels)
        self.layer_norm = nn.LayerNorm(channels, eps=1e-6)
        self.feed_forward = FeedForward(channels)
        self.final_layer_norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x):
        x = x.transpose(1, 2)
        x = self.layer_norm(x + self.attention(x))
        return self.final_layer_norm(x + self.feed_forward(x)).transpose(1, 2)


class TimeContextBlock1d(nn.Module):
    """Convolutions of growing kernel and attention in ``hidden`` channels, residual sum: (B, C, T) -> (B, C, T)."""

    def __init__(self, channels, hidden):
        super().__init__()
        self.red_dim_conv = nn.Sequential(nn.Conv1d(channels, hidden, 1), ChannelNorm(hidden))
        convolutions = [ConvNeXtLikeBlock(hidden, size, dimensions=1) for size in TIME_KERNELS]
        self.tcm = nn.Sequential(*convolutions, TransformerEncoderLayer(hidden))
        self.exp_dim_conv = nn.Conv1d(hidden, channels, 1)

    def forward(self, x):
        return x + self.exp_dim_conv(self.tcm(self.red_dim_conv(x)))


class To1d(nn.Module):
    """(B, C, F, T) -> (B, F x C, T)."""

    def forward(self, x):
        return x.transpose(1, 2).flatten(1, 2)


def weighted_sum(outputs, weights):
    """Sum outputs (B, C, T) by the softmax over the outputs of weights (1, outputs, C, 1), in fp32."""
    with torch.autocast(outputs[0].device.type, enabled=False):
        weights = weights.float().softmax(dim=1).unbind(dim=1)
        total = weights[0] * outputs[0].float()
        for weight, output in zip(weights[1:], outputs[1:]):
            total = torch.addcmul(total, weight, output.float())
        return total


@dataclass(frozen=True)
class Size:
    """What makes a size. A stage: (stride over the bands, 2-D blocks, their expansion, reduction of the 1-D block)."""

    channels: int
    block: str
    group_size: int  # channels in a group of the 2-D convolutions (group_count)
    stages: tuple


B4_STAGES = ((1, 4, 2, 48), (2, 4, 2, 48), (1, 6, 2, 48), (2, 6, 1, 32), (1, 8, 1, 24), (2, 4, 1, 16))
SIZES = {
    "B0": Size(10, "basic_resnet", 1, ((1, 2, 1, 30), (2, 3, 2, 30), (1, 3, 3, 30), (2, 4, 2, 10), (1, 3, 1, 10))),
    "B1": Size(12, "convnext_like", 8, ((1, 2, 1, 0), (2, 3, 1, 0), (3, 4, 1, 12), (2, 5, 1, 12), (2, 3, 1, 8))),
    "B2": Size(
        16,
        "convnext_like",
        4,
        ((1, 2, 1, 12), (2, 2, 1, 12), (1, 3, 1, 12), (2, 4, 1, 8), (1, 4, 1, 8), (2, 4, 1, 4)),
    ),
    "B3": Size(
        16,
        "basic_resnet_fwse",
        1,
        ((1, 6, 4, 32), (2, 6, 2, 32), (1, 8, 2, 32), (2, 10, 2, 16), (1, 10, 1, 16), (2, 8, 1, 16)),
    ),
    "B4": Size(32, "basic_resnet_fwse", 1, B4_STAGES),
    "B5": Size(32, "basic_resnet_fwse", 16, B4_STAGES),
    "B6": Size(
        32,
        "basic_resnet",
        32,
        ((1, 4, 4, 32), (2, 6, 2, 32), (1, 6, 2, 24), (3, 8, 1, 24), (1, 8, 1, 16), (2, 8, 1, 16)),
    ),
}


class Backbone(nn.Module):
    """Features (B, F, T) -> (B, C x F, T); the volume is the same throughout."""

    def __init__(self, size, channels, bands):
        super().__init__()
        volume = channels * bands
        later = [torch.zeros(1, i + 2, volume, 1) for i in range(len(size.stages))]
        # The first weighs one output, so its gradient is zero: it is here because the published weights hold it.
        self.inputs_weights = nn.ParameterList([torch.ones(1, 1, 1, 1), *later])
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), ChannelNorm(channels))
        self.unfold = To1d()
        self.channels = []  # of the volume as each stage folds it
        for i, (stride, blocks, expansion, reduction) in enumerate(size.stages):
            self.channels.append(channels)
            wide = channels * stride * expansion
            layers = [nn.Conv2d(channels, wide, (stride, 1), stride=(stride, 1))]
            channels, bands = channels * stride, bands // stride
            layers += [ConvBlock2d(size.block, wide, bands, size.group_size) for _ in range(blocks)]
            if expansion > 1:
                layers.append(squeeze(wide, channels, size.group_size))
            layers.append(To1d())
            if reduction:
                hidden = max(volume // reduction // HEADS, 1) * HEADS
                layers.append(TimeContextBlock1d(volume, hidden))
            setattr(self, f"stage{i}", nn.Sequential(*layers))

    def forward(self, x):
        outputs = [self.unfold(self.stem(x.unsqueeze(1)))]
        for i, channels in enumerate(self.channels):
            x = weighted_sum(outputs, self.inputs_weights[i]).unflatten(1, (-1, channels)).transpose(1, 2)
            if x.device.type == "cpu":  # a training step of B0 takes a quarter less time so, of B1 a sixth
                x = x.contiguous(memory_format=torch.channels_last)
            outputs.append(getattr(self, f"stage{i}")(x))
        return weighted_sum(outputs, self.inputs_weights[-1])


def squeeze(wide, channels, group_size):
    """From the expanded channels back to those of the volume."""
    return nn.Sequential(
        nn.Conv2d(wide, channels, 3, padding=1, groups=group_count(channels, group_size)),
        nn.BatchNorm2d(channels, eps=1e-6),
        nn.GELU(),
        nn.Conv2d(channels, channels, 1),
    )


class ReDimNet(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    def __init__(self, nOut, size, channels, n_mels, pooling, two_emb_layer, frontend):
        super().__init__()
        self.frontend = frontend
        self.backbone = Backbone(size, channels, n_mels)
        self.pool = make_pooling(pooling, channels * n_mels)
        self.seg_1 = nn.Linear(self.pool.output_channels, nOut)
        self.seg_bn_1 = nn.BatchNorm1d(nOut, affine=False) if two_emb_layer else None
        self.seg_2 = nn.Linear(nOut, nOut) if two_emb_layer else None

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again."""
        return [part for part in self.modules() if isinstance(part, (ConvBlock2d, TimeContextBlock1d))]

    def forward(self, x):
        x = self.seg_1(self.pool(self.backbone(self.frontend(x))))
        return x if self.seg_2 is None else self.seg_2(self.seg_bn_1(F.relu(x)))


def MainModel(
    nOut=192,
    n_mels=72,
    size="B2",
    channels=0,
    pooling="ASTP_GLOB",
    two_emb_layer=False,
    features="wespeaker",
    input_norm="mean",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
):
    """Build the model of ``size`` B0 to B6; published are 60 mel filters for B0, 72 for the others.

    ``channels`` is the width of the stem if it is not that of the size. ``pooling`` is one of models/pooling.py;
    wespeaker's B1 had ASTP at first. ``two_emb_layer`` adds ReLU, BN and a second embedding layer.
    """
    if size not in SIZES:
        raise ValueError(f"size: must be one of {', '.join(SIZES)}; got '{size}'")
    chosen = SIZES[size]
    channels = channels or chosen.channels
    stride = math.prod(stage[0] for stage in chosen.stages)
    if n_mels % stride:
        raise ValueError(f"n_mels: ReDimNet of size {size} needs a multiple of {stride}, got {n_mels}")
    frontend = FrontEnd(
        features, n_mels, input_norm, spec_augment=tuple(spec_augment), sample_rate=sample_rate, plugin=frontend
    )
    return ReDimNet(nOut, chosen, channels, n_mels, pooling, two_emb_layer, frontend)
