"""Corpora by a table: Common Voice, Kaldi folders, JSON lines, CSV; each row names a file and its speaker."""

import csv
import functools
import json
import math
import os
import re
import shlex
from pathlib import Path

from corpus.list_lines import opened
from corpus.lists import LIST_TEXT, numbered_lines, wrong_columns
from errors import UsageError, plural
from preparation.corpora import Corpus, Reading, Utterance, as_folder, children_of, gender_of

# What the columns are called by NeMo, SpeechBrain, wespeaker, lhotse and hand.
COLUMNS = {
    "path": ("audio_filepath", "path", "wav", "audio", "file", "filename", "audio_path", "file_name", "filepath"),
    "speaker": ("speaker", "speaker_id", "spk", "spk_id", "client_id", "label", "spkid", "person", "name"),
    "start": ("offset", "start", "begin"),
    "seconds": ("duration", "dur", "seconds", "length"),
    "stop": ("stop",),  # SpeechBrain counts start and stop in samples
    "end": ("end",),
    "session": ("session", "session_id", "recording", "chapter_id", "video"),
    "gender": ("gender", "sex"),
    "split": ("split", "subset", "set"),
}
SPEECHBRAIN_RATE = 16_000  # Hz, of its start and stop
READERS = ("flac", "sph2pipe")  # programs of a pipe in wav.scp whose file is read here as well


def place_in(path: str, speaker: str, otherwise: str) -> tuple[str, str]:
    """(name below the speaker's folder, session): what follows the folder of the speaker in a path if there is one."""
    parts = Path(path).parts[:-1]
    if speaker not in parts:
        return otherwise, ""
    at = len(parts) - 1 - parts[::-1].index(speaker)
    return "/".join((*parts[at + 1 :], Path(path).name)), "/".join(parts[at + 1 :])


def existing(path: str, folder: Path) -> str:
    """A path of a table in full: relative to the table's folder, or to the current one as Kaldi takes it."""
    path = path.replace("$data_root/", "")  # SpeechBrain's
    return (
        path
        if os.path.isabs(path) or (not os.path.exists(folder / path) and os.path.exists(path))
        else str(folder / path)
    )


def described(layout: str, root: Path, what: str, utterances: list[Utterance], more: str = "") -> Corpus:
    """A corpus with its line."""
    people = len({utterance.speaker for utterance in utterances})
    parts = sum(utterance.is_part for utterance in utterances)
    said = f"{what}: {plural(len(utterances), 'recording')}, {plural(people, 'person')}"
    said += f", {parts} of them parts of files" if parts else ""
    return Corpus(layout, root, said + more, utterances)


# ------------------------------------------------------------------------------------------------------ Common Voice


def is_commonvoice(folder: Path) -> bool:
    """Whether there are clips/ and validated.tsv or train.tsv, here or in the folder of a language."""
    return bool(_languages(folder))


def _languages(folder: Path) -> list[Path]:
    inside = [folder, *children_of(folder)]
    inside += [p for q in inside[1:] for p in children_of(q)][:500]
    tables = ("validated.tsv", "train.tsv")
    return [p for p in inside if os.path.isdir(p / "clips") and any(os.path.isfile(p / name) for name in tables)]


def read_commonvoice(folder: Path, reading: Reading) -> Corpus:
    """Common Voice: validated.tsv, or else train, dev and test; a client is a speaker."""
    utterances, languages = {}, _languages(folder)
    for language in languages:
        names = ["validated.tsv"] if (language / "validated.tsv").is_file() else ["train.tsv", "dev.tsv", "test.tsv"]
        for name in names:
            if (language / name).is_file():
                for number, row in _rows(language / name, "\t"):
                    if not row.get("path") or not row.get("client_id"):
                        raise UsageError(f"{language / name}:{number}: no path or no client_id in it")
                    _check_names(f"{language / name}:{number}", row["path"], row["client_id"])
                    path = str(language / "clips" / row["path"])
                    path += "" if os.path.splitext(path)[1] else ".mp3"
                    speaker = as_folder(row["client_id"][:24])
                    gender = gender_of(row.get("gender") or "")
                    utterances[path] = Utterance(path, speaker, os.path.basename(path), "", gender)
    more = f", {plural(len(languages), 'language')}" if len(languages) > 1 else ""
    return described("commonvoice", folder, "Common Voice", list(utterances.values()), more)


# ------------------------------------------------------------------------------------------------------------- Kaldi


def is_kaldi(folder: Path) -> bool:
    """Whether there are wav.scp and utt2spk."""
    return (folder / "wav.scp").is_file() and (folder / "utt2spk").is_file()


def _map(path: Path) -> dict[str, tuple[int, list[str]]]:
    """{first column: (line number, others)} of a Kaldi table."""
    return {columns[0]: (number, columns[1:]) for number, columns in numbered_lines(path)}


def _second(path: Path, expected: str, table: dict, key: str) -> str:
    """The second column of a line of a Kaldi table, '' if there is no line; UsageError for a line that has none."""
    number, columns = table.get(key, (0, [""]))
    if not columns:
        raise UsageError(f"{path}:{number}: expected '{expected}'")
    return columns[0]


def read_kaldi(folder: Path, reading: Reading) -> Corpus:
    """A Kaldi folder: wav.scp, utt2spk, and segments, spk2gender and utt2sess if there are any."""
    files = {}
    for number, columns in numbered_lines(folder / "wav.scp"):
        if len(columns) < 2:
            raise UsageError(f"{folder / 'wav.scp'}:{number}: expected 'recording path'")
        files[columns[0]] = existing(_scp_path(folder / "wav.scp", number, columns[1:]), folder)
    speakers = _map(folder / "utt2spk")
    genders, sessions = (_map(p) if (p := folder / name).is_file() else {} for name in ("spk2gender", "utt2sess"))
    segments = _map(folder / "segments") if (folder / "segments").is_file() else None
    empty = "wav.scp" if not files else "segments" if segments == {} else ""
    if empty:
        raise UsageError(f"{folder / empty}: has no line")
    utterances = []
    for key, (number, columns) in (segments or {name: (0, [name]) for name in files}).items():
        where = f"{folder / 'segments'}:{number}"
        if segments is not None and (len(columns) != 3 or columns[0] not in files):
            raise UsageError(f"{where}: expected 'utterance recording start end', with a recording of wav.scp")
        start, end = (_seconds(where, text) for text in columns[1:]) if segments is not None else (0.0, 0.0)
        if segments is not None and not 0 <= start < end:
            raise UsageError(f"{where}: the segment ends before it starts")
        if key not in speakers or len(speakers[key][1]) != 1:
            raise UsageError(f"{folder / 'utt2spk'}: has no line 'utterance speaker' for '{key}'")
        named, path = speakers[key][1][0], files[columns[0]]
        speaker, ending = as_folder(named), os.path.splitext(path)[1]
        gender = _second(folder / "spk2gender", "speaker gender", genders, named)
        name, session = place_in(path, speaker, as_folder(key) + ending)
        if segments is not None:
            name, session = as_folder(key) + ending, columns[0]
        session = _second(folder / "utt2sess", "utterance session", sessions, key) or session
        utterances.append(Utterance(path, speaker, name, session, gender_of(gender), "", start, end - start))
    what = "Kaldi wav.scp and utt2spk" + (" with segments" if segments is not None else "")
    return described("kaldi", folder, what, utterances)


def _scp_path(table: Path, number: int, words: list[str]) -> str:
    """The file of a line of wav.scp; of a pipe that only decodes, the file that it reads."""
    if words[-1] != "|" and not words[-1].endswith("|"):
        return " ".join(words)
    try:
        words = shlex.split(" ".join(words).rstrip("| "))
    except ValueError as error:
        raise UsageError(f"{table}:{number}: a pipe with a quote that does not end: {error}") from error
    if not words:
        raise UsageError(f"{table}:{number}: a pipe without a command: write the path of a file")
    files = [word for word in words[1:] if os.path.splitext(word)[1].lower() in (".flac", ".sph", ".wav")]
    if os.path.basename(words[0]) not in READERS or len(files) != 1 or "-c1" in words or "2" in words:
        raise UsageError(f"{table}:{number}: a pipe, which is not run here: write the path of a file ({words[0]} ..)")
    return files[0]


def _seconds(where: str, text) -> float:
    try:
        value = float(text or 0)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: '{text}' is no number of seconds") from error
    if not 0 <= value < math.inf:
        raise UsageError(f"{where}: '{text}' is no number of seconds: at least 0 is wanted")
    return value


def _check_names(where: str, *names: str):
    """UsageError for a name that no file can have: with a NUL, or half of a character of UTF-16."""
    for name in names:
        try:
            wrong = b"\0" in os.fsencode(name)
        except UnicodeEncodeError:
            wrong = True
        if wrong:
            raise UsageError(f"{where}: {name!a} is the name of no file")


# --------------------------------------------------------------------------------------------------- JSON lines, CSV


def read_json(path: Path, reading: Reading) -> Corpus:
    """A file of JSON lines, or a list of JSON objects, with a path and a speaker each."""
    return described("json", path.parent, "JSON lines", _of_rows(path, _json_rows(path)))


def _json_rows(path: Path):
    try:
        with open(path, **LIST_TEXT) as file:
            if path.suffix.lower() == ".json" and file.read(1) == "[":
                file.seek(0)
                yield from ((i, row) for i, row in enumerate(json.load(file), 1) if isinstance(row, dict))
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UsageError(f"{path}:{number}: not JSON: {error}") from error
                    if not isinstance(row, dict):
                        raise UsageError(f"{path}:{number}: expected an object with a path and a speaker")
                    yield number, row
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def read_list(path: Path, reading: Reading) -> Corpus:
    """A train list of lines 'speaker path', the path relative to the list's folder or to the current one."""
    utterances = []
    for number, columns in numbered_lines(path):
        if len(columns) != 2:
            expected = wrong_columns("'speaker path'", len(columns))
            raise UsageError(f"{path}:{number}: {expected}")
        speaker, file = as_folder(columns[0]), existing(columns[1], path.parent)
        name, session = place_in(file, speaker, os.path.basename(file))
        utterances.append(Utterance(file, speaker, name, session))
    if not utterances:
        raise UsageError(f"{path}: has no row")
    return described("list", path.parent, "train list", utterances)


def read_csv(path: Path, reading: Reading) -> Corpus:
    """A file with a row of column names, separated by commas, semicolons or tabs."""
    with opened(path) as file:
        head = file.readline()
    between = max("\t,;", key=head.count)
    return described("csv", path.parent, "table", _of_rows(path, _rows(path, between)))


def _rows(path: Path, between: str):
    try:
        with open(path, newline="", **LIST_TEXT) as file:
            quoting = csv.QUOTE_NONE if between == "\t" else csv.QUOTE_MINIMAL
            for number, row in enumerate(csv.DictReader(file, delimiter=between, quoting=quoting), 2):
                yield number, {(name or "").strip(): (cell or "") for name, cell in row.items() if name is not None}
    except (OSError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _of_rows(path: Path, rows) -> list[Utterance]:
    utterances = []
    for number, row in rows:
        names = columns_of(path, tuple(row))  # rows of JSON need not have the same
        cell = {kind: row.get(name) for kind, name in names.items()}
        if not cell["path"] or cell["speaker"] in (None, ""):
            raise UsageError(f"{path}:{number}: no {names['path']} or no {names['speaker']} in it")
        _check_names(f"{path}:{number}", *(str(cell[kind]) for kind in ("path", "speaker")))
        file, speaker = existing(str(cell["path"]), path.parent), as_folder(str(cell["speaker"]))
        start, seconds = _part(f"{path}:{number}", cell)
        name, session = place_in(file, speaker, os.path.basename(file))
        if start or seconds:
            stem, ending = os.path.splitext(name)
            name, session = f"{stem}_{round(1000 * start):08d}{ending}", session or stem
        session = str(cell.get("session") or session)
        gender, part = gender_of(str(cell.get("gender") or "")), str(cell.get("split") or "").lower()
        utterances.append(Utterance(file, speaker, name, session, gender, split_of(part), start, seconds))
    if not utterances:
        raise UsageError(f"{path}: has no row")
    return utterances


def split_of(word: str) -> str:
    """'test' of a split that is one, 'train' of any other word, '' of none."""
    return "test" if re.match(r"(test|eval)", word) else "train" if word else ""


@functools.lru_cache(maxsize=64)
def columns_of(path: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Which column is what: {'path': name, 'speaker': name, ..}; UsageError without one of these two."""
    low = {name.lower().strip(): name for name in names}
    found = {kind: low[known[0]] for kind, words in COLUMNS.items() if (known := [w for w in words if w in low])}
    for kind in ("path", "speaker"):
        if kind not in found:
            raise UsageError(f"{path}: no column for the {kind} among {', '.join(names)}: call it '{kind}'")
    return found


def _part(where: str, cell: dict) -> tuple[float, float]:
    """(start, seconds) of a part of a file; a duration alone is that of the whole file."""
    if cell.get("stop"):
        start, stop = (_seconds(where, cell.get(name)) / SPEECHBRAIN_RATE for name in ("start", "stop"))
        return start, _length(where, start, stop)
    if cell.get("start") in (None, ""):
        return 0.0, 0.0
    start = _seconds(where, cell["start"])
    if cell.get("end"):
        return start, _length(where, start, _seconds(where, cell["end"]))
    return start, _seconds(where, cell.get("seconds"))


def _length(where: str, start: float, end: float) -> float:
    """Seconds from ``start`` to ``end``."""
    if end <= start:
        raise UsageError(f"{where}: the part ends at {end:g} s, before it starts at {start:g} s")
    return end - start
