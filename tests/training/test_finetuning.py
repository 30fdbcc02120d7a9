"""Starting from trained weights: heads of other classes, a frozen backbone, learning rates by part and by batch."""

import math

import programs
import pytest
import torch

from errors import UsageError
from training.finetuning import load_initial

FAST = {"max_seg_per_spk": 2, "max_frames": 30}


def run(trainer):
    """Train to the end without an evaluation."""
    while trainer.progress.epoch <= trainer.config.max_epoch:
        trainer.train_epoch()
        trainer.finish_epoch()
        trainer.progress.epoch, trainer.progress.batch, trainer.progress.trained = trainer.progress.epoch + 1, 0, False
    return trainer


def part(trainer, prefix):
    return {n: t.clone() for n, t in trainer.network.state_dict().items() if n.startswith(prefix)}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# ------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("keys", [{}, {"sub_centers": 2}, {"trainfunc": "softmax"}])
def test_a_head_of_speed_copies_is_cut_to_the_original_speakers(settings, tools, tmp_path, capsys, keys):
    first = tools.build(settings, speed_perturb=True, **keys)
    first.saver.last()
    path = first.files.model / "last.model"
    tuned = tools.build(settings, save_path=tmp_path / "tuned", initial_model=path, seed=8, **keys)
    load_initial(tuned.network, tuned.dataset, tuned.config, tuned.log)
    assert "the classifier is cut to the original speakers: the first 6 of 18 classes" in capsys.readouterr().out
    head = part(first, "__L__.")
    for name, tensor in part(tuned, "__L__.").items():
        rows = len(head[name]) // 3
        assert len(tensor) == rows and torch.equal(tensor, head[name][:rows]), name
    again = tools.build(settings, save_path=tmp_path / "more", initial_model=path, seed=8, nClasses=9, **keys)
    fresh = part(again, "__L__.")
    load_initial(again.network, again.dataset, again.config, again.log)
    assert "the classifier starts fresh: 18 classes before, 9 now" in capsys.readouterr().out
    assert not changed(fresh, part(again, "__L__."))


def test_a_head_of_another_form_is_not_said_to_be_cut(settings, tools, tmp_path, capsys):
    first = tools.build(settings, speed_perturb=True, sub_centers=2)
    first.saver.last()
    path = first.files.model / "last.model"
    tuned = tools.build(settings, save_path=tmp_path / "tuned", initial_model=path, seed=8, trainfunc="sphereface2")
    fresh = part(tuned, "__L__.")
    load_initial(tuned.network, tuned.dataset, tuned.config, tuned.log)
    said = capsys.readouterr().out
    assert "the classifier starts fresh: 18 classes before, 6 now" in said and "is cut" not in said
    assert not changed(fresh, part(tuned, "__L__."))


def test_a_head_that_fits_is_not_said_to_start_fresh(settings, tools, tmp_path, capsys):
    """Sub-centres: a file without a configuration has three rows a class, and as many classes as this run."""
    first = tools.build(settings, sub_centers=3)
    path = tmp_path / "bare.model"
    torch.save(first.network.state_dict(), path)
    tuned = tools.build(settings, save_path=tmp_path / "tuned", initial_model=path, seed=8, sub_centers=3)
    load_initial(tuned.network, tuned.dataset, tuned.config, tuned.log)
    assert not changed(part(first, "__L__."), part(tuned, "__L__."))
    assert "starts fresh" not in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- the backbone


def test_a_frozen_backbone_keeps_weights_and_statistics_and_trains_afterwards(settings, tools, capsys):
    trainer = tools.build(settings, **FAST, freeze_epochs=1, optimizer="adamw", weight_decay=0.1)
    backbone, head = part(trainer, "__S__."), part(trainer, "__L__.")
    trainer.config.max_epoch = 1
    run(trainer)
    assert not changed(backbone, part(trainer, "__S__.")) and changed(head, part(trainer, "__L__."))
    assert all(len(s) for s in trainer.optimizer.state_dict()["state"].values())
    assert len(trainer.optimizer.state_dict()["state"]) == 1  # no moments of what is frozen
    assert "the backbone is frozen to the end of epoch 1 (freeze_epochs)" in capsys.readouterr().out
    trainer.config.max_epoch = 2
    run(trainer)
    assert "the backbone trains from epoch 2 on" in capsys.readouterr().out
    moved = changed(backbone, part(trainer, "__S__."))
    assert any(name.endswith("running_mean") for name in moved) and "__S__.linear.weight" in moved


@pytest.mark.parametrize("check", ["now", "late"])
def test_a_fused_update_takes_in_a_backbone_that_was_frozen(settings, tools, tmp_path, check):
    keys = {**FAST, "freeze_epochs": 1, "optimizer": "sgd", "max_epoch": 2, "nan_check": check}
    fused, plain = (run(tools.build(settings, save_path=tmp_path / f"{f}", fused=f, **keys)) for f in (True, False))
    for name, tensor in plain.network.state_dict().items():
        assert torch.allclose(fused.network.state_dict()[name], tensor, atol=1e-5), name
    assert len(fused.optimizer.state_dict()["state"]) == len(plain.optimizer.state_dict()["state"]) > 1


def test_frozen_norms_keep_their_statistics_while_the_weights_train(settings, tools):
    trainer = tools.build(settings, **FAST, freeze_norms=True, max_epoch=1)
    backbone = part(trainer, "__S__.")
    run(trainer)
    moved = changed(backbone, part(trainer, "__S__."))
    assert "__S__.linear.weight" in moved and not any("running" in name or "tracked" in name for name in moved)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resuming_in_or_after_the_frozen_epochs_changes_nothing(settings, tools, tmp_path, stop):
    keys = {**FAST, "freeze_epochs": 2, "max_epoch": 4, "backbone_lr_factor": 0.1, "ema_decay": 0.9}
    whole = run(tools.build(settings, save_path=tmp_path / "whole", **keys))
    trainer = tools.build(settings, **keys)
    trainer.config.max_epoch = stop
    run(trainer).saver.last()
    again = tools.build(settings, **keys)
    assert again.resume()
    run(again)
    tools.assert_same(tools.snapshot(whole), tools.snapshot(again))
    for name, tensor in whole.average.tensors.items():
        assert torch.equal(tensor, again.average.tensors[name])


def test_freezing_needs_a_loss_with_weights(settings, tools):
    with pytest.raises(UsageError, match="freeze_epochs: the loss has no weights of its own"):
        tools.build(settings, trainfunc="proto", nPerSpeaker=2, freeze_epochs=1)


@pytest.mark.parametrize("keys", [{"freeze_epochs": 1}, {"freeze_norms": True}])
def test_a_fault_of_a_frozen_step_is_replayed(settings, tools, keys):
    from postmortem.replay import Replay
    from storage.dump import read_dump

    trainer = tools.build(settings, **FAST, **keys, max_epoch=1, nan_inject="2:grad")
    run(trainer).close()
    (path,) = trainer.incidents.writer.folder.glob("nan_batch_*.pt")
    dump = read_dump(path)
    assert len(dump["trainable"]) == len(trainer.step.parameters)
    state = torch.load(path.parent / dump["state"], weights_only=True)
    network = Replay(dump, state).network()
    trains = "freeze_norms" in keys
    assert {p.requires_grad for p in network.__S__.parameters()} == {trains} and network.loss.weight.requires_grad
    assert {m.training for m in network.__S__.modules() if hasattr(m, "running_mean")} == {False}


# ----------------------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize("scheduler", ["cosine", "exponential", "onecycle", "steplr", "triangular2"])
def test_groups_keep_their_ratio_through_every_schedule(settings, tools, scheduler):
    keys = {"backbone_lr_factor": 0.1, "head_lr_factor": 2.0, "scheduler": scheduler, "optimizer": "sgd"}
    trainer = tools.build(settings, **keys)
    groups = trainer.optimizer.param_groups
    assert [g["name"] for g in groups] == ["backbone", "head"]
    assert sum(len(g["params"]) for g in groups) == len(trainer.step.parameters)
    for _ in range(6):
        trainer.optimizer.step()
        trainer.scheduler.step()
        assert groups[1]["lr"] == pytest.approx(20 * groups[0]["lr"], rel=1e-9) and groups[1]["lr"] > 0


def test_the_preflight_walks_the_highest_rate(settings, tools):
    from preflight.dry_step import learning_rates

    for scheduler in ("cosine", "steplr"):
        t = tools.build(settings, scheduler=scheduler, backbone_lr_factor=0.1, head_lr_factor=2.0)
        schedule = (t.optimizer, t.scheduler, t.scheduler_unit, t.progress, t.config)
        assert max(rate for _, rate in learning_rates(*schedule)) == pytest.approx(0.02)


def test_a_step_moves_each_part_by_its_own_rate(settings, tools):
    keys = {"optimizer": "sgd", "momentum": 0, "scheduler": "steplr", "grad_clip": 0}
    moves = []
    for factor in (1.0, 0.25):
        trainer = tools.build(settings, **keys, backbone_lr_factor=factor)
        before = trainer.network.__S__.linear.weight.detach().clone(), trainer.network.loss.weight.detach().clone()
        trainer.train_step(tools.batches(trainer)[:1])
        after = trainer.network.__S__.linear.weight.detach(), trainer.network.loss.weight.detach()
        moves.append([b - a for a, b in zip(before, after)])
    assert torch.allclose(moves[1][0], 0.25 * moves[0][0], rtol=1e-3, atol=1e-6)
    assert torch.equal(moves[1][1], moves[0][1])


def test_a_plain_list_where_no_factor_is_set_and_groups_are_refused_half_way(settings, tools, monkeypatch):
    from settings import plugins

    seen, build = [], plugins.build
    monkeypatch.setattr(plugins, "build", lambda f, n, v, *rest: seen.append((f, rest)) or build(f, n, v, *rest))
    trainer = tools.build(settings)
    given = next(rest[0] for folder, rest in seen if folder == "optimizer")
    assert given == trainer.step.parameters and all(isinstance(p, torch.nn.Parameter) for p in given)
    trainer.saver.last()
    with pytest.raises(UsageError, match="other groups of learning rates") as caught:
        tools.build(settings, head_lr_factor=3).resume()
    assert "\n" not in str(caught.value)


def test_factors_and_reference_batch_changed_between_runs_are_used(settings, tools):
    keys = {**FAST, "scheduler": "cosine", "head_lr_factor": 2, "max_epoch": 4}
    trainer = tools.build(settings, **keys)
    trainer.config.max_epoch = 2
    run(trainer).saver.last()
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    again = tools.build(settings, **{**keys, "head_lr_factor": 6, "lr_reference_batch": 8, "weight_decay": 0.3})
    assert again.resume()
    expected = [pytest.approx(rates[0] / 2), pytest.approx(rates[1] * 1.5)]
    assert [g["lr"] for g in again.optimizer.param_groups] == expected
    assert again.scheduler.base_lrs == [pytest.approx(0.005), pytest.approx(0.03)]
    assert [g["weight_decay"] for g in again.optimizer.param_groups] == [0.3, 0.3]


def test_a_schedule_that_gives_all_groups_one_rate_is_refused(settings, tools, monkeypatch):
    import scheduler.steplr as steplr

    def same_for_all(optimizer, lr):
        return torch.optim.lr_scheduler.CyclicLR(optimizer, lr, lr, cycle_momentum=False), "iteration"

    monkeypatch.setattr(steplr, "Scheduler", same_for_all)
    with pytest.raises(UsageError, match=r"scheduler/steplr.py: does not keep the ratio"):
        tools.build(settings, scheduler="steplr", head_lr_factor=3)


def test_lr_reference_batch_scales_the_whole_schedule(settings, tools):
    keys = {"scheduler": "cosine", "lr_min": 1e-4, "gradient_accumulation_steps": 2}
    plain = tools.build(settings, **keys, lr=0.01 * 8 / 64)
    scaled = tools.build(settings, **keys, lr_reference_batch=64)
    assert scaled.config.lr == 0.01 and scaled.config.lr_min == 1e-4  # the written values
    assert scaled.optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.01 * 8 / 64)
    lowest = scaled.scheduler.lr_lambdas[0](10**6) * scaled.scheduler.base_lrs[0]
    assert lowest == pytest.approx(1e-4 * 8 / 64) and plain.scheduler.base_lrs[0] == pytest.approx(0.00125)


# ------------------------------------------------------------------------------------------------- command line


def test_large_margin_stage_through_the_command_line(settings, write, tools, tmp_path):
    """The keys of configs/large_margin.yaml on a model with speed copies, in two processes, frozen first."""
    import yaml

    first = tools.build(settings, speed_perturb=True)
    first.saver.last()
    stage = yaml.safe_load((tools.root / "configs" / "large_margin.yaml").read_text())
    names = ("margin", "scale", "optimizer", "momentum", "scheduler", "lr", "lr_min", "lr_reference_batch")
    more = {name: stage[name] for name in (*names, "warmup_epochs")}
    more |= {"max_epoch": 2, "test_interval": 2, "freeze_epochs": 1, "save_path": str(tmp_path / "tuned")}
    more |= {"initial_model": str(tmp_path / "run" / "model" / "last.model"), "batch_size": 2, "ema_decay": 0.9}
    path = write({**settings, **FAST, **more})
    done, other = programs.run_ranks(tools.root / "trainSpeakerNet.py", "--config", path)
    assert done.returncode == other.returncode == 0, done.stderr
    for line in (
        "learning rate 6.25e-06: lr 0.0001 x 4 rows a step / lr_reference_batch 64",
        "the classifier is cut to the original speakers: the first 6 of 18 classes",
        "the backbone is frozen to the end of epoch 1",
        "the backbone trains from epoch 2 on",
    ):
        assert done.stdout.count(line) == 1, (line, done.stdout)
    assert "differ from those of rank 0" not in done.stdout
    state = torch.load(tmp_path / "tuned" / "model" / "last.model", weights_only=True)
    assert state["model_state_dict"]["__L__.weight"].shape[0] == 6 and math.isfinite(state["best"]["eer"])
