"""ReDimNet2 (Yakovlev and Okhotnikov 2026, arXiv 2603.11841) B0 to B6: ReDimNet whose stages pool over time.

A stage strides over time as well as over bands, from the full rate down to its own, by one depthwise convolution. What
it gives is repeated to the full rate in the sums that follow, so it still is a reshaped 2-D map. That buys channels:
the sizes are wider than ReDimNet's for the same operations.
"""

import math

import torch
from torch import nn

from models.frontend import repeat_to
from models.ReDimNet import Backbone, ReDimNet, Size, To2d, front_end, size_of


def six_stages(expansions, reductions, third_band_stride=2):
    """Stages that halve the bands, the frames, the bands (or more), the frames, the bands."""
    strides = ((1, 1), (2, 1), (1, 2), (third_band_stride, 1), (1, 2), (2, 1))
    values = zip(strides, (2, 3, 4, 5, 4, 3), expansions, reductions)
    return tuple((bands, blocks, expansion, reduction, time) for (bands, time), blocks, expansion, reduction in values)


NARROW, WIDE = (2, 1, 1, 1, 1, 1), (4, 3, 2, 1, 1, 1)
# B3, B4 and B6 are those of the authors' recipes and code. B0, B1, B2 and B5 have wespeaker's stages, and a head on the
# 2-D map, or none, with which parameters and operations are the paper's: with wespeaker's own head they are fewer.
SIZES = {
    "B0": Size(12, "basic_resnet", 1, six_stages(NARROW, (36, 36, 36, 36, 18, 18)), 64),
    "B1": Size(16, "basic_resnet", 1, six_stages(NARROW, (32, 32, 32, 32, 16, 16))),
    "B2": Size(20, "basic_resnet", 1, six_stages(NARROW, (40, 30, 30, 20, 20, 10), third_band_stride=3)),
    "B3": Size(24, "basic_resnet", 1, six_stages(WIDE, (24,) * 6)),
    "B4": Size(32, "basic_resnet", 1, six_stages(WIDE, (24,) * 6)),
    "B5": Size(48, "basic_resnet", 1, six_stages(WIDE, (48, 48, 48, 48, 32, 32)), 256),
    "B6": Size(
        64,
        "basic_resnet",
        1,
        (
            (1, 3, 3, 64, 1),
            (2, 4, 2, 64, 1),
            (1, 5, 2, 48, 2),
            (2, 5, 1, 48, 1),
            (1, 4, 0.75, 32, 2),
            (2, 3, 0.5, 24, 1),
        ),
        224,
    ),
}


class TimePoolingBackbone(Backbone):
    """Features (B, F, T) -> (B, C, F / stride, T), T rounded down to a multiple of the strides over time."""

    @staticmethod
    def reduce(channels, wide, stride):
        """Trade bands and frames for channels, each by a convolution of its own or shared by as few as may be."""
        return nn.Conv2d(channels, wide, stride, stride=stride, groups=math.gcd(channels, wide))

    @staticmethod
    def squeeze(wide, channels, group_size):
        return nn.Sequential(nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels, eps=1e-6))

    @staticmethod
    def first_weight(volume):
        return torch.zeros(1, 1, volume, 1)

    @staticmethod
    def head_of(size, channels, bands):
        width = size.head_channels or channels
        head = nn.Conv2d(channels, width, 1) if size.head_channels else nn.Identity()
        return nn.Sequential(To2d(channels), head), width * bands

    def forward(self, x):
        longest = max(self.steps)
        x = repeat_to(x, longest)
        return super().forward(x[:, :, : x.shape[2] // longest * longest])


def MainModel(
    nOut=192,
    n_mels=72,
    size="B3",
    channels=0,
    stages=(),
    block="",
    group_size=0,
    head_channels=0,
    output_norm=False,
    dual=False,
    pooling="ASTP_GLOB",
    features="redimnet2",
    frame_step=10,
    wave_norm=True,
    input_norm="mean",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model of ``size`` B0 to B6; published are 72 mel filters.

    ``output_norm`` puts a GroupNorm behind the stem and each stage, as the authors do since their first weights, for
    the sake of stable training. ``dual``: the maps before the 1-D blocks go into the sums, too. What else is not that
    of the size: ``channels`` of the stem, ``stages``, a list of [stride over bands, blocks, expansion, reduction,
    stride over time], ``block``, ``group_size`` and ``head_channels``.
    """
    own = {"channels": channels, "stages": stages, "block": block, "group_size": group_size}
    own |= {"head_channels": head_channels, "output_norm": output_norm, "dual": dual}
    backbone = TimePoolingBackbone(size_of("ReDimNet2", SIZES, n_mels, size, **own), n_mels)
    front = front_end(features, n_mels, input_norm, spec_augment, sample_rate, frontend, frame_step, wave_norm)
    return ReDimNet(nOut, front, backbone, pooling, pooled_norm=True)
