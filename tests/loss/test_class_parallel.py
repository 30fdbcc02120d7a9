"""Class weights that are split over processes: losses, accuracies and gradients are those of the whole."""

import re
import runpy
import socket
from types import SimpleNamespace

import pytest
import torch
from programs import ROOT, Program

SCRIPT = ROOT / "tests" / "loss" / "split_head.py"
split = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """{number of processes: what each measured}."""
    found = {}
    for world in (2, 3):
        out = tmp_path_factory.mktemp("split") / "out"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
        running = [Program(SCRIPT, out, env={**meeting, "RANK": str(rank)}) for rank in range(world)]
        for done in [program.wait() for program in running]:
            assert done.returncode == 0, done.stderr
        found[world] = [torch.load(f"{out}.{rank}") for rank in range(world)]
    return found


def whole(case, world, dtype):
    """What the plain loss gives for the rows of each process, one after the other, with the same draw of classes."""
    loss, found = split.build(case), []
    x, label = split.inputs(case, world)
    draws = [head.draws.get_state() for head in split.heads_of(loss) if head.notes.rate < 1]
    for rank in range(world):
        for head, state in zip(split.heads_of(loss), draws):
            head.draws.set_state(state)
        loss.zero_grad()
        found.append(split.measure(loss, x[rank, rank:], label[rank, rank:], dtype))
    return loss, found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", split.CASES)
def test_slices_give_what_the_whole_gives(measured, case, world, dtype):
    loss, expected = whole(case, world, dtype)
    ours = [rank[case, dtype] for rank in measured[world]]
    sliced = {f"{n}.{w}".lstrip(".") for n, m in loss.named_modules() for w in split.sliced_of(m)}
    for got, own in zip(ours, expected):
        for name in ("loss", "accuracy", "x"):
            assert torch.allclose(got[name], own[name], rtol=1e-5, atol=1e-6), name
    for name in expected[0].keys() - {"loss", "accuracy", "x"}:
        mean = torch.stack([own[name] for own in expected]).mean(dim=0)  # of the mean loss of all rows
        parts = [got[name] for got in ours]
        found = torch.cat(parts) if name in sliced else torch.stack(parts).mean(dim=0)
        assert torch.allclose(found, mean, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("case", [case for case, (_, _, rate) in split.CASES.items() if rate == 1.0])
def test_all_classes_drawn_is_the_plain_loss(case):
    x, label = split.inputs(case, 1)
    plain = split.measure(split.build(case), x[0], label[0], "float32")
    loss = split.build(case)
    for head in split.heads_of(loss):
        head.sample(0.999999, 7)
    drawn = split.measure(loss, x[0], label[0], "float32")
    assert all(torch.allclose(plain[name], drawn[name], rtol=1e-5, atol=1e-7) for name in plain)


def test_a_share_is_the_row_s_own_class_and_those_drawn():
    """Against the softmax over these classes, computed row by row."""
    loss, (x, label) = split.build("a share of softmax"), split.inputs("a share of softmax", 1)
    state = loss.draws.get_state()
    value, _ = loss(x[0], label[0])
    loss.draws.set_state(state)
    drawn = torch.rand(split.CLASSES, generator=loss.draws) < 0.2
    losses = []
    for row, own in zip(x[0], label[0]):
        logits = row @ loss.fc.weight.T + loss.fc.bias
        taken = drawn.clone()
        taken[own] = True
        losses.append(logits[taken].logsumexp(dim=0) - logits[own])
    assert value.item() == pytest.approx(sum(losses).item() / len(losses), rel=1e-5)
    value.backward()
    moved = loss.fc.weight.grad.abs().sum(dim=1) > 0
    assert torch.equal(moved, loss.notes.touched) and bool(drawn.any()) and not bool(moved.all())
    alone = split.build("a share of softmax")  # rows do not depend on each other's classes
    assert alone(x[0, 2:3], label[0, 2:3])[0].item() == pytest.approx(losses[2].item(), rel=1e-5)


def test_the_loss_of_the_documents_says_only_its_margin():
    page = (ROOT / "docs" / "extending.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "MarginHead" in block]
    defined: dict = {}
    exec(compile(code, "docs/extending.md", "exec"), defined)
    loss = defined["LossFunction"](8, 50, margin=0.2, scale=9.0)
    x, label = split.inputs("amsoftmax", 1)
    cosine = torch.nn.functional.normalize(x[0]) @ torch.nn.functional.normalize(loss.weight.detach()).T
    own = torch.nn.functional.one_hot(label[0], 50)
    logits = 9.0 * (cosine - own * 0.2 * (1 - cosine.square()))
    expected = torch.nn.functional.cross_entropy(logits, label[0]).item()
    assert loss(x[0], label[0])[0].item() == pytest.approx(expected, rel=1e-5)


def test_fewer_classes_than_processes_are_refused():
    with pytest.raises(ValueError, match="50 classes cannot be split over 51 processes"):
        split.build("softmax").split(0, 51, 4)
