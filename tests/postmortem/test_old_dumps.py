"""Dumps of six keys, as the first versions wrote them, are read and analysed."""

import math

import pytest
import torch
from programs import analyser

from postmortem.analysis import analyse
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
