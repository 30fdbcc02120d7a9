"""Kaldi's mel-frequency cepstral coefficients (Davis and Mermelstein 1980), the input of the x-vectors of Kaldi."""

import math

import torch

from frontend.chains import Chain


class FrontEnd(Chain):
    """The first ``n_mels`` coefficients of the cosine transform of ``mel_bins`` Kaldi filters, 0 for as many.

    ``lifter`` L multiplies coefficient k by 1 + L / 2 sin(pi k / L); 0 leaves it as it is. The first coefficient is
    that of the transform, not the energy.
    """

    def __init__(self, n_mels=30, mel_bins=0, lifter=22.0, sample_rate=16000):
        bins = mel_bins or n_mels
        if bins < n_mels:
            raise ValueError(f"mel_bins: must be at least n_mels ({n_mels}) or 0, got {mel_bins}")
        super().__init__("wespeaker", bins, sample_rate=sample_rate)
        number = torch.arange(n_mels, dtype=torch.float64)[:, None]
        place = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
        transform = torch.cos(math.pi * number * place) * math.sqrt(2.0 / bins)  # orthonormal
        transform[0] /= math.sqrt(2.0)
        if lifter:
            transform *= 1.0 + 0.5 * lifter * torch.sin(math.pi * number / lifter)
        self.register_buffer("transform", transform.float(), persistent=False)  # (n_mels, bins)

    def compute(self, x):
        return self.transform @ super().compute(x)
