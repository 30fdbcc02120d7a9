"""Write packs: recordings decoded once into a few large files, shard by shard, so that a killed run goes on."""

import collections
import contextlib
import itertools
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from corpus.containers import AudioError
from corpus.decode import Recording
from corpus.locks import folder_lock
from corpus.pack import (
    BAD,
    ENTRY,
    FLOAT32,
    FORMAT,
    FULL_SCALE,
    HEADER,
    INDEX,
    INT16,
    KEYS,
    OFFSETS,
    PATHS,
    TEXTS,
    Pack,
    keys_of,
    shard_name,
)
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


def pack_file(key: int, path: str) -> Packed:
    """Decode a file; samples of 16 bits are stored as such, others as float32, so that reading gives the same bits."""
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
    content = np.ascontiguousarray(small if exact else x).data.cast("B")
    entry["kind"], entry["rate"], entry["crc"] = INT16 if exact else FLOAT32, rate, zlib.crc32(content)
    entry["frames"], entry["channels"] = x.shape
    return Packed(key, entry, content, {"notes": notes} if notes else {})


def stamp(path: str) -> tuple[int, int]:
    """Size and time of change of a file in ns, (-1, -1) if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def locked(folder: Path):
    """Keep a folder, made if there is none, for one writer; UsageError if it has one or cannot be written."""
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(folder_lock(folder / ".lock", f"{folder}: another pack_data.py writes there"))
        except OSError as error:
            raise UsageError(f"--out: '{folder}' cannot be written: {error.strerror or error}") from error
        yield


class Parts:
    """The finished shards of a pack that is being written, and what is known of their files by key."""

    def __init__(self, folder: Path):
        self.folder, self.shards = folder, []
        self.entries, self.told = np.zeros(0, PART), {}
        while (part := self.path(len(self.shards), ".npy")).is_file():
            texts = json.loads(part.with_suffix(".json").read_text(encoding="utf-8"))
            self._take(np.load(part), texts, self.path(len(self.shards), ".bin"))
        for left in folder.glob(".shard-*.tmp"):  # of a process that was killed
            left.unlink()

    def path(self, number: int, ending: str) -> Path:
        """A file of a shard."""
        return (self.folder / shard_name(number)).with_suffix(ending)

    def _take(self, entries, texts: dict, path: Path):
        self.entries = np.concatenate([self.entries, entries])
        self.told.update({int(key): told for key, told in texts.items()})
        self.shards.append({"bytes": path.stat().st_size, "files": len(entries)})

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
        write_atomically(self.path(number, ".json"), json.dumps(texts).encode())
        table = np.array(entries, PART)
        with replacing(self.path(number, ".npy")) as temporary, open(temporary, "wb") as file:
            np.save(file, table)
        self._take(table, {str(key): told for key, told in texts.items()}, self.path(number, ".bin"))


def write_pack(listed: TrainList, out: Path, shard_bytes: int, workers: int) -> dict:
    """Pack the files of a list into ``out``; those that are in it and have not changed since stay as they are.

    Returns {"files", "new", "bad", "hours", "bytes"}. The same list gives the same pack, however often it was killed.
    """
    with locked(out):
        parts, keys = Parts(out), keys_of(listed.paths)
        first = np.unique(keys, return_index=True)[1]
        found = parts.find(keys[first])
        todo = sorted(int(row) for row, part in zip(first, found) if part < 0 or changed(listed.file(row), parts, part))
        with (
            ThreadPoolExecutor(workers) as pool,
            tqdm(total=len(todo), unit="file", desc="packing", disable=None) as bar,
        ):
            files = ahead(pool, ((int(keys[row]), listed.file(row)) for row in todo), 4 * workers, bar)
            for packed in files:
                parts.add(itertools.chain([packed], files), shard_bytes)
        return finish(listed, keys, parts, len(todo))


def changed(path: str, parts: Parts, part: int) -> bool:
    """Whether a file is another one than that which was packed; one that is gone is not."""
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
    arrays = {INDEX: index, KEYS: keys, PATHS: listed.paths.content, OFFSETS: listed.paths.offsets}
    for name, array in arrays.items():
        with replacing(out / name) as temporary, open(temporary, "wb") as file:
            np.save(file, array)
    write_atomically(out / TEXTS, json.dumps(told).encode())
    header = {"format": FORMAT, "list": listed.sources[0].path, "root": listed.sources[0].root}
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
            if (
                entry["kind"] != BAD
                and zlib.crc32(np.ascontiguousarray(pack.stored(row)).data.cast("B")) != entry["crc"]
            ):
                yield pack.paths[row]
            bar.update()
