"""The files of a run below save_path: scores.txt, metrics.jsonl, config.yaml, TensorBoard; and its tracker."""

import contextlib
import functools
import importlib.util
import json
import os
import re
import socket
import sys
import time
from pathlib import Path

from config import Config
from errors import UsageError
from settings import reader as configuration
from storage.files import replacing
from training.event_file import EventFile
from training.trackers import Tracker
from training.writes import Writes

EPOCH = re.compile(rb'Epoch (\d+)\b|\{"event": "\w+", "epoch": (\d+)\b')  # of a line of scores.txt, of metrics.jsonl


def versions() -> dict:
    """Versions of what a result depends on."""
    import numpy
    import scipy
    import soundfile
    import torch

    modules = [torch, numpy, scipy, soundfile]
    if "torchaudio" in sys.modules:  # a plug-in of the run imports it
        modules.append(sys.modules["torchaudio"])
    return {"python": sys.version.split()[0], **{m.__name__: str(m.__version__) for m in modules}}


def without_nan(values: dict) -> dict:
    """Values, also those in mappings, with None in the place of numbers that are not finite."""
    clean = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in values.items()}
    return {k: without_nan(v) if isinstance(v, dict) else v for k, v in clean.items()}


class RunFiles:
    """Writes the files of a run; on ranks other than the main one nothing is written, and no write ends the run."""

    def __init__(self, config: Config, main: bool):
        self.root, self.main = Path(config.save_path), main
        self.model, self.result, self.logs = (self.root / name for name in ("model", "result", "logs"))
        self.scores, self.metrics = self.result / "scores.txt", self.result / "metrics.jsonl"
        self.writes = Writes()
        self._events: EventFile | None = None
        self._writes_events = main
        if main and config.eval and importlib.util.find_spec("tensorboard") is None:
            self._writes_events = False
            print("tensorboard is not installed: the figures are in result/ and not in logs/")
        self._tracker: Tracker | None = None
        if main:
            folders = (self.result, self.logs) if config.eval else (self.model, self.result, self.logs)
            try:
                for folder in folders:
                    folder.mkdir(parents=True, exist_ok=True)
                    for half_written in folder.glob(".*.tmp"):  # of a process that was killed while it saved
                        half_written.unlink()
            except OSError as error:
                raise UsageError(f"save_path: cannot make '{error.filename}': {error.strerror}") from error

    def write_config(self, values: dict, hashes: dict):
        """Write result/config.yaml: the resolved configuration, versions and the hashes of lists {key: SHA-256}."""
        if self.main:
            info = {"command": sys.argv, "versions": versions(), "sha256": hashes}
            text = configuration.to_yaml({**values, "run_info": info})
            self.writes.write_bytes(self.result / "config.yaml", text.encode(errors="surrogateescape"))

    def track(self, config: Config):
        """Send scalars and pictures to the tracker of the configuration too."""
        if self.main and config.tracker:
            self._tracker = Tracker(config)

    def event(self, kind: str, **values):
        """Append a line to metrics.jsonl. A non-finite number is written as null: JSON has no NaN."""
        self._append(self.metrics, json.dumps({"event": kind, **without_nan(values)}))

    def score_line(self, text: str):
        """Append a line to scores.txt."""
        self._append(self.scores, text)

    def _append(self, path, line: str):
        if self.main:
            self.writes.append(path, f"{line}\n".encode(errors="surrogateescape"))

    def bad_files(self, lines: list[str]) -> Path:
        """Write result/bad_files.txt; returns its path."""
        path = self.result / "bad_files.txt"
        if self.main:
            content = "".join(f"{line}\n" for line in lines)
            self.writes.write_bytes(path, content.encode(errors="surrogateescape"))
        return path

    def sizes(self) -> dict[str, int]:
        """Bytes of the appended files, to cut them back to when a run is resumed from this moment.

        A file that the system does not answer for is left out, and is not cut.
        """
        sizes = {}
        for path in (self.scores, self.metrics):
            with contextlib.suppress(OSError):
                sizes[path.name] = path.stat().st_size if path.is_file() else 0
        return sizes

    def cut_back(self, sizes: dict[str, int], epoch: int):
        """Forget lines written after the state that a run resumes from: those from ``epoch`` on it will write again.

        Those of epochs before stay: an evaluation by --eval has written them meanwhile.
        """
        for path in (self.scores, self.metrics):
            if not (self.main and path.name in sizes and path.is_file() and path.stat().st_size > sizes[path.name]):
                continue
            with open(path, "rb+") as file:
                file.seek(sizes[path.name])
                lines = file.readlines()
                file.truncate(sizes[path.name])
            for line in lines:
                found = EPOCH.match(line) if line.endswith(b"\n") else None  # a cut one is of a run that was killed
                if found and int(found[1] or found[2]) < epoch:
                    self.writes.append(path, line)

    def scalar(self, tag: str, value: float, step: int):
        """Write a scalar to TensorBoard and the tracker."""
        self._tensorboard(step, lambda events: events.scalar(tag, value, step))
        self._track("scalar", tag, value, step)

    def picture(self, path: Path, step: int):
        """Show a PNG picture in TensorBoard and the tracker too."""
        with contextlib.suppress(OSError):  # it could not be written, which was said
            png = path.read_bytes()
            self._tensorboard(step, lambda events: events.picture(f"Val/{path.stem}", png, step))
            self._track("picture", f"Val/{path.stem}", path, step)

    def _tensorboard(self, step: int, encode):
        if self._writes_events:
            if self._events is None:
                self._events = EventFile(self.logs, step)
            self.writes.append(self._events.path, encode(self._events))

    def _track(self, method: str, *arguments):
        if self._tracker is not None:
            self._tracker.call(method, *arguments)

    def profiler(self, steps: int, flops: dict):
        """Context of torch's profiler for the last ten of ``steps``; gives None for 0 steps.

        Its trace for a browser and its table by module, profile.txt, are then in logs/. ``flops``: see ModuleRanges.
        """
        if not (steps and self.main):
            return contextlib.nullcontext()
        import torch
        from torch import profiler

        if not torch.cuda.is_available():  # it would say on stderr that it finds no GPU, as an error
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        active = min(steps, 10)
        warmup = min(steps - active, 1)
        schedule = profiler.schedule(wait=steps - active - warmup, warmup=warmup, active=active, repeat=1)
        write = functools.partial(self._write_profile, steps=active, flops=flops)
        return profiler.profile(schedule=schedule, on_trace_ready=write, record_shapes=True)

    def _write_profile(self, profile, steps: int, flops: dict):
        from training.profiling import table_of

        events = profile.events()
        steps = sum(event.name.startswith("ProfilerStep") for event in events) or steps  # fewer if the run ends here
        text = table_of(events, steps, flops)
        self.writes.write_bytes(self.logs / "profile.txt", text.encode())
        path = self.logs / f"{socket.gethostname()}_{os.getpid()}.{time.time_ns()}.pt.trace.json"

        def write():
            with replacing(path) as temporary:
                profile.export_chrome_trace(str(temporary))

        self.writes.write(path, write)

    def close(self):
        """Try once more what could not be written, and name what is still not."""
        self._track("close")
        self.writes.again()
        for path, reason in self.writes.left().items():
            print(f"{path}: not written: {reason}", file=sys.stderr)
