"""Read train and trial lists, with line numbers in every complaint."""

import os

import numpy as np

from config import Config
from corpus.list_lines import (
    LIST_TEXT,
    TRIAL_LABELS,
    columns_of,
    list_hash,
    numbered_lines,
    separator_for,
    stamp_of,
    wrong_columns,
)
from corpus.sources import trial_sources
from corpus.tars import is_member
from corpus.train_list import read_train_list
from errors import UsageError, shell_path

__all__ = [
    "LIST_TEXT",
    "TRIAL_LABELS",
    "columns_of",
    "list_hash",
    "numbered_lines",
    "read_train_list",
    "read_trials",
    "separator_for",
    "trial_lines",
    "trials_hash",
    "wrong_columns",
]

MANY_FILES = 20000  # longer lists are checked by a sample: a million stat calls on a network disk take minutes
MOST_KEPT = 8  # trial lists that are kept as they were read
_kept: dict[tuple, tuple] = {}


def none_below(root, list_path, paths) -> str:
    """Say that none of the ``paths`` of a list is below ``root``, as where that is a wrong folder; "" if some are."""
    sample = [paths[i] for i in range(0, len(paths), max(1, len(paths) // MANY_FILES))]
    if any(os.path.isfile(path) or is_member(path) for path in (os.path.join(root, name) for name in sample)):
        return ""
    return f"none of the files of '{list_path}' is below '{root}', the first being '{paths[0]}'" if sample else ""


def read_trials(path):
    """Read ``label pathA pathB`` lines; returns (labels (N,) int64, first paths, second paths).

    A list that has not changed since it was read is not read again: the results are not to be changed.
    """
    return _trials(path)[:3]


def trial_lines(path) -> list[int]:
    """Line number of each trial that ``read_trials`` gives."""
    return _trials(path)[3]


def trials_hash(config: Config) -> str:
    """SHA-256 of the trial list that decides which model is the best."""
    return list_hash(trial_sources(config)[0].path)


def _trials(path) -> tuple:
    stamp = stamp_of(path) if os.path.exists(path) else ()
    if stamp not in _kept:
        found = _read_trials(path)
        while len(_kept) >= MOST_KEPT:
            del _kept[next(iter(_kept))]
        _kept[stamp] = found
    return _kept[stamp]


def _read_trials(path) -> tuple:
    labels, first, second, numbers = [], [], [], []
    for number, columns in numbered_lines(path):
        if len(columns) != 3:
            expected = wrong_columns("'label pathA pathB'", len(columns))
            raise UsageError(f"{path}:{number}: {expected}")
        label = TRIAL_LABELS.get(columns[0])
        if label is None and columns[2] in TRIAL_LABELS:
            order = f"awk '{{print $3, $1, $2}}' {shell_path(path)} > NEW"
            raise UsageError(
                f"{path}:{number}: the columns are 'pathA pathB label'; the trainer reads the label first: {order}"
            )
        if label is None:
            raise UsageError(f"{path}:{number}: the label must be 0, 1, nontarget or target, got '{columns[0]}'")
        labels.append(label)
        numbers.append(number)
        first.append(columns[1])
        second.append(columns[2])
    if not labels:
        raise UsageError(f"{path}: the trial list is empty")
    if len(set(labels)) == 1:
        raise UsageError(f"{path}: all {len(labels)} trials have label {labels[0]}; error rates need both classes")
    return np.array(labels, dtype=np.int64), first, second, numbers
