"""The files of a run below save_path: scores.txt, metrics.jsonl, config.yaml, TensorBoard."""

import contextlib
import json
import os
import sys
from pathlib import Path

import config as configuration
from speaker_lists import UsageError, list_hash


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


class RunFiles:
    """Writes the files of a run; on ranks other than the main one nothing is written."""

    def __init__(self, config, main: bool):
        self.root, self.main = Path(config.save_path), main
        self.model, self.result, self.logs = (self.root / name for name in ("model", "result", "logs"))
        self.scores, self.metrics = self.result / "scores.txt", self.result / "metrics.jsonl"
        self._board = None
        if main:
            try:
                for folder in (self.model, self.result, self.logs):
                    folder.mkdir(parents=True, exist_ok=True)
                for half_written in self.model.glob(".*.tmp"):  # of a process that was killed while it saved
                    half_written.unlink()
            except OSError as error:
                raise UsageError(f"save_path: cannot make '{error.filename}': {error.strerror}") from error

    def write_config(self, values: dict, lists: dict):
        """Write result/config.yaml: the resolved configuration, versions and list hashes."""
        if self.main:
            info = {"command": sys.argv, "versions": versions(), "sha256": {k: list_hash(v) for k, v in lists.items()}}
            path = self.result / "config.yaml"
            try:
                path.write_text(configuration.to_yaml({**values, "run_info": info}), encoding="utf-8")
            except OSError as error:
                raise UsageError(f"save_path: cannot write '{path}': {error.strerror}") from error

    def event(self, kind: str, **values):
        """Append a line to metrics.jsonl. A non-finite number is written as null: JSON has no NaN."""
        if self.main:
            clean = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in values.items()}
            self._append(self.metrics, json.dumps({"event": kind, **clean}))

    def score_line(self, text: str):
        """Append a line to scores.txt."""
        if self.main:
            self._append(self.scores, text)

    @staticmethod
    def _append(path, line):
        with open(path, "a", encoding="utf-8") as f:
            f.write(line + "\n")

    def sizes(self) -> dict[str, int]:
        """Bytes of the appended files, to cut them back to when a run is resumed from this moment."""
        return {p.name: p.stat().st_size if p.is_file() else 0 for p in (self.scores, self.metrics)}

    def cut_back(self, sizes: dict[str, int]):
        """Forget lines written after the state that a run resumes from; it will write them again."""
        for path in (self.scores, self.metrics):
            if self.main and path.is_file() and path.stat().st_size > sizes.get(path.name, 0):
                os.truncate(path, sizes.get(path.name, 0))

    def scalar(self, tag: str, value: float, step: int):
        """Write a TensorBoard scalar."""
        if self.main:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(self.logs, purge_step=step)
            self._board.add_scalar(tag, value, step)

    def profiler(self, wanted: bool):
        """Context of torch's profiler for steps 10 to 20, its trace in logs/; gives None where it is not wanted."""
        if not (wanted and self.main):
            return contextlib.nullcontext()
        from torch import profiler

        schedule = profiler.schedule(wait=9, warmup=1, active=10, repeat=1)
        trace = profiler.tensorboard_trace_handler(str(self.logs))
        return profiler.profile(schedule=schedule, on_trace_ready=trace, record_shapes=True)

    def close(self):
        """Flush TensorBoard."""
        if self._board is not None:
            self._board.close()
