"""Models, front end and losses against independent formulas."""

import math

import numpy as np
import pytest
import torch
from foreign_res2net import sinc_filters

from loss import aamsoftmax, amsoftmax, angleproto, ge2e, proto, softmaxproto, triplet
from models import CAMPPlus, ERes2Net, RawNet3, ResNet, SimAM_ResNet, VGGVox, XVector
from models.frontend import FrontEnd
from models.ResNetBlocks import SELayer


@pytest.mark.parametrize("frames", [1, 99, 100, 101, 250])
def test_context_aware_mask_of_cam(frames):
    torch.manual_seed(0)
    layer = CAMPPlus.ContextAwareMask(6, 4, dilation=2)
    x = torch.randn(2, 6, frames)
    local, expected = layer.linear_local(x), torch.empty(2, 4, frames)
    for t in range(frames):  # a mask for each frame, as in equations 3 to 6 of the paper
        segment = x[:, :, t // 100 * 100 :][:, :, :100]
        context = (x.mean(2) + segment.mean(2))[:, :, None]
        expected[:, :, t] = local[:, :, t] * layer.linear2(layer.linear1(context).relu()).sigmoid()[:, :, 0]
    assert torch.allclose(layer(x), expected, atol=1e-6)


@pytest.mark.parametrize("module, samples", [(CAMPPlus, 400), (XVector, 400), (VGGVox, 400), (VGGVox, 9000)])
def test_the_shortest_input_gives_an_embedding(module, samples):
    model = module.MainModel(nOut=8, features="wespeaker").eval()
    with torch.inference_mode():
        assert model(0.1 * torch.randn(2, samples)).isfinite().all()


NARROW = {"m_channels": 8, "blocks": (1, 1, 1, 1)}


@pytest.mark.parametrize(
    "module, keys",
    [
        (ERes2Net, NARROW),
        (ERes2Net, {**NARROW, "size": "V2_w24s4ep4", "two_emb_layer": True}),
        (SimAM_ResNet, NARROW),
        (RawNet3, {"channels": 16}),
    ],
)
def test_the_shortest_input_gives_an_embedding_of_narrow_models(module, keys):
    model = module.MainModel(nOut=8, **keys).eval()
    with torch.inference_mode():
        assert model(0.1 * torch.randn(2, 400)).isfinite().all()
        with pytest.raises(ValueError, match=r"needs at least \d+ samples, got 390"):
            model(torch.zeros(2, 390))


@pytest.mark.parametrize(
    "module, keys, said",
    [
        (ERes2Net, {"size": "B0"}, "size: must be one of base, large, huge, V2"),
        (ERes2Net, {"size": "V2", "m_channels": 2}, "m_channels: ERes2Net of size V2 needs at least 3"),
        (SimAM_ResNet, {"depth": 18}, "depth: must be one of 34, 100"),
        (
            RawNet3,
            {"encoder_type": "SAP"},
            "encoder_type: RawNet3 has ECA and ASP; got 'SAP'; the published model's is ECA",
        ),
        (RawNet3, {"channels": 12}, "channels: RawNet3 needs a multiple of 8"),
        (ResNet, {"blocks": (1, 1, 1, 0)}, r"blocks: each stage needs at least 1, got \[1, 1, 1, 0\]"),
        (ERes2Net, {"blocks": (2, 0, 0, 0)}, "blocks: each stage needs at least 1"),
        (SimAM_ResNet, {"blocks": (1, 1, -1, 1)}, "blocks: each stage needs at least 1"),
        (XVector, {"spec_augment": (5, -1)}, r"spec_augment: must be two widths of at least 0, got \[5, -1\]"),
    ],
)
def test_settings_that_a_model_does_not_have_are_refused_by_name(module, keys, said):
    with pytest.raises(ValueError, match=said):
        module.MainModel(**keys)


def test_squeeze_and_excitation_of_few_channels_has_a_bottleneck():
    layer = SELayer(4)
    assert layer.fc[0].weight.shape == (1, 4)
    torch.nn.init.ones_(layer.fc[0].weight)  # not below 0, where the ReLU would take it away
    x = 1 + torch.rand(2, 4, 3, 5)
    assert not torch.allclose(layer(x) / x, layer(2 * x) / (2 * x))  # the gate depends on the maps


def test_simam_is_its_formula_and_survives_fp16_and_constant_maps():  # Yang et al. 2021, equation 5
    x = 300.0 * torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.float16):
        out = SimAM_ResNet.simam(x.half())
    for row, expected in zip(out.flatten(0, 1).double().numpy(), x.half().flatten(0, 1).double().numpy()):
        energy = (
            4 * (expected.var(ddof=1) + 1e-4) / ((expected - expected.mean()) ** 2 + 2 * expected.var(ddof=1) + 2e-4)
        )
        assert np.allclose(row, expected / (1 + np.exp(-1 / energy)), rtol=2e-3)
    for value, size in ((0.0, (5, 7)), (6e4, (5, 7)), (-6e4, (1, 1))):
        flat = torch.full((1, 2, *size), value, dtype=torch.float16).requires_grad_()
        with torch.autocast("cpu", dtype=torch.float16):
            out = SimAM_ResNet.simam(flat)
        out.float().sum().backward()
        assert torch.allclose(out.float(), flat.float() * 0.6225, rtol=1e-3) and flat.grad.isfinite().all()


def test_sinc_filters_are_their_formula_and_pass_their_bands():
    bank = RawNet3.SincFilters(16, 251, 10)
    filters = bank.filters()[:, 0].detach()
    assert torch.allclose(filters, sinc_filters(bank.low_hz.detach(), bank.band_hz.detach()), atol=1e-5)
    peaks = torch.fft.rfft(filters, 16000).abs().argmax(dim=1).view(2, 8)  # bins of 1 Hz
    low = 50 + bank.low_hz[:, 0]
    assert ((peaks > low - 40) & (peaks < low + 50 + bank.band_hz[:, 0] + 40)).all()
    bank.low_hz.data[:3, 0] = torch.tensor([7950.0, -1e5, 0.0])  # trained past the Nyquist frequency, and to the bottom
    bank.band_hz.data[:3] = 0.0
    filters = bank.filters()
    filters.square().sum().backward()
    assert filters.isfinite().all() and bank.low_hz.grad.isfinite().all() and bank.band_hz.grad.isfinite().all()


def test_xvector_gives_either_embedding_in_evaluation():
    torch.manual_seed(0)
    model = XVector.MainModel(nOut=8, channels=8, stats_channels=8).eval()
    x = 0.1 * torch.randn(2, 8000)
    last = model(x)
    model.embedding_layer = 1
    first = model(x)
    assert torch.allclose(model.seg_2(model.seg_bn_1(first.relu())), last)
    torch.manual_seed(1)
    trained = model.train()(x)
    model.embedding_layer = 2
    assert torch.equal(model(x), trained)  # training is on the last layer whatever the key says


@pytest.mark.parametrize("encoder", ["SAP", "TAP", "ASP", "MAX"])
def test_vggvox_encoders(encoder):
    model = VGGVox.MainModel(nOut=8, encoder_type=encoder, n_mels=24, num_filters=(4,) * 6)
    assert model(0.1 * torch.randn(2, 16000)).shape == (2, 8)


def test_front_end_is_fp32_under_autocast():
    x = 1e-3 * torch.randn(1, 16000, generator=torch.Generator().manual_seed(0))
    for kind in ("voxceleb_trainer", "wespeaker"):
        front = FrontEnd(kind, 40, "mean", preemphasis=True)
        with torch.autocast("cpu", dtype=torch.float16):
            assert torch.equal(front(x), FrontEnd(kind, 40, "mean", preemphasis=True)(x.clone()))
            assert front(x).dtype is torch.float32
        assert torch.allclose(front(x), FrontEnd(kind, 40, "mean", preemphasis=True)(x))


def test_spec_augment_masks_in_training_only():
    front = FrontEnd("wespeaker", 40, "mean", spec_augment=(8, 20))
    x = 0.1 * torch.randn(3, 16000)
    torch.manual_seed(0)
    masked, clean = front.train()(x), front.eval()(x)
    assert torch.equal(clean, FrontEnd("wespeaker", 40, "mean").train()(x))
    changed = masked != clean
    assert changed.any(dim=(1, 2)).any() and changed.float().mean() < 0.7


# ------------------------------------------------------------------------------------------------------- losses


def cosines(x, w):
    x, w = x / np.linalg.norm(x, axis=1, keepdims=True), w / np.linalg.norm(w, axis=1, keepdims=True)
    return x @ w.T


def cross_entropy(logits, label):
    return float(np.mean([np.log(np.exp(row - row[y]).sum()) for row, y in zip(logits, label)]))


def margin_case(seed=0, rows=12):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, 6)), rng.integers(0, 4, rows)


def test_amsoftmax_formula():
    x, label = margin_case()
    loss = amsoftmax.LossFunction(6, 4, margin=0.25, scale=12.0)
    logits = cosines(x, loss.weight.detach().double().numpy())
    logits[np.arange(12), label] -= 0.25
    value, accuracy = loss(torch.tensor(x).float(), torch.tensor(label))
    assert float(value) == pytest.approx(cross_entropy(12 * logits, label), rel=1e-5)
    assert float(accuracy) == pytest.approx(100 * np.mean(logits.argmax(1) == label))


@pytest.mark.parametrize("easy", [False, True])
def test_aamsoftmax_formula(easy):
    x, label = margin_case(1, 60)
    loss = aamsoftmax.LossFunction(6, 4, margin=0.4, scale=9.0, easy_margin=easy)
    logits = cosines(x, loss.weight.detach().double().numpy())
    for row, y in enumerate(label):
        c = logits[row, y]
        if easy:
            logits[row, y] = math.cos(math.acos(c) + 0.4) if c > 0 else c
        else:
            logits[row, y] = math.cos(math.acos(c) + 0.4) if math.acos(c) < math.pi - 0.4 else c - (1 - math.cos(0.4))
    value, _ = loss(torch.tensor(x).float(), torch.tensor(label))
    assert float(value) == pytest.approx(cross_entropy(9 * logits, label), rel=1e-4)


def test_aamsoftmax_is_continuous_at_the_switch():
    loss = aamsoftmax.LossFunction(2, 2, margin=0.3, scale=1.0)
    loss.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    values = [
        float(loss(torch.tensor([[math.cos(t), math.sin(t)]]), torch.tensor([0]))[0])
        for t in np.pi - 0.3 + np.array([-1e-4, 1e-4])
    ]
    assert abs(values[0] - values[1]) < 1e-3


def pairs(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(5, 3, 6))


def test_angleproto_and_proto_formulas():
    x = pairs()
    cosine = cosines(x[:, 0], x[:, 1:].mean(1))
    value, accuracy = angleproto.LossFunction()(torch.tensor(x).float())
    assert float(value) == pytest.approx(cross_entropy(10 * cosine - 5, range(5)), rel=1e-5)
    assert float(accuracy) == pytest.approx(100 * np.mean(cosine.argmax(1) == np.arange(5)))
    distance = ((x[:, 0][:, None] - x[:, 1:].mean(1)[None]) ** 2).sum(2)
    assert float(proto.LossFunction()(torch.tensor(x).float())[0]) == pytest.approx(
        cross_entropy(-distance, range(5)), rel=1e-5
    )


def test_ge2e_formula():
    x = pairs(1)
    logits, label = [], []
    for j in range(5):
        for i in range(3):
            centroids = x.mean(1)
            centroids[j] = np.delete(x[j], i, 0).mean(0)
            logits.append(10 * cosines(x[j, i][None], centroids)[0] - 5)
            label.append(j)
    assert float(ge2e.LossFunction()(torch.tensor(x).float())[0]) == pytest.approx(
        cross_entropy(logits, label), rel=1e-5
    )


def test_triplet_formula_with_the_hardest_negative():
    x = pairs(2)[:, :2]
    loss, _ = triplet.LossFunction(margin=0.3, hard_rank=1, hard_prob=1.0)(torch.tensor(x).float())
    unit = x / np.linalg.norm(x, axis=2, keepdims=True)
    expected = []
    for i in range(5):
        distance = ((unit[i, 0] - unit[:, 1]) ** 2).sum(1)
        nearest = min(distance[j] for j in range(5) if j != i)
        expected.append(max(0, distance[i] - nearest + 0.3))
    assert float(loss) == pytest.approx(np.mean(expected), rel=1e-4)


def test_softmaxproto_is_the_sum_of_its_parts():
    torch.manual_seed(0)
    loss = softmaxproto.LossFunction(6, 7)
    x, label = torch.randn(5, 2, 6), torch.arange(5)
    both = loss.softmax(x.reshape(10, 6), label.repeat_interleave(2))[0] + loss.angleproto(x)[0]
    assert torch.allclose(loss(x, label)[0], both)
