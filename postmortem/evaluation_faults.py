"""Explain the scores that an evaluation lost: the fewest files that account for all of them, and their faults."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from corpus.audio import AudioError, read_audio
from corpus.lists import LIST_TEXT, columns_of
from errors import first_line
from postmortem.finding import plural
from postmortem.fixes import recommendation
from postmortem.report import recommendation_lines
from settings import plain_yaml
from storage.restricted import DumpError, printable

NAME = re.compile(r"nan_trials_epoch_(\d+)\.txt")
MAX_BYTES = 1 << 28


@dataclass
class EvaluationFault:
    """The result for a list of lost trials; ``verdict`` is the object that ``--json`` prints."""

    path: Path
    verdict: dict
    summary: str
    pairs: int

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
    """Return what is wrong with a test file, in words, and its first bad sample."""
    path = root / name
    if not path.is_file():
        return "no such file here", None
    try:
        audio, *_ = read_audio(path)
    except AudioError as error:
        return f"cannot be used: {error}", None
    wrong = np.flatnonzero(~np.isfinite(audio))
    if len(wrong):
        return f"{plural(len(wrong), 'sample')} with NaN or Inf, the first is sample {wrong[0]}", int(wrong[0])
    return f"the file is finite (peak {np.abs(audio).max():.3g}), but the network gives NaN or Inf for it", None


def analyse_trials(path) -> EvaluationFault:
    """Analyse a file result/nan_trials_epoch_N.txt of a run."""
    path = Path(path)
    pairs = read_pairs(path)
    config = path.parent / "config.yaml"
    root = Path()
    if config.is_file():
        try:
            with open(config, encoding="utf-8") as file:
                settings = plain_yaml.load(file.read(plain_yaml.MOST_CHARACTERS + 1))
        except (yaml.YAMLError, OSError, ValueError) as error:
            raise DumpError(f"{config}: cannot be read: {first_line(error)}") from error
        root = Path(str(settings.get("test_path", "."))) if isinstance(settings, dict) else root
    files = cover(pairs)
    found = [(name, *(describe_file(root, name) if i < 20 else ("", None))) for i, name in enumerate(files)]
    counts = Counter(file for pair in pairs for file in set(pair))
    evidence = [f"{name}: {plural(counts[name], 'trial')}; {text}" for name, text, _ in found[:20]]
    evidence += [f"... and {len(files) - 20} more files"] if len(files) > 20 else []
    more = ", ..." if len(files) > 5 else ""
    text = f"repair these files, or remove their trials: {', '.join(files[:5])}{more}"
    outcome = f"all {len(pairs)} lost scores are of trials with them"
    advice = recommendation(text, "exclude_file", {"files": files}, True, outcome)
    places = [{"path": str(root / name), "sample": sample} for name, _, sample in found]
    location = dict.fromkeys(("module", "op", "source", "parameter", "rank"))
    verdict = {
        "file": str(path),
        "reason": None,
        "cause": "evaluation",
        "detail": "nonfinite" if any(sample is not None for *_, sample in found) else "nonfinite_embedding",
        "location": {**location, "phase": "data", "rows": [], "files": places},
        "evidence": evidence,
        "replay": {"reproduced": None, "seconds": 0.0},
        "recommendations": [advice],
    }
    epoch = NAME.fullmatch(path.name)
    when = f" of epoch {epoch[1]}" if epoch else ""
    blame = "1 file accounts" if len(files) == 1 else f"{len(files)} files account"
    summary = f"{plural(len(pairs), 'trial')}{when} got no finite score; {blame} for all of them."
    return EvaluationFault(path, verdict, summary, len(pairs))
