"""The post-mortem of NaN dumps: ``load_dump`` for notebooks, ``analyze_nan_debug.py`` for the command line."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from postmortem.loaded import LoadedDump


def load_dump(path, trust_changed_code: bool = False) -> "LoadedDump":
    """Open a dump to look at its rows, replay its step and try changes; nothing is run until it is asked for.

    ``trust_changed_code`` replays with code that has changed since. DumpError if the file is no dump.
    """
    from postmortem.loaded import LoadedDump  # torch is loaded only when a dump is

    return LoadedDump(path, trust_changed_code)
