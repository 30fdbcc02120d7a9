"""Loader processes that are killed, crash or hang: the batches that follow, and how a run ends without them."""

import os
import signal
import time

import numpy as np
import pytest
import torch

from corpus.loader import Loader, LoaderFailed
from errors import Finished


class Spoilt:
    """In place of an augmentation: ``act`` is what becomes of the process."""

    def __init__(self, act):
        self.act = act

    def begun(self, x, rng, waits=False):
        self.act()


def hang():
    time.sleep(600)


def divide():
    return 1 / 0


def kill_loader(trainer):
    os.kill(trainer.loader.processes()[0].pid, signal.SIGKILL)


def before_each_step(trainer, action):
    """Call ``action(trainer)`` before each step of the trainer, from the second on."""
    step = trainer.train_step

    def train_step(window):
        if trainer.progress.batch > 1:
            action(trainer)
        return step(window)

    trainer.train_step = train_step


def train(trainer, epochs=2):
    for epoch in range(trainer.progress.epoch, epochs + 1):
        trainer.progress.epoch = epoch
        trainer.train_epoch()
        trainer.progress.batch = 0
    return trainer


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory, request):
    """Settings of a run of 2 epochs, and what it gives without loader processes."""
    from trainers import build_trainer, snapshot

    settings = {
        **{"train_list": data / "train_list.txt", "train_path": data / "wav", "test_list": data / "trials.txt"},
        **{"test_path": data / "wav", "save_path": tmp_path_factory.mktemp("undisturbed") / "run", "channels": 8},
        **{"model": "ECAPA_TDNN", "aggregate": 16, "n_mels": 24, "nOut": 12, "trainfunc": "aamsoftmax", "lr": 0.01},
        **{"batch_size": 4, "max_frames": 20, "max_epoch": 2, "eval_frames": 0, "threads": 1, "seed": 3},
    }
    return settings, snapshot(train(build_trainer(settings, nDataLoaderThread=0)))


def test_a_killed_loader_process_costs_nothing(undisturbed, tools, tmp_path, capsys):
    settings, expected = undisturbed
    trainer = tools.build(settings, nDataLoaderThread=2, save_path=tmp_path / "run")
    killed = []

    def kill_once(trainer):
        if not killed:
            killed.append(trainer.loader.processes()[0].pid)
            kill_loader(trainer)

    before_each_step(trainer, kill_once)
    tools.assert_same(tools.snapshot(train(trainer)), expected)
    line = next(line for line in capsys.readouterr().err.splitlines() if "loader:" in line)
    assert f"process {killed[0]} was ended by SIGKILL" in line and "out of memory? a smaller nDataLoaderThread" in line
    state = torch.load(trainer.files.model / "last.model", weights_only=True)
    ready = 2 * trainer.config.prefetch_factor  # batches that may have been prepared before, and are trained on
    assert 3 <= state["sampler_state"]["batch"] <= 3 + ready  # saved after the step that follows them


def test_a_loader_that_dies_again_ends_the_run_and_the_same_command_goes_on(undisturbed, tools, tmp_path):
    settings, expected = undisturbed
    trainer = tools.build(settings, nDataLoaderThread=2, save_path=tmp_path / "run")
    before_each_step(trainer, kill_loader)
    with pytest.raises(Finished) as end:
        train(trainer)
    (line,) = end.value.lines
    assert end.value.status == 5 and "was ended by SIGKILL" in line and "the same command goes on" in line
    again = tools.build(settings, nDataLoaderThread=0, save_path=tmp_path / "run")
    assert again.resume() and again.progress.batch == trainer.progress.step > 0
    tools.assert_same(tools.snapshot(train(again)), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_in_a_loader_process_is_named_with_its_file(undisturbed, tools, tmp_path, workers):
    trainer = tools.build(undisturbed[0], nDataLoaderThread=workers, save_path=tmp_path / "run")
    trainer.dataset.augmenter = Spoilt(divide)
    with pytest.raises(Finished) as end:
        trainer.train_epoch()
    (line,) = end.value.lines
    assert "ZeroDivisionError: division by zero" in line and "test_loader.py:" in line
    assert f"while it read {undisturbed[0]['train_path']}" in line


def test_a_hanging_loader_process_is_named_with_its_file(undisturbed, tools, tmp_path, capsys):
    keys = {"nDataLoaderThread": 2, "loader_timeout": 1, "save_path": tmp_path / "run"}
    trainer = tools.build(undisturbed[0], **keys)
    trainer.dataset.augmenter = Spoilt(hang)
    begin = time.monotonic()
    with pytest.raises(Finished) as end:
        trainer.train_epoch()
    for line in (*end.value.lines, capsys.readouterr().err):
        assert "no batch for 1 s (loader_timeout): process" in line and "does its disk answer?" in line
        assert f"has been reading {undisturbed[0]['train_path']}" in line
    assert time.monotonic() - begin < 30 and not trainer.loader.processes()


def test_an_evaluation_outlives_the_death_of_a_loader_process(undisturbed, tools, tmp_path):
    trainer = tools.build(undisturbed[0], nDataLoaderThread=2, eval_batch_size=3, save_path=tmp_path / "run")
    expected = trainer.evaluator.run(trainer.network, 1)
    killed = []

    def kill_once(*_):
        if not killed:
            killed.append(trainer.evaluator.loader.processes()[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    trainer.network.register_forward_hook(kill_once)
    assert np.array_equal(trainer.evaluator.run(trainer.network, 1)["scores"], expected["scores"])
    assert killed and trainer.evaluator.loader.restarted
    trainer.evaluator.dataset.files = None  # every batch raises
    with pytest.raises(LoaderFailed, match="TypeError"):
        trainer.evaluator.run(trainer.network, 1)


def test_batches_after_a_restart_are_those_that_are_missing(undisturbed, tools, tmp_path):
    trainer = tools.build(undisturbed[0], nDataLoaderThread=1, persistent_workers=False, save_path=tmp_path / "run")
    expected = tools.batches(trainer)
    trainer.sampler.set_position(1)
    loader = Loader(trainer.dataset, trainer.sampler, len, trainer.config, 1)
    assert list(loader) == [len(batch["label"]) for batch in expected]
    found = []
    for batch in trainer.loader:
        found.append(batch)
        if len(found) == 3:
            kill_loader(trainer)
    assert len(found) == len(expected)
    assert all(torch.equal(a["data"], b["data"]) and a["files"] == b["files"] for a, b in zip(found, expected))
