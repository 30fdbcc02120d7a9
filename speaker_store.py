"""Enrolled speakers in one file: written whole or not at all, by one process at a time, for one model only."""

import contextlib
import io
import os
import unicodedata
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speaker_lists import UsageError
from whole_files import write_atomically

try:
    import fcntl
except ImportError:  # Windows has no fcntl: one process at a time is then the user's care
    fcntl = None

FORMAT_VERSION = 1
ARRAYS = {"speakers": "U", "owner": "i", "embeddings": "f", "seconds": "f", "sources": "U"}
ARRAYS |= {"identity": "U", "format_version": "i"}
LARGEST_FILE = 4 << 30  # bytes: a store of a million speakers, far from what memory cannot hold


@dataclass(frozen=True)
class Utterance:
    """One recording that a speaker was enrolled with."""

    embedding: np.ndarray  # (D,)
    seconds: float
    source: str


class SpeakerStore:
    """Names and the utterances that each was enrolled with; ``identity`` says of which model the embeddings are."""

    def __init__(self, path, identity: str, dimension: int):
        self.path, self.identity, self.dimension = Path(path), identity, dimension
        self.speakers: dict[str, list[Utterance]] = {}

    @classmethod
    def open(cls, path, identity: str, dimension: int, create: bool = False) -> "SpeakerStore":
        """Read a store; with ``create`` a missing file is an empty one. UsageError for a damaged or another model's.

        An empty ``identity`` is that of the file, to list or remove without the model.
        """
        store = cls(path, identity, dimension)
        if not os.path.exists(path):  # Path.exists raises where a name is too long or a folder is closed
            if create:
                return store
            raise UsageError(f"--store: no such file: '{path}'; enroll.py makes it")
        arrays = read_arrays(store.path)
        if not identity:
            identity, dimension = str(arrays["identity"]), arrays["embeddings"].shape[1]
            store.identity, store.dimension = identity, dimension
        if str(arrays["identity"]) != identity:
            raise UsageError(
                f"{path}: its speakers were enrolled with another model ({str(arrays['identity'])[:12]}, this one is "
                f"{identity[:12]}): embeddings of two models cannot be compared; enroll them again in another store"
            )
        if arrays["embeddings"].shape[1] != dimension:
            raise UsageError(f"{path}: embeddings of size {arrays['embeddings'].shape[1]}, the model gives {dimension}")
        names = [str(name) for name in arrays["speakers"]]
        store.speakers = {name: [] for name in names}
        for owner, *row in zip(*(arrays[key] for key in ("owner", "embeddings", "seconds", "sources"))):
            store.speakers[names[owner]].append(Utterance(row[0], float(row[1]), str(row[2])))
        return store

    def __len__(self):
        return len(self.speakers)

    def utterances(self, name: str) -> list[Utterance]:
        """What a speaker was enrolled with; UsageError names the speakers that are there."""
        if name not in self.speakers:
            known = ", ".join(sorted(self.speakers)[:10]) or "nobody"
            raise UsageError(f"{self.path}: '{name}' is not enrolled; enrolled: {known}")
        return self.speakers[name]

    def add(self, name: str, utterances: list[Utterance], replace: bool = False):
        """Enroll a speaker, or add to what is there; a recording that is there already is refused."""
        if (
            not name.strip()
            or len(name) > 200
            or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
        ):
            raise UsageError(
                f"name: {name[:200]!r} is empty, too long or has a line break or another control character"
            )
        there = [] if replace else self.speakers.get(name, [])
        known = {utterance.source for utterance in there}
        for utterance in utterances:
            embedding = utterance.embedding
            if embedding.shape != (self.dimension,) or not np.isfinite(embedding).all():
                raise ValueError(f"expected finite embeddings of size {self.dimension}, got shape {embedding.shape}")
            if utterance.source in known:
                raise UsageError(f"{utterance.source}: '{name}' is already enrolled with it; --replace starts anew")
            known.add(utterance.source)
        if not utterances:
            raise ValueError("a speaker is enrolled with at least one utterance")
        self.speakers[name] = [*there, *utterances]

    def remove(self, name: str):
        """Forget a speaker."""
        self.utterances(name)
        del self.speakers[name]

    def save(self):
        """Write to a temporary name, flush, rename: a crash leaves the old store or the new one. Mode 0600: voices."""
        rows = [(i, utterance) for i, part in enumerate(self.speakers.values()) for utterance in part]
        written = io.BytesIO()
        np.savez(
            written,
            format_version=np.int64(FORMAT_VERSION),
            identity=np.str_(self.identity),
            speakers=np.array(list(self.speakers), dtype=np.str_),
            owner=np.array([i for i, _ in rows], dtype=np.int64),
            embeddings=np.array([u.embedding for _, u in rows], dtype=np.float32).reshape(len(rows), self.dimension),
            seconds=np.array([u.seconds for _, u in rows], dtype=np.float64),
            sources=np.array([u.source for _, u in rows], dtype=np.str_),
        )
        write_atomically(self.path, written.getbuffer(), 0o600)


@contextlib.contextmanager
def locked(path):
    """Hold a store for reading, changing and writing it: two processes that enroll at once both stay in it."""
    if fcntl is None:
        yield
        return
    try:
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(f"--store: cannot write beside '{path}': {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read and check the arrays of a store file, without pickle."""
    damaged = UsageError(f"{path}: damaged, or not a store of speakers")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > LARGEST_FILE:
                raise UsageError(f"{path}: larger than a store of speakers can be")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, LookupError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged from error
    owner, embeddings, names = arrays["owner"], arrays["embeddings"], arrays["speakers"]
    if any(arrays[name].dtype.kind != kind for name, kind in ARRAYS.items()) or embeddings.ndim != 2:
        raise damaged
    one_each = all(arrays[key].shape == embeddings.shape[:1] for key in ("owner", "seconds", "sources"))
    if not one_each or names.ndim != 1:
        raise damaged
    if arrays["format_version"].shape or arrays["format_version"] != FORMAT_VERSION:
        raise UsageError(f"{path}: format {arrays['format_version']}, this program reads {FORMAT_VERSION}")
    if set(owner.tolist()) != set(range(len(names))) or len(set(names.tolist())) != len(names):
        raise UsageError(f"{path}: damaged: a speaker without embeddings, or twice")
    if not np.isfinite(embeddings).all() or not np.isfinite(arrays["seconds"]).all():
        raise UsageError(f"{path}: damaged: embeddings that are not finite")
    return arrays
