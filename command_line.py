"""What the small scripts share: usage errors in one line, no abbreviated flags, exit status 2."""

import argparse
import os
import sys

from speaker_lists import UsageError


class Parser(argparse.ArgumentParser):
    """A parser of exact flags, whose complaints are a UsageError of one line."""

    def __init__(self, script: str, description: str, **more):
        super().__init__(prog=f"python {script}", description=description, allow_abbrev=False, **more)
        self.script = script

    def error(self, message):
        raise UsageError(f"{self.script}: {message}")


def write_any_text():
    """Let stdout and stderr take every text: a character that their encoding lacks is written as an escape.

    The first call of every command line and of every process that it starts; else the name of a file could end it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a caller of ``main`` may have put another kind of stream in its place
            stream.reconfigure(errors="backslashreplace")


def picture(character: str) -> str:
    """An emoji and a space for the beginning of a line on stdout; nothing if stdout cannot write it."""
    try:
        character.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return ""
    return f"{character} "


def run(main, argv=None) -> int:
    """Call ``main(argv)``; a UsageError is one line on stderr and exit status 2, Ctrl-C is 130.

    Output that nobody reads any more (``| head``) ends it quietly, 141. The signal SIGPIPE stays ignored: else a
    browser that hangs up would end serve.py.
    """
    write_any_text()
    try:
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        finally:  # --help, which ends by SystemExit, too
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 128 + 13
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def existing_file(path: str, flag: str) -> str:
    """The path, or a UsageError that names the flag where there is no such file."""
    if not os.path.isfile(path):
        raise UsageError(f"{flag}: no such file: '{path}'")
    return path
