"""The front end's filters and windows against torchaudio, where it loads, and against independent formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference_features import htk_filters, kaldi_fbank, kaldi_filters, mel_spectrogram, torchaudio_or_skip

from models.frontend import PRESETS, FrontEnd, htk_mel_filters, kaldi_mel_filters

HTK = [(24, 0.0, 8000.0), (40, 0.0, 8000.0), (64, 0.0, 8000.0), (80, 20.0, 7600.0)]


def relative(a, b):
    """The largest difference by the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def noise(rows=1, samples=16000):
    return 0.1 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n_mels, low, high", HTK)
def test_mel_filters_are_torchaudios(n_mels, low, high):
    theirs = torchaudio_or_skip().functional.melscale_fbanks(257, low, high, n_mels, 16000)
    assert relative(htk_mel_filters(n_mels, low, high), theirs) <= 1e-7


@pytest.mark.parametrize("n_mels", [40, 72, 80])
def test_kaldi_filters_are_torchaudios(n_mels):
    kaldi = torchaudio_or_skip().compliance.kaldi
    theirs, _ = kaldi.get_mel_banks(n_mels, 512, 16000.0, 20.0, 0.0, 100.0, -500.0, 1.0)
    assert relative(kaldi_mel_filters(n_mels), F.pad(theirs, (0, 1)).T) <= 1e-7


@pytest.mark.parametrize("features, window", [("wespeaker", "hamming"), ("3dspeaker", "povey")])
def test_kaldi_windows_are_torchaudios(features, window):
    kaldi = torchaudio_or_skip().compliance.kaldi
    theirs = kaldi._feature_window_function(window, 400, 0.42, torch.device("cpu"), torch.float32)
    assert relative(FrontEnd(features, 80).window, theirs) <= 1e-7


@pytest.mark.parametrize("features, low, high", [("voxceleb_trainer", 0, 8000), ("taoruijie", 20, 7600)])
@pytest.mark.parametrize("window_fn", [torch.hamming_window, torch.hann_window])
def test_mel_power_is_torchaudios(features, low, high, window_fn):
    transforms = torchaudio_or_skip().transforms
    theirs = transforms.MelSpectrogram(16000, 512, 400, 160, f_min=low, f_max=high, n_mels=40, window_fn=window_fn)
    front, x = FrontEnd(features, 40, window_fn=window_fn), noise(2)
    assert torch.equal(front.window, theirs.spectrogram.window)
    assert relative(front._mel_power(x), theirs(x)) <= 1e-6  # sums of products in another order


@pytest.mark.parametrize("window", ["hamming", "povey"])
def test_the_independent_references_are_torchaudios(window):
    torchaudio, x = torchaudio_or_skip(), noise()
    fbank = torchaudio.compliance.kaldi.fbank(x * 32768, num_mel_bins=80, dither=0.0, window_type=window)
    assert torch.allclose(kaldi_fbank(x * 32768, 80, window), fbank, atol=2e-3)
    if window == "hamming":
        mel = torchaudio.transforms.MelSpectrogram(16000, 512, 400, 160, n_mels=40, window_fn=torch.hamming_window)
        assert relative(mel_spectrogram(x, 40), mel(x)) <= 1e-5


@pytest.mark.parametrize("n_mels, low, high", HTK)
def test_mel_filters_are_their_formula(n_mels, low, high):
    filters = htk_mel_filters(n_mels, low, high)
    assert torch.allclose(filters.double(), torch.from_numpy(htk_filters(n_mels, low, high)), atol=1e-4)
    assert torch.allclose(kaldi_mel_filters(n_mels).double(), torch.from_numpy(kaldi_filters(n_mels)), atol=1e-4)


def test_fbank_is_kaldis():
    x = noise(2)
    sherpa = "povey", 7600.0, False
    for features, scale, how in (("wespeaker", 32768, ()), ("3dspeaker", 1, ("povey",)), ("sherpa-onnx", 1, sherpa)):
        for row, ours in zip(x, FrontEnd(features, 80, "mean")(x)):
            kaldi = kaldi_fbank(row[None] * scale, 80, *how)
            assert torch.allclose(ours.T, kaldi - kaldi.mean(dim=0), atol=2e-3)


def test_logmel_is_voxceleb_trainers():
    expected = F.instance_norm((mel_spectrogram(noise(), 40) + 1e-6).log())
    assert torch.allclose(FrontEnd("voxceleb_trainer", 40, "meanvar", True)(noise()), expected, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_features_at_any_rate_are_torchaudios(rate):
    torchaudio = torchaudio_or_skip()
    hop, width, size = rate // 100, rate // 40, 2 ** math.ceil(math.log2(rate // 40))
    x = noise(1, rate // 2)
    how = {"n_fft": size, "win_length": width, "hop_length": hop, "n_mels": 24, "window_fn": torch.hamming_window}
    for features, low, high in (("voxceleb_trainer", 0.0, rate / 2), ("taoruijie", 20.0, 0.475 * rate)):
        mel = torchaudio.transforms.MelSpectrogram(rate, f_min=low, f_max=high, **how)
        assert relative(FrontEnd(features, 24, sample_rate=rate)._mel_power(x), mel(x)) <= 1e-4
    sherpa = {"window_type": "povey", "high_freq": -400.0, "snip_edges": False}
    kaldis = (("wespeaker", 32768, {"window_type": "hamming"}), ("3dspeaker", 1, {"window_type": "povey"}))
    for features, scale, more in (*kaldis, ("sherpa-onnx", 1, sherpa)):
        how = {"num_mel_bins": 24, "dither": 0.0, "sample_frequency": float(rate), **more}
        fbank = torchaudio.compliance.kaldi.fbank(x * scale, **how)
        assert torch.allclose(FrontEnd(features, 24, "none", sample_rate=rate)(x)[0].T, fbank, atol=2e-3)
    assert FrontEnd("speechbrain", 24, sample_rate=rate)(x).shape == (1, 24, x.shape[1] // hop + 1)


@pytest.mark.parametrize("features", PRESETS)
def test_a_tone_is_in_the_same_band_of_hz_and_in_the_same_frame_at_any_rate(features):
    for rate in (8000, 16000, 44100):
        time = torch.arange(rate) / rate
        x = torch.sin(2 * math.pi * 1000 * time) * (time < 0.5)
        mel = FrontEnd(features, 40, "none", True, sample_rate=rate)(x[None])[0]
        corners = torch.linspace(0, math.log10(1 + rate / 2 / 700), 42)  # of about all chains
        found = 700 * (10 ** float(corners[1 + int(mel[:, 30].argmax())]) - 1)
        assert 900 < found < 1100 and abs(mel.shape[1] - 100) <= 2
        assert mel[:, 45].max() > mel[:, 55].max() + 5
