"""Waveform to log-mel features; the only file that imports torchaudio. Everything here computes in fp32."""

import torch
import torch.nn.functional as F
import torchaudio
from torch import nn

from utils import PreEmphasis

SAMPLE_RATE = 16000


class FrontEnd(nn.Module):
    """Features of a waveform batch: (B, T) -> (B, n_mels, frames), fp32 whatever the autocast.

    ``kind``: 'logmel' is voxceleb_trainer's (512-point FFT of 25 ms Hamming windows every 10 ms, power mel),
    'fbank' is Kaldi's (no centring, DC removal, pre-emphasis 0.97 in each frame, 16-bit sample scale).
    ``norm``: 'mean' subtracts each band's mean over time, 'meanvar' divides by its deviation too, 'none' neither.
    ``spec_augment``: (frequency bands, frames) of the widest mask of each kind, drawn in training mode only.
    """

    def __init__(
        self, kind="logmel", n_mels=40, norm="meanvar", log_input=True, preemphasis=False, spec_augment=(0, 0)
    ):
        super().__init__()
        if kind not in ("logmel", "fbank") or norm not in ("none", "mean", "meanvar"):
            raise ValueError(f"front end: unknown kind '{kind}' or norm '{norm}'")
        self.kind, self.norm, self.log_input = kind, norm, log_input
        self.spec_augment = spec_augment
        self.preemphasis = PreEmphasis() if preemphasis else None
        if kind == "logmel":
            self.spectrogram = torchaudio.transforms.MelSpectrogram(
                SAMPLE_RATE, n_fft=512, win_length=400, hop_length=160, window_fn=torch.hamming_window, n_mels=n_mels
            )
            _forget_buffers(self.spectrogram)
        else:
            banks, _ = torchaudio.compliance.kaldi.get_mel_banks(
                n_mels, 512, float(SAMPLE_RATE), 20.0, 0.0, 100.0, -500.0, 1.0
            )
            self.register_buffer("banks", F.pad(banks, (0, 1)).T.contiguous(), persistent=False)  # (257, n_mels)
            self.register_buffer("window", torch.hamming_window(400, periodic=False), persistent=False)

    def forward(self, x):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.float()
            if self.preemphasis is not None:
                x = self.preemphasis(x)
            features = self._logmel(x) if self.kind == "logmel" else self._fbank(x)
            if self.norm != "none":
                features = features - features.mean(dim=2, keepdim=True)
            if self.norm == "meanvar":
                # The 1e-5 of instance normalisation: a constant band becomes 0, not 0/0.
                features = features * (features.square().mean(dim=2, keepdim=True) + 1e-5).rsqrt()
            if self.training and any(self.spec_augment):
                features = self._mask(features)
            return features

    def _logmel(self, x):
        features = self.spectrogram(x) + 1e-6
        return features.log() if self.log_input else features

    def _fbank(self, x):
        if x.shape[1] < 400:
            raise ValueError(f"fbank needs at least 400 samples, got {x.shape[1]}")
        frames = (x * 32768.0).unfold(1, 400, 160)  # (B, frames, 400); Kaldi's samples are 16-bit integers
        frames = frames - frames.mean(dim=2, keepdim=True)
        previous = torch.cat([frames[:, :, :1], frames[:, :, :-1]], dim=2)
        frames = (frames - 0.97 * previous) * self.window
        power = torch.fft.rfft(frames, n=512).abs().square()  # (B, frames, 257)
        return (power @ self.banks).clamp(min=torch.finfo(torch.float32).eps).log().transpose(1, 2)

    def _mask(self, features):
        """SpecAugment (Park et al. 2019): one frequency and one time mask a row, filled with the row's mean."""
        batch, device = features.shape[0], features.device
        for axis, widest in zip((1, 2), self.spec_augment):
            if widest:
                size = features.shape[axis]
                width = torch.randint(0, min(widest, size - 1) + 1, (batch, 1), device=device)
                start = (torch.rand(batch, 1, device=device) * (size - width + 1)).long()
                position = torch.arange(size, device=device)
                masked = (position >= start) & (position < start + width)  # (B, size)
                masked = masked.unsqueeze(2) if axis == 1 else masked.unsqueeze(1)
                features = torch.where(masked, features.mean(dim=(1, 2), keepdim=True), features)
        return features


def _forget_buffers(module):
    """Keep constants that the constructor makes (windows, mel filters) out of checkpoints."""
    for part in module.modules():
        part._non_persistent_buffers_set.update(part._buffers)
