"""What a preflight finds: shown shortened on the terminal, whole in result/preflight.txt."""

from pathlib import Path

from errors import UsageError, plural
from storage.files import write_atomically
from utils import plain_names

MOST_LINES = 20  # of a kind on the terminal; result/preflight.txt has all


class Report:
    """What a preflight finds: printed shortened as it comes, kept whole for result/preflight.txt."""

    def __init__(self):
        self.lines = []
        self.counts = {"error": 0, "warning": 0, "note": 0}

    def line(self, text: str = "", printed: bool = True):
        """Add a line."""
        text = plain_names(text.rstrip())
        self.lines.append(text)
        if printed:
            print(text, flush=True)

    def heading(self, text: str):
        """Begin a section."""
        self.line()
        self.line(text)

    def finding(self, level: str, text: str, items=()):
        """Add a finding, or several of a kind: ``items`` are rows of columns and count one each."""
        self.counts[level] += len(items) or 1
        self.line(f"  {level.upper() if level == 'error' else level:<8} {text}")
        for index, row in enumerate(aligned(items)):
            self.line(f"             {row}", index < MOST_LINES)
        if len(items) > MOST_LINES:
            print(f"             and {len(items) - MOST_LINES} more, see result/preflight.txt")

    def table(self, rows):
        """Add rows of columns, the first of them the heads."""
        for row in aligned(rows):
            self.line(f"  {row}")

    def verdict(self) -> str:
        """The last line."""
        warnings = plural(self.counts["warning"], "warning")
        if self.counts["error"]:
            return f"preflight: do not start: {plural(self.counts['error'], 'error')}, {warnings}"
        return f"preflight: ready to start ({warnings})"

    def write(self, folder: Path):
        """Write all of it to ``folder``/preflight.txt."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"save_path: cannot make '{folder}': {error.strerror}") from error
        write_atomically(folder / "preflight.txt", "\n".join([*self.lines, ""]).encode(errors="backslashreplace"))


def aligned(rows) -> list[str]:
    """Join columns; each is as wide as its widest cell among the rows that a terminal shows."""
    shown = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown[:MOST_LINES])]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown]
