"""Any folder of SPEAKER/../FILE: which level of folders is the speaker."""

import collections
import re
from pathlib import Path

from corpus.folders import find_recordings
from errors import UsageError, plural
from preparation.corpora import SPLITS, Corpus, Reading, Utterance, as_folder, gender_of, part_of

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
    if not depth or reading.speaker_level > depth:
        loose = paths[min(range(len(parts)), key=lambda i: len(parts[i]))]
        if reading.speaker_level:
            raise UsageError(f"--speaker_level {reading.speaker_level}: {loose} lies in {plural(depth, 'folder')} only")
        raise UsageError(
            f"{loose}: lies in no person's folder; wanted: {folder}/NAME/{loose.name}, or --speaker_pattern "
            "with the person in each name, as '([^_]+)_'"
        )
    level = reading.speaker_level or speaker_level(parts, depth)
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
    return Corpus("folder", folder, _said(parts[0], level, depth), utterances)


def speaker_level(parts: list[tuple[str, ...]], depth: int) -> int:
    """The level, from 1, of the first folders that are not all holders of people, as train-clean-100, wav or female."""
    for level in range(1, depth):
        if not all(holds_people(name) for name in {part[level - 1] for part in parts}):
            return level
    return depth


def holds_people(name: str) -> bool:
    """Whether a folder's name says that it is no person."""
    return re.split(r"[-_ .\d]", name.lower())[0] in HOLDERS


def _said(parts: tuple[str, ...], level: int, depth: int) -> str:
    shown = "/".join(parts)
    if depth == 1:
        return f"a folder for each person, as '{parts[0]}' of {shown}"
    return f"the person is folder level {level}, as '{parts[level - 1]}' of {shown} (--speaker_level N for another)"


def _by_pattern(folder: Path, paths: list[Path], pattern: str) -> Corpus:
    """The first group of a regular expression, sought in the path below the folder, is the person."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"--speaker_pattern '{pattern}': {error}") from error
    if not expression.groups:
        raise UsageError(f"--speaker_pattern '{pattern}': has no group (..) that is the person")
    utterances = []
    for path in paths:
        inside = path.relative_to(folder)
        found = expression.search(inside.as_posix())
        if found is None or not found[1]:
            raise UsageError(f"{path}: no person by --speaker_pattern '{pattern}'")
        utterances.append(Utterance(str(path), as_folder(found[1]), inside.as_posix(), inside.parent.as_posix()))
    first = utterances[0]
    return Corpus("folder", folder, f"the person is in each name, as '{first.speaker}' of {first.name}", utterances)


def _others(folder: Path) -> str:
    """What lies there instead."""
    endings = collections.Counter(path.suffix.lower() or "no ending" for path in folder.rglob("*") if path.is_file())
    shown = ", ".join(f"{plural(count, 'file')} with {ending}" for ending, count in endings.most_common(3))
    return f", only {shown}".replace("with no ending", "without an ending") if shown else ""
