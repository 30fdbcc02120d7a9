"""Corpora by a table: Common Voice, Kaldi folders, JSON lines, CSV; each row names a file and its speaker."""

import csv
import functools
import json
import math
import os
import re
import shlex
from pathlib import Path

from config import SAMPLE_RATE
from corpus.audio import AudioError
from corpus.decode import Recording
from corpus.list_lines import opened
from corpus.lists import LIST_TEXT, numbered_lines, wrong_columns
from errors import UsageError, plural
from preparation.corpora import Corpus, FolderNames, Reading, Utterance, as_folder, children_of, gender_of

# What the columns are called by NeMo, SpeechBrain, wespeaker, lhotse and hand.
COLUMNS = {
    "path": ("audio_filepath", "path", "wav", "audio", "file", "filename", "audio_path", "file_name", "filepath"),
    "speaker": ("speaker", "speaker_id", "spk", "spk_id", "client_id", "label", "spkid", "person", "name"),
    "start": ("offset", "start", "begin"),
    "seconds": ("duration", "dur", "seconds", "length"),
    "stop": ("stop",),  # SpeechBrain counts start and stop in samples of the file, 3D-Speaker in seconds
    "end": ("end",),
    "session": ("session", "session_id", "recording", "chapter_id", "video"),
    "gender": ("gender", "sex"),
    "split": ("split", "subset", "set"),
}
# Programs of a pipe in wav.scp whose file is read here as well: options that change nothing of the samples.
READERS = {
    "flac": re.compile(r"-[cdsf]+|--(stdout|decode|silent|totally-silent|force)"),
    "sph2pipe": re.compile(r"-p|-f ?\S+"),
}
ROUNDED = 0.02  # seconds by which a table's length of a file may differ from it
CHANNEL = re.compile(r"-c ?([12])")  # the one that sph2pipe takes


def place_in(path: str, speaker: str, otherwise: str) -> tuple[str, str]:
    """(name below the speaker's folder, session): what follows the folder of the speaker in a path if there is one."""
    parts = Path(path).parts[:-1]
    if speaker not in parts:
        return otherwise, ""
    at = len(parts) - 1 - parts[::-1].index(speaker)
    return "/".join((*parts[at + 1 :], Path(path).name)), "/".join(parts[at + 1 :])


def existing(path: str, folder: Path) -> str:
    """A path of a table in full: relative to the table's folder, or to the current one as Kaldi takes it."""
    path = re.sub(r"\$data_root/|\{data_root\}/", "", path)  # SpeechBrain's
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
    utterances, languages, people = {}, _languages(folder), FolderNames()
    for language in languages:
        names = ["validated.tsv"] if (language / "validated.tsv").is_file() else ["train.tsv", "dev.tsv", "test.tsv"]
        for name in names:
            if (language / name).is_file():
                for where, row in _rows(language / name, "\t"):
                    if not row.get("path") or not row.get("client_id"):
                        raise UsageError(f"{where}: no path or no client_id in it")
                    _check_names(where, row["path"], row["client_id"])
                    path = str(language / "clips" / row["path"])
                    path += "" if os.path.splitext(path)[1] else ".mp3"
                    speaker = people.of(row["client_id"], row["client_id"][:24])
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
        files[columns[0]] = _scp_file(folder, number, columns[1:])
    speakers = _map(folder / "utt2spk")
    genders, sessions = (_map(p) if (p := folder / name).is_file() else {} for name in ("spk2gender", "utt2sess"))
    segments = _map(folder / "segments") if (folder / "segments").is_file() else None
    empty = "wav.scp" if not files else "segments" if segments == {} else ""
    if empty:
        raise UsageError(f"{folder / empty}: has no line")
    utterances, people = [], FolderNames()
    for key, (number, columns) in (segments or {name: (0, [name]) for name in files}).items():
        where = f"{folder / 'segments'}:{number}"
        if segments is not None and (len(columns) != 3 or columns[0] not in files):
            raise UsageError(f"{where}: expected 'utterance recording start end', with a recording of wav.scp")
        start, end = (_seconds(where, text) for text in columns[1:]) if segments is not None else (0.0, 0.0)
        if segments is not None and not 0 <= start < end:
            raise UsageError(f"{where}: the segment ends before it starts")
        if key not in speakers or len(speakers[key][1]) != 1:
            raise UsageError(f"{folder / 'utt2spk'}: has no line 'utterance speaker' for '{key}'")
        named, (path, channel) = speakers[key][1][0], files[columns[0]]
        speaker, ending = people.of(named), os.path.splitext(path)[1]
        gender = _second(folder / "spk2gender", "speaker gender", genders, named)
        name, session = place_in(path, speaker, as_folder(key) + ending)
        if segments is not None:
            name, session = as_folder(key) + ending, columns[0]
        session = _second(folder / "utt2sess", "utterance session", sessions, key) or session
        gender = gender_of(gender)
        utterances.append(Utterance(path, speaker, name, session, gender, "", start, end - start, channel))
    what = "Kaldi wav.scp and utt2spk" + (" with segments" if segments is not None else "")
    return described("kaldi", folder, what, utterances)


def _scp_file(folder: Path, number: int, words: list[str]) -> tuple[str, int]:
    """(file, channel) of a line of wav.scp; of a pipe that only decodes, the file that it reads.

    The channel, from 1, is 0 where no one is asked for and where the file has no other.
    """
    if not words[-1].endswith("|"):
        return existing(" ".join(words), folder), 0
    named, channel = _decoded_by(f"{folder / 'wav.scp'}:{number}", " ".join(words).rstrip("| "))
    path = existing(named, folder)
    try:
        with Recording(path) as recording:
            alone = recording.channels == 1 and channel == 1
    except AudioError:
        alone = True  # it is named where it is read
    return path, 0 if alone else channel


def _is_recording(word: str) -> bool:
    return os.path.splitext(word)[1].lower() in (".flac", ".sph", ".wav", ".wv1", ".wv2")


def _decoded_by(where: str, command: str) -> tuple[str, int]:
    """(file, channel from 1, 0 for all) that a command decodes; UsageError if it may do anything else."""
    try:
        program, *words = shlex.split(command) or [""]
    except ValueError as error:
        raise UsageError(f"{where}: a pipe with a quote that does not end: {error}") from error
    if not program:
        raise UsageError(f"{where}: a pipe without a command: write the path of a file")
    name, files, channel = os.path.basename(program), [], 0
    while words:
        word = words.pop(0)
        if name == "sph2pipe" and word in ("-c", "-f") and words:
            word += f" {words.pop(0)}"
        if name == "sph2pipe" and (found := CHANNEL.fullmatch(word)):
            channel = int(found[1])
        elif not word.startswith("-") or word == "-":
            files.append(word)
        elif name in READERS and not READERS[name].fullmatch(word):
            raise UsageError(f"{where}: a pipe, which is not run here, with '{word}': write the path of a file")
    if name not in READERS or len(files) != 1 or not _is_recording(files[0]):
        raise UsageError(f"{where}: a pipe, which is not run here: write the path of a file ({program} ..)")
    return files[0], channel


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
    """Yield (place, object) of each row."""
    try:
        with open(path, **LIST_TEXT) as file:
            if path.suffix.lower() == ".json" and (rows := _of_one_value(path, file.read())) is not None:
                yield from rows
                return
            file.seek(0)
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        row = json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UsageError(f"{path}:{number}: not JSON: {error}") from error
                    yield f"{path}:{number}", row
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {error}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def _of_one_value(path: Path, text: str) -> list | None:
    """(place, object) of each row of a list, or of an object of objects as SpeechBrain has it; None if it is lines."""
    first = text.lstrip().partition("\n")[0]
    if not first:
        return []
    try:
        alone = json.loads(first)
    except (ValueError, RecursionError):
        alone = []  # it goes on
    if isinstance(alone, dict) and not (alone and all(isinstance(row, dict) for row in alone.values())):
        return None
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    if isinstance(whole, dict) and all(isinstance(row, dict) for row in whole.values()):
        return [(f"{path}: '{name}'", row) for name, row in whole.items()]
    if not isinstance(whole, list):
        raise UsageError(f"{path}: expected a list of objects with a path and a speaker, or lines of them")
    return [(f"{path}: entry {number}", row) for number, row in enumerate(whole, 1)]


def read_list(path: Path, reading: Reading) -> Corpus:
    """A train list of lines 'speaker path', the path relative to the list's folder or to the current one."""
    utterances, people = [], FolderNames()
    for number, columns in numbered_lines(path):
        if len(columns) != 2:
            expected = wrong_columns("'speaker path'", len(columns))
            raise UsageError(f"{path}:{number}: {expected}")
        speaker, file = people.of(columns[0]), existing(columns[1], path.parent)
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
    """Yield (place, {column: cell}) of each row; UsageError for one with more cells than there are columns."""
    begun = 1
    try:
        with open(path, newline="", **LIST_TEXT) as file:
            quoting = csv.QUOTE_NONE if between == "\t" else csv.QUOTE_MINIMAL
            reader = csv.DictReader(file, delimiter=between, quoting=quoting, strict=True)
            columns = len(reader.fieldnames or ())
            begun = reader.line_num + 1
            for row in reader:
                begun = reader.line_num + 1
                if any(more := row.pop(None, [])):
                    hint = "" if between == "\t" else "; if a cell holds one, put quotes around it"
                    raise UsageError(
                        f"{path}:{reader.line_num}: {plural(columns + len(more), 'cell')} between "
                        f"{'tabs' if between == chr(9) else repr(between)} for {plural(columns, 'column')}{hint}"
                    )
                yield f"{path}:{reader.line_num}", {(name or "").strip(): cell or "" for name, cell in row.items()}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise UsageError(f"{path}:{begun}: the row that begins here has a quote that does not end: {error}") from error


def _of_rows(path: Path, rows) -> list[Utterance]:
    utterances, people = [], FolderNames()
    for where, row in rows:
        if not isinstance(row, dict):
            raise UsageError(f"{where}: expected an object with a path and a speaker")
        names = columns_of(path, tuple(row))  # rows of JSON need not have the same
        cell = {kind: row.get(name) for kind, name in names.items()}
        for kind in ("path", "speaker"):
            if cell[kind] in (None, ""):
                raise UsageError(f"{where}: no {names['path']} or no {names['speaker']} in it")
            if isinstance(cell[kind], bool) or not isinstance(cell[kind], (str, int)):
                raise UsageError(f"{where}: {names[kind]} is to be a text, not {json.dumps(cell[kind])[:40]}")
        _check_names(where, *(str(cell[kind]) for kind in ("path", "speaker")))
        file, speaker = existing(str(cell["path"]), path.parent), people.of(str(cell["speaker"]))
        start, seconds = _part(where, cell, file)
        if not start and seconds and _is_whole(file, seconds):
            seconds = 0.0
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


def _part(where: str, cell: dict, file: str) -> tuple[float, float]:
    """(start, seconds) of a part of a file; a duration alone is that of the whole file."""
    if cell.get("stop"):
        rate, length = _rate_and_length(file)
        start, stop = (_seconds(where, cell.get(name)) for name in ("start", "stop"))
        unit = 1 if stop <= length + ROUNDED else rate  # no part ends with one of the first samples
        return start / unit, _length(where, start / unit, stop / unit)
    if cell.get("end"):
        start = _seconds(where, cell.get("start"))
        return start, _length(where, start, _seconds(where, cell["end"]))
    if cell.get("start") in (None, ""):
        return 0.0, 0.0
    return _seconds(where, cell["start"]), _seconds(where, cell.get("seconds"))


def _is_whole(file: str, seconds: float) -> bool:
    """Whether so much from its beginning on is all of a file, as NeMo and SpeechBrain write of each."""
    try:
        with Recording(file) as recording:
            return abs(recording.frames / recording.rate - seconds) < ROUNDED
    except AudioError:
        return False


@functools.lru_cache(maxsize=1024)
def _rate_and_length(file: str) -> tuple[int, float]:
    """Sample rate and seconds of a file; any of one that cannot be read, which is named where it is."""
    try:
        with Recording(file) as recording:
            return recording.rate, recording.frames / recording.rate
    except AudioError:
        return SAMPLE_RATE, 0.0


def _length(where: str, start: float, end: float) -> float:
    """Seconds from ``start`` to ``end``."""
    if end <= start:
        raise UsageError(f"{where}: the part ends at {end:g} s, before it starts at {start:g} s")
    return end - start
