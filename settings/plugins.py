"""Find plug-ins by file name, read what they declare without importing them, and call them with the keys they take."""

import contextlib
import copy
import importlib
import importlib.metadata
import inspect
import re
import sys
import traceback
from pathlib import Path

from errors import ROOT, UsageError, first_line
from settings.declarations import UNKNOWN, Declaration, Source, declaration_in, parse

__all__ = ["UNKNOWN", "Declaration", "declaration", "parse"]

# What a plug-in file of each folder must define, and the configuration key that chooses it.
ENTRY = {
    "models": "MainModel",
    "loss": "LossFunction",
    "optimizer": "Optimizer",
    "scheduler": "Scheduler",
    "frontend": "FrontEnd",
    "augmentation": "Augmentation",  # chosen by the entries of the key of this name
}
CHOSEN_BY = {
    "models": "model",
    "frontend": "frontend",
    "loss": "trainfunc",
    "optimizer": "optimizer",
    "scheduler": "scheduler",
}
# Tried one by one; the packages' own metadata allow pairs that do not load.
PAIRS = (
    "These pairs load: torchaudio X.Y with torch X.Y up to 2.10, torchaudio 2.11.0 with torch 2.11 to 2.14, torchaudio "
    "2.11.1 with torch 2.14.1 and later; both built for the CPU alone, or both for the same CUDA"
)


def available(folder: str) -> list[str]:
    """List the plug-in names of a folder: the files that define its entry point."""
    names = []
    for path in sorted((ROOT / folder).glob("*.py")):
        with contextlib.suppress(UsageError):  # a broken file is complained of when it is chosen
            if path.stem.isidentifier() and ENTRY[folder] in Source(path, ROOT).names:
                names.append(path.stem)
    return names


def all_keys() -> set[str]:
    """The keyword arguments of every plug-in on disk."""
    return {key for folder in CHOSEN_BY for name in available(folder) for key in known_declaration(folder, name).keys}


def declaration(folder: str, name: str) -> Declaration | None:
    """Read the declaration of a plug-in from its source; None if there is no such plug-in file."""
    path = ROOT / folder / f"{name}.py"
    if not name.isidentifier() or not path.is_file():
        return None
    return declaration_in(path, ENTRY[folder], ROOT, leading=int(folder in ("optimizer", "scheduler")))


def known_declaration(folder: str, name: str) -> Declaration:
    """Read the declaration of a plug-in that was found before; UsageError if its file has gone."""
    found = declaration(folder, name)
    if found is None:
        raise UsageError(f"no plug-in '{folder}/{name}.py'")
    return found


def load(folder: str, name: str):
    """Import a plug-in and return its entry point."""
    return getattr(importlib.import_module(f"{folder}.{name}"), ENTRY[folder])


def build(folder: str, name: str, values: dict, *leading):
    """Import and call a plug-in; what it refuses (a wrong value, a fault of its file) becomes a UsageError."""
    plugin = f"{folder}/{name}.py"
    with explained(plugin), torchaudio_explained(plugin):
        return call(load(folder, name), values, *leading)


@contextlib.contextmanager
def explained(plugin: str = ""):
    """Turn an exception that came through a plug-in file into a UsageError of one line with the place in that file.

    Others pass, or are laid to ``plugin`` if that is given: it is being made, and a ValueError, of its own or of what
    it is made of, refuses a value in its own words.
    """
    try:
        yield
    except UsageError:
        raise
    except SystemExit as error:  # of a plug-in; the commands' own end them after --help
        if not (place(error) or plugin):
            raise
        raise UsageError(
            f"{place(error) or plugin}: ends the program ({error.code or 0}); raise an exception"
        ) from error
    except Exception as error:  # a plug-in may raise anything
        if not (place(error) or plugin or of_device(error)):
            raise
        if plugin and isinstance(error, ValueError):
            raise UsageError(f"{plugin}: {error} ({place(error) or plugin}; --traceback shows all of it)") from error
        raise UsageError(f"{in_one_line(error, plugin)}; --traceback shows all of it") from error


def place(error: BaseException) -> str:
    """The innermost line of a plug-in file that an exception came through: 'models/Wrong.py:7', '' if there is none."""
    lines = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    for path, line in reversed(lines):
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ENTRY:
            return f"{path.relative_to(ROOT).as_posix()}:{line}"
    return ""


def in_one_line(error: BaseException, plugin: str = "") -> str:
    """An exception with its place in a plug-in, or else the ``plugin``, its type and the first line of its message."""
    said = str(error).strip().splitlines()[:1]
    said = [text.partition(". GPU ")[0] for text in said]  # what torch tells of a GPU's memory fills four lines
    parts = [place(error) or plugin, type(error).__name__, *said]
    return ": ".join(part for part in parts if part).rstrip(".") + advice(error)


NO_MEMORY = r"out of memory|can't allocate memory|not enough memory"  # of a GPU, of Linux, of Windows
DEVICE_ERROR = r"CUDA error: |device-side assert"


def of_device(error: BaseException) -> bool:
    """Whether an exception is of a device or its memory: torch raises it wherever that is noticed."""
    return isinstance(error, RuntimeError) and bool(re.search(f"{NO_MEMORY}|{DEVICE_ERROR}", str(error)))


# What to do about the usual mistakes, by what is said of them.
ADVICE = {
    r"Found no NVIDIA driver|not compiled with CUDA": "take the device of the input, x.device, in the place of .cuda()",
    r"on the same device": "keep tensors by register_buffer, or take the device of the input, x.device",
    r"before Module\.__init__\(\) call": "call super().__init__() first",
    r"a leaf Variable that requires grad": "change weights under torch.no_grad() only",
    r"same dtype|scalar type (Float|Double)": "make float32 of what numpy or a list gave: .float()",
    NO_MEMORY: "a smaller batch_size with gradient_accumulation_steps needs less, and so do mixedprec: true, "
    "gradient_checkpointing: true and fewer max_frames",
    DEVICE_ERROR: "an earlier operation may be the cause, as an index beyond a table: with CUDA_LAUNCH_BLOCKING=1 "
    "before the command this names its line",
}


def advice(error: BaseException) -> str:
    """What to do about an exception of a plug-in, ' - ..'; '' if that is not known."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return f" - bring {error.name.replace('.', '/')}.py too" if package in ENTRY else f" - pip install {package}"
    if isinstance(error, FileNotFoundError):
        return " - a relative path begins at the current folder, Path(__file__).parent is the plug-in's"
    return next((f" - {text}" for words, text in ADVICE.items() if re.search(words, str(error))), "")


@contextlib.contextmanager
def torchaudio_explained(plugin: str):
    """Turn the failed import of torchaudio in a plug-in into a UsageError that says which pairs go together."""
    try:
        yield
    except (ImportError, OSError, RuntimeError) as error:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torchaudio"
        broken = "torchaudio" not in sys.modules and any(name.split(".")[0] == "torchaudio" for name in frames)
        if not missing and not broken:
            raise
        torch = f"torch {importlib.metadata.version('torch')}"
        if missing:
            raise UsageError(f"{plugin}: imports torchaudio, which is not installed beside {torch}. {PAIRS}") from error
        pair = f"torchaudio {importlib.metadata.version('torchaudio')} does not load beside {torch}"
        raise UsageError(f"{plugin}: {pair} ({first_line(error)}). {PAIRS}") from error


def call(entry, values: dict, *leading):
    """Call a plug-in with the keys its signature names, or with all of them if it takes ``**kwargs``.

    Lists are copies: a plug-in may change what it is given, and the configuration goes into checkpoints.
    """
    values = {name: copy.copy(value) if isinstance(value, (list, dict)) else value for name, value in values.items()}
    parameters = inspect.signature(entry).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    taken, names = names[: len(leading)], names[len(leading) :]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):  # but for a key named like a leading argument, as 'optimizer'
        return entry(*leading, **{name: value for name, value in values.items() if name not in taken})
    return entry(*leading, **{name: values[name] for name in names if name in values})


def defined(folder: str, name: str) -> list[str]:
    """The names of the classes and functions of a plug-in file; [] if there is no such file."""
    path = ROOT / folder / f"{name}.py"
    return Source(path, ROOT).defined() if name.isidentifier() and path.is_file() else []
