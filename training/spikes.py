"""Steps that are finite but far out: they are seen, written to metrics.jsonl and trained on; they are no incidents."""

import itertools
import math
from dataclasses import replace

import numpy as np
import torch

from config import Config
from training.batches import on_device
from training.dumps import concatenate_window

WINDOW = 200  # steps before this one that it is held against
LEAST = 100  # without as many nothing is called far out
DEVIATIONS = 10.0  # from the median, in units of the standard deviation that the MAD stands for
LEAST_RATIO = 2.0  # to the median: a loss that hardly moves has a MAD near 0
QUIET_STEPS = 50  # after a line on the terminal
MAD_TO_DEVIATION = 1.4826  # of a normal distribution (Rousseeuw and Croux 1993)


class SpikeReports:
    """Says and writes down each step that is finite and far above those before it; it is trained on.

    ``step``: the training.step.Step, as the step that is looked at has left it; ``log(text)`` prints a line.
    """

    def __init__(self, config: Config, ranks, files, step, incidents, log):
        self.config, self.ranks, self.files = config, ranks, files
        self.step, self.incidents, self.log = step, incidents, log
        self.spoke_of: int | None = None  # the step of the last line on the terminal

    def find(self, attempt) -> dict:
        """How far a step lies above those before it; {} if it does not stand out."""
        return spike_in(self.incidents.history, attempt.mean_loss, attempt.norm)

    def report(self, spike: dict, window: list[dict], attempt, record):
        """Report what ``find`` says of a step; ``record``: what a dump tells of the step at hand."""
        if not self.ranks.main:
            return
        # The losses of rows overwrite what is kept of the step.
        before = self.before_step(attempt, record) if self.config.nan_dump_spikes else None
        rows = row_losses(self.step, window) if self.ranks.world == 1 else []
        number = record.step + 1  # this one
        place = {"epoch": record.epoch, "step": number, "batch": record.batch}
        self.files.event("spike", **place, rows=rows[:3], **spike)
        if self.spoke_of is None or number - self.spoke_of > QUIET_STEPS:
            self.spoke_of = number
            self.log(f"spike at step {number}: {describe_spike(spike, rows)}; it is trained on")
        if before is not None:
            losses = [{"row": row["row"], "loss": row["loss"]} for row in rows]
            figures = {**spike, "loss": attempt.loss, "accuracy": attempt.accuracy, "rows": losses}
            told = self.incidents.save_spike(before[0], concatenate_window(window), figures, before[1])
            self.log(f"spike at step {number}: {told}")

    def before_step(self, attempt, record) -> tuple:
        """What a dump tells of the step that was taken last, and the weights, as they were before it."""
        before = {"generators": self.step.generators, "module_state": self.step.module_state.kept()}
        return replace(record, scale=attempt.scale, **before), self.step.state_before()


def spike_in(history, loss: float, norm: float) -> dict:
    """How far a step lies above those of the ``history`` before it; {} if it does not stand out.

    ``history`` has dicts with ``loss`` and ``grad_norm``. Both are compared by their logarithms if all are positive.
    """
    if len(history) < LEAST:
        return {}
    recent = list(itertools.islice(reversed(history), WINDOW))
    found = {}
    for name, value in (("loss", loss), ("grad_norm", norm)):
        values = np.array([step[name] for step in recent])
        if value <= 0 or (values <= 0).any():
            continue
        logs = np.log(values)
        median = float(np.median(logs))
        deviation = MAD_TO_DEVIATION * float(np.median(np.abs(logs - median)))
        if math.log(value) - median > max(DEVIATIONS * deviation, math.log(LEAST_RATIO)):
            found[f"{name}_median"] = math.exp(median)
    return {"loss": loss, "grad_norm": norm, **found} if found else {}


@torch.no_grad()
def row_losses(step, window: list[dict]) -> list[dict]:
    """The loss of each row alone, largest first: [{row, path, line, label, loss}]; nothing of this pass stays.

    [] of losses that compare rows with each other.
    """
    found = []
    step.begin()
    try:
        for batch in window:
            data, label = on_device(batch, step.device)
            if data.shape[0] > 1:
                return []
            embeddings = step.network(data)
            for row, info in enumerate(batch["files"]):
                loss, _ = step.network.loss(embeddings[row : row + 1], label[row : row + 1])
                place = {"row": len(found), "path": info["path"], "line": info["line"]}
                found.append({**place, "label": int(label[row]), "loss": float(loss)})
    except Exception:  # a plug-in that takes no single row may raise anything: then no row can be named
        return []
    finally:
        step.rewind()
    return sorted(found, key=lambda row: -row["loss"])


def describe_spike(spike: dict, rows: list[dict]) -> str:
    """A spike in one line."""
    names = {"loss": "loss", "grad_norm": "gradient norm"}
    parts = []
    for key, name in names.items():
        median = spike.get(f"{key}_median")
        parts.append(f"{name} {spike[key]:.4g}" + (f" (median {median:.4g})" if median else ""))
    if rows:
        parts.append(f"most of it from {rows[0]['path']} (list line {rows[0]['line']}, loss {rows[0]['loss']:.4g})")
    return ", ".join(parts)
