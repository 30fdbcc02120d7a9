"""One of two processes that train with split classes: every step looked at, faults of every place, what is left behind.

python tests/training/split_steps.py SETTINGS.yaml    with torchrun's variables; ends with 0 if all holds
"""

import sys
from pathlib import Path

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainers import assert_same, batches_of, build_trainer, snapshot

from config import Config
from storage import checkpoint
from storage.dump import content_hash
from training.attempt import Attempt
from training.faults import Fault
from training.ranks import Ranks


def spoil_weight(trainer):
    """A weight of rank 1's slice that is not finite before the step."""
    if trainer.ranks.rank == 1:
        trainer.network.loss.weight.data[0, 0] = torch.inf


def spoil_class(trainer):
    """A class of rank 1 whose logits overflow, from finite rows and weights."""
    if trainer.ranks.rank == 1:
        replace_logits(trainer, lambda logits: logits.index_fill(1, torch.tensor([0]), torch.inf))


def spoil_row(trainer):
    """A logit of rank 1's classes that is not finite for the first row of rank 0 alone."""
    if trainer.ranks.rank == 1:
        replace_logits(
            trainer, lambda logits: logits.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(torch.nan))
        )


def spoil_gradient(trainer):
    """A gradient that rank 0's classes give the last row of rank 1."""

    def hooked(logits):
        if trainer.ranks.rank == 0:
            rows = trainer.config.batch_size
            logits.register_hook(lambda g: g.index_fill(0, torch.tensor([2 * rows - 1]), torch.nan))
        return logits

    replace_logits(trainer, hooked)


def replace_logits(trainer, change):
    """Change the logits of the loss on this process."""
    loss = trainer.network.loss
    original = type(loss).logits
    loss.logits = lambda batch, cosine: change(original(loss, batch, cosine))


FAULTS = {
    spoil_weight: (1, "state_nonfinite", "'__L__.weight' is not finite"),
    spoil_class: (1, "loss_nonfinite", ""),
    spoil_row: (0, "loss_nonfinite", ""),
    spoil_gradient: (1, "grad_nonfinite", ""),
}


def check_faults(settings, ranks):
    """Each fault is laid to one process, whose dump holds the whole weights, and leaves no trace on any slice."""
    for number, (spoil, (guilty, reason, words)) in enumerate(FAULTS.items()):
        trainer = build_trainer({**settings, "save_path": f"{settings['save_path']}{number}"}, ranks)
        first, second, *_ = batches_of(trainer)
        train(trainer, first)
        whole = trainer.state.capture()["model_state_dict"]["__L__.weight"].clone()
        kept = trainer.network.loss.weight.detach().clone()
        spoil(trainer)
        before = snapshot(trainer)
        train(trainer, second)
        assert_same(before, snapshot(trainer))
        trainer.close()
        trainer.ranks.gather(None)  # both have written
        dumps = [path.name for path in trainer.incidents.writer.folder.glob("nan_*.pt")]
        assert dumps == [f"nan_batch_2_epoch_1_rank{guilty}.pt"], (spoil, dumps)
        fault = trainer.progress.last_fault
        assert fault["rank"] == guilty and fault["reason"] == reason and words in fault["what"], fault
        dump = torch.load(trainer.incidents.writer.folder / dumps[0], weights_only=True)
        saved = torch.load(trainer.incidents.writer.folder / dump["state"], weights_only=True)
        weight = saved["model_state_dict"]["__L__.weight"]
        assert weight.shape == (6, 12) and (torch.equal(weight, whole) or spoil is spoil_weight or trainer.ranks.rank)
        if spoil is spoil_weight:
            assert weight.isinf().nonzero().tolist() == [[3, 0]]
            moments = saved["optimizer_state_dict"]["state"]
            assert [s["momentum_buffer"].shape for s in moments.values()].count((6, 12)) == 1
            trainer.network.loss.weight.data.copy_(kept)
        vars(trainer.network.loss).pop("logits", None)
        assert isinstance(trainer.step.take([second]), Attempt)


def train(trainer, batch):
    """Take a step as train_epoch does."""
    trainer.network.train()
    trainer.enter_epoch()
    trainer.progress.batch += 1
    trainer.train_step([batch])
    trainer.progress.nonfinite_in_a_row = 0


def check_updates(settings, ranks):
    """An update that spoils one process's slice is taken back on all, and the norm counts each slice once."""
    trainer = build_trainer({**settings, "save_path": f"{settings['save_path']}u"}, ranks)
    first, second, *_ = batches_of(trainer)
    train(trainer, first)
    before = snapshot(trainer)
    step = trainer.optimizer.step

    def spoiling():
        step()
        if trainer.ranks.rank == 1:
            trainer.network.loss.weight.data[1, 2] = torch.nan

    trainer.optimizer.step = spoiling
    fault = trainer.step.take([second])
    assert isinstance(fault, Fault) and fault.phase == "update" and "__L__.weight" in fault.what, fault
    del trainer.optimizer.step
    assert_same(before, snapshot(trainer))
    attempt = trainer.step.take([second])
    norms = [norm for _, norm in trainer.ranks.gather((0, attempt.norm))]
    own = [(n, p.grad.square().sum().item()) for n, p in trainer.network.named_parameters() if p.grad is not None]
    everyone = trainer.ranks.gather(dict(own))
    total = sum(sum(squares["__L__.weight"] for squares in everyone) if n == "__L__.weight" else s for n, s in own)
    clipped = min(1.0, trainer.config.grad_clip / attempt.norm)
    assert norms[0] == norms[1] and abs(total**0.5 - clipped * attempt.norm) < 1e-4 * attempt.norm


def check_drawn(settings, ranks):
    """Rows of classes that were not drawn stay bit for bit, moments too; a run that is resumed draws as the other."""
    keys = {**settings, "save_path": f"{settings['save_path']}d", "class_sample_rate": 0.3, "weight_decay": 0.1}
    trainer = build_trainer(keys, ranks)
    still = 0
    batches = batches_of(trainer)
    for batch in batches[:3]:
        weight = trainer.network.loss.weight
        moments = trainer.optimizer.state.get(weight, {})
        before = {"weight": weight.detach().clone(), **{k: m.clone() for k, m in moments.items()}}
        train(trainer, batch)
        rows = ~trainer.network.loss.notes.touched
        still += int(rows.sum())
        now = {"weight": weight.detach(), **trainer.optimizer.state[weight]}
        for name, tensor in now.items():
            expected = before[name][rows] if name in before else torch.zeros_like(tensor[rows])
            assert torch.equal(tensor[rows], expected), name
            assert not torch.equal(tensor[~rows], before.get(name, torch.zeros_like(tensor))[~rows])
    assert any(trainer.ranks.gather(still))
    trainer.saver.last()
    trainer.ranks.gather(None)
    again = build_trainer(keys, ranks)
    assert again.resume()
    for one in (trainer, again):
        train(one, batches[3])
    assert_same(snapshot(trainer), snapshot(again))
    if trainer.ranks.main:
        state = checkpoint.load(trainer.files.model / "last.model")
        assert state["model_state_dict"]["__L__.weight"].shape == (6, 12)


def check_drawn_whole(settings, ranks):
    """Processes that have all classes each, and draw a share of them, move the same rows."""
    keys = {**settings, "save_path": f"{settings['save_path']}w", "class_parallel": False, "class_sample_rate": 0.2}
    trainer = build_trainer(keys, ranks)
    for batch in batches_of(trainer)[ranks.rank :: 2]:
        train(trainer, batch)
    trainer.close()
    assert len(set(ranks.gather(content_hash(dict(trainer.network.named_parameters()))))) == 1


def check_equal(settings, ranks):
    """A run with split classes gives what a run without gives, and each goes on from the other's file bit for bit."""
    plain, split = (
        build_trainer({**settings, "save_path": f"{settings['save_path']}e{kind}"}, ranks, class_parallel=kind)
        for kind in (False, True)
    )
    for trainer in (plain, split):
        for batch in batches_of(trainer)[ranks.rank :: 2]:
            train(trainer, batch)
    states = [trainer.state.capture() for trainer in (plain, split)]
    if ranks.main:
        one, other = (tensors_of(state) for state in states)
        assert one.keys() == other.keys() and "__L__.weight" in one
        for name, tensor in one.items():  # rounding grows from step to step
            assert torch.allclose(tensor.double(), other[name].double(), rtol=1e-3, atol=1e-4), name
    first, same = (next(iter(trainer.incidents.history)) for trainer in (plain, split))
    assert all(abs(first[key] - same[key]) <= 1e-5 * first[key] for key in ("loss", "grad_norm"))
    for kind in (False, True):  # the file of the other
        trainer = plain if kind else split
        trainer.saver.last()
        ranks.gather(None)
        again = build_trainer({**settings, "save_path": str(trainer.files.model.parent)}, ranks, class_parallel=kind)
        assert again.resume()
        now = again.state.capture()
        if ranks.main:
            before = tensors_of(states[0] if kind else states[1])
            assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(now).items())


def tensors_of(state) -> dict:
    """Weights and moments of a checkpoint by name."""
    moments = {(i, k): v for i, s in state["optimizer_state_dict"]["state"].items() for k, v in s.items()}
    return {**state["model_state_dict"], **{key: torch.as_tensor(value) for key, value in moments.items()}}


def main(path):
    """Check everything."""
    settings = {**yaml.safe_load(Path(path).read_text()), "class_parallel": True, "optimizer": "sgd"}
    ranks = Ranks(Config(device="cpu"))
    check_equal(settings, ranks)
    check_faults(settings, ranks)
    check_updates(settings, ranks)
    check_drawn(settings, ranks)
    check_drawn_whole(settings, ranks)
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[-1])
