"""Write tar files of recordings in the form of WebDataset, by its own library: the bytes of the files as they are."""

import json
import os
import tarfile
from pathlib import Path

from tqdm import tqdm

from corpus.containers import AudioError
from corpus.decode import Recording
from corpus.folders import is_audio
from corpus.tars import ENDING, INDEX, MOST_BYTES, Shard, binary, plain, shard_at, shards_of
from corpus.train_list import TrainList
from errors import UsageError
from storage.files import replacing
from storage.packing import locked, stamp

NAME = "shard-{:05}" + ENDING
NOTHING = "empty file"


def write_shards(listed: TrainList, out: Path, shard_bytes: int) -> dict:
    """Write the files of a list into tar files of ``shard_bytes`` below ``out``, each with its speaker and its path.

    Shards that are whole and hold the files as they are now stay. A file that cannot be read is an empty member, so
    that the rows stay those of the list. Returns {"files", "new", "bad", "bytes"} as ``write_pack`` does.
    """
    try:
        import webdataset
    except ImportError as error:
        raise UsageError("--format webdataset needs webdataset: pip install '.[webdataset]'") from error
    with locked(out):
        plan = planned(listed, shard_bytes)
        there, read = list(map(Path, shards_of(out))), set(map(os.path.realpath, shards_of(listed.sources[0].path)))
        for path in there:
            if os.path.realpath(path) in read:
                raise UsageError(f"--out: {path} is of the list that is to be packed; choose another folder")
            if not path.name.startswith("shard-") or not is_ours(path):
                raise UsageError(f"--out: {path} is no shard of pack_data.py; choose another folder")
        for path in there:
            if path.name in plan:
                continue  # else it is of a longer list, and would be read as part of this one
            path.unlink()
            path.with_name(path.name + INDEX).unlink(missing_ok=True)
        new, bad = 0, []
        with tqdm(total=len(listed), unit="file", desc="packing", disable=None) as bar:
            for name, members in plan.items():
                if is_current(out / name, members):
                    bad += empty(members, shard_at(str((out / name).absolute())))
                else:
                    bad += write_shard(webdataset.TarWriter, out / name, members)
                    new += len(members)
                bar.update(len(members))
        found = [shard_at(str((out / name).absolute())) for name in plan]
        return {"files": len(listed), "new": new, "bad": bad, "bytes": sum(shard.stamp[0] for shard in found)}


def planned(listed: TrainList, shard_bytes: int) -> dict[str, list[tuple]]:
    """{shard: [(key, ending, file, speaker, path in the list, its place)]}, in the order of the list."""
    plan: dict[str, list[tuple]] = {}
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # of each key, the last that it was given
    members, size = [], 0
    for row in range(len(listed)):
        file, path = listed.file(row), listed.paths[row]
        key = free = split_free(path)
        while key in taken:  # as of a.wav and a.flac; a-2.wav may lie there too
            numbers[free] = numbers.get(free, 1) + 1
            key = f"{free}-{numbers[free]}"
        taken.add(key)
        ending = Path(path).suffix[1:].lower() if is_audio(path) else "wav"
        speaker = listed.speakers[int(listed.labels[row])]
        members.append((key, ending, file, speaker, path, listed.place(row)))
        size += max(stamp(file)[0], 0)
        if size >= shard_bytes or row == len(listed) - 1:
            plan[NAME.format(len(plan))], members, size = members, [], 0
    return plan


def split_free(path: str) -> str:
    """The key of a path: without ending, and without dots, at the first of which WebDataset would divide it."""
    parts = plain(Path(path).with_suffix("").as_posix()).split("/")
    return "/".join(part.replace(".", "_") for part in parts)


def write_shard(writer, path: Path, members: list[tuple]) -> list[tuple]:
    """Write a tar file, whole or not at all -> [(file, its place, reason)] of the files that cannot be read."""
    with (
        replacing(path) as temporary,
        open(temporary, "wb") as file,
        writer(file, encoder=False, mtime=0) as tar,
    ):
        return [problem for member in members for problem in write_member(tar, *member)]


def write_member(tar, key: str, ending: str, file: str, speaker: str, path: str, place: str) -> list[tuple]:
    """Write a file and what is known of it -> [(file, its place, reason)] if it cannot be read."""
    try:
        with binary(file) as opened:
            content, reason = opened.read(), NOTHING
    except OSError as error:
        content, reason = b"", error.strerror
    known = {"speaker": speaker, "path": path}
    try:
        text = json.dumps(known, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8
        text = json.dumps(known).encode()
    tar.write({"__key__": key, ending: content, "json": text})
    return [] if content else [(file, place, reason)]


def is_ours(path: Path) -> bool:
    """Whether a tar file was written here, as far as it goes: others are not written over, nor taken away."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = [member for member in (tar.next(), tar.next()) if member is not None]
            if not members or any(member.mtime for member in members):
                return False
            known = next((member for member in members if member.name.endswith(".json")), None)
            if known is None:  # cut before it
                return len(members) == 1
            return list(json.loads(tar.extractfile(known).read(MOST_BYTES))) == ["speaker", "path"]
    except tarfile.ReadError:
        return not path.stat().st_size
    except (tarfile.TarError, OSError, ValueError, TypeError):
        return False


def is_current(path: Path, members: list[tuple]) -> bool:
    """Whether a shard is there, whole, and holds the members as their files are now."""
    try:
        shard, written = shard_at(str(path.absolute())), path.stat().st_mtime_ns
    except (UsageError, OSError):
        return False
    wanted = [(f"{key}.{ending}", max(stamp(file)[0], 0)) for key, ending, file, *_ in members]
    people = [speaker for _, _, _, speaker, *_ in members]
    there = list(zip(shard.names, shard.sizes.tolist()))
    return there == wanted and list(shard.speakers) == people and all(stamp(m[2])[1] <= written for m in members)


def empty(members: list[tuple], shard: Shard) -> list[tuple]:
    """(file, its place, reason) of each member without a byte."""
    rows = [member for member, size in zip(members, shard.sizes.tolist()) if not size]
    return [(m[2], m[-1], NOTHING if not stamp(m[2])[0] else "could not be read when it was packed") for m in rows]


def damaged_members(folder: str):
    """Yield (path, reason) of each recording in the shards of a folder that does not decode to its end."""
    for name in shards_of(folder):
        shard = shard_at(os.path.abspath(name), name)
        for member in tqdm(shard.names, unit="file", desc=f"checking {name}", disable=None):
            path = f"{shard.path}/{member}"
            try:
                with Recording(path) as recording:
                    for _ in recording.blocks():
                        pass
            except AudioError as error:
                yield path, str(error)
