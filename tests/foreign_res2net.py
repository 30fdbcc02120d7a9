"""3D-Speaker's and wespeaker's ERes2Nets, wespeaker's SimAM-ResNet and RawNet3, written again from their tensors."""

import numpy as np
import torch
import torch.nn.functional as F
from foreign_models import Reader, centred_fbank, layer, normed, random_state, statistics


def stages(counts, m, expansion=1):
    """(name, channels in, planes, stride) of each block of a ResNet."""
    inplanes = m
    for i, (count, stride) in enumerate(zip(counts, (1, 2, 2, 2))):
        for j in range(count):
            yield f"layer{i + 1}.{j}", inplanes, m * 2**i, stride if j == 0 else 1
            inplanes = m * 2**i * expansion


def temporal_statistics(x, least):
    return torch.cat([x.mean(3).flatten(1), (x.var(3) + least).sqrt().flatten(1)], 1)


# --------------------------------------------------------------------------------------------------------- ERes2Net


def fusion_shapes(shapes, name, channels):
    layer(shapes, f"{name}.local_att.0", channels // 4, 2 * channels, 1, 1)
    normed(shapes, f"{name}.local_att.1", channels // 4)
    layer(shapes, f"{name}.local_att.3", channels, channels // 4, 1, 1)
    normed(shapes, f"{name}.local_att.4", channels)


def eres2net_shapes(plan, m, base, groups, expansion, second):
    shapes, out = {}, m * expansion
    layer(shapes, "conv1", m, 1, 3, 3, bias=False)
    normed(shapes, "bn1", m)
    for name, inplanes, planes, stride in plan:
        width = planes * base // 64
        layer(shapes, f"{name}.conv1", width * groups, inplanes, 1, 1, bias=False)
        normed(shapes, f"{name}.bn1", width * groups)
        for i in range(groups):
            layer(shapes, f"{name}.convs.{i}", width, width, 3, 3, bias=False)
            normed(shapes, f"{name}.bns.{i}", width)
            if i and name[5] in "34":
                fusion_shapes(shapes, f"{name}.fuse_models.{i - 1}", width)
        layer(shapes, f"{name}.conv3", planes * expansion, width * groups, 1, 1, bias=False)
        normed(shapes, f"{name}.bn3", planes * expansion)
        if stride != 1 or inplanes != planes * expansion:
            layer(shapes, f"{name}.shortcut.0", planes * expansion, inplanes, 1, 1, bias=False)
            normed(shapes, f"{name}.shortcut.1", planes * expansion)
    for i, fuse in ((3, "fuse34"),) if second else ((1, "fuse_mode12"), (2, "fuse_mode123"), (3, "fuse_mode1234")):
        channels = out * 2**i
        layer(shapes, "layer3_ds" if second else f"layer{i}_downsample", channels, channels // 2, 3, 3, bias=False)
        fusion_shapes(shapes, fuse, channels)
    return shapes


def eres2net(
    size="base",
    m=8,
    base=32,
    groups=2,
    expansion=2,
    second=False,
    features="3dspeaker",
    counts=(3, 4, 6, 3),
    n_out=48,
):
    """File, keys and embedding of a size, narrower; ``second`` is ERes2NetV2."""
    plan = list(stages(counts, m, expansion))
    shapes = eres2net_shapes(plan, m, base, groups, expansion, second)
    layer(shapes, "seg_1", n_out, m * 8 * expansion * 10 * 2)
    state = random_state(shapes, 11)

    def embed(x):
        r = Reader(state)

        def clip(x):
            return x.clamp(0, 20)

        def fuse(x, y, name):
            hidden = F.silu(r.bn(r.conv2d(torch.cat([x, y], 1), f"{name}.local_att.0"), f"{name}.local_att.1"))
            weight = 1 + r.bn(r.conv2d(hidden, f"{name}.local_att.3"), f"{name}.local_att.4").tanh()
            return x * weight + y * (2 - weight)

        def block(x, name, planes, stride):
            spx = clip(r.bn(r.conv2d(x, f"{name}.conv1", stride), f"{name}.bn1")).split(planes * base // 64, 1)
            outputs, last = [], None
            for i in range(groups):
                if i:
                    sums = name[5] in "12"
                    last = last + spx[i] if sums else fuse(last, spx[i], f"{name}.fuse_models.{i - 1}")
                given = last if i else spx[0]
                last = clip(r.bn(r.conv2d(given, f"{name}.convs.{i}"), f"{name}.bns.{i}"))
                outputs.append(last)
            out = r.bn(r.conv2d(torch.cat(outputs, 1), f"{name}.conv3"), f"{name}.bn3")
            if f"{name}.shortcut.0.weight" in state:
                x = r.bn(r.conv2d(x, f"{name}.shortcut.0", stride), f"{name}.shortcut.1")
            return clip(out + x)

        window, scale = ("povey", 1) if features == "3dspeaker" else ("hamming", 32768)
        x = r.bn(r.conv2d(centred_fbank(x, window, scale)[:, None], "conv1"), "bn1").relu()
        out = {}
        for name, _, planes, stride in plan:
            x = out[name[:6]] = block(x, name, planes, stride)
        if second:
            x = fuse(x, r.conv2d(out["layer3"], "layer3_ds", 2), "fuse34")
        else:
            x = fuse(out["layer2"], r.conv2d(out["layer1"], "layer1_downsample", 2), "fuse_mode12")
            x = fuse(out["layer3"], r.conv2d(x, "layer2_downsample", 2), "fuse_mode123")
            x = fuse(out["layer4"], r.conv2d(x, "layer3_downsample", 2), "fuse_mode1234")
        return r.linear(temporal_statistics(x, 1e-8), "seg_1")

    keys = {"model": "ERes2Net", "size": size, "m_channels": m, "blocks": counts, "nOut": n_out, "features": features}
    return state, keys, embed


def eres2net_huge():
    return eres2net("huge", 11, 24, 3, 4, counts=(1, 1, 1, 2))


def eres2netv2():
    file, keys, embed = eres2net("V2", 10, 26, 2, 2, second=True)
    return file, {**keys, "model": "ERes2NetV2"}, embed


def eres2netv2_w24s4ep4():
    return eres2net("V2_w24s4ep4", 11, 24, 4, 4, second=True, counts=(1, 1, 1, 2))


def wespeaker_eres2net():
    """wespeaker's ERes2Net: in blocks with fusion the first convolution is conv2_1, and the list begins after it."""
    state, keys, embed = eres2net(features="wespeaker")
    file = {"projection.weight": torch.randn(9, 48)}
    for name, tensor in state.items():
        stage, *rest = name.split(".")
        if stage in ("layer3", "layer4") and rest[1] in ("convs", "bns"):
            first = {"convs": "conv2_1", "bns": "bn2_1"}[rest[1]]
            index = [first] if rest[2] == "0" else [rest[1], str(int(rest[2]) - 1)]
            name = ".".join([stage, rest[0], *index, *rest[3:]])
        file[name] = tensor
    return file, keys, embed


# ------------------------------------------------------------------------------------------------------ SimAM-ResNet


def wespeaker_simam(m=4):
    shapes, plan = {}, list(stages((3, 4, 6, 3), m))
    layer(shapes, "front.conv1", m, 1, 3, 3, bias=False)
    normed(shapes, "front.bn1", m)
    for name, inplanes, planes, stride in plan:
        layer(shapes, f"front.{name}.conv1", planes, inplanes, 3, 3, bias=False)
        layer(shapes, f"front.{name}.conv2", planes, planes, 3, 3, bias=False)
        normed(shapes, f"front.{name}.bn1", planes)
        normed(shapes, f"front.{name}.bn2", planes)
        if stride != 1 or inplanes != planes:
            layer(shapes, f"front.{name}.downsample.0", planes, inplanes, 1, 1, bias=False)
            normed(shapes, f"front.{name}.downsample.1", planes)
    layer(shapes, "pooling.attention.0", 128, m * 80, 1)
    normed(shapes, "pooling.attention.2", 128)
    layer(shapes, "pooling.attention.3", m * 80, 128, 1)
    layer(shapes, "bottleneck", 64, m * 160)
    state = random_state(shapes, 12)

    def embed(x):
        r = Reader(state)
        x = r.bn(r.conv2d(centred_fbank(x, "hamming", 32768)[:, None], "front.conv1"), "front.bn1").relu()
        for name, _, _, stride in plan:
            name = f"front.{name}"
            out = r.bn(r.conv2d(x, f"{name}.conv1", stride), f"{name}.bn1").relu()
            out = r.bn(r.conv2d(out, f"{name}.conv2"), f"{name}.bn2")
            variance, mean = torch.var_mean(out, (2, 3), keepdim=True)
            out = out * (0.5 + (out - mean) ** 2 / (4 * (variance + 1e-4))).sigmoid()
            if f"{name}.downsample.0.weight" in state:
                x = r.bn(r.conv2d(x, f"{name}.downsample.0", stride), f"{name}.downsample.1")
            x = (out + x).relu()
        x = x.flatten(1, 2)
        hidden = r.bn(r.conv(x, "pooling.attention.0").relu(), "pooling.attention.2")
        weights = r.conv(hidden, "pooling.attention.3").softmax(2)
        return r.linear(statistics(x, weights, 1e-5), "bottleneck")

    file = {**state, "projection.weight": torch.randn(9, 64)}
    return file, {"model": "SimAM_ResNet", "m_channels": m, "nOut": 64}, embed


# ----------------------------------------------------------------------------------------------------------- RawNet3


def sinc_filters(low, band):
    """Differences of two sinc functions and of two cosines over time, by a Hamming window: (2 bands, 251)."""
    low = 50 + np.abs(low.double().numpy())
    high = np.minimum(low + 50 + np.abs(band.double().numpy()), 8000)
    t = np.arange(-125, 126) / 16000
    even = 2 * high * np.sinc(2 * high * t) - 2 * low * np.sinc(2 * low * t)
    with np.errstate(invalid="ignore"):
        odd = np.nan_to_num((np.cos(2 * np.pi * low * t) - np.cos(2 * np.pi * high * t)) / (np.pi * t))
    return torch.from_numpy(np.concatenate([even, odd]) / np.tile(2 * (high - low), (2, 1)) * np.hamming(251)).float()


def rawnet3(channels=32, encoder="ECA"):
    shapes, width, filters = {}, channels // 8, channels // 4
    shapes |= {"preprocess.1.weight": (1,), "preprocess.1.bias": (1,)}
    normed(shapes, "bn1", filters)
    for i, inputs in ((1, filters), (2, channels), (3, channels)):
        layer(shapes, f"layer{i}.conv1", channels, inputs, 1)
        layer(shapes, f"layer{i}.conv3", channels, channels, 1)
        normed(shapes, f"layer{i}.bn1", channels)
        normed(shapes, f"layer{i}.bn3", channels)
        for j in range(7):
            layer(shapes, f"layer{i}.convs.{j}", width, width, 3)
            normed(shapes, f"layer{i}.bns.{j}", width)
        shapes[f"layer{i}.afms.alpha"] = (channels, 1)
        layer(shapes, f"layer{i}.afms.fc", channels, channels)
    layer(shapes, "layer1.residual.0", channels, filters, 1, bias=False)
    layer(shapes, "layer4", 1536, 3 * channels, 1)
    layer(shapes, "attention.0", 128, 4608, 1)
    normed(shapes, "attention.2", 128)
    layer(shapes, "attention.3", 1536 if encoder == "ECA" else 1, 128, 1)
    normed(shapes, "bn5", 3072)
    layer(shapes, "fc6", 48, 3072)
    normed(shapes, "bn6", 48)
    state = random_state(shapes, 13)
    rng = torch.Generator().manual_seed(14)
    state["conv1.filterbank.low_hz_"] = 3000 * torch.rand(filters // 2, 1, generator=rng) - 200
    state["conv1.filterbank.band_hz_"] = 900 * torch.rand(filters // 2, 1, generator=rng) - 200
    constants = {"preprocess.0.flipped_filter": torch.tensor([[[-0.97, 1.0]]])}
    constants |= {"conv1.filterbank.window_": torch.zeros(125), "conv1.filterbank.n_": torch.zeros(1, 125)}

    def embed(x):
        r = Reader(state)

        def block(x, name, dilation, pool):
            groups = r.bn(r.conv(x, f"{name}.conv1").relu(), f"{name}.bn1").split(width, 1)
            outputs, last = [], 0
            for j in range(7):
                last = r.bn(r.conv(groups[j] + last, f"{name}.convs.{j}", dilation).relu(), f"{name}.bns.{j}")
                outputs.append(last)
            out = r.bn(r.conv(torch.cat([*outputs, groups[7]], 1), f"{name}.conv3").relu(), f"{name}.bn3")
            out = out + (r.conv(x, f"{name}.residual.0") if f"{name}.residual.0.weight" in state else x)
            if pool:
                out = F.max_pool1d(out, pool)
            gate = r.linear(out.mean(2), f"{name}.afms.fc").sigmoid()[:, :, None]
            return (out + state[f"{name}.afms.alpha"]) * gate

        x = x - 0.97 * torch.cat([x[:, 1:2], x[:, :-1]], 1)
        x = (x - x.mean()) / (x.var(correction=0) + 1e-4).sqrt() * state["preprocess.1.weight"]
        frames = (x + state["preprocess.1.bias"]).unfold(1, 251, 10)
        bank = sinc_filters(state["conv1.filterbank.low_hz_"], state["conv1.filterbank.band_hz_"])
        x = ((frames @ bank.T).abs() + 1e-6).log().transpose(1, 2)
        x1 = block(x - x.mean(2, keepdim=True), "layer1", 2, 5)
        x2 = block(x1, "layer2", 3, 3)
        x1 = F.max_pool1d(x1, 3)
        x3 = block(x1 + x2, "layer3", 4, 0)
        x = r.conv(torch.cat([x1, x2, x3], 1), "layer4").relu()
        context = torch.cat([x.mean(2), x.var(2).clamp(1e-4, 1e4).sqrt()], 1)[:, :, None].expand(-1, -1, x.shape[2])
        hidden = r.bn(r.conv(torch.cat([x, context], 1), "attention.0").relu(), "attention.2")
        x = statistics(x, r.conv(hidden, "attention.3").softmax(2), 1e-4)
        return r.linear(r.bn(x, "bn5"), "fc6")

    return (
        {"model": {**state, **constants}, "optimizer": {}},
        {"model": "RawNet3", "channels": channels, "nOut": 48, "encoder_type": encoder},
        embed,
    )


def rawnet3_asp():
    return rawnet3(encoder="ASP")


CASES = [
    eres2net,
    eres2net_huge,
    eres2netv2,
    eres2netv2_w24s4ep4,
    wespeaker_eres2net,
    wespeaker_simam,
    rawnet3,
    rawnet3_asp,
]
