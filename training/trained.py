"""A trained model from its checkpoint: the keys it is built with, and its network with all of its weights."""

import contextlib

from config import ALIASES, KEYS, Config
from errors import UsageError
from settings import plugins
from settings.carried import adopted, contradictions, keys_of_front_end, model_settings
from settings.reader import Setting, read_yaml, resolve

# Keys of a training run that a model is built and used without.
NOT_OF_THE_MODEL = (
    *("trainfunc", "optimizer", "scheduler", "initial_model", "eval", "config", "run_info"),
    *("teacher_checkpoint", "teacher_model", "teacher_config"),
)


def network_of(state: dict, path, config: Config, build):
    """The network of a checkpoint on the CPU; ``config.nOut`` becomes that of another toolkit's checkpoint.

    ``build(values)`` makes a network without its weights: SpeakerNet. UsageError if not all of them fit.
    """
    from storage import checkpoint

    network = build(config.values())
    size = checkpoint.embedding_size(state, path, network, config.nOut)
    if size != config.nOut and checkpoint.toolkit_of(state):
        config.nOut = size
        network = build(config.values())
    checkpoint.load_model_exactly(network, state, path, config.model)
    return network


def configuration_of(state: dict, path, config: str, build, key: str = "--config") -> Config:
    """The keys to build the model with: those that the checkpoint carries, else those of the YAML file.

    ``build`` as for ``network_of``; ``key`` is what the user calls the YAML file. UsageError if it contradicts the
    checkpoint.
    """
    from storage import checkpoint

    theirs = model_settings(state, path)
    if config:
        written = {ALIASES.get(name, name): setting for name, setting in read_yaml(config).items()}
        written.update(adopted(written, theirs))
    elif isinstance(state.get("config"), dict):
        written = {str(name): Setting(value, str(path)) for name, value in state["config"].items()}
    else:
        raise UsageError(f"{path}: {advice(state, path, checkpoint.toolkit_of(state), build, key)}")
    where = config or str(path)
    written = {name: setting for name, setting in written.items() if name not in NOT_OF_THE_MODEL}
    if "model" not in written:
        raise UsageError(f"{where}: names no model")
    model = plugins.declaration("models", str(written["model"].value))
    chosen = {"frontend": written["frontend"].value} if "frontend" in written else {}
    elsewhere = plugins.all_keys() - set(model.keys if model else ()) - set(keys_of_front_end(chosen, model))
    written = {name: setting for name, setting in written.items() if name in KEYS or name not in elsewhere}
    written["eval"] = Setting(True, where)
    if not config:  # of plug-ins that were dropped in then and are not here
        written["allow_unknown"] = Setting(True, where)
    resolved = resolve(written, [])
    wrong = contradictions(resolved, written, theirs)
    if wrong:
        raise UsageError("\n".join(wrong.values()))
    return resolved


def advice(state: dict, path, toolkit, build, key: str) -> str:
    """What to do about a checkpoint of ``toolkit`` (None: unknown) that carries no configuration."""
    if toolkit is None:
        return f"carries no configuration; give {key}, the YAML file that it was trained with"
    if toolkit.part:
        return f"is a {toolkit.name}, which embeds no speakers; train a model on it with frontend: ssl (docs/models.md)"
    fitting = []
    for file in sorted((plugins.ROOT / "configs" / "interop").glob("*.yaml")):
        with contextlib.suppress(UsageError):  # does not fit
            if file.name.startswith(toolkit.features or ""):  # RawNet3 computes none of the features
                network_of(state, path, configuration_of(state, path, str(file), build), build)
                fitting.append(f"configs/interop/{file.name}")
    return (
        f"is a checkpoint of {toolkit.name} and carries no configuration; give {key} "
        f"{' or '.join(fitting) or 'with its sizes, as the files of configs/interop do'}"
    )
