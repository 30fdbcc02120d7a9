"""Plug-in files written for voxceleb_trainer work unchanged in a copy of the checkout."""

import re
import shutil
from pathlib import Path

import numpy as np
import programs
import pytest
import yaml
from programs import ROOT

MODEL = """
import torch
import torch.nn as nn
from models.ResNetBlocks import *
from utils import PreEmphasis

class TheirNet(nn.Module):
    def __init__(self, block, layers, num_filters, nOut, n_mels=40, levels=2, **kwargs):
        super(TheirNet, self).__init__()
        print('Embedding size is %d, %d levels.' % (nOut, levels))
        self.torchfb = torch.nn.Sequential(PreEmphasis())
        self.block = block(1, num_filters[0], downsample=nn.Conv2d(1, num_filters[0], 1))
        self.sap_linear = nn.Linear(num_filters[0], num_filters[0])
        self.attention = self.new_parameter(num_filters[0], 1)
        self.fc = nn.Linear(num_filters[0], nOut)

    def new_parameter(self, *size):
        out = nn.Parameter(torch.FloatTensor(*size))
        nn.init.xavier_normal_(out)
        return out

    def forward(self, x):
        with torch.no_grad():
            with torch.cuda.amp.autocast(enabled=False):
                x = self.torchfb(x).unfold(1, 400, 160).abs().log1p().unsqueeze(1)
        x = self.block(x).mean(dim=3).permute(0, 2, 1)
        w = torch.softmax(torch.matmul(torch.tanh(self.sap_linear(x)), self.attention), dim=1)
        return self.fc(torch.sum(x * w, dim=1))

def MainModel(nOut=256, **kwargs):
    num_filters = [8, 16]
    return TheirNet(SEBasicBlock, [1], num_filters, nOut, **kwargs)
"""
LOSS = """
import torch
import torch.nn as nn
import loss.aamsoftmax as aamsoftmax
import loss.angleproto as angleproto
from utils import accuracy

class LossFunction(nn.Module):
    def __init__(self, **kwargs):
        super(LossFunction, self).__init__()
        self.test_normalize = True
        self.aamsoftmax = aamsoftmax.LossFunction(**kwargs)
        self.angleproto = angleproto.LossFunction(**kwargs)

    def forward(self, x, label=None):
        assert x.size()[1] == 2
        nlossS, prec1 = self.aamsoftmax(x.reshape(-1, x.size()[-1]), label.repeat_interleave(2))
        nlossP, _ = self.angleproto(x, None)
        return nlossS + nlossP, prec1.reshape(1)
"""
OPTIMIZER = """
import torch

def Optimizer(parameters, lr, weight_decay, **kwargs):
    print('Initialised Adam optimizer')
    return torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay)
"""
SCHEDULER = """
import torch

def Scheduler(optimizer, test_interval, max_epoch, lr_decay, **kwargs):
    sche_fn = torch.optim.lr_scheduler.StepLR(optimizer, step_size=test_interval, gamma=lr_decay)
    return sche_fn, 'epoch'
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout to drop files into."""
    folder = tmp_path_factory.mktemp("copy") / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "data", "exps", "tests", "__pycache__"))
    return folder


def train(checkout, path, *arguments):
    return command(checkout, "trainSpeakerNet.py", "--config", path, *arguments)


def command(checkout, script, *arguments):
    return programs.run(checkout / script, *arguments, cwd=checkout)


def test_voxceleb_trainer_files_run_unchanged(settings, checkout, tmp_path):
    for folder, text in (("models", MODEL), ("loss", LOSS), ("optimizer", OPTIMIZER), ("scheduler", SCHEDULER)):
        (checkout / folder / "theirs.py").write_text(text)
    keys = {k: v for k, v in settings.items() if k not in ("channels", "aggregate")}
    keys |= {"model": "theirs", "trainfunc": "theirs", "optimizer": "theirs", "scheduler": "theirs"}
    keys |= {"nPerSpeaker": 2, "levels": 5, "batch_size": 3, "easy_margin": True}
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(keys))
    done = train(checkout, path)
    assert done.returncode == 0, done.stderr
    assert "12, 5 levels" in done.stdout and "best EER" in done.stdout
    # Its tensors have the names of voxceleb_trainer's own models; a checkpoint of it is still read as what it is.
    best = tmp_path / "run" / "model" / "model_best.model"
    again = train(checkout, path, "--eval", "--initial_model", best, "--save_path", tmp_path / "eval")
    figures = [re.search(r"EER ([\d.]+) %.*minDCF\(0.01\) ([\d.]+)", run.stdout).groups() for run in (done, again)]
    assert figures[0] == figures[1], again.stdout + again.stderr
    file = next(Path(keys["test_path"]).rglob("*.flac"))
    embedded = command(checkout, "embed.py", "--initial_model", best, "--wav", file, "--out", tmp_path / "e.npy")
    assert embedded.returncode == 0, embedded.stderr
    embedding = np.load(tmp_path / "e.npy")
    assert embedding.shape == (12,) and np.isfinite(embedding).all()
    more = train(checkout, path, "--max_epoch", "3")
    assert more.returncode == 0 and "Epoch 3/3" in more.stdout and "Epoch 1/" not in more.stdout, more.stderr


def test_the_model_of_the_guide_trains(settings, checkout, tmp_path):
    guide = (ROOT / "docs" / "add_a_model.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.S)
    (checkout / "models" / "SmallTDNN.py").write_text(blocks[0])
    (checkout / "models" / "WideTDNN.py").write_text(blocks[1].replace("512", "20"))
    keys = {k: v for k, v in settings.items() if k not in ("channels", "aggregate")}
    path = tmp_path / "guide.yaml"
    path.write_text(yaml.safe_dump({**keys, "model": "SmallTDNN", "width": 16, "max_epoch": 1}))
    done = train(checkout, path)
    assert done.returncode == 0 and "SmallTDNN (3,228 parameters)" in done.stdout, done.stdout + done.stderr
    path.write_text(yaml.safe_dump({**keys, "model": "WideTDNN"}))
    printed = train(checkout, path, "--print_config").stdout
    assert "width: 20\n" in printed and "model: WideTDNN\n" in printed
    assert "did you mean 'width'" in train(checkout, path, "--print_config", "--widht=3").stderr.replace("--", "")
