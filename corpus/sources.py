"""Which lists a configuration names: one, several with roots and weights of their own, or several by name."""

import json
import os
from dataclasses import dataclass

from config import Config


@dataclass(frozen=True)
class TrainSource:
    """A train list: its ``path``, the ``root`` of its files, how often its rows come, a prefix of its speakers.

    ``pack``: the folder of a pack that has its files, "" if they are read themselves.
    """

    path: str
    root: str
    weight: float = 1.0
    prefix: str = ""
    pack: str = ""


@dataclass(frozen=True)
class TrialSource:
    """A trial list: its ``name``, its ``path``, the ``root`` of its files."""

    name: str
    path: str
    root: str


def entries_of(value: str):
    """The list or mapping of entries that a value of ``train_list`` or ``test_list`` holds as JSON; None for a path."""
    return json.loads(value) if value[:1] in ("[", "{") and not os.path.exists(value) else None


def train_sources(config: Config) -> tuple[TrainSource, ...]:
    """The train lists of a configuration, in the order in which they are given."""
    entries = entries_of(config.train_list)
    if entries is None:
        return (TrainSource(config.train_list, config.train_path, pack=config.train_pack),)
    found = []
    for e in entries:
        weight, pack = float(e.get("weight", 1.0)), e.get("pack", "" if "root" in e else config.train_pack)
        found.append(TrainSource(e["list"], e.get("root", config.train_path), weight, e.get("prefix", ""), pack))
    return tuple(found)


def trial_sources(config: Config) -> tuple[TrialSource, ...]:
    """The trial lists of a configuration; the first decides which model is the best."""
    entries = entries_of(config.test_list)
    if entries is None:
        return (TrialSource("", config.test_list, config.test_path),)
    found = [TrialSource(name, e["list"], e.get("root", config.test_path)) for name, e in entries.items()]
    return tuple(sorted(found, key=lambda source: source.name != (config.best_list or found[0].name)))


def shown(value: str) -> str:
    """A value of ``train_list`` or ``test_list`` in a sentence: the paths of its lists."""
    entries = entries_of(value)
    if entries is None:
        return f"'{value}'"
    return ", ".join(f"'{entry['list']}'" for entry in (entries.values() if isinstance(entries, dict) else entries))
