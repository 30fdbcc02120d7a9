"""Shared by the tests: a tiny set of synthetic voices, a tiny configuration, and the real command line."""

import os
from types import SimpleNamespace

import pytest
import surroundings
import torch
import yaml
from programs import ROOT
from trainers import assert_same, batches_of, build_trainer, command, snapshot

import make_demo_data

torch.set_num_threads(1)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One process more than there are cores: many tests wait for a script, a signal or a timeout."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of a data set with 6 training speakers of 5 utterances and 4 trial speakers."""
    out = tmp_path_factory.mktemp("voices")
    arguments = [
        "--speakers",
        "6",
        "--trial_speakers",
        "4",
        "--utterances",
        "5",
        "--seconds",
        "0.9",
        "--nontargets",
        "40",
    ]
    make_demo_data.main(["--out", str(out), *arguments])
    return out


@pytest.fixture(scope="session")
def around(tmp_path_factory):
    """Folders of noise of two seconds and of impulse responses with an RT60 of 0.3 s and their peak after 5 ms."""
    return surroundings.make(tmp_path_factory.mktemp("around"))


@pytest.fixture
def settings(data, tmp_path):
    """Keys of a run that takes a second: a model of a few thousand parameters."""
    return {
        "train_list": str(data / "train_list.txt"),
        "train_path": str(data / "wav"),
        "test_list": str(data / "trials.txt"),
        "test_path": str(data / "wav"),
        "save_path": str(tmp_path / "run"),
        "model": "ECAPA_TDNN",
        "channels": 8,
        "aggregate": 16,
        "n_mels": 24,
        "nOut": 12,
        "trainfunc": "aamsoftmax",
        "optimizer": "adam",
        "scheduler": "cosine",
        "lr": 0.01,
        "batch_size": 4,
        "max_frames": 40,
        "max_epoch": 2,
        "test_interval": 2,
        "eval_frames": 0,
        "picture_format": "none",
        "nDataLoaderThread": 0,
        "threads": 1,
        "seed": 3,
    }


@pytest.fixture
def write(tmp_path):
    """Write settings to a YAML file and return its path."""

    def write_yaml(settings, name="test.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return str(path)

    return write_yaml


@pytest.fixture
def tools():
    """Helpers of programs.py and trainers.py."""
    return SimpleNamespace(
        command=command, build=build_trainer, batches=batches_of, snapshot=snapshot, assert_same=assert_same, root=ROOT
    )


@pytest.fixture
def kernels(monkeypatch):
    """Put torch's switches back after a test."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, torch.get_float32_matmul_precision()
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield cudnn
    cudnn.deterministic, cudnn.benchmark = before[:2]
    torch.set_float32_matmul_precision(before[2])
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def checkpoint(settings, tools, tmp_path):
    """A checkpoint of a tiny model that carries its configuration."""
    from storage.files import save_atomically

    path = tmp_path / "model_best.model"
    save_atomically(tools.build(settings).state.capture(), path)
    return str(path)
