"""Self-supervised front ends: WavLM, HuBERT and wav2vec 2.0, whose published weights `initial_model` reads.

A stack of convolutions makes a vector of each 20 ms of the waveform, Transformer blocks relate them to each other, and
a model such as ECAPA-TDNN takes a learned weighting of what all the blocks give.
Sources: wav2vec 2.0 (Baevski et al. 2020), HuBERT (Hsu et al. 2021), WavLM (Chen et al. 2022).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

KERNELS, STRIDES, CONVOLVED = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2), 512
POSITION_KERNEL, POSITION_GROUPS = 128, 16
BUCKETS, FARTHEST = 320, 800  # of relative positions, WavLM
OUTPUTS, TRAINED = ("weighted", "last", "all"), ("all", "transformer", "none")


@dataclass(frozen=True)
class Architecture:
    """The sizes of a published model.

    ``norm_first``: blocks normalise what they take, not what they give; such models normalise each convolution's
    frames and the waveform too, the others each channel of the first convolution over time.
    ``relative``: attention depends on the distance of two frames, as in WavLM.
    """

    width: int
    blocks: int
    heads: int
    norm_first: bool
    relative: bool = False


LARGE = Architecture(1024, 24, 16, norm_first=True)
ARCHITECTURES = {
    "wavlm_base": Architecture(768, 12, 12, norm_first=False, relative=True),
    "wavlm_base_plus": Architecture(768, 12, 12, norm_first=False, relative=True),
    "wavlm_large": Architecture(1024, 24, 16, norm_first=True, relative=True),
    "hubert_base": Architecture(768, 12, 12, norm_first=False),
    "hubert_large": LARGE,
    "hubert_xlarge": Architecture(1280, 48, 16, norm_first=True),
    "wav2vec2_base": Architecture(768, 12, 12, norm_first=False),
    "wav2vec2_large": Architecture(1024, 24, 16, norm_first=False),
    "wav2vec2_large_lv60k": LARGE,
    "xlsr_300m": LARGE,
    "xlsr_1b": Architecture(1280, 48, 16, norm_first=True),
    "xlsr_2b": Architecture(1920, 48, 16, norm_first=True),
}


class ConvLayer(nn.Module):
    """Convolution, norm and GELU: (B, channels, T) -> (B, 512, about T / stride).

    ``norm``: 'frame' normalises each frame over its channels, 'channel' each channel over time, '' nothing.
    """

    def __init__(self, channels, kernel, stride, norm):
        super().__init__()
        self.conv = nn.Conv1d(channels, CONVOLVED, kernel, stride, bias=norm == "frame")
        self.over_frames = norm == "frame"
        norms = {"frame": nn.LayerNorm(CONVOLVED), "channel": nn.GroupNorm(CONVOLVED, CONVOLVED), "": nn.Identity()}
        self.norm = norms[norm]
        nn.init.kaiming_normal_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        x = self.conv(x)
        return F.gelu(self.norm(x.transpose(1, 2)).transpose(1, 2) if self.over_frames else self.norm(x))


class PositionalConvolution(nn.Module):
    """What a frame is told of its place: a wide convolution with normalised weights, (B, T, width) -> (B, T, width)."""

    def __init__(self, width):
        super().__init__()
        weight = torch.randn(width, width // POSITION_GROUPS, POSITION_KERNEL)
        self.direction = nn.Parameter(weight * math.sqrt(4.0 / (POSITION_KERNEL * width)))
        self.length = nn.Parameter(self.direction.detach().norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x):
        weight = self.length * F.normalize(self.direction, dim=(0, 1))
        moved = F.conv1d(x.transpose(1, 2), weight, self.bias, padding=POSITION_KERNEL // 2, groups=POSITION_GROUPS)
        return F.gelu(moved[:, :, :-1]).transpose(1, 2)  # an even kernel gives one frame too many


class RelativePosition(nn.Module):
    """WavLM's bias of attention, a learned value for each head and bucket of distances (section 3.2): (heads, T, T)."""

    def __init__(self, heads):
        super().__init__()
        self.values = nn.Embedding(BUCKETS, heads)

    def forward(self, frames, device):
        place = torch.arange(frames, device=device)
        distance = place[None, :] - place[:, None]
        half, exact = BUCKETS // 2, BUCKETS // 4  # of each direction; near distances have a bucket each
        far = distance.abs().clamp(min=1).float()
        far = exact + (torch.log(far / exact) / math.log(FARTHEST / exact) * (half - exact)).long()
        bucket = torch.where(distance.abs() < exact, distance.abs(), far.clamp(max=half - 1))
        return self.values(bucket + half * (distance > 0)).permute(2, 0, 1)


class Block(nn.Module):
    """A block of the Transformer: self-attention, then two linear layers, each with a residual sum and a norm."""

    def __init__(self, sizes: Architecture, dropout):
        super().__init__()
        width = sizes.width
        self.heads, self.norm_first, self.dropout = sizes.heads, sizes.norm_first, nn.Dropout(dropout)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        if sizes.relative:
            self.gate = nn.Linear(width // sizes.heads, 8)
            self.gate_scale = nn.Parameter(torch.ones(1, sizes.heads, 1, 1))

    def forward(self, x, positions=None):
        """Frames (B, T, width), and the bias of their relative positions (heads, T, T) if the model has one."""
        if self.norm_first:
            x = x + self.dropout(self._attend(self.norm1(x), positions))
            return x + self.dropout(self._feed(self.norm2(x)))
        x = self.norm1(x + self.dropout(self._attend(x, positions)))
        return self.norm2(x + self.dropout(self._feed(x)))

    def _attend(self, x, positions):
        query, key, value = (self._split(part(x)) for part in (self.query, self.key, self.value))
        bias = None if positions is None else (self._gate(x) * positions).to(query.dtype)
        return self.out(F.scaled_dot_product_attention(query, key, value, bias).transpose(1, 2).flatten(2))

    def _gate(self, x):
        """How much the distance counts for each frame and head (WavLM, equation 4): (B, heads, T, 1)."""
        update, reset = self.gate(self._split(x)).unflatten(3, (2, 4)).sum(dim=4).sigmoid().chunk(2, dim=3)
        return update * (reset * self.gate_scale - 1.0) + 2.0

    def _split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, width of a head)

    def _feed(self, x):
        return self.down(self.dropout(F.gelu(self.up(x))))


class Upstream(nn.Module):
    """The published network, in two steps: waveform (B, T) -> frames -> states (B, frames, width).

    ``raw``: the last state of a network with ``norm_first`` is left as its block gives it. Otherwise it is normalised
    as in fairseq's output, and so in s3prl's states, which SUPERB weighs.
    """

    def __init__(self, sizes: Architecture, blocks, dropout, raw):
        super().__init__()
        self.norm_first, self.dropout = sizes.norm_first, nn.Dropout(dropout)
        norms = ["frame"] * len(KERNELS) if sizes.norm_first else ["channel"] + [""] * (len(KERNELS) - 1)
        channels = [1] + [CONVOLVED] * (len(KERNELS) - 1)
        self.convolutions = nn.ModuleList(map(ConvLayer, channels, KERNELS, STRIDES, norms))
        self.norm = nn.LayerNorm(CONVOLVED)
        self.project = nn.Linear(CONVOLVED, sizes.width)
        self.position = PositionalConvolution(sizes.width)
        self.relative = RelativePosition(sizes.heads) if sizes.relative else None
        self.blocks = nn.ModuleList(Block(sizes, dropout) for _ in range(blocks))
        # Before the blocks, or behind the last of those that do not normalise what they give.
        used = not sizes.norm_first or (not raw and blocks == sizes.blocks)
        self.norm_blocks = nn.LayerNorm(sizes.width) if used else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def convolved(self, x):
        """Frames of 20 ms of a waveform: (B, T) -> (B, frames, 512)."""
        if self.norm_first:
            x = x - x.mean(dim=1, keepdim=True)
            x = x * (x.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt()  # not layer_norm: ONNX wants its size known
        x = x[:, None]
        for layer in self.convolutions:
            x = layer(x)
        return x.transpose(1, 2)

    def states(self, x):
        """What the first block takes and what each one gives, of frames (B, frames, 512): a list."""
        x = self.dropout(self.project(self.norm(x)))
        x = x + self.position(x)
        x = self.dropout(x if self.norm_first else self.norm_blocks(x))
        positions = None if self.relative is None else self.relative(x.shape[1], x.device)
        found = [x]
        for block in self.blocks:
            found.append(block(found[-1], positions))
        if self.norm_first:
            found[-1] = self.norm_blocks(found[-1])
        return found


class FrontEnd(nn.Module):
    """Features (B, n_mels, a frame for each 20 ms) of a waveform (B, T) at 16 kHz.

    ``ssl_model``: one of ARCHITECTURES. Its weights are random until `initial_model` brings the published ones.
    ``ssl_blocks``: only the first so many blocks of the Transformer; 0 for all.
    ``ssl_output``: 'weighted' is the sum of all states by learned weights (SUPERB, Yang et al. 2021), 'last' the last,
    'all' are all of them, one behind another, for a model that weighs them itself; ``states`` is their number.
    ``ssl_train``: which of the network trains: 'all', 'transformer' (the convolutions stay), or 'none'.
    ``ssl_dropout``: probability, while the Transformer trains.
    ``n_mels``: the model's width, 768, 1,024 and so on; a linear layer is learned for another number. Of 'all' it is
    the width times the states.
    """

    autocast = True  # computes in the precision of the run
    needs_weights = True  # random weights are worth nothing
    training_keys = ("ssl_train", "ssl_dropout")  # a second run may have others

    def __init__(
        self,
        n_mels=768,
        ssl_model="wavlm_base_plus",
        ssl_blocks=0,
        ssl_output="weighted",
        ssl_train="all",
        ssl_dropout=0.1,
    ):
        super().__init__()
        for key, value, known in (
            ("ssl_model", ssl_model, ARCHITECTURES),
            ("ssl_output", ssl_output, OUTPUTS),
            ("ssl_train", ssl_train, TRAINED),
        ):
            if value not in known:
                raise ValueError(f"{key}: must be one of {', '.join(known)}; got '{value}'")
        sizes = ARCHITECTURES[ssl_model]
        if not 0 <= ssl_blocks <= sizes.blocks:
            raise ValueError(f"ssl_blocks: {ssl_model} has {sizes.blocks} blocks, got {ssl_blocks} (0: all)")
        if not 0.0 <= ssl_dropout < 1.0:
            raise ValueError(f"ssl_dropout: must be at least 0 and below 1, got {ssl_dropout}")
        self.upstream = Upstream(sizes, ssl_blocks or sizes.blocks, ssl_dropout, ssl_output == "all")
        self.output, self.trained = ssl_output, ssl_train
        if ssl_output == "weighted":
            self.weights = nn.Parameter(torch.zeros(len(self.upstream.blocks) + 1))  # before a softmax: all alike
        self.states = len(self.upstream.blocks) + 1 if ssl_output == "all" else 1
        if ssl_output == "all" and n_mels != self.states * sizes.width:
            raise ValueError(
                f"n_mels: {self.states} states of {sizes.width} values are {self.states * sizes.width}, got {n_mels}"
            )
        self.project = nn.Identity() if n_mels == self.states * sizes.width else nn.Linear(sizes.width, n_mels)
        fixed = {"all": [], "transformer": [self.upstream.convolutions], "none": [self.upstream]}[ssl_train]
        for module in fixed:
            module.requires_grad_(False)

    def blocks(self):
        """The parts that `gradient_checkpointing` computes again."""
        return [] if self.trained == "none" else list(self.upstream.blocks)

    def train(self, mode=True):
        """Training mode, in which what does not train stays as in evaluation."""
        super().train(mode)
        if self.trained == "none":
            self.upstream.eval()
        return self

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trained == "all"):
            frames = self.upstream.convolved(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trained != "none"):
            states = self.upstream.states(frames)
        if self.output == "all":
            features = torch.cat(states, dim=2)
        elif self.output == "weighted":
            features = sum(weight * state for weight, state in zip(self.weights.softmax(dim=0), states))
        else:
            features = states[-1]
        return self.project(features).transpose(1, 2)
