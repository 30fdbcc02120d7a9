"""Trial lists and score files in the field's forms, told apart by their content."""

from dataclasses import dataclass, field

import numpy as np

from corpus.lists import LIST_TEXT, TRIAL_LABELS, columns_of, separator_for, wrong_columns
from errors import UsageError
from storage.files import write_atomically

TRIAL_FORMS = {"voxceleb": "label a b", "kaldi": "a b label"}
SCORE_FORMS = {
    "voxceleb": "score label a b",
    "wespeaker": "a b score label",
    "kaldi": "a b score",
    "voxsrc": "score a b",
}
LABEL_WORDS = {"voxceleb": ("0", "1"), "kaldi": ("nontarget", "target"), "wespeaker": ("nontarget", "target")}

WHITE_SPACE = np.array([chr(byte).isspace() for byte in range(128)])


@dataclass
class Trials:
    """Trials and what a file says of them; what it does not say is None."""

    first: list  # enrolled utterances or models (N,)
    second: list  # test utterances (N,)
    labels: np.ndarray | None = None  # (N,) int64, 1 is a target trial
    scores: np.ndarray | None = None  # (N,) float64
    columns: list = field(default_factory=list)  # of text, each (N,): all the columns of the file, if asked for
    form: str = ""
    path: str = ""

    def __len__(self):
        return len(self.first)


def read_trials_any(path, form: str = "", columns: bool = False) -> Trials:
    """Read ``label a b`` (VoxCeleb) or ``a b label`` (Kaldi, wespeaker) lines; labels 0, 1, nontarget, target.

    ``columns``: accept more columns, and keep all of them as conditions. UsageError names the line of a mistake.
    """
    return _read(path, TRIAL_FORMS, form, columns, "trial list")


def read_scores(path, form: str = "", columns: bool = False) -> Trials:
    """Read a score file: ``score label a b``, ``a b score label``, ``a b score`` or ``score a b`` lines.

    The latter two say no labels: ``join_labels`` takes them from a trial list.
    """
    found = _read(path, SCORE_FORMS, form, columns, "score file")
    if found.labels is None and np.isin(found.scores, (0, 1)).all():
        raise UsageError(f"{path}: a trial list, and no score file: each line has 0 or 1 where its score should be")
    return found


def write_scores(path, scores, labels, first, second, form: str = "voxceleb"):
    """Write a score file; each score with all its digits. ``labels`` may be None if the form has none."""
    _write(path, SCORE_FORMS, form, first=first, second=second, labels=labels, scores=scores)


def write_trials(path, labels, first, second, form: str = "voxceleb"):
    """Write a trial list."""
    _write(path, TRIAL_FORMS, form, first=first, second=second, labels=labels)


def join_labels(scored: Trials, trials: Trials) -> Trials:
    """Scores in the order of a trial list, with its labels and columns; UsageError for a trial without a score."""
    row = dict(zip(zip(scored.first, scored.second), range(len(scored))))
    index = np.array([row.get(pair, -1) for pair in zip(trials.first, trials.second)], np.int64)
    missing = np.flatnonzero(index < 0)
    if len(missing):
        i = missing[0]
        raise UsageError(
            f"{scored.path}: no score of {len(missing)} of the {len(trials)} trials of {trials.path}, "
            f"the first: {trials.first[i]} {trials.second[i]}"
        )
    scores = scored.scores[index]
    return Trials(trials.first, trials.second, trials.labels, scores, trials.columns, scored.form, scored.path)


def _read(path, forms: dict, form: str, more_columns: bool, kind: str) -> Trials:
    if form and form not in forms:
        raise UsageError(f"form: must be one of {', '.join(forms)}, got '{form}'")
    columns, numbers, odd = _columns(path)
    if not columns:
        raise UsageError(f"{path}: the {kind} is empty")
    names = {name: forms[name].split() for name in forms if not form or name == form}
    widths = {name: len(columns) if more_columns else len(names[name]) for name in names}
    first_row = [column[:1] for column in columns]
    fits = [n for n in names if widths[n] == len(columns) >= len(names[n]) and not _faults(first_row, names[n])]
    expected = " or ".join(f"'{' '.join(names[n])}'" for n in fits or names)
    if not fits:
        row = " ".join(word for column in first_row for word in column)
        raise UsageError(f"{path}:{numbers[0]}: expected {expected}, got '{row[:100]}'")
    if odd:
        number, count = odd
        raise UsageError(f"{path}:{number}: {wrong_columns(f'{expected} as in line {numbers[0]}', count)}")
    faults = {n: _faults(columns, names[n]) for n in fits}
    good = [n for n in fits if not faults[n]]
    if len(good) > 1:
        raise UsageError(f"{path}: can be read as {' or '.join(good)}: say which form it has")
    if not good:
        row, reason = max(min(faults[n]) for n in fits)  # of the form that fits the longest
        raise UsageError(f"{path}:{numbers[row]}: {reason}")
    values = dict(zip(names[good[0]], columns))
    labels = np.array([TRIAL_LABELS[word] for word in values["label"]], np.int64) if "label" in values else None
    scores = np.array([float(word) for word in values["score"]]) if "score" in values else None
    return Trials(values["a"], values["b"], labels, scores, columns if more_columns else [], good[0], str(path))


def _columns(path):
    """Columns of text of the non-empty lines, their line numbers, and (number, columns) of the first odd line or None.

    Accepts CRLF and a byte-order mark. The whole text is split at once; numpy counts the columns of each line.
    """
    try:
        with open(path, **LIST_TEXT) as f:
            text = f.read()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    if "\0" in text:
        raise UsageError(f"{path}: cannot be read: not a UTF-8 text file")
    if "\t" in text and " " in text:  # names may hold spaces
        rows = [columns_of(line) for line in text.split("\n")]
        words = [word for row in rows for word in row]
        counts = np.array([len(row) for row in rows])
        return _rectangle(words, counts)
    words = text.split()
    if text.isascii():
        data = np.frombuffer(f"\n{text}\n".encode(), np.uint8)
        space = WHITE_SPACE[data]
        starts = np.flatnonzero(space[:-1] & ~space[1:])  # the byte before each word
        counts = np.diff(np.searchsorted(starts, np.flatnonzero(data == 10)))
    else:  # there is white space beyond ASCII
        counts = np.array([len(line.split()) for line in text.split("\n")])
    return _rectangle(words, counts)


def _rectangle(words: list, counts):
    """What ``_columns`` returns, of all words and the number of them in each line (lines,)."""
    numbers = np.flatnonzero(counts)
    if not len(numbers):
        return [], numbers, None
    width = int(counts[numbers[0]])
    odd = numbers[counts[numbers] != width]
    odd = (int(odd[0]) + 1, int(counts[odd[0]])) if len(odd) else None
    if odd:
        words = words[:width]
    return [words[place::width] for place in range(width)], numbers + 1, odd


def _faults(columns, names) -> list:
    """(row, what is wrong) of the first word that is no label, and of the first that is no number."""
    faults = []
    for name, column in zip(names, columns):
        if name == "label":
            wrong, what = set(column) - TRIAL_LABELS.keys(), "label must be 0, 1, nontarget or target"
        elif name == "score":
            wrong, what = _wrong_numbers(column), "score must be a number"
        else:
            continue
        if wrong:
            row = next(i for i, word in enumerate(column) if word in wrong)
            faults.append((row, f"the {what}, got '{column[row]}'"))
    return faults


def _wrong_numbers(column) -> set:
    try:
        for word in column:
            float(word)
    except ValueError:
        return {word for word in column if not _is_number(word)}
    return set()


def _is_number(word) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _write(path, forms, form, **columns):
    if form not in forms:
        raise UsageError(f"form: must be one of {', '.join(forms)}, got '{form}'")
    texts = {"a": columns["first"], "b": columns["second"]}
    if "label" in forms[form].split():
        words = LABEL_WORDS[form]
        texts["label"] = [words[label] for label in np.asarray(columns["labels"]).tolist()]
    if "scores" in columns:
        texts["score"] = [repr(score) for score in np.asarray(columns["scores"], np.float64).tolist()]
    space = separator_for(dict.fromkeys([*texts["a"], *texts["b"]]))
    lines = [space.join(values) for values in zip(*[texts[name] for name in forms[form].split()])]
    write_atomically(path, "\n".join([*lines, ""]).encode(errors="surrogateescape"))
