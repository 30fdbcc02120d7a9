"""Margin losses: sub-centres, inter-top-K penalty, SphereFace2 and the margin's rise, each against its formula."""

import math

import numpy as np
import pytest
import torch

from loss import aamsoftmax, amsoftmax, sphereface2
from loss.margin import add_angle
from settings import plugins
from utils import accuracy

WARMUP = (20, 40, "exponential")
HEADS = {
    "amsoftmax": (amsoftmax, {}),
    "aamsoftmax": (aamsoftmax, {}),
    "easy margin": (aamsoftmax, {"easy_margin": True}),
    "sub-centres and top k": (aamsoftmax, {"sub_centers": 3, "top_k": 5, "top_k_penalty": 0.06}),
    "sphereface2 C": (sphereface2, {}),
    "sphereface2 A": (sphereface2, {"margin_type": "A"}),
}
heads = pytest.mark.parametrize("head", HEADS)


def build(head, size=8, classes=50, **more):
    torch.manual_seed(0)
    module, keys = HEADS[head]
    return module.LossFunction(size, classes, **{"margin": 0.2, "scale": 30.0, **keys, **more})


def rows(classes=5, size=6, count=7):
    rng = np.random.default_rng(1)
    return rng.normal(size=(count, size)), rng.integers(classes, size=count)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def measured(loss, x, label):
    return loss(torch.tensor(x).float(), torch.tensor(label))[0].item()


@heads
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("size", [2, 8, 192])
def test_heads_at_a_class_centre(head, factor, size):
    loss = build(head, size)
    centres = loss.weight.detach().reshape(50, -1, size)[:40, 0]
    x = (factor * centres).clone().requires_grad_()
    for label in (torch.arange(40), (torch.arange(40) + 1) % 50):
        value, _ = loss(x, label)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in loss.parameters())


@heads
@pytest.mark.parametrize("scale", [1e-20, 1e4])
def test_heads_are_finite_for_tiny_huge_and_equal_rows_in_any_precision(head, scale):
    loss, x = build(head), torch.randn(6, 8)
    x = torch.cat([x, x[:2]]).mul(scale).requires_grad_()
    values = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
            values.append(loss(x, torch.arange(8))[0])
    assert values[0].dtype is torch.float32 and torch.equal(values[0], values[1]) and torch.equal(*values[1:])
    values[0].backward()
    assert values[0].isfinite() and x.grad.isfinite().all() and loss.weight.grad.isfinite().all()


@heads
def test_gradients_are_those_of_finite_differences(head):
    loss = build(head, scale=5.0).double()
    x, label = torch.randn(4, 8, dtype=torch.float64), torch.arange(4)
    x.requires_grad_()
    loss(x, label)[0].backward()
    direction = torch.randn_like(x)
    with torch.no_grad():
        ends = [loss(x + step * direction, label)[0] for step in (1e-2, -1e-2)]
    assert float((ends[0] - ends[1]) / 2e-2) == pytest.approx(float((x.grad * direction).sum()), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("angle", [0.3, -0.3])
def test_a_turned_cosine_rises_and_has_no_jump(angle):
    cosine = torch.linspace(-1, 1, 20001)
    values = add_angle(cosine, angle)
    assert (values.diff() > -1e-6).all() and values.diff().max() < 0.02
    middle = cosine[7000:13000].double()
    assert torch.allclose(values[7000:13000].double(), (middle.acos() + angle).cos(), atol=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_sub_centres_and_top_k_against_their_formula(share):
    x, label = rows()
    loss = build("sub-centres and top k", 6, 5, margin=0.3, scale=9.0, top_k=2, margin_warmup=(1, 5, "linear"))
    loss.set_epoch(1 + 4 * share)
    centres = unit(loss.weight.detach().double().numpy()).reshape(5, 3, 6)
    logits = np.empty((7, 5))
    for i in range(7):
        cosine = [max(unit(x[i]) @ centre for centre in centres[c]) for c in range(5)]
        nearest = sorted((c for c in range(5) if c != label[i]), key=lambda c: -cosine[c])[:2]
        for c in range(5):
            angle = 0.3 * share if c == label[i] else -0.06 * share if c in nearest else 0.0
            logits[i, c] = 9 * math.cos(math.acos(cosine[c]) + angle)
    picked = logits[np.arange(7), label]
    assert measured(loss, x, label) == pytest.approx(np.mean(np.log(np.exp(logits).sum(1)) - picked), rel=1e-5)


def test_heads_of_wespeaker_load():
    from storage import checkpoint
    from storage.interop import translate

    class Network(torch.nn.Module):
        def __init__(self, head):
            super().__init__()
            self.__L__ = head

    theirs = {"seg_1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}  # what tells a wespeaker file
    theirs |= {"projection.weight": torch.randn(50, 8), "projection.bias": torch.ones(1, 1)}
    network = Network(build("sphereface2 C"))
    faults = checkpoint.load_weights(network, translate(theirs), "avg_model.pt")
    assert faults["loss"] == [] and torch.equal(network.__L__.weight, theirs["projection.weight"])
    assert network.__L__.bias.item() == 1


def test_one_centre_without_penalty_is_the_plain_loss():
    x, label = rows()
    plain, whole = build("aamsoftmax", 6, 5), build("sub-centres and top k", 6, 5, sub_centers=1, top_k=0)
    assert measured(plain, x, label) == measured(whole, x, label)


@pytest.mark.parametrize("kind", ["A", "C"])
def test_sphereface2_against_its_formula(kind):
    x, label = rows()
    loss = build(f"sphereface2 {kind}", 6, 5, margin=0.2, scale=8.0)
    loss.bias.data.fill_(-1.5)
    cosine = np.clip(unit(x) @ unit(loss.weight.detach().double().numpy()).T, -1, 1)
    total = 0.0
    for i in range(7):
        for c in range(5):
            sign = 1 if c == label[i] else -1
            z = math.cos(math.acos(cosine[i, c]) + sign * 0.2) if kind == "A" else cosine[i, c]
            g = 2 * ((z + 1) / 2) ** 3 - 1 - (sign * 0.2 if kind == "C" else 0)
            total += (0.7 if sign > 0 else 0.3) * math.log(1 + math.exp(-sign * (8 * g - 1.5)))
    assert measured(loss, x, label) == pytest.approx(total / 7, rel=1e-5)


def test_sphereface2_does_not_overflow():  # log(1 + exp(100)) is infinite in fp32
    loss = build("sphereface2 C", scale=1000.0)
    x = loss.weight.detach()[:4].clone().requires_grad_()
    value, _ = loss(x, torch.arange(4) + 10)
    value.backward()
    assert 100 < value.item() < math.inf and x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["aamsoftmax", "amsoftmax", "sphereface2"])
def test_the_margin_rises_as_wespeakers(name):
    values = {"nOut": 4, "nClasses": 3, "margin": 0.2, "margin_warmup": list(WARMUP)}
    loss = plugins.call(plugins.load("loss", name), values)
    seen = {}
    for epoch in (1, 20, 25, 30, 39.999, 40, 100):
        loss.set_epoch(epoch)
        seen[epoch] = loss.margin
    for epoch in (25, 30, 39.999):  # wespeaker/utils/schedulers.py: log(1e-3 / (1 + 1e-6))
        assert seen[epoch] == pytest.approx(0.2 * (1 - math.exp((epoch - 20) / 20 * math.log(1e-3))), rel=1e-4)
    assert (seen[1], seen[20], seen[40], seen[100]) == (0, 0, 0.2, 0.2)
    loss = plugins.call(plugins.load("loss", name), {**values, "margin_warmup": [20, 40, "linear"]})
    loss.set_epoch(25)
    assert loss.margin == pytest.approx(0.05)
    assert plugins.call(plugins.load("loss", name), {**values, "margin_warmup": [0, 0, "exponential"]}).margin == 0.2


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"margin_warmup": "[20, 40, cosine]"}, "margin_warmup: the shape must be one of exponential, linear"),
        ({"margin_warmup": "[a, 40, linear]"}, "margin_warmup: expected"),
        ({"sub_centers": 0}, "sub_centers 0"),
        ({"trainfunc": "sphereface2", "margin_type": "B"}, "margin_type: must be A or C, got 'B'"),
        ({"trainfunc": "sphereface2", "similarity_power": 0.5}, "similarity_power 0.5"),
    ],
)
def test_impossible_keys_are_named(settings, tools, keys, message):
    from errors import UsageError

    with pytest.raises(UsageError, match=r"^loss/") as caught:
        tools.build(settings, **keys)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_accuracy_of_more_classes_than_there_are():
    output, label = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.1, 0.2]]), torch.tensor([1, 1])
    assert [float(share) for share in accuracy(output, label, topk=(1, 2, 5))] == [50.0, 50.0, 100.0]
