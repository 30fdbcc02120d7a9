"""Explain the scores that an evaluation lost: the files of the non-finite embeddings, and what is wrong with them."""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from corpus.crop import is_there
from corpus.lists import LIST_TEXT, columns_of
from corpus.measuring import Source, measure
from errors import first_line, plural
from postmortem.fixes import recommendation
from postmortem.report import recommendation_lines
from settings import plain_yaml
from storage.restricted import DumpError, printable

NAME = re.compile(r"nan_trials(?:_(.+))?_epoch_(\d+)\.txt")  # the name of a list that does not decide, the epoch
MAX_BYTES = 1 << 28
LOOKED_AT = 20  # files that are read and named
SOUND = "the file is finite"


@dataclass
class EvaluationFault:
    """The result for a list of lost trials; ``verdict`` is the object that ``--json`` prints."""

    path: Path
    verdict: dict
    summary: str
    pairs: int
    dump: dict = field(default_factory=dict)  # there is none; the page asks for it
    activations: list = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return the text report."""
        found = ["=" * 80, f"Lost scores: {self.path}", "=" * 80, "Cause: evaluation", self.summary, "Evidence:"]
        found += [f"- {text}" for text in self.verdict["evidence"]]
        found += ["", "--- RECOMMENDATIONS ---"]
        found += recommendation_lines(self.verdict["recommendations"])
        return [printable(line) for line in found]


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Read the pairs of a list of lost trials, lines `score label pathA pathB`; DumpError if it is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DumpError(f"{path}: larger than {MAX_BYTES >> 20} MiB")
        lines = [columns_of(line) for line in path.read_text(**LIST_TEXT).splitlines() if line.strip()]
    except OSError as error:
        raise DumpError(f"{path}: cannot be read: {error}") from error
    wrong = next((i for i, parts in enumerate(lines, 1) if len(parts) != 4), None)
    if wrong or not lines:
        raise DumpError(f"{path}:{wrong or 1}: expected 'score label pathA pathB'")
    return [(first, second) for _, _, first, second in lines]


def cover(pairs: list[tuple[str, str]]) -> list[str]:
    """Return few files that account for all pairs: repeatedly the file in most of the pairs that are left."""
    left, chosen = pairs, []
    while left:
        counts = Counter(file for pair in left for file in set(pair))
        worst = max(counts.values())
        # Of files in equally many pairs the one that stands in both places first: a bad file meets many others.
        file = min(name for name, count in counts.items() if count == worst)
        chosen.append(file)
        left = [pair for pair in left if file not in pair]
    return chosen


def describe_file(root: Path, name: str) -> tuple[str, int | None]:
    """Return what is wrong with a test file, in words, and its first bad sample, counted at its own rate."""
    path = str(root / name)
    if not is_there(path):
        return "no such file here", None
    found = measure(Source(path, path, {"test"}))
    if found.error:
        return f"cannot be used: {found.error}", None
    if found.bad:
        text = f"{plural(found.bad, 'sample')} with NaN or Inf, the first is sample {found.first_bad}"
        return text, found.first_bad
    return f"{SOUND} (peak {found.peak:.3g}), but the network gives NaN or Inf for it", None


def recorded_files(path: Path) -> list[str]:
    """The files whose embeddings were not finite, as the run's metrics.jsonl has them; [] if it does not say."""
    metrics, name = path.parent / "metrics.jsonl", NAME.fullmatch(path.name)
    if name is None or not metrics.is_file():
        return []
    listed, epoch = name[1], int(name[2])
    files: list[str] = []
    with open(metrics, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line) if '"nan_files"' in line else {}
            except json.JSONDecodeError:  # of a run that was killed as it wrote
                continue
            if isinstance(event, dict) and event.get("event") == "eval" and event.get("epoch") == epoch:
                of_list = event.get("lists", {}).get(listed, {}) if listed else event
                files = [str(file) for file in of_list.get("nan_files", [])]
    return files


def test_folder(path: Path, roots) -> Path:
    """The folder of the test files where it is now: that of their list, or test_path, in the run's config.yaml."""
    config = path.parent / "config.yaml"
    if not config.is_file():
        return Path()
    try:
        with open(config, encoding="utf-8") as file:
            settings = plain_yaml.load(file.read(plain_yaml.MOST_CHARACTERS + 1))
    except (yaml.YAMLError, OSError, ValueError) as error:
        raise DumpError(f"{config}: cannot be read: {first_line(error)}") from error
    settings = settings if isinstance(settings, dict) else {}
    lists, name, root = settings.get("test_list"), NAME.fullmatch(path.name), settings.get("test_path", ".")
    if isinstance(lists, dict) and lists:
        entry = lists.get((name and name[1]) or settings.get("best_list") or next(iter(lists)))
        root = entry.get("root", root) if isinstance(entry, dict) else root
    root = Path(str(root))
    for old, new in roots:
        if root.is_relative_to(old):
            return Path(new) / root.relative_to(old)
    return root


def analyse_trials(path, roots=()) -> EvaluationFault:
    """Analyse a file result/nan_trials_epoch_N.txt of a run; ``roots``: pairs (old, new) of folders that were moved.

    That of a list E which does not decide is nan_trials_E_epoch_N.txt.
    """
    path = Path(path)
    pairs = read_pairs(path)
    name = NAME.fullmatch(path.name)
    root = test_folder(path, roots)
    recorded = recorded_files(path)
    files = recorded or candidates(pairs)
    found = [(file, *(describe_file(root, file) if i < LOOKED_AT else ("", None))) for i, file in enumerate(files)]
    bad = [file for file, text, _ in found if text and not text.startswith(SOUND)]
    counts = Counter(file for pair in pairs for file in set(pair))
    evidence = [f"{file}: {plural(counts[file], 'trial')}; {text}" for file, text, _ in found[:LOOKED_AT]]
    evidence += [f"... and {len(files) - LOOKED_AT} more files"] if len(files) > LOOKED_AT else []
    if recorded:
        evidence.append("the embeddings of these files were not finite (metrics.jsonl)")
    left = [pair for pair in pairs if not set(pair) & set(bad)]
    when = f" of epoch {name[2]}" if name else ""
    lost = f"{plural(len(pairs), 'trial')}{when} got no finite score"
    if bad and not left:
        blame = f"{plural(len(bad), 'file')} with bad audio account{'s' if len(bad) == 1 else ''} for all of them"
    elif bad:
        blame = f"{plural(len(bad), 'file')} cannot be used, but {plural(len(left), 'trial')} had files that read fine"
    else:
        blame = "the files read fine: the network gives NaN or Inf for sound audio (its weights, or a layer)"
    places = [{"path": str(root / file), "sample": sample} for file, _, sample in found]
    verdict = {
        "file": str(path),
        "reason": None,
        "cause": "evaluation",
        "detail": "nonfinite" if any(sample is not None for *_, sample in found) else "nonfinite_embedding",
        "location": {
            **dict.fromkeys(("module", "op", "source", "parameter", "rank")),
            "phase": "data",
            "rows": [],
            "files": places,
        },
        "evidence": evidence,
        "replay": {"reproduced": None, "seconds": 0.0},
        "recommendations": advice_on(bad, left, len(pairs), path),
    }
    return EvaluationFault(path, verdict, f"{lost}; {blame}.", len(pairs))


def candidates(pairs) -> list[str]:
    """The fewest files that account for all pairs; of two that stand in the same pairs both."""
    chosen = cover(pairs)
    members: dict[str, set] = {}
    for index, pair in enumerate(pairs):
        for file in pair:
            members.setdefault(file, set()).add(index)
    twins = [other for file in chosen for other in members if other not in chosen and members[other] == members[file]]
    return [*chosen, *dict.fromkeys(twins)]


def advice_on(bad: list[str], left: list, lost: int, path: Path) -> list[dict]:
    """What to do: leave bad files out; if sound files lost scores, look at the network."""
    advice = []
    if bad:
        more = ", ..." if len(bad) > 5 else ""
        text = f"repair these files, or remove their trials: {', '.join(bad[:5])}{more}"
        outcome = f"{lost - len(left)} of {lost} lost scores are of trials with them"
        advice.append(recommendation(text, "exclude_file", {"files": bad}, None if left else True, outcome))
    if left or not bad:
        folder = path.parent.parent
        text = f"analyse the dumps in {folder / 'debug_nan'}, or evaluate an earlier checkpoint of {folder / 'model'}"
        outcome = f"{len(left) or lost} lost scores are of files that read fine; leaving them out would hide the fault"
        advice.append(recommendation(text, "restore", None, None, outcome))
    return advice
