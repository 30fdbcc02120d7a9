"""Any folder of SPEAKER/../FILE: which level of folders is the speaker."""

import collections
import re
from pathlib import Path

from corpus.folders import find_recordings
from errors import UsageError, plural
from preparation.corpora import SPLITS, Corpus, FolderNames, Reading, Utterance, gender_of, part_of

# Names of folders that hold people and are none.
HOLDERS = {"wav", "wavs", "flac", "aac", "m4a", "mp3", "audio", "audios", "data", "speech", "clips", "recordings"}
HOLDERS |= {"people", "persons", "speakers", "raw", "segments", "utterances", "male", "female"} | set(SPLITS)


def read_folder(folder: Path, reading: Reading) -> Corpus:
    """Utterances of a folder that holds a folder for each person, at some level, or the person in each file's name."""
    paths = find_recordings(folder)
    if not paths:
        raise UsageError(f"prepare_data.py: no recording below '{folder}'{_others(folder)}")
    if reading.speaker_pattern:
        return _by_pattern(folder, paths, reading.speaker_pattern)
    parts = [path.relative_to(folder).parts for path in paths]
    depth = min(map(len, parts)) - 1
    added = int(reading.unpacked and depth > 1)  # else the archive is the person
    if not depth or reading.speaker_level > depth - added:
        loose = paths[min(range(len(parts)), key=lambda i: len(parts[i]))]
        if reading.speaker_level:
            raise UsageError(
                f"--speaker_level {reading.speaker_level}: {loose} lies in {plural(depth - added, 'folder')} only"
            )
        raise UsageError(
            f"{loose}: lies in no person's folder; wanted: {folder}/NAME/{loose.name}, or --speaker_pattern "
            "with the person in each name, as '([^_]+)_'"
        )
    level = reading.speaker_level + added if reading.speaker_level else speaker_level(parts, depth, added)
    alone = level > 1 + added and len({part[level - 2] for part in parts}) == 1
    alone = alone and not holds_people(parts[0][level - 2])
    utterances = []
    for path, part in zip(paths, parts):
        above = [name.lower() for name in part[: level - 1]]
        utterances.append(
            Utterance(
                str(path),
                part[level - 1],
                "/".join(part[level:]),
                "/".join((*part[: level - 1], *part[level:-1])) if len(part) - 1 > level else "",
                next(filter(None, map(gender_of, above)), ""),
                part_of(above),
            )
        )
    return Corpus("folder", folder, _said(parts[0][added:], level - added, depth - added, alone), utterances)


def speaker_level(parts: list[tuple[str, ...]], depth: int, added: int = 0) -> int:
    """The level, from 1, of the first folders that are not all holders of people, as train-clean-100, wav or female.

    A level with one folder only is no person's if there is a better one below; the first ``added`` levels are none's.
    """
    alone = []
    for level in range(1 + added, depth + 1):
        names = {part[level - 1] for part in parts}
        if not all(map(holds_people, names)):
            if len(names) > 1:
                return level
            alone.append(level)
    return (alone or [depth])[0]


def holds_people(name: str) -> bool:
    """Whether a folder's name says that it is no person."""
    return re.split(r"[-_ .\d]", name.lower())[0] in HOLDERS


def _said(parts: tuple[str, ...], level: int, depth: int, alone: bool) -> str:
    shown = "/".join(parts)
    if depth == 1:
        return f"a folder for each person, as '{parts[0]}' of {shown}"
    skipped = f"; '{parts[level - 2]}' is one folder alone" if alone else ""
    said = f"the person is folder level {level}, as '{parts[level - 1]}' of {shown}{skipped}"
    return f"{said} (--speaker_level N for another)"


def _by_pattern(folder: Path, paths: list[Path], pattern: str) -> Corpus:
    """The first group of a regular expression, sought in the path below the folder, is the person."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--speaker_pattern '{pattern}': {error}") from error
    if not expression.groups:
        raise UsageError(f"--speaker_pattern '{pattern}': has no group (..) that is the person")
    utterances, people = [], FolderNames()
    for path in paths:
        inside = path.relative_to(folder)
        found = expression.search(inside.as_posix())
        if found is None or not found[1]:
            raise UsageError(f"{path}: no person by --speaker_pattern '{pattern}'")
        utterances.append(Utterance(str(path), people.of(found[1]), inside.as_posix(), inside.parent.as_posix()))
    first = utterances[0]
    return Corpus("folder", folder, f"the person is in each name, as '{first.speaker}' of {first.name}", utterances)


def _others(folder: Path) -> str:
    """What lies there instead."""
    endings = collections.Counter(path.suffix.lower() or "no ending" for path in folder.rglob("*") if path.is_file())
    shown = ", ".join(f"{plural(count, 'file')} with {ending}" for ending, count in endings.most_common(3))
    return f", only {shown}".replace("with no ending", "without an ending") if shown else ""
