"""torch.compile is tried before the first step; a failure costs nothing, and evaluations are exact."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from errors import UsageError
from training.compilation import as_it_is, compile_model


def fails(graph, inputs):
    raise RuntimeError("no compiler here\nand more of it")


@pytest.fixture
def backend(monkeypatch):
    """Let a module compile with another backend: the real one takes a minute."""
    plain = torch.nn.Module.compile

    def choose(which):
        monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(plain, backend=which))

    torch._dynamo.reset()
    return choose


def build(settings, tools, **keys):
    lines = []
    trainer = tools.build(settings, **keys)
    trainer.log = lines.append
    return trainer, lines


def test_a_compiled_model_takes_the_same_steps(settings, tools, backend, tmp_path):
    backend("eager")
    plain, _ = build(settings, tools, save_path=tmp_path / "plain")
    trainer, lines = build(settings, tools, compile_model="true")  # as it was written when it was a bool
    before = tools.snapshot(trainer)
    compile_model(trainer.step, trainer.config, trainer.log)
    assert lines[0].startswith("compile_model: compiled in ") and trainer.network.__S__._compiled_call_impl
    tools.assert_same(tools.snapshot(trainer), before)
    for batch in tools.batches(trainer)[:3]:
        ours, wanted = trainer.train_step([batch]), plain.train_step([batch])
        assert ours.loss == pytest.approx(wanted.loss, rel=1e-4)
    with as_it_is(trainer.network.__S__):
        assert trainer.network.__S__._compiled_call_impl is None
    assert trainer.network.__S__._compiled_call_impl


@pytest.mark.parametrize("keys", [{}, {"freeze_norms": True}])
def test_the_steps_find_what_was_compiled_before_them(settings, tools, backend, keys):
    backend("eager")
    trainer, _ = build(settings, tools, compile_model="on", max_epoch=1, test_interval=9, **keys)
    counters.clear()
    compile_model(trainer.step, trainer.config, trainer.log, trainer.backbone)
    compiled = counters["stats"]["unique_graphs"]
    trainer.enter_epoch()
    for batch in tools.batches(trainer)[:2]:
        trainer.train_step([batch])
    assert counters["stats"]["unique_graphs"] == compiled > 0


def test_where_compiling_fails_auto_goes_on_and_on_ends(settings, tools, backend, tmp_path):
    backend(fails)
    trainer, lines = build(settings, tools, compile_model="auto")
    trainer.run()
    assert lines[0].startswith("compile_model: the model is not compiled: BackendCompilerFailed: ")
    assert trainer.progress.step == 16
    trainer, _ = build(settings, tools, compile_model="on", save_path=tmp_path / "on")
    with pytest.raises(UsageError, match=r"compile_model: torch.compile fails: .* auto goes on without"):
        trainer.run()


def test_what_a_compiler_computes_twice_is_not_compiled(settings, tools, monkeypatch):
    """Up to some torch a compiled norm moves its statistics again where its block is computed again."""

    def twice(model):
        model._compiled_call_impl = lambda x: [model._call_impl(x) for _ in range(2)][1]

    keys = {"model": "ECAPA_TDNN", "channels": 16, "nOut": 8, "gradient_checkpointing": True}
    trainer, lines = build(settings, tools, compile_model="auto", **keys)
    before = tools.snapshot(trainer)
    monkeypatch.setattr(torch.nn.Module, "compile", twice)
    compile_model(trainer.step, trainer.config, trainer.log)
    assert "does not compile what gradient_checkpointing computes again: '" in lines[0]
    assert (
        "moves 1.9 times as far in a step as without" in lines[0] and trainer.network.__S__._compiled_call_impl is None
    )
    tools.assert_same(tools.snapshot(trainer), before)
