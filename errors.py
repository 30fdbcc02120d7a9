"""What commands raise, and how it reaches a person: one line, from which process, whatever the encoding."""

import contextlib
import difflib
import itertools
import os
import re
import shlex
import socket
import sys
import sysconfig
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MOST_NAMES = 2000  # of a folder that are compared with one that is not there
INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


class UsageError(Exception):
    """A mistake of the user: one line on stderr, or several mistakes a line each; exit status 2."""

    status = 2
    of_one_process = False  # whether, among several processes, it need not be that of all on a machine


class SharedError(UsageError):
    """A UsageError that all processes of a run have: the main one says it."""


class Mistakes:
    """Collects the mistakes of a configuration, so that all of them are said at once, each in a line."""

    def __init__(self):
        self.lines = []

    def add(self, line: str):
        """Add a mistake, if it is not known yet."""
        if line not in self.lines:
            self.lines.append(line)

    @contextlib.contextmanager
    def collected(self):
        """Take note of a UsageError and go on behind the block."""
        try:
            yield
        except UsageError as error:
            self.add(str(error))

    def refuse(self):
        """Raise what was collected, if anything, as one UsageError."""
        if self.lines:
            raise UsageError("\n".join(self.lines))


class Finished(Exception):
    """The run is over early: ``patience`` (status 0), too many bad files (2), ``nan_patience`` (3), no batches (5).

    Or its processes hold different weights (7).
    """

    def __init__(self, lines, status):
        super().__init__(lines)
        self.lines, self.status = lines, status


def plural(count: int, noun: str) -> str:
    """'1 row', '2 rows', '2 batches', '2 people'."""
    if noun == "person" and count != 1:
        return f"{count} people"
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith(('s', 'ch')) else 's'}"


def hours_text(hours: float) -> str:
    """'2.4 hours', '3.5 minutes'."""
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def size_text(count: float) -> str:
    """'2.4 GB', '3.5 MB', '12 kB' of a number of bytes."""
    unit, one = next(((unit, one) for unit, one in (("GB", 1e9), ("MB", 1e6)) if count >= one), ("kB", 1e3))
    return f"{count / one:.0f} kB" if unit == "kB" else f"{count / one:,.1f} {unit}"


def no_file(path) -> str:
    """Why there is no file of this path, "" if there is one."""
    if os.path.isfile(path):
        return ""
    return f"a folder, and not a file: '{path}'" if os.path.isdir(path) else f"no such file: '{path}'{path_hint(path)}"


def no_folder(path) -> str:
    """Why there is no folder of this path, "" if there is one."""
    if os.path.isdir(path):
        return ""
    if os.path.isfile(path):
        return f"a file, and not a folder: '{path}'"
    return f"no such folder: '{path}'{path_hint(path)}"


def path_hint(path) -> str:
    """The end of a complaint on a path that is not here: which may be meant, or that the checkout has it, else ""."""
    text = os.fspath(path)
    if not text or os.path.exists(text):
        return ""
    if not os.path.isabs(text) and os.path.exists(ROOT / text):
        return f"; it is in '{ROOT}': run the command there, or give the whole path"
    folder, name, below = *os.path.split(text), ""
    while folder and not os.path.isdir(folder):
        below = os.path.join(name, below) if below else name
        folder, name = os.path.split(folder)
    number = re.sub(r"\D", "", name)  # 2.wav is no misspelt 1.wav
    with contextlib.suppress(OSError), os.scandir(folder or ".") as entries:
        names = [entry.name for entry in itertools.islice(entries, MOST_NAMES)]
        names = [other for other in names if re.sub(r"\D", "", other) == number]
        for close in difflib.get_close_matches(name, names, n=1, cutoff=0.8):
            meant = os.path.join(folder, close, below) if below else os.path.join(folder, close)
            return f" - did you mean '{meant}'?" if os.path.exists(meant) else ""
    return ""


def shell_path(path) -> str:
    """A path as a word of a printed command: quoted, and ./ before a '-' that would make it a flag."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def suggested(name: str, known, listed: bool = True) -> str:
    """ " - did you mean 'noise'?" if a known name is like this one; else, if they may be ``listed``, all of them."""
    lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f" - did you mean '{lower[close[0]]}'?" if close else f"; there are {', '.join(known)}" if listed else ""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package, which may lie in the checkout, as in .venv."""
    return "site-packages" in path.parts or any(path.is_relative_to(folder) for folder in INSTALLED)


# What is said when numbers are refused: by sampling and the distributions of torch, a cast, a reduction or an element
# of nothing, Python's math and int, and the checks of numpy, scipy and scikit-learn.
REFUSALS = (
    *("probability tensor contains", "invalid multinomial distribution", "to satisfy the constraint"),
    *("without overflow", "Expected reduction dim", "with size 0", "zero-size array", "empty sequence"),
    *("math domain error", "expected a positive input", "expected a nonnegative input", "expected a number in"),
    *("cannot convert float NaN", "infs or NaNs", "contains NaN", "contains infinity"),
)


def refuses_numbers(error: BaseException) -> bool:
    """Whether an exception tells of numbers that an operation refused, as a matrix that has no factors; not of code."""
    factorises = type(error).__name__ in ("LinAlgError", "_LinAlgError")  # of numpy and torch
    return factorises or isinstance(error, ArithmeticError) or any(words in str(error) for words in REFUSALS)


def with_place(error: BaseException, without: str = "") -> str:
    """An exception in one line: the innermost line of this checkout that it came through, its type, its message.

    ``without``: a folder whose lines do not count.
    """
    lines = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    own = [(p.relative_to(ROOT), n) for p, n in lines if p.is_relative_to(ROOT) and not is_installed(p)]
    own = [(path, line) for path, line in own if path.parts[0] != without]
    place = f"{own[-1][0]}:{own[-1][1]}: " if own else ""
    return f"{place}{type(error).__name__.lstrip(chr(95))}: {first_line(error)}"


def rank_prefix() -> str:
    """Which of several processes speaks: 'rank 3 on HOST: '; empty for a single process."""
    return f"rank {os.environ['RANK']} on {socket.gethostname()}: " if "RANK" in os.environ else ""


def write_any_text():
    """Let stdout and stderr take every text: a character that their encoding lacks is written as an escape.

    The first call of every command line and of every process that it starts; else the name of a file could end it. A
    stream that was closed, as by cron or pythonw, takes everything and gives it to nobody.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open as long as the process)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a caller of ``main`` may have put another kind of stream in its place
            stream.reconfigure(errors="backslashreplace")
