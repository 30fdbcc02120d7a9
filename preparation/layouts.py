"""Which corpus a folder or file is."""

from pathlib import Path

from corpus.list_forms import form_of
from corpus.tars import shards_of
from errors import UsageError
from preparation import known, parquet, shards, tables
from preparation.corpora import Corpus, Reading
from preparation.folders import read_folder

# In the order in which they are tried: name -> (whether a folder is one, reader).
FOLDERS = {
    "musan": (known.is_musan, known.read_musan),
    "rirs": (known.is_rirs, known.read_rirs),
    "webdataset": (shards.is_webdataset, shards.read_webdataset),
    "kaldi": (tables.is_kaldi, tables.read_kaldi),
    "commonvoice": (tables.is_commonvoice, tables.read_commonvoice),
    "librispeech": (known.is_librispeech, known.read_librispeech),
    "cnceleb": (known.is_cnceleb, known.read_cnceleb),
    "voxceleb": (known.is_voxceleb, known.read_voxceleb),
    "parquet": (parquet.is_parquet, parquet.read_parquet),
    "folder": (lambda folder: True, read_folder),
}
FILES = {
    ".jsonl": tables.read_json,
    ".json": tables.read_json,
    ".csv": tables.read_csv,
    ".tsv": tables.read_csv,
    ".parquet": parquet.read_parquet,
    ".tar": shards.read_webdataset,
    ".txt": tables.read_list,
    ".lst": tables.read_list,
}
TABLES = {"json": tables.read_json, "csv": tables.read_csv, "list": tables.read_list}
NAMES = (*FOLDERS, *TABLES)


def read_corpus(path: Path, reading: Reading) -> Corpus:
    """Read a corpus of the layout that is named, or else recognised; noise beside a corpus that is named is too."""
    if path.is_file():
        if path.name in ("wav.scp", "utt2spk"):
            return read_corpus(path.parent, reading)
        reader = TABLES.get(reading.layout) or FILES.get(path.suffix.lower()) or _by_content(path)
        return reader(path, reading)
    noise = next((reader for fits, reader in map(FOLDERS.get, ("musan", "rirs")) if path.is_dir() and fits(path)), None)
    if noise is not None and reading.layout not in ("musan", "rirs", "folder"):
        return noise(path, reading)
    if reading.layout in TABLES:
        raise UsageError(f"--corpus {reading.layout}: '{path}' is a folder, give the file")
    if reading.speaker_level or reading.speaker_pattern:
        return read_folder(path, reading)
    if reading.layout:
        fits, reader = FOLDERS[reading.layout]
        if not fits(path):
            reason = " ".join((fits.__doc__ or "").split()).removeprefix("Whether ").rstrip(".")
            raise UsageError(f"--corpus {reading.layout}: '{path}' does not look so, wanted: {reason}")
        return reader(path, reading)
    return next(reader for fits, reader in FOLDERS.values() if fits(path))(path, reading)


def _by_content(path: Path):
    """The reader of a file whose ending tells nothing, as wespeaker's raw.list and shard.list."""
    if shards_of(path):
        return shards.read_webdataset
    form = form_of(path)
    if form == "lines":
        raise UsageError(f"prepare_data.py: '{path}' is no folder, no archive and no {', '.join(FILES)}")
    return tables.read_csv if form == "table" else tables.read_json
