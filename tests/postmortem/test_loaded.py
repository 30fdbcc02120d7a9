"""``load_dump``: a dump in a notebook. What it says is the step of the run, and a change is tried on that step."""

import math
import re
import subprocess
import sys

import numpy as np
import programs
import pytest
import torch

from postmortem import load_dump
from postmortem.replay import ReplayError
from storage.dump import read_dump
from storage.files import save_atomically

GUIDE = programs.ROOT / "docs" / "nan_debugging.md"


def with_bad_row(path):
    """Put NaN into row 1 of a dump, as a corrupt file does, and call it no rehearsal."""
    dump = read_dump(path)
    dump["data"][0, 1, 100:140] = math.nan
    save_atomically({**dump, "injected": "", "reason": "loss_nonfinite", "loss": math.nan}, path)
    return path


def test_a_replayed_step_is_that_of_the_run(dump_of):
    path = dump_of(nan_inject="2:grad")  # the loss of the step was computed before it
    recorded, step = read_dump(path), load_dump(path).replay()
    assert step.loss == recorded["loss"] and step.finite and step.first_bad is None
    assert step.gradients.keys() == recorded["grad_stats"].keys()
    total = math.sqrt(sum(float(g.double().square().sum()) for g in step.gradients.values()))
    assert total == pytest.approx(step.norm, rel=1e-5)


def test_the_first_bad_operation_is_named(dump_of):
    def spoil(trainer):
        forward = trainer.network.__S__.forward
        trainer.network.__S__.forward = lambda x: forward(x * 0.0)
        with torch.no_grad():
            trainer.network.state_dict()["__L__.weight"].fill_(math.inf)

    first = load_dump(dump_of(spoil)).replay().first_bad
    assert (first.phase, first.module) == ("forward", "__L__")
    assert re.fullmatch(r"(loss/aamsoftmax|utils)\.py:\d+", first.source) and first.op


def test_rows_are_those_of_the_batch(dump_of):
    dump = load_dump(dump_of(nan_inject="1:loss"))
    content = dump.content
    assert len(dump.rows) == content["data"].shape[0] * content["data"].shape[1]
    row = dump.rows[2]
    assert np.array_equal(row.audio(), content["data"][0, 2].numpy()) and row.audio().dtype == np.float32
    assert (row.path, row.label) == (content["files"][2]["path"], int(content["label"][2]))
    assert row.files == [row.path]
    row.audio()[:] = 5  # a copy: the batch that is replayed stays as it was
    assert float(content["data"].abs().max()) < 5


def test_each_change_is_tried_on_the_step(dump_of):
    dump = load_dump(with_bad_row(dump_of(nan_inject="1:loss")))
    assert not dump.replay().finite
    without = dump.try_fix(without_rows=[1])
    assert without.finite and math.isfinite(without.loss) and math.isfinite(without.norm)
    assert not dump.try_fix(without_rows=[0]).finite
    assert not dump.try_fix(dtype=torch.float64).finite and not dump.try_fix(settings={"scale": 5}).finite
    assert dump.try_fix(data=dump.content["data"].nan_to_num()).finite
    with pytest.raises(ValueError, match="expected one of settings, dtype"):
        dump.try_fix(dtype="float32", without_rows=[1])
    with pytest.raises(ValueError, match="no key 'scael'"):
        dump.try_fix(settings={"scael": 5})
    with pytest.raises(ValueError, match="there is no row 9"):
        dump.try_fix(without_rows=[9])
    with pytest.raises(ValueError, match="'int8'"):
        dump.try_fix(dtype=torch.int8)


def test_an_edit_may_replace_modules_and_ends_with_its_trial(dump_of):
    dump = load_dump(dump_of(nan_inject="1:loss"))
    before = dump.replay().loss

    class Louder(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.gain = inner, torch.nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return self.inner(x * self.gain) * self.gain.log().sign() + self.gain * math.inf * 0

    def edit(network):
        network.__S__ = Louder(network.__S__)

    assert not dump.try_fix(edit=edit).finite
    assert dump.replay().loss == before


def test_a_notebook_keeps_its_generators_and_threads(dump_of):
    path = dump_of(nan_inject="1:loss")
    torch.manual_seed(5)
    generators, threads = torch.get_rng_state(), torch.get_num_threads()
    load_dump(path).try_fix(dtype="float64")
    assert torch.equal(torch.get_rng_state(), generators) and torch.get_num_threads() == threads


def test_a_dump_without_its_state_says_so(dump_of):
    path = dump_of(nan_inject="1:loss")
    dump = read_dump(path)
    save_atomically({**dump, "state": ""}, path)
    with pytest.raises(ReplayError, match="weights are missing"):
        load_dump(path).replay()


def test_importing_the_room_imports_no_torch():
    words = "import sys; from postmortem import load_dump; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", words], cwd=programs.ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_the_example_of_the_guide_runs(dump_of, tmp_path, monkeypatch):
    """The blocks of the guide, in the order in which they stand, on the dump that they name."""
    text = GUIDE.read_text(encoding="utf-8").split("## From Python")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (name,) = set(re.findall(r'load_dump\("(.*?)"\)', text))
    monkeypatch.chdir(tmp_path)
    found = with_bad_row(dump_of(nan_inject="1:loss", save_path="exps/run"))
    (tmp_path / found).rename(tmp_path / name)
    names = {}
    for block in blocks:
        exec(block, names)
    assert [row.index for row in names["bad"]] == [1] and names["outcome"].finite
