"""Hugging Face data sets: parquet files that hold the recordings themselves."""

import os
from pathlib import Path

from errors import UsageError
from preparation.corpora import Corpus, FolderNames, Reading, Utterance, as_folder, gender_of
from preparation.tables import COLUMNS, described, split_of
from settings.command_line import need

ROWS = 64  # read at a time


def is_parquet(folder: Path) -> bool:
    """Whether there are parquet files in it, or in a folder such as data/."""
    return any(True for pattern in ("*.parquet", "*/*.parquet", "*/*/*.parquet") for _ in folder.glob(pattern))


def read_parquet(path: Path, reading: Reading) -> Corpus:
    """The recordings of all parquet files, written below ``reading.work``; those that are there already are left."""
    need("a folder of parquet files", "pyarrow")
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    people = FolderNames()
    utterances = [utterance for file in files for utterance in _of_file(file, people, Path(reading.work))]
    return described("parquet", path, f"{len(files)} parquet files", utterances)


def _of_file(file: Path, people: FolderNames, out: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        names = {name.lower(): name for name in table.schema_arrow.names}
        columns = {kind: next((names[w] for w in COLUMNS[kind] if w in names), None) for kind in COLUMNS}
        columns["path"] = names.get("audio") or columns["path"]
        if columns["path"] is None or columns["speaker"] is None:
            raise UsageError(f"{file}: no column 'audio' or no column 'speaker_id' among {', '.join(names)}")
        wanted = [columns[kind] for kind in ("path", "speaker", "session", "gender") if columns[kind]]
        number = 0
        for batch in table.iter_batches(batch_size=ROWS, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                cell = {kind: row.get(name) for kind, name in columns.items() if name}
                yield _utterance(file, number, cell, people, out)
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{file}: cannot be read: {error}") from error


def _utterance(file: Path, number: int, cell: dict, people: FolderNames, out: Path) -> Utterance:
    audio = cell["path"]
    if not isinstance(audio, dict) or not audio.get("bytes"):
        raise UsageError(f"{file}: row {number}: holds no recording, only a path")
    if isinstance(cell["speaker"], bool) or not isinstance(cell["speaker"], (str, int)) or cell["speaker"] == "":
        raise UsageError(f"{file}: row {number}: its speaker is {cell['speaker']!r}, and no name")
    speaker = people.of(str(cell["speaker"]))
    original = os.path.basename(audio.get("path") or "") or "audio.wav"
    name = f"{as_folder(file.stem)}-{number:06d}-{as_folder(original)}"
    place = out / speaker / name
    if not place.exists() or place.read_bytes() != audio["bytes"]:
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(place.name + ".part")
        part.write_bytes(audio["bytes"])
        os.replace(part, place)
    gender, session = gender_of(str(cell.get("gender") or "")), str(cell.get("session") or "")
    return Utterance(str(place), speaker, name, session, gender, split_of(file.stem.partition("-")[0]))
