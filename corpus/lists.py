"""Read train and trial lists, with line numbers in every complaint."""

import hashlib
from pathlib import Path

import numpy as np

from corpus.folders import is_audio
from errors import UsageError, plural

# How lists are read: UTF-8, with or without a byte-order mark. Bytes that are not UTF-8 stand for themselves, as in the
# names of files that Python gives.
LIST_TEXT = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
TRIAL_LABELS = {"0": 0, "1": 1, "nontarget": 0, "target": 1}


def columns_of(line: str) -> list[str]:
    """Columns of a line: between its tabs if it has one, so that a name may hold spaces, else between white space."""
    line = line.strip()
    return [cell.strip() for cell in line.split("\t") if cell.strip()] if "\t" in line else line.split()


def separator_for(names) -> str:
    """What to write between columns that ``columns_of`` reads again: a tab if a name holds white space."""
    return "\t" if any(len(name.split()) > 1 for name in names) else " "


def wrong_columns(expected: str, count: int) -> str:
    """Say that a line has another number of columns than expected, and what to do if a name holds spaces."""
    return f"expected {expected}, got {plural(count, 'column')}; if names hold spaces, put tabs between the columns"


def numbered_lines(path):
    """Yield (line number, columns) of the non-empty lines; accepts CRLF and a byte-order mark."""
    try:
        with open(path, **LIST_TEXT) as f:
            for number, line in enumerate(f, 1):
                if "\0" in line:
                    raise UsageError(f"{path}:{number}: cannot read the list: not a UTF-8 text file")
                columns = columns_of(line)
                if columns:
                    yield number, columns
    except OSError as error:
        raise UsageError(f"{path}: cannot read the list: {error.strerror}") from error


def read_train_list(path):
    """Read ``speaker relative/path`` lines.

    Returns (sorted speaker names, label of each utterance (N,) int64, paths, line
    numbers). Labels count the sorted speakers from 0, as voxceleb_trainer does.
    """
    names, paths, numbers = [], [], []
    for number, columns in numbered_lines(path):
        if len(columns) != 2:
            expected = wrong_columns("'speaker path'", len(columns))
            raise UsageError(f"{path}:{number}: {expected}")
        names.append(columns[0])
        paths.append(columns[1])
        numbers.append(number)
    if not paths:
        raise UsageError(f"{path}: the train list is empty")
    if all(map(is_audio, names)) and not any(map(is_audio, paths)):
        raise UsageError(
            f"{path}:{numbers[0]}: the columns are swapped, write 'speaker path', as '{paths[0]} {names[0]}'"
        )
    speakers, labels = np.unique(np.array(names), return_inverse=True)
    return speakers.tolist(), labels.astype(np.int64), paths, numbers


def read_trials(path):
    """Read ``label pathA pathB`` lines; returns (labels (N,) int64, first paths, second paths)."""
    labels, first, second = [], [], []
    for number, columns in numbered_lines(path):
        if len(columns) != 3:
            expected = wrong_columns("'label pathA pathB'", len(columns))
            raise UsageError(f"{path}:{number}: {expected}")
        label = TRIAL_LABELS.get(columns[0])
        if label is None and columns[2] in TRIAL_LABELS:
            raise UsageError(f"{path}:{number}: the columns are 'pathA pathB label'; the trainer reads the label first")
        if label is None:
            raise UsageError(f"{path}:{number}: the label must be 0, 1, nontarget or target, got '{columns[0]}'")
        labels.append(label)
        first.append(columns[1])
        second.append(columns[2])
    if not labels:
        raise UsageError(f"{path}: the trial list is empty")
    if len(set(labels)) == 1:
        raise UsageError(f"{path}: all {len(labels)} trials have label {labels[0]}; error rates need both classes")
    return np.array(labels, dtype=np.int64), first, second


def trial_lines(path) -> list[int]:
    """Line number of each trial that ``read_trials`` gives."""
    return [number for number, _ in numbered_lines(path)]


def list_hash(path) -> str:
    """SHA-256 of a list file, to record which list a score was made with."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
