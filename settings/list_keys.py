"""The keys that name lists: a path, several train lists, or several trial lists by name."""

import json
import math
import os
import re
from typing import Any

import yaml

from errors import UsageError
from settings import plain_yaml

FIELDS = {"train_list": ("list", "root", "weight", "prefix", "pack"), "test_list": ("list", "root")}
MOST_LISTS = 255
NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,39}")


def list_text(key: str, value, place: str):
    """The text by which a configuration holds a value of ``train_list`` or ``test_list``: a path, or entries as JSON.

    ``value`` as YAML or the command line gives it. UsageError that names the ``place`` and the entry.
    """
    if isinstance(value, str) and value.strip()[:1] in ("[", "{") and not os.path.exists(value):
        try:
            value = plain_yaml.load(value)
        except (yaml.YAMLError, ValueError) as error:
            why = getattr(error, "problem", None)
            text = f"{place}: neither a path nor a list of lists in YAML: '{value[:80]}'"
            raise UsageError(f"{text}: {why}" if why else text) from error
    if not isinstance(value, (list, dict)):
        return value
    wanted = list if key == "train_list" else dict
    if not isinstance(value, wanted) or not value:
        form = "[a.txt, {list: b.txt, root: B}]" if key == "train_list" else "{O: a.txt, E: {list: b.txt, root: B}}"
        raise UsageError(f"{place}: expected a path, or lists as {form}; got '{value}'")
    if len(value) > MOST_LISTS:
        raise UsageError(f"{place}: {len(value)} lists, more than {MOST_LISTS}")
    if isinstance(value, list):
        return _text([_entry(key, entry, f"{place}: list {i}") for i, entry in enumerate(value, 1)])
    _check_names(value, place)
    return _text({str(name): _entry(key, entry, f"{place}: list '{name}'") for name, entry in value.items()})


def _check_names(names, place: str):
    """Refuse names that are none, and those that would share their files."""
    known: dict[str, Any] = {}
    for name in names:
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise UsageError(f"{place}: YAML reads the name of a list as '{name}'; put it into quotes")
        if not NAME.fullmatch(str(name)):
            raise UsageError(f"{place}: '{name}' is no name of a list: letters, digits and ._+- are, up to 40")
        same = known.setdefault(str(name).casefold(), name)
        if same is not name:
            raise UsageError(f"{place}: '{same}' and '{name}' name two lists, but their files the same; rename one")


def _text(entries) -> str:
    return json.dumps(entries, ensure_ascii=False)


def _entry(key: str, entry, place: str) -> dict:
    """An entry as a dict whose values have been checked."""
    entry = entry if isinstance(entry, dict) else {"list": entry}
    for name in entry:
        if name not in FIELDS[key]:
            raise UsageError(f"{place}: unknown '{name}'; an entry has {', '.join(FIELDS[key])}")
    found: dict[str, Any] = {}
    for name, value in entry.items():
        if name == "weight":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                got = f"the text '{value}'" if isinstance(value, str) else f"'{value}'"
                raise UsageError(f"{place}: weight must be a number above 0, as 0.5 or 1.0e+6; got {got}")
            found[name] = value
        elif isinstance(value, (list, dict)) or value in (None, ""):
            raise UsageError(f"{place}: {name} must be a text, got '{value}'")
        else:
            found[name] = str(value)
    if "list" not in found:
        raise UsageError(f"{place}: has no 'list'")
    return found
