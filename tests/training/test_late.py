"""Steps that are checked while the next one computes: the same run, bit for bit, and no read of the device."""

import json

import pytest
import torch

from benchmarks.device_reads import Reads
from errors import Finished
from storage.dump import read_dump
from training.late import Reading
from training.update import UpdateGuard

EVERYTHING = {
    **{"spec_augment": "[4, 4]", "scheduler": "onecycle", "ema_decay": 0.9, "margin_warmup": "[0, 2, linear]"},
    **{"grad_clip": 0.5, "log_interval": 2, "seed": 5},
}
TIMES = ("utt_per_s", "data_wait_pct", "time", "seconds")


def lines_of(trainer):
    found = [json.loads(line) for line in trainer.files.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def run_epochs(tools, settings, name, epochs=2, **overrides):
    trainer = tools.build({**settings, **EVERYTHING}, save_path=f"{settings['save_path']}_{name}", **overrides)
    for epoch in range(1, epochs + 1):
        trainer.progress.begin_epoch(epoch)
        trainer.train_epoch()
        trainer.finish_epoch()
    trainer.incidents.writer.close()
    return trainer


@pytest.mark.parametrize("spoilt", ["", "2:loss,3:grad,5:buffer,6:update,7:data,8:label,9:update,10:loss,14:grad"])
def test_a_run_that_is_checked_late_is_the_run_that_is_checked_at_once(settings, tools, spoilt):
    late, now = (run_epochs(tools, settings, check, nan_check=check, nan_inject=spoilt) for check in ("late", "now"))
    assert late.late.spare and not now.late.spare
    tools.assert_same(tools.snapshot(late), tools.snapshot(now))
    for name, tensor in now.average.tensors.items():
        assert torch.equal(late.average.tensors[name], tensor), name
    assert lines_of(late) == lines_of(now)
    assert list(late.incidents.history) == list(now.incidents.history)
    dumps = [sorted((trainer.incidents.writer.folder).glob("nan_*.pt")) for trainer in (late, now)]
    assert [p.name for p in dumps[0]] == [p.name for p in dumps[1]] and len(dumps[0]) == (7 if spoilt else 0)
    for one, other in zip(*dumps):
        one, other = read_dump(one), read_dump(other)
        assert (one["reason"], one["state"], one["step"]) == (other["reason"], other["state"], other["step"])
        assert torch.equal(one["rng_state"]["torch"], other["rng_state"]["torch"])


@pytest.mark.parametrize("keys, draws", [({}, 0), ({"trainfunc": "aamsoftmax", "class_sample_rate": 0.5}, 1)])
def test_a_step_that_is_checked_late_asks_the_device_for_nothing(settings, tools, keys, draws):
    """``draws``: how many classes were drawn, which is asked of the host, the device of this test."""
    reads = {}
    for check in ("late", "now"):
        path = f"{settings['save_path']}_{check}"
        trainer = tools.build(settings, nan_check=check, optimizer="sgd", save_path=path, **keys)
        trainer.network.train()
        batches = tools.batches(trainer)[:3]
        for batch in batches:  # the first makes the optimizer's state
            trainer.progress.batch += 1
            assert trainer.accept(batch)
            with Reads("cpu").awaiting(trainer.late) as counted:
                trainer.train_step([batch])
                trainer.save_if_due()
        reads[check] = counted.count
    assert reads == {"late": draws, "now": 2 + draws}


def fed(tools, settings, check, count=4, before=None, **overrides):
    """A trainer that was fed the first batches of an epoch; ``before(trainer)`` is called first."""
    path = f"{settings['save_path']}_{check}"
    trainer = tools.build({**settings, **EVERYTHING, "log_interval": 0}, save_path=path, nan_check=check, **overrides)
    trainer.network.train()
    if before is not None:
        before(trainer)
    ended = None
    try:
        for batch in tools.batches(trainer)[:count]:
            trainer.progress.batch += 1
            if trainer.accept(batch):
                trainer.train_step([batch])
                trainer.save_if_due()
        trainer.settle()
    except (Finished, LookupError) as error:
        ended = str(error) or repr(error)
    trainer.incidents.writer.close()
    trainer.saver.close()  # a save inside an epoch is written beside the training
    return trainer, ended


def assert_same_files(trainers):
    """Assert that two trainers have written the same last.model, but for its name and times."""
    one, other = (torch.load(t.files.model / "last.model", weights_only=True) for t in trainers)
    for part in ("model_state_dict", "ema_state_dict"):
        for name, tensor in other[part].items():
            assert not torch.is_tensor(tensor) or torch.equal(one[part][name], tensor), name
    assert one["optimizer_state_dict"]["param_groups"] == other["optimizer_state_dict"]["param_groups"]
    for part in ("sampler_state", "step", "best", "nonfinite_in_a_row", "first_loss", "scheduler_state_dict"):
        assert one[part] == other[part], part
    assert torch.equal(one["rng_state"][0]["torch"], other["rng_state"][0]["torch"])


def test_a_run_that_ends_after_bad_steps_in_a_row_leaves_the_same_state(settings, tools):
    injected = {"nan_inject": "2:loss,3:grad", "nan_patience": 2}
    (late, one), (now, other) = (fed(tools, settings, check, **injected) for check in ("late", "now"))
    assert one.replace("_late", "_now") == other
    assert_same_files((late, now))


def test_a_save_inside_an_epoch_waits_for_the_step_that_is_on_its_way(settings, tools):
    injected = {"nan_inject": "1:loss", "save_interval_steps": 2, "count": 3}
    late, now = (fed(tools, settings, check, **injected)[0] for check in ("late", "now"))
    assert_same_files((late, now))
    state = torch.load(late.files.model / "last.model", weights_only=True)
    assert (state["step"], state["sampler_state"]["batch"]) == (2, 3)


def raises(trainer):
    forward, calls = trainer.network.__S__.forward, []

    def third_fails(data):
        calls.append(1)
        if len(calls) == 3:
            raise LookupError("a plug-in")
        return forward(data)

    trainer.network.__S__.forward = third_fails


def test_an_exception_leaves_the_state_before_its_step(settings, tools):
    (late, one), (now, other) = (fed(tools, settings, check, before=raises) for check in ("late", "now"))
    assert one == other == "a plug-in"
    assert_same_files((late, now))


def spiked(trainer):
    trainer.incidents.history.extend({"step": 0, "loss": 0.5, "grad_norm": 2.0 + n % 7} for n in range(150))


def test_a_spike_is_told_with_the_state_before_it(settings, tools):
    late, now = (fed(tools, settings, c, before=spiked, nan_dump_spikes=True)[0] for c in ("late", "now"))
    tools.assert_same(tools.snapshot(late), tools.snapshot(now))
    assert lines_of(late) == lines_of(now) and any(line["event"] == "spike" for line in lines_of(now))
    dumps = [sorted(t.incidents.writer.folder.glob("spike_*.pt")) for t in (late, now)]
    assert len(dumps[0]) == len(dumps[1]) == 3
    for one, other in zip(*dumps):
        one, other = read_dump(one), read_dump(other)
        assert one["state"] == other["state"] and torch.equal(one["rng_state"]["torch"], other["rng_state"]["torch"])


def fails_once(trainer):
    passes, calls = trainer.step.forward_backward, []

    def flipped(window, *arguments, **more):
        results = passes(window, *arguments, **more)
        calls.append(1)
        if len(calls) == 2:
            trainer.step.gradients()[0].view(-1)[0] = torch.nan
        return results

    trainer.step.forward_backward = flipped


def test_a_transient_fault_is_told_and_the_step_taken(settings, tools):
    (late, _), (now, _) = (fed(tools, settings, c, before=fails_once) for c in ("late", "now"))
    tools.assert_same(tools.snapshot(late), tools.snapshot(now))
    for trainer in (late, now):
        (dump,) = trainer.incidents.writer.folder.glob("nan_*.pt")
        dump = read_dump(dump)
        assert dump["reason"] == "grad_nonfinite" and dump["recheck"]["finite"] and trainer.progress.step == 4


def test_a_schedule_that_gives_a_bad_rate_is_refused_before_the_update(settings, tools):
    def spoil_the_rate(trainer):
        step = trainer.scheduler.step

        def third():
            step()
            if trainer.progress.step == 1:
                trainer.optimizer.param_groups[0]["lr"] = float("nan")

        trainer.scheduler.step = third

    late, now = (fed(tools, settings, c, before=spoil_the_rate)[0] for c in ("late", "now"))
    assert late.progress.step == now.progress.step == 2
    assert lines_of(late) == lines_of(now)


def test_without_memory_for_a_second_copy_steps_are_waited_for_and_none_is_lost(settings, tools, monkeypatch, capsys):
    def one_copy(trainer):
        first = trainer.step.guard
        monkeypatch.setattr(UpdateGuard, "fits", lambda self: self is first)

    keys = {"nan_inject": "2:loss,4:update", "count": 6, "before": one_copy}
    (late, _), (now, _) = (fed(tools, settings, check, **keys) for check in ("late", "now"))
    tools.assert_same(tools.snapshot(late), tools.snapshot(now))
    assert late.progress.step == now.progress.step == 4 and not late.late.possible and late.step.guard.keeps
    assert "each step is checked before the next begins (nan_check: now)" in capsys.readouterr().out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_numbers_from_a_gpu_come_through_page_locked_memory():
    reading = Reading(torch.arange(3.0, device="cuda"))
    assert reading.arrived is not None and reading.wait() == [0.0, 1.0, 2.0]
