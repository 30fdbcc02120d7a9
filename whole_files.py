"""Files are written whole or not at all: to a temporary name, flushed, renamed."""

import contextlib
import errno
import os
from pathlib import Path

from speaker_lists import UsageError


@contextlib.contextmanager
def replacing(path, mode: int = 0o666):
    """A file of a temporary name beside ``path`` that takes its place at the end; UsageError where it cannot.

    A crash leaves the old file or the new one. ``mode`` is that of the new file, less the umask.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode))
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # its folder may not exist either
            temporary.unlink(missing_ok=True)


def write_atomically(path, content, mode: int = 0o666):
    """Write bytes as ``replacing`` does."""
    with replacing(path, mode) as temporary, open(temporary, "wb") as f:
        f.write(content)


def _flush_folder(folder: Path):
    """Make a rename last through a power cut, where the system can do that."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems cannot
                raise
        finally:
            os.close(number)
