"""Plug-in files written for voxceleb_trainer work unchanged in a copy of the checkout."""

import os
import shutil
import subprocess
import sys

import yaml

MODEL = """
import torch
import torch.nn as nn
from models.ResNetBlocks import *
from utils import PreEmphasis

class TheirNet(nn.Module):
    def __init__(self, block, layers, num_filters, nOut, n_mels=40, levels=2, **kwargs):
        super(TheirNet, self).__init__()
        print('Embedding size is %d, %d levels.' % (nOut, levels))
        self.pre = PreEmphasis()
        self.block = block(1, num_filters[0], downsample=nn.Conv2d(1, num_filters[0], 1))
        self.fc = nn.Linear(num_filters[0], nOut)

    def forward(self, x):
        x = self.pre(x).unfold(1, 400, 160).abs().log1p().unsqueeze(1)
        return self.fc(self.block(x).mean(dim=(2, 3)))

def MainModel(nOut=256, **kwargs):
    num_filters = [8, 16]
    return TheirNet(SEBasicBlock, [1], num_filters, nOut, **kwargs)
"""
LOSS = """
import torch
import torch.nn as nn
import loss.softmax as softmax
import loss.angleproto as angleproto
from utils import accuracy

class LossFunction(nn.Module):
    def __init__(self, **kwargs):
        super(LossFunction, self).__init__()
        self.test_normalize = True
        self.softmax = softmax.LossFunction(**kwargs)
        self.angleproto = angleproto.LossFunction(**kwargs)

    def forward(self, x, label=None):
        assert x.size()[1] == 2
        nlossS, prec1 = self.softmax(x.reshape(-1, x.size()[-1]), label.repeat_interleave(2))
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


def test_voxceleb_trainer_files_run_unchanged(settings, tools, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(tools.root, checkout, ignore=shutil.ignore_patterns(".*", "data", "exps", "tests", "__pycache__"))
    for folder, text in (("models", MODEL), ("loss", LOSS), ("optimizer", OPTIMIZER), ("scheduler", SCHEDULER)):
        (checkout / folder / "theirs.py").write_text(text)
    keys = {k: v for k, v in settings.items() if k not in ("channels", "aggregate")}
    keys |= {"model": "theirs", "trainfunc": "theirs", "optimizer": "theirs", "scheduler": "theirs"}
    keys |= {"nPerSpeaker": 2, "levels": 5, "batch_size": 3}
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(keys))
    words = [sys.executable, str(checkout / "trainSpeakerNet.py"), "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, cwd=checkout, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "12, 5 levels" in done.stdout and "best EER" in done.stdout
