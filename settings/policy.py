"""The key ``augmentation``: a list of plug-ins of augmentation/ with their keys, checked against their declarations."""

import math

import yaml

from errors import Mistakes, UsageError, suggested
from settings import plain_yaml, plugins

FOLDER, ONE_OF = "augmentation", "one_of"
EXAMPLE = "[{noise: {p: 0.4, snr: [0, 15]}}, {telephone: {p: 0.1}}]"


def checked(value, place: str, lines: tuple[int, ...] = ()) -> list[dict]:
    """Check a policy and write each entry as {name: {key: value}}; UsageError with all mistakes, a line each.

    ``place`` names the key as the user wrote it, "x.yaml:3: augmentation"; ``lines`` are those of its entries.
    """
    if isinstance(value, str):
        value = _read(value, place)
    if value in (None, ""):
        return []
    if not isinstance(value, list):
        raise UsageError(f"{place}: expected a list, as {EXAMPLE}; got '{value}'")
    mistakes, entries = Mistakes(), []
    for number, entry in enumerate(value):
        with mistakes.collected():
            entries.append(_entry(entry, place_of(place, lines, number)))
    mistakes.refuse()
    return entries


def _read(text: str, place: str):
    try:
        return plain_yaml.load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UsageError(f"{place}: expected a list, as '{EXAMPLE}'; got '{text}'") from error


def place_of(place: str, lines: tuple[int, ...], number: int) -> str:
    """'x.yaml:5: augmentation' for an entry that stands in line 5."""
    if number >= len(lines):
        return place
    file, _, rest = place.partition(": ")
    return f"{file.rpartition(':')[0]}:{lines[number]}: {rest}"


def _entry(entry, place: str) -> dict:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UsageError(f"{place}: expected one plug-in with its keys, as {{noise: {{p: 0.4}}}}; got '{entry}'")
    ((name, keys),) = entry.items()
    keys = {} if keys is None else keys
    if not isinstance(keys, dict):
        form = "{of: [noise, music]}" if name == ONE_OF else "{p: 0.4}"
        raise UsageError(f"{place}: {name}: expected its keys, as {{{name}: {form}}}; got '{keys}'")
    if name == ONE_OF:
        return {ONE_OF: _one_of(keys, place)}
    declared = plugins.declaration(FOLDER, name) if isinstance(name, str) else None
    if declared is None and isinstance(name, str) and plugins.defined(FOLDER, name):
        there = ", ".join(plugins.defined(FOLDER, name))
        raise UsageError(
            f"{place}: the plug-in file 'augmentation/{name}.py' does not define Augmentation, but {there}"
        )
    if declared is None:
        known = [ONE_OF, *plugins.available(FOLDER)]
        raise UsageError(f"{place}: no plug-in 'augmentation/{name}.py'{suggested(str(name), known)}")
    own = [key for key in declared.keys if key != "sample_rate"]  # which is a key of the run
    for key in keys:
        if key != "p" and key not in own:
            known = ["p", *own]
            raise UsageError(f"{place}: {name}: unknown key '{key}'{suggested(str(key), known)}")
    values = {key: _value(value, declared.keys.get(key), f"{place}: {name}: {key}") for key, value in keys.items()}
    missing = [key for key in declared.required if key not in keys]
    if missing:
        raise UsageError(f"{place}: {name}: needs a value for '{missing[0]}'")
    return {name: values}


def _one_of(keys: dict, place: str) -> dict:
    unknown = next((key for key in keys if key not in ("p", "of")), None)
    if unknown is not None or not isinstance(keys.get("of"), list) or not keys["of"]:
        got = f"unknown key '{unknown}'" if unknown is not None else "no list 'of'"
        raise UsageError(f"{place}: {ONE_OF}: expected {{p: 0.8, of: [noise, reverb]}}; {got}")
    share = {"p": _value(keys["p"], None, f"{place}: {ONE_OF}: p")} if "p" in keys else {}
    return {**share, "of": [_entry(entry, place) for entry in keys["of"]]}


def _value(value, default, place: str):
    """Check a value against the type of the plug-in's default; ``p`` is a share. A range may be a single number."""
    if place.endswith(": p"):
        if not _is_number(value) or not 0 <= value <= 1:
            got = f"the text '{value}'" if isinstance(value, str) else f"'{value}'"
            raise UsageError(f"{place}: expected a share from 0 to 1, got {got}")
        return value
    if isinstance(default, (tuple, list)):
        pair = [value, value] if _is_number(value) else value
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_number, pair)) or pair[0] > pair[1]:
            raise UsageError(f"{place}: expected a range as {list(default)}, the lower end first; got '{value}'")
        if not all(map(math.isfinite, pair)):
            raise UsageError(f"{place}: expected finite numbers, got '{value}'")
        return pair
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{place}: expected a finite number, got '{value}'")
    kinds = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.get(type(default))
    if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
        raise UsageError(f"{place}: expected a value as {default}, got '{value}'")
    return value


def _is_number(value) -> bool:
    if isinstance(value, int):  # one beyond the range of floats is of no use
        return not isinstance(value, bool) and abs(value) < 1 << 63
    return isinstance(value, float)
