"""Every pooling of models/pooling.py against its formula in float64, and where such formulas give NaN."""

import numpy as np
import pytest
import torch

from models import ResNet
from models.pooling import POOLINGS, AttentiveStatistics, ChannelAttention, make_pooling

CHANNELS = 16
poolings = pytest.mark.parametrize("name", [*POOLINGS, "MQMHASTP of one weight a frame"])


def build(name):
    torch.manual_seed(0)
    if name.startswith("MQMHASTP"):
        options = {"query_num": 3, "head_num": 4, "bottleneck": 5, "d_s": 1 if "one weight" in name else 2}
        return make_pooling("MQMHASTP", CHANNELS, **options).double()
    return make_pooling(name, CHANNELS).double()


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def weighted(x, weights, least=1e-7):
    """Mean and deviation of each channel of x (C, T) under weights (C, T)."""
    mean = [sum(w * v for w, v in zip(weights[c], x[c])) for c in range(len(x))]
    square = [sum(w * v * v for w, v in zip(weights[c], x[c])) for c in range(len(x))]
    return mean, [np.sqrt(max(s - m * m, least)) for s, m in zip(square, mean)]


def two_layers(state, first, second, x):
    """Attention weights (C, T) of frames x (C, T): linear, tanh, linear, softmax over time."""
    hidden = np.tanh(state[f"{first}.weight"][:, :, 0] @ x + state[f"{first}.bias"][:, None])
    logits = state[f"{second}.weight"][:, :, 0] @ hidden + state[f"{second}.bias"][:, None]
    return np.stack([softmax(row) for row in logits])


def reference(name, state, x):
    """The pooling of one utterance x (C, T)."""
    mean, deviation = x.mean(1), np.sqrt(x.var(1, ddof=1) + 1e-7)
    if name in ("TAP", "TSDP", "TSTP"):
        return np.concatenate({"TAP": [mean], "TSDP": [deviation], "TSTP": [mean, deviation]}[name])
    if name in ("SAP", "ASP"):
        weights = softmax(np.tanh(x.T @ state["linear.weight"].T + state["linear.bias"]) @ state["attention"][:, 0])
        found = weighted(x, np.tile(weights, (CHANNELS, 1)), 1e-5)
        return np.concatenate(found[: 1 if name == "SAP" else 2])
    if name in ("ASTP", "ASTP_GLOB"):
        context = np.repeat(np.concatenate([mean, x.std(1, ddof=1)])[:, None], x.shape[1], 1)
        seen = x if name == "ASTP" else np.concatenate([x, context])
        return np.concatenate(weighted(x, two_layers(state, "linear1", "linear2", seen)))
    found = []
    for query in range(3):
        for head in range(4):
            part, place = x[4 * head : 4 * head + 4], f"n_query.{query}.heads_att_trans.{head}"
            weights = two_layers(state, f"{place}.att_0", f"{place}.att_1", part)
            found += weighted(part, weights if len(weights) == 4 else np.tile(weights, (4, 1)))
    return np.concatenate(found)


@poolings
def test_pooling_is_its_formula(name):
    pooling = build(name)
    x = torch.randn(2, 4, 4, 23, generator=torch.Generator().manual_seed(1))
    state = {key: value.numpy() for key, value in pooling.state_dict().items()}
    expected = np.stack([reference(name, state, row.reshape(CHANNELS, -1).double().numpy()) for row in x])
    pooling = pooling.float()
    for given in (x, x.flatten(1, 2)):
        out = pooling(given)
        assert out.shape == (2, pooling.output_channels)
        assert np.allclose(out.detach().numpy(), expected, atol=2e-5)


def others():
    normed = AttentiveStatistics(CHANNELS, 4, norm=True)
    return {"SpeechBrain's": normed, "ResNetSE34V2's": ChannelAttention(CHANNELS, statistics=True)}


@pytest.mark.parametrize("name", [*POOLINGS, *others()])
@pytest.mark.parametrize("frames", [1, 2, 50])
@pytest.mark.parametrize("value", [0.0, 300.0, 60000.0])
def test_poolings_survive_constant_input_and_fp16(name, frames, value):
    pooling = others()[name].eval() if name in others() else build(name).float()
    x = torch.full((2, CHANNELS, frames), value, dtype=torch.float16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        out = pooling(x)
    assert out.dtype is torch.float32
    out.sum().backward()
    assert out.isfinite().all() and x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in pooling.parameters())


@pytest.mark.parametrize("name", [name for name in POOLINGS if name not in ("TAP", "SAP")])
def test_a_deviation_of_large_values_does_not_cancel(name):
    x = torch.randn(1, CHANNELS, 40, generator=torch.Generator().manual_seed(2))
    shifted = build(name).float()(x + 4096.0)[:, -1]  # E[x^2] - mean^2 would lose all of it
    assert 0.3 < float(shifted.detach()) < 2.0


@pytest.mark.parametrize("name", POOLINGS)
def test_resnet_takes_every_pooling(name):
    model = ResNet.MainModel(nOut=8, n_mels=20, m_channels=2, blocks=(1, 1, 1, 1), pooling=name)
    assert model(torch.randn(2, 8000)).shape == (2, 8)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match=r"pooling: must be one of TAP, .*; got 'MEAN'"):
        make_pooling("MEAN", 4)
    with pytest.raises(ValueError, match="10 channels do not divide into 8 heads"):
        make_pooling("MQMHASTP", 10)


@pytest.mark.parametrize("norm", [False, True])
def test_a_context_that_is_projected_once_is_the_one_that_is_appended_to_each_frame(norm):
    torch.manual_seed(0)
    pool = AttentiveStatistics(CHANNELS, 4, norm=norm).double()
    x = torch.randn(3, CHANNELS, 20, dtype=torch.float64, requires_grad=True)
    context = pool.context(x).double().unsqueeze(2).expand(-1, -1, 20)
    plain = pool.linear1(torch.cat([x, context], dim=1))
    once = pool.with_context(x)
    assert torch.allclose(once, plain, rtol=1e-6, atol=1e-6)
    (wanted,), (found,) = (torch.autograd.grad(y.square().sum(), x) for y in (plain, once))
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
