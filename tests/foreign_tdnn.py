"""CAM++, x-vector and VGGVox of other toolkits, written again from the tensors of their files."""

import torch
import torch.nn.functional as F
from foreign_models import Reader, centred_fbank, layer, normed, random_state
from reference_features import mel_spectrogram


def campplus_shapes(m, channels, growth, blocks, n_out):
    shapes = {}
    layer(shapes, "head.conv1", m, 1, 3, 3, bias=False)
    normed(shapes, "head.bn1", m)
    for name in ("layer1.0", "layer1.1", "layer2.0", "layer2.1"):
        for part in (1, 2):
            layer(shapes, f"head.{name}.conv{part}", m, m, 3, 3, bias=False)
            normed(shapes, f"head.{name}.bn{part}", m)
        if name.endswith("0"):
            layer(shapes, f"head.{name}.shortcut.0", m, m, 1, 1, bias=False)
            normed(shapes, f"head.{name}.shortcut.1", m)
    layer(shapes, "head.conv2", m, m, 3, 3, bias=False)
    normed(shapes, "head.bn2", m)
    layer(shapes, "xvector.tdnn.linear", channels, m * 10, 5, bias=False)
    normed(shapes, "xvector.tdnn.nonlinear.batchnorm", channels)
    for i, count in enumerate(blocks, 1):
        for j in range(1, count + 1):
            name, wide = f"xvector.block{i}.tdnnd{j}", 4 * growth
            normed(shapes, f"{name}.nonlinear1.batchnorm", channels)
            layer(shapes, f"{name}.linear1", wide, channels, 1, bias=False)
            normed(shapes, f"{name}.nonlinear2.batchnorm", wide)
            layer(shapes, f"{name}.cam_layer.linear_local", growth, wide, 3, bias=False)
            layer(shapes, f"{name}.cam_layer.linear1", wide // 2, wide, 1)
            layer(shapes, f"{name}.cam_layer.linear2", growth, wide // 2, 1)
            channels += growth
        normed(shapes, f"xvector.transit{i}.nonlinear.batchnorm", channels)
        layer(shapes, f"xvector.transit{i}.linear", channels // 2, channels, 1, bias=False)
        channels //= 2
    normed(shapes, "xvector.out_nonlinear.batchnorm", channels)
    layer(shapes, "xvector.dense.linear", n_out, 2 * channels, 1, bias=False)
    normed(shapes, "xvector.dense.nonlinear.batchnorm", n_out, affine=False)
    return shapes


def campplus(features="3dspeaker", m=4, channels=16, growth=6, blocks=(2, 3, 2), n_out=32):
    state = random_state(campplus_shapes(m, channels, growth, blocks, n_out), 7)
    r = Reader(state)

    def residual(x, name, stride):
        out = r.bn(r.conv2d(x, f"{name}.conv1", (stride, 1)), f"{name}.bn1").relu()
        out = r.bn(r.conv2d(out, f"{name}.conv2"), f"{name}.bn2")
        if stride == 2:
            x = r.bn(F.conv2d(x, state[f"{name}.shortcut.0.weight"], stride=(2, 1)), f"{name}.shortcut.1")
        return (out + x).relu()

    def masked(x, name, dilation):
        local = r.conv(x, f"{name}.linear_local", dilation)
        segments = [x[:, :, at : at + 100] for at in range(0, x.shape[2], 100)]
        near = torch.cat([part.mean(2, keepdim=True).expand_as(part) for part in segments], 2)
        gate = r.conv((x.mean(2, keepdim=True) + near), f"{name}.linear1").relu()
        return local * r.conv(gate, f"{name}.linear2").sigmoid()

    def embed(x):
        x = centred_fbank(x, "povey", 1) if features == "3dspeaker" else centred_fbank(x, "hamming", 32768)
        x = r.bn(r.conv2d(x[:, None], "head.conv1"), "head.bn1").relu()
        for name, stride in (("layer1.0", 2), ("layer1.1", 1), ("layer2.0", 2), ("layer2.1", 1)):
            x = residual(x, f"head.{name}", stride)
        x = r.bn(r.conv2d(x, "head.conv2", (2, 1)), "head.bn2").relu().flatten(1, 2)
        x = F.conv1d(x, state["xvector.tdnn.linear.weight"], stride=2, padding=2)
        x = r.bn(x, "xvector.tdnn.nonlinear.batchnorm").relu()
        for i, (count, dilation) in enumerate(zip(blocks, (1, 2, 2)), 1):
            for j in range(1, count + 1):
                name = f"xvector.block{i}.tdnnd{j}"
                out = r.conv(r.bn(x, f"{name}.nonlinear1.batchnorm").relu(), f"{name}.linear1")
                out = masked(r.bn(out, f"{name}.nonlinear2.batchnorm").relu(), f"{name}.cam_layer", dilation)
                x = torch.cat([x, out], 1)
            name = f"xvector.transit{i}"
            x = r.conv(r.bn(x, f"{name}.nonlinear.batchnorm").relu(), f"{name}.linear")
        x = r.bn(x, "xvector.out_nonlinear.batchnorm").relu()
        x = r.conv(torch.cat([x.mean(2), x.std(2)], 1)[:, :, None], "xvector.dense.linear")
        return r.bn(x, "xvector.dense.nonlinear.batchnorm")[:, :, 0]

    file = state if features == "3dspeaker" else {**state, "projection.weight": torch.randn(9, n_out)}
    sizes = {"m_channels": m, "init_channels": channels, "growth_rate": growth, "blocks": blocks, "nOut": n_out}
    return file, {"model": "CAMPPlus", "features": features, **sizes}, embed


def wespeaker_campplus():
    return campplus("wespeaker")


def wespeaker_xvector(channels=24, stats=40, n_out=32):
    shapes, inputs = {}, 80
    plan = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))
    for i, (kernel, _) in enumerate(plan, 1):
        width = stats if i == 5 else channels
        layer(shapes, f"frame_{i}.conv_1d", width, inputs, kernel)
        normed(shapes, f"frame_{i}.bn", width, affine=False)
        inputs = width
    layer(shapes, "seg_1", n_out, 2 * stats)
    normed(shapes, "seg_bn_1", n_out, affine=False)
    layer(shapes, "seg_2", n_out, n_out)
    state = random_state(shapes, 8)

    def embed(x):
        r = Reader(state)
        x = centred_fbank(x, "hamming", 32768)
        for i, (_, dilation) in enumerate(plan, 1):
            name = f"frame_{i}"
            x = F.conv1d(x, state[f"{name}.conv_1d.weight"], state[f"{name}.conv_1d.bias"], dilation=dilation)
            x = r.bn(x.relu(), f"{name}.bn")
        first = r.linear(torch.cat([x.mean(2), (x.var(2) + 1e-7).sqrt()], 1), "seg_1")
        return r.linear(r.bn(first.relu(), "seg_bn_1"), "seg_2")

    file = {**state, "projection.weight": torch.randn(9, n_out)}
    return file, {"model": "XVector", "channels": channels, "stats_channels": stats, "nOut": n_out}, embed


def vggvox(filters=(6, 8, 8, 6, 6, 8), n_out=32):
    shapes, inputs = {}, 1
    kernels = {0: (5, 7), 4: (5, 5), 8: (3, 3), 11: (3, 3), 14: (3, 3), 18: (4, 1)}
    for (at, kernel), width in zip(kernels.items(), filters):
        layer(shapes, f"netcnn.{at}", width, inputs, *kernel)
        normed(shapes, f"netcnn.{at + 1}", width)
        inputs = width
    layer(shapes, "sap_linear", inputs, inputs)
    shapes["attention"] = (inputs, 1)
    layer(shapes, "fc", n_out, inputs)
    state = random_state(shapes, 9)

    def embed(x):
        r = Reader(state)

        def unit(x, at, stride, padding):
            weight, bias = state[f"netcnn.{at}.weight"], state[f"netcnn.{at}.bias"]
            return r.bn(F.conv2d(x, weight, bias, stride, padding), f"netcnn.{at + 1}").relu()

        x = F.instance_norm((mel_spectrogram(x, 40, window="hann") + 1e-6).log())[:, None]
        x = F.max_pool2d(unit(x, 0, (1, 2), 2), (1, 3), (1, 2))
        x = F.max_pool2d(unit(x, 4, 2, 1), 3, 2)
        for at in (8, 11, 14):
            x = unit(x, at, 1, 1)
        x = unit(F.max_pool2d(x, 3, 2), 18, 1, 0)[:, :, 0]
        weights = (r.linear(x.transpose(1, 2), "sap_linear").tanh() @ state["attention"]).softmax(1).transpose(1, 2)
        return r.linear((x * weights).sum(2), "fc")

    file = {f"__S__.{name}": tensor for name, tensor in state.items()}
    file |= {"__S__.torchfb.spectrogram.window": torch.hann_window(400), "__L__.w": torch.tensor(11.0)}
    keys = {"model": "VGGVox", "num_filters": filters, "nOut": n_out, "n_mels": 40, "encoder_type": "SAP"}
    return file, {**keys, "log_input": True}, embed


CASES = [campplus, wespeaker_campplus, wespeaker_xvector, vggvox]
