"""The NaN dump, format 1: this module writes it and reads it back. It knows torch, not the trainer."""

import hashlib
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from utils import save_atomically

FORMAT_VERSION = 1
REASONS = (
    *("loss_nonfinite", "grad_nonfinite", "grad_norm_overflow", "scale_collapse"),
    *("batch_nonfinite", "label_out_of_range", "state_nonfinite", "data_error"),
)
# The six keys of the first trainer that wrote such files; alone they are a valid old dump.
ORIGIN_KEYS = {
    **{"batch_idx": int, "epoch": int, "data": torch.Tensor, "label": torch.Tensor},
    **{"loss": (float, int), "prec1": (float, int)},
}
KEYS = {
    **ORIGIN_KEYS,
    **{"format_version": int, "reason": str, "step": int, "rank": int, "files": list, "lr": (float, int)},
    **{"scaler_scale": (float, int), "amp_dtype": str, "grad_norm": (float, int), "grad_stats": dict},
    **{"param_stats": dict, "history": list, "rng_state": dict, "threads": int, "device": str, "config": dict},
    **{"versions": dict, "source_hashes": dict, "state": str},
}
MAX_BYTES = 8 << 30  # of a dump that is opened


class DumpError(Exception):
    """A file that is no dump this version can read; the message is one line with the file's name."""


def tensor_stats(tensors: dict) -> dict[str, dict]:
    """Per name: numel, nan, inf, abs_max and norm (of the finite values), as plain numbers."""
    result = {}
    for name, tensor in tensors.items():
        values = tensor.detach().double().flatten()
        finite = values[values.isfinite()]
        result[name] = {
            "numel": values.numel(),
            "nan": int(values.isnan().sum()),
            "inf": int(values.isinf().sum()),
            "abs_max": float(finite.abs().max()) if finite.numel() else 0.0,
            "norm": float(finite.norm()) if finite.numel() else 0.0,
        }
    return result


def content_hash(state: dict) -> str:
    """SHA-256 of the tensors and numbers of a nested state, in the order of their names."""
    digest = hashlib.sha256()

    def visit(name, value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                visit(f"{name}.{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                visit(f"{name}.{index}", item)
        else:
            digest.update(f"{name}={value!r}".encode())

    visit("", state)
    return digest.hexdigest()[:16]


class DumpWriter:
    """Writes dumps into a folder in the background, within a number and a size; training never waits or fails."""

    def __init__(self, folder, max_dumps: int, max_gb: float, say):
        self.folder, self.max_dumps, self.max_bytes, self.say = Path(folder), max_dumps, max_gb * 1e9, say
        self.written = 0
        self._pool = ThreadPoolExecutor(1)

    def refusal(self, size: int) -> str | None:
        """Why a dump of ``size`` bytes will not be written, or None."""
        if self.written >= self.max_dumps:
            return f"{self.max_dumps} dumps are written (nan_max_dumps)"
        files = list(self.folder.glob("*.pt")) if self.folder.is_dir() else []
        if sum(f.stat().st_size for f in files) + size > self.max_bytes:
            return f"debug_nan/ would pass {self.max_bytes / 1e9:g} GB (nan_max_gb)"
        return None

    def submit(self, name: str, dump: dict, state: dict):
        """Write a dump and, unless None or there already, the state it shares; both must be CPU copies."""
        self.written += 1
        return self._pool.submit(self._write, name, dump, state)

    def _write(self, name, dump, state):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            dump["state"] = f"state_{content_hash(state)}.pt" if state else ""
            if state and not (self.folder / dump["state"]).exists():
                save_atomically(state, self.folder / dump["state"], 0o600)
            save_atomically(dump, self.folder / name, 0o600)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.say(f"the debug data could not be written to {self.folder / name}: {reason}; training goes on")

    def close(self):
        """Wait for what is being written."""
        self._pool.shutdown(wait=True)


def read_dump(path) -> dict:
    """Read and validate a dump by restricted loading; DumpError with one line for anything else."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DumpError(f"{path}: larger than {MAX_BYTES >> 30} GiB")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > MAX_BYTES:
                    raise DumpError(f"{path}: unpacks to more than {MAX_BYTES >> 30} GiB")
        dump = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DumpError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DumpError(f"{path}: damaged, or not a dump: {reason}") from error
    return validate(dump, path)


def validate(dump, path) -> dict:
    """Check keys and types of a loaded dump; an old one of six keys is format 0."""
    if not isinstance(dump, dict):
        raise DumpError(f"{path}: holds a {type(dump).__name__}, not a dump")
    version = dump.get("format_version", 0)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise DumpError(f"{path}: format {version!r} is newer than this version reads ({FORMAT_VERSION})")
    for key, kind in (KEYS if version else ORIGIN_KEYS).items():
        if key not in dump:
            raise DumpError(f"{path}: has no '{key}'")
        if not isinstance(dump[key], kind) or isinstance(dump[key], bool):
            raise DumpError(f"{path}: '{key}' is a {type(dump[key]).__name__}")
    if version and dump["reason"] not in REASONS:
        raise DumpError(f"{path}: unknown reason '{dump['reason']}'")
    return dump
