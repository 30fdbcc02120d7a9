"""The forms of a train list: lines 'speaker path', a Kaldi folder, JSON lines, tar files of recordings."""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from corpus.list_lines import (
    LIST_TEXT,
    columns_of,
    list_hash,
    not_text,
    numbered_lines,
    opened,
    unreadable,
    wrong_columns,
)
from corpus.tars import SPEAKERS, compression, recordings_of, shards_of
from errors import UsageError, path_hint, shell_path

STREAM = re.compile(r"pipe:|[a-z0-9]+://", re.ASCII | re.IGNORECASE)
CHUNK = 1 << 18  # characters of a list looked at together, which fit into the cache
PATHS = ("path", "wav", "audio_filepath", "audio", "file", "filename")


def files_of(path) -> tuple[str, ...]:
    """The files that a train list is made of: itself, wav.scp and utt2spk of a Kaldi folder, or tar files."""
    path = os.fspath(path)
    shards = shards_of(path)
    if shards:
        return tuple(shards)
    folder = os.path.dirname(path) if os.path.basename(path) == "wav.scp" else path
    if folder != path or os.path.isdir(path):
        return os.path.join(folder, "wav.scp"), os.path.join(folder, "utt2spk")
    return (path,)


def why_no_list(path) -> str:
    """Why a path is no train list: a file, tar files, or a folder with those or wav.scp and utt2spk; "" if it is."""
    try:
        missing = [file for file in files_of(path) if not os.path.isfile(file)]
    except UsageError as error:
        return str(error)
    if not missing:
        return "" if not os.path.isfile(path) or compression(path) is None else f"compressed; unpack it: '{path}'"
    if STREAM.match(path):
        return f"a stream, and rows are read at random places; copy its shards to a disk: '{path}'"
    if os.path.isdir(path):
        if os.path.isfile(os.path.join(path, "pack.json")):
            return f"a pack of pack_data.py, which is a train_pack beside the list that it was made of: '{path}'"
        return f"a folder, and without tar files, or wav.scp and utt2spk, no list: '{path}'"
    if missing != [path]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        return f"no such file: '{missing[0]}'{more} of '{path}'"
    hint = "; name the folder, or write braces as shard-{00000..00041}.tar" if "*" in path else ""
    return f"no such file: '{path}'{hint or path_hint(path)}"


def chunks_of(path):
    """Yield (speakers, paths, line numbers) of a train list, a piece at a time; the generator returns its SHA-256.

    ``speakers`` are texts, ``paths`` is what ``FrontCoder.add`` takes. UsageError names the line of a mistake.
    """
    if shards_of(path):
        return (yield from _shards(path))
    files = files_of(path)
    if len(files) == 2:
        return (yield from _kaldi(*files))
    form = form_of(path)
    if form in ("value", "table"):
        what = {"value": "one JSON value, not a line of JSON for each recording", "table": "a table"}[form]
        order = f"python prepare_data.py {shell_path(path)} --out .."
        raise UsageError(f"{path}: {what}; the train list that {order} makes of it is read here")
    read = _json_lines if form == "json" else _lines
    with opened(path) as file:
        yield from read(path, file)
    return list_hash(path)


def form_of(path) -> str:
    """The form of a list of one file by its first line.

    'json': a line for each recording, as NeMo's manifests and wespeaker's raw.list. 'value': one JSON value, as
    SpeechBrain's. 'table': column names between commas, semicolons or tabs, as of SpeechBrain and 3D-Speaker. 'lines':
    any other.
    """
    try:
        with open(path, **LIST_TEXT) as file:
            first = next((line for line in iter(lambda: file.readline(CHUNK), "") if line.strip()), "").strip()
    except OSError as error:
        raise unreadable(path, error) from error
    if os.path.splitext(path)[1].lower() == ".jsonl":
        return "json"
    if first.startswith(("{", "[")):
        try:
            value = json.loads(first)
        except ValueError:  # it goes on in other lines; or begins with a speaker called so
            return "value" if first in ("{", "[") or first.startswith('{"') else "lines"
        plain = isinstance(value, dict) and not any(isinstance(entry, dict) for entry in value.values())
        return "json" if plain else "value"
    between = max(",;\t", key=first.count)
    cells = {cell.strip(' "').lower() for cell in first.split(between)}
    return "table" if cells.intersection(PATHS) and cells.intersection(SPEAKERS) else "lines"


def _lines(path, file):
    number = 1
    while text := file.read(CHUNK):
        text += file.readline()
        regular = _regular(text)
        if regular is None:
            lines = text.split("\n")
            yield _one_by_one(path, lines, number)
            number += len(lines) - (not lines[-1])
        else:
            words, lengths = regular
            content = "".join(words[1::2]).encode("utf-8", LIST_TEXT["errors"])
            yield words[::2], (content, lengths), np.arange(number, number + len(lengths), dtype=np.int32)
            number += len(lengths)


def _regular(text: str):
    """(words, bytes of each second word) if each line is two words and a space between; else None.

    Ten times as fast as a look at each line.
    """
    text += "" if text.endswith("\n") else "\n"
    content = np.frombuffer(text.encode("utf-8", LIST_TEXT["errors"]), np.uint8)
    low = content <= 32
    places = np.flatnonzero(low)
    between = content[places]
    if len(places) % 2 or (between[::2] != 32).any() or (between[1::2] != 10).any():
        return None
    lengths = np.diff(places, prepend=-1) - 1
    words = text.split()
    if len(words) != len(places) or (lengths == 0).any():  # there is white space beyond ASCII, or an empty word
        return None
    return words, lengths[1::2]


def _one_by_one(path, lines: list[str], first: int):
    names, paths, numbers = [], [], []
    for number, line in enumerate(lines, first):
        if "\0" in line:
            raise not_text(path, number)
        columns = columns_of(line)
        if not columns:
            continue
        if len(columns) != 2:
            expected = wrong_columns("'speaker path'", len(columns))
            raise UsageError(f"{path}:{number}: {expected}")
        names.append(columns[0])
        paths.append(columns[1])
        numbers.append(number)
    return names, joined(paths), np.array(numbers, np.int32)


def joined(texts: list[str]) -> tuple[bytes, np.ndarray]:
    """Texts as ``FrontCoder.add`` takes them."""
    encoded = [text.encode("utf-8", LIST_TEXT["errors"]) for text in texts]
    return b"".join(encoded), np.fromiter(map(len, encoded), np.int32, len(encoded))


# ------------------------------------------------------------------------------------------------------- JSON lines


def _json_lines(path, file):
    """Lines of objects with a path and a speaker, by the names that other toolkits give them."""
    names, paths, numbers = [], [], []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        speaker, recording = _of_object(f"{path}:{number}", line)
        names.append(speaker)
        paths.append(recording)
        numbers.append(number)
        if len(names) == 1 << 16:
            yield names, joined(paths), np.array(numbers, np.int32)
            names, paths, numbers = [], [], []
    yield names, joined(paths), np.array(numbers, np.int32)


def _of_object(place: str, line: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{place}: not a line of JSON: {error}") from error
    if not isinstance(entry, dict):
        raise UsageError(f"{place}: expected an object with a path and a speaker, got '{line.strip()[:40]}'")
    found = []
    for what, known in (("speaker", SPEAKERS), ("path", PATHS)):
        value = next((entry[name] for name in known if entry.get(name) not in (None, "")), None)
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise UsageError(f"{place}: no {what}; it is looked for under {', '.join(known)}")
        found.append(str(value))
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in "".join(found)):
        raise UsageError(f"{place}: a speaker or path with a control character or half a surrogate pair")
    if any(entry.get(name) for name in ("offset", "start", "stop", "end")):
        raise UsageError(
            f"{place}: a part of a recording; python prepare_data.py {shell_path(place.rpartition(':')[0])} cuts them"
        )
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------------------ Kaldi


def _kaldi(scp: str, utt2spk: str):
    """wav.scp and utt2spk, in the order of wav.scp; the line numbers are those of wav.scp."""
    segments = Path(scp).with_name("segments")
    if segments.exists():
        folder = segments.parent
        raise UsageError(
            f"{segments}: parts of recordings; python prepare_data.py {shell_path(folder)} --out .. cuts them"
        )
    speakers = {}
    for number, (utterance, *rest) in numbered_lines(utt2spk):
        if len(rest) != 1:
            raise UsageError(f"{utt2spk}:{number}: expected 'utterance speaker', got {1 + len(rest)} columns")
        speakers[utterance] = rest[0]
    names, paths, numbers = [], [], []
    for number, (utterance, *rest) in numbered_lines(scp):
        if not rest:
            raise UsageError(f"{scp}:{number}: expected 'utterance path'")
        if rest[-1].endswith("|") or rest[0].startswith("|"):
            raise UsageError(f"{scp}:{number}: a command, which is not run here: write the path of a file")
        if utterance not in speakers:
            raise UsageError(f"{scp}:{number}: utterance '{utterance}' has no line in {utt2spk}")
        names.append(speakers[utterance])
        paths.append(" ".join(rest))
        numbers.append(number)
    if len(names) != len(speakers):
        left = set(speakers).difference(columns[0] for _, columns in numbered_lines(scp))
        text = f"{utt2spk}: utterance '{min(left)}' has no line in {scp}" if left else f"{scp}: an utterance twice"
        raise UsageError(text)
    yield names, joined(paths), np.array(numbers, np.int32)
    return hashlib.sha256(f"{list_hash(scp)} {list_hash(utt2spk)}".encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------- tar files


def _shards(path):
    """The recordings of tar files, one file after the other; their numbers stand for those of lines."""
    digest = hashlib.sha256()
    for names, paths, numbers, shard in recordings_of(path):
        for array in (shard.names.content, shard.speakers.content, shard.sizes):
            digest.update(np.ascontiguousarray(array))
        yield names, joined(paths), numbers
    return digest.hexdigest()
