"""Small models of every kind, and embeddings of nobody."""

import numpy as np
import torch

from config import Config
from settings import plugins
from speaker_model import SpeakerModel
from storage.speaker_store import Utterance

# What makes a model a small one of its kind.
SMALL = {"ECAPA_TDNN": {"channels": 16, "aggregate": 32}, "ResNet": {"m_channels": 4, "blocks": (1, 1, 1, 1)}}
SMALL["ResNet34"] = SMALL["ResNet"]
SMALL["XVector"] = {"channels": 16, "stats_channels": 24}
SMALL["CAMPPlus"] = {"m_channels": 4, "init_channels": 16, "growth_rate": 8, "blocks": (2, 2, 2)}
SMALL["VGGVox"] = {"num_filters": (8, 8, 8, 8, 8, 16)}
SMALL |= {name: {"num_filters": (8, 8, 8, 16)} for name in ("ResNetSE34L", "ResNetSE34V2")}
SMALL["SimAM_ResNet"] = SMALL["ResNet"]
SMALL |= {name: {"m_channels": 8, "blocks": (1, 1, 1, 1)} for name in ("ERes2Net", "ERes2NetV2")}
SMALL["RawNet3"] = {"channels": 16}
SMALL["ReDimNet"] = {"size": "B0", "channels": 3}
SMALL["ReDimNet2"] = {"size": "B0", "channels": 4}
VALUES = {
    "nOut": 16,
    "n_mels": 40,
    "log_input": True,
    "encoder_type": "ASP",
    "nClasses": 5,
    "margin": 0.2,
    "scale": 30.0,
}
VALUES |= {"lr": 0.1, "max_epoch": 6, "steps_per_epoch": 4, "test_interval": 2, "weight_decay": 1e-3}
VALUES |= {"warmup_epochs": 1, "lr_min": 1e-5}

MODEL = "ab" * 32


def rows(count, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 5)).astype(np.float32)


def heard(embeddings, *sources):
    return [Utterance(e, 1.5 + i, source) for i, (e, source) in enumerate(zip(embeddings, sources))]


class Network(torch.nn.Module):
    """A network with the model alone."""

    def __init__(self, model):
        super().__init__()
        self.__S__ = model

    def forward(self, x):
        return self.__S__(x)


def speaker_model(name, **more):
    """A tiny model with BatchNorm statistics that are no identity."""
    torch.manual_seed(0)
    values = {**VALUES, **SMALL.get(name, {}), **more}
    network = Network(plugins.call(plugins.load("models", name), values))
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return SpeakerModel(network, Config(model=name, **values), torch.device("cpu"), "tiny.model")
