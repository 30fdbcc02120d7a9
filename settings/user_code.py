"""Which source files are the user's: plug-ins, and what stands in the checkout and is not the product's own."""

import sys
import sysconfig
from pathlib import Path

from errors import ROOT

PLUG_INS = ("models", "loss", "optimizer", "scheduler")
# The product's own rooms and commands: no code of its user.
ROOMS = ("corpus", "postmortem", "preflight", "scoring", "settings", "storage", "training")
COMMANDS = (
    *("trainSpeakerNet", "embed", "score", "verify", "enroll", "identify", "serve", "export", "average_checkpoints"),
    *("prepare_data", "make_demo_data", "analyze_nan_debug", "tuneThreshold", "speaker_model", "SpeakerNet"),
    *("DatasetLoader", "config", "utils", "errors"),
)
DEVELOPERS = ("tests", "benchmarks")
INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


def is_product(path: Path, root: Path = ROOT) -> bool:
    """Whether a file is one of the product's own, plug-ins not counted."""
    if not path.is_relative_to(root):
        return False
    parts = path.relative_to(root).with_suffix("").parts
    return parts[0] in ROOMS or (len(parts) == 1 and parts[0] in COMMANDS)


def is_installed(path: Path) -> bool:
    """Whether a file belongs to Python or to an installed package."""
    return "site-packages" in path.parts or any(path.is_relative_to(folder) for folder in INSTALLED)


def imported_user_code(root: Path = ROOT) -> set[Path]:
    """The user's files of the checkout ``root`` that this process has imported: plug-ins, and what they use."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = {Path(file) for file in files if isinstance(file, str) and file.endswith(".py")}
    paths = {p for p in paths if p.is_relative_to(root) and not is_product(p, root) and not is_installed(p)}
    inside = {p.relative_to(root) for p in paths if not p.name.startswith("__")}
    return {p for p in inside if p.parts[0] not in DEVELOPERS}
