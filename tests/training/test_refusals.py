"""Operations that raise an exception for their numbers, where others give NaN, cost one step."""

import math

import programs
import pytest
import torch
from trainers import train

from errors import UsageError
from storage.dump import read_dump
from training.ranks import SingleProcess
from training.step import Step


def no_factors(data):
    torch.linalg.cholesky(-torch.eye(2))


def no_scale(data):
    torch.distributions.Normal(0.0, torch.zeros(1), validate_args=True)  # as is usual, unless torch 2.4 has compiled


def no_code(data):
    raise ValueError("a mistake in a plug-in")


@pytest.mark.parametrize("check", ["now", "late"])
@pytest.mark.parametrize("refuse, words", [(no_factors, "LinAlgError: linalg.cholesky"), (no_scale, "constraint")])
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
