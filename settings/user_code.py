"""Which source files are the user's: plug-ins, and what stands in the checkout and is not the product's own."""

import hashlib
import os
import sys
from pathlib import Path

from errors import ROOT, is_installed
from settings.plugins import ENTRY

PLUG_INS = tuple(ENTRY)
# The product's own rooms and commands: no code of its user.
ROOMS = (
    "corpus",
    "exporting",
    "postmortem",
    "preflight",
    "preparation",
    "scoring",
    "settings",
    "storage",
    "training",
    "web",
)
COMMANDS = (
    *(
        "trainSpeakerNet",
        "fetch_model",
        "embed",
        "score",
        "verify",
        "enroll",
        "identify",
        "serve",
        "export",
        "average_checkpoints",
    ),
    *(
        "prepare_data",
        "pack_data",
        "make_demo_data",
        "analyze_nan_debug",
        "tuneThreshold",
        "speaker_model",
        "SpeakerNet",
    ),
    *("DatasetLoader", "config", "utils", "errors"),
)
DEVELOPERS = ("tests", "benchmarks")


def is_product(path: Path, root: Path = ROOT) -> bool:
    """Whether a file is one of the product's own, plug-ins not counted."""
    if not path.is_relative_to(root):
        return False
    parts = path.relative_to(root).with_suffix("").parts
    return parts[0] in ROOMS or (len(parts) == 1 and parts[0] in COMMANDS)


def imported_user_code(root: Path = ROOT) -> set[Path]:
    """The user's files of the checkout ``root`` that this process has imported: plug-ins, and what they use."""
    inside, files = f"{root}{os.sep}", (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    # Thousands of modules are installed ones: their names tell it before a path is made of them.
    paths = {Path(f) for f in files if isinstance(f, str) and f.startswith(inside) and f.endswith(".py")}
    users = {p for p in paths if not is_product(p, root) and not is_installed(p) and not p.name.startswith("__")}
    return {p.relative_to(root) for p in users if p.relative_to(root).parts[0] not in DEVELOPERS}


def source_hash(path: Path) -> str:
    """SHA-256 of a source file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def changed_since(hashes: dict[str, str], needed: list[str], root: Path) -> list[str]:
    """List the source files below ``root`` that differ from recorded hashes: changed, missing, or without a hash.

    ``needed`` must have a hash. The names may come from anyone: none outside of ``root`` is read.
    """
    changed = [f"{name} (no hash in the dump)" for name in needed if name not in hashes]
    for name, digest in hashes.items():
        path = (root / name).resolve()
        if path.suffix != ".py" or not path.is_relative_to(root) or not path.is_file():
            changed.append(f"{name} (missing)")
        elif source_hash(path) != digest:
            changed.append(name)
    return changed
