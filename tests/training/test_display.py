"""What a run shows while it trains: a terminal of 80 columns, the time that is left, points of single steps."""

import fcntl
import json
import math
import os
import re
import struct
import subprocess
import sys
import termios
import time
import warnings
from types import SimpleNamespace

import programs
import pytest
import torch

from config import Config
from training import display

LONG = (
    "  actDCF(0.05) 0.8118  Cllr 0.5325 bit (calibrated, 5-fold; at best 0.4960)  threshold 0.4770"
    "  3576 trials, 576 targets"
)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_reaches_the_width_and_no_word_is_broken(width):
    for text in (LONG, "a path /data/voices with 12 words of one sentence that goes on and on and on to its end " * 3):
        lines = display.folded(text, width).split("\n")
        assert (len(lines) > 1) == (len(text) >= width) and all(len(line) < width for line in lines)
        assert " ".join(lines).split() == text.split()
    assert display.folded(LONG, 0) == LONG


def test_a_loss_is_short_however_large(settings, tools, capsys, tmp_path):
    assert [display.short(x, 4) for x in (2.5, 999999.0, -1e7, float("nan"))] == [
        "2.5000",
        "999999.0000",
        "-1e+07",
        "nan",
    ]
    trainer = tools.build(settings)
    trainer.progress.totals.update(loss=1e27, utterances=1, batches=1)
    trainer.finish_epoch()
    printed = capsys.readouterr().out + (tmp_path / "run" / "result" / "scores.txt").read_text()
    assert "loss 1e+27 " in printed and "TLOSS 1e+27, " in printed, printed


def test_a_duration_is_read_at_a_glance():
    seconds = (7, 760, 11109, 2 * 86400 + 15000)
    assert [display.duration(s) for s in seconds] == ["0:07", "12:40", "3:05:09", "2 d 04:10"]


def on_a_terminal(words, columns: int, cwd) -> str:
    """What a terminal of so many columns gets from the trainer."""
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    command = [sys.executable, "trainSpeakerNet.py", *map(str, words)]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, cwd=cwd, env={**environment, **programs.QUIET})
    os.close(slave)
    parts = []
    while True:
        try:
            part = os.read(master, 1 << 16)
        except OSError:  # as Linux tells the end
            break
        if not part:
            break
        parts.append(part)
    assert process.wait() == 0
    os.close(master)
    return b"".join(parts).decode()


def test_a_run_fits_its_terminal(settings, write):
    columns = 80
    keys = {**settings, "max_epoch": 1, "test_interval": 1, "device": "cpu"}
    text = on_a_terminal(["--config", write(keys)], columns, programs.ROOT)
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text).replace("\r\n", "\n")
    shown = [state for line in plain.split("\n") for state in line.split("\r")]
    paths = [state for state in shown if settings["save_path"] in state]
    assert max(len(state) for state in shown if state not in paths) <= columns
    states = [state for state in shown if state.startswith("epoch 1/1")]
    assert states and any("loss" in state and "left 0:0" in state and "run 0:0" in state for state in states)


def test_a_warning_of_a_plug_in_stands_above_the_bar(monkeypatch):
    written = []
    monkeypatch.setattr(display.tqdm, "write", lambda text, file: written.append(text))
    before = warnings.showwarning
    with open(os.devnull, "w") as terminal, display.Bar(total=3, disable=False, file=terminal):
        warnings.warn("one of a plug-in", stacklevel=1)
    assert len(written) == 1 and "UserWarning: one of a plug-in" in written[0] and "\n\n" not in written[0]
    assert warnings.showwarning is before


def points_of(run) -> list[dict]:
    lines = (run / "result" / "metrics.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == "step"]


def test_steps_are_logged_at_an_interval_on_both_sides(settings, tools, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = {**settings, "log_interval": 3, "max_epoch": 1, "device": "cpu", "picture_format": "png"}
    done = tools.command(*(f"--{k}={v}" for k, v in keys.items()))
    assert done.returncode == 0, done.stderr
    points = points_of(tmp_path / "run")
    assert [point["step"] for point in points] == [3, 6]
    assert all(point["grad_norm"] > 0 and point["utt_per_s"] > 0 and point["lr"] > 0 for point in points)
    events = EventAccumulator(str(tmp_path / "run" / "logs")).Reload()
    for name in ("loss", "accuracy", "grad_norm", "lr", "scale", "utt_per_s", "data_wait_pct"):
        shown = {event.step: event.value for event in events.Scalars(f"Step/{name}")}
        assert shown == {point["step"]: pytest.approx(point[name], rel=1e-6) for point in points}
    evaluated = {tag for tag in events.Tags()["scalars"] if tag.startswith("Val/")}
    assert {"Val/EER", "Val/eer_low", "Val/eer_high", "Val/cllr", "Val/min_dcf_0.01"} <= evaluated
    assert "Val/det" in events.Tags()["images"]


@pytest.mark.parametrize("loss, warned", [(2e27, True), (15.0, False), (1e-9, False), (float("inf"), False)])
def test_a_run_that_diverges_is_warned_of(settings, tools, capsys, loss, warned):
    trainer = tools.build(settings)
    first, later = (SimpleNamespace(mean_loss=value, mean_accuracy=0.0) for value in (1e-12, loss))
    trainer.progress.count([{"data": torch.zeros(1, 4, 8)}], first)
    trainer.progress.load_state_dict({**trainer.progress.state_dict(), "config": {}})  # as a run that was resumed
    trainer.progress.begin_epoch(2)
    trainer.progress.count([{"data": torch.zeros(1, 4, 8)}], later)
    trainer.display.report_epoch({"0": 0.1})
    said = "WARNING: the run diverges: mean loss 2e+27, in its first step 1e-12; try a lower lr than 0.01, "
    assert (said in capsys.readouterr().out) == warned


@pytest.mark.parametrize(
    "accuracy, loss, warned", [(math.nan, 1.0, True), (50.0, 1.0, False), (math.nan, math.nan, False)]
)
def test_an_accuracy_that_is_not_finite_is_laid_to_the_loss_plug_in(settings, tools, capsys, accuracy, loss, warned):
    """It is shown alone: the steps are sound."""
    trainer = tools.build(settings)
    trainer.progress.totals.update(loss=4 * loss, accuracy=4 * accuracy, utterances=4)
    trainer.display.report_epoch({"0": 0.1})
    said = f"WARNING: loss/{trainer.config.trainfunc}.py gives accuracies that are not finite"
    assert (said in capsys.readouterr().out) == warned


def test_the_first_step_tells_nothing_of_the_time_that_is_left(settings, tools, capsys, monkeypatch):
    monkeypatch.setattr(display, "LOG_SECONDS", 0)
    trainer = tools.build(settings, gradient_accumulation_steps=2)
    shown, progress = trainer.display, trainer.progress
    progress.batches, progress.batch = 100, 40  # a run that goes on: another process took 900 s for 40 batches
    progress.totals.update(seconds=900.0, utterances=40)
    shown.begin(hidden=True)
    for seconds in (0.5, 300.0, 0.5, 3.5, 0.5, 3.5):  # a first step of 300 s, as of a model that is compiled
        progress.batch += 1
        progress.totals["seconds"] += seconds
        progress.totals["utterances"] += 8
        progress.window.accept(progress.batch)
        if progress.batch % 2 == 0:
            progress.window.close()
        shown.show()
    lines = capsys.readouterr().out.splitlines()
    assert ["left" in line for line in lines] == [False] * 2 + [True] * 4, lines
    assert "  4 utt/s" in lines[-1]
    left = (100 - 46) * 2  # 2 s a batch
    run = left + 100 * 2 * (trainer.config.max_epoch - 1)
    assert f"left {display.duration(left)}, run {display.duration(run)}" in lines[-1]


def test_the_speed_of_a_point_is_that_since_the_point_before(settings, tools):
    trainer = tools.build(settings, log_interval=1)
    shown, progress = trainer.display, trainer.progress
    progress.totals.update(seconds=900.0, waited=0.0, utterances=40)  # of another process
    shown.begin(hidden=True)
    for seconds in (300.0, 2.0):
        progress.step += 1
        progress.totals["seconds"] += seconds
        progress.totals["waited"] += 0.5
        progress.totals["utterances"] += 8
        history = [{"loss": 1.0, "accuracy": 0.0, "grad_norm": 1.0, "scale": 1.0}]
        shown.write_point(history, trainer.optimizer, trainer.device)
    found = [(point["utt_per_s"], point["data_wait_pct"]) for point in points_of(trainer.files.root)]
    assert found == [pytest.approx((8 / 300, 50 / 300)), pytest.approx((4.0, 25.0))]


@pytest.mark.parametrize("check", ["now", "late"])
def test_the_share_of_waiting_is_of_the_same_batches_as_the_time(settings, tools, check):
    trainer = tools.build(settings, log_interval=1, nan_check=check)
    following = trainer.loader._next
    trainer.loader._next = lambda: (time.sleep(0.2), following())[1]
    begin = time.perf_counter()
    trainer.train_epoch()
    whole, totals = time.perf_counter() - begin, trainer.progress.totals
    assert all(0 <= point["data_wait_pct"] < 100 for point in points_of(trainer.files.root))
    assert 0.2 * trainer.progress.batches <= totals["waited"] < totals["seconds"] <= whole
    assert totals["seconds"] > 0.9 * whole


def test_no_point_is_written_where_none_is_wanted(settings, tools):
    trainer = tools.build(settings, log_interval=0)
    trainer.train_epoch()
    assert trainer.progress.step and not trainer.files.metrics.exists()


@pytest.mark.parametrize(
    "workers, augment, cores, wait, seconds, said",
    [
        (
            0,
            False,
            8,
            35,
            60,
            "35 % of the time: 65 utt/s, without waiting 100, with no loader process; try nData",
        ),
        (2, True, 8, 35, 60, "with 2 loader processes of nDataLoaderThread; try nDataLoaderThread: 7 (8 cores here)"),
        (
            9,
            True,
            8,
            35,
            60,
            "try a pack of the speech on a local disk (pack_data.py), or a smaller share of",
        ),
        (0, False, 1, 35, 60, "with no loader process; try a pack of the speech on a local disk (pack_data.py); docs/"),
        (0, False, 8, 15, 60, ""),
        (0, False, 8, 90, 2, ""),
    ],
)
def test_a_run_that_waits_for_data_is_told_what_to_change(monkeypatch, workers, augment, cores, wait, seconds, said):
    monkeypatch.setattr(display, "usable_cores", lambda: cores)
    line = display.waiting_advice(Config(nDataLoaderThread=workers, augment=augment), wait, 65.0, seconds)
    assert said in line and bool(said) == bool(line), line


@pytest.mark.parametrize(
    "augment, where, told", [(True, "worker", True), (True, "device", False), (False, "worker", False)]
)
def test_a_gpu_that_waits_is_to_augment(monkeypatch, augment, where, told):
    monkeypatch.setattr(display, "usable_cores", lambda: 4)
    config = Config(nDataLoaderThread=4, augment=augment, augment_on=where)
    assert ("; try augment_on: device, or a pack" in display.waiting_advice(config, 35, 65.0, 60, True)) == told
    assert "augment_on" not in display.waiting_advice(config, 35, 65.0, 60)
