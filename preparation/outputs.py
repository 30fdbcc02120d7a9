"""What a run needs: lists, a configuration, and the commands to start it with."""

import re
import shlex
from pathlib import Path

from corpus.lists import LIST_TEXT, separator_for
from errors import ROOT
from storage.files import write_atomically

SMALL, LARGE = "small_speech.yaml", "ECAPA_TDNN_AAM.yaml"
LARGE_HOURS = 50.0  # of training speech, from which on the larger configuration is the default


def write_rows(path: Path, rows):
    """Write a list, with tabs between the columns if a name holds spaces."""
    between = separator_for([str(cell) for row in rows for cell in row])
    text = "".join(f"{between.join(map(str, row))}\n" for row in rows)
    write_atomically(path, text.encode(errors=LIST_TEXT["errors"]))


def write_bad_files(path: Path, rows: list[tuple[str, str, str]]):
    """Write (path, kind, detail) lines, with tabs between."""
    text = "".join("\t".join(cell.replace("\t", " ") for cell in row) + "\n" for row in rows)
    write_atomically(path, text.encode(errors=LIST_TEXT["errors"]))


def base_of(given: str, hours: float) -> Path:
    """The configuration to start from: the one given, or that of the size of the set."""
    return Path(given) if given else ROOT / "configs" / (LARGE if hours > LARGE_HOURS else SMALL)


def write_config(path: Path, base: Path, keys: dict):
    """Write ``base`` with other values for some of its keys, those that it lacks at its end."""
    import yaml

    text = base.read_text(encoding="utf-8")
    for key, value in keys.items():
        line = yaml.safe_dump({key: value}, allow_unicode=True, width=1 << 20).strip()
        text, count = re.subn(rf"^{key}: .*$", lambda found, line=line: line, text, count=1, flags=re.M)
        text += "" if count else f"{line}\n"
    write_atomically(path, text.encode(errors=LIST_TEXT["errors"]))


def commands(config: Path, save_path: str) -> list[str]:
    """The two commands to run next."""
    return [
        f"python trainSpeakerNet.py --config {shlex.quote(str(config))}",
        f"python verify.py A.wav B.wav --initial_model {shlex.quote(save_path)}/model/model_best.model",
    ]
