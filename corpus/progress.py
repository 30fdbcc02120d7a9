"""How far a loop over files has come: a bar on a terminal, a line a minute where there is none."""

import sys
import time

from tqdm import tqdm

LOG_SECONDS = 60  # between lines


class FileProgress:
    """Counts the files that are done; use as a context manager.

    ``words`` stand before the count; ``before`` of the ``total`` were done by an earlier call; ``log`` prints a line.
    """

    def __init__(self, total: int, words: str, before: int = 0, log=print):
        self.total, self.words, self.before, self.log = total, words, before, log
        self.done = 0  # in this call
        self.began = self.last_line = time.monotonic()
        hidden = not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=before, desc=words, unit="file", leave=False, ascii=True, disable=hidden)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()

    def update(self, files: int = 1):
        """Count so many more files as done."""
        self.done += files
        self.bar.update(files)
        now = time.monotonic()
        if self.bar.disable and now - self.last_line > LOG_SECONDS:
            self.last_line = now
            done = self.before + self.done
            left = (now - self.began) / self.done * (self.total - done)
            self.log(f"  {self.words}: {done} of {self.total} files, about {left / 60:.0f} min left")
