"""One, two and four processes take the same steps on the same rows."""

import json

import numpy as np
import programs
import pytest

STEPS = """
import sys; sys.path.insert(0, {root!r})
import SpeakerNet, trainSpeakerNet
from storage.dump import content_hash
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
    script = tmp_path / "steps.py"
    script.write_text(STEPS.format(root=str(programs.ROOT)))

    def run(world, **keys):
        folder = tmp_path / f"run{world}"
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


def test_losses_metrics_and_scores_do_not_depend_on_the_number_of_processes(run):
    keys = {"sync_batchnorm": True, "max_epoch": 3, "test_interval": 3, "lr": 0.002}
    found = {world: run(world, **keys) for world in (1, 2, 4)}
    for world in (2, 4):
        done, events, scores = found[world]
        states = {process.stdout.split("STATE ")[1].split()[0] for process in done}
        assert len(states) == 1, "the processes end with other weights, buffers or moments"
        assert np.abs(scores - found[1][2]).max() < 1e-3
        ours, wanted = (figures(which, ("step", "epoch", "eval")) for which in (events, found[1][1]))
        assert len(ours) == len(wanted) == 13
        for one, other in zip(ours, wanted):
            assert one == pytest.approx(other, rel=2e-3, abs=1e-3)
