"""Lines of lists: columns, numbers for every complaint, and the hash of what was read."""

import contextlib
import hashlib
import io
import os

import numpy as np

from errors import UsageError, plural

# How lists are read: UTF-8, with or without a byte-order mark. Bytes that are not UTF-8 stand for themselves, as in the
# names of files that Python gives.
LIST_TEXT = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
TRIAL_LABELS = {"0": 0, "1": 1, "nontarget": 0, "target": 1}


def columns_of(line: str) -> list[str]:
    """Columns of a line: between its tabs if it has one, so that a name may hold spaces, else between white space."""
    line = line.strip()
    return [cell.strip() for cell in line.split("\t") if cell.strip()] if "\t" in line else line.split()


def separator_for(names) -> str:
    """What to write between columns that ``columns_of`` reads again: a tab if a name holds white space."""
    return "\t" if any(len(name.split()) > 1 for name in names) else " "


def wrong_columns(expected: str, count: int) -> str:
    """Say that a line has another number of columns than expected, and what to do if a name holds spaces."""
    return f"expected {expected}, got {plural(count, 'column')}; if names hold spaces, put tabs between the columns"


def numbered_lines(path):
    """Yield (line number, columns) of the non-empty lines; accepts CRLF and a byte-order mark."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise not_text(path, number)
            columns = columns_of(line)
            if columns:
                yield number, columns


class Hashed(io.RawIOBase):
    """A file whose SHA-256 is known once it was read."""

    def __init__(self, path):
        super().__init__()
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
        self.digest = hashlib.sha256()

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        return count

    def close(self):
        self.file.close()
        super().close()


@contextlib.contextmanager
def opened(path):
    """Open a list as text; once all of it was read ``list_hash`` knows its hash without reading it again."""
    try:
        stamp = stamp_of(path)
        with Hashed(path) as raw, io.TextIOWrapper(io.BufferedReader(raw, 1 << 20), **LIST_TEXT) as file:
            yield file
            _hashes[stamp] = raw.digest.hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path, error: OSError) -> UsageError:
    """What to raise for a list that the system does not let be read."""
    return UsageError(f"{path}: cannot read the list: {error.strerror}")


def stamp_of(path) -> tuple:
    """What changes if a file does: where it is, its number, size and time."""
    status = os.stat(path)
    return os.path.realpath(path), status.st_ino, status.st_size, status.st_mtime_ns


class LineNumbers:
    """The numbers (N,) of lines that were used of a list, or of several; runs of neighbours take no room."""

    def __init__(self):
        self.firsts, self.begins, self.count = np.empty(0, np.int32), np.empty(0, np.int32), 0

    def add(self, numbers: np.ndarray):
        """Add the numbers (n,) of further lines."""
        new = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 2) != 1)
        goes_on = self.count and len(numbers) and self[self.count - 1] + 1 == numbers[0]
        new = new[1:] if goes_on else new
        self.firsts = np.append(self.firsts, numbers[new].astype(np.int32))
        self.begins = np.append(self.begins, (self.count + new).astype(np.int32))
        self.count += len(numbers)

    def __len__(self):
        return self.count

    def __getitem__(self, index: int) -> int:
        run = int(self.begins.searchsorted(index, side="right")) - 1 if len(self.begins) > 1 else 0
        return int(self.firsts[run]) + int(index) - int(self.begins[run])

    def places_of(self, number: int) -> list[int]:
        """All places at which a number stands."""
        lengths = np.diff(self.begins, append=self.count)
        runs = np.flatnonzero((self.firsts <= number) & (number < self.firsts + lengths))
        return (self.begins[runs] + number - self.firsts[runs]).tolist()

    def tolist(self) -> list[int]:
        """All numbers."""
        lengths = np.diff(self.begins, append=self.count)
        return (np.repeat(self.firsts - self.begins, lengths) + np.arange(self.count)).tolist()


_hashes: dict[tuple, str] = {}  # of lists as they were read


def list_hash(path) -> str:
    """SHA-256 of a list file, to record which list a score was made with."""
    stamp = stamp_of(path)
    if stamp not in _hashes:
        with Hashed(path) as file:
            while file.read(1 << 20):
                pass
            _hashes[stamp] = file.digest.hexdigest()
    return _hashes[stamp]


def not_text(path, number: int) -> UsageError:
    """What to raise for a list that is no text."""
    return UsageError(f"{path}:{number}: cannot read the list: not a UTF-8 text file")
