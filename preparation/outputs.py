"""What a run needs: lists, a configuration, and the commands to start it with."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from config import SAMPLE_RATE
from corpus.lists import LIST_TEXT, separator_for
from errors import ROOT, UsageError, shell_path
from settings.reader import read_yaml
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
    """Write ``base`` with other values for some of its keys, those that it lacks at its end; None takes a key away.

    UsageError if ``base`` is no configuration, or written so that keys cannot be replaced one by one.
    """
    wanted = {name: setting.value for name, setting in read_yaml(str(base)).items()} | keys
    wanted = {name: value for name, value in wanted.items() if value is not None or name not in keys}
    text = base.read_text(encoding="utf-8-sig")
    root = yaml.compose(text)
    spans = {node.value: (node.start_mark.index, _end(value)) for node, value in root.value} if root else {}
    for key in sorted(keys, key=lambda key: spans.get(key, (0, 0)), reverse=True):  # from the end: no span moves
        if key in spans:
            begin, end = spans[key]
            text = text[:begin] + _line(key, keys[key]) + text[end:]
    text = text.rstrip("\n") + "\n"
    text += "".join(f"{_line(key, value)}\n" for key, value in keys.items() if key not in spans and value is not None)
    write_atomically(path, text.encode(errors=LIST_TEXT["errors"]))
    try:
        same = {name: setting.value for name, setting in read_yaml(str(path)).items()} == wanted
    except UsageError:
        same = False
    if not same:
        path.unlink()
        raise UsageError(f"--config: keys of '{base}' cannot be replaced one by one: write each as a line 'key: value'")


def _line(key: str, value) -> str:
    """A key with all of its value in one line; '' for None."""
    if value is None:
        return ""
    flow = None if isinstance(value, dict) else False
    return yaml.safe_dump(
        {key: value}, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=1 << 20
    ).strip()


def _end(node) -> int:
    """Where a value ends: a block ends for yaml where the next key begins, behind the comments in between."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    in_block = isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")
    return node.end_mark.index - in_block  # without its line break


@dataclass(frozen=True)
class Files:
    """What a run needs, as it lies below ``out``."""

    out: Path
    sample_rate: int = SAMPLE_RATE  # that the configuration says

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
            f"python trainSpeakerNet.py --config {shell_path(self.config)}",
            f"python verify.py A.wav B.wav --initial_model {shell_path(self.save_path)}/model/model_best.model",
        ]


def write_run(
    out: Path, root: Path, division, given: tuple[str, str, int], hours: float, noise: dict[str, str]
) -> Files:
    """Write the train list and a configuration that trains on it.

    It starts from the configuration ``given``, or from that of the size of the set; with a checkpoint ``given`` too it
    fine-tunes that. A sample rate ``given``, if it is not 0, is written too. ``noise`` {"musan", "rirs": folder} is
    what it augments with; without any, a configuration of ours that augments does not.
    """
    files = Files(out)
    write_rows(files.train_list, [(utterance.speaker, utterance.listed) for utterance in division.train])
    config, model, rate = given
    base = Path(config) if config else FINETUNE if model else LARGE if hours > LARGE_HOURS else SMALL
    trials = {name: str(path) for name, path in division.trials.items()}
    keys = {
        "train_list": str(files.train_list),
        "test_list": trials if len(trials) > 1 else next(iter(trials.values())),
    }
    keys |= {"train_path": str(root), "test_path": str(root), "save_path": files.save_path}
    keys |= {"initial_model": model} if model else {}
    keys |= {"sample_rate": rate} if rate else {}
    known = read_yaml(str(base))
    written = known["sample_rate"].value if "sample_rate" in known else SAMPLE_RATE
    files = replace(files, sample_rate=rate or trained_at(model) or written)
    if "best_list" in known and known["best_list"].value not in (trials if len(trials) > 1 else ()):
        keys["best_list"] = None  # of lists that are not used
    if any(noise.values()) or (not config and "augment: true" in base.read_text(encoding="utf-8")):
        keys |= {"augment": any(noise.values()), "musan_path": noise["musan"], "rir_path": noise["rirs"]}
    write_config(files.config, base, keys)
    return files


def trained_at(model: str) -> int:
    """The sample rate of a checkpoint, 0 of none and of one that carries no configuration."""
    if not model:
        return 0
    from storage.checkpoint import load  # which brings torch

    carried = load(model).get("config")
    return carried.get("sample_rate", SAMPLE_RATE) if isinstance(carried, dict) else 0
