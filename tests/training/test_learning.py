"""A run goes on from the right place, and one that learns nothing does not end as a success."""

import math
import re
import signal

import pytest
import torch

from errors import Finished
from SpeakerNet import Interrupted, ModelTrainer
from storage import checkpoint
from storage.files import save_atomically


def all_batches(trainer):
    """Wrap ``train_step`` and note the files of every batch that is trained on."""
    seen, step = [], trainer.train_step

    def noting(window):
        seen.append([tuple(info["utterance"] for info in batch["files"]) for batch in window])
        return step(window)

    trainer.train_step = noting
    return seen


def end_state(trainer):
    """What two runs that are the same must share; the two timings are none of it."""
    state = checkpoint.load(trainer.files.model / "last.model")
    tensors = {**state["model_state_dict"], **checkpoint.optimizer_tensors(state["optimizer_state_dict"])}
    totals = {k: v for k, v in state["totals"].items() if k not in ("seconds", "waited")}
    rest = {k: state[k] for k in ("step", "epoch", "sampler_state", "scheduler_state_dict", "nonfinite_in_a_row")}
    return tensors, {**rest, "totals": totals, "rng": state["rng_state"][0]["torch"].tolist()}


def interrupted(trainer, at: int):
    """Train, and get SIGTERM while batch ``at`` of epoch 1 is drawn."""
    accept = trainer.accept

    def accepting(batch):
        if trainer.progress.batch == at:
            trainer.stop_signal.number = signal.SIGTERM
        return accept(batch)

    trainer.accept = accepting
    with pytest.raises(Interrupted):
        trainer.run()


@pytest.fixture
def build(settings, tools, monkeypatch):
    """Build a trainer whose evaluations do nothing, for they take most of the time of a small run."""
    monkeypatch.setattr(ModelTrainer, "evaluate", lambda self: None)
    return lambda **keys: tools.build(settings, **keys)


@pytest.mark.parametrize("bad, at", [(2, 2), (2, 3), (1, 2), (8, 8)])
def test_a_signal_inside_a_window_with_a_refused_batch_trains_every_batch_once(build, tmp_path, bad, at):
    keys = {"gradient_accumulation_steps": 3, "max_epoch": 1, "margin_warmup": "[0, 1, linear]"}

    def start(run):
        trainer = build(**keys, save_path=tmp_path / run)
        accept = trainer.accept

        def with_a_bad_batch(batch):
            if trainer.progress.batch == bad:
                batch = {**batch, "peak": torch.full_like(batch["peak"], math.nan)}
            return accept(batch)

        trainer.accept = with_a_bad_batch
        return trainer, all_batches(trainer)

    whole, expected = start("whole")
    whole.run()
    first, seen = start("run")
    interrupted(first, at)
    first.close()
    second, rest = start("run")
    assert second.resume()
    second.run()
    assert seen + rest == expected
    (weights, facts), (other, other_facts) = end_state(whole), end_state(second)
    assert facts == other_facts and facts["totals"]["skipped"] == 0  # of epoch 2, which has not begun
    assert weights.keys() == other.keys() and all(torch.equal(weights[n], other[n]) for n in weights)
    timeless = [
        re.sub(r'"(utt_per_s|data_wait_pct)": [^,}]+', "", t.files.metrics.read_text()) for t in (whole, second)
    ]
    assert timeless[0] == timeless[1] and '"skipped_batches": 1' in timeless[0]


def stopped_in_epoch_2(build, **keys):
    """A run of 4 epochs that stopped half-way through epoch 2; returns its trainer."""
    trainer = build(max_epoch=4, **keys)
    trainer.train_epoch()
    trainer.finish_epoch()
    trainer.progress.begin_epoch(2)
    stop, step = len(trainer.sampler) // 2, trainer.train_step

    def until(window):
        step(window)
        if trainer.progress.batch == stop:
            trainer.stop_signal.number = signal.SIGTERM

    trainer.train_step = until
    with pytest.raises(Interrupted):
        trainer.train_epoch()
    return trainer


def one_line_on(out, words):
    (line,) = [text for text in out.splitlines() if words in text]
    return line


@pytest.mark.parametrize("change", [{"max_seg_per_spk": 3}, {"nPerSpeaker": 1, "seed": 4}])
def test_a_resumed_run_says_that_its_rows_are_others_and_goes_on_at_the_same_share(build, capsys, change):
    keys = {"scheduler": "cosine", "lr": 0.01}
    before = stopped_in_epoch_2(build, **keys)
    share = before.progress.batch / len(before.sampler)
    capsys.readouterr()
    again = build(max_epoch=4, **keys, **change)
    assert again.resume()
    key, value = list(change.items())[-1]
    line = one_line_on(capsys.readouterr().out, "the batches are not those of the run before")
    assert f"{key} {getattr(before.config, key)} before, {value} now" in line and "some rows come twice" in line
    assert ("the schedule stands at the same share" in line) == (len(again.sampler) != len(before.sampler))
    assert again.progress.epoch == 2 and again.progress.batch == int(share * len(again.sampler))
    rate = again.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(before.optimizer.param_groups[0]["lr"], rel=0.1)
    again.run()
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-4)


def rows_of(trainer):
    """All rows of the batches that are left of the epoch at hand."""
    progress = trainer.progress
    trainer.sampler.set_position(progress.epoch, progress.batch, progress.dealt)
    return [row for batch in trainer.sampler for _, row in batch]


def test_under_another_size_of_batches_each_row_that_is_left_is_trained_once(build, capsys):
    before = stopped_in_epoch_2(build, scheduler="cosine", lr=0.01)
    left = rows_of(before)
    assert 0 < len(left) < before.sampler.rows
    for size, accumulation in ((2, 1), (2, 2), (8, 1)):
        capsys.readouterr()
        again = build(
            max_epoch=4, scheduler="cosine", lr=0.01, batch_size=size, gradient_accumulation_steps=accumulation
        )
        assert again.resume()
        out = capsys.readouterr().out
        assert sorted(rows_of(again)) == sorted(left) and again.progress.batches == len(again.sampler)
        if (size, accumulation) == (2, 2):
            assert "the rows of each batch are those of the run before, divided in another way" in out
        else:
            assert "the rows that are left of epoch 2 are trained once each" in one_line_on(out, "and not bit-equal")
        again.train_step(list(again.loader)[: again.progress.accumulation])
        again.progress.batch += again.progress.accumulation
        again.saver.last()
        left = rows_of(again)
        assert left
    again.run()
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-4)


def test_another_number_of_processes_is_said(build, capsys):
    before = stopped_in_epoch_2(build)
    path = before.files.model / "last.model"
    state = checkpoint.load(path)
    state["rng_state"] *= 2
    state["sampler_state"] = {k: state["sampler_state"][k] for k in ("epoch", "batch", "trained")}  # as older ones are
    save_atomically(state, path)
    again = build(max_epoch=4)
    assert again.resume()
    assert "(processes 2 before, 1 now)" in capsys.readouterr().out
    # A batch of one process is half of one of two.
    assert again.progress.epoch == 2 and again.progress.batch >= before.progress.batch


def test_a_checkpoint_without_a_plan_resumes_at_the_very_batch(build, capsys):
    before = stopped_in_epoch_2(build)
    path = before.files.model / "last.model"
    state = checkpoint.load(path)
    state["sampler_state"] = {k: state["sampler_state"][k] for k in ("epoch", "batch", "trained")}
    save_atomically(state, path)
    again = build(max_epoch=4)
    assert again.resume() and (again.progress.epoch, again.progress.batch) == (2, before.progress.batch)
    assert "not those of the run before" not in capsys.readouterr().out
    assert again.scheduler.state_dict()["last_epoch"] == before.scheduler.state_dict()["last_epoch"]


def test_a_run_that_learns_nothing_does_not_end_as_a_success(build, tmp_path):
    trainer = build(nan_patience=1000)
    trainer.network.loss.register_forward_hook(lambda m, i, o: (o[0] * math.nan, o[1]))
    with pytest.raises(Finished) as end:
        trainer.run()
    trainer.close()
    lines = end.value.lines
    assert end.value.status == 3 and lines[0].startswith("epoch 1 had no finite step: 8 batches left out")
    assert "loss is nan" in lines[0] and str(trainer.files.model / "last.model") in lines[1]
    assert f"python analyze_nan_debug.py {trainer.incidents.writer.folder}" in lines[2]
    assert [p.name for p in trainer.files.model.iterdir()] == ["last.model"]
    mended = build(nan_patience=1000)
    assert mended.resume() and (mended.progress.epoch, mended.progress.batch) == (1, 0)
    mended.run()
    fresh = build(save_path=tmp_path / "fresh")
    fresh.run()
    assert all(torch.equal(a, b) for a, b in zip(mended.network.parameters(), fresh.network.parameters()))


def test_a_rate_that_is_nan_makes_no_best_model(build):
    trainer = build(nan_patience=1000)
    trainer.optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(Finished) as end:
        trainer.run()
    assert end.value.status == 3 and "the optimizer's lr is nan" in end.value.lines[0]
    assert "cosine" in end.value.lines[2] and not list(trainer.files.model.glob("model*"))


def test_weights_that_no_step_has_trained_are_never_the_best(settings, tools):
    trainer = tools.build(settings)
    trainer.evaluate()
    assert trainer.progress.best["eer"] is None and not list(trainer.files.model.glob("model_best*"))


def test_a_run_whose_every_evaluation_failed_does_not_end_as_a_success(settings, tools, monkeypatch, capsys):
    import trainSpeakerNet
    from training.evaluation import Evaluator

    embed = Evaluator.embed
    monkeypatch.setattr(Evaluator, "embed", lambda *a: (embed(*a)[0] * math.nan, {}))
    words = [f"--{key}={value}" for key, value in {**settings, "max_epoch": 1, "device": "cpu"}.items()]
    assert trainSpeakerNet.main(words) == 1
    error = capsys.readouterr().err
    assert "no evaluation of this run gave an EER" in error and "--eval --initial_model" in error
    assert trainSpeakerNet.main(words) == 1  # the same command again, with nothing left to train
