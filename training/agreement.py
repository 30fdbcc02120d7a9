"""What all processes of a run must have in common, found out before the first step."""

import contextlib
import hashlib
import platform

import torch

from config import Config
from corpus.lists import list_hash, trials_hash
from corpus.sources import trial_sources
from errors import SharedError, UsageError, rank_prefix
from settings import plugins
from settings.user_code import imported_user_code
from storage.files import sha256_of
from training.incidents import source_hashes
from training.ranks import in_one_text
from training.sharded import is_sharded
from training.slices import slices_of

# Keys that may differ between machines: what they stand for is compared itself, or changes no result.
LOCAL_KEYS = {
    *("config", "train_list", "train_path", "train_pack", "test_list", "test_path", "musan_path", "rir_path"),
    *("save_path", "initial_model", "device", "gpu_id", "distributed", "port", "threads", "nDataLoaderThread"),
    *("prefetch_factor", "persistent_workers", "pin_memory", "loader_timeout", "process_timeout", "nan_max_dumps"),
    *("nan_max_gb", "augment_cache", "teacher_checkpoint", "teacher_config"),
}


@contextlib.contextmanager
def failing_together(ranks):
    """Let a block without collectives fail on all ranks if it fails on one, and say which and why."""
    failure = None
    try:
        yield
    except Exception as error:  # the other ranks must not wait for this one, whatever it raises
        failure = error
    if ranks.world == 1 and failure is not None:
        raise failure
    own = "" if failure is None else str(failure)
    if failure is not None and not isinstance(failure, UsageError):
        own = f"{type(failure).__name__}: {own}"
    failures = ranks.gather((own, rank_prefix()))
    if failure is not None and not isinstance(failure, UsageError):
        raise failure
    if any(text for text, _ in failures):
        raise SharedError(in_one_text(failures))


def refuse_differences(ranks, facts: dict):
    """Raise SharedError naming the facts {name: value} of which a rank has another value than the main process."""
    everyone = ranks.gather((rank_prefix().removesuffix(": "), facts))
    main, expected = everyone[0]
    for place, own in everyone[1:]:
        differing = [name for name in expected if own.get(name) != expected[name]]
        differing += [name for name in own if name not in expected]
        if differing:
            name = differing[0]
            more = f" (as do {', '.join(differing[1:])})" if differing[1:] else ""
            raise SharedError(
                f"{name}: differs between the processes{more}: {_shown(own.get(name))} on {place}, "
                f"{_shown(expected.get(name))} on {main}; all must train with the same"
            )


def facts_of(config: Config, dataset=None) -> dict:
    """What decides over a run beside its weights: keys, contents of lists, sources of plug-ins, versions."""
    facts = {name: value for name, value in config.values().items() if name not in LOCAL_KEYS}
    facts["test_list"] = trials_hash(config)
    for source in trial_sources(config)[1:]:
        facts[f"test_list {source.name}"] = list_hash(source.path)
    if dataset is not None:
        facts.update(train_list=dataset.list.hash, speakers=dataset.speakers_hash())
    facts.update(source_hashes(imported_user_code(plugins.ROOT)))
    return {**facts, "torch": torch.__version__, "python": platform.python_version()}


def weights_hash(network, initial_model: str = "") -> str:
    """SHA-256 of all tensors of a network that are to be the same on all processes.

    Where each has a share of all weights it is that of the file that they began with, ``initial_model``.
    """
    digest, slices = hashlib.sha256(), slices_of(network)
    if initial_model and is_sharded(network):
        digest.update(sha256_of(initial_model).encode())
    for name, tensor in sorted((n, t) for n, t in network.state_dict().items() if n not in slices):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _shown(value) -> str:
    return f"{value[:12]}.. (a hash)" if isinstance(value, str) and len(value) == 64 else str(value)
