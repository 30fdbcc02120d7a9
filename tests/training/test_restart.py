"""A run whose last.model cannot be used says which checkpoint to take instead, and goes on from that one."""

import json
import math
import shlex
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import SpeakerNet
import trainSpeakerNet
from errors import UsageError
from storage import archive, checkpoint
from storage.dump import DumpError, read_checkpoint
from storage.files import save_atomically
from training.ranks import Ranks


def arguments(settings):
    return [f"--{key}={value}" for key, value in {**settings, "device": "cpu"}.items()]


def epochs_of(settings):
    lines = Path(settings["save_path"], "result", "metrics.jsonl").read_text().splitlines()
    return [(event["event"], event["epoch"], event.get("train_loss")) for event in map(json.loads, lines)]


def spoil_weight(state):
    state["model_state_dict"]["__S__.linear.bias"][0] = math.nan


def spoil_buffer(state):
    name = next(name for name in state["model_state_dict"] if name.endswith("running_var"))
    state["model_state_dict"][name][0] = math.inf


def spoil_moment(state):
    state["optimizer_state_dict"]["state"][3]["exp_avg"].view(-1)[0] = math.nan


SPOILED = {
    spoil_weight: r"1 tensors are not finite (__S__.linear.bias)",
    spoil_buffer: "running_var)",
    spoil_moment: "1 tensors are not finite (optimizer.3.exp_avg)",
}


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGED = {
    cut: "damaged: the end of the archive is missing",
    flip_a_bit: "damaged: its content does not fit its SHA-256",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The settings of one run of two evaluated epochs, once a test has made it."""
    return {}


def run_of_two_epochs(settings, finished, tmp_path):
    """Copy a run of two evaluated epochs to the test's save_path; the first test makes it."""
    if not finished:
        finished["settings"] = {**settings, "save_path": str(tmp_path / "first"), "test_interval": 1}
        assert trainSpeakerNet.main(arguments(finished["settings"])) == 0
    shutil.copytree(finished["settings"]["save_path"], settings["save_path"])
    return {**finished["settings"], "save_path": settings["save_path"]}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_a_spoiled_last_model_is_refused_and_what_is_offered_works(settings, finished, tmp_path, capsys, spoil):
    settings = run_of_two_epochs(settings, finished, tmp_path)
    before, _ = epochs_of(settings), capsys.readouterr()
    last = Path(settings["save_path"], "model", "last.model")
    state = torch.load(last, weights_only=True)
    spoil(state)
    save_atomically(state, last)
    offered = last.with_name("last_previous.model")
    if spoil is spoil_moment:  # the one before is no better, nor is the newest of an epoch
        save_atomically(state, offered)
        save_atomically(state, last.with_name("model000000002.model"))
        offered = last.with_name("model000000001.model")
    assert trainSpeakerNet.main(arguments(settings)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{last}: ") and SPOILED[spoil] in line
    assert f"the newest sound one is {offered}: 'cp " in line
    if spoil is spoil_buffer:  # the same follows as for a weight
        return
    subprocess.run(shlex.split(line.split("'")[1]), check=True)
    assert trainSpeakerNet.main(arguments(settings)) == 0
    assert f"resuming from {last}" in capsys.readouterr().out
    assert epochs_of(settings) == before  # the second epoch again, with the same loss; the first evaluation not again


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda damage: damage.__name__)
def test_a_damaged_last_model_gives_way_to_the_one_before_it_and_both_are_named(
    settings, finished, tmp_path, capsys, damage
):
    settings = run_of_two_epochs(settings, finished, tmp_path)
    before, _ = epochs_of(settings), capsys.readouterr()
    last = Path(settings["save_path"], "model", "last.model")
    previous, sound = last.with_name("last_previous.model"), last.read_bytes()
    damage(last)
    assert trainSpeakerNet.main(arguments(settings)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"WARNING: {last}: {DAMAGED[damage]}" in next(line for line in lines if str(previous) in line)
    assert any(line.startswith(f"resuming from {previous}") for line in lines)
    assert epochs_of(settings) == before
    assert checkpoint.load(last)["epoch"] == checkpoint.load(previous)["epoch"] == 2  # not the damaged one
    last.write_bytes(sound)
    damage(last)
    damage(previous)
    assert trainSpeakerNet.main(arguments(settings)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith(f"{last}: damaged") and "the newest sound one is" in line and "model000000002.model: '" in line
    )


def test_a_run_without_last_model_goes_on_with_optimizer_and_schedule(settings, finished, tmp_path, capsys):
    settings = run_of_two_epochs(settings, finished, tmp_path)
    before = epochs_of(settings)
    model = Path(settings["save_path"], "model")
    (model / "last.model").unlink()
    (model / "model000000002.model").unlink()
    assert trainSpeakerNet.main(arguments(settings)) == 0
    assert (
        f"resuming from {model / 'model000000001.model'}" in capsys.readouterr().out and epochs_of(settings) == before
    )


def test_sources_that_have_changed_are_named(settings, finished, tmp_path, capsys):
    settings = run_of_two_epochs(settings, finished, tmp_path)
    last = Path(settings["save_path"], "model", "last.model")
    state = torch.load(last, weights_only=True)
    for said in ("", "  source changed since this state was saved: loss/aamsoftmax.py, models/gone.py (missing)"):
        capsys.readouterr()
        assert trainSpeakerNet.main(arguments(settings)) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if "source changed" in line] == [said] * bool(said)
        state["incidents"][0]["sources"] |= {"loss/aamsoftmax.py": 64 * "0", "models/gone.py": 64 * "0"}
        save_atomically(state, last)


def test_a_spoiled_run_without_a_sound_checkpoint_says_so(settings, tools, capsys):
    trainer = tools.build(settings)
    (trainer.files.model / "last.model").write_bytes(b"PK cut")
    assert trainSpeakerNet.main(arguments(settings)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the run has no sound one; move its model folder away to begin anew" in line


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_buffer])
def test_a_spoiled_initial_model_is_refused_by_its_tensor(settings, tools, tmp_path, capsys, spoil):
    trainer = tools.build(settings, save_path=tmp_path / "other")
    state = trainer.saver.capture()
    spoil(state)
    save_atomically(state, tmp_path / "spoiled.model")
    assert trainSpeakerNet.main([*arguments(settings), f"--initial_model={tmp_path / 'spoiled.model'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "spoiled.model") in line and SPOILED[spoil] in line


def sparse_buffer(trainer):
    trainer.network.__S__.register_buffer("graph", torch.eye(3).to_sparse())


def own_class(trainer):
    trainer.scheduler.helper = SimpleNamespace(gain=1.0)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (sparse_buffer, "model_state_dict: model.graph: asks for 'torch._utils._rebuild_sparse_tensor', which no"),
        (own_class, "scheduler_state_dict: helper: asks for 'types.SimpleNamespace', which no checkpoint holds"),
    ],
)
def test_a_run_whose_checkpoints_could_not_be_read_again_does_not_start(settings, monkeypatch, capsys, spoil, words):
    begin = SpeakerNet.ModelTrainer.begin
    monkeypatch.setattr(SpeakerNet.ModelTrainer, "begin", lambda trainer: (begin(trainer), spoil(trainer)))
    assert trainSpeakerNet.main(arguments(settings)) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and said.startswith("a checkpoint of this run could not be read again: ")
    assert words in said and not list(Path(settings["save_path"], "model").iterdir())


def test_a_checkpoint_of_many_classes_is_larger_than_a_dump_may_be(settings, tools, monkeypatch):
    trainer = tools.build(settings)
    trainer.saver.last()
    monkeypatch.setattr(archive, "MAX_BYTES", 20000)
    path = trainer.files.model / "last.model"
    assert path.stat().st_size > 20000 and tools.build(settings).resume()
    with pytest.raises(DumpError, match="larger than"):
        read_checkpoint(path)
    save_atomically({str(number): torch.zeros(4000) for number in range(2)} | {"2": torch.zeros(1)}, path)
    assert checkpoint.load(path)
    shared = torch.zeros(8000)
    save_atomically({str(number): shared[:] for number in range(3)}, path)
    with pytest.raises(UsageError, match="larger than"):  # more than twice the bytes of the file
        checkpoint.load(path)


def test_a_process_that_cannot_go_on_leaves_no_other_in_a_collective(settings, tools, monkeypatch):
    """All begin in one collective: one that raises afterwards meets the others where failures are told."""
    trainer = tools.build(settings)
    trainer.progress.best["eer"] = 1.0
    trainer.saver.last()
    again, calls = tools.build(settings, eval_frames=50), []
    for name in ("from_main", "gather", "each", "highest_of", "sum", "maximum", "everyone"):
        collective = getattr(Ranks, name)
        monkeypatch.setattr(
            Ranks, name, lambda *given, name=name, collective=collective: (calls.append(name), collective(*given))[1]
        )
    again.begin()
    assert calls == ["from_main"] and again.progress.best["eer"] is None


def test_lines_of_an_evaluation_in_the_folder_of_a_run_stay_when_it_goes_on(settings, finished, tmp_path):
    settings = run_of_two_epochs(settings, finished, tmp_path)
    best = str(Path(settings["save_path"], "model", "model_best.model"))
    scores = Path(settings["save_path"], "result", "scores.txt")
    before = scores.read_text().splitlines()
    assert trainSpeakerNet.main([*arguments({**settings, "initial_model": best}), "--eval"]) == 0
    (line,) = scores.read_text().splitlines()[len(before) :]
    with open(scores, "a") as file:
        file.write("Epoch 3, TEER/TAcc 1.00, TLOSS 2.000000, LR 0.010000\nEpoch 1, VE")  # as of a run that was killed
    assert trainSpeakerNet.main(arguments({**settings, "max_epoch": 3})) == 0
    after = scores.read_text().splitlines()
    assert (
        after[: len(before) + 1] == [*before, line]
        and [row[:8] for row in after[len(before) + 1 :]] == ["Epoch 3,"] * 2
    )
    assert [kind for kind, epoch, _ in epochs_of(settings)].count("eval") == 4
