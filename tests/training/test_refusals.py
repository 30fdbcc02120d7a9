"""Operations that raise an exception for their numbers, where others give NaN, cost one step."""

import math

import numpy as np
import programs
import pytest
import scipy.linalg
import torch
from trainers import train

from errors import UsageError, refuses_numbers
from storage.dump import read_dump
from training.progress import step_schedule
from training.ranks import SingleProcess
from training.step import Step


def no_factors(data):
    torch.linalg.cholesky(-torch.eye(2))


def no_scale(data):
    torch.distributions.Normal(0.0, torch.zeros(1), validate_args=True)  # as is usual, unless torch 2.4 has compiled


def no_divisor(data):
    1.0 / int(data.sum() * 0.0)


def no_such_number(data):
    torch.zeros(2, dtype=torch.float16).masked_fill(torch.ones(2, dtype=torch.bool), -1e9)


REFUSED = [(no_factors, "LinAlgError: linalg.cholesky"), (no_scale, "constraint")]
REFUSED += [(no_divisor, "ZeroDivisionError"), (no_such_number, "without overflow")]
OF_NUMBERS = {
    "math.log(0.0)": lambda: math.log(0.0),
    "math.sqrt(-1.0)": lambda: math.sqrt(-1.0),
    "math.exp(1000.0)": lambda: math.exp(1000.0),
    "0.0 ** -0.5": lambda: 0.0**-0.5,
    "int(nan)": lambda: int(math.nan),
    "int(inf)": lambda: int(math.inf),
    "inverse of numpy": lambda: np.linalg.inv(np.zeros((2, 2))),
    "division of numpy": lambda: np.errstate(all="raise")(lambda: np.zeros(1) / np.zeros(1))(),
    "factors of scipy": lambda: scipy.linalg.svd(np.full((2, 2), math.nan)),
    "largest of none": lambda: torch.zeros(0).max(),
    "largest of no frames": lambda: torch.zeros(2, 0).max(dim=1),
    "largest of none in numpy": lambda: np.zeros(0).max(),
    "place of the largest of none": lambda: np.zeros(0).argmax(),
    "first of none": lambda: np.flatnonzero(np.zeros(3))[0],
    "first of none in torch": lambda: torch.zeros(3).nonzero()[0],
}
OF_CODE = {
    "a list": lambda: [][len("")],
    "a key": lambda: {}["key"],
    "shapes": lambda: torch.zeros(2, 3) @ torch.zeros(2, 3),
    "a type": lambda: torch.zeros(2).masked_fill(torch.zeros(2), 0.0),
    "a name": lambda: no_name,  # noqa: F821
}


@pytest.mark.parametrize("name", OF_NUMBERS | OF_CODE)
def test_exceptions_for_numbers_are_told_from_those_of_code(name):
    with pytest.raises(Exception) as caught:
        (OF_NUMBERS | OF_CODE)[name]()
    assert refuses_numbers(caught.value) == (name in OF_NUMBERS)


def test_a_rate_that_python_cannot_compute_is_nan_and_the_schedule_stays_where_it_was():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (3 - step))
    rates = []
    for _ in range(4):
        optimizer.step()
        step_schedule(schedule, optimizer, "scheduler/own.py")
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:2] == pytest.approx([0.05, 0.1]) and all(map(math.isnan, [*rates[2:], *schedule.get_last_lr()]))
    schedule.lr_lambdas = [lambda step: {}["key"]]
    with pytest.raises(UsageError, match=r"scheduler/own\.py: KeyError"):
        step_schedule(schedule, optimizer, "scheduler/own.py")


def no_code(data):
    raise ValueError("a mistake in a plug-in")


@pytest.mark.parametrize("check", ["now", "late"])
@pytest.mark.parametrize("refuse, words", REFUSED)
def test_an_operation_that_refuses_its_numbers_costs_one_step(settings, tools, refuse, words, check, capsys):
    """torch raises an exception where other libraries give NaN; code that is wrong still ends the run."""
    trainer, other = (tools.build(settings, nan_check=check, save_path=f"{settings['save_path']}_{n}") for n in "ab")
    batches = tools.batches(trainer)[:3]
    bad = batches[1]["data"]

    def refuse_one(module, inputs, output):  # after a forward pass that has moved the statistics of BatchNorm
        if torch.equal(inputs[0], bad):
            refuse(bad)

    trainer.network.register_forward_hook(refuse_one)
    train(trainer, batches)
    trainer.settle()
    trainer.close()
    other.progress.batch = 0
    for batch in (batches[0], batches[2]):
        other.progress.batch += 1
        other.train_step([batch])
        other.settle()
        other.progress.batch += batch is batches[0]
    tools.assert_same(tools.snapshot(trainer), tools.snapshot(other))
    (path,) = trainer.incidents.writer.folder.glob("nan_batch_2_*.pt")
    assert read_dump(path)["reason"] == "loss_nonfinite" and math.isnan(read_dump(path)["loss"])
    out = capsys.readouterr().out
    assert words in out and "Training goes on" in out and "test_refusals.py" in out
    refuse = no_code
    with pytest.raises(ValueError, match="a mistake"):
        train(trainer, [batches[1]])


@pytest.mark.parametrize("check", ["now", "late"])
def test_an_optimizer_that_refuses_its_numbers_costs_one_step(settings, tools, check, capsys):
    """The update has moved some weights by then, which are put back with the moments."""
    trainer, other = (tools.build(settings, nan_check=check, save_path=f"{settings['save_path']}_{n}") for n in "ab")
    batches = tools.batches(trainer)[:3]
    refuse = no_factors
    hook = trainer.optimizer.register_step_post_hook(
        lambda *_: trainer.progress.batch == 2 and refuse(trainer.step.parameters)
    )
    train(trainer, batches)
    trainer.settle()
    other.progress.batch = 0
    for batch in (batches[0], batches[2]):
        other.progress.batch += 1
        other.train_step([batch])
        other.settle()
        other.progress.batch += batch is batches[0]
    tools.assert_same(tools.snapshot(trainer), tools.snapshot(other))
    assert trainer.progress.totals["skipped"] == 1
    refuse = no_code
    trainer.progress.batch = 2
    with pytest.raises(UsageError, match="its step fails: ValueError: a mistake"):
        trainer.train_step([batches[1]])
    hook.remove()
    trainer.close()
    (path,) = trainer.incidents.writer.folder.glob("nan_batch_2_*.pt")
    dump = read_dump(path)
    assert dump["reason"] == "state_nonfinite" and dump["state"] and not dump.get("update_stats")
    out = capsys.readouterr().out
    assert "the optimizer's update fails: " in out and "LinAlgError: linalg.cholesky" in out
    assert "Training goes on" in out


REFUSES = """
import sys; sys.path.insert(0, {root!r})
import torch
import SpeakerNet, trainSpeakerNet
from storage.dump import content_hash
start, close, seen = SpeakerNet.ModelTrainer.enter_epoch, SpeakerNet.ModelTrainer.close, []
def refuse(module, inputs, output):
    if module.training:
        seen.append(content_hash({{"rows": inputs[0]}}))
        if seen[-1] in seen[1:2]:  # the second batch, however often it is computed
            torch.linalg.cholesky(-torch.eye(2))
def entered(self):
    start(self)
    if self.ranks.rank == 1 and not seen:
        self.network.register_forward_hook(refuse)
def closing(self):
    close(self)
    print("STATE", content_hash(self.network.state_dict()), flush=True)
SpeakerNet.ModelTrainer.enter_epoch, SpeakerNet.ModelTrainer.close = entered, closing
sys.exit(trainSpeakerNet.main())
"""


@pytest.mark.parametrize("check", ["now", "late"])
def test_an_operation_that_refuses_the_numbers_of_one_process_costs_all_one_step(settings, tmp_path, write, check):
    """The process at fault answers the others with gradients of NaN: they wait for it in the backward pass."""
    script = tmp_path / "refuses.py"
    script.write_text(REFUSES.format(root=str(programs.ROOT)))
    keys = {**settings, "batch_size": 4, "max_epoch": 1, "test_interval": 1, "process_timeout": 30, "nan_check": check}
    done = programs.run_ranks(script, "--config", write(keys))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    assert len({process.stdout.split("STATE ")[1].split()[0] for process in done}) == 1
    (path,) = (tmp_path / "run" / "debug_nan").glob("nan_*.pt")
    assert path.name == "nan_batch_2_epoch_1_rank1.pt" and read_dump(path)["reason"] == "loss_nonfinite"
    out = done[0].stdout + done[1].stdout
    assert "LinAlgError: linalg.cholesky" in out and "left out: 1 step" in out


def test_the_norm_of_no_gradients_is_where_those_of_a_step_are():
    step = Step(torch.nn.Linear(2, 2, device="meta"), SingleProcess(torch.device("meta")))
    assert step.norm([]).device == step.device
