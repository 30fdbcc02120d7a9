"""Numbers that a plug-in computes with numpy cost no file."""

from collections import OrderedDict

import numpy as np
import pytest
import torch

from corpus.plain import plain
from storage import checkpoint
from storage.files import save_atomically
from storage.restricted import load_plain
from storage.seal import save_sealed

STATE = {"lr": np.float64(0.1), "base": [np.float32(0.5), 2], np.int64(3): (np.bool_(True), "x"), "a": np.arange(3.0)}


def test_numbers_become_plain_and_all_else_stays():
    found = plain(STATE)
    assert [type(v) for v in (found["lr"], found["base"][0], found[3][0])] == [float, float, bool]
    assert found["lr"] == 0.1 and found["base"] == [0.5, 2] and found[3] == (True, "x")
    assert torch.equal(found["a"], torch.arange(3.0).double())
    kept = OrderedDict(w=torch.zeros(2), v=[1, "t", None, {"k": 2.0}])
    assert plain(kept) is kept and plain(kept["v"]) is kept["v"]


@pytest.mark.parametrize("save", [save_atomically, save_sealed])
def test_a_file_with_numbers_of_numpy_is_read_again(tmp_path, save):
    save({"state": STATE, "w": torch.ones(2)}, tmp_path / "a.pt")
    found = load_plain(tmp_path / "a.pt")
    assert found["state"]["lr"] == 0.1 and torch.equal(found["w"], torch.ones(2))


def test_a_run_whose_schedule_computes_with_numpy_goes_on(settings, tools):
    trainer = tools.build(settings)
    trainer.optimizer.param_groups[0]["lr"] = np.float64(0.0125)
    trainer.saver.last()
    state = checkpoint.load(trainer.files.model / "last.model")
    assert type(state["optimizer_state_dict"]["param_groups"][0]["lr"]) is float
    again = tools.build(settings)
    assert again.resume() and again.optimizer.param_groups[0]["lr"] == 0.0125
