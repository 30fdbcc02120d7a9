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


def _block(text: str, depth: int = 8) -> str:
    return textwrap.indent(textwrap.dedent(text).strip("\n"), " " * depth).replace("#!", MARKER)


def model(
    init="", start="", middle="x = F.relu(self.bn(x))", pool="x = x.mean(dim=2)", end="return self.fc(x)", **more
):
    """Source of a model plug-in; blocks of code replace its parts, and '#!' at the end of a line marks the fault."""
    blocks = {"init": init, "start": start, "middle": middle, "pool": pool, "end": end}
    source = MODEL.format(width=more.pop("width", 8), **{name: _block(text) for name, text in blocks.items()})
    if more.get("helper"):
        source = source.replace("\n\nclass TinyNet", f"\n\n{_block(more['helper'], 0)}\n\n\nclass TinyNet")
    return source


def loss(*body, init="", constants="per_speaker = (1, 1)", more=""):
    """Source of a loss plug-in; '#!' at the end of a line marks the fault."""
    code = "\n".join(_block(part) for part in body)
    source = LOSS.format(init=_block(init), body=code, constants=constants, more=_block(more, 4))
    return source.rstrip() + "\n"


def marked_lines(plugins: dict) -> list[str]:
    """'loss/x.py:31' of every marked line."""
    return [
        f"{name}:{number}"
        for name, source in plugins.items()
        for number, line in enumerate(source.splitlines(), 1)
        if line.rstrip().endswith(MARKER)
    ]
