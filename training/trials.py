"""The trial lists of a run, each with its speakers and the numbers of its files."""

import os
from dataclasses import dataclass

import numpy as np

from config import Config
from corpus.lists import read_trials
from corpus.sources import TrialSource, trial_sources
from errors import UsageError
from scoring.intervals import trial_speakers
from training.subset import stratified_subset


@dataclass
class Trials:
    """A trial list: ``labels`` (N,), the paths of both sides as it gives them, ``speakers`` (N, 2) or None and why."""

    source: TrialSource
    labels: np.ndarray
    first: list[str]
    second: list[str]
    speakers: np.ndarray | None
    no_speakers: str

    @classmethod
    def read(cls, source: TrialSource, config: Config) -> "Trials":
        """Read a list, or ``max_test_pairs`` of it."""
        labels, first, second = read_trials(source.path)
        speakers, why = trial_speakers(labels, first, second)
        if config.max_test_pairs == 1:
            raise UsageError("max_test_pairs: 1 trial is of one class; take 0 for all, or at least 2")
        if config.max_test_pairs and config.max_test_pairs < len(labels):
            chosen = stratified_subset(labels, speakers, config.max_test_pairs, config.seed)
            labels = labels[chosen]
            first, second = [first[i] for i in chosen], [second[i] for i in chosen]
            speakers, why = trial_speakers(labels, first, second)
        return cls(source, labels, first, second, speakers, why)

    def files(self, root: str) -> dict[str, str]:
        """{path as the list gives it: path relative to ``root``, or absolute if it is not below it}."""
        paths = dict.fromkeys([*self.first, *self.second])
        if self.source.root == root:
            return {path: path for path in paths}
        inside = os.path.join(os.path.abspath(root), "")
        return {path: os.path.abspath(os.path.join(self.source.root, path)).removeprefix(inside) for path in paths}


def read_all(config: Config) -> list[Trials]:
    """The trial lists of a configuration; the first decides which model is the best."""
    return [Trials.read(source, config) for source in trial_sources(config)]


def numbered(lists: list[Trials]) -> tuple[list[str], list[np.ndarray]]:
    """(files of all lists, each once and sorted; for each list the file numbers of its trials (N, 2))."""
    root = lists[0].source.root
    of_lists = [trials.files(root) for trials in lists]
    files = sorted({path for names in of_lists for path in names.values()})
    number = {file: i for i, file in enumerate(files)}
    pairs = []
    for trials, names in zip(lists, of_lists):
        pairs.append(np.array([[number[names[a]], number[names[b]]] for a, b in zip(trials.first, trials.second)]))
    return files, pairs
