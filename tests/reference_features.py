"""Features of the other toolkits, computed frame by frame and filter by filter in numpy; torchaudio where it loads."""

import numpy as np
import pytest
import torch


def torchaudio_or_skip():
    """Torchaudio, or a skipped test. One that does not match torch raises OSError when it is imported."""
    try:
        import torchaudio
        import torchaudio.compliance.kaldi
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"torchaudio does not load here: {str(error).splitlines()[0]}")
    return torchaudio


def htk_filters(n_mels, low, high, bins=257):
    """Triangles in Hz whose corners are equally spaced in mel, as (bins, n_mels)."""
    mel = np.linspace(2595 * np.log10(1 + low / 700), 2595 * np.log10(1 + high / 700), n_mels + 2)
    hz = 700 * (10 ** (mel / 2595) - 1)
    filters = np.zeros((bins, n_mels))
    for k in range(n_mels):
        filters[:, k] = np.interp(np.linspace(0, 8000, bins), hz[k : k + 3], [0, 1, 0])
    return filters


def kaldi_filters(n_mels, low=20.0, high=8000.0):
    """Triangles in mel, as (257, n_mels)."""
    mel = 1127 * np.log1p(np.array([low, high]) / 700)
    corners = np.linspace(*mel, n_mels + 2)
    at = 1127 * np.log1p(np.linspace(0, 8000, 257) / 700)
    filters = np.stack([np.interp(at, corners[k : k + 3], [0, 1, 0]) for k in range(n_mels)], 1)
    filters[256] = 0  # Kaldi leaves the last bin out
    return filters


def mel_spectrogram(x, n_mels, low=0.0, high=8000.0, window="hamming", hop=160):
    """Mel power of a 512-point transform of centred 25 ms frames every ``hop``: (1, T) -> (1, n_mels, frames)."""
    sample = np.pad(np.asarray(x[0], dtype=float), 256, mode="reflect")
    swing = {"hamming": 0.46, "hann": 0.5}[window]
    shape = 1 - swing - swing * np.cos(2 * np.pi * np.arange(400) / 400)  # periodic
    starts = range(56, len(sample) - 455, hop)  # 400 samples in the middle of each 512
    power = [np.abs(np.fft.rfft(sample[start : start + 400] * shape, 512)) ** 2 for start in starts]
    return torch.from_numpy((np.stack(power) @ htk_filters(n_mels, low, high)).T[None]).float()


def kaldi_fbank(x, n_mels, window="hamming", high=8000.0, snip_edges=True):
    """Kaldi's log-mel features of samples as they are: (1, T) -> (frames, n_mels); without ``snip_edges`` mirrored."""
    phase = np.cos(2 * np.pi * np.arange(400) / 399)
    shape = 0.54 - 0.46 * phase if window == "hamming" else (0.5 - 0.5 * phase) ** 0.85
    sample, filters, rows = np.asarray(x[0], dtype=float), kaldi_filters(n_mels, high=high), []
    starts = range(0, len(sample) - 399, 160)
    if not snip_edges:  # a frame around the middle of each 160 samples, half of one more counts
        starts = range(0, (len(sample) + 80) // 160 * 160, 160)
        sample = np.pad(sample, (120, 400), mode="symmetric")
    for start in starts:
        frame = sample[start : start + 400] - sample[start : start + 400].mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        rows.append(np.abs(np.fft.rfft(frame * shape, 512)) ** 2 @ filters)
    return torch.from_numpy(np.log(np.maximum(np.stack(rows), np.finfo(np.float32).eps))).float()


def with_preemphasis(x):
    """x[t] - 0.97 x[t - 1] of a waveform (1, T), x[-1] taken as x[1]."""
    return x - 0.97 * torch.cat([x[:, 1:2], x[:, :-1]], 1)


def redimnet2_logmel(x, n_mels, hop=160):
    """ReDimNet2's own features, of the waveform brought to deviation 1: (1, T) -> (1, n_mels, frames)."""
    x = with_preemphasis((x - x.mean()) / (x.std(unbiased=False) + 1e-8))
    sample = np.pad(np.asarray(x[0], dtype=float), hop // 2)
    shape = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(400) / 399)
    turn = 2j * np.pi * np.arange(400)[:, None] * np.arange(256) / 512  # no Nyquist bin
    frames = np.stack([sample[i : i + 400] for i in range(0, len(sample) - 399, hop)])
    power = np.clip(np.abs(frames * shape @ np.exp(turn)) ** 2, 1e-8, 1e8)
    at = 2595 * np.log10(1 + np.linspace(0, 8000, 256) / 700)  # as if the last bin were at 8 kHz
    corners = np.linspace(*(2595 * np.log10(1 + np.array([20, 7600]) / 700)), n_mels + 2)
    filters = np.stack([np.interp(at, corners[k : k + 3], [0, 1, 0]) for k in range(n_mels)], 1)
    return torch.from_numpy(np.log(np.clip(power @ filters, 1e-8, 1e8) + 1e-8).T[None]).float()
