"""Runs that augment on the device of training: dumps, replay, resuming, bad recordings, and no read of the device."""

import json
import math

import numpy as np
import pytest
import soundfile
import torch
from surroundings import RATE

import analyze_nan_debug
from benchmarks.device_reads import Reads
from errors import UsageError
from postmortem.provenance import same_as_files
from SpeakerNet import Interrupted
from storage.dump import read_dump

POLICY = "[{one_of: {of: [noise, babble, reverb]}}, {clipping: {p: 0.5}}, {noise: {p: 0.5}}]"


@pytest.fixture
def keys(settings, around, tmp_path):
    more = {"augmentation": POLICY, "musan_path": around / "musan", "rir_path": around / "rir"}
    return {**settings, **more, "augment_cache": tmp_path / "cache", "augment_on": "device"}


def test_a_step_asks_the_device_for_nothing(keys, tools):
    trainer = tools.build(keys, nan_check="late", optimizer="sgd")
    trainer.network.train()
    for batch in tools.batches(trainer)[:3]:
        trainer.progress.batch += 1
        assert trainer.accept(batch) and batch["waiting"].parts
        with Reads("cpu").awaiting(trainer.late) as counted:
            trainer.train_step([batch])
            trainer.save_if_due()
        assert counted.count == 0 and "waiting" not in batch


def test_a_dump_has_the_rows_and_draws_of_a_worker_and_is_replayed_bit_for_bit(keys, tools, capsys):
    dumps = {}
    for where in ("worker", "device"):
        trainer = tools.build(keys, augment_on=where, save_path=f"{keys['save_path']}_{where}", scale=1e39)
        batch = tools.batches(trainer)[0]
        trainer.progress.batch += 1
        assert trainer.accept(batch) and trainer.train_step([batch]) is None
        trainer.close()
        (dumps[where],) = trainer.incidents.writer.folder.glob("nan_*.pt")
    capsys.readouterr()
    assert analyze_nan_debug.main([str(dumps["device"]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["replay"]["reproduced"] == "bit_equal"
    here, there = read_dump(dumps["worker"]), read_dump(dumps["device"])
    level = here["data"].square().mean(dim=-1, keepdim=True).sqrt()
    assert ((here["data"] - there["data"]).abs() < 1e-5 * level).all() and not torch.equal(here["data"], there["data"])
    for one, other in zip(here["files"], there["files"], strict=True):
        assert other["peak"] == pytest.approx(one["peak"], rel=1e-5) and one.keys() == other.keys()
        for draw, same in zip(one["augment"], other["augment"], strict=True):
            assert same == {k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in draw.items()}
    rows = range(len(there["files"]))
    assert same_as_files(there["data"], there["files"], rows, rounded=True)
    assert same_as_files(here["data"], here["files"], rows)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(keys, tools):
    keys = {**keys, "mixup": 0.4, "save_interval_steps": 1}
    whole = tools.build(keys, save_path=f"{keys['save_path']}_whole")
    whole.train_epoch()
    expected = tools.snapshot(whole)
    stopped = tools.build(keys, save_path=f"{keys['save_path']}_stopped")
    taken = stopped.conclude

    def conclude(launched, result):
        stopped.stop_signal.number = 15 if stopped.progress.step == 3 else None
        return taken(launched, result)

    stopped.conclude = conclude
    with pytest.raises(Interrupted):
        stopped.train_epoch()
    stopped.close()
    again = tools.build(keys, save_path=f"{keys['save_path']}_stopped")
    again.begin()
    assert 3 <= again.progress.step < whole.progress.step
    again.train_epoch()
    tools.assert_same(expected, tools.snapshot(again))


@pytest.mark.parametrize("kind", ["noise", "rir"])
def test_a_recording_with_nan_is_laid_to_the_augmentation(keys, tools, tmp_path, capsys, kind):
    bad = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    bad[:: RATE // 40] = math.nan
    (tmp_path / "bad" / kind).mkdir(parents=True)
    soundfile.write(tmp_path / "bad" / kind / "nan.wav", bad, RATE, subtype="FLOAT")
    plugin, key = {"noise": ("noise", "musan_path"), "rir": ("reverb", "rir_path")}[kind]
    trainer = tools.build(keys, augmentation=f"[{plugin}]", max_epoch=1, **{key: tmp_path / "bad"})
    trainer.run()
    trainer.close()
    assert trainer.progress.step > 3 and all(p.isfinite().all() for p in trainer.network.parameters())
    (dump,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    capsys.readouterr()
    assert analyze_nan_debug.main([str(dump), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["reason"], found["cause"]) == ("data_error", "augmentation")
    assert [file["path"] for file in found["location"]["files"]] == [str(tmp_path / "bad" / kind / "nan.wav")]


def test_a_row_that_may_overflow_is_augmented_and_looked_at_by_the_worker(keys, tools, capsys):
    trainer = tools.build(
        keys, augmentation="[{gain: {db: 200}}, {gain: {db: 200}}, {gain: {db: 200}}, {gain: {db: 200}}]"
    )
    batch = tools.batches(trainer)[0]
    assert "waiting" not in batch and not batch["peak"].isfinite().any()
    assert not trainer.accept(batch)
    trainer.close()
    capsys.readouterr()
    (dump,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert analyze_nan_debug.main([str(dump), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cause"] == "augmentation"


def test_a_policy_without_anything_for_the_device_is_refused(keys, tools):
    with pytest.raises(UsageError, match=r"augment_on: device: nothing of the policy can be done there.*: opus, speed"):
        tools.build(keys, augmentation="[{one_of: {of: [opus, speed]}}, opus]")
