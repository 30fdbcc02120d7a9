"""Processes come and go, for real: benchmarks/chaos.py has many more cases, which take minutes."""

import json
import sys

import programs
import pytest

BENCHMARKS = programs.ROOT / "benchmarks"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_starts_a_killed_group_again_and_the_run_goes_on_from_its_last_save(settings, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from chaos_world import Run

    run = Run(tmp_path / "chaos", {**settings, "device": "cpu", "save_interval_steps": 1, "max_epoch": 3})
    run.start(ranks=2, restarts=1)
    run.wait_for_save()
    run.kill(run.trainers()[1])
    assert run.end(200) == 0, run.text()
    text = run.text()
    assert text.count("resuming from") == 1 and "the other processes are gone or do not answer (" in text
    lines = [json.loads(line) for line in (run.save_path / "result" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["event"] == "epoch"] == [1, 2, 3]


def test_two_processes_then_one_then_three_train_each_row_of_an_epoch_once(settings, write, data, tmp_path):
    rows = tmp_path / "rows.txt"
    path = write({**settings, "max_epoch": 1, "batch_size": 2, "device": "cpu"})
    said = []
    for world, stop in ((2, "2"), (1, "3"), (3, "")):
        variables = {"CHAOS_ROWS": str(rows), "CHAOS_STOP": stop}
        ranks = programs.run_ranks(BENCHMARKS / "chaos_rows.py", "--config", path, world=world, env=variables)
        assert [rank.returncode for rank in ranks] == [143 if stop else 0] * world, ranks
        said.append(ranks[0].stdout)
    trained = rows.read_text().split()
    listed = [line.split()[1] for line in (data / "train_list.txt").read_text().splitlines()]
    assert sorted(trained) == sorted(f"{settings['train_path']}/{name}" for name in listed)
    for text, worlds in zip(said[1:], ("processes 2 before, 1 now", "processes 1 before, 3 now")):
        assert f"bit-equal: weights and optimizer; the batches are not those of the run before ({worlds})" in text
        assert "the rows that are left of epoch 1 are trained once each; " in text
        assert "what follows is equivalent to an uninterrupted run, and not bit-equal" in text
