"""From a command line to a checked configuration: YAML, the checkpoint to start from, paths and lists."""

import os

from config import KEYS, Config
from errors import Mistakes, UsageError
from settings import plugins
from settings.carried import adopted, contradictions, model_settings
from settings.checks import check_paths
from settings.command_line import need
from settings.reader import Setting, key_text, read_settings, resolve


def configure(argv) -> tuple[Config, dict[str, Setting], list[str], bool]:
    """Read and check everything that is needed to start.

    UsageError with all mistakes of the keys, a line each; if there are none, with all of the paths and lists.

    Returns (config, {key: Setting} of the keys somebody wrote, notes to print, print_config). The keys that change an
    embedding are those of ``initial_model``, if it carries them: one that is not written is taken from there, one that
    is written with another value is a mistake, or a note if training is to go on with it (``allow_partial``).
    """
    mistakes, notes, theirs = Mistakes(), [], {}
    written, print_config = read_settings(argv, notes, mistakes)
    with mistakes.collected():
        theirs = _settings_of_initial_model(written)
    taken = adopted(written, theirs) if theirs else {}
    written.update(taken)
    notes.extend(_describe(taken, written))
    config = resolve(written, notes, mistakes)
    _compare(config, written, theirs, notes, mistakes)
    if config.tracker:
        with mistakes.collected():
            need("tracker", config.tracker)
    if config.vad == "silero":
        with mistakes.collected():
            need("vad: silero", "silero_vad")
    mistakes.refuse()  # before paths and lists, which take time and may be missing because of a misspelt key
    check_paths(config, written)
    if not config.eval:
        _settle_teacher(config, written, notes)
    return config, written, notes, print_config


def _settings_of_initial_model(written: dict[str, Setting]) -> dict[str, Setting]:
    """The keys of the checkpoint to start from that change an embedding; {} without one, or if it carries none."""
    path = str(written["initial_model"].value or "") if "initial_model" in written else ""
    if not os.path.isfile(path):
        return {}
    from storage import checkpoint

    return model_settings(checkpoint.load(path), path)


def _describe(taken: dict[str, Setting], written: dict[str, Setting]) -> list[str]:
    """A line on the keys taken from a checkpoint that have another value there than by default."""
    if not taken:
        return []
    model = plugins.declaration("models", str(written["model"].value))
    defaults = {**(model.keys if model else {}), **{name: key.default for name, key in KEYS.items()}}
    values = {name: list(v) if isinstance(v, tuple) else v for name, v in defaults.items()}
    differing = [f"{name}: {setting.value}" for name, setting in taken.items() if values.get(name) != setting.value]
    where = next(iter(taken.values())).where
    return [f"taken from {where}: {', '.join(differing)}"] if differing else []


def _compare(config: Config, written, theirs, notes: list, mistakes: Mistakes):
    """Add what somebody wrote against the checkpoint to the mistakes, or to the notes."""
    if not theirs:
        return
    for name, line in contradictions(config, written, theirs).items():
        if any(known.startswith(key_text(written[name], name)) for known in mistakes.lines):
            continue  # what was written is no value of the key
        if config.eval:
            mistakes.add(line)
        elif config.allow_partial:
            notes.append(f"{line.partition('; ')[0]} (allow_partial)")
        else:
            mistakes.add(f"{line}, or give --allow_partial to train on with {getattr(config, name)}")


def _settle_teacher(config: Config, written: dict[str, Setting], notes: list):
    """Read the teacher, so that its model is known and one that cannot be this run's is a mistake now."""
    if config.teacher_checkpoint:
        from training.teacher import read_teacher

        try:
            config.teacher_model = read_teacher(config).config.model
        except UsageError as error:
            raise UsageError("\n".join(_at_its_place(line, written) for line in str(error).splitlines())) from error
        return
    for name in ("distillation_type", "distillation_alpha", "distillation_temperature"):
        if name in written:
            notes.append(f"{key_text(written[name], name)} is set, but there is no teacher (teacher_checkpoint)")


def _at_its_place(line: str, written: dict[str, Setting]) -> str:
    """A line that begins with a key, with the place where the key is written."""
    name, colon, text = line.partition(": ")
    return f"{key_text(written[name], name)}{colon}{text}" if name in written else line
