"""Pooling over time: frame features (B, C, T) -> one vector a row. Statistics are computed in fp32.

The variance is the mean of squared distances from the mean, not E[x^2] - mean^2, which cancels in fp32 and overflows
in fp16 from |x| = 256; it is clamped before the root, so that constant features have deviation ~0 and gradient 0.
Each takes (B, C, T) or (B, C, F, T), whose channels are C F; ``make_pooling`` builds one by its name.
"""

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

MIN_VARIANCE = 1e-7


def weighted_statistics(x, weights, min_variance=MIN_VARIANCE):
    """Mean and deviation of x (B, C, T) under weights (B, C or 1, T) that sum to 1 over T: two (B, C) in fp32."""
    with torch.autocast(x.device.type, enabled=False):
        x, weights = x.float(), weights.float()
        mean = (x * weights).sum(dim=2)
        variance = ((x - mean.unsqueeze(2)).square() * weights).sum(dim=2)
        return mean, variance.clamp(min=min_variance).sqrt()


def softmax_over_time(logits):
    """Softmax of (B, C, T) over T in fp32."""
    with torch.autocast(logits.device.type, enabled=False):
        return logits.float().softmax(dim=2)


def mean_and_variance(x, unbiased=True):
    """Mean and variance over time of x (B, C, T): two (B, C) in fp32; a single frame has variance 0, not 0/0."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        mean = x.mean(dim=2)
        count = max(x.shape[2] - 1, 1) if unbiased else x.shape[2]
        return mean, (x - mean.unsqueeze(2)).square().sum(dim=2) / count


class TAP(nn.Module):
    """Temporal average pooling: the mean over time, (B, C, T) -> (B, C)."""

    outputs_per_channel = 1

    def forward(self, x):
        return x.flatten(1, -2).float().mean(dim=2)


class TSDP(nn.Module):
    """Temporal deviation pooling: the unbiased deviation over time, (B, C, T) -> (B, C)."""

    outputs_per_channel = 1

    def forward(self, x):
        _, variance = mean_and_variance(x.flatten(1, -2))
        return (variance + MIN_VARIANCE).sqrt()


class TSTP(nn.Module):
    """Statistics pooling (Snyder et al. 2018): mean and unbiased deviation over time, (B, C, T) -> (B, 2 C)."""

    outputs_per_channel = 2

    def forward(self, x):
        mean, variance = mean_and_variance(x.flatten(1, -2))
        return torch.cat([mean, (variance + MIN_VARIANCE).sqrt()], dim=1)


class SAP(nn.Module):
    """Self-attentive pooling (Cai et al. 2018): one attention weight a frame, (B, C, T) -> (B, C)."""

    outputs_per_channel = 1
    min_variance = 1e-5  # voxceleb_trainer's

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.attention = nn.Parameter(nn.init.xavier_normal_(torch.empty(channels, 1)))

    def logits(self, x):
        """Attention logits (B, 1, T) of frames (B, C, T)."""
        return (torch.tanh(self.linear(x.transpose(1, 2))) @ self.attention).transpose(1, 2)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.flatten(1, -2).float()
            return (x * softmax_over_time(self.logits(x))).sum(dim=2)


class ASP(SAP):
    """Attentive statistics pooling with one weight a frame (Okabe et al. 2018): (B, C, T) -> (B, 2 C)."""

    outputs_per_channel = 2

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.flatten(1, -2).float()
            return torch.cat(weighted_statistics(x, softmax_over_time(self.logits(x)), self.min_variance), dim=1)


class ChannelAttention(nn.Module):
    """Attention per channel through a 128-wide bottleneck with ReLU and BN, as in ResNetSE34V2.

    ``statistics`` True gives mean and deviation (B, 2 C), False the mean alone (B, C).
    """

    def __init__(self, channels: int, statistics: bool, bottleneck: int = 128):
        super().__init__()
        self.statistics = statistics
        self.attention = nn.Sequential(
            nn.Conv1d(channels, bottleneck, 1),
            nn.ReLU(),
            nn.BatchNorm1d(bottleneck),
            nn.Conv1d(bottleneck, channels, 1),
        )

    def forward(self, x):
        # In fp32, for no tanh bounds what a convolution in fp16 would overflow to.
        with torch.autocast(x.device.type, enabled=False):
            x = x.flatten(1, -2).float()
            mean, deviation = weighted_statistics(x, self.attention(x).softmax(dim=2), SAP.min_variance)
            return torch.cat([mean, deviation], dim=1) if self.statistics else mean


class AttentiveStatistics(nn.Module):
    """ECAPA's channel- and context-dependent statistics pooling (Desplanques et al. 2020, section 3.1).

    (B, C, T) -> (B, 2 C). ``global_context`` appends the utterance's mean and deviation to every frame. ``norm`` puts
    ReLU and BN before the tanh; ``unbiased`` is the deviation of the context, ``min_variance`` what variances are
    clamped to: in these the toolkits differ.
    """

    outputs_per_channel = 2

    def __init__(
        self, channels: int, bottleneck=128, global_context=True, norm=False, unbiased=True, min_variance=MIN_VARIANCE
    ):
        super().__init__()
        self.global_context, self.unbiased, self.min_variance = global_context, unbiased, min_variance
        self.norm = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(bottleneck)) if norm else nn.Identity()
        self.linear1 = nn.Conv1d(channels * (3 if global_context else 1), bottleneck, 1)
        self.linear2 = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x):
        x = x.flatten(1, -2)
        hidden = self.with_context(x) if self.global_context else self.linear1(x)
        weights = softmax_over_time(self.linear2(torch.tanh(self.norm(hidden))))
        return torch.cat(weighted_statistics(x, weights, self.min_variance), dim=1)

    def with_context(self, x):
        """``linear1`` of frames (B, C, T) with the context appended to each: (B, bottleneck, T).

        The context is the same in all frames, so its two thirds of the product are computed once an utterance. Hooks of
        ``linear1`` do not see it.
        """
        channels, weight = self.linear2.out_channels, self.linear1.weight
        context = F.linear(self.context(x).to(x.dtype), weight[:, channels:, 0])
        return F.conv1d(x, weight[:, :channels], self.linear1.bias) + context.unsqueeze(2)

    def context(self, x):
        """Mean and deviation of the whole utterance, (B, C, T) -> (B, 2 C) in fp32."""
        mean, variance = mean_and_variance(x, self.unbiased)
        return torch.cat([mean, variance.clamp(min=self.min_variance).sqrt()], dim=1)


class MultiHeadStatistics(nn.Module):
    """Statistics pooling whose channels are cut into heads of an attention each (India et al. 2019).

    (B, C, T) -> (B, 2 C): the mean and deviation of the first head, then those of the next. A head's attention is two
    layers with tanh between; ``d_s`` 1 gives one weight a frame, more gives one for each of the head's channels.
    """

    outputs_per_channel = 2

    def __init__(self, channels: int, head_num: int, d_s: int, bottleneck: int):
        super().__init__()
        if channels % head_num:
            raise ValueError(f"MQMHASTP: {channels} channels do not divide into {head_num} heads")
        width = channels // head_num
        self.heads_att_trans = nn.ModuleList(
            nn.Sequential(
                OrderedDict(
                    att_0=nn.Conv1d(width, bottleneck, 1),
                    tanh0=nn.Tanh(),
                    att_1=nn.Conv1d(bottleneck, width if d_s > 1 else 1, 1),
                )
            )
            for _ in range(head_num)
        )

    def forward(self, x):
        found = []
        for head, attention in zip(x.chunk(len(self.heads_att_trans), dim=1), self.heads_att_trans):
            found += weighted_statistics(head, softmax_over_time(attention(head)))
        return torch.cat(found, dim=1)


class MQMHASTP(nn.Module):
    """Multi-query multi-head attentive statistics pooling (Zhao et al. 2022): (B, C, T) -> (B, 2 C query_num).

    Each query attends for itself; ``head_num`` heads share the channels out, ``d_s`` as in MultiHeadStatistics.
    """

    def __init__(self, channels: int, query_num=2, head_num=8, d_s=2, bottleneck=64):
        super().__init__()
        self.outputs_per_channel = 2 * query_num
        self.n_query = nn.ModuleList(MultiHeadStatistics(channels, head_num, d_s, bottleneck) for _ in range(query_num))

    def forward(self, x):
        x = x.flatten(1, -2)
        return torch.cat([query(x) for query in self.n_query], dim=1)


# By the names that wespeaker gives them; SAP and ASP are voxceleb_trainer's.
POOLINGS = {
    "TAP": lambda channels: TAP(),
    "TSDP": lambda channels: TSDP(),
    "TSTP": lambda channels: TSTP(),
    "SAP": SAP,
    "ASP": ASP,
    "ASTP": partial(AttentiveStatistics, global_context=False),
    "ASTP_GLOB": AttentiveStatistics,
    "MQMHASTP": MQMHASTP,
}


def make_pooling(name: str, channels: int, **options) -> nn.Module:
    """Build the pooling ``name`` of POOLINGS over ``channels`` (times mel bands); ``output_channels`` is its width.

    ``options`` are the keyword arguments of its class. ValueError names what there is.
    """
    if name not in POOLINGS:
        raise ValueError(f"pooling: must be one of {', '.join(POOLINGS)}; got '{name}'")
    pooling = POOLINGS[name](channels, **options)
    pooling.output_channels = channels * pooling.outputs_per_channel
    return pooling
