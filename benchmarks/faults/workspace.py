"""A fault's own copy of the checkout and of the voices, and the real scripts run in it in forked processes.

Forking saves importing torch for each run: the parent has imported it, but no module of the checkout, so that the
child imports those of the copy.
"""

import contextlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from sources import model

ROOT = Path(__file__).resolve().parent.parent.parent
TIMED_OUT = 124

# Keys of a run of a second or two: 30 utterances in 8 batches an epoch, a net of a few thousand parameters.
SETTINGS = {
    **{"model": "Tiny", "nOut": 12, "trainfunc": "aamsoftmax", "margin": 0.2, "scale": 30.0},
    **{"optimizer": "adam", "scheduler": "cosine", "lr": 0.01, "batch_size": 4, "max_frames": 60, "max_epoch": 2},
    **{"test_interval": 2, "eval_frames": 0, "max_test_pairs": 40, "nDataLoaderThread": 0, "seed": 3, "device": "cpu"},
}
ECAPA = {"model": "ECAPA_TDNN", "channels": 8, "aggregate": 16, "n_mels": 24}


def preload():
    """Import what every run needs and no fault can change."""
    import matplotlib.pyplot
    import scipy.signal
    import sklearn.metrics
    import soundfile
    import torch
    import torch.distributed
    import torch.utils.tensorboard
    import tqdm

    torch.set_num_threads(1)
    return [matplotlib.pyplot, scipy.signal, sklearn.metrics, soundfile, torch, tqdm]


def tracked_files() -> list[str]:
    """Files of the checkout with what is not committed yet, without what git ignores."""
    words = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    return [name for name in subprocess.check_output(words, text=True).splitlines() if (ROOT / name).is_file()]


def copy_checkout(target: Path):
    """Copy the working tree without tests, benchmarks and documents."""
    for name in tracked_files():
        if not name.startswith((".", "tests/", "benchmarks/", "docs/")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def start(script: Path, words, log: Path, environment: dict) -> int:
    """Fork a child that runs a script as ``python script words`` would; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        os.environ.update(environment)
        os.chdir(script.parent)
        for number, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(f"{log}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
        signal.set_wakeup_fd(-1)
        sys.argv = [str(script), *map(str, words)]
        own = (ROOT, ROOT / "benchmarks" / "faults")  # but not an environment that lies inside the checkout
        sys.path[:] = [str(script.parent), *[p for p in sys.path if p and Path(p).resolve() not in own]]
        status = _run(script)
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _run(script: Path) -> int:
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # as the interpreter does: a traceback and status 1
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def wait(pids, seconds: float) -> list[int]:
    """Exit status of each child; those still running after the time limit are killed and give 124."""
    end, statuses = time.monotonic() + seconds, dict.fromkeys(pids)
    try:
        while None in statuses.values() and time.monotonic() < end:
            for pid in [p for p, status in statuses.items() if status is None]:
                done, raw = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(raw)
            time.sleep(0.02)
    finally:  # after an interruption too
        for pid in [p for p, status in statuses.items() if status is None]:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            statuses[pid] = TIMED_OUT
    return list(statuses.values())


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class Workspace:
    """Folder of one fault: code/ a checkout, data/ the voices, run/ what the trainer writes."""

    folder: Path

    @classmethod
    def make(cls, folder: Path, voices: Path, plugins: dict) -> "Workspace":
        """Copy the checkout and the voices, and drop the plug-ins in."""
        self = cls(folder)
        copy_checkout(self.code)
        shutil.copytree(voices, self.data)
        for name, source in {"models/Tiny.py": model(), **plugins}.items():
            (self.code / name).parent.mkdir(parents=True, exist_ok=True)
            (self.code / name).write_text(source, encoding="utf-8")
        return self

    @property
    def code(self) -> Path:
        """The copy of the checkout."""
        return self.folder / "code"

    @property
    def data(self) -> Path:
        """The copy of the voices, noise and impulse responses."""
        return self.folder / "data"

    @property
    def run(self) -> Path:
        """The run's save_path."""
        return self.folder / "run"

    def paths(self) -> dict:
        """The keys that name files."""
        return {
            **{"train_list": str(self.data / "train_list.txt"), "train_path": str(self.data / "wav")},
            **{"test_list": str(self.data / "trials.txt"), "test_path": str(self.data / "wav")},
            "save_path": str(self.run),
        }

    def train(self, settings: dict, seconds: float, processes: int = 1) -> int:
        """Run trainSpeakerNet.py with a YAML file of these settings; returns the worst exit status."""
        values = {**SETTINGS, **self.paths(), **settings}
        threads = values.pop("threads", 1)
        values = {key: str(self.folder / v[1:]) if str(v).startswith("@") else v for key, v in values.items()}
        config = self.folder / "run.yaml"
        config.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        ranks, port = [{}], str(free_port())
        if processes > 1:
            common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ranks = [{**common, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(processes)]
        script, number = self.code / "trainSpeakerNet.py", len(list(self.folder.glob("train*.out")))
        words = ["--config", config, "--threads", threads]
        log = self.folder / f"train{number}"
        return max(wait([start(script, words, Path(f"{log}_{i}"), env) for i, env in enumerate(ranks)], seconds))

    def analyse(self, dump: Path, seconds: float) -> tuple[int, dict | None, str]:
        """Run analyze_nan_debug.py on a dump: (exit status, its JSON object or None, what it wrote to stderr)."""
        log = self.folder / f"analysis_{dump.stem}"
        (status,) = wait([start(self.code / "analyze_nan_debug.py", [dump, "--json"], log, {})], seconds)
        for line in Path(f"{log}.out").read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(line)
                if isinstance(value, dict):
                    return status, value, ""
        return status, None, Path(f"{log}.err").read_text(errors="replace")

    def terminal(self) -> str:
        """All that the trainer wrote to the terminal."""
        return "\n".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("train*.???")))

    def dumps(self) -> list[Path]:
        """Dumps in the order of the run."""

        def order(path):
            words = path.stem.split("_")  # nan_batch_{b}_epoch_{e}[_rank{r}]
            return int(words[4]), int(words[2]), path.name

        return sorted((self.run / "debug_nan").glob("nan_batch_*.pt"), key=order)

    def incidents(self) -> list[dict]:
        """Incident events of metrics.jsonl."""
        path = self.run / "result" / "metrics.jsonl"
        events = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [event for event in events if event["event"] == "incident"]

    def nonfinite_checkpoints(self) -> list[str]:
        """Checkpoints that hold a NaN or Inf, with the first tensor's name."""
        import torch

        found = []
        for path in sorted((self.run / "model").glob("*.model")):
            weights = torch.load(path, weights_only=True)["model_state_dict"]
            bad = [name for name, t in weights.items() if t.is_floating_point() and not t.isfinite().all()]
            found += [f"{path.name}: {bad[0]}"] if bad else []
        return found
