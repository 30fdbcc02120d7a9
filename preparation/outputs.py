"""What a run needs: lists, a configuration, and the commands to start it with."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from corpus.lists import LIST_TEXT, separator_for
from errors import ROOT
from storage.files import write_atomically

SMALL, LARGE = (ROOT / "configs" / name for name in ("small_speech.yaml", "ECAPA_TDNN_AAM.yaml"))
FINETUNE = Path(__file__).with_name("finetune.yaml")  # without a model, which is that of the checkpoint
LARGE_HOURS = 50.0  # of training speech, from which on the larger configuration is the default


def write_rows(path: Path, rows):
    """Write a list, with tabs between the columns if a name holds spaces."""
    between = separator_for([str(cell) for row in rows for cell in row])
    text = "".join(f"{between.join(map(str, row))}\n" for row in rows)
    write_atomically(path, text.encode(errors=LIST_TEXT["errors"]))


def write_bad_files(path: Path, rows: list[tuple[str, str, str]]):
    """Write (path, kind, detail) lines, with tabs between; a control character in a name as an escape."""

    def clean(cell):
        return re.sub(r"[\x00-\x1f\x85\u2028\u2029]", lambda found: repr(found[0])[1:-1], cell)

    text = "".join("\t".join(map(clean, row)) + "\n" for row in rows)
    write_atomically(path, text.encode(errors=LIST_TEXT["errors"]))


def write_config(path: Path, base: Path, keys: dict):
    """Write ``base`` with other values for some of its keys, those that it lacks at its end."""
    import yaml

    text = base.read_text(encoding="utf-8")
    for key, value in keys.items():
        flow = None if isinstance(value, dict) else False  # all of a value in the line of its key
        line = yaml.safe_dump({key: value}, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=1 << 20)
        line = line.strip()
        text, count = re.subn(rf"^{key}: .*$", lambda found, line=line: line, text, count=1, flags=re.M)
        text += "" if count else f"{line}\n"
    write_atomically(path, text.encode(errors=LIST_TEXT["errors"]))


@dataclass(frozen=True)
class Files:
    """What a run needs, as it lies below ``out``."""

    out: Path

    @property
    def name(self) -> str:
        """Of the set and of its runs."""
        return self.out.resolve().name

    @property
    def train_list(self) -> Path:
        return self.out / "train_list.txt"

    @property
    def config(self) -> Path:
        return self.out / "config.yaml"

    @property
    def save_path(self) -> str:
        return f"exps/{self.name}"

    def commands(self) -> list[str]:
        """The two commands to run next."""
        return [
            f"python trainSpeakerNet.py --config {shlex.quote(str(self.config))}",
            f"python verify.py A.wav B.wav --initial_model {shlex.quote(self.save_path)}/model/model_best.model",
        ]


def write_run(out: Path, root: Path, division, given: tuple[str, str], hours: float, noise: dict[str, str]) -> Files:
    """Write the train list and a configuration that trains on it.

    It starts from the configuration ``given``, or from that of the size of the set; with a checkpoint ``given`` too it
    fine-tunes that. ``noise`` {"musan", "rirs": folder} is what it augments with; without any, a configuration of ours
    that augments does not.
    """
    files = Files(out)
    write_rows(files.train_list, [(utterance.speaker, utterance.listed) for utterance in division.train])
    config, model = given
    base = Path(config) if config else FINETUNE if model else LARGE if hours > LARGE_HOURS else SMALL
    trials = {name: str(path) for name, path in division.trials.items()}
    keys = {
        "train_list": str(files.train_list),
        "test_list": trials if len(trials) > 1 else next(iter(trials.values())),
    }
    keys |= {"train_path": str(root), "test_path": str(root), "save_path": files.save_path}
    keys |= {"initial_model": model} if model else {}
    if any(noise.values()) or (not config and "augment: true" in base.read_text(encoding="utf-8")):
        keys |= {"augment": any(noise.values()), "musan_path": noise["musan"], "rir_path": noise["rirs"]}
    write_config(files.config, base, keys)
    return files
