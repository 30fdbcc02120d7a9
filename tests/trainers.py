"""A trainer in this process, and what a step may change of it."""

import programs
import torch


def command(*arguments, **more):
    """Run trainSpeakerNet.py as a user does."""
    return programs.run(programs.ROOT / "trainSpeakerNet.py", *arguments, **more)


def build_trainer(settings, ranks=None, **overrides):
    """Build a ModelTrainer in this process, as trainSpeakerNet.train does; ``ranks`` of another may be used again."""
    from DatasetLoader import SpeakerBatchSampler, TrainDataset
    from SpeakerNet import ModelTrainer
    from training.evaluation import Evaluator
    from training.ranks import Ranks
    from training.run_files import RunFiles
    from training.start import configure

    arguments = [f"--{k}={v}" for k, v in {**settings, "device": "cpu", **overrides}.items()]
    config, *_ = configure(arguments)
    ranks = ranks or Ranks(config)
    dataset = TrainDataset(config)
    sampler = SpeakerBatchSampler(dataset, config, config.nPerSpeaker > 1)
    return ModelTrainer(config, ranks, dataset, sampler, Evaluator(config, ranks), RunFiles(config, True))


def batches_of(trainer, epoch=1):
    """All batches of an epoch."""
    trainer.sampler.set_position(epoch)
    return list(trainer.loader)


def train(trainer, batches):
    """Feed batches as train_epoch does."""
    for batch in batches:
        trainer.progress.batch += 1
        if trainer.accept(batch):
            trainer.train_step([batch])


def loaded_batches(settings, workers=0, rank=0, world=1, first=0, **keys):
    """The batches of the second epoch from ``first`` on, with copies at other speeds, as the loader gives them."""
    from corpus.loader import make_loader
    from DatasetLoader import SpeakerBatchSampler, TrainDataset, collate
    from settings.reader import load_config

    keys = {**settings, "speed_perturb": True, **keys}
    config = load_config([f"--{key}={value}" for key, value in keys.items()])[0]
    dataset = TrainDataset(config)
    sampler = SpeakerBatchSampler(dataset, config, False, rank, world)
    sampler.set_position(2, first)
    return list(make_loader(dataset, sampler, collate, config, workers))


def snapshot(trainer):
    """Copies of everything that a step may change."""
    optimizer = trainer.optimizer.state_dict()["state"]
    return {
        "network": {k: v.clone() for k, v in trainer.network.state_dict().items()},
        "optimizer": {(i, k): torch.as_tensor(v).clone() for i, s in optimizer.items() for k, v in s.items()},
        "scaler": trainer.step.scaler.state_dict(),
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
