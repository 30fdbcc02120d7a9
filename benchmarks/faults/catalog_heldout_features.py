"""Held-out faults of features, pooling and hand-written layers in fp32: H01 to H20.

The analyser was not tuned on them: mechanisms and code shapes differ from F01 to F60.
"""

import voices
from fault import CODE, MARKER, Fault, Place, Truth, exclude
from sources import model
from voices import FIRST, spoil, times

WAV = f"wav/{FIRST}.wav"
UNSEEN = {"model": "unseen"}
FORWARD, BACKWARD = ("loss_nonfinite",), ("grad_nonfinite",)

XVECTOR = '''"""An x-vector net with its own features and pooling."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Features(nn.Module):
    """Energies of triangular bands, 25 ms frames every 10 ms, (B, T) -> (B, bands, frames)."""

    def __init__(self, bands):
        super().__init__()
        self.bands = bands
        edges = torch.linspace(2, 198, bands + 2)
        bins = torch.arange(201.0)[:, None]
        rise = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
        fall = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
        self.register_buffer("bank", torch.minimum(rise, fall).clamp(min=0))
        self.register_buffer("window", torch.hann_window(400))
{init}

    def energies(self, x):
        spectrum = torch.stft(x, 400, 160, window=self.window, center=False, return_complex=True)
        power = spectrum.real.square() + spectrum.imag.square()
        return torch.einsum("bft,fm->bmt", power, self.bank)

    def forward(self, x):
{features}


class Pooling(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.attention = nn.Conv1d(channels, 1, 1)

    def forward(self, x):
{pooling}


class XVector(nn.Module):
    def __init__(self, nOut=12, bands=16, **kwargs):
        super().__init__()
        self.features = Features(bands)
        self.tdnn = nn.Sequential(
            nn.Conv1d(bands, 16, 5),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(16),
            nn.Conv1d(16, 16, 3, dilation=2),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(16),
        )
        self.pooling = Pooling(16)
        self.embedding = nn.LazyLinear(nOut)
        with torch.no_grad():
            self.eval()(torch.randn(1, 16000))
        self.train()

    def forward(self, x):
        return self.embedding(self.pooling(self.tdnn(self.features(x))))


MainModel = XVector
'''


def xvector(
    init="pass",
    features="return self.energies(x).add(1e-6).log()",
    pooling="return x.mean(dim=2)",
) -> str:
    """Source of an x-vector plug-in, with its own code in three places; '#!' marks the fault."""
    from sources import _block

    return XVECTOR.format(init=_block(init), features=_block(features), pooling=_block(pooling)).replace("#!", MARKER)


def of_layer(id, title, reasons, causes, ops, source, every=False, file=False, fixes=(CODE,), **more) -> Fault:
    """A fault of a marked line of models/unseen.py; ``file``: that of one file, which is as good an answer.

    ``fixes`` is empty where none can be tried from outside the code: in a scripted function, in a backward().
    """
    settings = {**UNSEEN, "nan_patience": 4 if every else 1000, **more.pop("settings", {})}
    plugins = {"models/unseen.py": source, **more.pop("plugins", {})}
    more |= {"status": 3} if every else {}
    places = (Place(code=True, ops=ops), *((Place(files=(WAV,)),) if file else ()))
    truth = Truth(reasons, causes, places, (*fixes, *((exclude(WAV),) if file else ())))
    return Fault(id, title, (truth,), settings, plugins, **more)


def gap(samples):
    """A drop-out of 50 ms of digital silence."""
    samples[5800:6600] = 0.0


def late_start(samples):
    """Recorded only from the middle on."""
    samples[:8000] = 0.0


def click(samples):
    """Silence with one sample in it."""
    samples[:] = 0.0
    samples[6000] = 0.5


def hum(samples):
    """A tone of 100 Hz, its period a whole number of samples."""
    return 0.4 * voices.np.sin(2 * voices.np.pi * voices.np.arange(len(samples)) / 160)


MFCC = xvector(
    init="""
    order, place = torch.arange(float(bands)), torch.arange(float(bands))[:, None]
    self.register_buffer("dct", torch.cos(math.pi / bands * (place + 0.5) * order) * math.sqrt(2.0 / bands))
    self.register_buffer("lifter", 1.0 + 11.0 * torch.sin(math.pi * order / 22.0))
    """,
    features="""
    cepstra = torch.einsum("bmt,mk->bkt", self.energies(x).clamp(min=1e-8).log(), self.dct)
    cepstra = cepstra * self.lifter[:, None]
    energy = x.unfold(1, 400, 160).square().sum(dim=2)
    cepstra[:, 0] = 10.0 * torch.log10(energy)  #!
    return cepstra
    """,
)
PCEN = xvector(
    init="""
    self.alpha = nn.Parameter(torch.full((bands, 1), 0.98))
    self.delta = nn.Parameter(torch.full((bands, 1), 2.0))
    self.root = nn.Parameter(torch.full((bands, 1), 0.5))
    """,
    features="""
    energy, coefficient = self.energies(x), 0.025
    smooth = [energy[:, :, 0]]
    for t in range(1, energy.shape[2]):
        smooth.append((1 - coefficient) * smooth[-1] + coefficient * energy[:, :, t])
    gain = torch.stack(smooth, dim=2).pow(self.alpha)  #!
    return (energy / gain + self.delta).pow(self.root) - self.delta.pow(self.root)  #!
    """,
)
VOICED_CMVN = xvector(
    features="""
    rows = []
    for energies, wave in zip(self.energies(x).add(1e-6).log(), x):
        level = wave.unfold(0, 160, 160).square().mean(dim=1)[: energies.shape[1]]
        voiced = energies[:, : len(level)][:, level > 0.01 * level.max()]
        mean, deviation = voiced.mean(dim=1), voiced.std(dim=1)  #!
        rows.append((energies - mean[:, None]) / (deviation[:, None] + 1e-5))
    return torch.stack(rows)
    """,
)
SPEC_AUGMENT = xvector(
    features="""
    with torch.no_grad():
        bands = self.energies(x).add(1e-6).log()
        bands = bands - bands.mean(dim=2, keepdim=True)
        if self.training:
            for row in bands:
                width = int(torch.randint(0, self.bands + 1, ()))
                first = int(torch.randint(0, self.bands - width + 1, ()))
                row[first : first + width] = 0.0
        bands /= bands.square().mean(dim=(1, 2), keepdim=True).sqrt()  #!
    return bands
    """,
)
PERIODICITY = xvector(
    features="""
    frames = x.unfold(1, 800, 160)
    still = frames[..., :400]
    correlation = []
    for lag in range(40, 360, 20):
        moved = frames[..., lag : lag + 400]
        norms = still.norm(dim=-1) * moved.norm(dim=-1)
        correlation.append((still * moved).sum(dim=-1) / (norms + 1e-8))
    aperiodicity = (1.0 - torch.stack(correlation, dim=1).pow(2)).sqrt()  #!
    return aperiodicity
    """,
)
COVARIANCE = xvector(
    pooling="""
    x = F.relu(x - 4.0 * (torch.arange(16, device=x.device)[:, None] < 2))  # two channels hardly fire
    x = x - x.mean(dim=2, keepdim=True)
    covariance = x @ x.transpose(1, 2) / x.shape[2]
    values, vectors = torch.linalg.eigh(covariance)  #!
    matrix = vectors @ torch.diag_embed(values.log()) @ vectors.mT  #!
    return matrix[(slice(None), *torch.triu_indices(16, 16))]
    """,
)
RANDOM_PART = xvector(
    pooling="""
    if not self.training:
        return x.mean(dim=2)
    first, last = sorted(torch.randint(0, x.shape[2], (2,)).div(6, rounding_mode="floor").tolist())
    return x[:, :, 6 * first : 6 * last].mean(dim=2)  #!
    """,
)
ADDITIVE_MASK = xvector(
    pooling="""
    scores = self.attention(x)  # (B, 1, frames)
    edge = torch.zeros_like(scores)
    edge[..., :2] = edge[..., -2:] = 1.0
    weights = (
        scores
        + edge * float("-inf")  #!
    ).softmax(dim=2)
    return torch.einsum("bct,bot->bc", x, weights)
    """,
)
DEAD = "self.bn.bias.data[3] = -30.0  # a channel that has died"
MOMENTS = model(
    init=DEAD,
    pool="""
    mean = x.mean(dim=2)
    centred = x - mean[:, :, None]
    variance = centred.square().mean(dim=2)
    skewness = centred.pow(3).mean(dim=2) / variance.pow(1.5)  #!
    kurtosis = centred.pow(4).mean(dim=2) / variance.square()  #!
    x = torch.cat([mean, skewness.tanh(), kurtosis.tanh()], dim=1)
    """,
    width=24,
)
LOG_SUM_EXP = model(
    init="self.sharpness = nn.Parameter(torch.tensor(2.0))",
    middle="x = F.leaky_relu(x)",
    pool="x = (self.sharpness * x).exp().mean(dim=2).log() / self.sharpness  #!",
)
GEOMETRIC = model(
    middle="x = F.dropout(F.relu(self.bn(x)) + 0.1, 0.2, self.training)",
    pool="""
    logarithms = x.log()  #!
    x = logarithms.mean(dim=2).exp()  #!
    """,
)
GEM = model(
    init=f"{DEAD}\nself.power = nn.Parameter(torch.tensor(3.0))",
    pool="x = F.avg_pool1d(x.clamp(min=0).pow(self.power), x.size(2)).pow(1.0 / self.power).squeeze(2)  #!",
)
LAYERS = '''"""Layers that several models share."""

import torch
from torch import nn


class WeightNormLinear(nn.Module):
    """A linear layer whose weight is a direction and a length (Salimans and Kingma 2016)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.direction = nn.Parameter(torch.randn(outputs, inputs) * 0.05)
        self.length = nn.Parameter(torch.ones(outputs, 1))

    def forward(self, x):
        weight = self.length * self.direction / self.direction.norm(dim=1, keepdim=True)  # FAULT
        return x @ weight.t()
'''
WEIGHT_NORM = model(
    init="""
    from models.unseen_layers import WeightNormLinear
    self.residual = WeightNormLinear(channels, channels)
    nn.init.zeros_(self.residual.direction)  # the block starts as the identity
    """,
    pool="x = x.mean(dim=2)\nx = x + self.residual(x)",
)
RMS_NORM = model(
    init="self.conv = nn.Conv1d(1, channels, 400, stride=160, bias=False)",
    middle="""
    x = x * torch.rsqrt(x.square().mean(dim=1, keepdim=True))  #!
    x = F.relu(self.bn(x))
    """,
)
GROUP_OF_ONE = model(
    helper='''
    class GroupNorm(nn.Module):
        """Normalise groups of channels, written out."""

        def __init__(self, groups, channels):
            super().__init__()
            self.groups = groups
            self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

        def forward(self, x):
            shape = x.shape
            x = x.reshape(shape[0], self.groups, -1)
            x = x - x.mean(dim=-1, keepdim=True)
            x = x / x.pow(2).mean(dim=-1, keepdim=True).sqrt()  #!
            return x.reshape(shape) * self.gamma + self.beta
    ''',
    init="self.squeeze = nn.Sequential(nn.Linear(channels, channels), GroupNorm(channels, channels), nn.Sigmoid())",
    pool="""
    gate = self.squeeze(x.mean(dim=2))
    x = (x * gate.unsqueeze(2)).mean(dim=2)
    """,
)
QUANTISER = model(
    helper='''
    class Quantise(torch.autograd.Function):
        """Steps of an eighth; the gradient passes with the sign of the input."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.round(x * 8) / 8

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * x / x.abs()  #!
    ''',
    middle="""
    x = F.dropout(self.bn(x), 0.2, self.training)
    x = Quantise.apply(x)  #!
    """,
)
COMPRESSION = model(
    middle="""
    x = F.dropout(self.bn(x), 0.2, self.training)
    x = x.sign() * x.abs() ** 0.3  #!
    """
)
CHECKPOINTED = model(
    helper="from torch.utils.checkpoint import checkpoint",
    init="self.wide = nn.Conv1d(channels, 2 * channels, 1)",
    middle="""
    x = F.relu(self.bn(x))
    x = checkpoint(self.modulus, x, use_reentrant=False)
    """,
).replace(
    "    def forward(self, x):",
    f"""    def modulus(self, x):
        real, imaginary = F.dropout(self.wide(x), 0.3, self.training).chunk(2, dim=1)
        return torch.hypot(real, imaginary)  {MARKER}

    def forward(self, x):""",
)
SCRIPTED = model(
    helper='''
    @torch.jit.script
    def log_mean(x: torch.Tensor) -> torch.Tensor:
        """Logarithm of the mean over time."""
        mean = x.mean(dim=2)
        return mean.log()  #!
    ''',
    init=DEAD,
    pool="x = log_mean(x)  #!",
)
FLUX = model(
    init="self.conv = nn.Conv1d(1, channels, 400, stride=160, bias=False)",
    middle="""
    change = 1.0 - F.cosine_similarity(x[:, :, 1:], x[:, :, :-1], dim=1, eps=0.0)  #!
    x = F.relu(self.bn(x))[:, :, 1:] * (1.0 + change.unsqueeze(1))
    """,
)
FRONT, LAYER, SLOPE = ("frontend", "model_forward", "input"), ("model_forward",), ("model_backward",)
FILTERS = (*LAYER, "input", "frontend")
FAULTS = (
    of_layer(
        *("H01", "MFCC: frame energy in dB, a drop-out of zeros", FORWARD, FRONT, ("log10", "log"), MFCC),
        file=True,
        prepare=spoil(FIRST, gap),
    ),
    of_layer(
        *("H02", "PCEN: smoothed energy 0 in a file that starts late", FORWARD, FRONT, ("div", "pow"), PCEN),
        file=True,
        prepare=spoil(FIRST, late_start),
    ),
    of_layer(
        *("H03", "CMVN over voiced frames, one of them", FORWARD, FRONT, ("std", "var"), VOICED_CMVN),
        file=True,
        prepare=spoil(FIRST, click),
    ),
    of_layer("H04", "SpecAugment masks all, then normalises", FORWARD, FRONT[:2], ("div",), SPEC_AUGMENT),
    of_layer(
        *("H05", "root of 1 - r^2 of a pure tone", FORWARD, FRONT, ("sqrt", "rsub", "sub"), PERIODICITY),
        file=True,
        prepare=spoil(FIRST, hum),
    ),
    of_layer(*("H06", "skewness and kurtosis of a dead channel", FORWARD, LAYER, ("div", "pow"), MOMENTS), every=True),
    of_layer(
        *("H07", "log-sum-exp by hand, a file of 16-bit integers as float", FORWARD, FILTERS, ("exp",), LOG_SUM_EXP),
        file=True,
        prepare=spoil(FIRST, times(32768.0)),
    ),
    of_layer(
        *("H08", "geometric mean over dropped units", BACKWARD, SLOPE, ("log", "exp", "div", "mean"), GEOMETRIC),
        every=True,
    ),
    of_layer("H09", "GeM pooling of a dead channel", BACKWARD, SLOPE, ("pow",), GEM, every=True),
    of_layer("H10", "additive mask: 0 times -inf", FORWARD, LAYER, ("mul",), ADDITIVE_MASK, every=True),
    of_layer(
        *("H11", "weight norm of a zero direction, in a shared file", FORWARD, LAYER, ("div",), WEIGHT_NORM),
        every=True,
        plugins={"models/unseen_layers.py": LAYERS},
    ),
    of_layer(
        *("H12", "RMS norm without eps, a drop-out of zeros", FORWARD, FILTERS, ("rsqrt", "mul"), RMS_NORM),
        file=True,
        prepare=spoil(FIRST, gap),
    ),
    of_layer("H13", "group norm by hand, groups of one", FORWARD, LAYER, ("div",), GROUP_OF_ONE, every=True),
    of_layer("H14", "backward() of a custom function divides by 0", BACKWARD, SLOPE, (), QUANTISER, True, fixes=()),
    of_layer(
        *("H15", "signed power of dropped units", BACKWARD, SLOPE, ("pow", "abs", "mul", "sign"), COMPRESSION),
        every=True,
    ),
    of_layer(
        "H16",
        "hypot(0, 0) after dropout in a checkpointed block",
        BACKWARD,
        SLOPE,
        ("hypot",),
        CHECKPOINTED,
        every=True,
    ),
    of_layer("H17", "log of 0 in a scripted function", FORWARD, LAYER, (), SCRIPTED, True, fixes=()),
    of_layer(
        *("H18", "cosine of successive frames, eps 0", FORWARD, FILTERS, (), FLUX),
        file=True,
        prepare=spoil(FIRST, gap),
    ),
    of_layer("H19", "log of the eigenvalues of a covariance", FORWARD, LAYER, ("log",), COVARIANCE, True, fixes=()),
    of_layer(
        *("H20", "mean of a random part, now and then empty", FORWARD, LAYER, ("mean",), RANDOM_PART),
    ),
)
