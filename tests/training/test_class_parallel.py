"""Runs whose classes are split over processes, and what they leave to runs of one process and to the analysis."""

import json
import re

import programs
import pytest
import torch

from storage.dump import read_dump

SCRIPT = programs.ROOT / "tests" / "training" / "split_steps.py"


def test_steps_faults_updates_and_files_of_two_processes(settings, write):
    done = programs.run_ranks(SCRIPT, write(settings))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr


def test_a_run_goes_on_in_one_process_and_its_dump_is_replayed_there(settings, tools, write, tmp_path):
    keys = {**settings, "class_parallel": True, "nan_inject": "2:loss@1", "max_epoch": 1}
    done, other = programs.run_ranks(tools.root / "trainSpeakerNet.py", "--config", write(keys))
    assert done.returncode == other.returncode == 0, done.stderr + other.stderr
    assert "class_parallel: each process has 3 of the 6 rows of 'loss.weight'" in done.stdout
    state = torch.load(tmp_path / "run" / "model" / "last.model")
    assert state["model_state_dict"]["__L__.weight"].shape == (6, 12)
    (path,) = (tmp_path / "run" / "debug_nan").glob("nan_*.pt")
    assert path.name.endswith("_rank1.pt")
    dump = read_dump(path)
    weights = torch.load(path.parent / dump["state"], weights_only=True)["model_state_dict"]
    assert weights["__L__.weight"].shape == (6, 12)
    found = json.loads(programs.analyser(path, "--json").stdout)
    assert found["cause"] == "environment" and found["replay"]["reproduced"] == "vanished"
    assert any("split over 2 processes (class_parallel); replayed whole, in one" in text for text in found["evidence"])
    done = tools.command("--config", write({**keys, "max_epoch": 2, "nan_inject": ""}))
    assert done.returncode == 0, done.stderr
    assert "class_parallel: does nothing in one process" in done.stdout and "resuming from" in done.stdout


def test_a_share_that_draws_no_class_is_refused(settings, tools, write):
    done = tools.command("--config", write({**settings, "trainfunc": "aamsoftmax", "class_sample_rate": 0.01}))
    said = r"class_sample_rate: 0\.01 draws 0\.0\d of \d other classes, and without any nothing is learnt; take"
    assert done.returncode == 2 and re.search(said, done.stderr), done.stderr


@pytest.mark.parametrize("key, value", [("class_parallel", True), ("class_sample_rate", 0.5)])
def test_a_loss_without_class_weights_is_refused(settings, tools, write, key, value):
    done = tools.command("--config", write({**settings, "trainfunc": "proto", "nPerSpeaker": 2, key: value}))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert (
        f"{key}: loss 'proto' (trainfunc) has no class weights that can be split or drawn; these have: aamsoftmax"
        in done.stderr
    )
