"""Recordings in tar files, as WebDataset keeps them: a member is a path, `shard.tar/speaker/utterance.flac`.

The members of a shard are found by an index of their places, which is made once and kept beside the shard: a crop is
read where it lies, so that rows, their order and every later start are those of single files.
"""

import contextlib
import functools
import glob
import io
import itertools
import json
import os
import posixpath
import tarfile
import zipfile

import numpy as np

from corpus.folders import is_audio
from corpus.list_lines import LIST_TEXT, numbered_lines
from corpus.texts import Texts, find_keys, keys_of
from errors import UsageError

ENDING, INDEX = ".tar", ".index"  # the index of a.tar is a.tar.index
SPEAKERS = ("speaker", "spk", "spk_id", "speaker_id", "label")  # names in a JSON member, and endings of one of text
MOST_BYTES = 1 << 20  # of a member that is no recording
LONGEST_PATH = 4096  # characters of a path, or more
LOOKED_AT = 64  # members by which a shard is known
FORMAT = 2
COMPRESSED = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "zstd": b"(\xb5/\xfd"}


class Shard:
    """The recordings of a tar file: ``names`` and ``speakers``, and where their bytes lie, ``begins`` and ``sizes``.

    ``stamp``: size and time of change of the tar file.
    """

    def __init__(self, path: str, arrays: dict):
        self.path, self.stamp = path, tuple(arrays["stamp"].tolist())
        self.begins, self.sizes = arrays["begins"], arrays["sizes"]
        self.names = Texts(arrays["names"], arrays["name_ends"])
        self.speakers = Texts(arrays["speakers"], arrays["speaker_ends"])
        self.keys = keys_of(self.names)
        self.order = np.argsort(self.keys, kind="stable")

    def find(self, name: str) -> int:
        """The number of a recording, -1 if it is not there."""
        row = int(find_keys(self.keys, self.order, keys_of([name]))[0])
        return row if row >= 0 and self.names[row] == name else -1


def shards_of(path) -> list[str]:
    """The tar files that a list names: itself, those of a folder, of a pattern with braces or of its lines.

    [] if it names none.
    """
    path = os.fspath(path)
    if "{" in path and path.endswith(ENDING):
        try:
            from webdataset.shardlists import expand_urls
        except ImportError as error:
            raise UsageError(
                f"'{path}': braces need webdataset: pip install '.[webdataset]'; or name the folder"
            ) from error
        try:
            return expand_urls(path)
        except ValueError as error:
            raise UsageError(f"'{path}': braces that do not match; as shard-{{00000..00041}}.tar") from error
    if path.endswith(ENDING):
        return [path]
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), f"*{ENDING}")))
    return _of_lines(path) if os.path.isfile(path) else []


def _of_lines(path: str) -> list[str]:
    """The tar files of a text that names one a line, as wespeaker's shard.list; [] if the first line names none.

    Their paths are relative to the current folder, as there, or else to that of the list.
    """
    with contextlib.suppress(OSError), open(path, **LIST_TEXT) as file:
        if not file.read(LONGEST_PATH).lstrip().partition("\n")[0].rstrip().endswith(ENDING):
            return []
    found = []
    for number, columns in numbered_lines(path):
        if len(columns) != 1 or not columns[0].endswith(ENDING):
            if not found:
                return []  # lines 'speaker path' whose first recording has an odd name
            raise UsageError(f"{path}:{number}: expected a tar file as in the lines before, got '{' '.join(columns)}'")
        beside = os.path.join(os.path.dirname(path), columns[0])
        found.append(columns[0] if os.path.isfile(columns[0]) or not os.path.isfile(beside) else beside)
    return found


def recordings_of(path):
    """Yield (speakers, members as paths, numbers in the shard from 1, shard) of each shard; UsageError for a fault."""
    for name in shards_of(path):
        shard = shard_at(os.path.abspath(name), name)
        names = [f"{shard.path}/{member}" for member in shard.names]
        yield list(shard.speakers), names, np.arange(1, 1 + len(names), dtype=np.int32), shard


def shard_at(path: str, shown: str = "") -> Shard:
    """The index of a tar file as it is now; UsageError, on it as ``shown``, if it is no whole tar of recordings."""
    try:
        status = os.stat(path)
        return _indexed(path, shown or path, (status.st_size, status.st_mtime_ns))
    except OSError as error:
        raise UsageError(f"{shown or path}: {error.strerror}") from error


@functools.cache
def _indexed(path: str, shown: str, stamp: tuple[int, int]) -> Shard:
    try:
        with np.load(path + INDEX, allow_pickle=False) as kept:
            if int(kept["format"]) == FORMAT and tuple(kept["stamp"].tolist()) == stamp:
                return Shard(path, dict(kept))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # there is none, or it is damaged: the shard tells all
    return write_index(path, shown, stamp)


def write_index(path: str, shown: str, stamp: tuple[int, int]) -> Shard:
    """Read the headers of a tar file, and keep what they say beside it if that can be written."""
    arrays = {"format": np.int64(FORMAT), "stamp": np.array(stamp, np.int64), **_read(path, shown, stamp[0])}
    temporary = f"{path}{INDEX}.{os.getpid()}.tmp"
    with contextlib.suppress(OSError):  # a disk that is full, or only read: each start reads the headers
        try:
            with open(temporary, "xb") as file:  # a link of this name would lead to another file
                np.savez(file, **arrays)
            os.replace(temporary, path + INDEX)
        except OSError:
            os.unlink(temporary)
            raise
    return Shard(path, arrays)


def _read(path: str, shown: str, size: int) -> dict:
    """The arrays of an index, from the headers of a tar file and its JSON members."""
    found, speakers = {}, {}  # of each name without its ending: the recording (name, begin, size); the speaker
    last = ""
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                last, place = f" behind member '{member.name}'", f"{shown}: member '{member.name}'"
                name = plain(member.name)
                if member.offset_data + member.size > size:
                    there = size - member.offset_data
                    raise UsageError(f"{place}: truncated: the header promises {member.size} bytes, {there} are there")
                stem, ending = posixpath.splitext(name)
                if member.isfile() and is_audio(name):
                    if stem in found:
                        raise UsageError(f"{place}: a second recording of '{stem}'")
                    found[stem] = name, member.offset_data, member.size
                elif member.isfile() and names_speaker(ending):
                    content = tar.extractfile(member).read(MOST_BYTES)
                    with contextlib.suppress(*([] if stem == split(name)[0] else [UsageError])):  # as of 'a.meta.json'
                        speakers.setdefault(stem, _speaker(place, ending[1:].lower(), content))
                tar.members.clear()  # which tarfile keeps: a million of them take a gigabyte
            end = tar.offset
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(512) != bytes(512):  # tarfile takes whatever is no header for the end
                raise tarfile.ReadError(f"no header and no end mark at byte {end}")
    except tarfile.TarError as error:
        hint = "" if compression(path) is None else "; a compressed one has to be unpacked"
        raise UsageError(f"{shown}: not a whole tar file{last}: {error}{hint}") from error
    if not found:
        raise UsageError(f"{shown}: no recording in it")
    people = Texts.of(_speakers_of(shown, [(stem, name) for stem, (name, *_) in found.items()], speakers))
    names = Texts.of(name for name, *_ in found.values())
    begins, sizes = (np.array([entry[i] for entry in found.values()], np.int64) for i in (1, 2))
    arrays = {"begins": begins, "sizes": sizes, "names": names.content, "name_ends": names.offsets}
    return {**arrays, "speakers": people.content, "speaker_ends": people.offsets}


def _speakers_of(shown: str, recordings: list[tuple[str, str]], speakers: dict[str, str]) -> list[str]:
    """The speaker of each recording (stem, name), of whose names ``speakers`` has some.

    The member with the speaker has the name of the recording up to its last dot, as in wespeaker's shards of utterances
    called `00001.wav`, or up to its first, WebDataset's key.
    """
    people, keys = [], set()
    for stem, name in recordings:
        key = split(name)[0]
        speaker = speakers.get(stem) or speakers.get(key)
        if not speaker:
            raise UsageError(
                f"{shown}: member '{name}': no speaker; '{key}.json' with \"speaker\", or '{key}.spk' names it"
            )
        if not speakers.get(stem) and key in keys:
            raise UsageError(f"{shown}: member '{name}': a second recording of '{key}'")
        keys.add(key)
        people.append(speaker)
    return people


def names_speaker(ending: str) -> bool:
    """Whether a member with this ending says who speaks."""
    return ending[1:].lower() in ("json", *SPEAKERS)


def is_shard(path) -> bool:
    """Whether among the first members of a tar file is a recording with its speaker beside it, as in WebDataset's."""
    recordings, named = set(), set()
    try:
        with tarfile.open(path, "r:") as tar:
            for member in itertools.islice(tar, LOOKED_AT):
                name = plain(member.name)
                stem, ending = posixpath.splitext(name)
                if not member.isfile():
                    continue
                if is_audio(name):
                    recordings |= {stem, split(name)[0]}
                elif names_speaker(ending) and _speaker(
                    name, ending[1:].lower(), tar.extractfile(member).read(MOST_BYTES)
                ):
                    named.add(stem)
                if recordings & named:
                    return True
    except (tarfile.TarError, OSError, UsageError):
        pass  # who reads it whole says so
    return False


def plain(name: str) -> str:
    """The name of a member as a part of a path: `a/b` of `./a//b`, as `tar cf shard.tar .` writes it, and of `/a/b`."""
    return posixpath.normpath(f"/{name}").lstrip("/")


def split(name: str) -> tuple[str, str]:
    """Key and ending of a member, as WebDataset divides a name: at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    key, _, ending = last.partition(".")
    return folder + slash + key, ending.lower()


def _speaker(place: str, kind: str, content: bytes) -> str:
    try:
        text = content.decode("utf-8").strip()
        entry = json.loads(text) if kind == "json" else {kind: text}
    except ValueError as error:
        raise UsageError(f"{place}: no JSON that can be read: {error}") from error
    if not isinstance(entry, dict):
        raise UsageError(f"{place}: expected an object with a speaker")
    value = next((entry[name] for name in SPEAKERS if entry.get(name) not in (None, "")), "")
    if isinstance(value, bool) or not isinstance(value, (str, int)) or any(ord(letter) < 32 for letter in str(value)):
        raise UsageError(f"{place}: a speaker that is no name")
    try:
        os.fsencode(str(value))
    except UnicodeEncodeError as error:
        raise UsageError(f"{place}: {value!a} is no name: it has half of a character") from error
    return str(value)


def compression(path) -> str | None:
    """How a file is compressed, by its first bytes; None if it is not."""
    with open(path, "rb") as file:
        begin = file.read(6)
    return next((name for name, magic in COMPRESSED.items() if begin.startswith(magic)), None)


# ---------------------------------------------------------------------------------------------------------- members


def member_of(path) -> tuple[Shard, int] | None:
    """(shard, number) of a path of a member, None if it is none; UsageError if its tar file is broken."""
    tar, found, name = os.fspath(path).partition(f"{ENDING}/") if isinstance(os.fspath(path), str) else ("", "", "")
    if not found or not os.path.isfile(tar + ENDING):
        return None
    shard = shard_at(os.path.abspath(tar + ENDING))
    number = shard.find(name)
    return (shard, number) if number >= 0 else None


def size_and_time(path) -> tuple[int, int]:
    """Size of a file or member, and when it was changed in ns, a member with its tar file; OSError if there is none."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):  # the first on Windows
        with contextlib.suppress(UsageError):
            if member := member_of(path):
                shard, number = member
                return int(shard.sizes[number]), shard.stamp[1]
        raise
    return status.st_size, status.st_mtime_ns


def is_member(path) -> bool:
    """Whether a path is that of a member."""
    try:
        return member_of(path) is not None
    except UsageError:
        return False


class Placed(io.RawIOBase):
    """A file of ``size`` bytes that is read from its ``place`` on; ``file`` is the one behind it."""

    file: io.RawIOBase
    size = place = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        return self.place

    def tell(self):
        return self.place

    def close(self):
        if not self.closed and hasattr(self, "file"):
            self.file.close()
        super().close()


class Window(Placed):
    """The bytes of a member as a file of their own; FileNotFoundError if a path is none."""

    def __init__(self, path):
        super().__init__()
        try:
            member = member_of(path)
        except UsageError as error:
            raise OSError(5, str(error)) from error
        if member is None:
            raise FileNotFoundError(2, "no such member", os.fspath(path))
        shard, number = member
        self.file = open(shard.path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
        status = os.fstat(self.file.fileno())
        if (status.st_size, status.st_mtime_ns) != shard.stamp:
            self.file.close()
            raise OSError(5, f"{shard.path} was changed while it was read from")
        self.begin, self.size = int(shard.begins[number]), int(shard.sizes[number])

    def readinto(self, buffer):
        buffer = memoryview(buffer).cast("B")
        self.file.seek(self.begin + self.place)
        count = self.file.readinto(buffer[: max(0, min(len(buffer), self.size - self.place))])
        self.place += count
        return count


def binary(path) -> io.RawIOBase:
    """Open a file, or a member of a tar file, to read its bytes."""
    try:
        return open(path, "rb", buffering=0)  # type: ignore[return-value]
    except (FileNotFoundError, NotADirectoryError):  # the first on Windows
        if f"{ENDING}/" not in os.fsdecode(path):
            raise
        return Window(path)
