"""Recordings packed into a few large files, read by mapping them into memory: the samples of the files, bit for bit."""

import functools
import hashlib
import json
import os
from pathlib import Path

import numpy as np

import corpus.decode
from corpus.containers import AudioError
from corpus.tars import shards_of
from corpus.texts import Texts, TextSequence, find_keys, keys_of
from errors import UsageError, plural, shell_path

FORMAT, FORMAT_FLAC = 1, 2  # the second where a recording is stored as flac
HEADER, INDEX, PATHS, OFFSETS, KEYS, TEXTS = (
    *("pack.json", "index.npy", "paths.npy", "offsets.npy", "keys.npy", "texts.json"),
)
# ``kind``: how samples are stored, interleaved; FLAC: as such a stream, behind its length in LENGTH bytes; BAD: the
# file cannot be read. ``crc`` is the CRC-32 of what is stored, ``offset`` its place in the shard; ``size`` and ``time``
# are those of the file that was packed.
ENTRY = np.dtype(
    [("shard", "<u4"), ("kind", "<u2"), ("channels", "<u2"), ("rate", "<u4"), ("crc", "<u4")]
    + [("frames", "<u8"), ("offset", "<u8"), ("size", "<i8"), ("time", "<i8")]
)
BAD, INT16, FLOAT32, FLAC = 0, 1, 2, 3
LENGTH = 8
STORED = {INT16: np.dtype("<i2"), FLOAT32: np.dtype("<f4")}
FULL_SCALE = np.float32(1 / 32768)
NOTHING: dict = {}  # what is to be said of most files


def shard_name(number: int) -> str:
    """Name of a shard."""
    return f"shard-{number:05}.bin"


def hash_of(*parts) -> str:
    """Hash of arrays and bytes: of the index of a pack and all that belongs to it."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return found.hexdigest()


class Pack:
    """A folder that pack_data.py wrote; ``recording(row)`` opens a file of it as ``Recording`` opens one on disk.

    Index and samples are mapped, so that all processes share them, and stay as they are if the folder is packed again.
    UsageError if it is no pack or lacks a part.
    """

    def __init__(self, folder):
        self.folder, self.refused = os.fspath(folder), ""
        try:
            self.header = json.loads(Path(folder, HEADER).read_text(encoding="utf-8"))
            if self.header["format"] not in (FORMAT, FORMAT_FLAC):
                known = f"{FORMAT} and {FORMAT_FLAC}"
                raise UsageError(f"{self._path(HEADER)}: format {self.header['format']}, this program reads {known}")
            self.index, self.keys, *paths = (self._mapped(name) for name in (INDEX, KEYS, PATHS, OFFSETS))
            texts = Path(folder, TEXTS).read_bytes()
            self.identity = hash_of(self.index, self.keys, *paths, texts)
            if self.header.get("index_hash", self.identity) != self.identity:
                raise ValueError("its index is damaged, or of another packing: pack again")
            self._check(*paths)
            self.paths = Texts(*paths)
            self.texts = {int(row): dict(value) for row, value in json.loads(texts).items()}
            wanted = [int(shard["bytes"]) for shard in self.header["shards"]]
            self.shards = [self._shard(shard_name(number)) for number in range(len(wanted))]
        except FileNotFoundError as error:
            if shards_of(self.folder):
                raise UsageError(f"{self.folder}: holds tar files, and those are a train_list, not a pack") from error
            command = f"python pack_data.py --out {shell_path(self.folder)}"
            raise UsageError(f"{error.filename}: no such file; {command} .. makes a pack, or finishes it") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            raise UsageError(f"{self.folder}: not a pack of pack_data.py: {error}") from error
        for number, (shard, size) in enumerate(zip(self.shards, wanted)):
            if len(shard) != size:
                raise UsageError(
                    f"{self._path(shard_name(number))}: has {len(shard)} bytes instead of {size}; pack again: files "
                    "that it lacks are packed anew"
                )

    def _check(self, content: np.ndarray, offsets: np.ndarray):
        """Refuse arrays that cannot be an index: ValueError."""
        kinds = (self.index.dtype, self.keys.dtype, content.dtype, offsets.dtype)
        right = kinds == (ENTRY, np.uint64, np.uint8, np.int64) and self.index.ndim == offsets.ndim == content.ndim == 1
        if not (right and len(self.index) == len(self.keys) == len(offsets) - 1):
            raise ValueError("its index is damaged")
        if offsets[0] != 0 or offsets[-1] != len(content) or (np.diff(offsets) < 0).any():
            raise ValueError(f"{OFFSETS} is damaged")
        rates = self.index["rate"][self.index["kind"] != BAD]
        if len(rates) and not corpus.decode.RATES[0] <= rates.min() <= rates.max() <= corpus.decode.RATES[1]:
            raise ValueError(f"{INDEX} has a sample rate of {rates.min()} or {rates.max()} Hz")
        if not isinstance(self.header["list_sha256"], str):
            raise ValueError(f"{HEADER} is damaged")

    def __reduce__(self):
        return _mapped_again, (self.folder, self.identity)

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def _mapped(self, name: str) -> np.ndarray:
        return np.asarray(np.load(self._path(name), mmap_mode="r"))  # plain: each look into a memmap costs microseconds

    def _shard(self, name: str) -> np.ndarray:
        path = self._path(name)
        return np.asarray(np.memmap(path, np.uint8, "r")) if os.path.getsize(path) else np.zeros(0, np.uint8)

    def __len__(self):
        return len(self.index)

    def rows_of(self, paths: TextSequence, numbers: range, list_hash: str, place: str) -> np.ndarray:
        """The row (N,) int32 of each path of a list, which are ``numbers`` of ``paths``.

        UsageError, after ``place``, if one is not in the pack.
        """
        if list_hash == self.header["list_sha256"] and len(numbers) == len(self):
            return np.arange(len(self), dtype=np.int32)
        order = np.argsort(self.keys, kind="stable")
        rows = find_keys(self.keys, order, keys_of(paths.between(numbers.start, numbers.stop))).astype(np.int32)
        missing = np.flatnonzero(rows < 0)
        if len(missing):
            raise UsageError(
                f"{place}: {plural(len(missing), 'file')} of the list are not in {self.folder}, the first "
                f"'{paths[numbers[int(missing[0])]]}'; python pack_data.py with this list adds them"
            )
        return rows

    def recording(self, row: int, path: str) -> "PackedRecording":
        """Open a file; ``path`` is where it was, for what is said of it. AudioError if it could not be read then."""
        if self.refused:
            raise UsageError(self.refused)
        return PackedRecording(self, int(row), path)

    def content(self, row: int) -> np.ndarray:
        """The stored bytes (n,) of a file, as they are mapped; AudioError if they are not there."""
        if self.index["kind"][row] != FLAC:
            return self.stored(row).reshape(-1).view(np.uint8)
        shard, offset = int(self.index["shard"][row]), int(self.index["offset"][row])
        there = self.shards[shard][offset:] if shard < len(self.shards) else np.zeros(0, np.uint8)
        size = int.from_bytes(there[:LENGTH].tobytes(), "little")
        if not 0 < size <= len(there) - LENGTH:
            raise AudioError(f"row {row} of {self._path(INDEX)} is damaged")
        return there[: LENGTH + size]

    def stored(self, row: int) -> np.ndarray:
        """The stored samples (frames, channels) of a file, as they are mapped; AudioError if they are not there."""
        shard, kind, channels, _, _, frames, offset, *_ = self.index[row].item()
        stored = STORED.get(kind)
        if stored is None or shard >= len(self.shards):
            raise AudioError(f"row {row} of {self._path(INDEX)} is damaged")
        size = frames * channels * stored.itemsize
        content = self.shards[shard][offset : offset + size]
        if len(content) != size or not size:
            raise AudioError(f"row {row} of {self._path(INDEX)} is damaged")
        return content.view(stored).reshape(frames, channels)


def _mapped_again(folder: str, identity: str) -> Pack:
    """The pack of another process; if it is not the same any more, its recordings are refused by UsageError.

    Not here: a process that is spawned could not say why it ended.
    """
    try:
        pack, refused = Pack(folder), ""
        if pack.identity != identity:
            refused = f"{folder}: was packed again since the run began, its rows are others; start the run again"
    except UsageError as error:
        pack, refused = Pack.__new__(Pack), str(error)
    pack.refused = refused
    return pack


class PackedRecording:
    """A file of a pack, with what crops are read by of a ``Recording``, and the same results."""

    codec = "unknown"  # of the file that was packed; no more is asked of crops to train on

    def __init__(self, pack: Pack, row: int, path: str):
        if corpus.decode.on_open is not None:
            corpus.decode.on_open(path)
        _, self.kind, self.channels, self.rate, self.crc, self.frames, *_ = pack.index[row].item()
        told = pack.texts.get(row, NOTHING)
        if self.kind == BAD:
            raise AudioError(told.get("reason", "could not be read when it was packed"))
        self.pack, self.row, self.path = pack, row, path
        self.notes = [(kind, text) for kind, text in told.get("notes", ())]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def read(self, start: int, count: int) -> np.ndarray:
        """Read ``count`` samples from ``start`` on -> (count, channels) float32."""
        if self.kind == FLAC:
            return self._decoded(start, count)
        stored = self.pack.stored(self.row)[start : start + count]
        if len(stored) < count:
            raise AudioError(f"the pack has {self.frames} samples of it, reading ends there")
        x = stored.astype(np.float32)
        if stored.dtype == STORED[INT16]:
            x *= FULL_SCALE
        return x

    def _decoded(self, start: int, count: int) -> np.ndarray:
        with corpus.decode.reading():
            x = corpus.decode.read_bytes(self.pack.content(self.row)[LENGTH:], start, count)
        if x.shape != (count, self.channels):
            raise AudioError(f"the pack has {self.frames} samples of it, reading ends at {start + len(x)}")
        return x

    def blocks(self, size: int = corpus.decode.BLOCK):
        """Yield all samples in blocks (samples, channels) float32."""
        for start in range(0, self.frames, size):
            yield self.read(start, min(size, self.frames - start))

    def loudest(self) -> int:
        """The channel of the most energy in the whole file, from 1."""
        return _loudest(self.pack, self.row)


@functools.lru_cache(maxsize=1 << 16)
def _loudest(pack: Pack, row: int) -> int:
    recording = pack.recording(row, "")
    return int(np.argmax(sum(np.square(block, dtype=np.float64).sum(axis=0) for block in recording.blocks()))) + 1
