"""The NaN dump, format 1: this module writes it and reads it back. It knows torch, not the trainer."""

import hashlib
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from errors import first_line, plural
from storage.files import WriteError, save_atomically
from storage.restricted import DumpError, Refusal, load_plain, plain

FORMAT_VERSION = 1
REASONS = (
    "loss_nonfinite",
    "grad_nonfinite",
    "grad_norm_overflow",
    "scale_collapse",
    "batch_nonfinite",
    "label_out_of_range",
    "state_nonfinite",
    "data_error",
    "spike",
)
BEFORE_THE_STEP = ("batch_nonfinite", "label_out_of_range", "data_error")  # found before anything is computed
STATE_NAME = re.compile(r"state_[0-9a-f]{8,64}\.pt")
MAX_THREADS = 4096

# A kind describes a value: a tuple of exact types (True is no int), [kind] a list of such values, {str: kind} a dict
# with any names, Fields a dict with these names, or a function (value, where) that raises Refusal.


@dataclass(frozen=True)
class Fields:
    """Kind of a dict with the names of ``required``, perhaps those of ``optional``, and perhaps others."""

    required: dict
    optional: dict = field(default_factory=dict)


def tensor_of(what: str, fits, dims: tuple = ()):
    """Kind of a tensor that ``fits(tensor)``, with one of the numbers of dimensions ``dims`` if they are given."""

    def check(value, where):
        if type(value) is not torch.Tensor or not fits(value) or (dims and value.ndim not in dims):
            raise Refusal(f"'{where}' is {describe(value)}, not {what}")

    return check


def row_of(*kinds):
    """Kind of a list with one value of each kind."""

    def check(value, where):
        check_kind(value, (list, tuple), where)
        if len(value) != len(kinds):
            raise Refusal(f"'{where}' has {len(value)} values, not {len(kinds)}")
        for index, (item, kind) in enumerate(zip(value, kinds)):
            check_kind(item, kind, f"{where}[{index}]")

    return check


def between(low, high):
    """Kind of a number from ``low`` to ``high``, whole if ``low`` is."""

    def check(value, where):
        check_kind(value, INT if type(low) is int else NUMBER, where)
        if not low <= value <= high:
            raise Refusal(f"'{where}' is {value}, not from {low} to {high}")

    return check


def text_of(pattern: str):
    """Kind of a text that matches a pattern as a whole."""

    def check(value, where):
        if type(value) is not str or not re.fullmatch(pattern, value):
            raise Refusal(f"'{where}' is {describe(value)}, which is not allowed")

    return check


def check_setting(value, where):
    """Kind of a value of the configuration: a scalar, or a list of entries."""
    check_kind(value, [check_entry] if type(value) is list else SCALAR, where)


def check_entry(value, where):
    """Kind of an entry of a list: a scalar, a list of such, or a dict of settings and of such entries, of a policy."""
    inner = {str: lambda item, place: (check_entry if type(item) is dict else check_setting)(item, place)}
    check_kind(value, inner if type(value) is dict else [check_entry] if type(value) is list else SCALAR, where)


def check_threads(value, where):
    """Kind of a number of threads that torch can be told."""
    if type(value) is not int or not 1 <= value <= MAX_THREADS:
        raise Refusal(f"'{where}' is {describe(value)}, not a number of threads")


def anything(value, where):
    """Kind of a value that was found to be plain and is not looked into."""


def is_fractional(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers are not whole by their type."""
    return tensor.is_floating_point() or tensor.is_complex()


INT, NUMBER, TEXT = (int,), (int, float), (str,)
SCALAR = (str, int, float, bool, type(None))
TENSOR = tensor_of("a tensor", lambda t: True)
FLOATS = tensor_of("a tensor of floating point with up to 4 dimensions", torch.is_floating_point, (0, 1, 2, 3, 4))
WHOLE = tensor_of("a tensor of whole numbers", lambda t: t.dtype != torch.bool and not is_fractional(t))
BYTES = tensor_of("a generator's state", lambda t: t.dtype == torch.uint8, (1,))
ONE_NUMBER = tensor_of("a number", lambda t: t.numel() == 1 and t.dtype != torch.bool and not t.is_complex())
STATISTICS = Fields({"numel": INT, "nan": INT, "inf": INT, "abs_max": NUMBER, "norm": NUMBER})
DRAW = Fields({"kind": TEXT}, {"path": TEXT, "start": INT, "snr_db": NUMBER, "gain": NUMBER, "reason": TEXT})
FILE = Fields(
    {"path": TEXT, "line": INT},
    {
        "start": between(0, 1 << 40),
        "rate": between(1, 10**7),
        "speed": between(0.1, 10.0),
        "utterance": INT,
        "channel": TEXT,
        "peak": NUMBER,
        "rms": NUMBER,
        "augment": [DRAW],
        "pack": TEXT,
        "list_path": TEXT,
        "sample_rate": between(1, 10**6),
        "pack_row": between(0, 1 << 40),
        "pack_crc": between(-1, 1 << 32),
        "replaced": [Fields({"path": TEXT, "reason": TEXT})],
    },
)
NUMPY_RNG, PYTHON_RNG = row_of(TEXT, [INT], INT, INT, NUMBER), row_of(INT, [INT], (float, type(None)))
RNG_STATE = Fields({}, {"torch": BYTES, "cuda": BYTES, "numpy": NUMPY_RNG, "python": PYTHON_RNG})
# The six keys of the first trainer that wrote such files; alone they are a valid old dump, format 0.
ORIGIN_KEYS = {
    "batch_idx": INT,
    "epoch": INT,
    "data": FLOATS,
    "label": WHOLE,
    "loss": NUMBER,
    "prec1": NUMBER,
}
KEYS = {
    **ORIGIN_KEYS,
    "format_version": INT,
    "reason": text_of("|".join(REASONS)),
    "step": INT,
    "rank": INT,
    "files": [FILE],
    "lr": NUMBER,
    "scaler_scale": NUMBER,
    "amp_dtype": text_of("float32|float16|bfloat16"),
    "grad_norm": NUMBER,
    "grad_stats": {str: STATISTICS},
    "param_stats": {str: STATISTICS},
    "history": [{str: NUMBER}],
    "rng_state": RNG_STATE,
    "threads": check_threads,
    "device": text_of(r"[a-z]{1,16}(:\d{1,3})?"),
    "config": {str: check_setting},
    "versions": {str: TEXT},
    "source_hashes": {str: TEXT},
    "state": text_of(f"({STATE_NAME.pattern})?"),
}
OPTIONAL_KEYS = {
    "window": [INT],
    "injected": TEXT,
    "world": INT,
    "moment": NUMBER,
    "trainable": [TEXT],
    # what an update made non-finite, and plain values that the optimizer keeps in attributes, as before the step
    "update_stats": {str: STATISTICS},
    "optimizer_attributes": {str: SCALAR},
    "module_state": {str: {str: anything}},  # plain attributes of modules, as before the step
    # Of a run with a teacher: its plug-in, the hashes of the files that it was read from, its tensors that are not
    # finite, and the rows of which its embedding is not.
    "teacher": Fields({"model": TEXT, "files": {str: TEXT}, "nonfinite": {str: STATISTICS}, "rows": [INT]}),
    # What the same step gave, computed once more, and then on the CPU: whether it was finite, or why it cannot be told.
    "recheck": Fields({"finite": (bool,), "same": (bool,)}, {"cpu_finite": (bool,), "cpu_error": TEXT}),
    # Of a step that is finite and far above those before it: its figures, their medians, the loss of each row alone.
    "spike": Fields(
        {"loss": NUMBER, "grad_norm": NUMBER},
        {
            "loss_median": NUMBER,
            "grad_norm_median": NUMBER,
            "rows": [Fields({"row": between(0, 1 << 30), "loss": NUMBER})],
        },
    ),
    # Of loops that are not the trainer's: 'module:function' that makes the network and its optimizer, the shape of a
    # row of ``data`` (B, values), modules in evaluation mode, parameters without a gradient.
    "build": text_of(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"),
    "row_shape": [INT],
    "evaluating": [TEXT],
    "frozen": [TEXT],
}
# What a loop that is not the trainer's trains on may be of any type: pixels, token numbers, targets.
FOREIGN_KEYS = {
    **KEYS,
    "data": tensor_of("a tensor (rows, values)", lambda t: True, (2,)),
    "label": tensor_of("a tensor with a row for each row of the data", lambda t: t.ndim > 0),
    "files": row_of(),
}
STATE_KEYS = {
    "model_state_dict": {str: TENSOR},
    "optimizer_state_dict": Fields({"state": (dict,), "param_groups": [Fields({"params": [INT]})]}),
}


def tensor_stats(tensors: dict) -> dict[str, dict]:
    """Per name: numel, nan, inf, abs_max and norm (of the finite values), as plain numbers.

    The values of a complex tensor are its real and imaginary parts.
    """
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj()
        values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double().flatten()
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

    def __init__(self, folder, max_dumps: int, max_gb: float, say, bounds=("nan_max_dumps", "nan_max_gb")):
        self.folder, self.max_dumps, self.max_bytes, self.say = Path(folder), max_dumps, max_gb * 1e9, say
        self.bounds = bounds  # what the user calls the number and the size
        self.written, self.lost = 0, set()  # lost: names of dumps that could not be written
        self.pending: dict[str, int] = {}  # bytes of dumps that are being written
        self.last_state = ""  # file of the newest state
        self._pool = ThreadPoolExecutor(1)

    def refusal(self, size: int, share: float = 1.0, counted: bool = True) -> str | None:
        """Why a dump of ``size`` bytes will not be written, or None.

        ``share``: of the folder's size that may be filled. ``counted``: whether it is one of ``max_dumps``.
        """
        if counted and self.written >= self.max_dumps:
            verb = "is" if self.max_dumps == 1 else "are"
            return f"{plural(self.max_dumps, 'dump')} {verb} written ({self.bounds[0]})"
        try:
            there = sum(f.stat().st_size for f in self.folder.glob("*.pt"))
        except OSError as error:
            return f"{self.folder} cannot be read: {error.strerror}"
        if there + sum(self.pending.copy().values()) + size > share * self.max_bytes:
            return f"{self.folder.name}/ would pass {self.max_bytes / 1e9:g} GB ({self.bounds[1]})"
        return None

    def submit(self, name: str, dump: dict, state: dict | None, size: int = 0, shared=False, counted=True):
        """Write a dump of ``size`` bytes and the state that belongs to it; both must be CPU copies.

        ``shared``: its state is the one that was submitted last. ``counted``: whether it is one of ``max_dumps``.
        """
        self.written += counted
        self.pending[name] = size
        return self._pool.submit(self._write, name, dump, state, shared, counted)

    def _write(self, name, dump, state, shared, counted):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if state:
                self.last_state = ""
                dump["state"] = f"state_{content_hash(state)}.pt"
                if not (self.folder / dump["state"]).exists():
                    save_atomically(state, self.folder / dump["state"], 0o600)
                self.last_state = dump["state"]
            else:
                dump["state"] = self.last_state if shared else ""
            save_atomically(dump, self.folder / name, 0o600)
        except Exception as error:  # of a thread whose outcome nobody waits for: also a lack of memory
            self.written -= counted
            self.lost.add(name)
            reason = error.reason if isinstance(error, WriteError) else getattr(error, "strerror", None)
            reason = reason or f"{type(error).__name__}: {first_line(error)}"
            self.say(f"the debug data could not be written to {self.folder / name}: {reason}; training goes on")
        finally:
            del self.pending[name]

    def close(self):
        """Wait for what is being written."""
        self._pool.shutdown(wait=True)


def read_dump(path) -> dict:
    """Read and validate a dump by restricted loading; DumpError with one line for anything else."""
    return validate(load_plain(path), path)


def read_state(dump_path, name: str) -> dict:
    """Read the state that lies beside a dump under the name that its key ``state`` gives.

    Returns model_state_dict {name: tensor} and optimizer_state_dict {state, param_groups}; DumpError if the file is
    missing or anything else.
    """
    if type(name) is not str or not STATE_NAME.fullmatch(name):
        raise DumpError(f"{dump_path}: '{name}' is not the name of a state file")
    path = Path(dump_path).parent / name
    state = load_plain(path)
    try:
        check_kind(state, Fields(STATE_KEYS), "")
        for number, values in state["optimizer_state_dict"]["state"].items():
            where = f"optimizer_state_dict.state.{number}"
            check_kind(number, INT, where)
            check_kind(values, {str: anything}, where)
    except Refusal as refusal:
        raise DumpError(f"{path}: {refusal}") from refusal
    return state


def read_checkpoint(path) -> dict:
    """Read any checkpoint by the same bounded restricted loading; DumpError if it is none, or not a dict."""
    state = load_plain(path)
    if not isinstance(state, dict):
        raise DumpError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    return state


def validate(dump, path) -> dict:
    """Check the keys of a loaded dump and the types inside them; returns it in plain containers.

    A dump without ``format_version`` is the old one of six keys, format 0; its loss and prec1 become floats, tensors
    of one number included. Keys that are not known pass if they hold plain values. ``path`` is named in DumpError.
    """
    try:
        dump = plain(dump)
        if type(dump) is not dict:
            raise Refusal(f"holds a {type(dump).__name__}, not a dump")
        if holds_weights(dump):
            raise Refusal(f"is {weights_in(path)}, not a dump")
        version = dump.get("format_version", 0)
        if type(version) is not int or version < 0:
            raise Refusal(f"'format_version' is {describe(version)}, not the number of a format")
        if version > FORMAT_VERSION:
            raise Refusal(f"format {version} is newer than this version reads ({FORMAT_VERSION})")
        if version == 0:
            for key in ("loss", "prec1"):
                if type(dump.get(key)) is torch.Tensor:
                    ONE_NUMBER(dump[key], key)
                    dump[key] = dump[key].item()
            check_kind(dump, Fields(ORIGIN_KEYS), "")
            dump = {key: dump[key] for key in ORIGIN_KEYS}  # others mean nothing without a format
            return {**dump, "loss": float(dump["loss"]), "prec1": float(dump["prec1"])}
        foreign = "build" in dump
        check_kind(dump, Fields(FOREIGN_KEYS if foreign else KEYS, OPTIONAL_KEYS), "")
        if foreign:
            check_foreign_rows(dump)
        else:
            check_rows(dump)
        return dump
    except Refusal as refusal:
        raise DumpError(f"{path}: {refusal}") from refusal


def holds_weights(value: dict) -> bool:
    """Whether a file that was read is a checkpoint, this trainer's or one of the other known layouts, and no dump."""
    bare = bool(value) and all(type(tensor) is torch.Tensor for tensor in value.values())
    return "data" not in value and (bare or bool({"model_state_dict", "model", "state_dict"} & set(value)))


def weights_in(path) -> str:
    """What a file of weights that is given for a dump is, and where the dumps lie that are meant."""
    path = Path(path)
    if STATE_NAME.fullmatch(path.name):
        return "the state that dumps beside it share (give one of nan_*.pt)"
    return "a checkpoint (the dumps of a run are nan_*.pt in debug_nan/ of its save_path)"


def check_kind(value, kind, where: str):
    """Raise Refusal, naming the place ``where``, unless a value is of a kind."""
    if isinstance(kind, tuple):
        if type(value) not in kind:
            names = " or ".join(k.__name__ for k in kind)
            raise Refusal(f"'{where}' is {describe(value)}, not {names}" if where else f"holds {describe(value)}")
    elif isinstance(kind, list):
        check_kind(value, (list,), where)
        for index, item in enumerate(value):
            check_kind(item, kind[0], f"{where}[{index}]")
    elif isinstance(kind, dict):
        check_kind(value, (dict,), where)
        for key, item in value.items():
            check_kind(key, TEXT, f"{where}: the name {key}")
            check_kind(item, kind[str], f"{where}.{key}")
    elif isinstance(kind, Fields):
        check_kind(value, (dict,), where)
        for key in kind.required:
            if key not in value:
                raise Refusal(f"'{where}' has no '{key}'" if where else f"has no '{key}'")
        for key, inner in {**kind.required, **kind.optional}.items():
            if key in value:
                check_kind(value[key], inner, f"{where}.{key}" if where else key)
    else:
        kind(value, where)


def check_rows(dump: dict):
    """Raise Refusal unless data (M, B, samples) or (B, samples), label (B,), files and window tell of equal rows."""
    shape, label = tuple(dump["data"].shape), dump["label"]
    if len(shape) not in (2, 3):
        return
    batch = shape[-2]
    rows = shape[0] * batch if len(shape) == 3 else batch
    if label.ndim != 1 or len(label) != batch:
        raise Refusal(f"'label' has the shape {tuple(label.shape)}, 'data' {shape}")
    if len(dump["files"]) not in (0, rows):
        raise Refusal(f"'files' has {len(dump['files'])} rows, 'data' {rows}")
    window = dump.get("window", [batch])
    if sum(window) != batch or any(n < 1 for n in window):
        raise Refusal(f"'window' says {window}, the batch has {batch} rows")


def check_foreign_rows(dump: dict):
    """Raise Refusal unless data (B, values), its row shape and label (B, ...) of another loop's dump fit together."""
    batch, values = dump["data"].shape
    shape = dump.get("row_shape", [])
    if any(size < 0 for size in shape) or math.prod(shape) != values:
        raise Refusal(f"'row_shape' is {shape}, 'data' has {values} values a row")
    if len(dump["label"]) != batch:
        raise Refusal(f"'label' has {len(dump['label'])} rows, 'data' {batch}")


def rows_of(data, labels: int = 0) -> torch.Tensor:
    """The batch as one row a crop: (rows, samples), in the order of ``files``.

    Features (B, frames, bands) of an old dump, told by as many ``labels`` as B, give one row an utterance.
    """
    if data.ndim == 3 and labels == data.shape[0] and labels != data.shape[1]:
        return data.flatten(1)
    return data.flatten(0, -2) if data.ndim > 1 else data.reshape(1, -1)


def describe(value) -> str:
    """A value in few words: small ones as they are, others by their type or shape."""
    if type(value) is torch.Tensor:
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return repr(value) if type(value) in SCALAR else f"a {type(value).__name__}"
