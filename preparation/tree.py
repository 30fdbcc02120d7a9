"""A folder SPEAKER/../FILE that lists can be relative to: the corpus itself where it is one, else links in --out."""

import os
from pathlib import Path

from errors import UsageError
from preparation.corpora import Utterance


def root_of(utterances: list[Utterance], tree: Path) -> Path:
    """The folder that ``speaker/name`` of every utterance is below.

    A corpus that lies so already is left where it is. Of any other, ``tree`` gets a link to each file, or to the folder
    of a speaker who has one of his own, beside the files that were converted or cut there.
    """
    try:
        return _root_of(utterances, tree)
    except (OSError, ValueError) as error:
        place = getattr(error, "filename", None) or tree
        raise UsageError(f"--out: cannot link to a recording: {place}: {getattr(error, 'strerror', error)}") from error


def _root_of(utterances: list[Utterance], tree: Path) -> Path:
    roots = {_prefix(utterance) for utterance in utterances}
    if len(roots) == 1 and None not in roots:
        return Path(roots.pop())
    of_speaker = {}
    for utterance in utterances:
        of_speaker.setdefault(utterance.speaker, []).append(utterance)
    tree.mkdir(parents=True, exist_ok=True)
    for speaker, own in of_speaker.items():
        prefixes = {_prefix(utterance) for utterance in own}
        place = tree / speaker
        if len(prefixes) == 1 and None not in prefixes and (place.is_symlink() or not place.exists()):
            link(Path(prefixes.pop(), speaker), place)
            continue
        unlink(place)
        for utterance in own:
            place = tree / utterance.listed
            if Path(utterance.path) != place:
                place.parent.mkdir(parents=True, exist_ok=True)
                link(Path(utterance.path), place)
    return tree


def _prefix(utterance: Utterance) -> str | None:
    """What stands before ``speaker/name`` in a path; None if it does not end so."""
    path, end = utterance.path, os.sep + utterance.listed.replace("/", os.sep)
    return path[: -len(end)] if path.endswith(end) else None


def link(target: Path, place: Path):
    """Make ``place`` a symbolic link to ``target``, unless it is one already."""
    try:
        if place.is_symlink():
            if os.readlink(place) == os.fspath(target):
                return
            place.unlink()
        os.symlink(target, place, target_is_directory=target.is_dir())
    except OSError as error:
        advice = "; Windows allows links in developer mode" if os.name == "nt" else ""
        raise UsageError(f"--out: cannot make the link '{place}': {error.strerror}{advice}") from error


def unlink(folder: Path):
    """Take a link to a folder of the corpus away, so that nothing is written through it."""
    if folder.is_symlink():
        folder.unlink()
