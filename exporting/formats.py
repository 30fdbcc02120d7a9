"""Exported models as files: ONNX, TorchScript and torch.export, written and run."""

import contextlib
import ctypes
import json
import os
import re
import sys
from pathlib import Path

from errors import UsageError, first_line
from exporting.forms import FORMS, example, metadata
from storage.exported import open_session

NAMES = {".onnx": "ONNX", ".pt": "TorchScript", ".pt2": "torch.export"}  # by the ending of a file
OPSET = 17
SHORTEST = 0.5  # seconds: what every file takes, and shorter recordings are repeated to
# Said of every model: of lengths in a trace, of slices that are not folded, of the older exporter and of TorchScript.
EXPECTED = re.compile(
    r"TracerWarning|Constant folding|ONNX export mode is set|DeprecationWarning|torch\.jit\.\w+` is dep"
)


def write(network, model, kind: str, path: Path, language: str = "unknown") -> float:
    """Write what ``exportable`` made of a model, in the format of the file's ending and with its metadata.

    Returns the seconds that the file takes at least. UsageError in one line if the format cannot hold the model.
    """
    import torch

    given, facts = example(model, kind, 2.0, 2)[0], metadata(model, kind, language)
    with torch.inference_mode(False), torch.no_grad(), answered_by_the_check():
        if path.suffix == ".onnx":
            write_onnx(network, model, given, FORMS[kind], path, facts)
        elif path.suffix == ".pt":
            traced = torch.jit.trace(network, given, check_trace=False)
            traced.save(str(path), _extra_files={"metadata.json": json.dumps(facts)})
        else:
            return write_torch_export(network, model, given, kind, path, facts)
    return SHORTEST


def write_onnx(network, model, given, form, path: Path, facts: dict[str, str]):
    """Write an ONNX file that takes any batch and length.

    By torch's exporter that traces: the newer one, by torch.export, takes minutes for the larger models and fixes the
    length of some without a word. What a trace may bake in, the check would show.
    """
    import onnx
    import torch

    axes = {form.name: form.axes, "embedding": {0: "batch"}}
    names = {"input_names": [form.name], "output_names": ["embedding"], "dynamic_axes": axes}
    try:
        with without_stdout():  # an exporter that fails prints the whole graph
            torch.onnx.export(network, (given,), str(path), opset_version=OPSET, dynamo=False, **names)
    except (RuntimeError, TypeError, ValueError) as error:  # its errors carry the whole graph after the first line
        raise UsageError(refusal(model, path, error)) from error
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, facts)
    onnx.save(proto, path)


def write_torch_export(network, model, given, kind: str, path: Path, facts: dict[str, str]) -> float:
    """Write an ExportedProgram for any batch and every length from half a second up, or else from one second.

    A size that is 1 for a short recording is fixed by torch.export, so some models need more than half a second.
    """
    import torch

    if not hasattr(torch.compiler, "is_exporting"):
        raise UsageError(
            f"--out: .pt2 needs torch 2.7 or later, this is {torch.__version__}; TorchScript: --out {path.stem}.pt"
        )
    batch, failure = torch.export.Dim("batch", min=1), None
    for seconds in (SHORTEST, 2 * SHORTEST):
        axis = next(axis for axis in FORMS[kind].axes if axis)
        least = example(model, kind, seconds, 1)[0].shape[axis]
        dims = {0: batch, axis: torch.export.Dim("length", min=least)}
        try:
            with without_grad_switches():
                program = torch.export.export(network, (given,), dynamic_shapes=(dims,), strict=False)
            torch.export.save(program, path, extra_files={"metadata.json": json.dumps({**facts, "seconds": seconds})})
            return seconds
        except Exception as error:  # classes of several of torch's private modules
            failure = error
    raise UsageError(refusal(model, path, failure)) from failure


def refusal(model, path: Path, error) -> str:
    """Why a format cannot hold a model, and which can, in one line."""
    where = f"models/{model.config.model}.py"
    where += f" with frontend/{model.config.frontend}.py" if model.config.frontend else ""
    name, reason = NAMES[path.suffix], first_line(error)
    return f"{where}: {name} cannot hold it: {reason.rstrip('.')}; TorchScript can: --out {path.stem}.pt"


@contextlib.contextmanager
def without_grad_switches():
    """Let ``torch.no_grad`` blocks do nothing: torch.export 2.14 trips over one with an autocast block inside.

    No weight that is exported asks for a gradient, so they have nothing to do.
    """
    from unittest import mock

    import torch

    nothing = {"__enter__": lambda self: None, "__exit__": lambda self, *error: None}
    with mock.patch.multiple(torch.no_grad, **nothing):
        yield


@contextlib.contextmanager
def without_stdout():
    """Drop what is written to stdout, by compiled code too."""
    sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None if os.name == "posix" else "ucrtbase").fflush(None)  # what C keeps of its own
        os.dup2(own, 1)
        os.close(own)


@contextlib.contextmanager
def answered_by_the_check():
    """Drop what the exporters say of every model, that values depend on the example; show whatever else they say.

    Whether something of the example was baked in, the comparison at other lengths and batches tells.
    """
    import warnings

    with warnings.catch_warnings(record=True) as said:
        yield
    for warning in said:
        if not EXPECTED.search(f"{warning.category.__name__}: {warning.message}"):
            print(f"{warning.category.__name__}: {warning.message}", file=sys.stderr)


def reader(path: Path):
    """A function that runs an exported file: input tensor -> embeddings tensor."""
    import torch

    if path.suffix == ".onnx":
        session = open_session(path)
        name = session.get_inputs()[0].name
        return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])
    with answered_by_the_check():
        loaded = torch.jit.load(str(path)) if path.suffix == ".pt" else torch.export.load(path).module()

    def run(given):
        with torch.no_grad():
            return loaded(given.clone()).float()

    return run
