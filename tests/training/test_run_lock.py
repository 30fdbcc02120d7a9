"""Two runs in one folder: the second is refused, and no dead process keeps a folder."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
import torch
from programs import ROOT

import trainSpeakerNet
from errors import UsageError
from training import run_lock

HOLD = "import sys, time; sys.path.insert(0, {root!r}); from pathlib import Path; from training.run_lock import acquire"
HOLD += "; lock = acquire(Path({folder!r})); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/run."""
    code = HOLD.format(root=str(ROOT), folder=str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("more", [[], ["--eval", "--initial_model=any.model"]])
def test_two_runs_in_one_folder_the_second_is_refused(settings, holder, capsys, monkeypatch, tmp_path, more):
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.1)
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / ".last.model.1.tmp").touch()  # what the first is writing
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "any.model")
    assert trainSpeakerNet.main([f"--{k}={v}" for k, v in {**settings, "device": "cpu"}.items()] + more) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "waiting 0.1 s for process" in said[0]
    assert f"process {holder.pid} on this machine, started 20" in said[1] and "choose another save_path" in said[1]
    assert (tmp_path / "run" / "model" / ".last.model.1.tmp").exists()


def test_a_killed_run_keeps_no_folder(holder, tmp_path):
    holder.send_signal(signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
    holder.wait()
    assert (tmp_path / "run" / ".run.json").exists()
    run_lock.acquire(tmp_path / "run").release()


def test_a_run_waits_for_the_one_before_it_that_is_just_ending(holder, tmp_path, capsys):
    threading.Timer(0.5, holder.kill).start()
    run_lock.acquire(tmp_path / "run").release()
    assert f"waiting 10 s for process {holder.pid}" in capsys.readouterr().err


def test_a_run_on_another_machine_is_named(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.1)
    host = socket.gethostname()
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(UsageError, match=rf"process {holder.pid} on {host}, started"):
        run_lock.acquire(tmp_path / "run")


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def refuse(lock, timeout=None):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.FileLock, "acquire", refuse)
    assert run_lock.acquire(tmp_path / "run") is None
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="save_path: cannot write into"):
        run_lock.acquire(tmp_path / "file" / "run")


@pytest.mark.parametrize("ending", ["clean", "exception"])
def test_after_an_exception_no_process_waits_for_the_others_to_leave(settings, monkeypatch, ending):
    closed = []
    monkeypatch.setattr("training.ranks.Ranks.close", lambda ranks: closed.append(ranks.rank))

    def train(*arguments):
        assert ending == "clean", "one process alone fails"
        return 0

    monkeypatch.setattr(trainSpeakerNet, "train", train)
    arguments = [f"--{k}={v}" for k, v in {**settings, "device": "cpu"}.items()]
    if ending == "clean":
        assert trainSpeakerNet.main(arguments) == 0
    else:
        with pytest.raises(AssertionError, match="one process alone fails"):
            trainSpeakerNet.main(arguments)
    assert len(closed) == (ending == "clean")
