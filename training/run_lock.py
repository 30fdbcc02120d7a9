"""One process at a time writes into the folder of a run."""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from pathlib import Path

from filelock import FileLock, Timeout

from errors import SharedError, UsageError
from storage.files import write_atomically

WAIT_SECONDS = 10.0  # for a run that is just ending, and for loader processes that outlive a killed one
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@contextlib.contextmanager
def held(folder, ranks):
    """Hold the folder of a run; UsageError on all ranks if another process does.

    The system's lock ends with the process, however it ends. ``.run.json`` beside it says who holds it.
    """
    lock = refusal = None
    if ranks.main:
        try:
            lock = acquire(Path(folder))
        except UsageError as error:
            refusal = str(error)
    refusal = ranks.from_main(refusal)
    if refusal:
        raise SharedError(refusal)
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):  # it is only a note
                (Path(folder) / ".run.json").unlink(missing_ok=True)
            lock.release()


def acquire(folder: Path) -> FileLock | None:
    """Lock a folder, which is made if there is none; None if its file system knows no locks, which is said."""
    lock = FileLock(folder / ".run.lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            print(f"{folder}: waiting {WAIT_SECONDS:g} s for {holder(folder)} to end", file=sys.stderr)
            lock.acquire(timeout=WAIT_SECONDS)
    except Timeout:
        raise UsageError(
            f"{folder}: {holder(folder)} writes into this folder; wait until it has ended, or choose another save_path"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise UsageError(f"save_path: cannot write into '{folder}': {error.strerror}") from error
        print(f"{folder}: cannot be locked ({error}): take care that no second run writes there", file=sys.stderr)
        return None
    note = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # a full disk; the lock holds without the note
        write_atomically(folder / ".run.json", json.dumps(note).encode())
    return lock


def holder(folder: Path) -> str:
    """Who holds a folder: 'process 4711 on this machine, started 2024-05-01 10:00:00'."""
    try:
        note = json.loads((folder / ".run.json").read_text())
        here = note["host"] == socket.gethostname()
        return f"process {note['pid']} on {'this machine' if here else note['host']}, started {note['started']},"
    except (OSError, ValueError, KeyError, TypeError):  # not written yet, or on a full disk
        return "another process"
