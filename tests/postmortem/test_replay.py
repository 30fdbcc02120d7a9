"""The step of a dump is computed again bit for bit: by the kernels that the run took, in its precision."""

import math
import os
import random
from types import SimpleNamespace

import pytest
import torch

from config import Config
from postmortem.analysis import analyse, follow_moved_files, run_folder
from postmortem.case import Case
from postmortem.diagnosis import absurd_amplitude
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


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.7])
def test_no_row_is_blamed_for_a_step_that_fails_by_chance(share):
    """``share`` of the replays fail, whatever the rows; at 0 row 5 is at fault, without chance."""
    blamed = []
    for seed in range(40):
        draw = random.Random(seed)
        case = Case.__new__(Case)
        case.reproduced, case.evidence, case.origin, case.seconds, case.begin = "bit_equal", [], None, 1e9, 0.0
        case.base = SimpleNamespace(error="")

        def run(columns=tuple(range(16)), draw=draw):
            failed = draw.random() < share if share else 5 in columns
            return SimpleNamespace(finite=not failed, error="")

        case.replay = SimpleNamespace(columns=16, run=run, data=torch.zeros(1, 16, 1))
        blamed.append(tuple(case.guilty_columns()))
        if any("was finite the next time" in line for line in case.evidence):
            assert case.reproduced == "nondeterministic" and not blamed[-1]
    assert set(blamed) == {(5,)} if not share else sum(map(bool, blamed)) <= 4, blamed


@pytest.mark.parametrize("failing, cause", [({2}, "environment"), ({1, 3}, "loss")], ids=["unseen", "seen"])
def test_a_step_that_differs_from_run_to_run_blames_no_rows(failing, cause, dump_of, monkeypatch):
    """``failing``: which replays fail. The second is the first that is watched, the third is watched if it did not."""
    from loss.softmax import LossFunction

    path = dump_of(lambda trainer: trainer.network.loss.register_forward_hook(spoil), trainfunc="softmax")
    forward, calls = LossFunction.forward, []

    def flicker(self, *given):
        calls.append(1)
        loss, accuracy = forward(self, *given)
        return loss * (math.nan if len(calls) in failing else 1.0), accuracy

    monkeypatch.setattr(LossFunction, "forward", flicker)
    verdict = analyse(path).verdict
    assert verdict["cause"] == cause and verdict["replay"]["reproduced"] == "nondeterministic"
    assert verdict["location"]["rows"] == [] and "two replays" in " ".join(verdict["evidence"])
    assert (verdict["location"]["op"] == "mul") == (cause == "loss")


def spoil(module, inputs, output):
    """What a hook does that makes the loss NaN."""
    return output[0] * math.nan, output[1]


def test_relative_paths_are_those_of_the_folder_in_which_the_run_was_started(tmp_path, monkeypatch):
    dump = {"config": {"save_path": "exps/run"}, "files": [{"path": "wav/a.wav", "augment": [{"path": "n/1.wav"}]}]}
    base, path = tmp_path / "work", tmp_path / "work" / "exps" / "run" / "debug_nan" / "nan_batch_1_epoch_1.pt"
    for name in ("wav/a.wav", "n/1.wav"):
        (base / name).parent.mkdir(parents=True)
        (base / name).touch()
    monkeypatch.chdir(tmp_path)
    follow_moved_files(dump, (), run_folder(path, dump))
    row = dump["files"][0]
    assert (row["path"], row["augment"][0]["path"]) == (str(base / "wav/a.wav"), str(base / "n/1.wav"))
    monkeypatch.chdir(base)
    here = {"config": dump["config"], "files": [{"path": "wav/a.wav"}]}
    follow_moved_files(here, (), run_folder(path, here))
    assert here["files"][0]["path"] == "wav/a.wav"  # what is there as it is written stays so
    for saved in ("exps/other", "/exps/run", ""):
        assert run_folder(path, {"config": {"save_path": saved}}) is None


def test_a_set_of_integers_stored_as_float_is_laid_to_its_files():
    """Of single rows such a level may be what the code cannot take; of a whole batch it is the data's."""

    def found(data, built=False):
        def run(data):
            return SimpleNamespace(finite=bool(data.abs().max() <= 1))

        replay = SimpleNamespace(run=run, data=data, columns=data.shape[1])
        case = SimpleNamespace(replay=replay, base=SimpleNamespace(finite=False), dump={"data": data}, files=[])
        case.built = built
        return absurd_amplitude(case)

    data = torch.linspace(-1, 1, 100).expand(1, 6, 100).clone()
    assert found(data) is None
    finding = found(data * torch.tensor([300.0, 9e3, 3e4, 2e4, 0.0, 6e3]).view(1, 6, 1))  # one is silent
    assert (finding.cause, finding.detail, finding.rows) == ("input", "amplitude", [0, 1, 2, 3, 5])
    assert found(data * 32768, built=True) is None  # another loop's data has any scale
    one = data.clone()
    one[0, 2] *= 1e5
    assert found(one).rows == found(one, built=True).rows == [2]


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


def test_a_transient_fault_is_none_of_the_compiler(dump_of):
    path = dump_of(nan_inject="2:loss", compile_model="off")
    dump = torch.load(path, weights_only=True)
    config = {**dump["config"], "compile_model": "on"}
    save_atomically({**dump, "injected": "", "config": config, "recheck": {"finite": True, "same": False}}, path)
    assert analyse(path).verdict["detail"] == "transient"
