"""One of two processes that train with shared-out weights: every step looked at, faults, what is left behind.

python tests/training/sharded_steps.py SETTINGS.yaml    with torchrun's variables; ends with 0 if all holds
"""

import sys
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from split_steps import tensors_of, train
from trainers import batches_of, build_trainer

from config import Config
from training.attempt import Attempt
from training.faults import Fault
from training.ranks import Ranks
from training.slices import local


def held(trainer) -> dict:
    """Copies of everything that a step may change, as this process holds it."""
    state = {**trainer.network.state_dict(), **dict(trainer.average.tensors)}
    for number, values in trainer.optimizer.state_dict()["state"].items():
        state |= {f"{number}.{key}": torch.as_tensor(value) for key, value in values.items()}
    return {"rng": torch.get_rng_state(), **{name: local(tensor).clone() for name, tensor in state.items()}}


def assert_held(trainer, before: dict):
    """Assert that all is as it was, bit for bit."""
    now = held(trainer)
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(now[name], tensor), name


def spoil_row(trainer, batch):
    """A sample of rank 1 that is not finite; it passes the host's checks, which are not made here."""
    if trainer.ranks.rank == 1:
        batch = {**batch, "data": batch["data"].clone()}
        batch["data"][0, 0, 100] = torch.nan
    return batch


def spoil_gradient(trainer, batch):
    """A gradient of rank 1's rows that is not finite behind a finite loss."""
    if trainer.ranks.rank == 1:
        model = trainer.network.__S__
        forward = type(model).forward

        def hooked(x):
            out = forward(model, x)
            if out.requires_grad:
                out.register_hook(lambda gradient: gradient * torch.inf)
            return out

        model.forward = hooked
    return batch


def spoil_loss(trainer, batch):
    """A loss that is not finite on all ranks, whatever the statistics of norms are taken of."""
    head = trainer.network.loss
    head.forward = lambda x, label: tuple(value * torch.nan for value in type(head).forward(head, x, label))
    return batch


def spoil_weight(trainer, batch):
    """A weight in rank 1's share that is not finite before the step."""
    if trainer.ranks.rank == 1:
        local(trainer.network.loss.weight)[0, 0] = torch.inf
    return batch


FAULTS = {
    spoil_row: ([1], "loss_nonfinite", ""),
    spoil_gradient: ([1], "grad_nonfinite", ""),
    spoil_weight: ([0, 1], "state_nonfinite", "'__L__.weight' is not finite"),
}


def check_faults(settings, ranks, faults, **keys):
    """Each fault is laid to the process whose rows brought it, whose dump holds whole weights; no trace is left."""
    for spoil, (guilty, reason, words) in faults.items():
        name = "_".join([spoil.__name__, *keys])
        trainer = build_trainer({**settings, **keys, "save_path": f"{settings['save_path']}{name}"}, ranks)
        first, second, *_ = batches_of(trainer)
        train(trainer, first)
        spoilt = spoil(trainer, second)
        whole = tensors_of(trainer.state.capture())
        whole = ranks.from_main({name: tensor.clone() for name, tensor in whole.items()})
        before = held(trainer)
        train(trainer, spoilt)
        assert_held(trainer, before)
        trainer.close()
        ranks.gather(None)  # all have written
        folder = trainer.incidents.writer.folder
        dumps = sorted(path.name for path in folder.glob("nan_*.pt"))
        assert dumps == [f"nan_batch_2_epoch_1_rank{rank}.pt" for rank in guilty], (spoil, dumps)
        fault = trainer.progress.last_fault
        assert fault["rank"] == guilty[0] and fault["reason"] == reason and words in fault["what"], fault
        dump = torch.load(folder / dumps[-1], weights_only=True)
        assert dump["recheck"] == {"finite": False, "same": True}, dump["recheck"]
        saved = tensors_of(torch.load(folder / dump["state"], weights_only=True))
        assert "__L__.weight" in saved and all(torch.equal(whole[name], t) for name, t in saved.items()), spoil
        sizes = {name: p.numel() for name, p in trainer.network.named_parameters()}
        for kind in ("grad_stats", "param_stats"):
            assert {name: stats["numel"] for name, stats in dump[kind].items()} == sizes, kind
        if spoil is not spoil_weight:
            for part in (trainer.network.__S__, trainer.network.loss):
                vars(part).pop("forward", None)
            assert isinstance(trainer.step.take([second]), Attempt)


def check_updates(settings, ranks):
    """An update that spoils one share is taken back on all, and the norm is that of the whole gradient."""
    trainer = build_trainer({**settings, "save_path": f"{settings['save_path']}u"}, ranks)
    first, second, *_ = batches_of(trainer)
    train(trainer, first)
    before, step = held(trainer), trainer.optimizer.step

    def spoiling():
        step()
        if ranks.rank == 1:
            local(trainer.network.loss.weight)[1, 2] = torch.nan

    trainer.optimizer.step = spoiling
    fault = trainer.step.take([second])
    assert isinstance(fault, Fault) and fault.phase == "update" and "__L__.weight" in fault.what, fault
    del trainer.optimizer.step
    assert_held(trainer, before)
    attempt = trainer.step.take([second])
    norm = sum(p.grad.full_tensor().square().sum() for p in trainer.network.parameters()).sqrt().item()
    clipped = min(1.0, trainer.config.grad_clip / attempt.norm)
    assert len(set(ranks.gather(attempt.norm))) == 1 and abs(norm - clipped * attempt.norm) < 1e-4 * attempt.norm


def check_equal(settings, ranks, **keys):
    """A run whose weights are shared out gives what one gives in which each process has all; each reads the other's."""
    name = "-".join(keys)
    plain, sharded = (
        build_trainer({**settings, **keys, "save_path": f"{settings['save_path']}{name}{kind}", "fsdp": kind}, ranks)
        for kind in (False, True)
    )
    for trainer in (plain, sharded):
        windows = trainer.progress.accumulation
        batches = batches_of(trainer)[ranks.rank :: 2]
        for first in range(0, 3 * windows, windows):
            trainer.network.train()
            trainer.enter_epoch()
            trainer.progress.batch += windows
            trainer.train_step([batches[i % len(batches)] for i in range(first, first + windows)])
            if keys.get("freeze_epochs"):
                trainer.progress.begin_epoch(trainer.progress.epoch + 1)
    states = [trainer.state.capture() for trainer in (plain, sharded)]
    rough = 0.1 if "mixedprec" in keys else 1e-3  # torch's hooks change in which order gradients of 16 bit are summed
    for one, other in zip(plain.incidents.history, sharded.incidents.history):
        assert all(abs(one[key] - other[key]) <= rough * abs(one[key]) for key in ("loss", "grad_norm")), (one, other)
    assert abs(next(iter(plain.incidents.history))["loss"] / next(iter(sharded.incidents.history))["loss"] - 1) < 1e-5
    if ranks.main:
        one, other = (tensors_of(state) for state in states)
        assert one.keys() == other.keys()
        for key, tensor in one.items() if "mixedprec" not in keys else ():
            assert torch.allclose(tensor.double(), other[key].double(), rtol=1e-3, atol=1e-4), key
        averages = [state["ema_state_dict"]["parameters"] for state in states]
        assert all(torch.allclose(t, averages[1][key], atol=0.1 * rough) for key, t in averages[0].items())
    if not keys:
        check_files(settings, ranks, plain, sharded, states)


def check_files(settings, ranks, plain, sharded, states):
    """Each goes on from the other's file bit for bit, and with the same next step as before."""
    for trainer, state, kind in ((plain, states[0], True), (sharded, states[1], False)):
        trainer.saver.last()
        ranks.gather(None)
        folder = {**settings, "save_path": str(trainer.files.model.parent)}
        other, same = (build_trainer(folder, ranks, fsdp=either) for either in (kind, not kind))
        assert other.resume() and same.resume()
        now = other.state.capture()
        if ranks.main:
            before, after = tensors_of(state), tensors_of(now)
            assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        batch = batches_of(trainer)[2]
        for one in (trainer, same):
            train(one, batch)
        assert_held(same, held(trainer))


def main(path):
    """Check everything."""
    settings = {**yaml.safe_load(Path(path).read_text()), "fsdp": True, "optimizer": "sgd", "ema_decay": 0.9}
    ranks = Ranks(Config(device="cpu"))
    check_equal(settings, ranks)
    more = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    check_equal(settings, ranks, **more, sync_batchnorm=True, freeze_epochs=1)
    check_equal(settings, ranks, mixedprec=True, amp_dtype="bfloat16")
    settings["optimizer"] = "adam"
    check_faults(settings, ranks, FAULTS)
    one = {spoil_row: FAULTS[spoil_row], spoil_loss: ([0, 1], "loss_nonfinite", "")}
    check_faults(settings, ranks, one, fsdp=False, sync_batchnorm=True)
    check_updates(settings, ranks)
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[-1])
