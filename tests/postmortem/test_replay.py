"""The step of a dump is computed again bit for bit: by the kernels that the run took, in its precision."""

import math
import os

import pytest
import torch

from config import Config
from postmortem.analysis import analyse
from postmortem.case import Case
from postmortem.fixes import recommendation
from postmortem.replay import Replay
from postmortem.retraining import trained_with
from storage.dump import read_dump, read_state
from storage.files import save_atomically
from training.precision import choose_kernels

PRECISIONS = [("false", "auto"), ("true", "bfloat16"), ("true", "float16")]


@pytest.mark.parametrize("mixed, dtype", PRECISIONS, ids=["fp32", "bf16", "fp16"])
def test_a_step_is_replayed_bit_for_bit(dump_of, mixed, dtype):
    path = dump_of(nan_inject="2:loss", mixedprec=mixed, amp_dtype=dtype)  # the recorded step itself was sound
    dump = read_dump(path)
    replay = Replay(dump, read_state(path, dump["state"]))
    one, two = replay.run(stats=True), replay.run(stats=True)
    assert one.finite and one.loss == two.loss and one.norm == two.norm and one.gradients == two.gradients
    sound = dump_of(nan_inject="2:grad", mixedprec=mixed, amp_dtype=dtype, save_path=str(path.parent.parent) + "2")
    dump = read_dump(sound)  # an injected gradient leaves the loss of the step as it was computed
    assert Replay(dump, read_state(sound, dump["state"])).run().loss == dump["loss"]


def test_a_step_is_replayed_by_the_kernels_that_it_was_taken_with(dump_of, kernels):
    keys = {"deterministic": True, "float32_matmul": "medium"}  # where a processor has bfloat16, medium changes bits
    choose_kernels(Config(**keys))
    path = dump_of(nan_inject="2:grad", **keys)
    choose_kernels(Config())  # as in another process
    dump = read_dump(path)
    outcome = Replay(dump, read_state(path, dump["state"])).run()
    assert torch.are_deterministic_algorithms_enabled() and torch.get_float32_matmul_precision() == "medium"
    assert outcome.loss == dump["loss"]


def test_a_wider_type_with_which_the_steps_to_come_fail_is_no_verified_fix(dump_of, monkeypatch):
    path = dump_of(nan_inject="2:loss")
    dump = read_dump(path)
    case = Case(path, dump, read_state(path, dump["state"]))
    fix = recommendation("switch mixed precision off", "set", {"mixedprec": False}, True, "with it: loss 1.5")
    assert trained_with(case, fix) == fix
    build = case.replay.new_network

    def grows(settings=None):
        network, steps = build(settings), iter((1.0, 1.0, math.inf))
        network.register_forward_hook(lambda module, inputs, output: (output[0] * next(steps), output[1]))
        return network

    monkeypatch.setattr(case.replay, "new_network", grows)
    case.retraining.trajectories.clear()
    found = trained_with(case, fix)
    assert found["verdict"] == "refuted"
    assert found["outcome"].endswith(
        "loss 1.5; but trained on in float32 from the initial weights: step 3 is not finite"
    )
    other = recommendation("lower the scale", "set", {"scale": 20}, True, "with it: loss 1.5")
    assert trained_with(case, other) == other


def test_retraining_begins_at_no_checkpoint_of_a_run_that_had_diverged(dump_of):
    path = dump_of(nan_inject="3:loss", save_interval_steps=1)
    dump = read_dump(path)
    state = read_state(path, dump["state"])
    checkpoint = path.parent.parent / "model" / "model000000001.model"
    for factor, found in ((1.0, checkpoint), (100.0, None)):
        weights = {name: factor * tensor for name, tensor in state["model_state_dict"].items()}
        save_atomically({"model_state_dict": weights, "step": 1}, checkpoint)
        os.utime(checkpoint, (0, path.stat().st_mtime))
        for other in checkpoint.parent.glob("last*.model"):
            other.unlink()
        assert Case(path, dump, state).retraining.checkpoint == found


@pytest.mark.parametrize("chosen, said", [("on", "The run's model was compiled"), ("auto", "If the run's model was")])
def test_what_only_a_compiled_model_computes_is_laid_to_the_compiler(dump_of, chosen, said):
    def miscompile(trainer):
        model = trainer.network.__S__
        model._compiled_call_impl = lambda x: model._call_impl(x) * float("nan")

    found = analyse(dump_of(miscompile, compile_model=chosen))
    verdict = found.verdict
    assert (verdict["cause"], verdict["detail"]) == ("environment", "compiled")
    assert verdict["recommendations"][0]["change"] == {"compile_model": "off"}
    assert verdict["recommendations"][0]["verdict"] == "untested"
    assert said in " ".join(found.summary.split())


def test_a_fault_of_the_moment_is_none_of_the_compiler(dump_of):
    path = dump_of(nan_inject="2:loss", compile_model="off")
    dump = torch.load(path, weights_only=True)
    config = {**dump["config"], "compile_model": "on"}
    save_atomically({**dump, "injected": "", "config": config, "recheck": {"finite": True, "same": False}}, path)
    assert analyse(path).verdict["detail"] == "transient"
