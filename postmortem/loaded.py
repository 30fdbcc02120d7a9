"""A dump as an object, for notebooks: its rows, its step replayed, changes tried on it."""

import contextlib
import functools
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from config import SAMPLE_RATE
from postmortem.case import Case
from postmortem.replay import Outcome, ReplayError
from storage.dump import read_dump, read_state, rows_of
from training.attempt import gradients_of
from training.generators import generator_state, restore_generators

DTYPES = ("float32", "float16", "bfloat16", "float64")
CHANGES = ("settings", "dtype", "without_rows", "data", "edit")


@dataclass
class Operation:
    """The operation that made the first NaN or Inf of a step."""

    op: str  # as torch calls it: 'sqrt', or 'SqrtBackward0' in the backward pass
    source: str  # 'loss/x.py:31', of the forward call; '' if it is not known
    module: str  # path of the module, '' for the network itself
    phase: str  # 'forward', 'backward' or 'update'

    def __str__(self):
        return f"{self.op} ({self.phase}) at {self.source or 'an unknown line'}"


@dataclass
class ReplayedStep:
    """What the step of a dump gave when it was computed again.

    ``gradients``: by parameter, unscaled, on the CPU. ``first_bad`` is None if everything is finite or no operation
    is to blame. ``reproduced``: 'bit_equal', 'same_fault' or 'vanished', against what the run recorded.
    """

    loss: float
    accuracy: float
    norm: float
    finite: bool
    reproduced: str
    first_bad: Operation | None = None
    gradients: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)
    error: str = ""  # the exception that the step raises


@dataclass(frozen=True)
class Row:
    """A row of a dump's batch. ``info`` is what the loader noted of it: file, list line, first sample, draws."""

    index: int
    label: int | torch.Tensor
    info: dict
    values: torch.Tensor = field(repr=False)  # as it was in the batch

    @property
    def path(self) -> str:
        """The speech file, '' if the dump names none."""
        return self.info.get("path", "")

    @property
    def sample_rate(self) -> int:
        """Of the waveform, in Hz."""
        return self.info.get("sample_rate", SAMPLE_RATE)

    @property
    def files(self) -> list[str]:
        """All files that the row was made of: the speech file, then noises and impulse responses."""
        draws = [draw["path"] for draw in self.info.get("augment", []) if "path" in draw and "reason" not in draw]
        return [self.path, *draws] if self.path else []

    def audio(self) -> np.ndarray:
        """The waveform as it was in the batch, (samples,) float32; ValueError if the dump has none."""
        if self.values.ndim != 1 or not self.info:
            raise ValueError(f"row {self.index} is no waveform: its 'values' are what the network got")
        if not self.values.numel():
            raise ValueError(f"row {self.index}: the dump holds no audio (nan_dump_audio: false)")
        return self.values.float().numpy().copy()


class LoadedDump:
    """A dump under the hands of a person. ``content`` holds its keys as docs/nan_debugging.md names them."""

    def __init__(self, path, trust_changed_code: bool = False):
        self.path, self.trust = Path(path), trust_changed_code
        self.content = read_dump(path)

    def __repr__(self):
        content, reason = self.content, self.content.get("reason", "an old dump")
        place = f"batch {content['batch_idx']} of epoch {content['epoch']}"
        return f"<{self.path.name}: {reason}, {place}, loss {content['loss']}, {len(self.rows)} rows>"

    @property
    def shape(self) -> torch.Size:
        """The shape of the batch: (nPerSpeaker, B, samples), of another loop as it was there."""
        data = self.content["data"]
        return torch.Size([len(data), *self.content["row_shape"]]) if "build" in self.content else data.shape

    @functools.cached_property
    def rows(self) -> list[Row]:
        """The rows of the batch in the order of ``files``: with nPerSpeaker M above 1, M times the labels."""
        label, files = self.content["label"].flatten(), self.content.get("files") or []
        values = rows_of(self.content["data"], len(label)) if self.content["data"].ndim else []
        known = [int(label[i % len(label)]) if len(label) else -1 for i in range(len(values))]
        if "build" in self.content:  # of another loop: rows of any shape, and so are their labels
            label = self.content["label"]
            values = self.content["data"].reshape(self.shape)
            known = label.tolist() if label.ndim == 1 and not label.is_floating_point() else list(label)
        return [Row(i, known[i], files[i] if files else {}, row) for i, row in enumerate(values)]

    @functools.cached_property
    def case(self) -> Case:
        """The dump with its step replayed; ReplayError says why that is not possible."""
        state = read_state(self.path, self.content["state"]) if self.content.get("state") else None
        with undisturbed():
            case = Case(self.path, self.content, state, trust=self.trust)
        if case.replay is None:
            raise ReplayError(case.refusal)
        return case

    def replay(self) -> ReplayedStep:
        """Compute the step again as it was, from the same weights, generators and threads.

        Takes up to three times as long as the step: the first bad operation is found in a pass of its own.
        """
        with undisturbed():
            case = self.case
            outcome = case.replay.run()
            found = gradients_of(case.replay.steps[repr([])].network)
            gradients = {name: g.detach().cpu().clone() for name, g in found.items()}
        record = case.update_site or (None if case.base.finite else case.origin)
        first = None
        if record is not None:
            phase = "update" if case.update_site else "backward" if record.backward else "forward"
            name = record.node or record.op or record.refusal.partition(":")[0]
            first = Operation(name, record.site.source, record.site.module, phase)
        return ReplayedStep(
            outcome.loss,
            outcome.accuracy,
            outcome.norm,
            outcome.finite,
            case.reproduced,
            first,
            gradients,
            outcome.error,
        )

    def try_fix(self, *, settings=None, dtype=None, without_rows=None, data=None, edit=None) -> Outcome:
        """Compute the step again with one change; the result has ``finite``, ``loss``, ``norm`` and ``error``.

        ``settings``: keys of the configuration {key: value}. ``dtype``: 'float32', 'float16', 'bfloat16' or 'float64',
        or torch's name. ``without_rows``: numbers into ``rows`` that are left out. ``data``: another batch of the same
        shape. ``edit(network)`` is called before the step and may change weights, attributes and modules.
        ValueError unless one change is given, and for one that does not fit the dump; ReplayError if no network can be
        built with the settings.
        """
        given = dict(zip(CHANGES, (settings, dtype, without_rows, data, edit)))
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"try_fix: expected one of {', '.join(CHANGES)}, got {', '.join(given) or 'none'}")
        ((name, value),) = given.items()
        with undisturbed():
            changes = getattr(self, f"_{name}")(value)
            try:
                return self.case.replay.run(**changes)
            finally:
                if name == "edit":  # its modules may be others now
                    self.case.replay.forget_networks()

    def _settings(self, settings: dict) -> dict:
        precision = {"mixedprec", "amp_dtype"} & settings.keys()
        if precision:
            if len(settings) > 1:
                raise ValueError("try_fix: change the precision alone, with dtype='float32' or another")
            value = settings.get("amp_dtype", "float32" if settings.get("mixedprec") is False else "")
            return self._dtype(value)
        unknown = [key for key in settings if key not in self.case.replay.settings]
        if unknown:
            raise ValueError(f"try_fix: the dump's configuration has no key '{unknown[0]}'")
        return {"settings": settings}

    def _dtype(self, dtype) -> dict:
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"try_fix: dtype is {name!r}, expected one of {', '.join(DTYPES)}")
        return {"dtype": name}

    def _without_rows(self, rows) -> dict:
        width = self.case.replay.columns
        wrong = [row for row in rows if not 0 <= row < len(self.rows)]
        if wrong:
            raise ValueError(f"try_fix: there is no row {wrong[0]}; the batch has rows 0 to {len(self.rows) - 1}")
        left = sorted(set(range(width)) - {row % width for row in rows})
        if not left:
            raise ValueError("try_fix: no row is left")
        return {"columns": left}

    def _data(self, data) -> dict:
        data = torch.as_tensor(data)
        if data.shape != self.shape:
            raise ValueError(f"try_fix: data has the shape {tuple(data.shape)}, the dump's is {tuple(self.shape)}")
        return {"data": data.reshape(self.case.replay.data.shape)}

    def _edit(self, edit) -> dict:
        return {"edit": edit}


@contextlib.contextmanager
def undisturbed():
    """Leave the caller's generators and number of threads as they are."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads, generators = torch.get_num_threads(), generator_state(device)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        restore_generators(generators, device)
