"""Arrays of .npz files: plain numbers and texts, never pickles, and never more than the file pays for."""

import io
import math
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from storage.files import write_atomically

MOST_PACKED = 16  # times the size of the file that its arrays may have if they are compressed
KINDS = "biufcUS"
# What the readers of zip archives and of arrays raise on a damaged file.
DAMAGE = (ValueError, LookupError, TypeError, OverflowError, EOFError, MemoryError, RuntimeError)
DAMAGE += (struct.error, zipfile.BadZipFile, zlib.error)


def read_arrays(path, names=None) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file, all of them or those called ``names``; OSError, or one of ``DAMAGE``."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > MOST_PACKED * os.path.getsize(path):
            raise ValueError(f"would unpack to more than {MOST_PACKED} times its size")
        by_name = {entry.filename.removesuffix(".npy"): entry for entry in entries}
        return {name: _read(archive, by_name[name]) for name in (by_name if names is None else names)}


def has_array(path, name: str) -> bool:
    """Whether an .npz file holds an array of this name."""
    with zipfile.ZipFile(path) as archive:
        return f"{name}.npy" in archive.namelist()


def _read(archive, entry) -> np.ndarray:
    """One array, if its header promises just the bytes that follow: numpy would ask for what is promised, unseen."""
    with archive.open(entry) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"'{entry.filename}' is an array of format {version}")
        shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
        if dtype.kind not in KINDS:
            raise ValueError(f"'{entry.filename}' holds Python objects, or is of another kind")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != entry.file_size - file.tell():
            raise ValueError(f"'{entry.filename}' has another size than its header says")
    with archive.open(entry) as file:
        return npy.read_array(file, allow_pickle=False)


def write_arrays(path, mode: int = 0o666, **arrays):
    """Write arrays to an .npz file, whole or not at all; ``mode`` as of ``replacing``."""
    written = io.BytesIO()
    np.savez(written, **arrays)
    write_atomically(Path(path), written.getbuffer(), mode)
