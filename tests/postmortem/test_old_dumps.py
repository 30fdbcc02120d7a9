"""Dumps of six keys, as the first versions wrote them, are read and analysed."""

import math

import pytest
import torch
from programs import analyser

from postmortem.analysis import analyse
from postmortem.report import text_report
from storage.dump import read_dump
from storage.files import save_atomically

OLD = {"batch_idx": 3, "epoch": 2, "label": torch.tensor([0, 1, 2, 3]), "loss": math.nan, "prec1": 0.0}


def test_old_dumps_of_six_keys(tmp_path):
    data = torch.randn(4, 20, 8)
    data[2, 3] = math.nan
    save_atomically({**OLD, "data": data}, tmp_path / "nan_batch_3_epoch_2.pt")
    analysis = analyse(tmp_path / "nan_batch_3_epoch_2.pt")
    assert analysis.verdict["cause"] == "input" and analysis.verdict["replay"]["reproduced"] is None
    save_atomically({**OLD, "data": data.nan_to_num()}, tmp_path / "sound.pt")
    assert analyse(tmp_path / "sound.pt").verdict["cause"] == "unknown"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ["lower the learning rate", "lr: 0.0005", "scale: 20", "mixedprec: false", "margin: 0.1", "grad_clip: 1"]),
        ({"data": torch.full((4, 9), math.nan)}, ["check the audio files", "musan_path", "DatasetLoader.py"]),
        ({"data": torch.full((4, 9), 1.23e8)}, ["normalise the input", "lr: 0.0005", "check the augmentation"]),
        ({"label": torch.tensor([0, -1, 2, 3])}, ["check that nClasses fits", "train_list"]),
    ],
)
def test_an_old_dump_says_what_to_look_at(tmp_path, change, words):
    path = tmp_path / "nan_batch_3_epoch_2.pt"
    save_atomically({**OLD, "data": torch.randn(4, 9), **change}, path)
    analysis = analyse(path)
    assert {fix["verdict"] for fix in analysis.verdict["recommendations"]} == {"untested"}
    text = "\n".join(text_report(analysis)).partition("--- RECOMMENDATIONS ---")[2]
    assert all(word in text for word in words) and text.count("an old dump has no weights") == 1


def test_an_old_dump_of_a_sound_step_recommends_nothing(tmp_path):
    save_atomically({**OLD, "data": torch.randn(4, 9), "loss": 2.5}, tmp_path / "sound.pt")
    assert analyse(tmp_path / "sound.pt").verdict["recommendations"] == []


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (4, 100), (1, 4, 100), (4, 20, 8)])
@pytest.mark.parametrize("fill", [0.0, math.nan])
def test_statistics_of_odd_shapes(tmp_path, shape, fill):
    path = tmp_path / "nan_batch_3_epoch_2.pt"
    save_atomically({**OLD, "data": torch.full(shape, fill)}, path)
    done = analyser(path)
    assert done.returncode == 0, done.stderr
    for title in ("BASIC INFORMATION", "DATA TENSOR ANALYSIS", "LABEL ANALYSIS", "POTENTIAL ISSUES", "RECOMMENDATIONS"):
        assert f"--- {title} ---" in done.stdout


@pytest.mark.parametrize(
    "loss", [math.nan, 3, torch.tensor(math.nan), torch.tensor([1.5], requires_grad=True), torch.tensor(2)]
)
@pytest.mark.parametrize(
    "data", [torch.randn(4, 20, 6), torch.zeros(4, 0), torch.full((1, 4, 1, 3), math.nan), torch.tensor(0.5)]
)
def test_dumps_of_six_keys_are_format_0(loss, data, tmp_path):
    path = tmp_path / "nan_batch_3_epoch_1.pt"
    torch.save({**OLD, "loss": loss, "prec1": loss, "data": data, "label": torch.arange(4, dtype=torch.uint8)}, path)
    read = read_dump(path)
    assert type(read["loss"]) is type(read["prec1"]) is float and read.keys() == {*OLD, "data"}
    assert str(read["loss"]) == str(float(torch.as_tensor(loss).detach())) and read["data"].shape == data.shape
