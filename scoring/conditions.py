"""Groups of trials: by the beginning of the paths, a column, a file about the speakers, or duration."""

import csv
import itertools
from pathlib import Path

import numpy as np

from corpus.lists import LIST_TEXT
from errors import UsageError, plural
from scoring.intervals import speaker_of

KEYS = (
    "speaker",
    "speaker_id",
    "path",
    "file",
    "utterance",
    "id",
    "name",
)  # headings of the first column that is a key


def groups_of(condition: str, trials, test_path: str = "") -> list[str]:
    """Name the group of each trial (N,) by a condition.

    ``prefix:N``: the first N letters of both paths. ``column:N``: the Nth column (from 1) of the list, which must have
    been read with its columns. ``FILE.tsv:COLUMN`` (or .csv): a column of a table with a heading, looked up by path,
    then by speaker (first folder). ``duration:2,4``: the shorter file of a trial, in bins with these edges in seconds;
    the files lie below ``test_path``. Sides that differ give both names, sorted: ``f-m``.
    """
    kind, _, value = condition.rpartition(":")
    if kind == "prefix":
        length = _whole_number(condition, value, 0)
        return _pairs(trials, lambda path: path[:length])
    if kind == "column":
        number = _whole_number(condition, value, 1)
        if number > len(trials.columns):
            raise UsageError(f"--by {condition}: the list has {len(trials.columns)} columns")
        return trials.columns[number - 1]
    if kind == "duration":
        return _durations(condition, value, trials, test_path)
    if not kind:
        raise UsageError(f"--by {condition}: must be prefix:N, column:N, FILE:COLUMN or duration:SECONDS,..")
    table = read_table(kind, value)
    return _pairs(trials, lambda path: table.get(path, table.get(speaker_of(path), "unknown")))


def read_table(path: str, column: str) -> dict:
    """Read a column of a table with a heading (tab-separated, or commas in a .csv): {first column or key: value}."""
    try:
        with open(path, newline="", **LIST_TEXT) as f:
            rows = list(csv.reader(f, delimiter="," if path.endswith(".csv") else "\t"))
    except (OSError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    heading = rows[0] if rows else []
    if column not in heading:
        raise UsageError(f"{path}:1: no column '{column}' among {', '.join(heading) or 'nothing'}")
    key = next((heading.index(name) for name in KEYS if name in heading), 0)
    place, table = heading.index(column), {}
    for number, row in enumerate(rows[1:], 2):
        if row:
            if len(row) <= max(place, key):
                raise UsageError(f"{path}:{number}: {plural(len(row), 'column')}, the heading has {len(heading)}")
            table[row[key]] = row[place] or "unknown"
    return table


def _pairs(trials, name_of) -> list[str]:
    """Names of both sides of each trial: one if they agree, else both in sorted order."""
    names = {path: str(name_of(path)) for path in dict.fromkeys([*trials.first, *trials.second])}
    sides = zip([names[path] for path in trials.first], [names[path] for path in trials.second])
    return [a if a == b else "-".join(sorted((a, b))) for a, b in sides]


def _durations(condition, value, trials, test_path) -> list[str]:
    import soundfile

    from corpus.audio import native

    try:
        edges = [float(edge) for edge in value.split(",")]
    except ValueError as error:
        raise UsageError(f"--by {condition}: the edges must be seconds, like duration:2,4") from error
    if any(a >= b for a, b in itertools.pairwise([0.0, *edges])):
        raise UsageError(f"--by {condition}: the edges must rise from above 0")
    if not test_path:
        raise UsageError(f"--by {condition}: needs --test_path, the folder of the files")
    seconds = {}
    for path in dict.fromkeys([*trials.first, *trials.second]):
        try:
            seconds[path] = soundfile.info(native(Path(test_path, path))).duration
        except (OSError, soundfile.SoundFileError) as error:
            raise UsageError(f"--by {condition}: {Path(test_path, path)} cannot be read as audio") from error
    shorter = np.minimum([seconds[path] for path in trials.first], [seconds[path] for path in trials.second])
    texts = [f"{edge:g}" for edge in edges]
    names = [f"under {texts[0]} s", *[f"{a} to {b} s" for a, b in itertools.pairwise(texts)], f"{texts[-1]} s and more"]
    return [names[i] for i in np.searchsorted(edges, shorter, "right")]


def _whole_number(condition, value, least) -> int:
    if not value.isdigit() or int(value) < least:
        raise UsageError(f"--by {condition}: needs a whole number of at least {least}, got '{value}'")
    return int(value)
