"""What libmpg123 writes to stderr while it decodes, a line for each frame, taken up to be said in one line a file."""

import contextlib
import os
import re
import tempfile
import threading
from collections import Counter

OWN = re.compile(rb"\[.*mpg123.*\]|Note: |Warning: |Error: |\s*$")
MOST_BYTES = 1 << 20

_lock = threading.Lock()
_spool = None


def _after_fork():
    global _lock, _spool
    _lock, _spool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def messages_to(lines: list | None):
    """Add libmpg123's messages to ``lines``; with None nothing is done.

    libsndfile gives no way to silence libmpg123, so the process's stderr is another file meanwhile. A lock lets one
    thread at a time do so: mp3 files are decoded one after another in a process. What others write is passed on.
    """
    global _spool
    if lines is None:
        yield
        return
    with _lock:
        try:
            stderr = os.dup(2)
        except OSError:  # there is none
            yield
            return
        if _spool is None:
            _spool = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        os.dup2(_spool.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            _take(_spool.fileno(), lines)


def _take(spool: int, lines: list):
    """Empty the spool: libmpg123's lines are kept, others go where they were meant to go."""
    size = os.lseek(spool, 0, os.SEEK_END)
    if not size:
        return
    os.lseek(spool, 0, os.SEEK_SET)
    text = os.read(spool, min(size, MOST_BYTES))
    os.lseek(spool, 0, os.SEEK_SET)
    os.truncate(spool, 0)
    for line in text.splitlines(keepends=True):
        if not OWN.match(line):
            os.write(2, line)
        elif line.strip():
            lines.append(line.decode(errors="replace").strip())


def summary(lines: list[str]) -> str:
    """The commonest message without its numbers, and how many lines there were."""
    plain = [re.sub(r"\W*\b(0x[0-9a-fA-F]+|\d+)\b\)?", "", re.sub(r"^(\[.*?\] )?\w+: ", "", line)) for line in lines]
    (text, _), *others = Counter(plain).most_common()
    return f"{text}{' and others' if others else ''} ({len(lines)} time{'s' if len(lines) > 1 else ''})"
