"""What commands raise: a mistake of the user, and the end of a run."""

import contextlib


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
    """The run is over early: ``patience`` (status 0), too many bad files (2), ``nan_patience`` (3), no batches (5)."""

    def __init__(self, lines, status):
        super().__init__(lines)
        self.lines, self.status = lines, status
