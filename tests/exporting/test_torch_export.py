"""export.py --out x.pt2: any batch and length in a new process, the least length, what cannot be held."""

import json
import threading

import numpy as np
import pytest
import soundfile
import torch
from samples import Network, speaker_model

import export
from config import Config
from exporting import formats, forms
from settings.command_line import run
from speaker_model import SpeakerModel, load_model
from storage.files import save_atomically

needed = pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch is older than 2.7")


@needed
def test_command_line(settings, tools, data, tmp_path, capsys):
    path, out = tmp_path / "x.model", tmp_path / "x.pt2"
    keys = {"model": "XVector", "channels": 16, "stats_channels": 24}
    keys = {name: value for name, value in {**settings, **keys}.items() if name != "aggregate"}
    save_atomically(tools.build(keys).state.capture(), path)
    assert run(export.main, ["--initial_model", str(path), "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("largest difference") == 8
    extra = {"metadata.json": ""}
    program = torch.export.load(out, extra_files=extra)
    facts = json.loads(extra["metadata.json"])
    assert (facts["input"], facts["dimension"], facts["seconds"]) == ("waveform", "12", 0.5)
    file = sorted((data / "wav").rglob("*.flac"))[0]
    x = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
    found = program.module()(x[None])[0].detach().numpy()
    assert np.allclose(found, load_model(path).embed_file(file), atol=1e-4)


class Mine(torch.nn.Module):
    """As files of voxceleb_trainer compute their features: without gradient, outside of autocast."""

    def __init__(self, window=400, hop=160):
        super().__init__()
        self.conv, self.linear = torch.nn.Conv1d(1, 8, window, hop), torch.nn.Linear(8, 12)

    def forward(self, x):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            x = (self.conv(x[:, None]).square() + 1e-6).log()
        return self.linear(x.mean(dim=2))


def mine(module):
    """A module as a model; it goes by the name of a plug-in on disk, whose keys its identity takes."""
    torch.manual_seed(0)
    return SpeakerModel(Network(module), Config(model="XVector", nOut=12), torch.device("cpu"), "tiny.model")


@needed
def test_a_model_with_a_block_without_gradient(tmp_path):
    model = mine(Mine())
    assert formats.write(forms.exportable(model, "waveform"), model, "waveform", tmp_path / "x.pt2") == 0.5
    assert export.check(formats.reader(tmp_path / "x.pt2"), model, "waveform") < 1e-4
    with torch.no_grad():
        assert not torch.is_grad_enabled()  # which the export leaves as it was
    assert torch.is_grad_enabled()


@needed
def test_a_model_that_needs_a_second_says_so(tmp_path, capsys):
    model = mine(Mine(5000, 5000))  # of half a second it makes one frame
    least = formats.write(forms.exportable(model, "waveform"), model, "waveform", tmp_path / "x.pt2")
    assert least == 1.0
    assert export.check(formats.reader(tmp_path / "x.pt2"), model, "waveform", least) < 1e-4
    assert capsys.readouterr().out.startswith("takes 1 s and longer")


@needed
def test_camplus_takes_any_number_of_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "SECONDS", (0.5, 2.01, 4.5))  # 25, 101 and 225 frames of 20 ms
    model = speaker_model("CAMPPlus", blocks=(1, 1, 1))
    assert formats.write(forms.exportable(model, "features"), model, "features", tmp_path / "x.pt2") == 0.5
    assert export.check(formats.reader(tmp_path / "x.pt2"), model, "features") < 1e-5


@needed
def test_what_torch_export_cannot_hold_is_one_line_that_says_what_can(tmp_path):
    odd = torch.nn.Module()
    odd.forward = lambda x: x[:, :12] if x.max() < 1e9 else x[:, 12:24]  # which the values choose
    model = mine(odd)
    with pytest.raises(export.UsageError) as refused:
        formats.write(forms.exportable(model, "waveform"), model, "waveform", tmp_path / "x.pt2")
    text = str(refused.value)
    assert text.startswith("models/XVector.py: torch.export cannot hold it: ") and "\n" not in text
    assert text.endswith("TorchScript can: --out x.pt")


@pytest.mark.skipif(hasattr(torch.compiler, "is_exporting"), reason="torch is not older than 2.7")
def test_an_older_torch_is_told_in_one_line(tmp_path):
    model = mine(Mine())
    with pytest.raises(export.UsageError, match=r"--out: .pt2 needs torch 2.7 or later, this is .*: --out x.pt$"):
        formats.write(forms.exportable(model, "waveform"), model, "waveform", tmp_path / "x.pt2")


def test_a_model_that_cannot_be_copied_is_built_anew(settings, tools, tmp_path):
    trainer = tools.build(settings)
    path = tmp_path / "a.model"
    save_atomically(trainer.state.capture(), path)
    model = load_model(path)
    model.network.__S__.lock = threading.Lock()
    expected = model.embed_batch(np.ones((1, 8000), np.float32))
    network = forms.exportable(model, "waveform")
    assert network is not model.network.__S__ and not any(p.requires_grad for p in network.parameters())
    with torch.no_grad():
        assert np.allclose(network(torch.ones(1, 8000)).numpy(), expected, atol=1e-4)
