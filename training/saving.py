"""When and where the checkpoints of a run are written."""

import functools
import io
import time

import torch

from config import Config
from storage import checkpoint
from storage.files import save_atomically, write_atomically

RETRY_SECONDS = 60  # between attempts to write what could not be written


class Saver:
    """Writes the checkpoints of a run: all processes collect the state, the main one writes it.

    ``capture(evaluated=False)`` gives the state and is a collective. ``nonfinite_by_design`` names buffers that hold
    infinities by design. A checkpoint that cannot be written is kept in memory and tried again.
    """

    def __init__(self, config: Config, ranks, files, capture, nonfinite_by_design, log):
        self.config, self.ranks, self.files = config, ranks, files
        self.capture, self.nonfinite_by_design, self.log = capture, nonfinite_by_design, log
        self.saved_at, self.saved_step = time.monotonic(), 0

    def due(self, step: int) -> bool:
        """Whether a save is due after ``step``: by ``save_interval_*`` since the last one, or to try again."""
        steps, minutes = self.config.save_interval_steps, self.config.save_interval_minutes
        now, writes = time.monotonic(), self.files.writes
        return (
            (bool(minutes) and now - self.saved_at >= 60 * minutes)
            or (bool(steps) and step - self.saved_step >= steps)
            or (bool(writes.waiting) and now - writes.tried_at >= RETRY_SECONDS)
        )

    def last(self):
        """Write model/last.model, then what could not be written before."""
        self.files.writes.lines_again()  # before the state, which says how long their files are
        state = self.capture()
        self.saved_at, self.saved_step = time.monotonic(), state["step"]
        if self.is_finite(state, "last.model") and self.save(state, "last.model"):
            self.files.writes.again()

    def evaluated(self, epoch: int, result: dict, evaluator, improved: bool):
        """Write the checkpoint of an evaluated epoch and, if it is the best, model_best.*."""
        state = self.capture(evaluated=True)
        names = [f"model{epoch:09d}"] + (["model_best"] if improved else [])
        if not self.is_finite(state, f"{names[-1]}.model") or not self.ranks.main:
            return
        content = functools.cache(lambda: serialised(state))  # both hold the same
        for name in names:
            beside = {".eer": "nan" if result["failed"] else f"{result['eer']:.4f}"}
            if name == "model_best":
                beside[".threshold"] = f"{result['threshold']:.6f}"
            self.save(state, f"{name}.model", content, beside)
        self.give_up_older(names[0])
        if improved:
            evaluator.keep_best(self.files, state["model_state_dict"], result)

    def is_finite(self, state: dict, name: str) -> bool:
        """Whether the weights of a state are finite: others are never written over good ones."""
        bad = [n for n in checkpoint.nonfinite_tensors(state["model_state_dict"]) if n not in self.nonfinite_by_design]
        if bad:
            self.log(f"{name} is not written: {len(bad)} tensors are not finite, the first {bad[0]}")
        return not bad

    def save(self, state: dict, name: str, content=None, beside=None) -> bool:
        """Write a checkpoint on the main process, then the texts ``beside`` it; returns whether all were written.

        ``beside``: {file ending: text}; ``content()``: the bytes of the checkpoint, to try again with.
        """
        path = self.files.model / name
        content = content or functools.partial(serialised, state)

        def write(write_model):
            write_model()
            for ending, text in (beside or {}).items():
                write_atomically(path.with_suffix(ending), text.encode())

        def keep():
            return functools.partial(write, functools.partial(write_atomically, path, content()))

        now = functools.partial(write, functools.partial(save_atomically, state, path))
        return self.ranks.main and self.files.writes.write(path, now, keep)

    def give_up_older(self, name: str):
        """Keep the checkpoint of one epoch in memory at most, the newest that could not be written."""
        waiting = self.files.writes.waiting
        for path in [path for path in waiting if path.match("model0*.model") and path.stem != name]:
            del waiting[path]
            self.log(f"{path}: given up; the disk did not take it before the next evaluation")

    def unsaved(self) -> list[str]:
        """The checkpoints that could not be written."""
        return [str(path) for path in self.files.writes.waiting if path.suffix == ".model"]


def serialised(state: dict) -> bytes:
    """The bytes that torch.save writes of a state, which no later step changes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
