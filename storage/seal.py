"""The SHA-256 of a file that torch.save wrote, in the file itself: as the comment of its zip archive.

A comment is no part of what torch.load reads, and moves with the file when it is copied or renamed.
"""

import errno
import hashlib
import os
import shutil
import struct
from pathlib import Path

from corpus.plain import plain
from storage.files import PIECE, replacement

MARK = b"sha256:"
COMMENT = len(MARK) + 64  # bytes of the comment


class Hashing:
    """A binary file that takes the SHA-256 of what is written to it."""

    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, piece) -> int:
        """Write a piece, as torch.save wants it of a file."""
        self.digest.update(piece)
        return self.file.write(piece)

    def flush(self):
        """Write what is buffered."""
        self.file.flush()

    def seal(self):
        """Put the SHA-256 of all that was written into the comment, whose length is the archive's last two bytes."""
        self.flush()
        self.file.seek(-2, os.SEEK_END)
        self.file.write(struct.pack("<H", COMMENT) + MARK + self.digest.hexdigest().encode())
        self.flush()


def save_sealed(value, path, mode: int = 0o666, before=None):
    """Write a value by torch.save as ``files.replacement`` does, with the seal; the new file is read back first.

    WriteError if it cannot be written, or is not read as it was written: the old file then stays. ``before()`` is
    called when the new file is known to be sound, and the old one is still there.
    """
    import torch

    with replacement(path, mode) as f:
        hashing = Hashing(f)
        torch.save(plain(value), hashing)
        hashing.seal()
        os.fsync(f.fileno())
        forget_cached(f)
        if not is_whole(f, f.tell()):
            raise OSError(errno.EIO, "it is not read back as it was written; is the disk sound?")
        if before is not None:
            before()


class KeepsPrevious:
    """Writes one path with the seal again and again, and keeps what the newest file took the place of, if it is whole.

    So there are always two states to go on from, but for the first write.
    """

    def __init__(self, path):
        self.path, self.own = Path(path), None  # own: which file was written last

    def save(self, value):
        """Write a value as ``save_sealed`` does."""
        save_sealed(value, self.path, before=self.keep)
        self.own = self.signature()

    def signature(self) -> tuple | None:
        """What tells a file at the path from another one; None if there is none."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns

    def keep(self):
        """Give the file at the path its second name."""
        if self.signature() is None or (self.signature() != self.own and not self.is_sound()):
            return  # what it would take the place of is worth more than a damaged file
        previous = previous_of(self.path)
        temporary = previous.with_name(f".{previous.name}.{os.getpid()}.tmp")
        try:
            temporary.unlink(missing_ok=True)
            try:
                os.link(self.path, temporary)
            except OSError:  # a file system without links
                shutil.copyfile(self.path, temporary)
            os.replace(temporary, previous)
        finally:
            temporary.unlink(missing_ok=True)

    def is_sound(self) -> bool:
        """Whether the file at the path is as it was written."""
        with open(self.path, "rb") as file:
            return is_whole(file, os.fstat(file.fileno()).st_size)


def forget_cached(file):
    """Have the next reading of a file ask the disk, where the system can do that."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seal_of(file, size: int) -> str:
    """The SHA-256 that a file of ``size`` bytes carries, '' if it carries none."""
    if size < 22 + COMMENT:
        return ""
    file.seek(size - COMMENT - 2)
    length, mark, digest = struct.unpack(f"<H{len(MARK)}s64s", file.read(COMMENT + 2))
    return digest.decode("latin-1") if (length, mark) == (COMMENT, MARK) else ""


def is_whole(file, size: int) -> bool:
    """Whether a file carries a seal, and its content fits it."""
    sealed = seal_of(file, size)
    if not sealed:
        return False
    digest, left = hashlib.sha256(), size - COMMENT - 2
    file.seek(0)
    while left > 0:
        piece = file.read(min(PIECE, left))
        if not piece:
            return False
        digest.update(piece)
        left -= len(piece)
    digest.update(b"\0\0")  # the length of no comment, which was there when the SHA-256 was taken
    return digest.hexdigest() == sealed


def previous_of(path) -> Path:
    """Where the file is kept that a newer one of this path took the place of: last.model -> last_previous.model."""
    path = Path(path)
    return path.with_name(f"{path.stem}_previous{path.suffix}")
