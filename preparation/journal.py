"""What was done is kept in a file of lines below --out, so that a command that is killed goes on where it was."""

import json
from pathlib import Path

from corpus.tars import size_and_time
from errors import plural
from storage.files import WriteError

FORMAT = {"format_version": 1}
DECODER = json.JSONDecoder()


class Journal:
    """Records {key: value} in a file of JSON lines; a line that was cut by a kill is taken off."""

    def __init__(self, path: Path):
        self.path, self.known = path, {}
        try:
            self.file = open(path, "ab+")  # noqa: SIM115 (open as long as the command)
            self._read()
        except OSError as error:
            raise WriteError(path, error.strerror) from error

    def _read(self):
        self.file.seek(0)
        good, bad = 0, []
        for number, line in enumerate(self.file):
            if not line.endswith(b"\n") or (number == 0 and line != json.dumps(FORMAT).encode() + b"\n"):
                break
            good += len(line)
            if number:
                try:
                    text = line.decode()
                    key, end = DECODER.raw_decode(text, 1)
                    self.known[str(key)] = text[end + 2 : -2].encode()
                except ValueError:
                    bad.append(number + 1)
        if bad:
            of = plural(len(bad), "such line")
            print(f"{self.path}:{bad[0]}: cannot be read, so its file is measured again ({of})")
            good = 0
        self.file.truncate(good)
        if not good:
            self._write(FORMAT)
        if bad:
            self.file.writelines(b"[%b, %b]\n" % (json.dumps(key).encode(), text) for key, text in self.known.items())
            self.file.flush()

    def get(self, key: str):
        """What is known of a key, or None."""
        text = self.known.get(key)
        try:
            return None if text is None else json.loads(text)
        except ValueError:  # a spoilt line
            return None

    def add(self, key: str, value):
        """Take note of something; the system has it when this returns, so that a killed command loses nothing."""
        self._write([key, value])
        self.known[key] = json.dumps(value).encode()  # as text: a million of them fit into memory

    def _write(self, entry):
        try:
            self.file.write(json.dumps(entry).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise WriteError(self.path, error.strerror) from error

    def close(self):
        """Close the file."""
        self.file.close()


def stamp(path: str) -> str:
    """A key that tells a file from what lay at its path before: its path, size and time of change."""
    try:
        size, time = size_and_time(path)
    except (OSError, ValueError):
        return f"{path}|gone"
    return f"{path}|{size}|{time}"
