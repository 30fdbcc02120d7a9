"""Pooling over time: frame features (B, C, T) -> one vector a row. Statistics are computed in fp32.

The variance is the mean of squared distances from the mean, not E[x^2] - mean^2, which cancels in fp32 and overflows
in fp16 from |x| = 256; it is clamped before the root, so that constant features have deviation ~0 and gradient 0.
"""

import torch
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


class TSTP(nn.Module):
    """Temporal statistics pooling: mean and unbiased deviation over time, (B, C, F, T) or (B, C, T) -> (B, 2 C F)."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().flatten(1, -2)
            mean = x.mean(dim=2)
            # Unbiased as in wespeaker; a single frame has deviation 0, not 0/0.
            variance = (x - mean.unsqueeze(2)).square().sum(dim=2) / max(x.shape[2] - 1, 1)
            return torch.cat([mean, (variance + MIN_VARIANCE).sqrt()], dim=1)


class SAP(nn.Module):
    """Self-attentive pooling (Cai et al. 2018): one attention weight a frame, (B, C, T) -> (B, C)."""

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
            return (x.float() * softmax_over_time(self.logits(x.float()))).sum(dim=2)


class ASP(SAP):
    """Attentive statistics pooling with one weight a frame (Okabe et al. 2018): (B, C, T) -> (B, 2 C)."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return torch.cat(
                weighted_statistics(x, softmax_over_time(self.logits(x.float())), self.min_variance), dim=1
            )


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
        mean, deviation = weighted_statistics(x, softmax_over_time(self.attention(x)), SAP.min_variance)
        return torch.cat([mean, deviation], dim=1) if self.statistics else mean


class AttentiveStatistics(nn.Module):
    """ECAPA's channel- and context-dependent statistics pooling (Desplanques et al. 2020, section 3.1).

    (B, C, T) -> (B, 2 C). ``global_context`` appends the utterance's mean and deviation to every frame. ``norm`` puts
    ReLU and BN before the tanh; ``unbiased`` is the deviation of the context, ``min_variance`` what variances are
    clamped to: in these the toolkits differ.
    """

    def __init__(
        self, channels: int, bottleneck=128, global_context=True, norm=False, unbiased=True, min_variance=MIN_VARIANCE
    ):
        super().__init__()
        self.global_context, self.unbiased, self.min_variance = global_context, unbiased, min_variance
        self.norm = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(bottleneck)) if norm else nn.Identity()
        self.linear1 = nn.Conv1d(channels * (3 if global_context else 1), bottleneck, 1)
        self.linear2 = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x):
        attended = x
        if self.global_context:
            context = self.context(x).to(x.dtype).unsqueeze(2).expand(-1, -1, x.shape[2])
            attended = torch.cat([x, context], dim=1)
        weights = softmax_over_time(self.linear2(torch.tanh(self.norm(self.linear1(attended)))))
        return torch.cat(weighted_statistics(x, weights, self.min_variance), dim=1)

    def context(self, x):
        """Mean and deviation of the whole utterance, (B, C, T) -> (B, 2 C) in fp32."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            mean = x.mean(dim=2)
            count = max(x.shape[2] - 1, 1) if self.unbiased else x.shape[2]
            variance = (x - mean.unsqueeze(2)).square().sum(dim=2) / count
            return torch.cat([mean, variance.clamp(min=self.min_variance).sqrt()], dim=1)
