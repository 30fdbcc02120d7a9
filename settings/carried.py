"""The keys that a checkpoint carries with it: which of them hold, and which contradict what somebody wrote."""

from config import KEYS, Config
from settings import plugins
from settings.reader import Setting, key_text

DRAWN_IN_TRAINING_ONLY = ("spec_augment",)  # keys of a model that change nothing of it but what it learns
LATER = ("sample_rate", "frontend")  # keys that a checkpoint may be older than: it has their default


def model_settings(state: dict, path) -> dict[str, Setting]:
    """The keys {name: Setting} of a checkpoint's own configuration that change an embedding; {} if it carries none."""
    carried = state.get("config")
    if not isinstance(carried, dict) or not isinstance(carried.get("model"), str):
        return {}
    model = plugins.declaration("models", carried["model"])
    names = {"model", "sample_rate"} | set(model.keys if model else ()) | set(keys_of_front_end(carried, model))
    carried = {name: KEYS[name].default for name in LATER} | carried
    return {n: Setting(v, str(path)) for n, v in carried.items() if n in names - set(DRAWN_IN_TRAINING_ONLY)}


def keys_of_front_end(values: dict, model: plugins.Declaration | None) -> dict:
    """The keys {name: default} of the front end in use; {} without one, and of a model that takes none."""
    found = plugins.declaration("frontend", str(values.get("frontend") or ""))
    return found.keys if found is not None and model is not None and "frontend" in model.keys else {}


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
            place = key_text(own, name)
            lines[name] = (
                f"{place}: {value}, but {setting.where} was trained with {trained or 'none'}; leave {name} out"
            )
    return {"model": lines["model"]} if "model" in lines else lines
