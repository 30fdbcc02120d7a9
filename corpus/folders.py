"""Recordings below a folder."""

import os
import sys
from pathlib import Path

AUDIO_ENDINGS = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".sph", ".w64", ".caf", ".m4a"}


def is_audio(name: str) -> bool:
    """Whether a name ends as that of a recording does."""
    return os.path.splitext(name)[1].lower() in AUDIO_ENDINGS


def find_recordings(folder) -> list[Path]:
    """Paths of the recordings below ``folder`` at any depth, sorted by their parts.

    Symbolic links to folders are followed, except back into a folder that they lie in. A folder that cannot be read is
    named on stderr.
    """
    found = []
    ancestors = {os.fspath(folder): set()}

    def name(error):
        print(f"{error.filename}: cannot be read, its recordings are left out: {error.strerror}", file=sys.stderr)

    for place, folders, files in os.walk(folder, onerror=name, followlinks=True):
        above = ancestors.pop(place)
        stat = os.stat(place)
        if (stat.st_dev, stat.st_ino) in above:
            folders.clear()
            continue
        inside = above | {(stat.st_dev, stat.st_ino)}
        ancestors.update((os.path.join(place, child), inside) for child in folders)
        found += [Path(place, file) for file in files if is_audio(file)]
    return sorted(found, key=lambda path: path.parts)
