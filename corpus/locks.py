"""One process at a time writes into a folder, also on file systems that know no locks."""

import contextlib
import sys

from filelock import FileLock, SoftFileLock, Timeout

from errors import UsageError


@contextlib.contextmanager
def folder_lock(path, busy: str = ""):
    """Hold the lock file ``path``: wait for who holds it, or raise a UsageError of the text ``busy`` if one is given.

    The system's lock ends with its process. Where there are none (some network disks), the mere existence of
    ``path``.held is the lock, and a killed process leaves it: whoever meets it is told. OSError if neither can be made.
    """
    lock, hint = FileLock(path), ""
    try:
        try:
            lock.acquire(timeout=0 if busy else -1)
        except NotImplementedError:  # of filelock: no flock
            lock = SoftFileLock(f"{path}.held")
            hint = f"; if no other process writes there, remove {path}.held"
            lock.acquire(timeout=0)
    except Timeout as error:
        if busy:
            raise UsageError(busy + hint) from error
        print(f"{path}.held: waiting for another process{hint}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
