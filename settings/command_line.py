"""What the small scripts share: usage errors in one line, no abbreviated flags, exit status 2."""

import argparse
import importlib.util
import io
import os
import re
import stat
import sys
import traceback

from errors import SharedError, UsageError, no_file, no_folder, rank_prefix, write_any_text
from settings.plugins import explained

NUMBERS = {"int": "a whole number", "float": "a number"}
NOT_A_NUMBER = re.compile("invalid (int|float) value:")  # argparse's words
TRACEBACK = "print the whole traceback of an error too"


class Parser(argparse.ArgumentParser):
    """A parser of exact flags, whose complaints are a UsageError of one line."""

    def __init__(self, script: str, description: str, **more):
        program = os.path.basename(sys.argv[0])  # spk-embed as pip installs it, or python embed.py
        prog = program if program.startswith("spk-") else f"python {script}"
        super().__init__(prog=prog, description=description, allow_abbrev=False, **more)
        self.script = script
        self.add_argument("--traceback", action="store_true", default=argparse.SUPPRESS, help=TRACEBACK)

    def parse_known_args(self, args=None, namespace=None):
        self.words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message):
        text = NOT_A_NUMBER.sub(lambda found: f"expected {NUMBERS[found[1]]}, got", message)
        raise UsageError(f"{self.script}: {text}{self._taken_for_a_flag(message)}")

    def _taken_for_a_flag(self, message: str) -> str:
        """What to write where a value begins with '-', if that is what the complaint is about, else ""."""
        lacking = re.match(r"argument ([^:]+): expected (?:at least )?one argument$", message)
        if lacking:
            names = lacking[1].split("/")
            followers = [after for word, after in zip(self.words, self.words[1:]) if word in names]
            value = next((f for f in followers if f.startswith("-") and f not in self._option_string_actions), "")
            if value:
                return f"; a value that begins with '-' is written {names[-1]}={value}, or as a path ./{value}"
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        if unknown != message and unknown.startswith("-") and not unknown.startswith("--") and len(unknown) > 2:
            return f"; a name or path that begins with '-' goes after all flags, behind '--': -- {unknown}"
        return ""


class LogFile(io.FileIO):
    """An output whose disk may be full: what cannot be written is left out, and the gap is told in its place."""

    lost = 0

    def write(self, data) -> int:
        """Write bytes; never fails but for a reader that has gone."""
        try:
            if self.lost:
                super().write(f"[{self.lost} bytes of output could not be written here]\n".encode())
                self.lost = 0
            written = super().write(data)
        except BrokenPipeError:
            raise
        except OSError:
            self.lost += len(data)
            return len(data)
        return written


def outlast_full_disks():
    """Let a log that stdout or stderr is redirected to end no run if its disk is full."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            log = io.BufferedWriter(LogFile(stream.fileno(), "wb", closefd=False))
            encoding, line_buffering = stream.encoding, stream.line_buffering
            stream.flush()
            setattr(sys, name, io.TextIOWrapper(log, encoding, stream.errors, line_buffering=line_buffering))


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
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            with explained():
                return main(argv) or 0
        finally:  # --help, which ends by SystemExit, too
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer goes nowhere
        return 128 + 13
    except UsageError as error:
        return complain(error, argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def complain(error: UsageError, argv) -> int:
    """Print an error in one line, after its traceback if --traceback is an argument; returns its exit status.

    Of several processes that have the error one prints it, with its name in front unless it is the main one.
    """
    main = os.environ.get("RANK", "0") == "0"
    if isinstance(error, SharedError):
        prints = main
    else:
        prints = error.of_one_process or os.environ.get("LOCAL_RANK", "0") == "0"
    if prints and "--traceback" in argv:
        traceback.print_exception(error)
    if prints:
        print(f"{'' if main else rank_prefix()}{error}", file=sys.stderr)
    return error.status


def need(who: str, *packages: str):
    """UsageError if one of the packages that not every installation has is missing; ``who`` needs them."""
    missing = [name.replace("_", "-") for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"{who}: needs {', '.join(missing)}: pip install {' '.join(missing)}")


def check_not_read(flag: str, path, read):
    """UsageError if the file ``path`` that a flag names to write is one of those ``read``, which would be lost."""
    if path and os.path.realpath(path) in {os.path.realpath(other) for other in read if other}:
        raise UsageError(f"{flag}: '{path}' is read by this command and would be lost; give another name")


def existing_file(path: str, flag: str) -> str:
    """The path, or a UsageError that names the flag if there is no such file."""
    if fault := no_file(path):
        raise UsageError(f"{flag}: {fault}")
    return path


def existing_folder(path: str, flag: str) -> str:
    """The path, or a UsageError that names the flag if there is no such folder."""
    if fault := no_folder(path):
        raise UsageError(f"{flag}: {fault}")
    return path


def existing_recording(path: str, flag: str) -> str:
    """The path of a file or of a member of a tar file, or a UsageError that names the flag if there is none."""
    from corpus.tars import ENDING, is_member

    if os.path.isfile(path) or is_member(path):
        return path
    tar, found, member = str(path).partition(f"{ENDING}/")
    if found and os.path.isfile(tar + ENDING):
        raise UsageError(f"{flag}: '{tar}{ENDING}' has no member '{member}'")
    return existing_file(path, flag)
