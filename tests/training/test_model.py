"""The model of a plug-in before a run: lazy layers get their weights, weights that no run would train are named."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from errors import UsageError
from settings import plugins
from SpeakerNet import SpeakerNet
from storage import checkpoint
from storage.dump import read_dump, tensor_stats
from storage.files import save_atomically
from training.model import build_model, hidden_weights
from training.module_state import ModuleState
from training.precision import BufferSnapshot


class Small(nn.Module):
    """A convolution, its mean over time, one layer."""

    def __init__(self, last):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(1, 6, 400, 160), nn.BatchNorm1d(6), last
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.last is None:
            self.last = nn.Linear(6, 12)
        return self.last(torch.relu(self.norm(self.conv(x[:, None]))).mean(dim=2))


def made_of(monkeypatch, last):
    """Let every model be a Small with such a last layer."""
    inner = plugins.build

    def build(folder, name, values, *leading):
        return Small(last()) if folder == "models" else inner(folder, name, values, *leading)

    monkeypatch.setattr(plugins, "build", build)


def test_lazy_layers_train_and_are_loaded_into(settings, tools, monkeypatch):
    made_of(monkeypatch, lambda: nn.LazyLinear(12))
    trainer = tools.build(settings)
    before = trainer.network.__S__.last.weight.detach().clone()
    assert before.shape == (12, 6) and trainer.network.training
    assert torch.equal(tools.build(settings).network.__S__.last.weight, before)  # of the seed
    assert trainer.train_step(tools.batches(trainer)[:1]) is not None
    assert not torch.equal(trainer.network.__S__.last.weight, before)
    other = SpeakerNet({**trainer.config.values(), "nClasses": 1, "trainfunc": ""})  # as an evaluation builds it
    other.load_state_dict(trainer.network.state_dict(), strict=False)
    assert torch.equal(other.__S__.last.weight, trainer.network.__S__.last.weight)


def test_a_layer_that_is_made_in_the_forward_pass_is_refused(settings, tools, monkeypatch):
    made_of(monkeypatch, lambda: None)
    with pytest.raises(UsageError, match=r"makes 'last\.weight' in its forward pass.*make it in __init__"):
        tools.build(settings)


class Refuses(nn.Module):
    """Factors of a matrix that has none."""

    def forward(self, x):
        return x * torch.linalg.cholesky(-torch.eye(2)).sum()


def test_a_model_that_refuses_its_numbers_begins_and_its_step_is_dumped(settings, tools, monkeypatch):
    """A dump tells more than a line before the run."""
    made_of(monkeypatch, lambda: nn.Sequential(nn.Linear(6, 12), Refuses()))
    trainer = tools.build(settings)
    trainer.progress.batch += 1
    assert trainer.train_step(tools.batches(trainer)[:1]) is None
    trainer.close()
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert read_dump(path)["reason"] == "loss_nonfinite"


def test_a_run_begins_as_if_the_model_had_not_been_tried(settings, tools, monkeypatch):
    made_of(monkeypatch, lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 12)))
    trainer = tools.build(settings)
    monkeypatch.setattr("SpeakerNet.try_model", lambda *arguments: None)
    untried = tools.build(settings)
    tools.assert_same(tools.snapshot(trainer), tools.snapshot(untried))
    assert trainer.network.__S__.calls == untried.network.__S__.calls == 0


@pytest.mark.parametrize(
    ("made", "words"),
    [(None, "it returns None - is there a 'return'?"), (Small, "it returns the class Small - call the class")],
)
def test_what_is_no_model_is_named(monkeypatch, made, words):
    monkeypatch.setattr(plugins, "build", lambda *arguments: made)
    with pytest.raises(UsageError, match=r"^models/mine\.py: MainModel must return a torch\.nn\.Module") as caught:
        build_model({"model": "mine"})
    assert words in str(caught.value)


def test_layers_in_a_plain_list_are_named():
    model = Small(nn.Linear(6, 12))
    model.shown = [model.conv, model.last]  # registered by their own names
    model.teacher = [nn.Linear(2, 2).requires_grad_(False)]
    assert hidden_weights(model) == ""
    model.branches = [nn.Linear(2, 2)]
    assert hidden_weights(model).startswith("'branches' is a plain list of layers")
    assert hidden_weights(nn.Sequential(model)).endswith("make it an nn.ModuleList")
    del model.branches
    model.parts = {"a": nn.Parameter(torch.zeros(1))}
    assert hidden_weights(model).endswith("make it an nn.ParameterDict")


def test_a_buffer_that_another_tensor_replaces_is_seen_and_put_back():
    """As ``self.mean = 0.9 * self.mean + 0.1 * x`` in a forward pass does."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Module())
    model[1].register_buffer("mean", torch.zeros(2))
    snapshot = BufferSnapshot(model)
    snapshot.take()
    model[1].mean = model[1].mean + float("nan")
    assert snapshot.first_bad() == "'1.mean' became non-finite"
    snapshot.restore()
    assert model[1].mean.tolist() == [0, 0] and model.state_dict()["1.mean"].tolist() == [0, 0]
    model[1].mean = model[1].mean + 1
    snapshot.take()
    model[1].mean.add_(5)
    model[0].running_mean.add_(5)
    snapshot.restore()
    assert model[1].mean.tolist() == [1, 1] and model[0].running_mean.tolist() == [0, 0]


RANDOM = np.random.default_rng(4)  # as a plug-in file keeps one


def test_a_generator_of_a_plug_in_file_is_put_back_and_saved():
    state = ModuleState(Small(nn.Linear(6, 12)))
    state.take()
    saved, drawn = state.state_dict(), RANDOM.random()
    state.restore()
    assert RANDOM.random() == drawn != RANDOM.random()
    saved[f"file {__name__}"]["Small"] = 5  # nothing else of the file is set
    state.load_state_dict(saved)
    assert RANDOM.random() == drawn and callable(Small)


def test_a_network_is_made_of_keys_as_voxceleb_trainer_makes_it():
    torch.manual_seed(0)
    keys = {"model": "ResNetSE34L", "num_filters": [8, 8, 8, 8], "nOut": 6, "nClasses": 4, "margin": 0.2}
    network = SpeakerNet(optimizer="adam", trainfunc="aamsoftmax", nPerSpeaker=1, **keys)
    loss, accuracy = network(0.1 * torch.randn(1, 4, 8000), torch.arange(4))
    assert loss.isfinite() and loss.ndim == 0 and 0 <= float(accuracy) <= 100
    assert network(0.1 * torch.randn(2, 8000)).shape == (2, 6) and network.loss.scale == 30.0


class Turning(nn.Module):
    """A layer whose weights are complex."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 12, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.weight).abs()


def test_complex_weights_are_trained_saved_checked_and_loaded(settings, tools, monkeypatch, tmp_path):
    made_of(monkeypatch, Turning)
    trainer = tools.build(settings, fused=False)
    first, second = tools.batches(trainer)[:2]
    assert trainer.train_step([first]) is not None
    save_atomically(trainer.state.capture(), tmp_path / "a.model")
    saved = checkpoint.load(tmp_path / "a.model")["model_state_dict"]["__S__.last.weight"]
    assert saved.dtype is torch.complex64 and torch.equal(saved, trainer.network.__S__.last.weight)
    before = tools.snapshot(trainer)
    inner = trainer.optimizer.step

    def spoiling():
        inner()
        trainer.network.__S__.last.weight.data[0, 0] = complex(0.0, math.nan)

    monkeypatch.setattr(trainer.optimizer, "step", spoiling)
    assert trainer.train_step([second]) is None
    tools.assert_same(tools.snapshot(trainer), before)
    stats = tensor_stats({"w": torch.tensor([complex(1.0, math.nan), complex(3.0, 4.0)])})["w"]
    assert stats == {"numel": 4, "nan": 1, "inf": 0, "abs_max": 4.0, "norm": math.sqrt(26.0)}
    assert checkpoint.nonfinite_tensors({"w": torch.tensor([complex(0.0, math.inf)])}) == ["w"]
