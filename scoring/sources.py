"""Where embeddings come from: files of embeddings, or a model and the audio files below a folder."""

from pathlib import Path

import numpy as np

from corpus.acoustics import Acoustics, listen_to
from corpus.audio import SAMPLE_RATE, AudioError
from corpus.lists import numbered_lines
from errors import UsageError
from scoring.mismatch import Heard
from storage.embedding_files import READABLE, read_embeddings, read_identity


class Source:
    """Embeddings and durations of utterances by name."""

    def __init__(self, files=(), model=None, root: str = "", durations: str = ""):
        self.files, self.model, self.root = list(files), model, root
        self.names = {}
        self.rows = []
        self.problems = {}
        self.identity, self.vad = ("", "") if model is None else (model.identity, model.vad)
        self.lengths = read_durations(durations) if durations else {}
        for path in self.files:
            self.read(path)

    def read(self, path) -> list[str]:
        """Take in a file of embeddings; returns the names in it."""
        names, x = read_embeddings(path)
        identity = read_identity(path)
        if identity and self.identity and identity != self.identity:
            raise UsageError(
                f"{path}: embeddings of another model ({identity[:12]}) than those before ({self.identity[:12]})"
            )
        self.identity = self.identity or identity
        vad = read_identity(path, "vad")
        if vad and self.vad and vad != self.vad:
            raise UsageError(
                f"{path}: embeddings of speech by vad {vad}, those before by vad {self.vad}; embed all alike"
            )
        self.vad = self.vad or vad
        if self.rows and x.shape[1] != len(self.rows[0]):
            raise UsageError(f"{path}: embeddings of size {x.shape[1]}, those read before are of {len(self.rows[0])}")
        for name, row in zip(names, x):
            known = self.names.get(name)
            if known is not None and not np.array_equal(self.rows[known], row, equal_nan=True):
                raise UsageError(f"{path}: '{name}' has another embedding here than in a file before")
            self._add(name, row)
        return names

    def _add(self, name, row):
        self.names[name] = len(self.rows)
        self.rows.append(row)

    def embeddings(self, names):
        """Embeddings (N, D) float32 of utterances by name; NaN rows and {row: reason} if there is none."""
        wanted = [name for name in dict.fromkeys(names) if name not in self.names and name not in self.problems]
        if wanted and self.model is not None:
            x, unreadable = self.model.embed_files([str(Path(self.root, name)) for name in wanted], progress=True)
            self.problems.update({wanted[i]: reason for i, reason in unreadable.items()})
            for i, name in enumerate(wanted):
                if i not in unreadable:
                    self._add(name, x[i])
        where = " or ".join(map(str, self.files)) or "the model's output"
        if not self.rows:
            count, reason = len(set(names)), self.problems.get(names[0], f"not in {where}")
            place = f"--root: below '{self.root}'" if self.model else where
            raise UsageError(f"{place}: no embedding of the {count} utterances; the first, {names[0]}: {reason}")
        index = np.array([self.names.get(name, -1) for name in names])
        if self.model is None and (index < 0).all():
            raise UsageError(
                f"{where}: has none of the {len(set(names))} utterances, such as '{names[0]}'; its names are like "
                f"'{next(iter(self.names))}'"
            )
        x = np.stack([self.rows[i] for i in index])
        x[index < 0] = np.nan
        problems = {}
        for i in np.flatnonzero(~np.isfinite(x).all(axis=1)):
            if index[i] < 0:
                problems[int(i)] = self.problems.get(names[i], f"not in {where}")
            else:
                nan, inf = int(np.isnan(x[i]).sum()), int(np.isinf(x[i]).sum())
                problems[int(i)] = f"non-finite embedding: {nan} NaN and {inf} Inf of {x.shape[1]} values"
        return x, problems

    def seconds(self, names):
        """Durations in seconds (N,) float64, NaN if unknown; None if there is nothing to learn them from."""
        if not self.lengths and not self.root:
            return None
        for name in dict.fromkeys(names):
            if name not in self.lengths and self.root:
                self.lengths[name] = _duration(Path(self.root, name))
        return np.array([self.lengths.get(name, np.nan) for name in names])

    @property
    def _hearing(self) -> tuple:
        """How audio files are read: channel, rate, vad."""
        if self.model is None:
            return "mix", SAMPLE_RATE, self.vad or "none"
        return self.model.config.channel, self.model.sample_rate, self.model.vad

    def heard(self, names) -> Heard | None:
        """How utterances sound, None if their audio is not there."""
        names = sorted(set(names))
        return Heard.in_files([str(Path(self.root, name)) for name in names], *self._hearing) if self.root else None

    def acoustics(self, names) -> list[Acoustics]:
        """How each of some utterances sounds; UsageError for one that cannot be read."""
        found = []
        for name in names:
            try:
                found.append(listen_to(Path(self.root, name), *self._hearing))
            except AudioError as error:
                raise UsageError(f"{Path(self.root, name)}: {error}") from error
        return found


def _duration(path) -> float:
    """Seconds that the header of an audio file states, NaN for an unreadable one."""
    import soundfile

    from corpus.audio import native

    try:
        return soundfile.info(native(path)).duration
    except (soundfile.SoundFileError, OSError):
        return float("nan")


def read_durations(path) -> dict:
    """Read ``utterance seconds`` lines (Kaldi's utt2dur)."""
    lengths = {}
    for number, columns in numbered_lines(path):
        try:
            name, seconds = columns
            lengths[name] = float(seconds)
        except ValueError as error:
            raise UsageError(f"{path}:{number}: expected 'utterance seconds', got '{' '.join(columns)}'") from error
        if not 0 < lengths[name] < float("inf"):
            raise UsageError(f"{path}:{number}: a duration must be a positive number, got {seconds}")
    return lengths


def read_enrollment(path):
    """Read ``model utterance ..`` lines (Kaldi's spk2utt); returns {model: [utterances]}."""
    models = {}
    for number, columns in numbered_lines(path):
        if len(columns) < 2:
            raise UsageError(f"{path}:{number}: expected 'model utterance ..', got one column")
        if columns[0] in models:
            raise UsageError(f"{path}:{number}: model '{columns[0]}' is in the list twice")
        models[columns[0]] = columns[1:]
    if not models:
        raise UsageError(f"{path}: the enrolment list is empty")
    return models


def is_embedding_file(path) -> bool:
    """Whether the ending is that of a file of embeddings rather than of a list."""
    return Path(path).suffix in READABLE
