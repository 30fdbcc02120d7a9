"""What several processes tell each other before they train: differences and failures, with rank and host."""

import copy
import datetime
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import programs
import pytest
import torch

from config import Config
from errors import Finished, SharedError, UsageError
from storage import checkpoint
from storage.files import save_atomically
from training import ranks
from training.agreement import failing_together, refuse_differences
from training.averaging import MovingAverage
from training.drift import digests, refuse_drift
from training.ranks import meet, meeting_place
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


def test_keys_of_several_processes_say_that_they_do_nothing_in_one(settings, tools, capsys):
    tools.build(settings, sync_batchnorm=True, ddp_compress="bf16")
    said = [line for line in capsys.readouterr().out.splitlines() if "does nothing in one process" in line]
    assert [line.partition(":")[0] for line in said] == ["sync_batchnorm", "ddp_compress"]


def test_two_runs_on_one_machine_do_not_collide():
    assert meeting_place("auto") == ["--standalone"] and meeting_place("29500") == ["--master_port", "29500"]
    with pytest.raises(UsageError, match="port: expected auto"):
        meeting_place("99999")


def test_processes_that_do_not_meet_say_where_in_a_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "0")
    soon = datetime.timedelta(seconds=1)  # torch 2.4 knows whole seconds only
    with socket.socket() as taken:
        taken.bind(("", 0))
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(UsageError, match=r"^the processes cannot meet at 127.0.0.1:\d+ \(MASTER_ADDR, MASTER"):
            meet(soon)
    with pytest.raises(UsageError, match=r"^not all 2 processes have started within 0.0167 min \(process_timeout\)$"):
        meet(soon)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UsageError, match=r"^the processes cannot meet at 127.0.0.1:\d+ .*timed out") as said:
        meet(soon)
    assert "\n" not in str(said.value)
    monkeypatch.setattr(ranks, "FAREWELL", soon)
    ranks.tell_the_others("nobody hears it")
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UsageError, match="MASTER_ADDR expected, but not set"):
        meet(soon)


@pytest.mark.parametrize("world, said", [("1", "gpu_id: there is no GPU 2"), ("4", "--nproc_per_node: there is")])
def test_a_process_without_a_gpu_of_its_own_is_told_by_what_chose_it(monkeypatch, world, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setenv("LOCAL_RANK", "2")

    def meet(timeout, failure):
        raise SharedError(failure)

    monkeypatch.setattr(ranks, "meet", meet)
    with pytest.raises(UsageError, match=f"^{said}"):
        ranks.Ranks(Config(gpu_id=2))


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_the_only_gpu_that_a_scheduler_gives_a_process_is_its_own(monkeypatch, under_torchrun):
    """As by `srun --gpus-per-task 1`; torchrun's processes all see the same ones."""
    met = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", met.append)
    monkeypatch.setattr(ranks.dist, "init_process_group", lambda *given, **named: met.append(named["device_id"]))
    monkeypatch.setattr(ranks, "host_group", lambda timeout: None)
    monkeypatch.setattr(ranks, "meet", lambda timeout, failure: met.append(failure))
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "2"), ("LOCAL_RANK", "2"), ("CUDA_VISIBLE_DEVICES", "2")):
        monkeypatch.setenv(name, value)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    ranks.Ranks(Config())
    if under_torchrun:
        assert met[0] == "--nproc_per_node: there is no GPU for local process 2, only 1 here"
    else:
        assert met == ["", torch.device("cuda:0"), torch.device("cuda:0")]


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
    average = MovingAverage(layer, 0.9)
    average.update()
    return SimpleNamespace(network=layer, optimizer=optimizer, average=average)


class Same:
    """Rank 1 of two processes; rank 0 gives to each collective what ``main`` gives here, in turn."""

    world = 2

    def __init__(self, main):
        self.main = iter(main)

    def gather(self, value):
        return [next(self.main), value]


class Recording(Same):
    """Rank 0 of two processes, which hold the same: what it gives to each collective is kept."""

    def __init__(self):
        self.given = []

    def gather(self, value):
        self.given.append(value)
        return [value, value]


@pytest.mark.parametrize("part", ["", "weight", "exp_avg of weight", "average of weight", "optimizer.param_groups"])
def test_a_process_that_drifted_ends_the_run_with_the_name_of_what_differs(tmp_path, monkeypatch, part):
    monkeypatch.setenv("RANK", "1")
    main, ours = trained(2), trained(2)
    whole = Recording()
    refuse_drift(whole, main, main.average, tmp_path)  # both are the same
    with torch.no_grad():
        if part == "weight":  # two elements, so that the sum stays the same
            ours.network.weight[0, 0] += 1.0
            ours.network.weight[0, 1] -= 1.0
        elif part == "exp_avg of weight":
            ours.optimizer.state[ours.network.weight]["exp_avg"][0, 0] += 1e-7
        elif part == "average of weight":
            ours.average.tensors["weight"][2, 3] += 1e-7
        elif part:
            ours.optimizer.param_groups[0]["lr"] *= 1.5
    ranks = Same([*whole.given, ("rank 0 on a", digests(main, main.average))])
    if not part:
        refuse_drift(ranks, ours, ours.average, tmp_path)
        return
    with pytest.raises(Finished) as end:
        refuse_drift(ranks, ours, ours.average, tmp_path)
    place = f"rank 1 on {socket.gethostname()}"
    assert end.value.status == 7 and "last.model is from before" in end.value.lines[1]
    assert end.value.lines[0].startswith(f"{place}: '{part}' differs from that of rank 0")


SPARE = """
import sys; sys.path.insert(0, {root!r})
import torch
import SpeakerNet, trainSpeakerNet
build = SpeakerNet.SpeakerNet.__init__
def with_spare(self, *given):
    build(self, *given)
    self.__S__.spare = torch.nn.Parameter(torch.zeros(3))
SpeakerNet.SpeakerNet.__init__ = with_spare
sys.exit(trainSpeakerNet.main())
"""


def test_a_parameter_that_the_loss_does_not_depend_on_is_named(settings, tools, write, tmp_path):
    """Of one process it is no mistake; of several torch says it in the second step, in words of its own."""
    script = tmp_path / "spare.py"
    script.write_text(SPARE.format(root=str(tools.root)))
    path = write({**settings, "batch_size": 4, "max_epoch": 1, "test_interval": 1, "process_timeout": 30})
    done = programs.run_ranks(script, "--config", path)
    assert [process.returncode for process in done] == [2, 2], done[0].stderr
    what = "the loss does not depend on 1 parameter of the network: __S__.spare; "
    assert done[0].stderr == f"{what}take them out, or set find_unused_parameters: true\n", done[0].stderr
    done = programs.run_ranks(script, "--config", path, "--find_unused_parameters", "true")
    assert [process.returncode for process in done] == [0, 0], done[0].stderr


def test_the_state_of_hundreds_of_processes_can_be_read_again(settings, tools):
    trainer = tools.build(settings)
    figures = ("loss", "accuracy", "grad_norm", "lr", "scale")
    trainer.incidents.history.extend({"step": n, **dict.fromkeys(figures, n / 7)} for n in range(1000))
    state = trainer.state.capture()
    trainer.incidents.ranks = SimpleNamespace(main=False)
    others = trainer.incidents.state_dict()
    state["incidents"] += [copy.deepcopy(others) for _ in range(299)]
    state["rng_state"] *= 300
    assert checkpoint.unreadable(state) == ""
    again = tools.build(settings)
    save_atomically(state, again.files.model / "last.model")
    again.ranks.rank, again.ranks.world = 7, 300
    again.ranks.from_main = lambda value: (again.files.model / "last.model", "")
    assert again.resume() and again.incidents.history == trainer.incidents.history
