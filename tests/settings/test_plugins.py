"""Every plug-in on disk: a new file in models/, loss/, optimizer/ or scheduler/ is tested by being there."""

import sys

import pytest
import torch
from samples import SMALL, VALUES

from errors import UsageError
from settings import plugins


def build_model(name, **more):
    torch.manual_seed(0)
    return plugins.call(plugins.load("models", name), {**VALUES, **SMALL.get(name, {}), **more})


def voices(rows=4, samples=12000):
    return 0.1 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(1))


models = pytest.mark.parametrize("name", plugins.available("models"))
losses = pytest.mark.parametrize("name", plugins.available("loss"))
optimizers = pytest.mark.parametrize("name", plugins.available("optimizer"))
schedulers = pytest.mark.parametrize("name", plugins.available("scheduler"))


@models
def test_model_shape_and_gradients(name):
    model = build_model(name).train()
    out = model(voices())
    assert out.shape == (4, 16)
    (out * torch.randn_like(out)).sum().backward()
    # Some are exactly zero: a bias before softmax over time or batch norm, the gate of a dead ReLU in a narrow model.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert sum(bool(p.grad.any()) for p in model.parameters()) > 0.8 * len(list(model.parameters()))


@models
def test_model_takes_any_length_and_batch_does_not_matter_in_evaluation(name):
    model = build_model(name).eval()
    with torch.inference_mode():
        for samples in (8000, 9999, 20000):
            x = voices(3, samples)
            together = model(x)
            assert torch.equal(together, model(x))
            alone = torch.cat([model(row[None]) for row in x])
            assert torch.allclose(together, alone, atol=1e-5)


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["voice", "silence", "constant", "int16 scale", "one silent row"])
def test_model_is_finite_forward_and_backward(name, dtype, kind):
    x = {
        "voice": voices(2),
        "silence": torch.zeros(2, 12000),
        "constant": torch.full((2, 12000), 0.3),
        "int16 scale": voices(2) * 32768,
        "one silent row": torch.cat([voices(1), torch.zeros(1, 12000)]),
    }[kind]
    model = build_model(name).train()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        out = model(x)
    assert out.isfinite().all()
    assert all(b.isfinite().all() for b in model.buffers())
    if dtype is torch.float16 and kind in ("silence", "constant"):
        return  # a batch without variance: each BN multiplies gradients by 1/sqrt(1e-5), which fp16 cannot hold
    out.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@models
def test_a_checkpoint_of_a_model_holds_no_constants(name):
    assert not any("window" in key or "banks" in key or ".fb" in key for key in build_model(name).state_dict())


def build_loss(name):
    torch.manual_seed(0)
    return plugins.call(plugins.load("loss", name), VALUES)


def loss_input(name, rows=5):
    low = plugins.declaration("loss", name).constants["per_speaker"][0]
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(2))
    if low > 1:
        x = torch.stack([x, x + 0.3 * torch.randn(rows, 16, generator=torch.Generator().manual_seed(3))], dim=1)
    return x, torch.arange(rows) % 5


@losses
def test_loss_contract(name):
    loss = build_loss(name)
    assert isinstance(loss.test_normalize, bool)
    x, label = loss_input(name)
    value, accuracy = loss(x.requires_grad_(), label)
    value.backward()
    assert value.shape == () and 0 <= float(accuracy) <= 100
    assert x.grad.isfinite().all()
    assert all(p.grad is not None for p in loss.parameters())


@losses
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_computes_in_fp32_under_autocast(name, dtype):
    loss, (x, label) = build_loss(name), loss_input(name)
    torch.manual_seed(5)
    exact = loss(x, label)[0]
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=dtype):
        value = loss(x, label)[0]
    assert value.dtype is torch.float32 and torch.equal(value, exact)


@losses
def test_loss_gradient_is_that_of_finite_differences(name):
    loss, (x, label) = build_loss(name), loss_input(name)
    x = x.clone().requires_grad_()

    def value():
        torch.manual_seed(7)
        return loss(x, label)[0]

    value().backward()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    step = 1e-2
    with torch.no_grad():
        x += step * direction
        above = value()
        x -= 2 * step * direction
        below = value()
    assert float((above - below) / (2 * step)) == pytest.approx(float((x.grad * direction).sum()), rel=0.03, abs=2e-3)


@losses
@pytest.mark.parametrize("kind", ["zero", "tiny", "huge", "duplicate rows"])
def test_loss_is_finite_for_singular_embeddings(name, kind):
    loss, (x, label) = build_loss(name), loss_input(name)
    x = {"zero": x * 0, "tiny": x * 1e-20, "huge": x * 1e4, "duplicate rows": x[:1].expand_as(x)}[kind].clone()
    value, _ = loss(x.requires_grad_(), label)
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters() if p.grad is not None)


@optimizers
def test_optimizer_steps_downhill_and_uses_lr(name):
    weight = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = plugins.call(plugins.load("optimizer", name), VALUES, [weight])
    assert optimizer.param_groups[0]["lr"] == 0.1
    for _ in range(30):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert weight.abs().max() < 2


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_fused_update_is_the_plain_one(name):
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((7, 5), (33,), ())]
        values = {**VALUES, "weight_decay": 0.1, "fused": fused}
        optimizer = plugins.call(plugins.load("optimizer", name), values, weights)
        assert optimizer.param_groups[0]["fused"] is fused
        for _ in range(5):
            for weight in weights:
                weight.grad = torch.randn(weight.shape)
            optimizer.step()
        results.append(weights)
    for one, other in zip(*results):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def build_scheduler(name, optimizer):
    return plugins.call(plugins.load("scheduler", name), VALUES, optimizer)


def rates(name, count, resume_at=None):
    def fresh():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, *build_scheduler(name, optimizer)

    optimizer, scheduler, unit = fresh()
    seen = []
    for step in range(count):
        if step == resume_at:
            states = optimizer.state_dict(), scheduler.state_dict()
            optimizer, scheduler, unit = fresh()
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert unit in ("epoch", "iteration")
    return seen


@schedulers
def test_scheduler_is_finite_bounded_and_resumes_exactly(name):
    seen = rates(name, 24)
    assert all(0 <= rate <= 0.1 + 1e-12 for rate in seen)
    assert max(seen) > 0.02
    assert rates(name, 24, resume_at=9) == seen


def test_steplr_follows_test_interval_only_when_nothing_else_is_said():
    from scheduler.steplr import Scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert Scheduler(optimizer, test_interval=7)[0].step_size == 7
    assert Scheduler(optimizer, test_interval=7, lr_step=10)[0].step_size == 10


def test_warm_up_and_end_of_the_schedules():
    cosine = rates("cosine", 24)
    assert cosine[:4] == pytest.approx([0.02, 0.04, 0.06, 0.08]) and cosine[-1] == pytest.approx(1e-5)
    exponential = rates("exponential", 25)  # warm-up of 4 steps times a fall over 24
    assert exponential[0] == 0 and exponential[2] == pytest.approx(0.05 * 1e-4 ** (2 / 24))
    assert exponential[12] == pytest.approx(1e-3) and exponential[24] == pytest.approx(1e-5)
    onecycle = rates("onecycle", 24)
    assert onecycle[0] == pytest.approx(0.004) and onecycle[-1] == pytest.approx(1e-5)


def test_a_voxceleb_trainer_file_drops_in(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "TheirNet.py").write_text(
        "import torch\nfrom torch import nn\nfrom utils import PreEmphasis, accuracy\n"
        "from models.ResNetBlocks import *\n\n"
        "class TheirNet(nn.Module):\n"
        "    def __init__(self, nOut, levels=4, **kwargs):\n"
        "        super().__init__()\n        self.levels, self.kwargs = levels, kwargs\n"
        "        self.fc = nn.Linear(1, nOut)\n"
        "    def forward(self, x):\n        return self.fc(x.mean(1, keepdim=True))\n\n"
        "def MainModel(nOut=256, **kwargs):\n    return TheirNet(nOut, **kwargs)\n"
    )
    monkeypatch.setattr(plugins, "ROOT", tmp_path)
    declared = plugins.declaration("models", "TheirNet")
    assert declared.keys["levels"] == 4 and "nOut" in declared.keys and "x" not in declared.keys
    import models

    monkeypatch.setattr(models, "__path__", [*models.__path__, str(folder)])
    model = plugins.call(plugins.load("models", "TheirNet"), {**VALUES, "levels": 7})
    assert model.levels == 7 and model.kwargs["margin"] == 0.2  # all keys reach **kwargs
    assert model(voices()).shape == (4, 16)


def test_a_file_of_three_lines_is_a_variant(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "Base.py").write_text("def MainModel(nOut=8, depth=34, wide=(1, 2)):\n    return nOut, depth, wide\n")
    (folder / "Deep.py").write_text(
        "from functools import partial\nfrom models.Base import MainModel as Base\n"
        "MainModel = partial(Base, depth=221)\n"
    )
    (folder / "Same.py").write_text("from models.Base import MainModel\n")
    monkeypatch.setattr(plugins, "ROOT", tmp_path)
    assert plugins.available("models") == ["Base", "Deep", "Same"]
    assert plugins.declaration("models", "Deep").own == {"nOut": 8, "depth": 221, "wide": (1, 2)}
    assert plugins.declaration("models", "Same").own["depth"] == 34


@pytest.fixture
def plugin_of_torchaudio(tmp_path, monkeypatch):
    """Write a model file that imports torchaudio, and a torchaudio (of this source) that it would find."""
    (tmp_path / "models").mkdir()
    monkeypatch.setattr(plugins.importlib.import_module("models"), "__path__", [str(tmp_path / "models")])
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
        monkeypatch.delitem(sys.modules, name)

    def write(torchaudio, model="import torchaudio\nMainModel = dict\n"):
        (tmp_path / "torchaudio.py").write_text(torchaudio)
        (tmp_path / "torchaudio-2.9.9.dist-info").mkdir()
        (tmp_path / "torchaudio-2.9.9.dist-info" / "METADATA").write_text("Name: torchaudio\nVersion: 2.9.9\n")
        (tmp_path / "models" / "TheirMel.py").write_text(model)
        plugins.importlib.invalidate_caches()

    yield write
    sys.modules.pop("models.TheirMel", None)
    sys.modules.pop("torchaudio", None)


@pytest.mark.parametrize("when", ["import torchaudio\nMainModel = dict\n", "def MainModel():\n    import torchaudio\n"])
@pytest.mark.parametrize("error", ["OSError('undefined symbol: torch_x')", "RuntimeError('compiled for CUDA 13.0')"])
def test_a_plug_in_whose_torchaudio_does_not_match_gets_one_line_with_the_pairs(plugin_of_torchaudio, error, when):
    plugin_of_torchaudio(f"raise {error}\n", when)
    with pytest.raises(UsageError) as said:
        plugins.build("models", "TheirMel", {})
    line = str(said.value)
    assert line.startswith("models/TheirMel.py: torchaudio 2.9.9 does not load beside torch 2.") and "\n" not in line
    assert error.split("'")[1] in line and "torchaudio 2.11.1 with torch 2.14.1" in line


def test_a_plug_in_without_torchaudio_installed_gets_one_line(plugin_of_torchaudio):
    plugin_of_torchaudio("raise ModuleNotFoundError(\"No module named 'torchaudio'\", name='torchaudio')\n")
    with pytest.raises(UsageError, match=r"^models/TheirMel.py: imports torchaudio, which is not installed beside"):
        plugins.build("models", "TheirMel", {})


def test_a_name_that_a_sound_torchaudio_lacks_is_no_matter_of_pairs(plugin_of_torchaudio):
    plugin_of_torchaudio("from math import pi\n", "from torchaudio import sox_effects\n")
    with pytest.raises(UsageError, match="cannot import name 'sox_effects'") as said:
        plugins.build("models", "TheirMel", {})
    assert "pairs" not in str(said.value)
