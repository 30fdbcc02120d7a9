"""Noise recordings and impulse responses in one memory-mapped file, made once and shared by all loader processes.

The file holds the samples of each recording at the rate of the run, as int16 where these have the same bits, else as
float32, and behind them an index. Its name has a hash of the rate, and of the names, sizes and times of change of the
recordings below their folder: packs of several rates lie side by side.
"""

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from config import SAMPLE_RATE
from corpus.audio import AudioError, read_crop
from corpus.locks import folder_lock
from corpus.progress import FileProgress
from errors import plural, rank_prefix, size_text

MAGIC = b"speaker sounds 1"  # at the beginning and at the end of a whole file
ALIGNED = 64
COMPRESSED = 8  # times the size that a recording may have once it is decoded
UNCACHED = "none"  # value of ``augment_cache`` that packs nothing


class Pack:
    """Recordings of one pack by number, in memory that is mapped: nothing is read before it is used."""

    def __init__(self, path):
        self.path = str(path)
        with open(path, "rb") as f:
            self.map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        end = len(self.map) - len(MAGIC) - 8
        if end < len(MAGIC) or self.map[: len(MAGIC)] != MAGIC or self.map[end + 8 :] != MAGIC:
            raise ValueError("it is not whole")
        index = json.loads(self.map[int.from_bytes(self.map[end : end + 8], "little") : end])
        self.offsets, self.lengths = np.array(index["offsets"], np.int64), np.array(index["lengths"], np.int64)
        self.short = np.array(index["short"], bool)
        self.reasons = {int(number): reason for number, reason in index["reasons"].items()}

    def __reduce__(self):  # a process that is spawned maps it anew
        return _mapped_again, (self.path,)

    def stored(self, number: int) -> np.ndarray:
        """The samples of a recording as they are stored, int16 or float32; AudioError if it could not be read."""
        if number in self.reasons:
            raise AudioError(self.reasons[number])
        kind = np.int16 if self.short[number] else np.float32
        return np.frombuffer(self.map, kind, self.lengths[number], self.offsets[number])


def _mapped_again(path: str) -> Pack | None:
    """The pack of another process; None, and a line, if another run has made a newer one: the files are read then."""
    try:
        return Pack(path)
    except (OSError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        _say(f"{path}: {reason}: made again by another run? Its recordings are read file by file, which takes longer")
        return None


def packed(root: str, paths: list[str], channel: str, folder: str, sample_rate: int = SAMPLE_RATE) -> Pack | None:
    """The pack of the recordings ``paths`` below ``root`` in ``folder``, made if there is none or they have changed.

    None, and a line that says why, if it cannot be written or read; with ``folder`` UNCACHED without a line.
    """
    if folder == UNCACHED:
        return None
    try:
        files = _stamps(root, paths)
        place = Path(folder).absolute()
        whole, rate = os.path.abspath(root), [] if sample_rate == SAMPLE_RATE else [sample_rate]
        family = f"{''.join(c for c in Path(whole).name if c.isalnum())}-{_hash([whole, channel, *rate])[:8]}"
        path = place / f"{family}-{_hash([MAGIC.decode(), channel, files, *rate])[:16]}.pack"
        with contextlib.suppress(OSError, ValueError, KeyError):  # only to make one may the folder have to be written
            if _mended(found := Pack(path), paths, channel) is None:
                return found
        place.mkdir(parents=True, exist_ok=True)
        with folder_lock(place / f"{family}.lock"):
            found = _opened(path, paths, channel)
            size = sum(_decoded(*file) for file in files)
            return found or _made(root, paths, channel, sample_rate, path, family, size)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        _say(f"augment_cache: no pack in {folder}: {reason}; {root} is read file by file, which takes longer")
        return None


def _stamps(root: str, paths: list[str]) -> list[tuple[str, int, int]]:
    """Name below ``root``, size and time of change of each file; a missing one has none."""
    folder = os.path.join(str(Path(root)), "")

    def stamp(path):
        name = str(path).removeprefix(folder)
        try:
            found = os.stat(path)
        except OSError:
            return name, 0, 0
        return name, found.st_size, found.st_mtime_ns

    with ThreadPoolExecutor(16) as pool:  # on a network disk each call waits
        return list(pool.map(stamp, paths))


def _decoded(path: str, size: int, changed: int) -> int:
    """About how many bytes a file has once it is decoded."""
    return size if path.lower().endswith(".wav") else COMPRESSED * size


def _hash(value) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogatepass")).hexdigest()


def _say(text: str):
    tqdm.write(f"{'' if os.environ.get('RANK') == '0' else rank_prefix()}{text}")
    sys.stdout.flush()


def _opened(path: Path, paths, channel: str) -> Pack | None:
    """The pack if there is one that can stay."""
    try:
        found = Pack(path) if path.is_file() else None
    except (OSError, ValueError, KeyError) as error:
        _say(f"{path}: {error}; it is made again")
        return None
    mended = found and _mended(found, paths, channel)
    if mended:
        _say(f"{path}: {mended} can be read now; it is made again")
    return None if mended else found


def _mended(found: Pack, paths, channel: str) -> str | None:
    """The first recording that could not be read for the pack and can be read now, as after a fault of the disk."""
    for number in found.reasons:
        with contextlib.suppress(AudioError):
            read_crop(paths[number], channel=channel)
            return paths[number]
    return None


def _made(root, paths, channel: str, sample_rate: int, path: Path, family: str, size: int) -> Pack:
    """Read all recordings into a new pack, and remove those that it replaces."""
    began, temporary = time.monotonic(), path.with_suffix(f".{os.getpid()}.tmp")
    for left in path.parent.glob(f"{family}-*.tmp"):  # by a process that was killed: here only one packs at a time
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)
    free = shutil.disk_usage(path.parent).free
    if size > 0.9 * free:
        raise OSError(f"it would take {size_text(size)}, {size_text(free)} are free")
    try:
        with open(temporary, "xb") as out:
            unusable = _write(out, paths, channel, sample_rate, f"packing {root}")
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    for old in path.parent.glob(f"{family}-*.pack"):
        if old != path:
            with contextlib.suppress(OSError):  # Windows removes none that another run has open
                old.unlink(missing_ok=True)
    bad = f", {unusable} of them cannot be read" if unusable else ""
    size = path.stat().st_size
    took = f"{size / 1e6:,.0f} MB, {time.monotonic() - began:.1f} s"
    _say(f"{plural(len(paths), 'recording')} of {root} packed into {path} ({took}){bad}; made again when they change")
    return Pack(path)


def _write(out, paths, channel: str, sample_rate: int, title: str) -> int:
    """Write all samples and the index; returns how many recordings cannot be read."""
    index = {"offsets": [], "lengths": [], "short": [], "reasons": {}}
    out.write(MAGIC)
    for number, x in enumerate(_decode_all(paths, channel, sample_rate, title)):
        if isinstance(x, AudioError):
            index["reasons"][number], x = str(x), np.zeros(0, np.int16)
        out.write(bytes(-out.tell() % ALIGNED))
        for name, value in (("offsets", out.tell()), ("lengths", len(x)), ("short", x.dtype == np.int16)):
            index[name].append(value)
        out.write(x.data)
    place = out.tell()
    out.write(json.dumps(index).encode() + place.to_bytes(8, "little") + MAGIC)
    return len(index["reasons"])


def _decode_all(paths, channel: str, sample_rate: int, title: str):
    """Yield the samples to store of each recording, or the AudioError, in order, decoded by threads."""

    def decode(path):
        try:
            return compact(read_crop(path, channel=channel, sample_rate=sample_rate).x)
        except AudioError as error:
            return error

    with ThreadPoolExecutor(4) as pool, FileProgress(len(paths), title, log=_say) as progress:
        for begin in range(0, len(paths), 64):  # long recordings, all at once, would fill the memory
            chunk = paths[begin : begin + 64]
            yield from pool.map(decode, chunk)
            progress.update(len(chunk))


def compact(x: np.ndarray) -> np.ndarray:
    """A waveform (samples,) float32 as int16 if that has the same bits, else as it is."""
    with np.errstate(invalid="ignore"):
        scaled = x * np.float32(32768)
        short = np.clip(scaled, -32768, 32767).astype(np.int16)
    same = short.astype(np.float32) == scaled
    return short if same.all() and not np.signbit(x[x == 0]).any() else np.ascontiguousarray(x)
