"""RawNet3 (Jung et al. 2022, "Pushing the limits of raw waveform speaker recognition"): no mel features.

Filters whose band edges are learned take their place, then Res2Net blocks as in ECAPA-TDNN with alpha feature-map
scaling and max pooling over time.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from config import SAMPLE_RATE
from models.ECAPA_TDNN import ConvReluBN, Res2Conv
from models.pooling import mean_and_variance, weighted_statistics
from utils import PreEmphasis

AGGREGATE = 1536
VARIANCES = (1e-4, 1e4)  # what variances are clamped to


class SincFilters(nn.Module):
    """Band-pass filters with learned band edges: (B, 1, T) -> (B, filters, frames).

    The first half are the even (cosine) filters of SincNet (Ravanelli and Bengio 2018), the second half the odd (sine)
    ones of the same bands (Pariente et al. 2020); each is scaled by its bandwidth and has a Hamming window. The bands
    start out next to each other, equally wide in mel. Edges in Hz.
    """

    least = 50.0  # Hz, of a band's low edge and of its width

    def __init__(self, filters: int, kernel_size: int, stride: int):
        super().__init__()
        self.stride = stride
        top = SAMPLE_RATE / 2 - 2 * self.least
        mel = torch.linspace(_mel(30.0), _mel(top), filters // 2 + 1, dtype=torch.float64)
        edges = (700.0 * (10.0 ** (mel / 2595.0) - 1.0)).float()
        self.low_hz = nn.Parameter(edges[:-1, None].clone())  # (filters / 2, 1)
        self.band_hz = nn.Parameter(edges.diff()[:, None])
        half = torch.hamming_window(kernel_size, periodic=False, dtype=torch.float64)[: kernel_size // 2]
        time = 2.0 * math.pi * torch.arange(-(kernel_size // 2), 0) / SAMPLE_RATE
        self.register_buffer("window", half.float(), persistent=False)
        self.register_buffer("time", time, persistent=False)  # 2 pi seconds, of the left half of a filter

    def filters(self):
        """Impulse responses (filters, 1, kernel size)."""
        nyquist = SAMPLE_RATE / 2
        # Below the Nyquist frequency, so that no band that has wandered off has width 0 to divide by.
        low = (self.least + self.low_hz.abs()).clamp(max=nyquist - self.least)
        high = (low + self.least + self.band_hz.abs()).clamp(max=nyquist)
        shape = self.window / (self.time * (high - low))  # (filters / 2, kernel size / 2)
        even = (torch.sin(high * self.time) - torch.sin(low * self.time)) * shape
        odd = (torch.cos(low * self.time) - torch.cos(high * self.time)) * shape
        even = torch.cat([even, torch.ones_like(low), even.flip(1)], dim=1)
        odd = torch.cat([odd, torch.zeros_like(low), -odd.flip(1)], dim=1)
        return torch.cat([even, odd]).unsqueeze(1)

    def forward(self, x):
        return F.conv1d(x, self.filters(), stride=self.stride)


def _mel(hz: float) -> float:
    return 2595.0 * math.log10(1.0 + hz / 700.0)


def max_pool(x, frames: int):
    """Largest of each ``frames`` frames: (B, C, T) -> (B, C, T // frames)."""
    # As 2-D pooling: the ONNX exporter of torch 2.11 fixes the length of an input of max_pool1d.
    return F.max_pool2d(x.unsqueeze(2), (1, frames)).squeeze(2)


class AlphaScaling(nn.Module):
    """Alpha feature-map scaling: (B, C, T) plus a learned vector, times a gate of each channel's mean over time."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels, 1))
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        gate = torch.sigmoid(self.fc(x.float().mean(dim=2)))
        return (x + self.alpha.to(x.dtype)) * gate.unsqueeze(2).to(x.dtype)


class Bottle2neck(nn.Module):
    """1x1, Res2 convolution, 1x1, residual sum, max pooling over ``pool`` frames, alpha feature-map scaling."""

    def __init__(self, inputs: int, channels: int, dilation: int, pool: int, scale: int = 8):
        super().__init__()
        self.layers = nn.Sequential(
            ConvReluBN(inputs, channels),
            Res2Conv(channels, 3, dilation, scale, "zeros"),
            ConvReluBN(channels, channels),
        )
        self.residual = nn.Identity() if inputs == channels else nn.Conv1d(inputs, channels, 1, bias=False)
        self.pool = pool
        self.afms = AlphaScaling(channels)

    def forward(self, x):
        return self.afms(max_pool(self.layers(x) + self.residual(x), self.pool))


class RawNet3(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    def __init__(self, nOut, encoder_type, sinc_stride, channels):
        super().__init__()
        self.least = 251 + 14 * sinc_stride  # samples for the 15 frames that the two poolings make one of
        self.preprocess = nn.ModuleList([PreEmphasis(), nn.InstanceNorm1d(1, eps=1e-4, affine=True)])
        self.conv1 = SincFilters(channels // 4, 251, sinc_stride)
        self.layer1 = Bottle2neck(channels // 4, channels, dilation=2, pool=5)
        self.layer2 = Bottle2neck(channels, channels, dilation=3, pool=3)
        self.layer3 = Bottle2neck(channels, channels, dilation=4, pool=1)
        self.layer4 = nn.Conv1d(channels * 3, AGGREGATE, 1)
        self.attention = nn.Sequential(
            nn.Conv1d(AGGREGATE * 3, 128, 1),
            nn.ReLU(),
            nn.BatchNorm1d(128),
            nn.Conv1d(128, AGGREGATE if encoder_type == "ECA" else 1, 1),
        )
        self.bn5 = nn.BatchNorm1d(AGGREGATE * 2)
        self.fc6 = nn.Linear(AGGREGATE * 2, nOut)

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again."""
        return [self.layer1, self.layer2, self.layer3]

    def features(self, x):
        """Log magnitudes of the filters' outputs less their means over time, (B, T) -> (B, channels / 4, frames)."""
        if x.shape[1] < self.least:
            raise ValueError(f"RawNet3 needs at least {self.least} samples, got {x.shape[1]}")
        # In fp32: quiet speech and 1e-6 vanish in fp16, and filters of 251 taps add up.
        with torch.autocast(x.device.type, enabled=False):
            emphasize, normalize = self.preprocess
            x = self.conv1(normalize(emphasize(x.float()).unsqueeze(1)))
            x = (x.abs() + 1e-6).log()
            return x - x.mean(dim=2, keepdim=True)

    def pool(self, x):
        """Attentive statistics of (B, C, T) with the utterance's own in each frame, (B, 2 C), in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            mean, variance = mean_and_variance(x)
            context = torch.cat([mean, variance.clamp(*VARIANCES).sqrt()], dim=1)
            attended = torch.cat([x, context.unsqueeze(2).expand(-1, -1, x.shape[2])], dim=1)
            mean, deviation = weighted_statistics(x, self.attention(attended).softmax(dim=2), VARIANCES[0])
            return torch.cat([mean, deviation.clamp(max=math.sqrt(VARIANCES[1]))], dim=1)

    def forward(self, x):
        out1 = self.layer1(self.features(x))
        out2 = self.layer2(out1)
        first = max_pool(out1, 3)
        out3 = self.layer3(first + out2)
        x = F.relu(self.layer4(torch.cat([first, out2, out3], dim=1)))
        return self.fc6(self.bn5(self.pool(x)))


def MainModel(
    nOut=256,
    encoder_type="ECA",
    sinc_stride=10,
    channels=1024,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model: one attention weight for each channel and frame (``encoder_type`` ECA) or each frame (ASP).

    ``sinc_stride`` is the step between frames of the filters in samples, ``channels`` a multiple of 8.
    """
    if encoder_type not in ("ECA", "ASP"):
        raise ValueError(f"encoder_type: RawNet3 has ECA and ASP; got '{encoder_type}'; the published model's is ECA")
    if channels % 8:
        raise ValueError(f"channels: RawNet3 needs a multiple of 8, got {channels}")
    return RawNet3(nOut, encoder_type, sinc_stride, channels)
