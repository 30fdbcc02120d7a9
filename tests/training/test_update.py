"""An optimizer's update that makes something non-finite of finite gradients is seen before it counts and taken back."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from errors import Finished
from storage import checkpoint
from storage.dump import read_dump
from training.ranks import SingleProcess
from training.update import UpdateGuard

FP16 = {"mixedprec": "true", "amp_dtype": "float16"}


class Momentum(torch.optim.Optimizer):
    """Replaces its state instead of writing into it, counts in an attribute, and writes into the gradients."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "turn": 0})
        self.steps, self.log = 0, []

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        self.log.append(self.steps)
        for group in self.param_groups:
            group["turn"] += 1
            for p in group["params"]:
                p.grad.add_(p, alpha=1e-4)
                state = self.state[p]
                state["buffer"] = 0.9 * state.get("buffer", 0.0) + p.grad
                p.sub_(group["lr"] * state["buffer"])


class Outer(torch.optim.Optimizer):
    """Lookahead: slow weights that an inner optimizer's are pulled to, every second step."""

    def __init__(self, parameters, lr):
        self.inner = torch.optim.AdamW(parameters, lr=lr)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups
        self.slow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        for slow, p in zip(self.slow, self.param_groups[0]["params"]):
            slow.lerp_(p, 0.5)
            p.copy_(slow)

    def state_dict(self):
        slow = {i: {"slow": tensor} for i, tensor in enumerate(self.slow)}
        inner = {i + len(slow): entries for i, entries in self.inner.state_dict()["state"].items()}
        return {"state": {**slow, **inner}, "param_groups": self.inner.state_dict()["param_groups"]}


def with_optimizer(trainer, kind):
    if kind is not None:
        trainer.optimizer = trainer.step.optimizer = kind(trainer.step.parameters, lr=0.01)
        trainer.step.guard = UpdateGuard(trainer.optimizer, trainer.network, trainer.log, trainer.ranks)
    return trainer


HUGE = {"lr": 1e5, "weight_decay": 1e38}  # an L2 term whose square, and whose product with lr, overflows


def spoil(optimizer, args, kwargs):
    """Stands in for an optimizer that divides zero by zero."""
    with torch.no_grad():
        optimizer.param_groups[0]["params"][2].view(-1)[0] = math.nan


def train(trainer, batches, spoiled=()):
    """Feed batches; the update of those of ``spoiled`` overflows, or makes a NaN."""
    for number, batch in enumerate(batches):
        trainer.progress.batch += 1
        assert trainer.accept(batch)
        if number not in spoiled:
            trainer.train_step([batch])
            continue
        kept = dict(trainer.optimizer.param_groups[0])
        handle = None
        if type(trainer.optimizer) in (torch.optim.Adam, torch.optim.SGD):
            trainer.optimizer.param_groups[0].update(HUGE)
        else:
            handle = trainer.optimizer.register_step_post_hook(spoil)
        trainer.train_step([batch])
        if handle is not None:
            handle.remove()
        trainer.optimizer.param_groups[0].update({key: kept[key] for key in HUGE if key in kept})


@pytest.mark.parametrize("bad", [0, 2], ids=["first step", "third step"])
@pytest.mark.parametrize(
    "keys, kind",
    [
        ({"optimizer": "adam"}, None),
        ({"optimizer": "adamw", **FP16, "ema_decay": 0.9}, None),
        ({"optimizer": "sgd", "momentum": 0.9, "scheduler": "cosine"}, None),
        ({"scheduler": "steplr"}, Momentum),
        ({"scheduler": "steplr"}, Outer),
    ],
    ids=["adam", "adamw fp16 ema", "sgd cosine", "plug-in", "optimizer in an optimizer"],
)
def test_an_update_that_makes_nan_is_undone_bit_for_bit(settings, tools, tmp_path, keys, kind, bad, capsys):
    trainer = with_optimizer(tools.build(settings, **keys), kind)
    batches = tools.batches(trainer)[:4]
    train(trainer, batches, (bad,))
    trainer.close()
    other = with_optimizer(tools.build(settings, **keys, save_path=tmp_path / "other"), kind)
    train(other, [batch for number, batch in enumerate(batches) if number != bad])
    tools.assert_same(tools.snapshot(trainer), tools.snapshot(other))
    assert trainer.scheduler.state_dict()["last_epoch"] == other.scheduler.state_dict()["last_epoch"]
    assert (trainer.progress.step, trainer.progress.totals["skipped"]) == (3, 1) and len(trainer.incidents.history) == 3
    for name, tensor in trainer.average.tensors.items():
        assert torch.equal(tensor, other.average.tensors[name])
    if kind is Momentum:
        assert trainer.optimizer.steps == 3 and trainer.optimizer.log == [1, 2, 3]
        assert trainer.optimizer.param_groups[0]["turn"] == 3
    out = capsys.readouterr().out
    assert "Reason: state_nonfinite: the optimizer's update made '" in out and "from finite gradients" in out
    assert "Training goes on; weights, buffers and optimizer are as before this batch." in out


def test_the_dump_of_an_update_has_the_state_before_it(settings, tools):
    trainer = tools.build(settings, optimizer="adam")
    batches = tools.batches(trainer)[:2]
    train(trainer, batches[:1])
    before = tools.snapshot(trainer)
    train(trainer, batches[1:2], (0,))
    trainer.close()
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    dump = read_dump(path)
    state = torch.load(path.parent / dump["state"], weights_only=True)
    assert all(torch.equal(before["network"][n], t) for n, t in state["model_state_dict"].items())
    moments = checkpoint.optimizer_tensors(state["optimizer_state_dict"])
    assert all(torch.equal(before["optimizer"][i, k], moments[f"optimizer.{i}.{k}"]) for i, k in before["optimizer"])
    assert state["optimizer_state_dict"]["param_groups"][0]["lr"] == dump["lr"] == HUGE["lr"]
    assert dump["reason"] == "state_nonfinite" and dump["update_stats"] and dump["grad_stats"]
    assert all(stats["nan"] + stats["inf"] for stats in dump["update_stats"].values())
    assert not any(stats["nan"] or stats["inf"] for stats in dump["grad_stats"].values())


def test_a_moment_that_is_spoiled_alone_is_seen_too(settings, tools, capsys):
    trainer = tools.build(settings, optimizer="adam")
    batches = tools.batches(trainer)
    train(trainer, batches[:1])
    before = tools.snapshot(trainer)

    def overflow(optimizer, args, kwargs):
        optimizer.state[trainer.step.parameters[3]]["exp_avg_sq"].view(-1)[0] = math.inf

    handle = trainer.optimizer.register_step_post_hook(overflow)
    train(trainer, batches[1:2])
    handle.remove()
    tools.assert_same(before, tools.snapshot(trainer))
    assert "update made 'optimizer.3.exp_avg_sq' non-finite (0 NaN, 1 Inf of" in capsys.readouterr().out


def test_weights_whose_squares_overflow_are_finite_all_the_same(settings, tools):
    trainer = tools.build(settings, optimizer="sgd", scheduler="steplr")
    batches = tools.batches(trainer)
    trainer.network.register_parameter("unused", torch.nn.Parameter(torch.full((3,), 1e30)))
    trainer.optimizer.add_param_group({"params": [trainer.network.unused]})
    trainer.step.guard = UpdateGuard(trainer.optimizer, trainer.network, trainer.log, trainer.ranks)
    train(trainer, batches[:2])
    assert trainer.progress.step == 2 and not trainer.incidents.seen


def test_without_memory_for_a_copy_a_spoilt_run_stops_at_once(settings, tools, monkeypatch, capsys):
    trainer = tools.build(settings, optimizer="adam")
    monkeypatch.setattr(UpdateGuard, "fits", lambda self: False)
    batches = tools.batches(trainer)
    train(trainer, batches[:2])
    assert capsys.readouterr().out.count("no memory for a copy of weights and moments (") == 1
    trainer.saver.last()
    saved = (trainer.files.model / "last.model").read_bytes()
    with pytest.raises(Finished) as end:
        train(trainer, batches[2:3], (0,))
    trainer.close()
    head, where, advice = end.value.lines
    assert end.value.status == 3 and "the weights are spoilt" in head
    assert where == f"the state of step 2 is in {trainer.files.model / 'last.model'}"
    assert "another lr, weight_decay or eps, or another optimizer than adam" in advice
    assert (trainer.files.model / "last.model").read_bytes() == saved
    assert "The update could not be taken back: the weights are spoilt, and the run ends." in capsys.readouterr().out
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert read_dump(path)["state"] == "" and read_dump(path)["update_stats"]


def test_an_optimizer_that_spoils_every_step_does_not_end_as_a_success(settings, tools):
    trainer = tools.build(settings, optimizer="adam", eps=0, nan_patience=1000)
    trainer.network.__S__.linear.bias.register_hook(lambda gradient: gradient * 0)  # zero over the root of zero
    with pytest.raises(Finished) as end:
        trainer.run()
    trainer.close()
    assert end.value.status == 3 and end.value.lines[0].startswith("epoch 1 had no finite step: 8 batches left")
    assert "update made '" in end.value.lines[0] and "or another optimizer than adam" in end.value.lines[2]
    assert all(bool(p.isfinite().all()) for p in trainer.network.parameters()) and trainer.progress.step == 0
    assert not list(trainer.files.model.glob("model*"))


def test_a_resumed_run_updates_as_its_configuration_says(settings, tools):
    trainer = tools.build(settings)
    trainer.train_step(tools.batches(trainer)[:1])
    trainer.saver.last()
    again = tools.build(settings, fused=False)
    assert again.resume()
    assert [group["fused"] for group in again.optimizer.param_groups] == [False]
    assert again.train_step(tools.batches(again)[1:2]).finite


def test_a_complex_learning_rate_is_a_fault_with_a_dump(settings, tools):
    """(1 - step / steps) ** 0.9 is a complex number beyond the last step."""
    trainer = tools.build(settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, lambda step: (1 - step / 2) ** 0.9)
    trainer.scheduler = trainer.state.scheduler = schedule
    trainer.scheduler_unit = "iteration"
    batches = tools.batches(trainer)[:4]
    for number, batch in enumerate(batches):
        trainer.progress.batch += 1
        assert (trainer.train_step([batch]) is None) == (number == 3)
    trainer.saver.last()
    trainer.close()
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    dump = read_dump(path)
    assert dump["reason"] == "state_nonfinite" and math.isnan(dump["lr"])
    assert math.isnan(checkpoint.load(trainer.files.model / "last.model")["scheduler_state_dict"]["_last_lr"][0])


def guard_of_a_gpu(monkeypatch, ranks, peak):
    """A guard of 40 bytes of weights on a GPU of 100 bytes, of which steps have taken ``peak[0]`` at most."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 40))
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.empty(10, device="cuda"))  # torch 2.4 fills no layer without a GPU
    return UpdateGuard(torch.optim.SGD(layer.parameters(), lr=0.1), layer, print, ranks)


@pytest.mark.parametrize("peak, keeps", [(90, True), (96, False)])
def test_a_copy_that_was_there_at_the_highest_point_has_room_again_after_an_evaluation(monkeypatch, peak, keeps):
    taken = [40]
    with FakeTensorMode():
        guard = guard_of_a_gpu(monkeypatch, SingleProcess(torch.device("cpu")), taken)
        guard.take()
        assert guard.keeps
        taken[0] = peak
        guard.release()
        guard.take()
        assert guard.keeps is keeps


def test_what_an_evaluation_takes_of_a_gpu_is_not_what_steps_need(monkeypatch):
    taken = [40]
    with FakeTensorMode():
        guard = guard_of_a_gpu(monkeypatch, SingleProcess(torch.device("cpu")), taken)
        for peak in (90, 94, 99):
            guard.take()
            assert guard.keeps
            taken[0] = min(peak, 90)  # of the steps
            guard.release()
            taken[0] = peak + 5  # of an evaluation after them


def test_no_process_keeps_copies_if_one_has_no_memory_for_them(monkeypatch):
    ranks = SimpleNamespace(any=lambda flag: True)
    with FakeTensorMode():
        guard = guard_of_a_gpu(monkeypatch, ranks, [40])
        assert guard.fits()
        guard.take()
        assert not guard.keeps and not guard.copies and not guard.undo()
