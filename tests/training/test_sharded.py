"""Runs whose weights are shared out over the processes, and what they leave to runs of one process and the analysis."""

import json

import programs
import pytest
import torch
from torch import nn
from torch.distributed import fsdp

from errors import UsageError
from storage.dump import read_dump
from training.sharded import is_sharded, shard, whole

SCRIPT = programs.ROOT / "tests" / "training" / "sharded_steps.py"
needs_torch = pytest.mark.skipif(
    not hasattr(getattr(fsdp, "FSDPModule", None), "set_reshard_after_forward"), reason="fsdp needs torch 2.8"
)


@needs_torch
def test_steps_faults_updates_and_files_of_two_processes(settings, write, tmp_path):
    done = programs.run_ranks(SCRIPT, write(settings))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    dumps = sorted(tmp_path.glob("runspoil_row*/debug_nan/nan_*_rank1.pt"))
    assert len(dumps) == 2
    for found in map(json.loads, programs.analyser(*dumps, "--json").stdout.splitlines()):
        assert found["replay"]["reproduced"] == "bit_equal", found
        over_all = any("the statistics of the rows of 2 processes" in text for text in found["evidence"])
        assert over_all == ("sync_batchnorm" in found["file"])


@needs_torch
def test_a_run_goes_on_in_one_process_and_its_dump_is_replayed_there(settings, tools, write, tmp_path):
    keys = {**settings, "fsdp": True, "nan_inject": "2:loss@1", "max_epoch": 1, "test_interval": 1}
    done, other = programs.run_ranks(tools.root / "trainSpeakerNet.py", "--config", write(keys))
    assert done.returncode == other.returncode == 0, done.stderr + other.stderr
    assert not done.stderr + other.stderr  # torch warns of a loss that is a view
    assert "fsdp: this process keeps 8,792 of 17,458 weights, in 5 parts" in done.stdout
    state = torch.load(tmp_path / "run" / "model" / "last.model", weights_only=True)
    assert state["model_state_dict"]["__L__.weight"].shape == (6, 12)
    (path,) = (tmp_path / "run" / "debug_nan").glob("nan_*.pt")
    assert path.name.endswith("_rank1.pt") and read_dump(path)["param_stats"]["__L__.weight"]["numel"] == 72
    found = json.loads(programs.analyser(path, "--json").stdout)
    assert found["detail"] == "injected" and found["replay"]["reproduced"] == "vanished"
    done = tools.command("--config", write({**keys, "max_epoch": 2, "nan_inject": ""}))
    assert done.returncode == 0, done.stderr
    assert "fsdp: does nothing in one process" in done.stdout and "resuming from" in done.stdout


@pytest.mark.parametrize(
    "key, value",
    [("class_parallel", True), ("class_sample_rate", 0.5), ("compile_model", "auto"), ("ddp_compress", "bf16")],
)
def test_what_fsdp_cannot_be_combined_with_is_said_in_a_line(settings, tools, write, key, value):
    done = tools.command("--config", write({**settings, "fsdp": True, key: value}))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"fsdp: cannot be combined with {key}; remove one of them" in done.stderr


@needs_torch
def test_a_single_number_and_an_old_torch_are_refused(monkeypatch):
    network = nn.Module()
    network.__L__ = nn.Module()
    network.__L__.w = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(UsageError, match=r"^fsdp: 'loss.w' is a single number, which cannot be shared out"):
        shard(network, [], print)
    monkeypatch.delattr(fsdp.FSDPModule, "set_reshard_after_forward")
    with pytest.raises(UsageError, match=r"^fsdp: needs torch 2.8 or later, this is \d"):
        shard(network, [], print)


def test_a_network_that_is_not_sharded_is_whole():
    network = nn.Linear(2, 2)
    with whole(network):
        assert not is_sharded(network)
