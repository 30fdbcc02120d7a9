"""What benchmarks/chaos.py does to a run: starts it as a user does, finds its processes, waits, kills, compares."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
EQUAL = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "rng_state", "best", "epoch", "step")
TIMES = ("utt_per_s", "data_wait_pct")
SMALL = {
    **{"model": "ECAPA_TDNN", "channels": 8, "aggregate": 16, "n_mels": 24, "nOut": 12, "spec_augment": [4, 8]},
    **{"trainfunc": "aamsoftmax", "optimizer": "adam", "scheduler": "cosine", "lr": 0.005, "batch_size": 4},
    **{"max_frames": 60, "max_epoch": 6, "test_interval": 2, "eval_frames": 0, "patience": 0, "nDataLoaderThread": 1},
    **{"threads": 1, "seed": 3, "save_interval_steps": 3, "picture_format": "none", "device": "cpu"},
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


class Run:
    """A run in ``folder``: its configuration, and the processes of the call of the command at hand."""

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.log = Path(folder), Path(folder) / "log.txt"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save_path = Path(settings.get("save_path") or self.folder / "run")
        self.config = self.folder / "run.yaml"
        self.config.write_text(yaml.safe_dump({**settings, "save_path": str(self.save_path)}))
        self.process: subprocess.Popen | None = None
        self.began = 0

    @property
    def last(self) -> Path:
        """The state that the next call goes on from."""
        return self.save_path / "model" / "last.model"

    def start(self, *words, ranks: int = 1, restarts: int = 0, script="trainSpeakerNet.py", env=None, before=()):
        """Call the command, by torchrun for several ``ranks``; ``before``: words in front of it. Returns self."""
        command = [*before, sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            command += ["--max-restarts", str(restarts)]
        return self.call([*command, str(ROOT / script), "--config", str(self.config), *map(str, words)], env)

    def call(self, command: list[str], env=None):
        """Start a command in a session of its own, its output at the end of the log; returns self."""
        self.began = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            options = {"cwd": ROOT, "env": {**os.environ, **ENVIRONMENT, **(env or {})}, "start_new_session": True}
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, **options)
        return self

    def start_of(self, log: str):
        """This run with what was printed into another log; returns self."""
        self.log, self.began = self.folder / log, 0
        return self

    def text(self) -> str:
        """What this call has printed so far."""
        with open(self.log, "rb") as log:
            log.seek(self.began)
            return log.read().decode(errors="replace")

    def wait_for(self, happened, seconds: float = 120):
        """Wait until ``happened()`` or the end of the call; TimeoutError after so many seconds."""
        until = time.monotonic() + seconds
        while not happened() and self.process.poll() is None:
            if time.monotonic() > until:
                raise TimeoutError(f"waited {seconds:g} s; the log: {self.text()[-2000:]}")
            time.sleep(0.01)

    def wait_for_text(self, words: str, seconds: float = 120):
        """Wait until this call has printed some words, or has ended."""
        self.wait_for(lambda: words in self.text(), seconds)

    def wait_for_save(self, seconds: float = 120):
        """Wait until this call has saved in the middle of training."""
        before = self.stamp()
        self.wait_for(lambda: self.stamp() != before, seconds)

    def stamp(self):
        """What tells one last.model from the next."""
        with contextlib.suppress(OSError):
            found = self.last.stat()
            return found.st_mtime_ns, found.st_ino
        return None

    def trainers(self) -> list[int]:
        """The processes that train, without their loader processes, in the order of their ranks."""
        session = [pid for pid in processes() if session_of(pid) == self.process.pid]
        scripts = {pid for pid in session if b"trainSpeakerNet.py" in command_of(pid) or b"chaos_" in command_of(pid)}
        scripts -= {pid for pid in scripts if b"torch.distributed.run" in command_of(pid)}
        return sorted((pid for pid in scripts if parent_of(pid) not in scripts), key=rank_of)

    def kill(self, pid: int, number=signal.SIGKILL):
        """Send a signal to one process; one that has ended is passed over."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def kill_all(self):
        """Kill every process of the call at once, as a power cut does, and wait until they are gone."""
        for pid in [pid for pid in processes() if session_of(pid) == self.process.pid]:
            self.kill(pid)
        self.process.wait()

    def end(self, seconds: float = 300) -> int:
        """Wait for the end; returns the exit status. TimeoutError, and all are killed, if it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            text = self.text()[-3000:]
            self.kill_all()
            raise TimeoutError(f"no end within {seconds:g} s; the log: {text}") from None

    def complaint(self) -> str:
        """The line of the run that says why it ended, without its folder."""
        said = re.compile(r"processes are gone|not saved as|stopped by|damaged")
        lines = [line for line in self.text().splitlines() if said.search(line)]
        return lines[-1] if lines else ""


def processes() -> list[int]:
    """All process numbers."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def command_of(pid: int) -> bytes:
    """Command line of a process, b'' if it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _stat(pid: int) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return ["", "0", "0", "0"]


def parent_of(pid: int) -> int:
    """The parent of a process, 0 if it is gone."""
    return int(_stat(pid)[1])


def session_of(pid: int) -> int:
    """The session of a process, 0 if it is gone. torchrun's processes are in sessions of their own below it."""
    seen = pid
    while seen > 1:
        session = int(_stat(seen)[3])
        if session == seen and parent_of(seen) in (0, 1, os.getpid()):
            return session
        seen = parent_of(seen)
    return 0


def rank_of(pid: int) -> int:
    """RANK of a process."""
    with contextlib.suppress(OSError):
        found = re.search(rb"\0RANK=(\d+)\0", b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
        return int(found[1]) if found else 0
    return 0


def loaders(pid: int) -> list[int]:
    """The loader processes of a training process."""
    name = command_of(pid)
    return [child for child in processes() if parent_of(child) == pid and command_of(child) == name]


def differing(one: Path, other: Path) -> list[str]:
    """What two runs differ in: names of tensors and numbers of their last.model, and lines of metrics.jsonl."""
    a, b = (torch.load(path / "model" / "last.model", weights_only=True) for path in (one, other))

    def walk(x, y, name):
        if isinstance(x, torch.Tensor):
            return [] if isinstance(y, torch.Tensor) and torch.equal(x, y) else [name]
        if isinstance(x, dict) and isinstance(y, dict) and x.keys() == y.keys():
            return [found for key in x for found in walk(x[key], y[key], f"{name}.{key}")]
        if isinstance(x, (list, tuple)) and isinstance(y, (list, tuple)) and len(x) == len(y):
            return [found for i, (u, v) in enumerate(zip(x, y)) for found in walk(u, v, f"{name}.{i}")]
        return [] if x == y or (x != x and y != y) else [name]

    found = [name for part in EQUAL for name in walk(a[part], b[part], part)]
    return found + (["metrics.jsonl"] if metrics(one) != metrics(other) else [])


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what is a time."""
    lines = (run / "result" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
