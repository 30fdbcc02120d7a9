"""Runs with a teacher: their dumps are replayed with it, and a teacher that is at fault is named as the cause."""

import json
import shutil
from pathlib import Path

import programs
import pytest
import soundfile
import torch

import trainSpeakerNet
from postmortem import load_dump
from postmortem.replay import ReplayError
from storage.dump import read_dump

FRAIL = '''
"""A teacher for the tests."""

import torch
from torch import nn


class MainModel(nn.Module):
    def __init__(self, nOut):
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 400, stride=160)
        self.fc = nn.Linear(9, nOut)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        loud = FORWARD
        return self.fc(torch.cat([self.conv(x[:, None]).abs().mean(dim=2), loud], dim=1))
'''
QUIET = FRAIL.replace("FORWARD", "torch.sqrt(x.square().mean(dim=1, keepdim=True) - 1e-6)  # the line")
ROTTING = (
    FRAIL.replace("FORWARD", "self.rot(x)").rstrip()
    + """

    def rot(self, x):
        if self.calls == 3:
            self.conv.weight.data[0, 0, 7] = torch.nan
        return x.square().mean(dim=1, keepdim=True)
"""
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with two frail teachers among its models."""
    folder = tmp_path_factory.mktemp("copy") / "checkout"
    hidden = shutil.ignore_patterns(".*", "data", "exps", "tests", "docs", "benchmarks", "__pycache__")
    shutil.copytree(programs.ROOT, folder, ignore=hidden)
    for name, text in (("Quiet", QUIET), ("Rotting", ROTTING)):
        (folder / "models" / f"{name}.py").write_text(text.lstrip())
    return folder


@pytest.fixture
def fails(checkout, settings, write, tmp_path):
    """Train with a teacher from the command line; returns (what was printed, the analysis of its only dump)."""

    def run(name, **keys):
        torch.manual_seed(0)
        weights = {"conv.weight": torch.randn(8, 1, 400) / 20, "conv.bias": torch.zeros(8)}
        weights |= {"fc.weight": torch.randn(12, 9), "fc.bias": torch.zeros(12)}
        path = tmp_path / "teacher.pt"
        torch.save(weights, path)
        keys = {**settings, "teacher_model": name, "teacher_checkpoint": str(path), "max_epoch": 1, **keys}
        done = programs.run(checkout / "trainSpeakerNet.py", "--config", write(keys), cwd=checkout)
        (dump,) = (tmp_path / "run" / "debug_nan").glob("nan_*.pt")
        told = programs.run(checkout / "analyze_nan_debug.py", dump, "--json", cwd=checkout)
        assert told.returncode == 0, told.stderr
        return done, json.loads(told.stdout), dump

    return run


def test_an_embedding_of_the_teacher_that_is_nan_is_laid_to_its_line(fails, settings, data, tmp_path):
    lines = Path(settings["train_list"]).read_text().splitlines()
    path = Path(data, "wav", lines[3].split()[1])
    wave, rate = soundfile.read(path)
    quiet = tmp_path / "wav" / "quiet.wav"
    shutil.copytree(data / "wav", tmp_path / "wav")
    soundfile.write(quiet, wave * 1e-3, rate, subtype="FLOAT")
    lines[3] = f"{lines[3].split()[0]} quiet.wav"
    (tmp_path / "list.txt").write_text("\n".join(lines))
    keys = {"train_list": str(tmp_path / "list.txt"), "train_path": str(tmp_path / "wav")}
    done, told, dump = fails("Quiet", **keys)
    assert done.returncode == 0, done.stderr
    teacher = f"models/Quiet.py of {tmp_path / 'teacher.pt'}"
    assert f"loss_nonfinite: the teacher's embedding of 1 row is not finite ({teacher})" in done.stdout
    assert "quiet.wav" in done.stdout.partition("ROWS AND FILES")[2]
    number = next(i for i, line in enumerate(QUIET.lstrip().splitlines(), 1) if "the line" in line)
    place = told["location"]
    assert (told["cause"], told["detail"]) == ("model_forward", "sqrt_of_negative")
    assert place["module"] == "distillation.teacher" and place["source"] == f"models/Quiet.py:{number}"
    assert [file["path"] for file in place["files"]] == [str(quiet)] and len(place["rows"]) == 1
    assert told["replay"]["reproduced"] == "bit_equal"
    verified = [fix["change"] for fix in told["recommendations"] if fix["verdict"] == "verified"]
    assert {"teacher_checkpoint": ""} in verified
    assert any("the teacher's embedding was not finite for rows" in line for line in told["evidence"])
    (tmp_path / "teacher.pt").rename(tmp_path / "elsewhere.pt")
    without = programs.run(programs.ROOT / "analyze_nan_debug.py", dump, "--json", "--trust-changed-code")
    told = json.loads(without.stdout)
    assert told["cause"] == "model_forward" and told["detail"] == "teacher_embedding"
    assert told["location"]["files"] == [{"path": str(quiet), "sample": None}]


def test_weights_of_the_teacher_that_become_nan_are_named(fails, tmp_path):
    done, told, dump = fails("Rotting", nan_patience=3)
    assert done.returncode == 3
    file = str(tmp_path / "teacher.pt")
    assert f"state_nonfinite: the teacher's 'teacher.conv.weight' is not finite (models/Rotting.py of {file})" in (
        done.stdout
    )
    assert (told["cause"], told["detail"], told["location"]["phase"]) == ("state", "teacher_weight", "state")
    place = told["location"]
    assert place["parameter"] == "distillation.teacher.conv.weight" and place["source"] == "models/Rotting.py"
    assert place["files"] == [{"path": file, "sample": None}]
    (first, *_) = told["recommendations"]
    assert first["verdict"] == "verified" and first["change"] == {"teacher_checkpoint": file}
    content = read_dump(dump)
    assert content["teacher"]["nonfinite"]["teacher.conv.weight"]["nan"] == 1
    state = torch.load(dump.parent / content["state"], weights_only=True)
    assert not any("distillation" in name for name in state["model_state_dict"])


VARIANTS = {
    "accumulated classes": {"gradient_accumulation_steps": 2, "distillation_type": "both"},
    "mixed, another size": {"mixup": 0.5, "nOut": 10},
    "bfloat16": {"mixedprec": True, "amp_dtype": "bfloat16", "nan_check": "late"},
}


@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS)
def test_a_dumped_step_is_taken_again_bit_for_bit(settings, tools, keys, tmp_path):
    teacher = tools.build({**settings, "save_path": str(tmp_path / "teacher")}, channels=16, seed=5)
    teacher.saver.last()
    path = teacher.files.model / "last.model"
    keys = {**settings, **keys, "teacher_checkpoint": path, "nan_inject": "2:grad", "max_epoch": 1}
    assert trainSpeakerNet.main([f"--{k}={v}" for k, v in {**keys, "device": "cpu"}.items()]) == 0
    (file,) = (tmp_path / "run" / "debug_nan").glob("nan_batch_*.pt")
    dump = load_dump(file)
    assert list(dump.content["teacher"]["files"]) == [str(path)] and not dump.content["teacher"]["rows"]
    replayed = dump.replay()
    assert replayed.loss == dump.content["loss"] and replayed.finite
    assert dump.try_fix(settings={"teacher_checkpoint": ""}).loss != dump.content["loss"]
    other = load_dump(file)
    other.content["teacher"]["files"] = {}
    with pytest.raises(ReplayError, match=r"^not replayed: the configuration in the dump names other files of a teac"):
        other.replay()
    moved = path.rename(tmp_path / "moved.model")
    with pytest.raises(ReplayError, match=r"^not replayed: the teacher cannot be read: no such file: '.*last.model'$"):
        load_dump(file).replay()
    torch.save({**torch.load(moved, weights_only=True), "step": 9}, path)
    with pytest.raises(ReplayError, match=r"^not replayed: the teacher's file .*last.model has changed since the run$"):
        load_dump(file).replay()
