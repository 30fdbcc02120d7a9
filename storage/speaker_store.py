"""Enrolled speakers in one file: written whole or not at all, by one process at a time, for one model only."""

import contextlib
import json
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from corpus.acoustics import Acoustics
from errors import UsageError, suggested
from storage.arrays import DAMAGE, has_array, read_arrays, write_arrays

FORMAT_VERSION = 2  # in format 1 the texts were arrays, in which each has the room of the longest
ARRAYS = {"speakers": "SU", "owner": "i", "embeddings": "f", "seconds": "f", "sources": "SU"}
ARRAYS |= {"identity": "U", "format_version": "i"}
LATER = ("vad", "acoustics")  # arrays that stores of before do not have
NOBODY, SILENCE = "nobody", "silence"  # who is not enrolled, and what is not heard, in a table of who speaks when
LONGEST_NAME, LONGEST_SOURCE = 200, 4096  # letters


@dataclass(frozen=True)
class Utterance:
    """One recording that a speaker was enrolled with."""

    embedding: np.ndarray  # (D,)
    seconds: float
    source: str
    acoustics: Acoustics | None = None  # how it sounds; None in stores of before


MEANING = {NOBODY: "somebody who is not enrolled", SILENCE: "that nothing is heard"}


def check_name(name: str):
    """UsageError for a name that no speaker can be enrolled by."""
    control = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)
    if not name.strip() or len(name) > LONGEST_NAME or control:
        shown = f"{name[:LONGEST_NAME]!r}"
        raise UsageError(f"name: {shown} is empty, too long or has a line break or another control character")
    if name in (NOBODY, SILENCE):
        raise UsageError(f"name: '{name}' means {MEANING[name]} in a table of who speaks when; give another name")


class SpeakerStore:
    """Names and the utterances that each was enrolled with.

    ``identity`` says of which model the embeddings are, ``vad`` what found the speech that they are of.
    """

    def __init__(self, path, identity: str, dimension: int, vad: str = ""):
        self.path, self.identity, self.dimension, self.vad = Path(path), identity, dimension, vad
        self.speakers: dict[str, list[Utterance]] = {}

    @classmethod
    def open(cls, path, identity: str, dimension: int, create: bool = False, vad: str = "") -> "SpeakerStore":
        """Read a store; with ``create`` a missing file is an empty one. UsageError for a damaged or another model's.

        An empty ``identity`` or ``vad`` is that of the file, to list or remove without the model.
        """
        store = cls(path, identity, dimension, vad)
        if not os.path.exists(path):  # Path.exists raises if a name is too long or a folder is closed
            if create:
                return store
            raise UsageError(f"--store: no such file: '{path}'; enroll.py makes it")
        arrays = read_store(store.path)
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
        store.vad = vad or str(arrays["vad"])
        if len(arrays["owner"]) and str(arrays["vad"]) != store.vad:
            raise UsageError(
                f"{path}: its speakers were enrolled with vad {arrays['vad']}, this is vad {store.vad}: give --vad "
                f"{arrays['vad']}, or enroll them again in another store"
            )
        names = arrays["speakers"]
        store.speakers = {name: [] for name in names}
        for owner, *row in zip(*(arrays[key] for key in ("owner", "embeddings", "seconds", "sources", "acoustics"))):
            store.speakers[names[owner]].append(Utterance(row[0], float(row[1]), row[2], row[3]))
        return store

    def __len__(self):
        return len(self.speakers)

    def utterances(self, name: str) -> list[Utterance]:
        """What a speaker was enrolled with; UsageError names the speakers that are there."""
        if name not in self.speakers:
            known = ", ".join(sorted(self.speakers)[:10]) or "nobody"
            known += f", .. ({len(self)} in all)" if len(self) > 10 else ""
            meant = suggested(name, self.speakers, listed=False)
            raise UsageError(f"{self.path}: '{name}' is not enrolled{meant or f'; enrolled: {known}'}")
        return self.speakers[name]

    def sources(self, name: str) -> set[str]:
        """Which recordings a speaker was enrolled with; none of one who is not there."""
        return {utterance.source for utterance in self.speakers.get(name, ())}

    def add(self, name: str, utterances: list[Utterance], replace: bool = False):
        """Enroll a speaker, or add to what is there; a recording that is there already is refused."""
        check_name(name)
        there = [] if replace else self.speakers.get(name, [])
        known = {utterance.source for utterance in there}
        given = set()
        for utterance in utterances:
            embedding = utterance.embedding
            if embedding.shape != (self.dimension,) or not np.isfinite(embedding).all():
                raise ValueError(f"expected finite embeddings of size {self.dimension}, got shape {embedding.shape}")
            if len(utterance.source) > LONGEST_SOURCE:
                raise UsageError(f"{utterance.source[:50]}...: a name of more than {LONGEST_SOURCE} letters")
            if utterance.source in given:
                raise UsageError(f"{utterance.source}: given twice for '{name}'; a recording counts once")
            if utterance.source in known:
                raise UsageError(f"{utterance.source}: '{name}' is already enrolled with it; --replace starts anew")
            given.add(utterance.source)
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
        write_arrays(
            self.path,
            0o600,
            format_version=np.int64(FORMAT_VERSION),
            identity=np.str_(self.identity),
            vad=np.str_(self.vad or "none"),
            speakers=np.bytes_(json.dumps(list(self.speakers)).encode()),
            owner=np.array([i for i, _ in rows], dtype=np.int64),
            embeddings=np.array([u.embedding for _, u in rows], dtype=np.float32).reshape(len(rows), self.dimension),
            seconds=np.array([u.seconds for _, u in rows], dtype=np.float64),
            sources=np.bytes_(json.dumps([u.source for _, u in rows]).encode()),
            acoustics=np.bytes_(json.dumps([u.acoustics and u.acoustics.to_dict() for _, u in rows]).encode()),
        )


@contextlib.contextmanager
def locked(path):
    """Hold a store for reading, changing and writing it: two processes that enroll at once both stay in it."""
    lock = FileLock(f"{path}.lock", mode=0o600)
    try:
        os.stat(Path(path).parent)  # FileLock would make the folder
        lock.acquire()
    except OSError as error:
        raise UsageError(f"--store: cannot write beside '{path}': {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def read_store(path: Path) -> dict:
    """Read and check a store file: its arrays, and lists of text ``speakers`` and ``sources``."""
    damaged = UsageError(f"{path}: damaged, or not a store of speakers")
    try:
        arrays = {"vad": np.str_("none"), **read_arrays(path, [*ARRAYS, *(n for n in LATER if has_array(path, n))])}
        if any(arrays[name].dtype.kind not in kinds for name, kinds in ARRAYS.items()):
            raise damaged
        version = arrays["format_version"]
        if version.shape or version not in (1, FORMAT_VERSION):
            raise UsageError(f"{path}: format {version}, this program reads {FORMAT_VERSION}")
        names, sources = (_texts(arrays[key]) for key in ("speakers", "sources"))
        sounds = json.loads(arrays["acoustics"].item()) if "acoustics" in arrays else [None] * len(sources)
        sounds = [None if values is None else Acoustics.from_dict(values) for values in sounds]
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DAMAGE as error:
        raise damaged from error
    owner, embeddings = arrays["owner"], arrays["embeddings"]
    rows = embeddings.shape[:1]
    if embeddings.ndim != 2 or owner.shape != rows or arrays["seconds"].shape != rows or (len(sources),) != rows:
        raise damaged
    if len(sounds) != len(sources):
        raise damaged
    if set(owner.tolist()) != set(range(len(names))) or len(set(names)) != len(names):
        raise UsageError(f"{path}: damaged: a speaker without embeddings, or twice")
    if not np.isfinite(embeddings).all() or not np.isfinite(arrays["seconds"]).all():
        raise UsageError(f"{path}: damaged: embeddings that are not finite")
    return {**arrays, "speakers": names, "sources": sources, "acoustics": sounds}


def _texts(array: np.ndarray) -> list[str]:
    """Texts of an array, or of the JSON list of format 2; ValueError for anything else."""
    texts = array.tolist() if array.dtype.kind == "U" else json.loads(array.item())
    if type(texts) is not list or any(type(text) is not str for text in texts):
        raise ValueError("not a list of texts")
    return texts
