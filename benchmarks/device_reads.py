"""Count how often a training step waits for the device, checked late and at once (nan_check).

python benchmarks/device_reads.py                       # the demo's model; on a CPU or one GPU
torchrun --nproc_per_node 2 benchmarks/device_reads.py  # each rank counts its own; now: checked at once

A read is a number that Python asks of a tensor on the device, the numbers of a step that were sent ahead not counted.
Rows are augmented on the device too (augment_on: device).
On a GPU torch itself counts too (torch.cuda.set_sync_debug_mode), and a step that waits is shown with its place.
"""

import contextlib
import itertools
import os
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.overrides import TorchFunctionMode

T = torch.Tensor
ASKING = (T.item, T.tolist, T.numpy, T.cpu, T.__bool__, T.__float__, T.__int__, T.__index__, torch.equal, T.equal)
ASKING += (T.nonzero, torch.nonzero, T.unique, torch.unique, T.masked_select, torch.masked_select)  # for a shape
STEPS = 10


class Reads(TorchFunctionMode):
    """Counts the numbers that are asked of tensors on a device of a type; those of ``awaiting`` have left it."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind, self.count, self.sent = kind, 0, None

    def awaiting(self, late) -> "Reads":
        """Leave the numbers of the pending step out."""
        self.sent = None if late.pending is None else late.pending.reading.numbers
        return self

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in ASKING and args[0] is not self.sent and args[0].device.type == self.kind
        return function(*args, **(kwargs or {}))


def count(check: str) -> str:
    """What steps with ``nan_check`` set to ``check`` read, in a line."""
    from bench_postmortem import make_voices, words_of
    from bench_training import build
    from loader import make_surroundings

    with tempfile.TemporaryDirectory() as folder:
        make_voices(Path(folder))
        make_surroundings(Path(folder), 4, 8)
        words = [*words_of("ECAPA_TDNN channels=64", 8, Path(folder)), f"--nan_check={check}", "--optimizer=sgd"]
        words += ["--augment", f"--musan_path={folder}/musan", f"--rir_path={folder}/rir", "--augment_on=device"]
        words += ["--augment_cache=none"]
        trainer = build(words, folder)
        on_gpu = trainer.device.type == "cuda"
        batches = itertools.chain.from_iterable(itertools.repeat(trainer.loader))

        def step(reads=None):
            batch = next(batches)
            trainer.progress.batch += 1
            trainer.accept(batch)  # looks at the batch on the host
            with reads or contextlib.nullcontext():
                trainer.train_step([batch])
                trainer.save_if_due()

        for _ in range(3):  # the first make the optimizer's state, the copies, and find kernels
            step()
        reads = Reads(trainer.device.type)
        with warnings.catch_warnings(record=True) as waits:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("warn")
            for _ in range(STEPS):
                step(reads.awaiting(trainer.late))
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
        trainer.settle()
        places = {f"{Path(w.filename).name}:{w.lineno}" for w in waits if "synchroniz" in str(w.message)}
        trainer.close()
        told = f", torch saw it wait at {', '.join(sorted(places)) or 'no place'}" if on_gpu else ""
        return f"nan_check {check}: {reads.count / STEPS:g} reads a step of the {trainer.device.type}{told}"


if __name__ == "__main__":
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    for chosen in sys.argv[1:] or (("late", "now") if alone else ("late",)):
        print(count(chosen), flush=True)
