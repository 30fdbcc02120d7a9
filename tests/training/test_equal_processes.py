"""One, two and four processes take the same steps on the same rows."""

import json

import numpy as np
import programs
import pytest

STEPS = """
import sys; sys.path.insert(0, {root!r})
import torch
import SpeakerNet, trainSpeakerNet
from storage.dump import content_hash
if {double}:
    torch.Tensor.float = torch.Tensor.double
    init, forward = SpeakerNet.SpeakerNet.__init__, SpeakerNet.SpeakerNet.forward
    def built(self, values):
        init(self, values)
        self.double()
    SpeakerNet.SpeakerNet.__init__ = built
    SpeakerNet.SpeakerNet.forward = lambda self, data, label=None: forward(self, data.double(), label)
close = SpeakerNet.ModelTrainer.close
def noting(self):
    close(self)
    state = {{**self.network.state_dict(), "optimizer": self.optimizer.state_dict()}}
    print('STATE', content_hash(state), flush=True)
SpeakerNet.ModelTrainer.close = noting
sys.exit(trainSpeakerNet.main())
"""


@pytest.fixture
def run(settings, tmp_path, write):
    """Train in so many processes; returns their output, what metrics.jsonl says, and the scores."""

    def run(world, double, **keys):
        folder = tmp_path / f"run{world}{keys.get('ddp_compress', '')}"
        script = tmp_path / "steps.py"
        script.write_text(STEPS.format(root=str(programs.ROOT), double=double))
        name = write({**settings, "batch_size": 12 // world, "save_path": str(folder), "log_interval": 1, **keys})
        done = programs.run_ranks(script, "--config", name, world=world)
        assert [process.returncode for process in done] == [0] * world, done[0].stderr + done[-1].stderr
        events = [json.loads(line) for line in (folder / "result" / "metrics.jsonl").read_text().splitlines()]
        trials = folder / "result" / f"trials_epoch_{keys['max_epoch']}.txt"
        return done, events, np.loadtxt(trials, usecols=0)

    return run


TIMES = ("utt_per_s", "data_wait_pct", "time")


def figures(events, kinds):
    chosen = [event for event in events if event["event"] in kinds]
    return [{k: v for k, v in e.items() if k not in TIMES and isinstance(v, (int, float))} for e in chosen]


@pytest.mark.parametrize(
    ("worlds", "double", "first", "close"),
    # In fp32 a rectifier within rounding of 0 is crossed now and then, which moves a gradient by more than rounding.
    [((2, 4), True, 1e-12, 1e-10), ((2,), False, 2e-6, 2e-3)],
)
def test_losses_metrics_and_scores_do_not_depend_on_the_number_of_processes(run, worlds, double, first, close):
    keys = {"sync_batchnorm": True, "max_epoch": 3, "test_interval": 3, "lr": 0.002}
    found = {world: run(world, double, **keys) for world in (1, *worlds)}
    for world in worlds:
        done, events, scores = found[world]
        states = {process.stdout.split("STATE ")[1].split()[0] for process in done}
        assert len(states) == 1, "the processes end with other weights, buffers or moments"
        assert np.abs(scores - found[1][2]).max() < close
        ours, wanted = (figures(which, ("step", "epoch", "eval")) for which in (events, found[1][1]))
        assert len(ours) == len(wanted) == 13
        for one, other in zip(ours, wanted):
            assert one.keys() == other.keys()
            for key, figure in one.items():
                bound = max(close, 1e-6) if "acc" in key else close  # accuracies are of fp32 in any case
                assert figure == pytest.approx(other[key], rel=bound, abs=bound), key
        assert ours[0]["loss"] == pytest.approx(wanted[0]["loss"], rel=first)


def test_gradients_that_are_sent_in_16_bit_train_alike_and_the_same_on_all(run):
    keys = {"max_epoch": 2, "test_interval": 2, "lr": 0.002, "optimizer": "sgd"}
    losses = {}
    for kind in ("none", "bf16"):
        done, events, _ = run(2, False, **keys, ddp_compress=kind)
        assert len({process.stdout.split("STATE ")[1].split()[0] for process in done}) == 1
        losses[kind] = np.array([event["loss"] for event in events if event["event"] == "step"])
    apart = np.abs(losses["bf16"] / losses["none"] - 1.0)
    assert apart[0] == 0.0 and 0.0 < apart[1] < 1e-3 and apart.max() < 0.05
