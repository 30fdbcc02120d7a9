"""export.py: every model on disk, every feature chain, at lengths it was not traced at; what differs is not written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import soundfile
import torch
from reference_features import torchaudio_or_skip
from samples import Network, speaker_model

import embed
import export
import speaker_model as speaker_module
from config import Config
from errors import UsageError
from exporting import formats, forms
from models.frontend import PRESETS, FrontEnd, with_convolutions
from settings import plugins
from settings.command_line import run
from speaker_model import SpeakerModel
from storage.embedding_files import read_embeddings
from training import precision

ALL = [(name, ".onnx", "waveform") for name in plugins.available("models")]
ALL += [(name, ".pt", "features") for name in plugins.available("models")]


@pytest.mark.parametrize("name, ending, kind", [*ALL, ("ResNet", ".onnx", "features"), ("ResNet", ".pt", "waveform")])
def test_every_model_exports_at_any_length(name, ending, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SECONDS", (0.5, 1.3, 3.1))
    model = speaker_model(name)
    if kind == "features" and not hasattr(model.network.__S__, "frontend"):
        with pytest.raises(export.UsageError, match="has no features"):
            forms.exportable(model, kind)
        return
    path = tmp_path / f"x{ending}"
    formats.write(forms.exportable(model, kind), model, kind, path)
    assert export.check(formats.reader(path), model, kind) < 1e-4


@pytest.mark.parametrize("norm", ["none", "mean", "meanvar"])
@pytest.mark.parametrize("features", PRESETS)
def test_a_front_end_of_convolutions_gives_the_same_features(features, norm):
    for more in ({}, {"log_input": False, "preemphasis": features == "voxceleb_trainer"}):
        front = FrontEnd(features, 40, norm, **more).eval()
        plain = with_convolutions(front)
        for samples in (8000, 12345):
            x = 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(samples))
            assert torch.allclose(plain(x), front(x), atol=1e-3, rtol=1e-4)


class Dropped(torch.nn.Module):
    """A model as a plug-in file of voxceleb_trainer has it: torchaudio's mel spectrogram inside."""

    def __init__(self, **options):
        super().__init__()
        mel = torchaudio_or_skip().transforms.MelSpectrogram
        self.torchfb = mel(16000, 512, 400, 160, window_fn=torch.hamming_window, n_mels=24, **options)
        self.linear = torch.nn.Linear(24, 12)

    def forward(self, x):
        return self.linear((self.torchfb(x) + 1e-6).log().mean(dim=2))


def dropped(**options):
    """That model in a network; it goes by the name of a plug-in on disk, whose keys its identity takes."""
    config = Config(model="XVector", nOut=12)
    return SpeakerModel(Network(Dropped(**options)), config, torch.device("cpu"), "tiny.model")


@pytest.mark.parametrize("ending", [".onnx", ".pt"])
def test_a_plug_in_with_torchaudios_mel_spectrogram_is_exported(ending, tmp_path):
    model = dropped()
    formats.write(forms.exportable(model, "waveform"), model, "waveform", tmp_path / f"x{ending}")
    assert export.check(formats.reader(tmp_path / f"x{ending}"), model, "waveform") < 1e-4


def test_what_onnx_cannot_hold_is_one_line_that_says_what_can(tmp_path, capfd):
    model = dropped(power=None)
    model.network.__S__.torchfb.forward = lambda x: torch.fft.fft(x).abs()[:, None, :].expand(-1, 24, -1)
    with pytest.raises(export.UsageError) as refused:
        formats.write(forms.exportable(model, "waveform"), model, "waveform", tmp_path / "x.onnx")
    assert str(refused.value).startswith("models/XVector.py: ONNX cannot hold it: ")
    assert "; TorchScript can: --out x.pt" in str(refused.value) and "\n" not in str(refused.value)
    assert "graph(" not in "".join(capfd.readouterr())


def test_what_an_exporter_prints_is_dropped_where_stdout_is_a_pipe_too():
    """C's streams keep what is written to a pipe until they are full or the process ends."""
    script = """
import ctypes
from exporting.formats import without_stdout
print("before")
with without_stdout():
    print("of Python")
    ctypes.CDLL(None).puts(b"of C")
print("behind")
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=plugins.ROOT, env=environment
    )
    assert (done.stdout, done.stderr) == ("before\nbehind\n", "")


def test_command_line(checkpoint, tmp_path, capsys, data):
    out = tmp_path / "model.onnx"
    words = ["--initial_model", checkpoint, "--out", str(out)]
    trials = ["--test_list", str(data / "trials.txt"), "--test_path", str(data / "wav")]
    assert run(export.main, [*words, "--int8", *trials]) == 0
    said = capsys.readouterr().out
    assert said.count("largest difference") == 8 and "waveform -> embedding of 12" in said
    assert "fp32: EER" in said and "int8: EER" in said
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    assert (properties["sample_rate"], properties["model"], properties["dimension"]) == ("16000", "ECAPA_TDNN", "12")
    from speaker_model import load_model

    model = load_model(checkpoint)
    assert properties["identity"] == model.identity
    file = sorted((data / "wav").rglob("*.flac"))[0]
    x = soundfile.read(file, dtype="float32")[0]
    embedding = session.run(["embedding"], {"waveform": x[None]})[0][0]
    assert np.allclose(embedding, model.embed_file(file), atol=1e-4)
    script = tmp_path / "model.pt"
    assert run(export.main, ["--initial_model", checkpoint, "--out", str(script), "--input", "features"]) == 0
    extra = {"metadata.json": ""}
    loaded = torch.jit.load(str(script), _extra_files=extra)
    assert json.loads(extra["metadata.json"])["input"] == "features"
    features = model.network.__S__.frontend(torch.from_numpy(x)[None])
    assert np.allclose(loaded(features).numpy()[0], embedding, atol=1e-4)


def test_what_differs_is_not_written(checkpoint, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    assert run(export.main, ["--initial_model", checkpoint, "--out", str(out), "--tolerance", "1e-12"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not written: differs from PyTorch by" in error
    assert sorted(p.name for p in tmp_path.iterdir() if "onnx" in p.name) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "x.bin"], "must end in .onnx, .pt"),
        (["--out", "/no/such/x.onnx"], "no such folder"),
        (["--initial_model", "x.pt", "--out", "./x.pt"], "--out: 'x.pt' is read by this command and would be lost"),
        (["--out", "x.pt", "--int8"], "--int8: quantises ONNX models"),
        (["--out", "x.onnx", "--test_list", "t"], "--test_list: goes with"),
        (["--out", "x.onnx", "--tolerance", "0"], "--tolerance: must be above 0"),
        (["--out", "x.onnx", "--int8", "--test_list", "LIST", "--test_path", "nowhere"], "--test_path: no such folder"),
        (
            ["--out", "x.onnx", "--int8", "--test_list", "LIST", "--test_path", "docs"],
            "' is below 'docs', the first being",
        ),
    ],
)
def test_bad_usage_is_one_line(words, said, data, capsys, monkeypatch):
    monkeypatch.chdir(plugins.ROOT)
    words = [str(data / "trials.txt") if word == "LIST" else word for word in words]
    assert run(export.main, ["--initial_model", "none.model", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error


def test_embedding_by_an_exported_file_equals_the_model(checkpoint, data, tmp_path, capsys):
    exported, features, plain, by_onnx = (tmp_path / name for name in ("m.onnx", "f.onnx", "a.npz", "b.npz"))
    model = ["--initial_model", checkpoint]
    assert run(export.main, [*model, "--out", str(exported)]) == 0
    assert run(export.main, [*model, "--out", str(features), "--input", "features"]) == 0
    words = [*model, "--dir", str(data / "wav"), "--out"]
    assert run(embed.main, [*words, str(plain)]) == 0
    assert run(embed.main, [*words, str(by_onnx), "--onnx", str(exported), "--threads", "2", "--workers", "1"]) == 0
    (names, x), (same_names, y) = (read_embeddings(path) for path in (plain, by_onnx))
    assert names == same_names and len(names) > 20
    assert np.abs(x - y).max() < 1e-4 * np.abs(x).max()
    other = onnx.load(exported)
    for entry in other.metadata_props:
        entry.value = "0" if entry.key == "identity" else entry.value
    onnx.save(other, tmp_path / "other.onnx")
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    capsys.readouterr()
    for file, said in (
        (features, "takes features, and not a waveform; export it without --input features"),
        (tmp_path / "other.onnx", "was exported from another model than --initial_model names"),
        (tmp_path / "junk.onnx", "cannot be opened"),
        (Path(checkpoint), "does not end in .onnx"),
        (tmp_path / "none.onnx", "no such file"),
    ):
        assert run(embed.main, [*words, str(by_onnx), "--onnx", str(file)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.startswith("--onnx: ") and error.count("\n") == 1


def test_an_exported_file_computes_on_the_cpu_of_a_machine_with_a_gpu(checkpoint, tmp_path, monkeypatch):
    """Its calls take a thread each, so that one after another, as on a GPU, they would leave the other cores idle."""
    (tmp_path / "a.onnx").write_bytes(b"")
    asked = []

    def load(path, config, device):
        asked.append(device)
        raise UsageError("not loaded")

    monkeypatch.setattr(speaker_module, "load_model", load)
    for words in (["--onnx", str(tmp_path / "a.onnx")], []):
        assert run(embed.main, ["--initial_model", checkpoint, "--wav", checkpoint, "--out", "x.npy", *words]) == 2
    assert asked == ["cpu", "auto"]


def test_bfloat16_is_close_where_there_is_some_and_refused_where_it_is_emulated(checkpoint, data, tmp_path, capsys):
    words = ["--initial_model", checkpoint, "--dir", str(data / "wav"), "--out"]
    assert run(embed.main, [*words, str(tmp_path / "a.npz")]) == 0
    half = [*words, str(tmp_path / "b.npz"), "--precision", "bfloat16"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cpu_features", lambda: {"avx512_bf16"})
        assert run(embed.main, half) == 0
    (_, x), (_, y) = (read_embeddings(tmp_path / name) for name in ("a.npz", "b.npz"))
    cosine = np.sum(x * y, axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert cosine.min() > 0.99 and not np.array_equal(x, y)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "cpu_features", lambda: {"avx2"})
        assert run(embed.main, half) == 2
    assert capsys.readouterr().err == "--precision: this device has no bfloat16 instructions; float32 is faster here\n"
