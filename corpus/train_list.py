"""Train lists as a run holds them: read once, in arrays that loader processes share."""

import collections
import functools
import hashlib
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from config import Config
from corpus.folders import is_audio
from corpus.front_coding import FrontCodedTexts, FrontCoder
from corpus.list_forms import chunks_of, files_of
from corpus.list_lines import LineNumbers, stamp_of, unreadable
from corpus.pack import Pack, PackedRecording
from corpus.sources import TrainSource, train_sources
from corpus.tars import ENDING
from errors import UsageError


@dataclass
class TrainList:
    """The utterances of a run.

    ``speakers`` sorted names; of each utterance (N,) its ``labels`` int32, a number into them, its ``paths`` as a list
    gives it, its ``lines`` and ``parts`` uint8, the number of its list in ``sources`` (None if there is one).
    ``hash``: SHA-256 of the list, or of all that there is to several.
    """

    sources: tuple[TrainSource, ...]
    speakers: FrontCodedTexts
    labels: np.ndarray
    paths: FrontCodedTexts
    lines: LineNumbers
    parts: np.ndarray | None
    hash: str
    packs: list[Pack | None] = field(default_factory=list)  # of each list, if a run reads from packs
    rows: np.ndarray | None = None  # of each utterance in the pack of its list

    def __len__(self):
        return len(self.labels)

    def source(self, utterance: int) -> TrainSource:
        """The list that an utterance is from."""
        return self.sources[0 if self.parts is None else int(self.parts[utterance])]

    def file(self, utterance: int) -> str:
        """Path of the file of an utterance."""
        path = os.path.join(self.source(utterance).root, self.paths[utterance])
        plain = os.sep == "/" and "//" not in path and "./" not in path
        return path if plain else str(Path(path))  # which takes as long as reading a crop from a pack

    def open_packs(self):
        """Open the packs that the sources name, and find the utterances in them; UsageError if one is not there."""
        if self.packs or not any(source.pack for source in self.sources):
            return
        self.packs, rows = [], np.full(len(self), -1, np.int32)
        for source, numbers in self.by_source():
            self.packs.append(Pack(source.pack) if source.pack else None)
            if self.packs[-1] is not None:
                found = self.packs[-1].rows_of(self.paths, numbers, self.hash, source.path)
                rows[numbers.start : numbers.stop] = found
        self.rows = rows

    def read_from(self, number: int) -> str:
        """What is said of list ``number`` at the start if a pack is read in its place, "" if its files are read."""
        source, pack = self.sources[number], self.packs[number] if self.packs else None
        if pack is None:
            return ""
        below, text = pack.header.get("root", source.root), f"{source.path} is read from {source.pack}"
        if below == source.root or os.path.realpath(str(below)) == os.path.realpath(source.root):
            return text
        return f"{text}, which was packed below '{below}', not below '{source.root}': make sure that they are the same"

    def opened(self, utterance: int, path: str) -> PackedRecording | None:
        """The recording of an utterance, open, if a pack has it; AudioError if it could not be read when packed."""
        pack = self.packs[0 if self.parts is None else int(self.parts[utterance])] if self.packs else None
        return pack.recording(self.rows[utterance], path) if pack is not None else None

    def place(self, utterance: int) -> str:
        """'list:line' of an utterance, 'shard:number' of one in a tar file."""
        number = 0 if self.parts is None else int(self.parts[utterance])
        return f"{self._list_of(number, self.paths[utterance])}:{self.lines[utterance]}"

    def _list_of(self, number: int, file: str) -> str:
        """The file of a list that names a recording: of tar files the one that it is in."""
        first = self.list_files[number]
        return file.partition(f"{ENDING}/")[0] + ENDING if first.endswith(ENDING) else first

    @functools.cached_property
    def list_files(self) -> list[str]:
        """The first file of each list."""
        return [files_of(source.path)[0] for source in self.sources]

    def place_of(self, file: str, line: int) -> str:
        """'list:line' of a file, as ``file`` gave it, in that line of one of the lists."""
        for utterance in self.lines.places_of(line) if self.parts is not None else ():
            if self.file(utterance) == file:
                return self.place(utterance)
        return f"{self._list_of(0, file)}:{line}"

    def by_source(self):
        """Yield (source, its utterance numbers) of each list."""
        edges = (
            np.searchsorted(self.parts, np.arange(len(self.sources) + 1)) if self.parts is not None else [0, len(self)]
        )
        for source, begin, end in zip(self.sources, edges, edges[1:]):
            yield source, range(int(begin), int(end))

    def speakers_hash(self) -> str:
        """Hash of the speakers in label order: which speaker each class of a classifier is."""
        return hashlib.sha256("\n".join(self.speakers).encode("utf-8", "surrogatepass")).hexdigest()


_newest: list = []  # [(what the lists were when they were read, TrainList)], one at most


def read_train_lists(sources: tuple[TrainSource, ...]) -> TrainList:
    """Read train lists; speakers of one name are one speaker. Lists that have not changed since are not read again.

    Labels count the sorted speakers from 0, as voxceleb_trainer does. UsageError names list and line of a mistake.
    """
    files = [file for source in sources for file in files_of(source.path)]
    try:
        stamp = sources, tuple(map(stamp_of, files))
    except OSError as error:
        raise unreadable(error.filename, error) from error
    if not (_newest and _newest[0][0] == stamp):
        _newest.clear()  # before the next is read: two would need twice the memory
        _newest.append((stamp, _read(sources)))
    return _newest[0][1]


def train_list_of(config: Config) -> TrainList:
    """The train lists of a configuration."""
    return read_train_lists(train_sources(config))


def read_train_list(path):
    """Read ``speaker relative/path`` lines.

    Returns (sorted speaker names, label of each utterance (N,) int64, paths, line numbers), the last two as lists.
    """
    found = read_train_lists((TrainSource(os.fspath(path), ""),))
    return list(found.speakers), found.labels.astype(np.int64), list(found.paths), found.lines.tolist()


def _read(sources: tuple[TrainSource, ...]) -> TrainList:
    number: collections.defaultdict = collections.defaultdict(itertools.count().__next__)
    paths, labels, lines, counts, hashes = FrontCoder(), bytearray(), LineNumbers(), [], []
    for source in sources:
        before, chunks = len(lines), chunks_of(source.path)
        swapped, first = True, None
        while True:
            try:
                names, recordings, numbers = next(chunks)
            except StopIteration as end:
                hashes.append(end.value)
                break
            if first is None and names:
                first = int(numbers[0]), names[0], recordings[0][: recordings[1][0]].decode("utf-8", "surrogateescape")
            swapped = swapped and all(map(is_audio, names)) and not any(map(is_audio, _texts(recordings)))
            if source.prefix:
                names = [source.prefix + name for name in names]
            labels += np.fromiter(map(number.__getitem__, names), np.int32, len(names)).tobytes()
            paths.add(*recordings)
            lines.add(np.asarray(numbers))
        if first is None:
            raise UsageError(f"{source.path}: the train list is empty")
        if swapped:
            line, speaker, path = first
            right = f"write 'speaker path', as '{path} {speaker}'"
            raise UsageError(f"{source.path}:{line}: the columns are swapped, {right}")
        counts.append(len(lines) - before)
    speakers = sorted(number)
    rank = np.empty(len(number), np.int32)
    rank[np.fromiter(map(number.__getitem__, speakers), np.int64, len(speakers))] = np.arange(len(number))
    number.clear()  # a million names in a dict are a good part of all that is needed
    of_utterance = np.frombuffer(labels, np.int32)
    np.take(rank, of_utterance, out=of_utterance)
    names = FrontCodedTexts.of(speakers)
    del speakers, rank
    parts = np.repeat(np.arange(len(sources), dtype=np.uint8), counts) if len(sources) > 1 else None
    return TrainList(
        *(sources, names, of_utterance, paths.done()),
        *(lines, parts, _hash(sources, hashes)),
    )


def _texts(recordings: tuple[bytes, np.ndarray]):
    content, lengths = recordings
    ends = np.cumsum(lengths)
    return (content[end - length : end].decode("utf-8", "surrogateescape") for length, end in zip(lengths, ends))


def _hash(sources: tuple[TrainSource, ...], hashes: list[str]) -> str:
    if len(sources) == 1 and (sources[0].weight, sources[0].prefix) == (1.0, ""):
        return hashes[0]
    facts = [[hash, source.weight, source.prefix] for source, hash in zip(sources, hashes)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
