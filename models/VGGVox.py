"""VGGVox, the VGG-M of the VoxCeleb papers (Nagrani et al. 2017), in voxceleb_trainer's form."""

import torch
from torch import nn

from models.frontend import FrontEnd, repeat_to
from models.pooling import make_pooling

MIN_FRAMES = 63  # what five times a window of 3 with stride 2 needs
ENCODERS = ("SAP", "TAP", "ASP", "MAX")


class VGGVox(nn.Module):
    """Waveform (B, T) -> embedding (B, nOut)."""

    def __init__(self, nOut, encoder_type, n_mels, num_filters, frontend):
        super().__init__()
        self.frontend = frontend
        c1, c2, c3, c4, c5, c6 = num_filters
        bands = n_mels
        for _ in range(3):  # windows of 3 with stride 2 over frequency
            bands = (bands - 3) // 2 + 1
        self.layers = nn.Sequential(
            *convolution(1, c1, (5, 7), (1, 2), 2),
            nn.MaxPool2d((1, 3), (1, 2)),
            *convolution(c1, c2, 5, 2, 1),
            nn.MaxPool2d(3, 2),
            *convolution(c2, c3, 3, 1, 1),
            *convolution(c3, c4, 3, 1, 1),
            *convolution(c4, c5, 3, 1, 1),
            nn.MaxPool2d(3, 2),
            *convolution(c5, c6, (bands, 1), 1, 0),  # over all bands that are left, 4 of 40 mel
        )
        if encoder_type == "MAX":
            self.pooling = nn.Sequential(nn.AdaptiveMaxPool1d(1), nn.Flatten())
            width = c6
        else:
            self.pooling = make_pooling(encoder_type, c6)
            width = self.pooling.output_channels
        self.fc = nn.Linear(width, nOut)

    def forward(self, x):
        x = repeat_to(self.frontend(x), MIN_FRAMES).unsqueeze(1)  # (B, 1, mels, frames)
        return self.fc(self.pooling(self.layers(x).squeeze(2)))


def convolution(inputs, outputs, kernel_size, stride, padding):
    """2-D convolution, BN, ReLU."""
    return (
        nn.Conv2d(inputs, outputs, kernel_size, stride, padding),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def MainModel(
    nOut=1024,
    encoder_type="SAP",
    n_mels=40,
    log_input=True,
    num_filters=(96, 256, 384, 256, 256, 512),
    features="voxceleb_trainer",
    input_norm="meanvar",
    spec_augment=(0, 0),
    sample_rate=16000,
    frontend=None,
    **others,  # keys of other plug-ins, which files that build on this one hand on
):
    """Build the model; ``encoder_type`` SAP, TAP, ASP or MAX, ``num_filters`` the width of each convolution."""
    if encoder_type not in ENCODERS:
        raise ValueError(f"encoder_type: must be one of {', '.join(ENCODERS)}; got '{encoder_type}'")
    if n_mels < 15:
        raise ValueError(f"n_mels: VGGVox needs at least 15, got {n_mels}")
    frontend = FrontEnd(
        *(features, n_mels, input_norm, log_input, False, tuple(spec_augment)),
        window_fn=torch.hann_window,
        sample_rate=sample_rate,
        plugin=frontend,
    )
    return VGGVox(nOut, encoder_type, n_mels, tuple(num_filters), frontend)
