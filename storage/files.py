"""Files are written whole or not at all, and lines are appended whole or not at all."""

import contextlib
import errno
import hashlib
import os
from pathlib import Path

from corpus.plain import plain
from errors import UsageError

PIECE = 1 << 20  # bytes at a time


class WriteError(UsageError, OSError):
    """A file could not be written: ``path`` and ``reason``; commands say it in one line, the trainer goes on."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: cannot be written: {reason}")
        self.path, self.reason = Path(path), reason


def sha256_of(path) -> str:
    """SHA-256 of a file's content; OSError if it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def system_error(error) -> OSError | None:
    """The system's own error behind an exception; torch.save on a full disk raises a RuntimeError over it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def replacing(path, mode: int = 0o666):
    """A file of a temporary name beside ``path`` that takes its place at the end; WriteError if it cannot.

    A crash leaves the old file or the new one. ``mode`` is that of the new file, less the umask.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a killed process of this number, or a link that leads to another file
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except WriteError:  # of another file, written inside
        raise
    except MemoryError as error:
        raise WriteError(path, "no memory is left for it") from error
    except (OSError, RuntimeError) as error:
        cause = system_error(error)
        if cause is None:
            raise
        raise WriteError(path, cause.strerror or str(cause)) from error
    finally:
        with contextlib.suppress(OSError):  # its folder may not exist either
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacement(path, mode: int = 0o666):
    """A new binary file that takes the place of ``path`` as ``replacing`` says."""
    with replacing(path, mode) as temporary, open(temporary, "wb+") as f:
        yield f


def write_atomically(path, content, mode: int = 0o666):
    """Write bytes as ``replacing`` does."""
    with replacement(path, mode) as f:
        f.write(content)


def save_atomically(value, path, mode: int = 0o666):
    """Write a value by torch.save as ``replacing`` does."""
    import torch  # most callers of this module do without

    with replacement(path, mode) as f:
        torch.save(plain(value), f)


def _flush_folder(folder: Path):
    """Make a rename last through a power cut, if the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems cannot
                raise
        finally:
            os.close(number)


class GrowingFile:
    """A file that pieces are appended to, each whole or not at all; those that could not be written wait in order."""

    def __init__(self, path):
        self.path, self.waiting = Path(path), []
        self._cut = None  # bytes to cut the file back to, while a half-written piece is in it

    def add(self, piece: bytes):
        """Append a piece behind those that wait; WriteError if it has to wait too."""
        self.waiting.append(piece)
        self.flush()

    def flush(self):
        """Append the pieces that wait; WriteError if one cannot be written."""
        try:
            while self.waiting:
                self._append(self.waiting[0])
                self.waiting.pop(0)
        except OSError as error:
            raise WriteError(self.path, error.strerror or str(error)) from error

    def _append(self, piece: bytes):
        if self._cut is not None:
            os.truncate(self.path, self._cut)
        self._cut = self.size()
        try:
            with open(self.path, "ab", buffering=0) as f:
                while piece:
                    piece = piece[f.write(piece) :]
        except OSError:
            with contextlib.suppress(OSError):  # then it is cut before the next attempt
                if self._cut < self.size():
                    os.truncate(self.path, self._cut)
                self._cut = None
            raise
        self._cut = None

    def size(self) -> int:
        """Bytes of the file, 0 if there is none yet."""
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0
