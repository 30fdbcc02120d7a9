"""When and where the checkpoints of a run are written."""

import functools
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from config import Config
from storage import checkpoint, safetensors_file
from storage.files import write_atomically
from storage.seal import KeepsPrevious, save_sealed

RETRY_SECONDS = 60  # between attempts to write what could not be written


@dataclass
class Flight:
    """A checkpoint that is being written; ``action()`` writes it and returns why not, '' if it did."""

    path: Path
    action: Callable[[], str]
    future: Future


class Saver:
    """Writes the checkpoints of a run: all processes collect the state, the main one writes a copy of it.

    ``capture(evaluated=False)`` gives the state and is a collective. ``nonfinite_by_design`` names buffers that hold
    infinities by design. The copy is made in the step, a thread writes it: at most one state of the newest step and one
    of an evaluation are being written. A checkpoint that cannot be written is kept in memory and tried again.
    """

    def __init__(self, config: Config, ranks, files, capture, nonfinite_by_design, log):
        self.config, self.ranks, self.files = config, ranks, files
        self.capture, self.nonfinite_by_design, self.log = capture, nonfinite_by_design, log
        self.saved_at, self.saved_step = time.monotonic(), 0
        self.newest = KeepsPrevious(files.model / "last.model")
        self.gives_safetensors = safetensors_file.is_available()
        if not self.gives_safetensors:
            log("the package safetensors is not installed: there will be no model_best.safetensors")
        self.pool, self.flights = ThreadPoolExecutor(1, "checkpoints"), []

    def due(self, step: int) -> bool:
        """Whether a save is due after ``step``: by ``save_interval_*`` since the last one, or to try again.

        The main process says it for all. While the state before is being written it is not due.
        """
        self.settle()
        if not self.ranks.main or self.is_writing(self.newest.path):
            return False
        steps, minutes = self.config.save_interval_steps, self.config.save_interval_minutes
        now, writes = time.monotonic(), self.files.writes
        return (
            (bool(minutes) and now - self.saved_at >= 60 * minutes)
            or (bool(steps) and step - self.saved_step >= steps)
            or (bool(writes.waiting) and now - writes.tried_at >= RETRY_SECONDS)
        )

    def last(self, soon: bool = False):
        """Write model/last.model, then what could not be written before; ``soon`` does not wait until it is there."""
        self.settle(wait=self.is_writing(self.newest.path))
        self.files.writes.lines_again()  # before the state, which says how long their files are
        state = self.capture()
        self.saved_at, self.saved_step = time.monotonic(), state["step"]
        if self.ranks.main:
            self.start(self.newest.path, on_host(state), self.newest.save)
        self.settle(wait=not soon)

    def evaluated(self, epoch: int, result: dict, evaluator, improved: bool):
        """Write the checkpoint of an evaluated epoch and, if it is the best, model_best.*."""
        paths = [self.files.model / f"model{epoch:09d}.model"]
        paths += [self.files.model / "model_best.model"] * improved
        self.settle(wait=any(flight.path != self.newest.path for flight in self.flights))
        state = self.capture(evaluated=True)
        if not self.ranks.main:
            return
        copy = on_host(state)
        self.give_up_older(paths[0])
        for path in paths:
            beside: dict[str, Any] = {".eer": ("nan" if result["failed"] else f"{result['eer']:.4f}").encode()}
            if path.stem == "model_best":
                beside[".threshold"] = f"{result['threshold']:.6f}".encode()
                note = functools.partial(put_beside, beside)
                evaluator.keep_best(self.files, copy["model_state_dict"], result, note)
                if self.gives_safetensors:
                    beside[safetensors_file.ENDING] = functools.partial(safetensors_file.encoded, copy)
            self.start(path, copy, functools.partial(save_sealed, path=path), beside)
        self.settle()

    def start(self, path: Path, state: dict, save, beside: dict | None = None):
        """Have the thread write a state by ``save(state)``, then the files ``beside`` it.

        {ending: content, or the function that makes it}.
        """

        def action() -> str:
            bad = checkpoint.nonfinite_tensors(state["model_state_dict"])
            bad = [name for name in bad if name not in self.nonfinite_by_design]
            if bad:  # never over good ones
                return f"{path.name} is not written: {len(bad)} tensors are not finite, the first {bad[0]}"
            save(state)
            for ending, content in (beside or {}).items():
                write_atomically(path.with_suffix(ending), content() if callable(content) else content)
            self.remove_older()
            return ""

        self.flights.append(Flight(path, action, self.pool.submit(action)))

    def is_writing(self, path: Path) -> bool:
        """Whether a checkpoint of this path has not been written yet."""
        return any(flight.path == path for flight in self.flights)

    def settle(self, wait: bool = False):
        """Take note of what has been written, or could not be; ``wait`` for all of it."""
        while self.flights and (wait or self.flights[0].future.done()):
            flight = self.flights.pop(0)
            refusal = "" if flight.future.exception() else flight.future.result()
            if refusal:
                self.log(refusal)
                continue
            written = self.files.writes.write(flight.path, flight.future.result, lambda action=flight.action: action)
            if written and flight.path == self.newest.path:
                self.files.writes.again(but=[other.path for other in self.flights])

    def give_up_older(self, path: Path):
        """Keep the checkpoint of one epoch in memory at most, the newest that could not be written."""
        waiting = self.files.writes.waiting
        for older in [older for older in waiting if older.match("model0*.model") and older != path]:
            del waiting[older]
            self.log(f"{older}: given up; the disk did not take it before the next evaluation")

    def remove_older(self):
        """Remove the checkpoints of epochs beyond the newest ``keep_checkpoints``, each with its .eer."""
        keep, epochs = self.config.keep_checkpoints, sorted(self.files.model.glob("model0*.model"))
        for path in epochs[:-keep] if keep else ():
            for each in (path, path.with_suffix(".eer")):
                self.files.writes.remove(each)

    def unsaved(self) -> list[str]:
        """The checkpoints that could not be written."""
        self.settle(wait=True)
        return [str(path) for path in self.files.writes.waiting if path.suffix == ".model"]

    def close(self):
        """Wait for what is being written."""
        self.settle(wait=True)
        self.pool.shutdown()


def put_beside(beside: dict, path: Path, content: bytes):
    """Have the content of a path written with the checkpoint that it belongs to, after it."""
    beside[path.suffix] = content


def on_host(value):
    """Copy a nested state into the memory of the host; what is on a GPU is asked for at once, and waited for once."""
    copy = _copied(value)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copy


def _copied(value):
    if isinstance(value, torch.Tensor):
        if value.device.type != "cuda":
            return value.detach().cpu() if value.device.type != "cpu" else value.detach().clone()
        # Page-locked memory, which torch keeps for the next save: else the copy is several times slower.
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return type(value)(map(_copied, value)) if type(value) in (list, tuple) else value
