"""The training step: order, clipping, accumulation, precision, and steps that leave no trace."""

import json
import math
import shutil

import pytest
import soundfile
import torch
from recordings import read_audio

from errors import Finished, UsageError
from postmortem.analysis import analyse
from training.precision import LossScaler
from training.progress import new_totals

PRECISIONS = [("false", "auto"), ("true", "bfloat16"), ("true", "float16")]


@pytest.fixture(params=PRECISIONS, ids=["fp32", "bf16", "fp16"])
def build(request, settings, tools):
    """Build the same trainer each time it is called."""
    mixed, dtype = request.param
    return lambda: tools.build(settings, mixedprec=mixed, amp_dtype=dtype)


def poisoned(batch):
    bad = {**batch, "data": batch["data"].clone()}
    bad["data"][0, 1, 100] = math.nan
    return bad


def test_a_step_changes_weights_once_and_reports_finite_numbers(build, tools):
    trainer = build()
    before = tools.snapshot(trainer)["network"]
    attempt = trainer.train_step(tools.batches(trainer)[:1])
    assert attempt.finite and math.isfinite(attempt.loss) and attempt.norm > 0 and trainer.progress.step == 1
    steps = {float(s["step"]) for s in trainer.optimizer.state_dict()["state"].values()}
    after = tools.snapshot(trainer)["network"]
    assert steps == {1.0} and any(not torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("kind", ["data", "loss", "gradient"])
def test_a_nonfinite_step_leaves_no_trace(build, tools, kind):
    trainer = build()
    batches = tools.batches(trainer)
    trainer.train_step(batches[:1])
    before = tools.snapshot(trainer)
    window, handle = [poisoned(batches[1]) if kind == "data" else batches[1]], None
    if kind == "loss":
        handle = trainer.network.loss.register_forward_hook(lambda m, i, o: (o[0] * math.inf, o[1]))
    if kind == "gradient":
        handle = trainer.network.__S__.linear.weight.register_hook(lambda g: g * math.nan)
    assert trainer.train_step(window) is None
    if handle:
        handle.remove()
    tools.assert_same(before, tools.snapshot(trainer))
    assert trainer.progress.totals["skipped"] == 1 and trainer.progress.step == 1
    assert all(p.grad is None for p in trainer.step.parameters)
    trainer.train_step(batches[2:3])
    with_fault = tools.snapshot(trainer)
    other = build()  # the run in which that batch was never drawn
    for batch in (batches[0], batches[2]):
        other.train_step([batch])
    tools.assert_same(with_fault, tools.snapshot(other))


def test_loss_only_checks_are_not_enough(settings, tools):
    trainer = tools.build(settings)
    batches = tools.batches(trainer)
    trainer.network.__S__.linear.bias.register_hook(lambda g: g * math.inf)
    assert trainer.train_step(batches[:1]) is None
    assert all(p.isfinite().all() for p in trainer.network.parameters())


def test_fp16_overflow_is_retried_and_trained_on(settings, tools, capsys):
    trainer = tools.build(settings, mixedprec="true", amp_dtype="float16")
    trainer.step.scaler.scale = 2.0**24
    assert trainer.train_step(tools.batches(trainer)[:1]).finite
    assert trainer.step.scaler.scale < 2.0**24
    assert (trainer.progress.totals["skipped"], trainer.progress.step) == (0, 1)
    assert "skipped" not in capsys.readouterr().out


def test_retries_do_not_move_batch_norm_twice(settings, tools):
    results = []
    for scale in (2.0**24, None):
        trainer = tools.build(settings, mixedprec="true", amp_dtype="float16")
        trainer.step.scaler.scale = scale or results[0][1]
        trainer.train_step(tools.batches(trainer)[:1])
        results.append((tools.snapshot(trainer)["network"], trainer.step.scaler.scale))
    assert all(torch.equal(results[0][0][k], results[1][0][k]) for k in results[0][0])


def test_bad_data_never_reaches_the_scaler(settings, tools):
    trainer = tools.build(settings, mixedprec="true", amp_dtype="float16", nan_patience=1000)
    batches = tools.batches(trainer)
    trainer.train_step(batches[:1])
    scale = trainer.step.scaler.scale
    for _ in range(30):
        trainer.train_step([poisoned(batches[1])])
    assert trainer.step.scaler.scale == scale and trainer.train_step(batches[2:3]).finite


def test_scaler_grows_has_bounds_and_refuses_zero():
    from errors import UsageError

    scaler = LossScaler(True)
    for _ in range(LossScaler.GROWTH_INTERVAL):
        scaler.stepped(scaler.scale)
    assert scaler.scale == 2.0**17
    scaler.stepped(2.0**10)
    assert scaler.scale == 2.0**10
    scaler.scale = LossScaler.FLOOR * 2
    assert min(scaler.retries()) >= LossScaler.FLOOR
    with pytest.raises(UsageError, match=r"loss scale is 0\.0"):
        scaler.load_state_dict({"scale": 0.0, "_growth_tracker": 0})


def test_clipping_bounds_the_gradient_and_0_is_off(settings, tools):
    norms = {}
    for clip in (0.01, 0):
        trainer = tools.build(settings, grad_clip=clip, optimizer="sgd", momentum=0)
        seen = []

        def note_norm(optimizer, args, kwargs, seen=seen):
            gradients = [p.grad for p in optimizer.param_groups[0]["params"]]
            seen.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

        trainer.optimizer.register_step_pre_hook(note_norm)
        attempt = trainer.train_step(tools.batches(trainer)[:1])
        norms[clip] = (seen[0], attempt.norm)
    assert norms[0.01][0] == pytest.approx(0.01, rel=1e-4) and norms[0.01][1] > 0.02
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-5)


def test_accumulation_is_the_mean_of_its_batches_and_steps_the_tail(settings, tools):
    trainer = tools.build(settings, gradient_accumulation_steps=3, nDataLoaderThread=0)
    batches = tools.batches(trainer)
    parts = []
    for batch in batches[:2]:
        trainer.network.train()
        trainer.step.attempt([batch], 1.0)
        parts.append([p.grad.clone() for p in trainer.step.parameters])
    trainer.step.attempt(batches[:2], 1.0)
    for a, b, p in zip(*parts, trainer.step.parameters):
        assert torch.allclose((a + b) / 2, p.grad, atol=1e-5)
    count = len(trainer.sampler)
    assert count % 3 != 0
    trainer.train_epoch()
    assert trainer.progress.step == -(-count // 3)


def test_an_epoch_without_a_finite_step_is_no_division_by_zero(settings, tools):
    trainer = tools.build(settings)
    trainer.network.loss.register_forward_hook(lambda m, i, o: (o[0] * math.nan, o[1]))
    trainer.train_epoch()
    trainer.finish_epoch()
    event = json.loads(trainer.files.metrics.read_text().splitlines()[-1])
    assert event["train_loss"] is None and event["skipped_batches"] == len(trainer.sampler)


def test_skipped_batches_are_left_out_of_the_means(settings, tools):
    trainer = tools.build(settings)
    values = []
    for index, batch in enumerate(tools.batches(trainer)):
        window = [poisoned(batch)] if index == 1 else [batch]
        attempt = trainer.train_step(window)
        if attempt:
            values.append((attempt.loss, batch["data"].shape[1]))
    expected = sum(loss * n for loss, n in values) / sum(n for _, n in values)
    assert trainer.progress.means()[0] == pytest.approx(expected)


def test_nan_patience_ends_the_run_with_status_3_and_a_good_state(settings, tools):
    trainer = tools.build(settings, nan_patience=2)
    trainer.network.loss.register_forward_hook(lambda m, i, o: (o[0] * math.nan, o[1]))
    with pytest.raises(Finished) as end:
        trainer.train_epoch()
    assert end.value.status == 3 and len(end.value.lines) == 3
    state = torch.load(trainer.files.model / "last.model", weights_only=True)
    assert all(t.isfinite().all() for t in state["model_state_dict"].values())


def test_bad_weights_are_never_written_over_good_ones(settings, tools, capsys):
    trainer = tools.build(settings)
    trainer.saver.last()
    good = (trainer.files.model / "last.model").read_bytes()
    trainer.network.__S__.linear.bias.data[0] = math.nan
    trainer.saver.last()
    assert (trainer.files.model / "last.model").read_bytes() == good
    assert "last.model is not written: 1 tensors are not finite, the first model.linear.bias" in capsys.readouterr().out


def test_batches_of_one_row_are_refused_before_batch_norm_does(settings, tools):
    from errors import UsageError

    with pytest.raises(UsageError, match="batch_size: 1 leaves a process batches of one row"):
        tools.build(settings, batch_size=1)


def test_profiling_writes_a_trace_and_a_table_by_module(settings, tools):
    trainer = tools.build(
        settings, enable_profiling=True, max_seg_per_spk=500, batch_size=2, max_epoch=1, test_interval=1
    )
    trainer.run()
    assert list(trainer.files.logs.glob("*.pt.trace.json"))
    lines = (trainer.files.logs / "profile.txt").read_text().splitlines()
    assert lines[0].startswith("One step takes ") and "mean of 10 profiled steps" in lines[0]
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:]}
    assert {"model.layer2.layers", "model.frontend", "model.pool.linear2", "loss", "outside"} <= rows.keys()
    assert all(float(milliseconds) > 0 for milliseconds in rows["model.layer2.layers"][:2])  # of both passes
    assert not any(hooked._forward_pre_hooks for hooked in trainer.network.modules())


def test_margin_follows_the_epoch(settings, tools):
    trainer = tools.build(settings, margin=0.2, margin_warmup="[1, 2, linear]")
    trainer.train_epoch()
    assert 0 < trainer.network.loss.margin < 0.2
    trainer.progress.epoch, trainer.progress.batch = 2, 0
    trainer.train_epoch()
    assert trainer.network.loss.margin == 0.2


@pytest.fixture
def wav(data, tmp_path):
    """A copy of the voices that a test may spoil."""
    shutil.copytree(data / "wav", tmp_path / "wav")
    return tmp_path / "wav"


def train_files(wav):
    return sorted(wav.glob("train*/**/*.flac"))


def test_bad_files_in_a_short_list_are_named_and_replaced_until_there_are_too_many(settings, tools, wav, capsys):
    files = train_files(wav)
    victims = [files[3], files[4], files[11]]
    victims[0].write_bytes(b"")
    victims[1].write_bytes(victims[1].read_bytes()[:300])  # a header and little else
    victims[2].write_bytes(victims[2].read_bytes()[:3000])
    trainer = tools.build(settings, train_path=wav, batch_size=30)  # all of them in one batch
    trainer.train_epoch()
    trainer.finish_epoch()
    out = capsys.readouterr().out
    assert sorted(trainer.file_events.bad) == sorted(map(str, victims)) and trainer.progress.totals["utterances"] == 30
    assert all(out.count(f"unreadable: {victim}") == 1 for victim in victims)
    files[20].write_bytes(b"")
    trainer.progress.epoch, trainer.progress.batch = 2, 0
    with pytest.raises(Finished) as end:
        trainer.train_epoch()
    (line,) = end.value.lines
    listed = (trainer.files.result / "bad_files.txt").read_text().splitlines()
    assert end.value.status == 2 and str(trainer.files.result / "bad_files.txt") in line and "4 files" in line
    assert [text.split("\t")[0] for text in listed] == [str(path) for path in sorted([*victims, files[20]])]
    trainer.incidents.writer.close()
    (dump,) = trainer.incidents.writer.folder.glob("nan_*_epoch_1.pt")
    found = analyse(dump).verdict
    assert torch.load(dump, weights_only=True)["reason"] == "data_error" and found["cause"] == "input"
    assert {file["path"] for file in found["location"]["files"]} == set(map(str, victims))


def test_no_bad_file_is_allowed_with_a_limit_of_zero(settings, tools, wav):
    train_files(wav)[3].write_bytes(b"")
    with pytest.raises(Finished, match="1 file "):
        tools.build(settings, train_path=wav, max_bad_files_pct=0).train_epoch()


def test_a_file_with_nan_samples_costs_one_batch_not_one_an_epoch(settings, tools, wav, tmp_path):
    victim = train_files(wav)[3]
    x, rate = soundfile.read(victim)
    x[:] = math.nan
    soundfile.write(victim.with_suffix(".wav"), x, rate, subtype="FLOAT")
    victim.with_suffix(".wav").rename(victim)
    keys = {"train_path": wav, "nDataLoaderThread": 2, "max_epoch": 3}
    trainer = tools.build(settings, **keys)
    skipped = []
    while trainer.progress.epoch <= 3:
        trainer.train_epoch()
        skipped.append(trainer.progress.totals["skipped"])
        trainer.finish_epoch()
        trainer.progress.epoch, trainer.progress.batch, trainer.progress.trained = trainer.progress.epoch + 1, 0, False
        trainer.progress.totals = new_totals()
        trainer.saver.last()
        if trainer.progress.epoch == 2:
            shutil.copytree(trainer.files.root, tmp_path / "resumed")
    assert skipped == [1, 0, 0] and trainer.file_events.bad.keys() == {str(victim)}
    again = tools.build(settings, **{**keys, "nDataLoaderThread": 0}, save_path=tmp_path / "resumed")
    assert again.resume() and again.progress.epoch == 2
    batches = []
    again.train_step, step = lambda window: (batches.extend(window), step(window))[1], again.train_step
    for epoch in (2, 3):
        again.progress.epoch, again.progress.batch = epoch, 0
        again.train_epoch()
        again.finish_epoch()
    assert again.progress.totals["skipped"] == 0
    tools.assert_same(tools.snapshot(again), tools.snapshot(trainer))
    rows = [(b, i, info) for b in batches for i, info in enumerate(b["files"]) if "replaced" in info]
    assert len(rows) == 2 and all(info["replaced"][0]["path"] == str(victim) for *_, info in rows)
    for batch, row, info in rows:  # provenance is of the utterance that took its place
        crop, *_ = read_audio(info["path"], batch["data"].shape[-1], start=info["start"])
        assert torch.equal(batch["data"][0, row], torch.from_numpy(crop))


def test_a_run_outlives_an_epoch_in_which_no_resampled_file_is_drawn(settings, tools, wav, capsys):
    trainer = tools.build(settings, train_path=wav, max_seg_per_spk=1, max_frames=10)
    number = next(u for batch in trainer.sampler.plan(1) for row in batch for u, _ in row)
    victim, drawn = train_files(wav)[number], []
    soundfile.write(victim, soundfile.read(victim)[0][::2], 8000)
    for trainer.progress.epoch in range(1, 8):
        rows = [row for batch in trainer.sampler.plan(trainer.progress.epoch) for row in batch]
        drawn.append(any(utterance == number for row in rows for utterance, _ in row))
        trainer.progress.batch = 0
        trainer.train_epoch()
        trainer.finish_epoch()
    assert True in drawn and False in drawn[drawn.index(True) :]  # epochs with the file, and later ones without it
    assert capsys.readouterr().out.count("resampled: 1 file of 8000 Hz") == 1


def test_a_resumed_run_is_profiled_too(settings, tools):
    trainer = tools.build(settings, enable_profiling=True, batch_size=2, max_epoch=1)
    trainer.progress.step, trainer.progress.batch = 100, 4
    assert trainer.profiled_steps() == len(trainer.sampler) - 4 < 20
    assert trainer.profiled_steps() == 0


def test_skipped_steps_do_not_each_write_a_checkpoint(settings, tools):
    saver = tools.build(settings, save_interval_steps=3).saver
    assert not saver.due(0) and not saver.due(2) and saver.due(3) and saver.due(4)
    saver.last()
    saver.saved_step = 3
    assert not saver.due(3) and not saver.due(5) and saver.due(6)


@pytest.mark.parametrize(
    "scheduler, key, place",
    [("exponential", "lr_min: 0", "scheduler/exponential.py"), ("steplr", "lr_step: -1", "scheduler/steplr.py")],
)
def test_an_impossible_value_of_a_schedule_names_the_key(settings, tools, scheduler, key, place):
    from errors import UsageError

    name, value = key.split(": ")
    with pytest.raises(UsageError, match=rf"{place}.* {name}: must be") as caught:
        tools.build({**settings, "scheduler": scheduler, name: value})
    assert "math domain" not in str(caught.value)


class Returning(torch.nn.Module):
    """A loss of the wrong form."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x, label):
        return self.result(x.square().sum(dim=1))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda rows: rows.mean(), "it returns ()"),
        (lambda rows: (rows, torch.zeros(())), "it returns (4,), ()"),
        (lambda rows: (rows.mean(), 0.0, 1.0), "must return (loss, accuracy in %)"),
    ],
    ids=["no accuracy", "a loss for each row", "three values"],
)
def test_a_loss_of_the_wrong_form_is_named_with_what_it_must_return(settings, tools, result, words):
    trainer = tools.build(settings)
    trainer.network.__L__ = Returning(result)
    with pytest.raises(UsageError, match=r"loss/aamsoftmax\.py: forward must return") as caught:
        trainer.train_step(tools.batches(trainer)[:1])
    assert words in str(caught.value)


def test_a_step_reads_the_device_twice(settings, tools, monkeypatch):
    """Once for loss, norms and flags of the attempt, once for what the update made."""
    trainer, reads = tools.build(settings), []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        plain = getattr(torch.Tensor, name)

        def counted(tensor, *a, plain=plain, name=name):
            reads.append(name)
            return plain(tensor, *a)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for batch in tools.batches(trainer)[:3]:
        trainer.progress.batch += 1
        reads.clear()
        assert trainer.train_step([batch]).finite
        trainer.save_if_due()
    assert len(reads) == 2, reads
