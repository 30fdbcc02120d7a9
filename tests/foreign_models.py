"""Models of other toolkits, written again from the tensors of their files: names, arithmetic and features."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from reference_features import kaldi_fbank, mel_spectrogram


def voice(samples=24000, seed=0):
    """Noise with a spectrum and level that come and go like speech's."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(1, samples, generator=rng)
    x = F.conv1d(x[None], torch.hann_window(9)[None, None], padding=4)[0]
    return 0.05 * x * (1.2 + torch.sin(torch.arange(samples) / 1500.0))


def random_state(shapes: dict, seed=1):
    """Weights that keep activations near 1, and BatchNorm statistics that are no identity."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = 0.5 + torch.rand(shape, generator=rng)
        else:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 1
            state[name] = torch.randn(shape, generator=rng) / math.sqrt(max(fan, 1)) + (len(shape) == 1) * 0.1
    return state


class Reader:
    """Layers by the names of a foreign state_dict."""

    def __init__(self, state, padding="zeros"):
        self.state, self.padding = state, padding

    def conv(self, x, name, dilation=1):
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        pad = (weight.shape[2] - 1) * dilation // 2
        x = F.pad(x, (pad, pad), mode="reflect") if self.padding == "reflect" and pad else F.pad(x, (pad, pad))
        return F.conv1d(x, weight, bias, dilation=dilation)

    def conv2d(self, x, name, stride=1):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, weight.shape[2] // 2)

    def bn(self, x, name):
        s = self.state
        scale = s.get(f"{name}.weight"), s.get(f"{name}.bias")
        return F.batch_norm(x, s[f"{name}.running_mean"], s[f"{name}.running_var"], *scale)

    def linear(self, x, name):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])


def statistics(x, weights, least):
    mean = (x * weights).sum(2)
    return torch.cat([mean, ((x**2 * weights).sum(2) - mean**2).clamp(min=least).sqrt()], 1)


def normed(shapes, name, size, affine=True):
    for part in ("weight", "bias", "running_mean", "running_var")[0 if affine else 2 :]:
        shapes[f"{name}.{part}"] = (size,)
    shapes[f"{name}.num_batches_tracked"] = ()


def layer(shapes, name, *size, bias=True):
    shapes[f"{name}.weight"] = size
    if bias:
        shapes[f"{name}.bias"] = size[:1]


# ---------------------------------------------------------------------------------------------- TaoRuijie/ECAPA-TDNN


def taoruijie(channels=32):
    shapes = {}
    width = channels // 8
    layer(shapes, "conv1", channels, 80, 5)
    normed(shapes, "bn1", channels)
    for i in (1, 2, 3):
        for part in ("conv1", "conv3"):
            layer(shapes, f"layer{i}.{part}", channels, channels, 1)
            normed(shapes, f"layer{i}.{part.replace('conv', 'bn')}", channels)
        for j in range(7):
            layer(shapes, f"layer{i}.convs.{j}", width, width, 3)
            normed(shapes, f"layer{i}.bns.{j}", width)
        layer(shapes, f"layer{i}.se.se.1", 128, channels, 1)
        layer(shapes, f"layer{i}.se.se.3", channels, 128, 1)
    layer(shapes, "layer4", 1536, 3 * channels, 1)
    layer(shapes, "attention.0", 256, 4608, 1)
    normed(shapes, "attention.2", 256)
    layer(shapes, "attention.4", 1536, 256, 1)
    normed(shapes, "bn5", 3072)
    layer(shapes, "fc6", 192, 3072)
    normed(shapes, "bn6", 192)
    state = random_state(shapes)
    file = {f"speaker_encoder.{name}": tensor for name, tensor in state.items()}
    file["speaker_encoder.torchfbank.0.flipped_filter"] = torch.tensor([[[-0.97, 1.0]]])
    file["speaker_encoder.torchfbank.1.spectrogram.window"] = torch.hamming_window(400)
    file["speaker_loss.weight"] = torch.randn(9, 192)

    def embed(x):
        x = F.conv1d(F.pad(x[None], (1, 0), "reflect"), torch.tensor([[[-0.97, 1.0]]]))[0]
        x = (mel_spectrogram(x, 80, 20, 7600) + 1e-6).log()
        x = x - x.mean(2, keepdim=True)
        r = Reader(state)

        def block(x, name, dilation):
            groups = r.bn(r.conv(x, f"{name}.conv1").relu(), f"{name}.bn1").split(width, 1)
            outputs, last = [], 0
            for j in range(7):
                last = r.bn(r.conv(groups[j] + last, f"{name}.convs.{j}", dilation).relu(), f"{name}.bns.{j}")
                outputs.append(last)
            out = torch.cat([*outputs, groups[7]], 1)
            out = r.bn(r.conv(out, f"{name}.conv3").relu(), f"{name}.bn3")
            gate = r.conv(out.mean(2, keepdim=True), f"{name}.se.se.1").relu()
            return x + out * r.conv(gate, f"{name}.se.se.3").sigmoid()

        x = r.bn(r.conv(x, "conv1").relu(), "bn1")
        x1 = block(x, "layer1", 2)
        x2 = block(x + x1, "layer2", 3)
        x3 = block(x + x1 + x2, "layer3", 4)
        x = r.conv(torch.cat([x1, x2, x3], 1), "layer4").relu()
        context = torch.cat([x.mean(2), x.var(2).clamp(min=1e-4).sqrt()], 1)[:, :, None].expand(-1, -1, x.shape[2])
        hidden = r.bn(r.conv(torch.cat([x, context], 1), "attention.0").relu(), "attention.2").tanh()
        x = statistics(x, r.conv(hidden, "attention.4").softmax(2), 1e-4)
        return r.bn(r.linear(r.bn(x, "bn5"), "fc6"), "bn6")

    return file, {"model": "ECAPA_TDNN", "channels": channels, "layout": "taoruijie", "features": "taoruijie"}, embed


# ------------------------------------------------------------------------------------- SpeechBrain, and 3D-Speaker's


def speechbrain_fbank(x):
    spectrum = torch.stft(
        x, 400, 160, 400, torch.hamming_window(400), center=True, pad_mode="constant", return_complex=True
    )
    power = (spectrum.real**2 + spectrum.imag**2)[0].T.numpy().astype(float)
    mel = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82)
    hz = 700 * (10 ** (mel / 2595) - 1)
    bins = np.linspace(0, 8000, 201)
    filters = np.zeros((201, 80))
    for k in range(80):
        left, centre = hz[k], hz[k + 1]
        for b, frequency in enumerate(bins):  # as wide above the centre as below it
            filters[b, k] = max(0.0, 1 - abs(frequency - centre) / (centre - left))
    decibels = 10 * np.log10(np.maximum(power @ filters, 1e-10))
    decibels = np.maximum(decibels, decibels.max() - 80)
    return torch.from_numpy(decibels.T[None] - decibels.T[None].mean(2, keepdims=True)).float()


def centred_fbank(x, window, scale):
    fbank = kaldi_fbank(x * scale, 80, window)
    return (fbank - fbank.mean(0)).T[None]


def speechbrain(features="speechbrain", channels=32, aggregate=48):
    shapes, width = {}, channels // 8
    layer(shapes, "blocks.0.conv.conv", channels, 80, 5)
    normed(shapes, "blocks.0.norm.norm", channels)
    for i in (1, 2, 3):
        for part in ("tdnn1", "tdnn2"):
            layer(shapes, f"blocks.{i}.{part}.conv.conv", channels, channels, 1)
            normed(shapes, f"blocks.{i}.{part}.norm.norm", channels)
        for j in range(7):
            layer(shapes, f"blocks.{i}.res2net_block.blocks.{j}.conv.conv", width, width, 3)
            normed(shapes, f"blocks.{i}.res2net_block.blocks.{j}.norm.norm", width)
        layer(shapes, f"blocks.{i}.se_block.conv1.conv", 128, channels, 1)
        layer(shapes, f"blocks.{i}.se_block.conv2.conv", channels, 128, 1)
    layer(shapes, "mfa.conv.conv", aggregate, 3 * channels, 1)
    normed(shapes, "mfa.norm.norm", aggregate)
    layer(shapes, "asp.tdnn.conv.conv", 128, 3 * aggregate, 1)
    normed(shapes, "asp.tdnn.norm.norm", 128)
    layer(shapes, "asp.conv.conv", aggregate, 128, 1)
    normed(shapes, "asp_bn.norm", 2 * aggregate)
    layer(shapes, "fc.conv", 192, 2 * aggregate, 1)
    state = random_state(shapes, 2)

    def embed(x):
        x = speechbrain_fbank(x) if features == "speechbrain" else centred_fbank(x, "povey", 1)
        r = Reader(state, "reflect")

        def tdnn(x, name, dilation=1):
            return r.bn(r.conv(x, f"{name}.conv.conv", dilation).relu(), f"{name}.norm.norm")

        def block(x, name, dilation):
            groups = tdnn(x, f"{name}.tdnn1").chunk(8, 1)
            outputs = [groups[0]]
            for j in range(7):
                given = groups[j + 1] + (outputs[-1] if j else 0)
                outputs.append(tdnn(given, f"{name}.res2net_block.blocks.{j}", dilation))
            out = tdnn(torch.cat(outputs, 1), f"{name}.tdnn2")
            gate = r.conv(out.mean(2, keepdim=True), f"{name}.se_block.conv1.conv").relu()
            return x + out * r.conv(gate, f"{name}.se_block.conv2.conv").sigmoid()

        x = tdnn(x, "blocks.0")
        kept = []
        for i, dilation in ((1, 2), (2, 3), (3, 4)):
            x = block(x, f"blocks.{i}", dilation)
            kept.append(x)
        x = tdnn(torch.cat(kept, 1), "mfa")
        context = statistics(x, torch.full_like(x[:, :1], 1 / x.shape[2]), 1e-12)
        hidden = tdnn(torch.cat([x, context[:, :, None].expand(-1, -1, x.shape[2])], 1), "asp.tdnn").tanh()
        x = statistics(x, r.conv(hidden, "asp.conv.conv").softmax(2), 1e-12)
        return r.conv(r.bn(x, "asp_bn.norm")[:, :, None], "fc.conv")[:, :, 0]

    keys = {"model": "ECAPA_TDNN", "channels": channels, "aggregate": aggregate, "layout": "speechbrain"}
    return state, {**keys, "features": features}, embed


def threedspeaker():
    return speechbrain("3dspeaker")


# --------------------------------------------------------------------------------------------------------- wespeaker


def wespeaker_ecapa(channels=32):
    shapes, width = {}, channels // 8
    layer(shapes, "layer1.conv", channels, 80, 5)
    normed(shapes, "layer1.bn", channels)
    for i in (2, 3, 4):
        for part in (0, 2):
            layer(shapes, f"layer{i}.se_res2block.{part}.conv", channels, channels, 1)
            normed(shapes, f"layer{i}.se_res2block.{part}.bn", channels)
        for j in range(7):
            layer(shapes, f"layer{i}.se_res2block.1.convs.{j}", width, width, 3)
            normed(shapes, f"layer{i}.se_res2block.1.bns.{j}", width)
        layer(shapes, f"layer{i}.se_res2block.3.linear1", 128, channels)
        layer(shapes, f"layer{i}.se_res2block.3.linear2", channels, 128)
    layer(shapes, "conv", 1536, 3 * channels, 1)
    layer(shapes, "pool.linear1", 128, 4608, 1)
    layer(shapes, "pool.linear2", 1536, 128, 1)
    normed(shapes, "bn", 3072)
    layer(shapes, "linear", 192, 3072)
    state = random_state(shapes, 3)

    def embed(x):
        x = centred_fbank(x, "hamming", 32768)
        r = Reader(state)

        def unit(x, name, dilation=1):
            return r.bn(r.conv(x, f"{name}.conv", dilation).relu(), f"{name}.bn")

        def block(x, name, dilation):
            groups, outputs, last = unit(x, f"{name}.0").split(width, 1), [], 0
            for j in range(7):
                last = r.bn(r.conv(groups[j] + last, f"{name}.1.convs.{j}", dilation).relu(), f"{name}.1.bns.{j}")
                outputs.append(last)
            out = unit(torch.cat([*outputs, groups[7]], 1), f"{name}.2")
            gate = r.linear(r.linear(out.mean(2), f"{name}.3.linear1").relu(), f"{name}.3.linear2").sigmoid()
            return x + out * gate[:, :, None]

        x, kept = unit(x, "layer1"), []
        for i in (2, 3, 4):
            x = block(x, f"layer{i}.se_res2block", i)
            kept.append(x)
        x = r.conv(torch.cat(kept, 1), "conv").relu()
        context = torch.cat([x.mean(2), (x.var(2) + 1e-10).sqrt()], 1)[:, :, None].expand(-1, -1, x.shape[2])
        hidden = r.conv(torch.cat([x, context], 1), "pool.linear1").tanh()
        x = statistics(x, r.conv(hidden, "pool.linear2").softmax(2), 1e-10)
        return r.linear(r.bn(x, "bn"), "linear")

    return {**state, "projection.weight": torch.randn(9, 192)}, {"model": "ECAPA_TDNN", "channels": channels}, embed


def wespeaker_resnet(m=4):
    shapes = {}
    layer(shapes, "conv1", m, 1, 3, 3, bias=False)
    normed(shapes, "bn1", m)
    inplanes, plan = m, []
    for i, (count, stride) in enumerate(zip((3, 4, 6, 3), (1, 2, 2, 2)), 1):
        planes = m * 2 ** (i - 1)
        for j in range(count):
            name, step = f"layer{i}.{j}", stride if j == 0 else 1
            layer(shapes, f"{name}.conv1", planes, inplanes, 3, 3, bias=False)
            layer(shapes, f"{name}.conv2", planes, planes, 3, 3, bias=False)
            normed(shapes, f"{name}.bn1", planes)
            normed(shapes, f"{name}.bn2", planes)
            if step != 1 or inplanes != planes:
                layer(shapes, f"{name}.shortcut.0", planes, inplanes, 1, 1, bias=False)
                normed(shapes, f"{name}.shortcut.1", planes)
            plan.append((name, step))
            inplanes = planes
    layer(shapes, "seg_1", 256, inplanes * 10 * 2)
    state = random_state(shapes, 4)

    def embed(x):
        r = Reader(state)
        x = r.bn(r.conv2d(centred_fbank(x, "hamming", 32768)[:, None], "conv1"), "bn1").relu()
        for name, step in plan:
            out = r.bn(r.conv2d(x, f"{name}.conv1", step), f"{name}.bn1").relu()
            out = r.bn(r.conv2d(out, f"{name}.conv2"), f"{name}.bn2")
            if f"{name}.shortcut.0.weight" in state:
                x = r.bn(r.conv2d(x, f"{name}.shortcut.0", step), f"{name}.shortcut.1")
            x = (out + x).relu()
        stats = torch.cat([x.mean(3).flatten(1), (x.var(3) + 1e-8).sqrt().flatten(1)], 1)
        return r.linear(stats, "seg_1")

    file = {**state, "projection.weight": torch.randn(9, 256)}
    return file, {"model": "ResNet34", "m_channels": m, "nOut": 256}, embed


# -------------------------------------------------------------------------------------------------- voxceleb_trainer


def se_resnet(filters, stem, strides):
    """Shapes and blocks of voxceleb_trainer's ResNetSE models, but for the pooling."""
    shapes, plan, inplanes = {}, [], filters[0]
    layer(shapes, "conv1", filters[0], 1, stem, stem, bias=stem == 3)
    normed(shapes, "bn1", filters[0])
    for i, (count, planes, stride) in enumerate(zip((3, 4, 6, 3), filters, strides), 1):
        for j in range(count):
            name, step = f"layer{i}.{j}", stride if j == 0 else 1
            layer(shapes, f"{name}.conv1", planes, inplanes, 3, 3, bias=False)
            layer(shapes, f"{name}.conv2", planes, planes, 3, 3, bias=False)
            normed(shapes, f"{name}.bn1", planes)
            normed(shapes, f"{name}.bn2", planes)
            layer(shapes, f"{name}.se.fc.0", planes // 8, planes)
            layer(shapes, f"{name}.se.fc.2", planes, planes // 8)
            if step != 1 or inplanes != planes:
                layer(shapes, f"{name}.downsample.0", planes, inplanes, 1, 1, bias=False)
                normed(shapes, f"{name}.downsample.1", planes)
            plan.append((name, step))
            inplanes = planes
    return shapes, plan


def se_blocks(r, x, plan):
    for name, step in plan:
        out = r.bn(r.conv2d(x, f"{name}.conv1", step).relu(), f"{name}.bn1")
        out = r.bn(r.conv2d(out, f"{name}.conv2"), f"{name}.bn2")
        gate = r.linear(r.linear(out.mean((2, 3)), f"{name}.se.fc.0").relu(), f"{name}.se.fc.2").sigmoid()
        if f"{name}.downsample.0.weight" in r.state:
            x = r.bn(r.conv2d(x, f"{name}.downsample.0", step), f"{name}.downsample.1")
        x = (out * gate[:, :, None, None] + x).relu()
    return x


def vt_mel(x, n_mels):
    return F.instance_norm((mel_spectrogram(x, n_mels) + 1e-6).log())[:, None]


def resnetse34l(encoder="SAP", n_out=48, filters=(8, 8, 16, 16)):
    last = filters[3]
    shapes, plan = se_resnet(filters, 7, (1, 2, 2, 1))
    layer(shapes, "sap_linear", last, last)
    shapes["attention"] = (last, 1)
    layer(shapes, "fc", n_out, last * (2 if encoder == "ASP" else 1))
    state = random_state(shapes, 5)

    def embed(x):
        r = Reader(state)
        x = r.bn(F.conv2d(vt_mel(x, 40), state["conv1.weight"], None, (2, 1), 3), "bn1").relu()
        x = se_blocks(r, x, plan).mean(2)
        weights = (r.linear(x.transpose(1, 2), "sap_linear").tanh() @ state["attention"]).softmax(1).transpose(1, 2)
        x = (x * weights).sum(2) if encoder == "SAP" else statistics(x, weights, 1e-5)
        return r.linear(x, "fc")

    file = {f"__S__.{name}": tensor for name, tensor in state.items()}
    file["__S__.torchfb.mel_scale.fb"] = torch.zeros(257, 40)
    file |= {"__L__.w": torch.tensor(11.0), "__L__.b": torch.tensor(-4.0)}
    keys = {"model": "ResNetSE34L", "num_filters": filters, "nOut": n_out, "n_mels": 40, "encoder_type": encoder}
    return file, {**keys, "log_input": True}, embed


def resnetse34l_asp():
    return resnetse34l("ASP")


def resnetse34v2(n_out=48, filters=(8, 8, 16, 16)):
    last = filters[3] * 8
    shapes, plan = se_resnet(filters, 3, (1, 2, 2, 2))
    layer(shapes, "attention.0", 128, last, 1)
    normed(shapes, "attention.2", 128)
    layer(shapes, "attention.3", last, 128, 1)
    layer(shapes, "fc", n_out, 2 * last)
    state = random_state(shapes, 6)

    def embed(x):
        r = Reader(state)
        x = F.conv1d(F.pad(x[None], (1, 0), "reflect"), torch.tensor([[[-0.97, 1.0]]]))[0]
        x = r.bn(r.conv2d(vt_mel(x, 64), "conv1").relu(), "bn1")
        x = se_blocks(r, x, plan).flatten(1, 2)
        weights = r.conv(r.bn(r.conv(x, "attention.0").relu(), "attention.2"), "attention.3").softmax(2)
        return r.linear(statistics(x, weights, 1e-5), "fc")

    file = {f"__S__.{name}": tensor for name, tensor in state.items()}
    file["__S__.torchfb.0.flipped_filter"] = torch.tensor([[[-0.97, 1.0]]])
    keys = {"model": "ResNetSE34V2", "num_filters": filters, "nOut": n_out, "n_mels": 64, "encoder_type": "ASP"}
    return file, {**keys, "log_input": True}, embed


CASES = [
    taoruijie,
    speechbrain,
    threedspeaker,
    wespeaker_ecapa,
    wespeaker_resnet,
    resnetse34l,
    resnetse34l_asp,
    resnetse34v2,
]
