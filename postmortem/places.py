"""Which source files are the user's, and how they are called: 'loss/x.py' in the checkout, else from this folder."""

import functools
import os
import sys
from pathlib import Path

from errors import ROOT, is_installed
from settings.user_code import DEVELOPERS, PLUG_INS, is_product

CALLERS = ("analyze_nan_debug.py", "trainSpeakerNet.py", "SpeakerNet.py")  # these call plug-ins


@functools.cache
def place_of(filename: str, folder: str) -> str:
    """'loss/x.py' of a plug-in or of what it imports from the checkout, else the name from ``folder``.

    '' of what is no code of the user; what plug-ins import from the root, as utils.py, counts.
    """
    path = Path(filename)
    if path.is_relative_to(ROOT):
        place = path.relative_to(ROOT)
        if place.parts[0] in PLUG_INS or (len(place.parts) == 1 and place.name not in CALLERS):
            return place.as_posix()
    if is_product(path) or is_installed(path):
        return ""
    if path.is_relative_to(folder) and Path(folder) != ROOT:
        return path.relative_to(folder).as_posix()
    inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] not in DEVELOPERS
    return path.relative_to(ROOT).as_posix() if inside else ""


def path_of(place: str) -> Path | None:
    """The file of a place, in the current folder or in the checkout; None if there is none there."""
    folders = [Path.cwd(), ROOT]
    for folder in reversed(folders) if place.partition("/")[0] in PLUG_INS else folders:
        path = (folder / place).resolve()
        if path.is_relative_to(folder.resolve()) and path.is_file():
            return path
    return None


def call_site(skip: int = 1) -> str:
    """'loss/x.py:31' of the innermost frame in the user's code, '' if there is none."""
    frame, folder = sys._getframe(skip), os.getcwd()
    while frame is not None:
        place = place_of(frame.f_code.co_filename, folder)
        if place:
            return f"{place}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
