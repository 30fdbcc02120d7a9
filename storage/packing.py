"""Write packs: recordings decoded once into a few large files, shard by shard, so that a killed run goes on."""

import collections
import contextlib
import io
import itertools
import json
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from corpus.containers import AudioError
from corpus.decode import Recording, read_bytes
from corpus.locks import folder_lock
from corpus.pack import (
    BAD,
    ENTRY,
    FLAC,
    FLOAT32,
    FORMAT,
    FORMAT_FLAC,
    FULL_SCALE,
    HEADER,
    INDEX,
    INT16,
    KEYS,
    LENGTH,
    OFFSETS,
    PATHS,
    TEXTS,
    Pack,
    hash_of,
    shard_name,
)
from corpus.tars import size_and_time
from corpus.texts import Texts, keys_of
from corpus.train_list import TrainList
from errors import UsageError
from storage.files import replacing, write_atomically

ALIGNED = 64  # bytes at whose multiples the samples of a file begin
PART = np.dtype([("key", "<u8"), ("entry", ENTRY)])  # what is known of a file of a finished shard


@dataclass
class Packed:
    """A file as it goes into a shard: its entry, the stored bytes, and what is to be said of it."""

    key: int
    entry: np.ndarray
    content: bytes | memoryview = b""
    told: dict = field(default_factory=dict)


def pack_file(key: int, path: str, flac: bool = False) -> Packed:
    """Decode a file; samples of 16 bits are stored as such, others as float32, so that reading gives the same bits.

    ``flac``: those of 16 bits are encoded, in about half of the room.
    """
    entry = np.zeros((), ENTRY)
    entry["size"], entry["time"] = stamp(path)
    try:
        with Recording(path) as recording:
            x = np.concatenate(list(recording.blocks()))
            rate, notes = recording.rate, recording.notes
    except AudioError as error:
        return Packed(key, entry, told={"reason": str(error)})
    inside = x.max() < 1 and x.min() >= -1  # and so no NaN
    small = (x * np.float32(32768)).astype(np.int16) if inside else np.zeros(0, np.int16)
    exact = small.shape == x.shape and np.array_equal((small * FULL_SCALE).view(np.int32), x.view(np.int32))
    content, kind = np.ascontiguousarray(small if exact else x).data.cast("B"), INT16 if exact else FLOAT32
    if flac and exact and (encoded := encode(small, rate)):
        content, kind = memoryview(len(encoded).to_bytes(LENGTH, "little") + encoded), FLAC
    entry["kind"], entry["rate"], entry["crc"] = kind, rate, zlib.crc32(content)
    entry["frames"], entry["channels"] = x.shape
    return Packed(key, entry, content, {"notes": notes} if notes else {})


def encode(samples: np.ndarray, rate: int) -> bytes:
    """Samples (n, channels) int16 as flac; b"" if it cannot hold them, as those of more than 8 channels."""
    coded = io.BytesIO()
    try:
        soundfile.write(coded, samples, rate, format="FLAC", subtype="PCM_16")
        again = read_bytes(coded.getvalue(), 0, len(samples) + 1)
    except (soundfile.SoundFileError, TypeError, ValueError):
        return b""
    return coded.getvalue() if np.array_equal(again, samples * FULL_SCALE) else b""


def stamp(path: str) -> tuple[int, int]:
    """Size and time of change of a file or member in ns, (-1, -1) if there is none."""
    try:
        return size_and_time(path)
    except OSError:
        return -1, -1


@contextlib.contextmanager
def locked(folder: Path):
    """Keep a folder, made if there is none, for one writer; UsageError if it has one, or if the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(folder / ".lock", f"{folder}: another pack_data.py writes there"):
            yield
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"--out: {error.filename or folder}: {error.strerror or error}") from error


class Parts:
    """The finished shards of a pack that is being written, and what is known of their files by key."""

    def __init__(self, folder: Path):
        self.folder, self.shards = folder, []
        self.entries, self.told = np.zeros(0, PART), {}
        while (part := self.path(len(self.shards), ".npy")).is_file():
            try:
                self._take(*self._read(part))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
                reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
                print(f"{part.with_suffix('')}: {reason}; its files are packed anew", file=sys.stderr)
                self._empty(len(self.shards))
        for left in folder.glob(".shard-*.tmp"):  # of a process that was killed
            left.unlink()

    def path(self, number: int, ending: str) -> Path:
        """A file of a shard."""
        return (self.folder / shard_name(number)).with_suffix(ending)

    def _read(self, part: Path):
        """The entries and texts of a finished shard, and its size; OSError or ValueError, among others, if damaged."""
        texts = json.loads(part.with_suffix(".json").read_text(encoding="utf-8"))
        entries, size = np.load(part), part.with_suffix(".bin").stat().st_size
        if entries.dtype != PART or entries.ndim != 1 or (entries["entry"]["shard"] != len(self.shards)).any():
            raise ValueError(f"{part.name} is damaged")
        wanted = end_of(entries["entry"], part.with_suffix(".bin"))
        if size != wanted:
            raise ValueError(f"has {size} bytes instead of {wanted}")
        return entries, {int(key): dict(told) for key, told in texts.items()}, size

    def _empty(self, number: int):
        """Put an empty shard into the place of a damaged one, whose files are then missing."""
        (self.folder / HEADER).unlink(missing_ok=True)  # the index does not hold any more
        write_atomically(self.path(number, ".bin"), b"")
        self._finish(number, [], {})

    def _take(self, entries, texts: dict, size: int):
        for key in self.told.keys() & set(entries["key"].tolist()):  # it was said of what lay at the path before
            del self.told[key]
        self.entries = np.concatenate([self.entries, entries])
        self.told.update(texts)
        self.shards.append({"bytes": size, "files": len(entries)})

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The newest entry of each key (N,), -1 for none."""
        order = np.argsort(self.entries["key"], kind="stable")
        known = self.entries["key"][order]
        place = np.searchsorted(known, keys, side="right") - 1
        found = np.where(place >= 0, order[np.maximum(place, 0)], -1) if len(known) else np.full(len(keys), -1)
        return np.where((found >= 0) & (known[np.maximum(place, 0)] == keys), found, -1) if len(known) else found

    def add(self, files, most: int):
        """Write a shard of files until it has ``most`` bytes or there are no more."""
        number, entries, texts = len(self.shards), [], {}
        with replacing(self.path(number, ".bin")) as temporary, open(temporary, "wb") as shard:
            for packed in files:
                shard.write(bytes(-shard.tell() % ALIGNED))
                packed.entry["shard"], packed.entry["offset"] = number, shard.tell()
                shard.write(packed.content)
                entries.append((packed.key, packed.entry))
                if packed.told:
                    texts[packed.key] = packed.told
                if shard.tell() >= most:
                    break
        self._finish(number, entries, texts)

    def _finish(self, number: int, entries: list, texts: dict):
        """Write what is known of the files of a shard that is there; with it the shard is finished."""
        write_atomically(self.path(number, ".json"), json.dumps(texts).encode())
        table = np.array(entries, PART)
        with replacing(self.path(number, ".npy")) as temporary, open(temporary, "wb") as file:
            np.save(file, table)
        self._take(table, texts, self.path(number, ".bin").stat().st_size)


def end_of(entries: np.ndarray, shard: Path) -> int:
    """Bytes of a shard with these entries."""
    if not len(entries):
        return 0
    last = entries[np.lexsort((entries["kind"] != BAD, entries["offset"]))[-1]]  # a BAD one has no bytes
    offset, samples = int(last["offset"]), int(last["frames"]) * int(last["channels"])
    if last["kind"] != FLAC:
        return offset + samples * {INT16: 2, FLOAT32: 4}.get(int(last["kind"]), 0)
    with open(shard, "rb") as file:
        file.seek(offset)
        return offset + LENGTH + int.from_bytes(file.read(LENGTH), "little")


def write_pack(listed: TrainList, out: Path, shard_bytes: int, workers: int, flac: bool = False) -> dict:
    """Pack the files of a list into ``out``; those that are in it and have not changed since stay as they are.

    ``flac``: samples of 16 bits are stored as such; UsageError for a pack that was begun the other way.

    Returns {"files", "new", "bad", "hours", "bytes"}. The same list gives the same pack, however often it was killed.
    """
    with locked(out):
        parts, keys = Parts(out), keys_of(listed.paths)
        kinds = set(parts.entries["entry"]["kind"].tolist())
        if (INT16 in kinds and FLAC not in kinds) if flac else FLAC in kinds:  # flac may hold some as samples
            there, asked = ("samples", "flac") if flac else ("flac", "samples")
            raise UsageError(f"--format: {out} holds {there}; choose another folder for {asked}")
        first = np.unique(keys, return_index=True)[1]
        found = parts.find(keys[first])
        todo = sorted(int(row) for row, part in zip(first, found) if missing(listed.file(row), parts, part))
        before, bad = len(parts.entries), np.append(parts.entries["entry"]["kind"] == BAD, False)[found]
        known = set(keys[first[bad]].tolist())
        with (
            ThreadPoolExecutor(workers) as pool,
            tqdm(total=len(todo), unit="file", desc="packing", disable=None) as bar,
        ):
            files = ahead(pool, ((int(keys[row]), listed.file(row), flac) for row in todo), workers + 2, bar)
            files = (packed for packed in files if packed.entry["kind"] != BAD or packed.key not in known)
            for packed in files:
                parts.add(itertools.chain([packed], files), shard_bytes)
        return finish(listed, keys, parts, len(parts.entries) - before)


def missing(path: str, parts: Parts, part: int) -> bool:
    """Whether a file is to be packed: it is new, changed (one that is gone is not), or could not be read before."""
    if part < 0 or parts.entries[part]["entry"]["kind"] == BAD:  # for its disk may not have answered
        return True
    now, entry = stamp(path), parts.entries[part]["entry"]
    return now != (-1, -1) and now != (int(entry["size"]), int(entry["time"]))


def ahead(pool, jobs, most: int, bar):
    """Yield the packed files of jobs in their order, ``most`` of which are worked on ahead."""
    waiting: collections.deque = collections.deque()
    for job in jobs:
        waiting.append(pool.submit(pack_file, *job))
        if len(waiting) >= most:
            yield waiting.popleft().result()
            bar.update()
    while waiting:
        yield waiting.popleft().result()
        bar.update()


def finish(listed: TrainList, keys, parts: Parts, new: int) -> dict:
    """Write the index of a list whose files are all in finished shards."""
    out, rows = parts.folder, parts.find(keys)
    index = parts.entries["entry"][rows]
    told = {row: parts.told[key] for row, key in enumerate(keys.tolist()) if key in parts.told}
    texts = json.dumps(told).encode()
    paths = Texts.of(listed.paths)
    arrays = {INDEX: index, KEYS: keys, PATHS: paths.content, OFFSETS: paths.offsets}
    (out / HEADER).unlink(missing_ok=True)  # killed in between, it is no pack rather than one of two lists
    for name, array in arrays.items():
        with replacing(out / name) as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    write_atomically(out / TEXTS, texts)
    format = FORMAT_FLAC if (index["kind"] == FLAC).any() else FORMAT
    header = {"format": format, "list": listed.sources[0].path, "root": listed.sources[0].root}
    header.update(index_hash=hash_of(*arrays.values(), texts))
    header.update(list_sha256=listed.hash, files=len(keys), shards=parts.shards)
    write_atomically(out / HEADER, (json.dumps(header, indent=1, ensure_ascii=False) + "\n").encode(errors="replace"))
    once = index[np.unique(keys, return_index=True)[1]]
    seconds = (once["frames"] / np.maximum(once["rate"], 1)).sum()
    bad = [(listed.file(row), listed.place(row), told[row]["reason"]) for row in np.flatnonzero(index["kind"] == BAD)]
    size = sum(shard["bytes"] for shard in parts.shards)
    return {"files": len(once), "new": new, "bad": bad, "hours": float(seconds) / 3600, "bytes": size}


def damaged(pack: Pack):
    """Yield the path of each file of a pack whose stored bytes have another checksum than when they were written."""
    with tqdm(total=len(pack), unit="file", desc="checking", disable=None) as bar:
        for row, entry in enumerate(pack.index):
            if entry["kind"] != BAD and not whole(pack, row):
                yield pack.paths[row]
            bar.update()


def whole(pack: Pack, row: int) -> bool:
    """Whether the stored bytes of a file are there and have the checksum that they were written with."""
    try:
        return zlib.crc32(pack.content(row)) == pack.index["crc"][row]
    except AudioError:
        return False
