"""Blocks that are computed again in the backward pass give the step of blocks that keep everything, bit for bit."""

import pytest
import torch
from packaging.version import Version
from torch import nn

from errors import UsageError
from settings import plugins
from training.recompute import blocks_of, recompute_blocks

NARROW = {"m_channels": 4, "n_mels": 24, "blocks": (1, 1, 1, 1)}
MODELS = {
    "ResNet": {**NARROW, "depth": 50},
    "ResNet34": NARROW,
    "ResNetSE34L": {"num_filters": (4, 4, 8, 8)},
    "ResNetSE34V2": {"num_filters": (4, 4, 8, 8), "n_mels": 24},
    "SimAM_ResNet": NARROW,
    "ERes2Net": NARROW,
    "ERes2NetV2": {**NARROW, "two_emb_layer": True},
    "CAMPPlus": {"m_channels": 4, "init_channels": 8, "growth_rate": 4, "blocks": (2, 2, 2), "n_mels": 24},
    "ReDimNet": {"size": "B0", "channels": 8, "n_mels": 24},
    "ReDimNet2": {"size": "B0", "channels": 8, "n_mels": 24, "output_norm": True, "dual": True},
    "ECAPA_TDNN": {"channels": 8, "aggregate": 16, "n_mels": 24},
    "RawNet3": {"channels": 16},
}
WAVES = 0.1 * torch.randn(3, 6400, generator=torch.Generator().manual_seed(1))


def built(name, keys):
    torch.manual_seed(0)
    return plugins.call(plugins.load("models", name), {"nOut": 6, **keys}).train()


def step(model, dtype=None):
    """Everything that a step gives and leaves behind."""
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        loss = model(WAVES).float().square().mean()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach(), "rng": torch.get_rng_state(), **gradients, **dict(model.named_buffers())}


def assert_equal(ours, wanted):
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name


def kept(model):
    """Bytes that a forward pass keeps for the backward pass."""
    found = {}

    def note(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(WAVES)
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("name", MODELS)
def test_a_recomputed_model_takes_the_same_step_and_keeps_less(name):
    plain, ours = built(name, MODELS[name]), built(name, MODELS[name])
    names = list(ours.state_dict())
    recompute_blocks(blocks_of(ours, name, "gradient_checkpointing"))
    assert list(ours.state_dict()) == names
    for dtype in (None, torch.bfloat16):
        assert_equal(step(ours, dtype), step(plain, dtype))
    assert {int(b) for n, b in ours.named_buffers() if n.endswith("num_batches_tracked")} == {2}
    assert kept(ours) < 0.95 * kept(plain)


class Drawing(nn.Module):
    """A block that draws from every kind of generator, reads its own buffer, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.own, self.calls = torch.Generator().manual_seed(2), 0
        self.register_buffer("level", torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        mask = torch.rand(x.shape, generator=self.own) > 0.2
        x = nn.functional.dropout(self.norm(self.layer(x * mask + self.level)), 0.3)
        self.level = 0.5 * self.level + x.detach().mean(dim=0)
        self.level_before = self.level
        return x


def test_draws_counters_and_buffers_that_are_read_are_those_of_the_first_pass():
    def run(recompute):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6400, 8), Drawing(), Drawing())
        if recompute:
            recompute_blocks([model[1], model[2]])
        left = [step(model), step(model)][1]
        left |= {f"own{i}": model[i].own.get_state() for i in (1, 2)}
        return left, [model[i].calls for i in (1, 2)], [model[i].level_before for i in (1, 2)]

    (ours, calls, levels), (wanted, _, wanted_levels) = run(True), run(False)
    assert_equal(ours, wanted)
    assert calls == [2, 2] and all(torch.equal(*pair) for pair in zip(levels, wanted_levels))


def test_a_model_that_tells_no_blocks_is_refused_in_one_line():
    with pytest.raises(UsageError, match=r"^gradient_checkpointing: models/XVector.py does not tell its blocks"):
        blocks_of(nn.Linear(2, 2), "XVector", "gradient_checkpointing")


def test_a_compiler_knows_what_is_recomputed_and_moves_the_statistics_once():
    torch._dynamo.reset()
    plain, ours = built("ResNet34", MODELS["ResNet34"]).layer1, built("ResNet34", MODELS["ResNet34"]).layer1
    recompute_blocks(list(ours))
    ours.compile(backend="aot_eager")
    x = torch.randn(2, 4, 6, 5)
    for model in (plain, ours):
        model(x).square().sum().backward()
    if Version(torch.__version__) < Version("2.14") and not torch.equal(
        ours[0].bn1.running_mean, plain[0].bn1.running_mean
    ):
        pytest.skip("this torch moves them twice: compile_model refuses")
    for name, parameter in plain.named_parameters():
        assert torch.equal(ours.get_parameter(name).grad, parameter.grad), name
    assert_equal(dict(ours.named_buffers()), dict(plain.named_buffers()))
