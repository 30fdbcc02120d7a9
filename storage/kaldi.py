"""Kaldi's tables of float vectors: .ark files, text or binary, and .scp lists of places in them.

Nothing but numbers is read: neither the pickles that some libraries put into such files, nor commands.
"""

import contextlib
import math
import os
import re
import struct

import numpy as np

from corpus.lists import numbered_lines, separator_for
from errors import UsageError

TYPES = {b"FV": "<f4", b"DV": "<f8", b"FM": "<f4", b"DM": "<f8"}
LONGEST_NAME = 4096  # bytes
WHITE_SPACE = re.compile(rb"\s")


def read_ark(path):
    """Yield (name, vector (D,) float) of each entry of an .ark file; ValueError for what is no vector."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while name := _name(file):
            yield name, _value(file, size, name)


def read_scp(path):
    """Yield (name, vector (D,) float) of 'name ark' and 'name ark:offset' lines; UsageError names the line."""
    with contextlib.ExitStack() as opened:
        last = None
        file = None
        size = 0
        for number, (name, *place) in numbered_lines(path):
            place = " ".join(place)
            if "|" in place:
                raise UsageError(f"{path}:{number}: a pipe; commands of a list are not run")
            ark, offset = re.fullmatch(r"(.*?)(?::(\d{1,18}))?", place).groups()
            if ark != last:  # most lines name the file of the line before
                if not os.path.isfile(ark):
                    raise UsageError(f"{path}:{number}: no such file: '{ark}'")
                opened.close()
                last, file = ark, opened.enter_context(open(ark, "rb"))
                size = os.fstat(file.fileno()).st_size
            file.seek(int(offset or 0))
            try:
                value = _value(file, size, name)
            except ValueError as error:
                raise UsageError(f"{path}:{number}: {ark}: {error}") from error
            yield name, value


def _name(file) -> str:
    """The name of the next entry, "" at the end of the file."""
    name = b""
    while buffered := file.peek(1):
        space = WHITE_SPACE.search(buffered)
        taken = file.read(space.end() if space else len(buffered))
        name += taken[:-1] if space else taken
        if len(name) > LONGEST_NAME:
            raise ValueError("an entry without a name, or of another kind than numbers")
        if space and name:  # not the line end of the entry before
            return name.decode("utf-8", "surrogateescape")
    if name:
        raise ValueError("cut: ends with a name")
    return ""


def _value(file, size: int, name: str) -> np.ndarray:
    """The vector, or matrix of one row, that stands here in a file of ``size`` bytes."""
    mark = file.read(2)
    rows, values = _binary(file, size) if mark == b"\0B" else _text(mark, file)
    if rows > 1:
        raise ValueError(f"'{name}' is a matrix of {rows} rows, not one embedding")
    return values


def _binary(file, size: int):
    """Rows (1 of a vector) and all values."""
    kind = file.read(3)
    dtype = TYPES.get(kind.rstrip(b" "))
    if dtype is None:
        raise ValueError(f"an entry of kind {kind!r}; vectors and matrices of floats are read (FV, DV, FM, DM)")
    head = file.read(10 if kind[1:2] == b"M" else 5)
    shape = [int.from_bytes(head[i + 1 : i + 5], "little", signed=True) for i in range(0, len(head), 5)]
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    if set(head[::5]) != {4} or min(shape) < 0 or nbytes > size - file.tell():
        raise ValueError("cut, or damaged: an entry reaches beyond the end of the file")
    return shape[0] if len(shape) > 1 else 1, np.frombuffer(file.read(nbytes), dtype)


def _text(begin: bytes, file):
    """Rows and all values of numbers in brackets, of which ``begin`` was read already."""
    lines = [begin + file.readline()]
    while lines[-1] and lines[0].lstrip().startswith(b"[") and b"]" not in lines[-1]:
        lines.append(file.readline())
    inside = re.fullmatch(r"\s*\[([^\[\]]*)\]\s*", b"".join(lines).decode("latin-1"))
    if inside is None:
        raise ValueError("cut, or of another kind than numbers in brackets")
    rows = [line.split() for line in inside[1].split("\n") if line.strip()]
    return len(rows), np.array([float(word) for row in rows for word in row])


def write_ark(ark, scp, names: list[str], x, shown):
    """Write float vectors (N, D) and the list of their places, in which the file is called ``shown``."""
    between = separator_for([str(shown)])
    with open(ark, "wb") as file, open(scp, "w", encoding="utf-8", errors="surrogateescape") as index:
        for name, row in zip(names, np.ascontiguousarray(x, "<f4")):
            file.write(name.encode("utf-8", "surrogateescape") + b" ")
            index.write(f"{name}{between}{shown}:{file.tell()}\n")
            file.write(b"\0BFV \4" + struct.pack("<i", len(row)) + row.tobytes())
