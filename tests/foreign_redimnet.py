"""ReDimNets of wespeaker and of their authors, from the tensors of their files: names, arithmetic and features."""

import math
import re

import torch
import torch.nn.functional as F
from foreign_models import Reader, layer, normed, random_state, statistics
from reference_features import kaldi_fbank, mel_spectrogram, redimnet2_logmel, with_preemphasis


def transformer_shapes(shapes, name, size):
    for part in ("attention.k_proj", "attention.v_proj", "attention.q_proj", "attention.out_proj"):
        layer(shapes, f"{name}.{part}", size, size)
    for part in ("feed_forward.intermediate_dense", "feed_forward.output_dense"):
        layer(shapes, f"{name}.{part}", size, size)
    for part in ("layer_norm", "final_layer_norm"):
        shapes[f"{name}.{part}.weight"] = shapes[f"{name}.{part}.bias"] = (size,)


def context_shapes(shapes, name, volume, hidden):
    layer(shapes, f"{name}.red_dim_conv.0", hidden, volume, 1)
    shapes[f"{name}.red_dim_conv.1.weight"] = shapes[f"{name}.red_dim_conv.1.bias"] = (hidden,)
    for i, kernel in enumerate((7, 19, 31, 59)):
        layer(shapes, f"{name}.tcm.{i}.dwconvs.0", hidden, 1, kernel)
        normed(shapes, f"{name}.tcm.{i}.norm", hidden)
        layer(shapes, f"{name}.tcm.{i}.pwconv1", hidden, hidden, 1)
    transformer_shapes(shapes, f"{name}.tcm.4", hidden)
    layer(shapes, f"{name}.exp_dim_conv", volume, hidden, 1)


def block_shapes(shapes, name, kind, channels, bands, group):
    if kind == "convnext_like":
        layer(shapes, f"{name}.dwconvs.0", channels, channels // max(channels // group, 1), 3, 3)
        normed(shapes, f"{name}.norm", channels)
        layer(shapes, f"{name}.pwconv1", channels, channels, 1, 1)
        return
    for i in (1, 2):
        layer(shapes, f"{name}.conv{i}", channels, group, 3, 3, bias=False)
        layer(shapes, f"{name}.conv{i}pw", channels, channels, 1, 1)
        normed(shapes, f"{name}.bn{i}", channels)
    if kind == "basic_resnet_fwse":
        layer(shapes, f"{name}.se.squeeze", min(64, max(channels, 32)), bands)
        layer(shapes, f"{name}.se.exitation", bands, min(64, max(channels, 32)))


def redimnet(size, kind, channels, bands, group, stages):
    """The file, keys and embedding of a size; a stage is (stride, blocks, expansion, reduction)."""
    volume, shapes, plan, n_mels = channels * bands, {}, [], bands
    b = "backbone"
    shapes[f"{b}.inputs_weights.0"] = (1, 1, 1, 1)
    layer(shapes, f"{b}.stem.0", channels, 1, 3, 3)
    shapes[f"{b}.stem.1.weight"] = shapes[f"{b}.stem.1.bias"] = (channels,)
    c, keys = channels, {"model": "ReDimNet", "size": size, "channels": channels, "n_mels": bands}
    for s, (stride, blocks, expansion, reduction) in enumerate(stages):
        plan.append((stride, blocks, expansion, reduction, c))
        shapes[f"{b}.inputs_weights.{s + 1}"] = (1, s + 2, volume, 1)
        layer(shapes, f"{b}.stage{s}.0", c * stride * expansion, c, stride, 1)
        c, bands = c * stride, bands // stride
        for i in range(1, blocks + 1):
            block_shapes(shapes, f"{b}.stage{s}.{i}.conv_block", kind, c * expansion, bands, group)
        if expansion > 1:
            layer(shapes, f"{b}.stage{s}.{blocks + 1}.0", c, c * expansion // (c // group), 3, 3)
            normed(shapes, f"{b}.stage{s}.{blocks + 1}.1", c)
            layer(shapes, f"{b}.stage{s}.{blocks + 1}.3", c, c, 1, 1)
        if reduction:
            context_shapes(shapes, f"{b}.stage{s}.{blocks + 2 + (expansion > 1)}", volume, volume // reduction)
    layer(shapes, "pool.linear1", 128, volume * 3, 1)
    layer(shapes, "pool.linear2", volume, 128, 1)
    layer(shapes, "seg_1", 192, volume * 2)
    state = random_state(shapes, 7)
    rng = torch.Generator().manual_seed(8)
    for name in state:
        if "inputs_weights" in name:
            state[name] = torch.randn(shapes[name], generator=rng)
    embed = Forward(state, plan, n_mels)
    return {**state, "projection.weight": torch.randn(9, 192)}, keys, embed


class Forward(Reader):
    """The arithmetic on (1, C, F, T) maps and (1, F x C, T) sequences."""

    def __init__(self, state, plan, n_mels):
        super().__init__(state)
        self.plan, self.n_mels = plan, n_mels

    def features(self, x):
        return kaldi_fbank(x * 32768, self.n_mels).T[None]

    def __call__(self, x):
        x = self.features(x)
        x = (x - x.mean(2, keepdim=True))[None]
        x = self.channel_norm(self.conv2d(x, "backbone.stem.0"), "backbone.stem.1")
        outputs = [x.permute(0, 2, 1, 3).reshape(1, -1, x.shape[3])]
        for s, (stride, blocks, expansion, reduction, c) in enumerate(self.plan):
            name = f"backbone.stage{s}"
            x = self.mixed(outputs, s)
            x = x.reshape(1, -1, c, x.shape[2]).permute(0, 2, 1, 3)
            x = F.conv2d(x, self.state[f"{name}.0.weight"], self.state[f"{name}.0.bias"], (stride, 1))
            for i in range(1, blocks + 1):
                x = self.block(x, f"{name}.{i}.conv_block")
            if expansion > 1:
                x = self.grouped(x, f"{name}.{blocks + 1}.0")
                x = F.gelu(self.bn(x, f"{name}.{blocks + 1}.1", 1e-6))
                x = self.conv2d(x, f"{name}.{blocks + 1}.3")
            x = x.permute(0, 2, 1, 3).reshape(1, -1, x.shape[3])
            if reduction:
                x = self.time_context(x, f"{name}.{blocks + 2 + (expansion > 1)}")
            outputs.append(x)
        return self.pooled(self.mixed(outputs, len(self.plan)))

    def bn(self, x, name, eps=1e-5):
        s = [self.state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *s, eps=eps)

    def channel_norm(self, x, name):
        shape = (1, -1) + (1,) * (x.dim() - 2)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * self.state[f"{name}.weight"].view(shape) + self.state[f"{name}.bias"].view(shape)

    def grouped(self, x, name):
        weight = self.state[f"{name}.weight"]
        conv = (F.conv1d, F.conv2d)[weight.dim() - 3]
        groups = x.shape[1] // weight.shape[1]
        return conv(x, weight, self.state.get(f"{name}.bias"), padding=weight.shape[2] // 2, groups=groups)

    def block(self, x, name):
        if f"{name}.pwconv1.weight" in self.state:
            out = F.gelu(self.bn(self.grouped(x, f"{name}.dwconvs.0"), f"{name}.norm"))
            return x + self.grouped(out, f"{name}.pwconv1")
        out = self.conv2d(self.grouped(x, f"{name}.conv1"), f"{name}.conv1pw").relu()
        out = self.conv2d(self.grouped(self.bn(out, f"{name}.bn1"), f"{name}.conv2"), f"{name}.conv2pw")
        out = self.bn(out, f"{name}.bn2")
        if f"{name}.se.squeeze.weight" not in self.state:
            return (out + x).relu()
        gate = self.linear(out.mean((1, 3)), f"{name}.se.squeeze").relu()
        return (out * self.linear(gate, f"{name}.se.exitation").sigmoid()[:, None, :, None] + x).relu()

    def time_context(self, x, name):
        out = self.channel_norm(self.conv(x, f"{name}.red_dim_conv.0"), f"{name}.red_dim_conv.1")
        for i in range(4):
            out = self.block(out, f"{name}.tcm.{i}")
        frames, name4 = out[0].T, f"{name}.tcm.4"
        q, k, v = (self.linear(frames, f"{name4}.attention.{p}_proj").chunk(4, 1) for p in "qkv")
        heads = [(a @ b.T / math.sqrt(b.shape[1])).softmax(1) @ c for a, b, c in zip(q, k, v)]
        frames = frames + self.linear(torch.cat(heads, 1), f"{name4}.attention.out_proj")
        frames = self.channel_norm(frames, f"{name4}.layer_norm")
        dense = self.linear(frames, f"{name4}.feed_forward.intermediate_dense")
        dense = 0.5 * dense * (1 + torch.tanh(math.sqrt(2 / math.pi) * (dense + 0.044715 * dense**3)))
        frames = frames + self.linear(dense, f"{name4}.feed_forward.output_dense")
        frames = self.channel_norm(frames, f"{name4}.final_layer_norm")
        return x + self.conv(frames.T[None], f"{name}.exp_dim_conv")

    def mixed(self, outputs, i):
        return (torch.stack(outputs, 1) * self.state[f"backbone.inputs_weights.{i}"].softmax(1)).sum(1)

    def pooled(self, x):
        context = torch.cat([x.mean(2), (x.var(2) + 1e-10).sqrt()], 1)[:, :, None].expand(-1, -1, x.shape[2])
        weights = self.conv(self.conv(torch.cat([x, context], 1), "pool.linear1").tanh(), "pool.linear2").softmax(2)
        return self.linear(statistics(x, weights, 1e-10), "seg_1")


def wespeaker_redimnet_b1():
    stages = ((1, 2, 1, 0), (2, 3, 1, 0), (3, 4, 1, 12), (2, 5, 1, 12), (2, 3, 1, 8))
    return redimnet("B1", "convnext_like", 4, 24, 8, stages)


def wespeaker_redimnet_b3():
    stages = ((1, 6, 4, 32), (2, 6, 2, 32), (1, 8, 2, 32), (2, 10, 2, 16), (1, 10, 1, 16), (2, 8, 1, 16))
    return redimnet("B3", "basic_resnet_fwse", 8, 16, 1, stages)


# --------------------------------------------------------------------------------------------------------- authors'


class Authors(Forward):
    """Features every 15 ms, BN of the pooled statistics."""

    def features(self, x):
        return (mel_spectrogram(with_preemphasis(x), self.n_mels, 20, 7600, hop=240) + 1e-6).log()

    def pooled(self, x):
        context = torch.cat([x.mean(2), (x.var(2) + 1e-7).sqrt()], 1)[:, :, None].expand(-1, -1, x.shape[2])
        weights = self.conv(self.conv(torch.cat([x, context], 1), "pool.linear1").tanh(), "pool.linear2").softmax(2)
        return self.linear(self.bn(statistics(x, weights, 1e-7), "bn"), "linear")


def with_head(shapes, width):
    layer(shapes, "pool.linear1", 128, width * 3, 1)
    layer(shapes, "pool.linear2", width, 128, 1)
    normed(shapes, "bn", width * 2)
    layer(shapes, "linear", 192, width * 2)


CONSTANTS = {"spec.torchfbank.1.flipped_filter": torch.tensor([[[-0.97, 1.0]]])}
SHIFT = (r"backbone\.stage(\d+)\.(\d+)", lambda found: f"backbone.stage{found[1]}.{int(found[2]) + 2}")


def authors_first():
    """A file of July 2024, in the narrow size of wespeaker_redimnet_b3."""
    file, keys, embed = wespeaker_redimnet_b3()
    shapes = {}
    with_head(shapes, keys["channels"] * keys["n_mels"])
    state = {n: t for n, t in file.items() if n.startswith("backbone")} | random_state(shapes, 9)
    keys |= {"features": "redimnet", "frame_step": 15, "pooled_norm": True}
    return state | CONSTANTS, keys, Authors(state, embed.plan, embed.n_mels)


def authors_redimnet():
    """A file of today: a stage begins with the weights of its sum, the last sum has a name of its own."""
    state, keys, embed = authors_first()
    last = f"backbone.inputs_weights.{len(embed.plan)}"
    renamed = {}
    for name, tensor in state.items():
        name = "backbone.fin_wght1d.w" if name == last else re.sub(*SHIFT, name)
        renamed[re.sub(r"inputs_weights\.(\d+)", r"stage\1.0.w", name)] = tensor
    return renamed, keys, embed


def redimnet2(stages, channels=6, bands=24, head=0, norm=False, dual=False):
    """A file of ReDimNet2 and its embedding; a stage is (stride, blocks, expansion, reduction, stride over time)."""
    shapes, c, volume, count, step, b = {}, channels, channels * bands, 1, 1, "backbone"
    layer(shapes, f"{b}.stem.0", c, 1, 3, 3)
    shapes[f"{b}.stem.1.weight"] = shapes[f"{b}.stem.1.bias"] = (c,)
    norms = [f"{b}.stem_gnorm"]
    for s, (stride, blocks, expansion, reduction, time) in enumerate(stages):
        name, step, wide = f"{b}.stage{s}{'_pre' if dual else ''}", step * time, int(c * stride * expansion)
        shapes[f"{name}.0.w"] = (1, count, volume, 1)
        layer(shapes, f"{name}.2", wide, c // math.gcd(c, wide), stride, step)
        c, count = c * stride, count + (2 if dual else 1)
        for i in range(3, 3 + blocks):
            block_shapes(shapes, f"{name}.{i}.conv_block", "basic_resnet", wide, 0, 1)
        after = 3 + blocks
        if expansion != 1:
            layer(shapes, f"{name}.{after}.0", c, wide, 1, 1)
            normed(shapes, f"{name}.{after}.1", c)
            after += 1
        context = f"{b}.stage{s}_1d" if dual else f"{name}.{after + 1}"
        context_shapes(shapes, context, volume, volume // reduction)
        norms += [f"{b}.stage{s}_up_2d.1", f"{b}.stage{s}_up_1d.1"] if dual else [f"{name}.{after + 3}"]
    shapes[f"{b}.fin_wght1d.w"] = (1, count, volume, 1)
    for name in norms if norm else ():
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (volume,)
    if head:
        layer(shapes, f"{b}.head", head, c, 1, 1)
    with_head(shapes, (head or c) * (volume // c))
    state = random_state(shapes, 17)
    rng = torch.Generator().manual_seed(18)
    state |= {name: torch.randn(shapes[name], generator=rng) for name in state if name.endswith(".w")}
    keys = {"model": "ReDimNet2", "channels": channels, "n_mels": bands, "stages": [list(s) for s in stages]}
    keys |= {"head_channels": head, "output_norm": norm, "dual": dual}
    return state | CONSTANTS, keys, Forward2(state, stages, bands, channels, norms if norm else [], dual)


class Forward2(Authors):
    """All outputs of the stages at the full rate, as the paper draws them."""

    def __init__(self, state, plan, n_mels, channels, norms, dual):
        super().__init__(state, plan, n_mels)
        self.channels, self.norms, self.dual = channels, norms, dual

    def features(self, x):
        x = redimnet2_logmel(x, self.n_mels)
        return x - x.mean(2, keepdim=True)

    def __call__(self, x):
        x, c, step, b = self.features(x), self.channels, 1, "backbone"
        longest = math.prod(stage[4] for stage in self.plan)
        x = x[None, :, :, : x.shape[2] // longest * longest]
        x = self.channel_norm(self.conv2d(x, f"{b}.stem.0"), f"{b}.stem.1")
        outputs = []
        self.add(outputs, self.unfolded(x))
        for s, (stride, blocks, expansion, _, time) in enumerate(self.plan):
            name, step = f"{b}.stage{s}{'_pre' if self.dual else ''}", step * time
            x = self.weighted(outputs, f"{name}.0.w")
            x = x.reshape(1, -1, c, x.shape[2]).permute(0, 2, 1, 3)
            weight, c = self.state[f"{name}.2.weight"], c * stride
            groups = x.shape[1] // weight.shape[1]
            x = F.conv2d(x, weight, self.state[f"{name}.2.bias"], (stride, step), groups=groups)
            for i in range(3, 3 + blocks):
                x = self.block(x, f"{name}.{i}.conv_block")
            if expansion != 1:
                x = self.bn(self.conv2d(x, f"{name}.{3 + blocks}.0"), f"{name}.{3 + blocks}.1", 1e-6)
            x = self.unfolded(x)
            context = f"{b}.stage{s}_1d" if self.dual else f"{name}.{4 + blocks + (expansion != 1)}"
            for output in [x, self.time_context(x, context)][0 if self.dual else 1 :]:
                self.add(outputs, output.repeat_interleave(step, dim=2))
        x = self.weighted(outputs, f"{b}.fin_wght1d.w")
        x = x.reshape(1, -1, c, x.shape[2]).permute(0, 2, 1, 3)
        x = self.conv2d(x, f"{b}.head") if f"{b}.head.weight" in self.state else x
        return self.pooled(x.reshape(1, -1, x.shape[3]))

    def add(self, outputs, x):
        if self.norms:
            name, groups = self.norms[len(outputs)], x.reshape(self.channels, -1)
            groups = (groups - groups.mean(1, keepdim=True)) / (
                groups.var(1, keepdim=True, unbiased=False) + 1e-5
            ).sqrt()
            x = groups.reshape(x.shape) * self.state[f"{name}.weight"][:, None] + self.state[f"{name}.bias"][:, None]
        outputs.append(x)

    def unfolded(self, x):
        return x.permute(0, 2, 1, 3).reshape(1, -1, x.shape[3])

    def weighted(self, outputs, name):
        return (torch.stack(outputs, 1) * self.state[name].softmax(1)).sum(1)


STAGES2 = ((1, 1, 2, 6, 1), (2, 2, 1, 6, 2), (3, 1, 0.5, 12, 2))


def authors_redimnet2():
    return redimnet2(STAGES2, head=5)


def authors_redimnet2_norm():
    return redimnet2(STAGES2, norm=True)


def authors_redimnet2_dual():
    return redimnet2(STAGES2, head=5, norm=True, dual=True)


CASES = [wespeaker_redimnet_b1, wespeaker_redimnet_b3, authors_first, authors_redimnet]
CASES += [authors_redimnet2, authors_redimnet2_norm, authors_redimnet2_dual]
