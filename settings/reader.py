"""Read YAML and the command line into a checked Config.

Precedence: command line > YAML > default. The parser, the validation, --help, --print_config and
docs/configuration.md are all made from KEYS.
"""

import argparse
import math
from dataclasses import dataclass
from typing import Any

import yaml

from config import ALIASES, KEYS, MODEL_KEYS, REFUSED, Config, Key
from corpus.sources import entries_of
from errors import Mistakes, UsageError, path_hint, suggested
from settings import plain_yaml, plugins, policy
from settings.command_line import TRACEBACK
from settings.foreign import refuse_foreign
from settings.list_keys import FIELDS, list_text
from settings.plain_yaml import MOST_CHARACTERS, PlainLoader

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}


@dataclass(frozen=True)
class Setting:
    """A value as somebody wrote it, and where."""

    value: Any
    where: str  # "configs/x.yaml:14" or "command line"
    lines: tuple[int, ...] = ()  # of the elements of a list in a file

    @property
    def from_command_line(self):
        return self.where == "command line"


def key_text(setting: Setting, name: str) -> str:
    """Name a key the way the user wrote it, with its place."""
    return f"command line: --{name}" if setting.from_command_line else f"{setting.where}: {name}"


def coerce(key: Key, setting: Setting):
    """Convert a written value to the key's type and check its range; UsageError names place, key and value."""
    place = key_text(setting, key.name)
    if key.name == "augmentation":
        return policy.checked(setting.value, place, setting.lines)
    value = list_text(key.name, setting.value, place) if key.name in FIELDS else setting.value
    value = to_type(key.type, value, place)
    if key.switch and str(value).lower() in TRUE + FALSE:
        value = key.switch[str(value).lower() in TRUE]
    if key.choices and value not in key.choices:
        raise UsageError(f"{place}: must be one of {', '.join(map(str, key.choices))}; got '{value}'")
    if key.low is not None and value < key.low:
        raise UsageError(f"{place}: must be at least {key.low}, got {value}")
    if key.above is not None and value <= key.above:
        raise UsageError(f"{place}: must be above {key.above}, got {value}")
    if key.high is not None and value > key.high:
        raise UsageError(f"{place}: must be at most {key.high}, got {value}")
    if key.multiple > 1 and value % key.multiple:
        raise UsageError(f"{place}: must be a multiple of {key.multiple}, got {value}")
    return value


def to_type(kind, value, place: str):
    """Convert to ``kind``; YAML's '5e-5', '\"8888\"' and an empty text value are understood."""
    wrong = UsageError(f"{place}: expected {TYPE_NAMES.get(kind, kind)}, got '{value}'")
    if kind is str:
        if value is None:
            return ""
        if isinstance(value, (list, dict)):
            raise wrong
        return str(value)
    if value is None or value == "":
        raise UsageError(f"{place}: has no value; expected {TYPE_NAMES[kind]}")
    if kind is bool:
        text = str(value).strip().lower()
        if isinstance(value, (list, dict, float)) or text not in TRUE + FALSE:
            raise wrong
        return text in TRUE
    if isinstance(value, (bool, list, dict)):
        raise wrong
    try:
        number = float(value)
        if kind is int:
            whole = int(value) if isinstance(value, (int, str)) and str(value).lstrip("+-").isdigit() else int(number)
            if whole != number and not isinstance(value, int):
                raise wrong
            return whole
    except (ValueError, OverflowError, TypeError):
        raise wrong from None
    if not math.isfinite(number):
        raise UsageError(f"{place}: must be a finite number, got {value}")
    return number


# ---------------------------------------------------------------------------------------------------------- YAML


def read_yaml(path: str, mistakes: Mistakes | None = None) -> dict[str, Setting]:
    """Read a flat YAML file to {key: Setting}; UsageError names the line of a fault or of a duplicate key.

    With ``mistakes`` duplicate keys are added to them, and the first of each is kept.
    """
    found = mistakes or Mistakes()
    try:
        with open(path, encoding="utf-8-sig") as f:
            loader = PlainLoader(f.read(MOST_CHARACTERS + 1))  # pairs are built one at a time: each keeps its line
    except OSError as error:
        raise UsageError(f"{path}: cannot read the configuration: {error.strerror}{path_hint(path)}") from error
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise UsageError(f"{path}: not a UTF-8 text file") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: {error}") from error
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise UsageError(f"{path}:{root.start_mark.line + 1}: expected 'key: value' lines")
        refuse_foreign(path, [str(key.value) for key, _ in root.value], [value.tag for _, value in root.value])
        settings = {}
        for key_node, value_node in root.value:
            place = f"{path}:{key_node.start_mark.line + 1}"
            name = str(loader.construct_object(key_node, deep=True))
            if name in settings:
                found.add(f"{place}: duplicate key '{name}', first given at {settings[name].where}")
            else:
                inside = value_node.value if isinstance(value_node, yaml.SequenceNode) else ()
                lines = tuple(node.start_mark.line + 1 for node in inside)
                settings[name] = Setting(loader.construct_object(value_node, deep=True), place, lines)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a scalar that looks like a date and is none
        mark = getattr(error, "problem_mark", None) or loader.get_mark()
        line = f":{mark.line + 1}" if isinstance(error, yaml.YAMLError) else ""
        raise UsageError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    if mistakes is None:
        found.refuse()
    return settings


# -------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(f"command line: {message}")


def build_parser() -> argparse.ArgumentParser:
    """Build the parser from KEYS; values stay text here and are checked by ``coerce``."""
    parser = _Parser(
        prog="trainSpeakerNet.py",
        description="Train and evaluate a speaker-verification model.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="Keys of single plug-ins (models, losses, optimizers, schedules) are listed in docs/configuration.md.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=120),
    )
    groups = {}
    for key in KEYS.values():
        group = groups.setdefault(key.group, parser.add_argument_group(key.group))
        text = key.describe().replace("%", "%%")
        if key.type is bool or key.switch:
            kind = "BOOL" if key.type is bool else key.type.__name__.upper()
            group.add_argument(f"--{key.name}", nargs="?", const="true", metavar=kind, help=text)
            group.add_argument(
                f"--no-{key.name}", dest=key.name, action="store_const", const="false", help=argparse.SUPPRESS
            )
        else:
            group.add_argument(f"--{key.name}", metavar=key.type.__name__.upper(), help=text)
    parser.add_argument("--print_config", action="store_true", help="check everything, print the configuration, stop")
    parser.add_argument("--traceback", action="store_true", help=TRACEBACK)
    return parser


def read_command_line(argv, mistakes: Mistakes) -> tuple[dict[str, Setting], bool]:
    """Read the command line to ({key: Setting}, print_config); keys the table lacks are kept for the plug-ins."""
    known, rest = build_parser().parse_known_args(argv)
    values = vars(known)
    print_config = values.pop("print_config", False)
    values.pop("traceback", None)  # read by command_line.complain
    settings = {name: Setting(value, "command line") for name, value in values.items()}
    position = 0
    while position < len(rest):
        word = rest[position]
        position += 1
        if not word.startswith("--"):
            mistakes.add(f"command line: unexpected argument '{word}'; a configuration is given by --config FILE")
            continue
        name, equals, value = word[2:].partition("=")
        if not equals:
            if position < len(rest) and not rest[position].startswith("--"):
                value = rest[position]
                position += 1
            else:
                name, value = (name[3:], "false") if name.startswith("no-") else (name, "true")
        settings[name] = Setting(_yaml_scalar(value), "command line")
    return settings, print_config


def _yaml_scalar(text: str):
    """Read a plug-in's value as YAML would, so that the command line and the file mean the same."""
    try:
        return plain_yaml.load(text)
    except (yaml.YAMLError, ValueError):
        return text


# ---------------------------------------------------------------------------------------------------- resolution


def load_config(argv) -> tuple[Config, dict[str, Setting], list[str], bool]:
    """Read, merge and check the configuration.

    Returns (config, {key: Setting} of the keys somebody wrote, notes to print, print_config); UsageError with all
    mistakes. Checks that need the lists or the audio files are those of ``settings.checks``.
    """
    mistakes, notes = Mistakes(), []
    written, print_config = read_settings(argv, notes, mistakes)
    config = resolve(written, notes, mistakes)
    mistakes.refuse()
    return config, written, notes, print_config


def read_settings(argv, notes: list, mistakes: Mistakes) -> tuple[dict[str, Setting], bool]:
    """Read the command line and the YAML file that it names: ({key: Setting}, print_config).

    Old names are replaced. What can be read in spite of a mistake is read.
    """
    command_line, print_config = read_command_line(argv, mistakes)
    written = {}
    if "config" in command_line:
        settings = read_yaml(to_type(str, command_line["config"].value, "command line: --config"), mistakes)
        settings.pop("run_info", None)  # what a run adds to result/config.yaml, so that the file can be used again
        written = _rename_aliases(settings, notes, mistakes)
    for name, setting in _rename_aliases(command_line, notes, mistakes).items():
        if name in written and name != "config" and str(written[name].value) != str(setting.value):
            old = written[name]
            notes.append(f"{name}: {setting.value} (command line) overrides {in_words(old.value)} ({old.where})")
        written[name] = setting
    for name in [name for name in written if name in REFUSED]:
        setting = written.pop(name)
        if str(setting.value).lower() not in FALSE:  # what is off is as it is here
            mistakes.add(f"{_unknown_place(setting, name)} is not supported: {REFUSED[name]}")
    return written, print_config


def resolve(written: dict[str, Setting], notes: list, mistakes: Mistakes | None = None) -> Config:
    """Check what somebody wrote and fill in the defaults of the table and of the chosen plug-ins.

    With ``mistakes`` those that are found are added to them and the keys concerned have their defaults.
    """
    found = mistakes or Mistakes()
    values = {name: key.default for name, key in KEYS.items()}
    for name, setting in written.items():
        if name in KEYS:
            with found.collected():
                values[name] = coerce(KEYS[name], setting)
    if values["augmentation"]:
        values["augment"] = values["augment"] or _augmentation_wins(written, notes)
        if "augment_prob" in written:
            notes.append(
                f"{_unknown_place(written['augment_prob'], 'augment_prob')} is not used: augmentation has its own"
            )
    if values["augment_on"] == "device" and not values["augment"]:
        notes.append(f"{key_text(written['augment_on'], 'augment_on')}: device is not used: nothing is augmented")
    _resolve_plugin_keys(values, written, notes, found)
    if mistakes is None:
        found.refuse()
    return Config(**values)


def _augmentation_wins(written: dict[str, Setting], notes: list) -> bool:
    """Whether a policy is used in spite of ``augment`` that is not true, and a note on which of the two is not."""
    if "augment" not in written:
        return True
    policy_key, switch = written["augmentation"], written["augment"]
    wins = policy_key.from_command_line and not switch.from_command_line
    off, chosen = f"{key_text(switch, 'augment')}: false", key_text(policy_key, "augmentation")
    notes.append(f"{off} is not used: {chosen} wins over it" if wins else f"{chosen} is not used: {off}")
    return wins


def _rename_aliases(settings: dict, notes: list, mistakes: Mistakes) -> dict:
    renamed = {}
    for name, setting in settings.items():
        target = ALIASES.get(name, name)
        if target != name:
            notes.append(f"{_unknown_place(setting, name)} is an old name, read as '{target}'")
        twice = target != name and target in settings
        if twice and str(settings[target].value) == str(setting.value):
            continue
        if target in renamed or twice:
            mistakes.add(f"{_unknown_place(setting, name)} and '{target}' are the same key; give it once")
            continue
        renamed[target] = setting
    return renamed


def _unknown_place(setting: Setting, name: str) -> str:
    return f"command line: '--{name}'" if setting.from_command_line else f"{setting.where}: '{name}'"


def chosen_plugin(folder: str, key: str, values: dict) -> plugins.Declaration | None:
    """Find the declaration of the plug-in that a key names, None if none is needed; UsageError if it does not exist."""
    name = values[key]
    if not name:
        if folder == "frontend" or (values["eval"] and folder != "models"):
            return None  # evaluation needs the model's weights only
        raise UsageError(f"{key}: is not set by --config FILE; choose one of {', '.join(plugins.available(folder))}")
    declared = plugins.declaration(folder, name)
    if declared is None and (plugins.ROOT / folder / f"{name}.py").is_file():
        what = f"does not define {plugins.ENTRY[folder]}, but {', '.join(plugins.defined(folder, name)) or 'nothing'}"
        if not name.isidentifier():
            what = "cannot be imported; name it with letters, digits and _"
        raise UsageError(f"{key}: the plug-in file '{folder}/{name}.py' {what}")
    if declared is None:
        raise UsageError(f"{key}: no plug-in '{folder}/{name}.py'{suggested(name, plugins.available(folder))}")
    return declared


def _chosen_plugins(values: dict, written: dict) -> tuple[dict[str, plugins.Declaration], list[str]]:
    """Declarations {folder: ..} of the plug-ins that the configuration names, and a line on each that is not found."""
    found, missing = {}, []
    for folder, key in plugins.CHOSEN_BY.items():
        try:
            declaration = chosen_plugin(folder, key, values)
        except UsageError as error:
            named = key in written and str(error).startswith(f"{key}:")
            missing.append(f"{written[key].where}: {error}" if named else str(error))
        else:
            found |= {} if declaration is None else {folder: declaration}
    return found, missing


def _resolve_plugin_keys(values: dict, written: dict, notes: list, mistakes: Mistakes):
    """Give plug-in keys their values; refuse keys that neither the table nor a chosen plug-in knows."""
    found, missing = _chosen_plugins(values, written)
    declared = {}
    for declaration in found.values():
        for name, default in declaration.keys.items():
            if name not in declared or declared[name] in (None, plugins.UNKNOWN):
                declared[name] = default
    unknown = _take_foreign_keys(values, written, declared, bool(missing), notes, mistakes)
    for line in missing:
        if not (unknown and "is not set" in line):  # a misspelt key may be why
            mistakes.add(line)
    for declaration in found.values():
        for name, default in declaration.own.items():  # what the run will use belongs into the resolved configuration
            if name not in KEYS and default is not None and default is not plugins.UNKNOWN:
                values.setdefault(name, list(default) if isinstance(default, tuple) else default)
        for name in declaration.required:
            if name not in {**values, **written} and name not in RUNTIME_KEYS:
                plugin = f"{declaration.path.parent.name}/{declaration.path.name}"
                mistakes.add(f"{plugin}: needs a value for '{name}'; set the key, or give the argument a default")
    model = found.get("models")
    mistakes.lines += _fixed_rates(values, written, found)
    if "frontend" in found and model is not None:
        notes.extend(_unused_by_front_end(values, written, model.keys))
    for name in sorted(MODEL_KEYS & set(written)):
        if name not in declared and not values["eval"] and values[name] != KEYS[name].default:
            notes.append(f"{_unknown_place(written[name], name)} is set, but none of the chosen plug-ins uses it")


def _fixed_rates(values: dict, written: dict, found: dict) -> list[str]:
    """Mistakes: plug-ins in use that know one rate only, at another one; ``found``: {folder: declaration}."""
    rate, usual, model = values["sample_rate"], KEYS["sample_rate"].default, found.get("models")
    if rate == usual or model is None:
        return []
    place = key_text(written["sample_rate"], "sample_rate") if "sample_rate" in written else "sample_rate"
    used = [model, found["frontend"]] if "frontend" in found and "frontend" in model.keys else [model]
    return [
        f"{place}: {rate}, but {plugin.path.parent.name}/{plugin.path.name} works at {usual} Hz only: its "
        f"{plugins.ENTRY[plugin.path.parent.name]} names no sample_rate; leave it out"
        for plugin in used
        if "sample_rate" not in plugin.keys
    ]


def _unused_by_front_end(values: dict, written: dict, keys: dict) -> list[str]:
    """Notes on a front end that a model of these ``keys`` does not take, or else on those of them that it replaces."""
    if "frontend" not in keys:
        own = f"models/{values['model']}.py computes features of its own"
        return (
            [f"{_unknown_place(written['frontend'], 'frontend')} is not used: {own}"] if "frontend" in written else []
        )
    defaults = {**keys, "log_input": KEYS["log_input"].default}
    replaced = [n for n in ("features", "log_input") if n in written and values.get(n) != defaults.get(n)]
    return [
        f"{_unknown_place(written[name], name)} is not used: the features are those of frontend/{values['frontend']}.py"
        for name in replaced
    ]


def _take_foreign_keys(values, written, declared: dict, any_missing: bool, notes: list, mistakes: Mistakes) -> bool:
    """Take the keys that the table lacks into ``values``; returns whether one is of no plug-in at all."""
    known = plugins.all_keys() if any_missing else declared
    replaced, unknown = _keys_of_replaced(values, written), False
    for name in [name for name in written if name not in KEYS]:
        setting = written[name]
        if name in declared:
            with mistakes.collected():
                values[name] = _plugin_value(name, setting, declared[name])
        elif any_missing and name in known:
            continue  # perhaps of the plug-in that is not found
        elif name in replaced and not setting.from_command_line:
            owner = f"the plug-in that --{replaced[name]} replaces"
            notes.append(f"{_unknown_place(setting, name)} is ignored: it belongs to {owner}")
        elif values["allow_unknown"]:
            notes.append(f"{_unknown_place(setting, name)} is unknown and ignored (allow_unknown)")
        else:
            mistakes.add(_unknown_message(name, setting, known))
            unknown = True
    return unknown


def _keys_of_replaced(values: dict, written: dict) -> dict[str, str]:
    """Keys {name: model, trainfunc, ..} that a YAML file may hold for a plug-in that the command line replaces."""
    found = {}
    for folder, key in plugins.CHOSEN_BY.items():
        if key in written and written[key].from_command_line:
            for other in plugins.available(folder):
                found |= dict.fromkeys(plugins.known_declaration(folder, other).own, key)
    return found


# Keys that the trainer works out and hands to plug-ins beside the configuration.
RUNTIME_KEYS = ("steps_per_epoch",)


def _plugin_value(name: str, setting: Setting, default):
    kind = type(default)
    if kind in (bool, int, float, str):
        return to_type(kind, setting.value, key_text(setting, name))
    if kind in (tuple, list):
        if not isinstance(setting.value, (list, tuple)) or len(setting.value) != len(default) > 0:
            wanted = f"a list of {len(default)}, as {list(default)}" if default else "a list"  # of any length
            raise UsageError(f"{key_text(setting, name)}: expected {wanted}; got '{setting.value}'")
        return list(setting.value)
    if default is None and isinstance(setting.value, str):
        try:
            return float(setting.value)  # '5e-5', which YAML reads as text
        except ValueError:
            return setting.value
    return setting.value


def table_defaults(config: Config, written: dict) -> list[str]:
    """Lines on the keys nobody wrote whose default in the table is not that of the chosen model or loss."""
    lines = []
    for folder in ("models", "frontend", "loss"):
        name = getattr(config, plugins.CHOSEN_BY[folder])
        own = plugins.known_declaration(folder, name).keys if name else {}
        differing = [
            f"{key}: {in_words(KEYS[key].default)} (its own is {in_words(default)})"
            for key, default in own.items()
            if key in KEYS and key not in written and default not in (KEYS[key].default, None, plugins.UNKNOWN)
        ]
        if differing:
            lines.append(f"{folder}/{name}.py has the table's default for {', '.join(differing)}")
    return lines


def in_words(value) -> str:
    """A value of the configuration as a YAML file has it, or that it is empty."""
    if value in ("", None):
        return "an empty value"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown_message(name: str, setting: Setting, declared) -> str:
    for folder in plugins.CHOSEN_BY:
        for other in plugins.available(folder):
            if name not in declared and name in plugins.known_declaration(folder, other).own:
                place = "command line" if setting.from_command_line else setting.where
                dashes = "--" if setting.from_command_line else ""
                return f"{place}: unknown key '{dashes}{name}' - a key of {folder}/{other}.py, which is not chosen"
    suggestion = suggested(name, [*KEYS, *declared, *ALIASES], listed=False)
    for old, new in ALIASES.items():
        suggestion = suggestion.replace(f"'{old}'", f"'{new}'")
    if setting.from_command_line:
        suggestion = suggestion.replace("mean '", "mean '--")
        return f"command line: unknown key '--{name}'{suggestion}"
    return f"{setting.where}: unknown key '{name}'{suggestion}"


class _Dumper(yaml.SafeDumper):
    """Writes a list that stands there twice out twice: aliases of lists are not read."""

    def ignore_aliases(self, data):
        return True


def to_yaml(values: dict) -> str:
    """Write a configuration as YAML that ``read_yaml`` reads back to the same values."""
    values = {name: (entries_of(value) or value) if name in FIELDS else value for name, value in values.items()}
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
