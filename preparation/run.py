"""From corpora to all that a run needs, step by step; each step knows what an earlier call has done."""

import collections
import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UsageError, plural
from preparation.corpora import Corpus, Reading, Utterance, merged
from preparation.findings import KINDS, Limits, Sound, find_faults, listen_to_all
from preparation.folders import read_folder
from preparation.journal import Journal, alone_in
from preparation.outputs import base_of, commands, write_bad_files, write_config, write_rows
from preparation.tree import root_of
from preparation.trials import check_official, held_out, official_lists, trials_of


@dataclass(frozen=True)
class Order:
    """What the command line asks for."""

    inputs: list[Path]
    out: Path
    reading: Reading
    limits: Limits
    share: float  # 0 for the default
    seed: int
    workers: int
    config: str


@dataclass
class Prepared:
    """What came of it."""

    corpora: list[Corpus]
    utterances: list[Utterance]  # of all corpora
    sounds: dict[str, Sound]
    faults: dict[int, tuple[str, str]]  # number of an utterance -> kind, detail
    train: list[Utterance]
    held_out: set[str]
    trials: dict[str, Path]  # name of a trial list -> its file, the first for the configuration


def prepare(order: Order) -> int:
    """Run every step; 0 done."""
    corpora = [read_folder(path, order.reading) for path in order.inputs]
    for corpus in corpora:
        print(f"{corpus.root}: {corpus.said}", flush=True)
    with working_folder(order.out) as work, alone_in(work):
        journal = Journal(work / "files.jsonl")
        try:
            return _prepare(order, corpora, journal)
        finally:
            journal.close()


@contextlib.contextmanager
def working_folder(out: Path):
    """The folder below ``out`` for what is known so far."""
    folder = out / ".prepared"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot make '{error.filename}': {error.strerror}") from error
    yield folder


def _prepare(order: Order, corpora: list[Corpus], journal: Journal) -> int:
    utterances = merged(corpora)
    paths = sorted({utterance.path for utterance in utterances})
    sounds = listen_to_all(paths, journal, order.workers)
    faults = find_faults(utterances, sounds, order.limits)
    write_bad_files(order.out / "bad_files.txt", [(shown(corpora, utterances[i]), *faults[i]) for i in faults])
    good = [utterance for i, utterance in enumerate(utterances) if i not in faults]
    root = root_of(good, order.out / "wav")
    tested, trials, said = choose_trials(order, good)
    train = [utterance for utterance in good if utterance.speaker not in tested]
    write_rows(order.out / "train_list.txt", [(utterance.speaker, utterance.listed) for utterance in train])
    hours = sum(sounds[utterance.path].seconds for utterance in train) / 3600
    save_path = f"exps/{order.out.resolve().name}"
    keys = {"train_list": str(order.out / "train_list.txt"), "test_list": str(next(iter(trials.values())))}
    keys |= {"train_path": str(root), "test_path": str(root), "save_path": save_path}
    write_config(order.out / "config.yaml", base_of(order.config, hours), keys)
    people = len({utterance.speaker for utterance in train})
    print(f"{order.out / 'train_list.txt'}: {len(train)} recordings of {people} people to train on, {hours:.2f} hours")
    print(said)
    tell_faults(order.out / "bad_files.txt", faults, len(utterances))
    print("next:")
    for line in commands(order.out / "config.yaml", save_path):
        print(f"  {line}")
    return 0


def choose_trials(order: Order, good: list[Utterance]) -> tuple[set[str], dict[str, Path], str]:
    """(people kept out of training, {name: trial list}, what to say): official lists at hand, else trials drawn."""
    official, lines, tested = official_lists(order.inputs), [], set()
    listed = {utterance.listed for utterance in good}
    for name, path in official.items():
        people, line = check_official(path, name, listed)
        tested |= people
        lines.append(f"{path}: {line}")
    if official:
        return tested, official, "\n".join(lines)
    tested, why = held_out(good, order.share, np.random.default_rng(order.seed))
    path = order.out / "trials.txt"
    trials, how = trials_of([utterance for utterance in good if utterance.speaker in tested], order.seed)
    write_rows(path, trials)
    targets = sum(label for label, *_ in trials)
    said = f"{path}: {len(trials)} trials of {len(tested)} other people, {why}; {targets} of one person"
    return tested, {"trials": path}, said + (f" ({how})" if how else "")


def shown(corpora: list[Corpus], utterance: Utterance) -> str:
    """The path of an utterance below the one corpus, or in full among several."""
    path = Path(utterance.path)
    inside = len(corpora) == 1 and path.is_relative_to(corpora[0].root)
    return path.relative_to(corpora[0].root).as_posix() if inside else str(path)


def tell_faults(path: Path, faults: dict[int, tuple[str, str]], of: int):
    """Say how many files are left out, by kind."""
    if not faults:
        return
    counts = collections.Counter(kind for kind, _ in faults.values())
    print(f"{path}: {len(faults)} of {plural(of, 'file')} left out")
    for kind in KINDS:
        if counts[kind]:
            print(f"  {counts[kind]:6} {kind}: {KINDS[kind]}")
