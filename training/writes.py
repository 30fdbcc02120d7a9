"""Writing that ends no run: what cannot be written is said, kept in memory and tried again."""

import functools
import sys
import time
from pathlib import Path

from tqdm import tqdm

from storage.files import GrowingFile, WriteError, write_atomically


class Writes:
    """Writes files of a run; ``waiting`` holds for each path that could not be written the function that writes it."""

    def __init__(self):
        self.waiting, self.tried_at = {}, 0.0
        self._growing, self._reasons = {}, {}

    def write(self, path, action, keep=None) -> bool:
        """Call ``action()``, which writes ``path``, now or, after a WriteError, later; returns whether it is written.

        ``keep()`` gives the function to try again with, if ``action`` uses what changes meanwhile. A newer content of a
        path takes the place of one that waits.
        """
        path = Path(path)
        waited = self.waiting.pop(path, None)
        try:
            action()
        except WriteError as error:
            self.waiting[path] = keep() if keep else action
            self.tried_at = time.monotonic()
            self.tell(path, error.reason)
            return False
        if waited and not self.waiting:
            self._reasons.clear()
            log("every file that could not be written before is written now")
        return True

    def write_bytes(self, path, content: bytes) -> bool:
        """Write a file as ``write`` does."""
        return self.write(path, functools.partial(write_atomically, path, content))

    def remove(self, path):
        """Remove a file that a newer one takes the place of."""
        try:
            Path(path).unlink(missing_ok=True)
        except OSError as error:
            log(f"{path}: cannot be removed: {error.strerror}")

    def append(self, path, piece: bytes) -> bool:
        """Append to a file as ``write`` does; pieces that wait are written before it."""
        growing = self._growing.setdefault(path, GrowingFile(path))
        growing.waiting.append(piece)
        return self.write(path, growing.flush)

    def again(self, but=()):
        """Try again what waits, ``but`` paths of which something newer is being written."""
        for path, action in list(self.waiting.items()):
            if path not in but:
                self.write(path, action)

    def lines_again(self):
        """Try again the pieces that wait to be appended: they are small, and a state says how long their files are."""
        for path in [path for path in self.waiting if path in self._growing]:
            self.write(path, self.waiting[path])

    def tell(self, path: Path, reason: str):
        """Say that a file could not be written, once for each folder and reason."""
        if (path.parent, reason) not in self._reasons.values():
            log(f"{path}: cannot be written: {reason}; training goes on, and this is tried again")
        self._reasons[path] = (path.parent, reason)

    def left(self) -> dict[Path, str]:
        """The paths that still wait, with the reason."""
        return {path: self._reasons[path][1] for path in self.waiting}


def log(text: str):
    """Print a line on stderr, above a progress bar."""
    tqdm.write(text, file=sys.stderr)
