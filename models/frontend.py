"""Waveform to normalised features, in fp32 whatever the autocast."""

import contextlib

import torch
from torch import nn

from config import SAMPLE_RATE
from frontend.chains import (
    PRESETS,
    Chain,
    ConvolutionSpectrogram,
    htk_mel_filters,
    kaldi_mel_filters,
    with_convolutions,
)

__all__ = ["PRESETS", "ConvolutionSpectrogram", "FrontEnd", "htk_mel_filters", "kaldi_mel_filters", "with_convolutions"]

NORMS = ("none", "mean", "meanvar")


class FrontEnd(Chain):
    """Normalised features of a waveform batch: (B, T) -> (B, n_mels, frames), fp32 whatever the autocast.

    The features are those of a ``Chain``, whose arguments are its own here, or of a ``plugin``, a module of frontend/
    that computes (B, n_mels, frames) in their place; one with ``autocast = True`` computes in the precision of the run.

    ``norm``: 'mean' subtracts each band's mean over time, 'meanvar' divides by its deviation too, 'none' neither.
    ``spec_augment``: (frequency bands, frames) of the widest mask of each kind, drawn in training mode only.
    """

    def __init__(
        self,
        features="voxceleb_trainer",
        n_mels=40,
        norm="meanvar",
        log_input=True,
        preemphasis=False,
        spec_augment=(0, 0),
        window_fn=torch.hamming_window,
        sample_rate=SAMPLE_RATE,
        plugin=None,
        **options,
    ):
        if plugin is None:
            super().__init__(features, n_mels, log_input, preemphasis, window_fn, sample_rate, **options)
        else:
            nn.Module.__init__(self)
        if norm not in NORMS:
            raise ValueError(f"input_norm: must be one of {', '.join(NORMS)}; got '{norm}'")
        if min(spec_augment) < 0:
            raise ValueError(f"spec_augment: must be two widths of at least 0, got {list(spec_augment)}")
        self.norm, self.spec_augment, self.plugin = norm, spec_augment, plugin
        self.learns = plugin is not None and any(True for _ in plugin.parameters())

    def forward(self, x):
        learns = self.learns and torch.is_grad_enabled()
        with contextlib.nullcontext() if learns else torch.no_grad():
            x = x.float()
            mixed = self.plugin(x) if getattr(self.plugin, "autocast", False) else None
            with torch.autocast(x.device.type, enabled=False):
                if mixed is not None:
                    features = mixed.float()
                else:
                    features = self.compute(x) if self.plugin is None else self.plugin(x)
                features = self.normalize(features)
                if self.training and any(self.spec_augment):
                    features = self._mask(features)
                return features

    def normalize(self, features):
        """Features (B, n_mels, frames) as ``norm`` says."""
        if self.norm != "none":
            features = features - features.mean(dim=2, keepdim=True)
        if self.norm == "meanvar":
            # The 1e-5 of instance normalisation: a constant band becomes 0, not 0/0.
            features = features * (features.square().mean(dim=2, keepdim=True) + 1e-5).rsqrt()
        return features

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


def repeat_to(features, frames):
    """Repeat features (B, n_mels, T) from their start until there are ``frames`` of them; longer ones stay as they are.

    Too short a file is repeated in the same way when it is read for training.
    """
    length = features.shape[2]
    if not torch.jit.is_tracing():  # what is traced for export must serve every length, so it may not choose
        return features if length >= frames else features.repeat(1, 1, -(-frames // length))[:, :, :frames]
    repeated = features.repeat(1, 1, (frames + length - 1) // length)
    return repeated[:, :, : torch.maximum(torch.as_tensor(length), torch.tensor(frames))]


def exporting() -> bool:
    """Whether torch.export reads the model (torch 2.7 and later say so): then no size may depend on the length."""
    return getattr(torch.compiler, "is_exporting", bool)()
