"""ReDimNet (Yakovlev et al. 2024) in wespeaker's sizes B0 to B6: 2-D and 1-D blocks on one volume, reshaped between.

A stage takes a weighted sum of all outputs before it, folds it into (channels, bands), trades bands for channels by its
stride, passes 2-D residual blocks, unfolds to (channels x bands, frames) and mixes over time in a narrow 1-D block.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from models.frontend import FrontEnd
from models.pooling import make_pooling

HEADS = 4
TIME_KERNELS = (7, 19, 31, 59)
BLOCKS = ("convnext_like", "basic_resnet", "basic_resnet_fwse")


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


class To2d(nn.Module):
    """(B, F x C, T) -> (B, C, F, T)."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return x.unflatten(1, (-1, self.channels)).transpose(1, 2)


class GroupNorm(nn.GroupNorm):
    """Normalisation of (B, C, T) over the frames of groups of channels (Wu and He 2018), in fp32."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def weighted_sum(outputs, weights, steps):
    """Sum outputs (B, C, T / step) by the softmax over the outputs of weights (1, outputs, C or 1, 1), in fp32.

    A frame of an output stands for ``step`` frames of the sum (B, C, T). The coarsest are summed first, so that no
    single one is held at the full rate.
    """
    with torch.autocast(outputs[0].device.type, enabled=False):
        terms = list(zip(weights.float().softmax(dim=1).unbind(dim=1), outputs, steps))
        rates = sorted({step for _, _, step in terms}, reverse=True)
        total = None
        for rate, finer in zip(rates, [*rates[1:], 1]):
            for weight, output, step in terms:
                if step == rate:
                    output = output.float()
                    total = weight * output if total is None else torch.addcmul(total, weight, output)
            total = repeat_frames(total, rate // finer)
        return total


def repeat_frames(x, count):
    """Each frame of (B, C, T) ``count`` times: (B, C, T x count)."""
    return x if count == 1 else x.unsqueeze(3).expand(-1, -1, -1, count).flatten(2)


@dataclass(frozen=True)
class Stage:
    """Stride over the bands, 2-D blocks, their expansion, reduction of the 1-D block (0: none), stride over time."""

    stride: int
    blocks: int
    expansion: float
    reduction: int
    time_stride: int = 1


@dataclass(frozen=True)
class Size:
    """What one size has and others have not; ``stages`` holds the values of each ``Stage``.

    ``head_channels`` is the width of a projection behind the last stage, 0: none. ``output_norm`` puts a GroupNorm of
    as many groups as channels behind the stem and each stage. ``dual``: a stage gives two outputs to the sums of the
    later ones, before and after its 1-D block.
    """

    channels: int
    block: str
    group_size: int  # channels in a group of the 2-D convolutions (group_count)
    stages: tuple
    head_channels: int = 0
    output_norm: bool = False
    dual: bool = False


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

    def __init__(self, size, bands):
        super().__init__()
        channels, volume, step = size.channels, size.channels * bands, 1
        self.stem = nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), ChannelNorm(channels))
        self.unfold, self.folds = To1d(), []
        self.steps = [1]  # how many frames of the features a frame of each output stands for, the stem's first
        weights = []
        for i, stage in enumerate(Stage(*values) for values in size.stages):
            self.folds.append(To2d(channels))
            weights.append(torch.zeros(1, len(self.steps), volume, 1))
            step *= stage.time_stride
            layers, channels, bands = self.layers(size, stage, channels, bands, step)
            context = nn.Identity()
            if stage.reduction:
                context = TimeContextBlock1d(volume, max(volume // stage.reduction // HEADS, 1) * HEADS)
            elif size.dual:
                raise ValueError(f"dual: stage {i} has no 1-D block, so it has one output only")
            if size.dual:
                setattr(self, f"stage{i}_1d", context)
            setattr(self, f"stage{i}", nn.Sequential(*layers, *([] if size.dual or not stage.reduction else [context])))
            self.steps += [step] * (2 if size.dual else 1)
        # The first weighs one output, so its gradient is zero: it is here because the published weights hold it.
        weights[0] = self.first_weight(volume)
        self.inputs_weights = nn.ParameterList([*weights, torch.zeros(1, len(self.steps), volume, 1)])
        norms = [GroupNorm(size.channels, volume) for _ in self.steps] if size.output_norm else []
        self.norms, self.dual = nn.ModuleList(norms), size.dual
        self.head, self.output_channels = self.head_of(size, channels, bands)

    def layers(self, size, stage, channels, bands, step):
        """The 2-D part of a stage, and the channels and bands behind it."""
        wide = int(channels * stage.stride * stage.expansion)
        channels, bands = channels * stage.stride, bands // stage.stride
        layers = [self.reduce(channels // stage.stride, wide, (stage.stride, step))]
        layers += [ConvBlock2d(size.block, wide, bands, size.group_size) for _ in range(stage.blocks)]
        if stage.expansion != 1:
            layers.append(self.squeeze(wide, channels, size.group_size))
        return [*layers, To1d()], channels, bands

    @staticmethod
    def reduce(channels, wide, stride):
        """Trade bands for channels."""
        return nn.Conv2d(channels, wide, stride, stride=stride)

    @staticmethod
    def squeeze(wide, channels, group_size):
        """From the expanded channels back to those of the volume."""
        return nn.Sequential(
            nn.Conv2d(wide, channels, 3, padding=1, groups=group_count(channels, group_size)),
            nn.BatchNorm2d(channels, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(channels, channels, 1),
        )

    @staticmethod
    def first_weight(volume):
        return torch.ones(1, 1, 1, 1)

    @staticmethod
    def head_of(size, channels, bands):
        """What follows the last sum, and how many channels the pooling takes of it."""
        if not size.head_channels:
            return nn.Identity(), channels * bands
        head = nn.Sequential(nn.Conv1d(channels * bands, size.head_channels, 1), nn.BatchNorm1d(size.head_channels))
        return head, size.head_channels

    def forward(self, x):
        outputs = []
        self.add(outputs, self.unfold(self.stem(x.unsqueeze(1))))
        for i, fold in enumerate(self.folds):
            x = fold(weighted_sum(outputs, self.inputs_weights[i], self.steps))
            if x.device.type == "cpu":  # a training step of B0 takes a quarter less time so, of B1 a sixth
                x = x.contiguous(memory_format=torch.channels_last)
            x = getattr(self, f"stage{i}")(x)
            self.add(outputs, x)
            if self.dual:
                self.add(outputs, getattr(self, f"stage{i}_1d")(x))
        return self.head(weighted_sum(outputs, self.inputs_weights[-1], self.steps))

    def add(self, outputs, x):
        """Append to the outputs, normalised if they are."""
        outputs.append(self.norms[len(outputs)](x) if self.norms else x)


class ReDimNet(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    def __init__(self, nOut, frontend, backbone, pooling, pooled_norm, two_emb_layer=False):
        super().__init__()
        self.frontend = frontend
        self.backbone = backbone
        self.pool = make_pooling(pooling, backbone.output_channels)
        self.pool_bn = nn.BatchNorm1d(self.pool.output_channels) if pooled_norm else None
        self.seg_1 = nn.Linear(self.pool.output_channels, nOut)
        self.seg_bn_1 = nn.BatchNorm1d(nOut, affine=False) if two_emb_layer else None
        self.seg_2 = nn.Linear(nOut, nOut) if two_emb_layer else None

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again."""
        return [part for part in self.modules() if isinstance(part, (ConvBlock2d, TimeContextBlock1d))]

    def forward(self, x):
        x = self.pool(self.backbone(self.frontend(x)))
        x = self.seg_1(x if self.pool_bn is None else self.pool_bn(x))
        return x if self.seg_2 is None else self.seg_2(self.seg_bn_1(F.relu(x)))


def size_of(name, sizes, n_mels, size, **own):
    """The Size called ``size``, with what is not 0 or empty in ``own``; ValueError if there is none or it cannot be.

    The head is that of the size only together with its stages.
    """
    if size not in sizes:
        raise ValueError(f"size: must be one of {', '.join(sizes)}; got '{size}'")
    chosen = replace(sizes[size], head_channels=0) if own.get("stages") else sizes[size]
    chosen = replace(chosen, **{key: value for key, value in own.items() if value})
    if chosen.block not in BLOCKS:
        raise ValueError(f"block: must be one of {', '.join(BLOCKS)}; got '{chosen.block}'")
    if chosen.channels < 1:
        raise ValueError(f"channels: must be at least 1, got {chosen.channels}; 0 takes those of the size")
    over_time, channels = any(len(stage) > 4 for stage in sizes[size].stages), chosen.channels
    for i, stage in enumerate(chosen.stages):
        check_stage(f"stages: stage {i}", stage, over_time)
        channels *= stage[0]
        if int(channels * stage[2]) < 1:
            raise ValueError(f"stages: stage {i}: an expansion of {stage[2]:g} leaves no channel")
    stride = math.prod(stage[0] for stage in chosen.stages)
    if n_mels % stride:
        raise ValueError(f"n_mels: {name} of size {size} needs a multiple of {stride}, got {n_mels}")
    return chosen


def check_stage(place, stage, over_time):
    """ValueError, after ``place``, for what is no Stage; only ReDimNet2 strides ``over_time``."""
    right = isinstance(stage, (list, tuple)) and len(stage) in (4, 5)
    if right:
        stride, blocks, expansion, reduction, *time = stage
        right = all(type(number) is int for number in (stride, blocks, reduction, *time))
        right = right and min(stride, blocks, *time) > 0 and reduction >= 0 and (over_time or time in ([], [1]))
        right = right and isinstance(expansion, (int, float)) and 0 < expansion < math.inf
    if not right:
        more = " and the stride over time, 1 if it is left out" if over_time else ""
        raise ValueError(f"{place} must be [stride, blocks, expansion, reduction]{more}, got {stage}")


def front_end(features, n_mels, input_norm, spec_augment, sample_rate, plugin, frame_step, wave_norm):
    """Build the front end of a ReDimNet or ReDimNet2."""
    options = {"sample_rate": sample_rate, "plugin": plugin, "frame_step": frame_step, "wave_norm": wave_norm}
    return FrontEnd(features, n_mels, input_norm, spec_augment=tuple(spec_augment), **options)


def MainModel(
    nOut=192,
    n_mels=72,
    size="B2",
    channels=0,
    stages=(),
    block="",
    group_size=0,
    head_channels=0,
    pooling="ASTP_GLOB",
    pooled_norm=False,
    two_emb_layer=False,
    features="wespeaker",
    frame_step=10,
    wave_norm=False,
    input_norm="mean",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model of ``size`` B0 to B6; published are 60 mel filters for B0, 72 for the others.

    ``channels`` is the width of the stem if it is not that of the size; ``stages``, a list of [stride, blocks,
    expansion, reduction], ``block``, ``group_size`` and ``head_channels`` likewise. ``pooling`` is one of
    models/pooling.py; wespeaker's B1 had ASTP at first. ``two_emb_layer`` adds ReLU, BN and a second embedding layer.
    The authors' own weights have a BN of the pooled statistics, ``pooled_norm``, and features every 15 ms.
    """
    own = {"channels": channels, "stages": stages, "block": block, "group_size": group_size}
    chosen = size_of("ReDimNet", SIZES, n_mels, size, head_channels=head_channels, **own)
    front = front_end(features, n_mels, input_norm, spec_augment, sample_rate, frontend, frame_step, wave_norm)
    return ReDimNet(nOut, front, Backbone(chosen, n_mels), pooling, pooled_norm, two_emb_layer)
