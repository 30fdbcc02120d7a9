"""Shared by the tests: a tiny set of synthetic voices, a tiny configuration, and the real command line."""

from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import torch
import yaml

import make_demo_data

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


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


def command(*arguments, **more):
    """Run trainSpeakerNet.py as a user does."""
    return programs.run(ROOT / "trainSpeakerNet.py", *arguments, **more)


def build_trainer(settings, **overrides):
    """Build a ModelTrainer in this process, as trainSpeakerNet.train does."""
    from DatasetLoader import SpeakerBatchSampler, TrainDataset
    from distributed import Ranks
    from evaluation import Evaluator
    from run_files import RunFiles
    from SpeakerNet import ModelTrainer
    from training.start import configure

    arguments = [f"--{k}={v}" for k, v in {**settings, "device": "cpu", **overrides}.items()]
    config, *_ = configure(arguments)
    ranks = Ranks(config)
    dataset = TrainDataset(config)
    sampler = SpeakerBatchSampler(dataset, config, config.nPerSpeaker > 1)
    return ModelTrainer(config, ranks, dataset, sampler, Evaluator(config, ranks), RunFiles(config, True))


def batches_of(trainer, epoch=1):
    """All batches of an epoch."""
    trainer.sampler.set_position(epoch)
    return list(trainer.loader)


def snapshot(trainer):
    """Copies of everything that a step may change."""
    optimizer = trainer.optimizer.state_dict()["state"]
    return {
        "network": {k: v.clone() for k, v in trainer.network.state_dict().items()},
        "optimizer": {(i, k): torch.as_tensor(v).clone() for i, s in optimizer.items() for k, v in s.items()},
        "scaler": trainer.scaler.state_dict(),
        "lr": [g["lr"] for g in trainer.optimizer.param_groups],
        "rng": torch.get_rng_state(),
    }


def assert_same(a, b):
    """Assert that two snapshots are equal bit for bit."""
    for part in ("network", "optimizer"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            assert torch.equal(a[part][name], b[part][name]), (part, name)
    assert (a["scaler"], a["lr"]) == (b["scaler"], b["lr"])
    assert torch.equal(a["rng"], b["rng"])


@pytest.fixture
def tools():
    """The helpers above, for test modules."""
    return SimpleNamespace(
        command=command, build=build_trainer, batches=batches_of, snapshot=snapshot, assert_same=assert_same, root=ROOT
    )
