"""The rooms of the house and who imports from whom; `python tests/house.py` draws docs/pictures/rooms.svg."""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From the top down: a room imports from rooms below its own level only.
LEVELS = {
    "commands": (
        *("trainSpeakerNet", "embed", "score", "verify", "enroll", "identify", "serve", "export"),
        *("average_checkpoints", "prepare_data", "pack_data", "fetch_model", "make_demo_data", "analyze_nan_debug"),
    ),
    "preflight, postmortem": ("tuneThreshold", "preflight", "postmortem", "preparation", "speaker_model", "exporting"),
    "SpeakerNet": ("SpeakerNet",),
    "training": ("training",),
    "scoring, DatasetLoader": ("scoring", "DatasetLoader"),
    "storage": ("storage",),
    "settings": ("settings",),
    "corpus": ("corpus",),
    "plug-ins": ("models", "loss", "optimizer", "scheduler", "augmentation"),
    "front ends": ("frontend",),
    "ground": ("config", "utils", "errors", "web"),
}
# Where a room stands in the picture, from 0 (left) to 10, so that no arrow hides another.
ACROSS = {"SpeakerNet": 7.2, "training": 5.2, "scoring": 3.4, "DatasetLoader": 6.85, "storage": 3.0, "settings": 3.6}
ACROSS |= {"corpus": 4.6, "plug-ins": 9.2, "utils": 8.8, "errors": 5.2, "config": 2.2, "web": 0.6}
ACROSS |= {"commands": 6.4, "postmortem": 0.8, "preparation": 2.35, "tuneThreshold": 4.0, "preflight": 6.75}
ACROSS |= {"speaker_model": 8.4, "exporting": 5.5, "frontend": 7.6}
PLUG_INS, COMMANDS = LEVELS["plug-ins"], LEVELS["commands"]


def modules_of(root: Path = ROOT) -> dict[str, Path]:
    """The modules of the product {'corpus.audio': path}: not its tests and benchmarks."""
    rooms = {name for names in LEVELS.values() for name in names}
    files = [*root.glob("*.py"), *(p for room in rooms for p in (root / room).rglob("*.py"))]
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in files}


@functools.cache
def imports_of(root: Path = ROOT) -> list[tuple[str, str]]:
    """(importing module, imported module) of every import of the product's own modules, inside functions too."""
    modules, found = modules_of(root), set()
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update((name, alias.name) for alias in node.names if alias.name in modules)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    found.update((name, module) for module in (inner, node.module) if module in modules)
    return sorted((a, b) for a, b in found if a != b and room_of(a) != b)


def room_of(module: str) -> str:
    """'corpus' of 'corpus.audio'."""
    return module.partition(".")[0]


def level_of(room: str) -> int:
    """The level of a room, 0 at the top."""
    return next(number for number, names in enumerate(LEVELS.values()) if room in names)


def needed(pairs: set) -> list[tuple[str, str]]:
    """The arrows (from, to) that no longer way of arrows stands for."""
    below = {a: {y for x, y in pairs if x == a} for a, _ in pairs}

    def reach(room):
        return below.get(room, set()).union(*map(reach, below.get(room, ())))

    return sorted((a, b) for a, b in pairs if not any(b in reach(other) for other in below[a] - {b}))


def draw(path: Path):
    """Draw the rooms by level; an arrow stands for imports, also of all that lies below along the arrows."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    def drawn(room):
        return "commands" if room in COMMANDS else "plug-ins" if room in PLUG_INS else room

    boxes = {}
    for number, rooms in enumerate(LEVELS.values()):
        names = list(dict.fromkeys(map(drawn, rooms)))
        for place, name in enumerate(names):
            boxes[name] = (ACROSS.get(name, (place + 1) / (len(names) + 1) * 10), len(LEVELS) - number)
    figure = Figure(figsize=(8, 8))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10), ylim=(0.4, len(LEVELS) + 0.6))
    axes.axis("off")
    pairs = {(drawn(room_of(a)), drawn(room_of(b))) for a, b in imports_of()}
    for a, b in needed({pair for pair in pairs if pair[0] != pair[1]}):
        style = {"arrowstyle": "-|>", "color": "#5f7183", "shrinkA": 16, "shrinkB": 16, "linewidth": 1.2}
        axes.annotate("", boxes[b], boxes[a], arrowprops=style)
    for name, (x, y) in boxes.items():
        look = {"boxstyle": "round,pad=0.4", "facecolor": "#eef3f8", "edgecolor": "#1b6ca8"}
        axes.text(x, y, name, ha="center", va="center", fontsize=12, bbox=look)
    with rc_context({"svg.hashsalt": "rooms"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(ROOT / "docs" / "pictures" / "rooms.svg")
