"""Which evaluations may be compared: the best EER and patience belong to a protocol."""

import contextlib
from pathlib import Path
from types import SimpleNamespace

from config import Config
from corpus.lists import trials_hash
from errors import UsageError
from settings.reader import read_yaml

LIST = "test_list_sha256"


def protocol_of(config: Config) -> dict:
    """What an EER of this configuration depends on beside the weights: trials, crops and score, {name: value}."""
    return {LIST: trials_hash(config), **_keys(config)}


def _keys(config: Config | SimpleNamespace) -> dict:
    names = ["eval_frames", "score_mode", "channel", "vad", "max_test_pairs"]
    names.append("num_eval" if config.eval_frames else "embed_window_seconds")
    names += ["seed"] if config.max_test_pairs else []  # draws the trials
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def list_before(result: Path) -> str:
    """The hash of the trial list that a run used before, by the config.yaml in ``result``; "" if it does not tell."""
    with contextlib.suppress(UsageError, KeyError, TypeError):  # a run that was not told to write it, or by hand
        return str(read_yaml(str(result / "config.yaml"))["run_info"].value["sha256"]["test_list"])
    return ""


def differences(own: dict, state: dict, listed: str) -> list[str]:
    """Keys in which ``own`` differs from the protocol of a full state; of what an older one does not tell, none.

    ``listed``: what ``list_before`` says of the list that an older state used.
    """
    before = state.get("protocol")
    if not isinstance(before, dict):
        before = _keys(SimpleNamespace(**{"eval_frames": 0, "max_test_pairs": 0, **state["config"]}))
        before |= {LIST: listed} if listed else {}
    differing = [name for name in {**own, **before} if name in own and name in before and own[name] != before[name]]
    return ["test_list" if name == LIST else name for name in differing]
