"""Files of embeddings: npy (one), npz (names and rows, without pickle), Kaldi ark with its scp."""

import contextlib
from pathlib import Path

import numpy as np

from errors import UsageError, first_line
from storage.arrays import DAMAGE, has_array, read_arrays
from storage.files import replacing
from storage.kaldi import read_ark, read_scp, write_ark

ENDINGS = (".npy", ".npz", ".ark")
READABLE = (".npz", ".ark", ".scp")


def window_name(name: str, start: float, end: float) -> str:
    """The name of the embedding of a part of a recording: 'NAME#00012.000-00015.000', in s, in order of time."""
    return f"{name}#{start:09.3f}-{end:09.3f}"


def check_ending(path, rows: int | None = None):
    """UsageError if a name says no form that can be written; a .npy file holds one embedding."""
    ending = Path(path).suffix
    if ending not in ENDINGS:
        raise UsageError(f"{path}: embeddings are written as .npy (one), .npz or .ark; choose one of these endings")
    if ending == ".npy" and rows is not None and rows != 1:
        raise UsageError(f"{path}: a .npy file holds one embedding, there are {rows}; write .npz or .ark")


def write_embeddings(path, names: list[str], x, identity: str = "", vad: str = "none"):
    """Write embeddings (N, D) by the ending of ``path``, whole or not at all.

    .npy: the one row, shape (D,). .npz: arrays ``names`` (N,) and ``embeddings`` (N, D), ``identity``, which model they
    are of, and ``vad``, what found the speech that they are of. .ark: Kaldi's float vectors, with a .scp beside it; its
    names hold no white space.
    """
    path, x = Path(path), np.ascontiguousarray(x, dtype=np.float32)
    check_ending(path, len(names))
    if path.suffix == ".ark":
        return _write_ark(path, names, x)
    with replacing(path) as temporary, open(temporary, "wb") as f:
        if path.suffix == ".npy":
            np.save(f, x[0])
        else:
            of_what = {"identity": np.str_(identity), "vad": np.str_(vad)}
            np.savez(f, names=np.array(names, dtype=np.str_), embeddings=x, **of_what)
    return None


def _write_ark(path, names, x):
    spaced = [name for name in names if len(name.split()) != 1]
    if spaced:
        raise UsageError(f"{path}: Kaldi's names hold no white space, '{spaced[0]}' does; write .npz")
    scp = path.with_suffix(".scp")
    with replacing(scp) as index, replacing(path) as ark:  # the inner one takes its place first
        write_ark(ark, index, names, x, path)
        scp.unlink(missing_ok=True)  # a crash in between must not leave the old places beside the new file


@contextlib.contextmanager
def _damage_named(path):
    """UsageError in the place of what the readers raise on a damaged file."""
    try:
        yield
    except (OSError, *DAMAGE) as error:
        raise UsageError(f"{path}: damaged, or no file of embeddings: {first_line(error)}") from error


def read_embeddings(path) -> tuple[list[str], np.ndarray]:
    """Read names and embeddings (N, D) float32 of an .npz, .ark or .scp file; UsageError for anything else."""
    path = Path(path)
    if path.suffix not in READABLE:
        raise UsageError(f"{path}: embeddings are read from .npz, .ark or .scp")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    with _damage_named(path):
        if path.suffix == ".npz":
            arrays = read_arrays(path, ("names", "embeddings"))
            names, x = [str(name) for name in arrays["names"].tolist()], arrays["embeddings"]
        else:
            pairs = list(read_ark(path) if path.suffix == ".ark" else read_scp(path))
            names = [name for name, _ in pairs]
            x = np.array([vector for _, vector in pairs])
        if x.dtype.kind not in "fiu":
            raise ValueError(f"the embeddings are {x.dtype}, not real numbers")
    if x.ndim != 2 or len(names) != len(x) or len(set(names)) != len(names):
        raise UsageError(f"{path}: expected one embedding for each of {len(set(names))} names, got shape {x.shape}")
    return names, x.astype(np.float32)


def read_identity(path, of: str = "identity") -> str:
    """The model's identity that an .npz file of embeddings states, or its ``vad``; "" if a file does not say."""
    if Path(path).suffix != ".npz":
        return ""
    with _damage_named(path):
        return str(read_arrays(path, (of,))[of]) if has_array(path, of) else ""
