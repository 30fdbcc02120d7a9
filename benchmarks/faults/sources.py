"""Plug-in files of the faults, made from one small model and one small loss in voxceleb_trainer's style."""

import textwrap

from fault import MARKER

MODEL = '''"""A small network on the waveform."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class TinyNet(nn.Module):
    def __init__(self, nOut, channels=8, **kwargs):
        super(TinyNet, self).__init__()
        self.conv = nn.Conv1d(1, channels, 400, stride=160)
        self.bn = nn.BatchNorm1d(channels)
        self.fc = nn.Linear({width}, nOut)
{init}

    def forward(self, x):
{start}
        x = self.conv(x.unsqueeze(1))  # (B, channels, frames)
{middle}
{pool}
{end}


def MainModel(nOut=12, **kwargs):
    return TinyNet(nOut, **kwargs)
'''

LOSS = '''"""A small loss over class centres."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils import accuracy


class LossFunction(nn.Module):
    {constants}

    def __init__(self, nOut, nClasses, margin=0.2, scale=30.0, **kwargs):
        super(LossFunction, self).__init__()
        self.test_normalize = True
        self.margin = margin
        self.scale = scale
        self.classes = nClasses
        self.weight = nn.Parameter(torch.FloatTensor(nClasses, nOut))
        nn.init.xavier_normal_(self.weight)
{init}

    def forward(self, x, label=None):
{body}
        return loss, accuracy(logits.detach(), label)[0]
{more}
'''


def block(text: str, depth: int = 8) -> str:
    """Indent a block of code and write its marks '#!' out."""
    return textwrap.indent(textwrap.dedent(text).strip("\n"), " " * depth).replace("#!", MARKER)


def model(
    init="", start="", middle="x = F.relu(self.bn(x))", pool="x = x.mean(dim=2)", end="return self.fc(x)", **more
):
    """Source of a model plug-in; blocks of code replace its parts, and '#!' at the end of a line marks the fault."""
    blocks = {"init": init, "start": start, "middle": middle, "pool": pool, "end": end}
    source = MODEL.format(width=more.pop("width", 8), **{name: block(text) for name, text in blocks.items()})
    if more.get("helper"):
        source = source.replace("\n\nclass TinyNet", f"\n\n{block(more['helper'], 0)}\n\n\nclass TinyNet")
    return source


def loss(*body, init="", constants="per_speaker = (1, 1)", more=""):
    """Source of a loss plug-in; '#!' at the end of a line marks the fault."""
    code = "\n".join(block(part) for part in body)
    source = LOSS.format(init=block(init), body=code, constants=constants, more=block(more, 4))
    return source.rstrip() + "\n"


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
    return XVECTOR.format(init=block(init), features=block(features), pooling=block(pooling)).replace("#!", MARKER)


OPTIMIZER = '''"""{what}"""

import torch


class {name}(torch.optim.Optimizer):
    def __init__(self, parameters, lr, weight_decay=0.0, beta1=0.9, beta2=0.99):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, beta1=beta1, beta2=beta2))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)


{update}

def Optimizer(parameters, lr=0.001, weight_decay=0.0, **kwargs):
    return {name}(parameters, lr, weight_decay)
'''


def optimizer(name: str, what: str, update: str) -> str:
    """Source of an optimizer plug-in; '#!' marks the fault."""
    return OPTIMIZER.format(name=name, what=what, update=block(update, 4) + "\n")


SCHEDULE = '''"""{what}"""

import numpy as np
import torch


def Scheduler(optimizer, lr=0.001{keys}, **kwargs):
    def factor(step):
{body}

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "iteration"
'''


def schedule(what: str, keys: str, body: str) -> str:
    """Source of a scheduler plug-in; '#!' marks the fault."""
    return SCHEDULE.format(what=what, keys=keys, body=block(body))


def marked_lines(plugins: dict) -> list[str]:
    """'loss/x.py:31' of every marked line."""
    return [
        f"{name}:{number}"
        for name, source in plugins.items()
        for number, line in enumerate(source.splitlines(), 1)
        if line.rstrip().endswith(MARKER)
    ]
