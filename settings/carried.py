"""The keys that a checkpoint carries with it: which of them hold, and which contradict what somebody wrote."""

from config import KEYS, Config
from settings import plugins
from settings.reader import Setting, key_text

LATER = ("sample_rate", "frontend")  # keys that a checkpoint may be older than: it has their default


def model_settings(state: dict, path) -> dict[str, Setting]:
    """The keys {name: Setting} of a checkpoint's own configuration that change an embedding; {} if it carries none."""
    carried = state.get("config")
    if not isinstance(carried, dict) or not isinstance(carried.get("model"), str):
        return {}
    model = plugins.declaration("models", carried["model"])
    names = {"model", "sample_rate"} | set(model.keys if model else ()) | set(keys_of_front_end(carried, model))
    names -= keys_of_training(carried, model)
    carried = {name: KEYS[name].default for name in LATER} | carried
    return {name: Setting(value, str(path)) for name, value in carried.items() if name in names}


def keys_of_front_end(values: dict, model: plugins.Declaration | None) -> dict:
    """The keys {name: default} of the front end in use; {} without one, and of a model that takes none."""
    found = _front_end(values, model)
    return found.keys if found is not None else {}


def keys_of_training(values: dict, model: plugins.Declaration | None) -> set[str]:
    """The keys of a model and its front end that change nothing of an embedding but what the weights learn.

    A plug-in's class lists its own as ``training_keys``.
    """
    declared = [found.constants.get("training_keys", ()) for found in (model, _front_end(values, model)) if found]
    return {"spec_augment"}.union(*declared)


def _front_end(values: dict, model: plugins.Declaration | None) -> plugins.Declaration | None:
    found = plugins.declaration("frontend", str(values.get("frontend") or ""))
    return found if model is not None and "frontend" in model.keys else None


def adopted(written: dict[str, Setting], theirs: dict[str, Setting]) -> dict[str, Setting]:
    """Those of a checkpoint's keys that nobody wrote; none if another model was written."""
    if not theirs or written.get("model", theirs["model"]).value != theirs["model"].value:
        return {}
    return {name: setting for name, setting in theirs.items() if name not in written}


def contradictions(resolved: Config, written: dict[str, Setting], theirs: dict[str, Setting]) -> dict[str, str]:
    """{key: line} on keys that somebody wrote with another value than the checkpoint has, whose keys are ``theirs``.

    Of another model, the model alone.
    """
    lines = {}
    for name, setting in theirs.items():
        own = written.get(name, setting)
        value, trained = getattr(resolved, name, setting.value), setting.value
        if own is not setting and value != (list(trained) if isinstance(trained, tuple) else trained):
            place, before = key_text(own, name), "none" if trained in ("", None, [], ()) else trained
            lines[name] = f"{place}: {value}, but {setting.where} was trained with {before}; leave {name} out"
    return {"model": lines["model"]} if "model" in lines else lines
