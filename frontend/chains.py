"""Chains of features of other toolkits. Their filters and windows are their own: no torchaudio."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from config import SAMPLE_RATE, frame_samples
from utils import PreEmphasis


def htk_mel_filters(
    n_mels: int, low: float, high: float, bins: int = 257, sample_rate: int = SAMPLE_RATE
) -> torch.Tensor:
    """Triangular filters from ``low`` to ``high`` Hz, equally spaced in mel: (bins, n_mels).

    Mel is 2595 log10(1 + f / 700) (O'Shaughnessy 1987), the triangles are linear in Hz: torchaudio's filter bank.
    """
    ends = (2595.0 * math.log10(1.0 + f / 700.0) for f in (low, high))
    edges = 700.0 * (10.0 ** (torch.linspace(*ends, n_mels + 2) / 2595.0) - 1.0)
    distance = edges - torch.linspace(0.0, sample_rate // 2, bins)[:, None]  # (bins, n_mels + 2)
    width = edges.diff()
    return torch.minimum(-distance[:, :-2] / width[:-1], distance[:, 2:] / width[1:]).clamp(min=0.0)


def kaldi_mel_filters(
    n_mels: int, low: float = 20.0, size: int = 512, sample_rate: int = SAMPLE_RATE, high: float | None = None
) -> torch.Tensor:
    """Kaldi's filters from ``low`` to ``high`` Hz (None: half the rate) for a Fourier transform of ``size`` points.

    (size / 2 + 1, n_mels). Mel is 1127 ln(1 + f / 700), and the triangles are linear in mel, not in Hz. The last bin
    belongs to none.
    """
    bottom, top = (1127.0 * math.log(1.0 + f / 700.0) for f in (low, sample_rate / 2 if high is None else high))
    step = (top - bottom) / (n_mels + 1)
    left = bottom + torch.arange(n_mels) * step
    centre, right = bottom + (torch.arange(n_mels) + 1.0) * step, bottom + (torch.arange(n_mels) + 2.0) * step
    mel = 1127.0 * (1.0 + sample_rate / size * torch.arange(size // 2) / 700.0).log()[:, None]
    banks = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp(min=0.0)
    return F.pad(banks, (0, 0, 0, 1))


def _speechbrain_filters(n_mels: int, bins: int, sample_rate: int) -> torch.Tensor:
    """Triangles equally spaced in mel up to half the rate, each as wide to the right as to the left: (bins, n_mels)."""
    top = 2595.0 * math.log10(1.0 + sample_rate / 2 / 700.0)
    edges = 700.0 * (10.0 ** (torch.linspace(0.0, top, n_mels + 2) / 2595.0) - 1.0)
    width, centre = edges[1:-1] - edges[:-2], edges[1:-1]
    distance = (torch.linspace(0.0, sample_rate / 2, bins)[:, None] - centre) / width
    return (1.0 - distance.abs()).clamp(min=0.0)


def _redimnet2_filters(n_mels: int, bins: int, sample_rate: int) -> torch.Tensor:
    """Triangles linear in mel from 20 Hz to 95 % of half the rate: (bins, n_mels).

    As in the authors' code the bins but for the last are taken to lie evenly from 0 to half the rate, so a bin is a
    little higher than its frequency; the first and the last belong to no filter.
    """

    ends = (2595.0 * math.log10(1.0 + f / 700.0) for f in (20.0, 0.95 * sample_rate / 2))
    edges = torch.linspace(*ends, n_mels + 2, dtype=torch.float64)
    mel = 2595.0 * (1.0 + torch.linspace(0.0, sample_rate // 2, bins - 1, dtype=torch.float64) / 700.0).log10()
    distance = mel[:, None] - edges  # (bins - 1, n_mels + 2)
    width = edges.diff()
    banks = torch.minimum(distance[:, :-2] / width[:-1], -distance[:, 2:] / width[1:]).clamp(min=0.0)
    banks[0] = 0.0
    return F.pad(banks, (0, 0, 0, 1)).float()


def _htk_filters(n_mels: int, bins: int, sample_rate: int, low=20.0, part=0.95) -> torch.Tensor:
    """torchaudio's filters from ``low`` Hz to a ``part`` of half the rate: (bins, n_mels)."""
    return htk_mel_filters(n_mels, low, part * (sample_rate / 2), bins, sample_rate)


def _kaldi_filters(n_mels: int, bins: int, sample_rate: int, below=0.0) -> torch.Tensor:
    """Kaldi's filters from 20 Hz to so many Hz ``below`` half the rate: (bins, n_mels)."""
    return kaldi_mel_filters(n_mels, 20.0, 2 * (bins - 1), sample_rate, sample_rate / 2 - below)


symmetric_hamming = partial(torch.hamming_window, periodic=False)


def povey(width: int) -> torch.Tensor:
    """Kaldi's own window: Hann's to the power of 0.85."""
    return torch.hann_window(width, periodic=False).pow(0.85)


def _kaldi_log(power):
    return power.clamp(min=torch.finfo(torch.float32).eps).log()


def _bounded_log(power):
    return (power.clamp(1e-8, 1e8) + 1e-8).log()


def _decibels(power):
    """Decibels, at most 80 below the loudest of the waveform."""
    decibels = 10.0 * power.clamp(min=1e-10).log10()
    return decibels.maximum(decibels.amax(dim=(1, 2), keepdim=True) - 80.0)


@dataclass(frozen=True)
class Preset:
    """What a toolkit does its own way between a waveform and features; ``Chain`` is the whole way.

    ``banks``: (number of filters, bins of the spectrum, rate) -> mel filters (bins, filters).
    ``log``: of the mel power. An ``offset`` is added to that before; then ``log_input`` may leave the logarithm out.
    ``window``: of so many samples; None for the one that a model asks for.
    ``pad_mode``: how the ends are padded for frames that lie around each step; "" for frames within the waveform.
    ``ends``: what a waveform of such frames gets at its ends: "zeros" of half a step, or "mirrored" as by Kaldi.
    ``size_of_window``: the Fourier transform has as many points as the window, not the next power of 2.
    ``preemphasis``: of the whole waveform. ``in_frames``: of each frame, once its mean is taken off, as by Kaldi.
    ``full_scale``: what a sample of 1 becomes. ``bounds``: of the power spectrum.
    ``least_level``: is added to the deviation that ``wave_norm`` divides by.
    """

    banks: Callable[[int, int, int], torch.Tensor]
    log: Callable[[torch.Tensor], torch.Tensor]
    window: Callable[[int], torch.Tensor] | None = None
    pad_mode: str = ""
    ends: str = ""
    size_of_window: bool = False
    preemphasis: bool = False
    in_frames: bool = False
    full_scale: float = 1.0
    bounds: tuple[float, float] | None = None
    offset: float | None = None
    least_level: float = 1e-6


KALDI = partial(Preset, log=_kaldi_log, in_frames=True)
TAORUIJIE = Preset(_htk_filters, torch.log, pad_mode="reflect", preemphasis=True, offset=1e-6)
PRESETS = {
    "voxceleb_trainer": Preset(partial(_htk_filters, low=0.0, part=1.0), torch.log, pad_mode="reflect", offset=1e-6),
    "taoruijie": TAORUIJIE,
    "redimnet": TAORUIJIE,
    "speechbrain": Preset(
        banks=_speechbrain_filters,
        log=_decibels,
        window=torch.hamming_window,
        pad_mode="constant",
        size_of_window=True,
    ),
    "redimnet2": Preset(
        banks=_redimnet2_filters,
        log=_bounded_log,
        window=symmetric_hamming,
        ends="zeros",
        preemphasis=True,
        bounds=(1e-8, 1e8),
        least_level=1e-8,
    ),
    "wespeaker": KALDI(_kaldi_filters, window=symmetric_hamming, full_scale=32768.0),  # as of 16-bit integers
    "3dspeaker": KALDI(_kaldi_filters, window=povey),
    "sherpa-onnx": KALDI(partial(_kaldi_filters, below=400.0), window=povey, ends="mirrored"),
}


class Chain(nn.Module):
    """Mel features of a waveform batch: (B, T) -> (B, n_mels, frames), fp32 whatever the autocast.

    ``features`` names the toolkit whose chain is computed; windows are 25 ms every ``frame_step`` ms:

    ``voxceleb_trainer``  power mel 0 to 8000 Hz of a 512-point FFT, Hamming; ``log_input`` takes the logarithm
    ``taoruijie``         pre-emphasis 0.97, log power mel 20 to 7600 Hz of a 512-point FFT, Hamming
    ``speechbrain``       decibels of triangular filters on a 400-point FFT, Hamming, at most 80 dB below the loudest
    ``wespeaker``         Kaldi's fbank (no centring, DC removal, pre-emphasis in each frame) of 16-bit samples, Hamming
    ``3dspeaker``         the same of samples in [-1, 1], Povey's window
    ``sherpa-onnx``       that up to 400 Hz below half the rate, one frame for each 10 ms, the ends mirrored
    ``redimnet``          taoruijie's
    ``redimnet2``         pre-emphasis 0.97, half a step of zeros at either end, log power mel 20 to 7600 Hz of a
                          512-point FFT, Hamming, filters linear in mel, every step between 1e-8 and 1e8

    ``wave_norm`` first brings each waveform to mean 0 and deviation 1.
    ``window_fn`` is the window of voxceleb_trainer, taoruijie and redimnet: voxceleb_trainer's VGGVox has Hann's.
    ``sample_rate`` in Hz: the sizes above are those of 16 kHz. In general 512 is the power of 2 above the window, 400
    the window itself, 8000 Hz half the rate and 7600 Hz 95 % of that.
    """

    def __init__(
        self,
        features="voxceleb_trainer",
        n_mels=40,
        log_input=True,
        preemphasis=False,
        window_fn=torch.hamming_window,
        sample_rate=SAMPLE_RATE,
        frame_step=10,
        wave_norm=False,
    ):
        super().__init__()
        if features not in PRESETS:
            raise ValueError(f"features: must be one of {', '.join(PRESETS)}; got '{features}'")
        if not 1 <= frame_step <= 25:
            raise ValueError(f"frame_step: must be from 1 to 25 ms, the length of a window; got {frame_step}")
        self.features, self.log_input, self.sample_rate = features, log_input, sample_rate
        self.wave_norm = wave_norm
        hop, width = frame_samples(sample_rate)
        self.hop = round(hop * frame_step / 10)
        preset = self.preset
        self.size = width if preset.size_of_window else 1 << (width - 1).bit_length()  # of the Fourier transform
        self.spectrum: nn.Module | None = None  # in the place of Fourier transforms
        self.preemphasis = PreEmphasis() if preemphasis else None
        if preset.preemphasis:
            self.preemphasis = _forget_buffers(PreEmphasis())
        self.register_buffer("banks", preset.banks(n_mels, self.size // 2 + 1, sample_rate), persistent=False)
        self.register_buffer("window", (preset.window or window_fn)(width), persistent=False)

    @property
    def preset(self) -> Preset:
        """What makes the features those of their toolkit."""
        return PRESETS[self.features]

    def forward(self, x):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return self.compute(x.float())

    def compute(self, x):
        """The features of a waveform batch float32."""
        preset = self.preset
        if self.wave_norm:
            x = x - x.mean(dim=1, keepdim=True)
            x = x / (x.square().mean(dim=1, keepdim=True).clamp(min=1e-24).sqrt() + preset.least_level)
        if self.preemphasis is not None:
            x = self.preemphasis(x)
        power = self._mel_power(x)  # (B, n_mels, frames)
        if preset.offset is not None:
            power = power + preset.offset
            if not self.log_input:
                return power
        return preset.log(power)

    def _mel_power(self, x):
        preset, width = self.preset, len(self.window)
        if preset.full_scale != 1.0:
            x = x * preset.full_scale
        if not preset.pad_mode and self.spectrum is None and x.shape[1] < width:
            raise ValueError(f"fbank needs at least {width} samples, got {x.shape[1]}")
        if preset.ends == "mirrored":
            x = self._mirrored(x)
        elif preset.ends == "zeros":
            x = F.pad(x, (self.hop // 2, self.hop // 2))
        if self.spectrum is not None:
            power = self.spectrum(x)  # (B, bins, frames)
        elif preset.pad_mode:
            how = {"window": self.window, "pad_mode": preset.pad_mode, "return_complex": True}
            power = torch.stft(x, self.size, self.hop, width, **how).abs().square()
        else:
            power = self._power_of_frames(x).transpose(1, 2)
        if preset.bounds is not None:
            power = power.clamp(*preset.bounds)
        return (power.transpose(1, 2) @ self.banks).transpose(1, 2)

    def _mirrored(self, x):
        """A waveform with mirrored ends (B, T'), so that a frame lies around the middle of each 10 ms.

        Kaldi's ``snip_edges`` false: (T + hop / 2) / hop frames, in whole numbers.
        """
        width, half = len(self.window), self.hop // 2
        left = width // 2 - half
        right = width - half - left
        return torch.cat([x[:, :left].flip(1), x, x[:, -right:].flip(1)], dim=1)

    def _power_of_frames(self, x):
        """Power of the frames that lie within x (B, T): (B, frames, bins)."""
        frames = x.unfold(1, len(self.window), self.hop)  # (B, frames, width)
        if self.preset.in_frames:
            frames = frames - frames.mean(dim=2, keepdim=True)
            previous = torch.cat([frames[:, :, :1], frames[:, :, :-1]], dim=2)
            frames = frames - 0.97 * previous
        return torch.fft.rfft(frames * self.window, n=self.size).abs().square()

    def take_convolutions(self):
        """Compute Fourier transforms as one strided convolution from now on.

        Removing a frame's mean, pre-emphasis inside it and the window are linear, so they are part of the filters.
        """
        mode = self.preset.pad_mode
        within = torch.eye(len(self.window), dtype=torch.float64)  # (sample, sample), from a frame to a frame
        if self.preset.in_frames:
            within = within - 1.0 / len(within)
            within = within - 0.97 * torch.cat([within[:1], within[:-1]])
        self.spectrum = ConvolutionSpectrogram(self.window, self.size, self.hop, mode, within, middle=bool(mode))


def _forget_buffers(module):
    """Keep constants that the constructor makes (windows, mel filters) out of checkpoints."""
    for part in module.modules():
        part._non_persistent_buffers_set.update(part._buffers)
    return module


def with_convolutions(module: nn.Module) -> nn.Module:
    """A copy of a module whose chains compute Fourier transforms as convolutions, for export.

    Exporters and other runtimes know convolutions everywhere, Fourier transforms hardly anywhere.
    """
    module = copy.deepcopy(module)
    take_convolutions(module)
    return module


def take_convolutions(module: nn.Module):
    """Let the chains of a module compute Fourier transforms as convolutions from now on."""
    for part in list(module.modules()):
        if isinstance(part, Chain) and hasattr(part, "window"):
            part.take_convolutions()


class ConvolutionSpectrogram(nn.Module):
    """Power spectrum (..., T) -> (..., size / 2 + 1, frames) as one strided convolution, for export.

    ``pad_mode`` pads the ends of a centred spectrum, '' is one that is not centred. ``within`` (sample, sample) is
    applied to each frame before its window. ``middle``: a window shorter than ``size`` stands in the middle of it.
    """

    def __init__(self, window, size: int, hop: int, pad_mode: str, within=None, middle: bool = True):
        super().__init__()
        self.hop, self.pad_mode = hop, pad_mode
        margin = (size - len(window)) // 2 if middle else 0
        time = torch.arange(len(window), dtype=torch.float64, device=window.device) + margin
        angle = (
            2.0
            * math.pi
            * torch.arange(size // 2 + 1, dtype=torch.float64, device=window.device)[:, None]
            * time
            / size
        )
        filters = window.double() * torch.cat([angle.cos(), angle.sin()])  # (2 bins, samples)
        if within is not None:
            filters = filters @ within
        # Centred frames reach half a frame over the ends; those at which the window is zero need not be there.
        self.reach = size // 2 - margin if pad_mode else 0
        self.register_buffer("filters", filters.float()[:, None], persistent=False)

    def forward(self, x):
        shape = x.shape[:-1]
        x = x.reshape(-1, 1, x.shape[-1])
        if self.reach:
            x = F.pad(x, (self.reach, self.reach), self.pad_mode)
        real, imaginary = F.conv1d(x, self.filters, stride=self.hop).chunk(2, dim=1)
        power = real.square() + imaginary.square()
        return power.reshape(*shape, *power.shape[1:])
