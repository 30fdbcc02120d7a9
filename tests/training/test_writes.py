"""Writing that fails: full disks, limits and folders of other runs cost no run, no line and no old file."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import torch
from programs import ROOT

import trainSpeakerNet
from SpeakerNet import ModelTrainer
from storage import checkpoint, dump, files, seal
from storage.files import GrowingFile, WriteError, save_atomically, write_atomically
from storage.seal import save_sealed
from training.saving import Flight


@pytest.fixture
def disk(monkeypatch):
    """A disk that takes half of what is written and no more, while ``full`` is set."""
    state = SimpleNamespace(full=False)

    class File(io.FileIO):
        def write(self, data):
            if not state.full:
                return super().write(data)
            super().write(bytes(data[: len(data) // 2]))
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", buffering=-1):
        file = File(path, mode.replace("b", ""))
        return file if buffering == 0 else (io.BufferedRandom if "+" in mode else io.BufferedWriter)(file)

    monkeypatch.setattr(files, "open", opened, raising=False)
    return state


def arguments(settings, **overrides):
    return [f"--{key}={value}" for key, value in {**settings, "device": "cpu", **overrides}.items()]


def events(settings, *keys):
    lines = Path(settings["save_path"], "result", "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).get(key) for key in ("event", "epoch", *keys)) for line in lines]


def temporary_files(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def during_epoch(monkeypatch, epoch, action):
    """Call ``action`` as an epoch of training ends, before anything of it is written."""
    original = ModelTrainer.finish_epoch

    def finish(trainer):
        if trainer.progress.epoch == epoch:
            action()
        original(trainer)

    monkeypatch.setattr(ModelTrainer, "finish_epoch", finish)


def test_a_full_disk_costs_no_run(settings, disk, monkeypatch, capsys, tmp_path):
    settings.update(max_epoch=3)
    during_epoch(monkeypatch, 2, lambda: setattr(disk, "full", True))
    during_epoch(monkeypatch, 3, lambda: setattr(disk, "full", False))
    assert trainSpeakerNet.main(arguments(settings)) == 0
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if "cannot be written" in line] == [
        f"{tmp_path}/run/{name}: cannot be written: No space left on device; training goes on, and this is tried again"
        for name in ("result/metrics.jsonl", "logs/" + said.split("/logs/")[1].split(":")[0], "model/last.model")
    ]
    assert "every file that could not be written before is written now" in said
    disturbed = checkpoint.load(tmp_path / "run/model/last.model")
    assert {"model000000002.model", "model000000003.model", "model_best.model"} <= set(
        os.listdir(tmp_path / "run/model")
    )
    assert not temporary_files(tmp_path)
    lines = events(settings, "train_loss", "eer")
    scores = (tmp_path / "run/result/scores.txt").read_text()
    settings["save_path"] = str(tmp_path / "undisturbed")
    assert trainSpeakerNet.main(arguments(settings)) == 0
    assert lines == events(settings, "train_loss", "eer") and len(lines) == 5
    assert scores == (tmp_path / "undisturbed/result/scores.txt").read_text()
    undisturbed = checkpoint.load(tmp_path / "undisturbed/model/last.model")
    for name, tensor in undisturbed["model_state_dict"].items():
        assert torch.equal(tensor, disturbed["model_state_dict"][name]), name


@pytest.mark.parametrize("stop", [None, signal.SIGTERM])
def test_a_disk_that_stays_full_is_status_4_and_the_old_state_is_whole(
    settings, disk, monkeypatch, capsys, tmp_path, stop
):
    during_epoch(monkeypatch, 2, lambda: setattr(disk, "full", True))
    if stop:
        original = ModelTrainer.save_if_due

        def interrupted(trainer):
            trainer.stop_signal.number = stop if disk.full or trainer.progress.epoch == 2 else None
            disk.full = disk.full or trainer.progress.epoch == 2
            original(trainer)

        monkeypatch.setattr(ModelTrainer, "save_if_due", interrupted)
    assert trainSpeakerNet.main(arguments(settings)) == 4
    last = tmp_path / "run/model/last.model"
    said = capsys.readouterr().err.splitlines()
    assert f"{last}: not written: No space left on device" in said
    assert str(last) in said[-1] and "not saved as the run ended" in said[-1]
    assert checkpoint.load(last)["sampler_state"]["epoch"] == 2 and not temporary_files(tmp_path)
    monkeypatch.undo()
    assert trainSpeakerNet.main(arguments(settings)) == 0  # what the line advises
    assert checkpoint.load(last)["epoch"] == 2
    assert [event[:2] for event in events(settings)] == [("epoch", 1), ("epoch", 2), ("eval", 2)]


def test_a_limit_on_the_size_of_files_is_no_traceback(settings, write, tools, tmp_path):
    resource = pytest.importorskip("resource")  # Windows has no such limit

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    script, config = programs.ROOT / "trainSpeakerNet.py", write({**settings, "device": "cpu"})
    run = programs.run_anew(script, "--config", config, preexec_fn=limit)
    assert run.returncode == 4 and "Traceback" not in run.stderr
    assert f"{tmp_path}/run/model/last.model: cannot be written: File too large" in run.stderr
    assert len(events(settings)) == 3 and not temporary_files(tmp_path)


def test_the_best_model_of_a_full_disk_is_written_when_there_is_room(settings, disk, tools):
    trainer = tools.build(settings, max_epoch=1, test_interval=1, picture_format="png")
    trainer.train_epoch()
    disk.full = True
    trainer.evaluate()
    weights = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    assert len(trainer.saver.unsaved()) == 2 and not list(trainer.files.model.iterdir())
    disk.full = False
    for parameter in trainer.step.parameters:
        parameter.data.zero_()  # training goes on meanwhile
    trainer.saver.last()
    saved = checkpoint.load(trainer.files.model / "model_best.model")["model_state_dict"]
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    names = {"model_best.eer", "model_best.threshold", "model_best.calibration", "model000000001.eer", "last.model"}
    assert names <= set(os.listdir(trainer.files.model)) and not trainer.saver.unsaved()
    assert {"det.png", "roc.png", "scores.png", "trials_epoch_1.txt"} <= set(os.listdir(trainer.files.result))


def test_only_the_newest_epoch_waits_in_memory(settings, disk, tools, capsys):
    trainer = tools.build(settings)
    disk.full = True
    for trainer.progress.epoch in (1, 2, 3):
        trainer.saver.evaluated(trainer.progress.epoch, {"failed": "a test"}, trainer.evaluator, False)
    assert [os.path.basename(path) for path in trainer.saver.unsaved()] == ["model000000003.model"]
    assert "model000000001.model: given up" in capsys.readouterr().out


def test_training_goes_on_while_a_state_is_written_as_it_was(settings, tools, monkeypatch):
    trainer, slow_disk, began = tools.build(settings, save_interval_steps=1), threading.Event(), threading.Event()
    sealed = seal.save_sealed

    def slow(value, path, **more):
        began.set()
        assert slow_disk.wait(60)
        sealed(value, path, **more)

    monkeypatch.setattr(seal, "save_sealed", slow)
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    trainer.progress.step = 1
    trainer.save_if_due()
    assert began.wait(60)
    with torch.no_grad():
        for parameter in trainer.step.parameters:
            parameter.zero_()
    trainer.progress.totals["loss"] = 5.0
    trainer.progress.step = 3
    assert not trainer.saver.due(3)  # one at a time
    slow_disk.set()
    trainer.saver.settle(wait=True)
    saved = checkpoint.load(trainer.files.model / "last.model")
    assert all(torch.equal(before[name], saved["model_state_dict"][name]) for name in before)
    assert (saved["step"], saved["totals"]["loss"]) == (1, 0.0) and trainer.saver.due(3)
    trainer.close()
    assert not trainer.saver.unsaved()


def test_a_file_that_is_not_read_back_as_it_was_written_takes_no_place(tmp_path, monkeypatch):
    path = tmp_path / "last.model"
    save_sealed({"a": 1}, path)
    monkeypatch.setattr(seal, "is_whole", lambda *file: False)
    with pytest.raises(WriteError, match=r"last.model: cannot be written: it is not read back .* is the disk sound\?"):
        save_sealed({"a": 2}, path)
    monkeypatch.undo()
    assert torch.load(path, weights_only=True) == {"a": 1} and os.listdir(tmp_path) == ["last.model"]


def test_keep_checkpoints_leaves_the_newest_epochs(settings, tools):
    trainer = tools.build(settings, keep_checkpoints=2)
    for epoch in (8, 9, 10, 11):
        trainer.saver.evaluated(epoch, {"failed": "a test"}, trainer.evaluator, False)
    trainer.saver.settle(wait=True)
    kept = {f"model0000000{epoch}.{ending}" for epoch in (10, 11) for ending in ("eer", "model")}
    assert set(os.listdir(trainer.files.model)) == kept


def test_lines_that_could_not_be_written_follow_whole_and_in_order(disk, tmp_path):
    grown = GrowingFile(tmp_path / "lines")
    grown.add(b"first\n")
    disk.full = True
    for line in (b"second\n", b"third\n"):
        with pytest.raises(WriteError, match="lines: cannot be written: No space left on device"):
            grown.add(line)
        assert grown.path.read_bytes() == b"first\n"
    disk.full = False
    grown.add(b"fourth\n")
    assert grown.path.read_bytes() == b"first\nsecond\nthird\nfourth\n"


def test_half_a_line_is_cut_where_it_could_not_be_cut_at_once(disk, tmp_path, monkeypatch):
    grown = GrowingFile(tmp_path / "lines")
    grown.add(b"first\n")
    disk.full = True
    with monkeypatch.context() as patch, pytest.raises(WriteError):
        patch.setattr(os, "truncate", lambda *a: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
        grown.add(b"second\n")
    assert grown.path.read_bytes() == b"first\nsec"
    disk.full = False
    grown.flush()
    assert grown.path.read_bytes() == b"first\nsecond\n"


@pytest.mark.parametrize("step", ["open", "write", "fsync", "replace"])
def test_a_write_that_fails_anywhere_leaves_the_old_file_alone(tmp_path, monkeypatch, disk, step):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args, **more):
        raise OSError(errno.ESTALE, "Stale file handle")

    if step == "write":
        disk.full = True
    else:
        monkeypatch.setattr(os, step, fail)
    reason = "No space left on device" if step == "write" else "Stale file handle"
    for write in (lambda: write_atomically(path, b"new"), lambda: save_atomically({"a": torch.zeros(20000)}, path)):
        with pytest.raises(WriteError, match=f"file: cannot be written: {reason}$"):
            write()
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_a_dump_that_could_not_be_written_is_made_again(settings, disk, tools, capsys):
    trainer = tools.build(settings, nan_inject="1:loss,2:loss", nan_max_dumps=1)
    batches = tools.batches(trainer)
    disk.full = True
    trainer.progress.batch = 1
    assert trainer.train_step(batches[:1]) is None
    trainer.incidents.writer._pool.submit(bool).result()  # it writes one after the other
    disk.full = False
    trainer.progress.batch = 2
    assert trainer.train_step(batches[1:2]) is None
    trainer.incidents.writer.close()
    assert [path.name for path in trainer.incidents.writer.folder.glob("nan_*")] == ["nan_batch_2_epoch_1.pt"]
    assert "nan_batch_1_epoch_1.pt: No space left on device; training goes on" in capsys.readouterr().out


def test_a_best_model_that_waits_for_room_is_not_written_over_a_newer_one(settings, tools):
    trainer = tools.build(settings)
    best, done = trainer.files.model / "model_best.model", Future()
    done.set_result("")
    trainer.files.writes.waiting[best] = lambda: write_atomically(best, b"older")
    write_atomically(best, b"newer")  # as the thread just has, whose flight is not looked at yet
    trainer.saver.flights = [Flight(trainer.saver.newest.path, str, done), Flight(best, str, Future())]
    trainer.saver.settle()
    assert best.read_bytes() == b"newer" and best in trainer.files.writes.waiting
    trainer.saver.flights.pop().future.set_result("")
    trainer.files.writes.again()
    assert not trainer.files.writes.waiting


def test_a_checkpoint_for_which_there_is_no_memory_waits(settings, tools, monkeypatch, capsys):
    """As on a full disk: the old file stays, and the next save writes it."""
    trainer = tools.build(settings)
    trainer.saver.last()
    path = trainer.files.model / "last.model"
    before = path.read_bytes()

    def no_memory(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_memory)
        trainer.progress.step = 7
        trainer.saver.last()
    assert path.read_bytes() == before and path in trainer.files.writes.waiting
    assert "last.model: cannot be written: no memory is left for it; training goes on" in capsys.readouterr().err
    trainer.saver.last()
    trainer.saver.close()
    assert checkpoint.load(path)["step"] == 7 and not trainer.files.writes.waiting


def test_a_dump_for_which_there_is_no_memory_is_told(tmp_path, monkeypatch):
    def lacking(*arguments):
        raise MemoryError

    monkeypatch.setattr(dump, "save_atomically", lacking)
    said = []
    writer = dump.DumpWriter(tmp_path, 10, 1.0, said.append)
    writer.submit("nan_x.pt", {}, None)
    writer.close()
    path = tmp_path / "nan_x.pt"
    assert said == [f"the debug data could not be written to {path}: MemoryError: MemoryError; training goes on"]
    assert writer.lost == {"nan_x.pt"} and writer.written == 0


def test_tensorboard_reads_what_was_written_around_a_full_disk(settings, disk, tools):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tools.build(settings).files
    for step in range(1, 5):
        disk.full = step in (2, 3)
        run.scalar("Train/Loss", step / 2, step)
    scalars = EventAccumulator(str(run.logs)).Reload().Scalars("Train/Loss")
    assert [(scalar.step, scalar.value) for scalar in scalars] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


LOG = """
import resource, sys
sys.path.insert(0, {root!r})
from settings.command_line import outlast_full_disks
outlast_full_disks()
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
for line, limit in (("first", most), ("lost", 6), ("as well", 6), ("last", most)):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit > 0 else most, most))
    print(line, flush=True)
"""


def test_a_log_on_a_full_disk_ends_no_run_and_has_the_gap_told(tmp_path):
    pytest.importorskip("resource")
    with open(tmp_path / "log", "w") as log:
        run = subprocess.run([sys.executable, "-c", LOG.format(root=str(ROOT))], stdout=log, stderr=subprocess.PIPE)
    assert (run.returncode, run.stderr) == (0, b"")
    assert (tmp_path / "log").read_text() == "first\n[13 bytes of output could not be written here]\nlast\n"


@pytest.mark.skipif(os.name == "nt", reason="of a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_command_whose_output_is_closed_runs_all_the_same(settings, write, closed):
    command = f'"{sys.executable}" trainSpeakerNet.py --config "{write(settings)}" --print_config {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
