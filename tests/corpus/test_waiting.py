"""Augmentation on the device of training (augment_on): the same draws, hence the same rows up to rounding."""

import numpy as np
import pytest
import torch
from surroundings import augmenter, voice

from corpus.augmentation import apply_draws
from corpus.loader import Loader
from corpus.waiting import LARGEST, packed
from DatasetLoader import SpeakerBatchSampler, TrainDataset, collate
from postmortem.provenance import same_as_files
from settings.reader import load_config
from training.batches import as_dumped

POLICIES = {
    "noise": ["noise"],
    "babble": [{"babble": {"count": [2, 5]}}],
    "reverb, aligned": ["reverb"],
    "reverb": [{"reverb": {"align": False}}],
    "gain": ["gain"],
    "clipping": ["clipping"],
    "telephone": ["telephone"],
    "bands": [{"frequency_drop": {"count": [3, 3]}}],
    "pieces": [{"chunk_drop": {"count": [3, 3]}}],
    "coloured": ["coloured_noise"],
    "a chain": [{"one_of": {"p": 0.8, "of": ["noise", "babble", "reverb"]}}, {"gain": {"p": 0.7}}, "clipping", "music"],
    "a codec first": [{"noise": {"p": 0.5}}, {"a_law": {"p": 0.5}}, "reverb", {"noise": {"p": 0.5}}],
    "a codec last": [{"one_of": {"p": 0.8, "of": ["noise", "reverb", "a_law"]}}, {"noise": {}}, {"a_law": {"p": 0.4}}],
}


def both_ways(found, crops):
    """Rows as the worker makes them, and as the device does: (rows, draws) twice, and how many rows had waited."""
    here = [found.augment(x, np.random.default_rng(seed))[:2] for seed, x in enumerate(crops)]
    rows, waiting, draws, bounds = [], {}, [], []
    for seed, x in enumerate(crops):
        begun = found.begun(x, np.random.default_rng(seed))
        stages, growth = begun.operations()
        bounds.append(growth * np.abs(begun.x).max() * (1 + 1e-6))
        rows.append(begun.x.copy())
        draws.append(begun.draws)
        if stages:
            waiting[seed] = stages
    batch = {"data": torch.tensor(np.stack(rows))[None], "label": torch.zeros(len(rows))}
    batch["files"] = [{"augment": of_row} for of_row in draws]
    batch["waiting"] = packed(waiting, len(crops[0]))
    if batch["waiting"] is None:
        del batch["waiting"]
    batch = as_dumped(batch)
    assert (batch["data"][0].abs().amax(dim=1).numpy() <= bounds).all()
    return here, list(zip(batch["data"][0].numpy(), draws)), len(waiting)


@pytest.mark.parametrize("name", POLICIES)
def test_a_device_makes_the_rows_that_a_worker_makes(around, tmp_path, name):
    crops = [voice(seed) for seed in range(12)] + [0 * voice(12)]
    for cache in (str(tmp_path), "none"):  # noise as int16, and as float32
        here, there, waited = both_ways(augmenter(around, POLICIES[name], cache=cache), crops)
        assert waited >= (4 if "codec" in name or "chain" in name else 11)
        for (x, draws), (y, others), clean in zip(here, there, crops):
            level = np.sqrt(np.mean(x**2)) or 1
            assert np.abs(x - y).max() < 1e-5 * level
            assert [draw.keys() - {"reason"} for draw in draws] == [draw.keys() - {"reason"} for draw in others]
            for draw, other in zip(draws, others):
                for key, value in draw.items():
                    assert other[key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key
            assert np.abs(apply_draws(clean, others) - x).max() < 1e-5 * level  # as a dump makes the row again


def test_a_row_is_bound_by_the_largest_that_it_is_on_its_way(around):
    up, down = {"gain": {"db": 200}}, {"gain": {"db": -200}}
    begun = augmenter(around, [up, up, "noise", down, down]).begun(voice(), np.random.default_rng(0))
    stages, growth = begun.operations()
    assert len(stages) == 5 and growth > 1e20 > LARGEST
    with np.errstate(over="ignore"):
        assert np.abs(begun.catch_up()).max() < 100


# ------------------------------------------------------------------------------------------------- through a loader


@pytest.fixture
def keys(settings, around, tmp_path):
    """A run whose rows are nearly all augmented, in part behind a codec."""
    policy = (
        "[{one_of: {p: 0.9, of: [noise, babble, reverb]}}, {mu_law: {p: 0.2}}, {gain: {p: 0.5}}, {noise: {p: 0.5}}]"
    )
    more = {"augmentation": policy, "musan_path": around / "musan", "rir_path": around / "rir"}
    return {**settings, **more, "augment_cache": tmp_path / "cache", "save_path": tmp_path / "run"}


def loaded(keys, workers=0, **more):
    """The batches of an epoch, as loader processes send them."""
    config = load_config([f"--{key}={value}" for key, value in {**keys, **more}.items()])[0]
    dataset = TrainDataset(config)
    sampler = SpeakerBatchSampler(dataset, config, config.nPerSpeaker > 1)
    sampler.set_position(1)
    return [as_dumped(batch) for batch in Loader(dataset, sampler, collate, config, workers)]


@pytest.mark.parametrize("per_row", [1, 2])
def test_batches_of_a_device_are_those_of_workers_for_any_number_of_processes(keys, tools, per_row, monkeypatch):
    monkeypatch.setattr("corpus.loader.usable_cores", lambda: 2)
    expected = loaded(keys, nPerSpeaker=per_row)
    runs = [loaded(keys, workers, augment_on="device", nPerSpeaker=per_row) for workers in (0, 1, 2)]
    kinds = set()
    for batches in zip(expected, *runs, strict=True):
        batch, *others = batches
        level = batch["data"].square().mean(dim=-1, keepdim=True).sqrt()
        assert ((batch["data"] - others[0]["data"]).abs() < 1e-5 * level).all()
        for info, other in zip(batch["files"], others[0]["files"], strict=True):
            assert info.keys() == other.keys() and other["rms"] == pytest.approx(info["rms"], rel=1e-5)
            kinds |= {draw["kind"] for draw in info["augment"]}
        for one in others[1:]:
            assert torch.equal(one["data"], others[0]["data"]) and one["files"] == others[0]["files"]
    assert kinds == {"noise", "speech", "reverb", "mu_law", "gain"}
    assert same_as_files(runs[0][0]["data"], list(runs[0][0]["files"]), range(len(runs[0][0]["files"])), rounded=True)
    assert not same_as_files(runs[0][0]["data"] * 1.001, list(runs[0][0]["files"]), [0], rounded=True)
