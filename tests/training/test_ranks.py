"""What several processes tell each other before they train: differences and failures, with rank and host."""

import copy
import os
import socket
import subprocess
import sys

import programs
import pytest
import torch

from errors import SharedError, UsageError
from storage.dump import content_hash
from training.agreement import failing_together, refuse_differences
from training.ranks import Ranks, meeting_place
from training.state import own_part


def run_two(root, first, second):
    """(exit status, stderr) of two processes, each as on a machine of its own."""
    done = programs.run_ranks(root / "trainSpeakerNet.py", first, second, machines=2)
    return [(process.returncode, process.stderr) for process in done]


def test_two_machines_with_other_train_lists_do_not_train(settings, tools, write, data, tmp_path):
    path = write(settings)
    lines = (data / "train_list.txt").read_text().splitlines()
    (tmp_path / "other.txt").write_text("\n".join(line.replace("train000 ", "zz ") for line in lines))
    (status, error), (other, silent) = run_two(
        tools.root, ["--config", path], ["--config", path, "--train_list", tmp_path / "other.txt"]
    )
    assert (status, other, silent) == (2, 2, "") and len(error.splitlines()) == 1, (error, silent)
    assert error.startswith("train_list: differs between the processes (as do speakers)")
    assert f"on rank 1 on {socket.gethostname()}" in error
    assert not (tmp_path / "run" / "model" / "last.model").exists()


def test_a_process_that_fails_early_takes_the_others_with_it(settings, tools, write):
    path = write(settings)
    (status, error), (other, own) = run_two(tools.root, ["--config", path], ["--config", "nowhere.yaml"])
    line = f"rank 1 on {socket.gethostname()}: nowhere.yaml: cannot read the configuration: No such file or directory\n"
    assert (status, other) == (2, 2) and error == own == line


@pytest.mark.parametrize("local, printed", [("0", True), ("1", False)])
def test_a_usage_error_is_said_on_every_machine(tools, local, printed):
    environment = {**os.environ, "RANK": "3", "LOCAL_RANK": local}
    words = [sys.executable, str(tools.root / "trainSpeakerNet.py"), "--config", "nowhere.yaml"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2 and bool(done.stderr) is printed
    assert not printed or done.stderr.startswith(f"rank 3 on {socket.gethostname()}: nowhere.yaml")


def test_two_runs_on_one_machine_do_not_collide():
    assert meeting_place("auto") == ["--standalone"] and meeting_place("29500") == ["--master_port", "29500"]
    with pytest.raises(UsageError, match="port: expected auto"):
        meeting_place("99999")


class Two:
    """Rank 0 of two processes; ``other`` is what rank 1 gives to a collective."""

    world = 2

    def __init__(self, other):
        self.other = other

    def gather(self, value):
        return [value, self.other]


def test_a_process_without_the_state_of_the_others_is_named():
    with (
        pytest.raises(SharedError, match=r"^rank 1 on b: last.model: no such file$"),
        failing_together(Two(("last.model: no such file", "rank 1 on b: "))),
    ):
        pass
    with (
        pytest.raises(SharedError, match=r"^lr: too high$"),  # all say the same: once
        failing_together(Two(("lr: too high", "rank 1 on b: "))),
    ):
        raise UsageError("lr: too high")
    with pytest.raises(SharedError, match=r"^step: differs between the processes: 7 on rank 1 on b, 9 on "):
        refuse_differences(Two(("rank 1 on b", {"step": 7})), {"step": 9})


def test_each_process_goes_on_from_its_own_faults():
    ranks = type("Ranks", (), {"rank": 1, "world": 2})
    assert own_part([{"written": 1}, {"written": 5}], ranks) == {"written": 5}
    assert own_part([{"written": 1}], ranks) == own_part({"written": 1}, ranks) == {"written": 1}


def trained(steps):
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        layer(torch.full((2, 4), step + 1.0)).square().sum().backward()
        optimizer.step()
    return layer, optimizer


@pytest.mark.parametrize("part", ["weight", "moment"])
def test_a_process_whose_moments_drifted_gets_those_of_the_first_too(monkeypatch, part):
    main, main_optimizer = trained(2)
    layer, optimizer = trained(2)
    with torch.no_grad():
        if part == "weight":  # two elements, so that the sum stays the same
            layer.weight[0, 0] += 1.0
            layer.weight[0, 1] -= 1.0
        else:
            optimizer.state[layer.weight]["exp_avg"][0, 0] += 1e-7
    ours, theirs = list(layer.parameters()), list(main.parameters())
    ranks = object.__new__(Ranks)
    ranks.world, ranks.rank = 2, 1
    state = copy.deepcopy(main_optimizer.state_dict())
    hashed = content_hash({"tensors": theirs, "optimizer": state})
    ranks.gather = lambda own: [hashed, own]
    ranks.from_main = lambda value: copy.deepcopy(state)
    sent = iter(theirs)
    monkeypatch.setattr("training.ranks.dist.broadcast", lambda tensor, src: tensor.copy_(next(sent).detach()))
    assert ranks.reconcile(ours, optimizer) == [1]
    assert content_hash({"tensors": ours, "optimizer": optimizer.state_dict()}) == hashed
    assert ranks.reconcile(ours, optimizer) == []
