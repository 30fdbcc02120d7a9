"""From corpora to all that a run needs, step by step; each step knows what an earlier call has done."""

import collections
import contextlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UsageError, plural
from preparation.archives import unpacked
from preparation.conversion import cut_noise, trim, write_anew
from preparation.corpora import Corpus, Reading, Utterance, merged
from preparation.findings import KINDS, Limits, Sound, find_faults, listen_to_all
from preparation.journal import Journal, alone_in
from preparation.layouts import read_corpus
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
    share: float = 0.0  # 0 for the default
    seed: int = 1
    workers: int = 1
    config: str = ""
    trim: bool = False
    musan: str = ""
    rirs: str = ""


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
    for path in order.inputs:
        if path.is_dir() and order.out.resolve().is_relative_to(path.resolve()):
            raise UsageError(f"--out: '{order.out}' lies inside of '{path}', whose recordings are read")
    with working_folder(order.out) as work, alone_in(work):
        journal = Journal(work / "files.jsonl")
        try:
            return _prepare(order, read_corpora(order, journal), journal)
        finally:
            journal.close()


def read_corpora(order: Order, journal: Journal) -> list[Corpus]:
    """Unpack what is packed, and read each corpus; a line says what it is."""
    corpora = []
    for path in order.inputs:
        corpus = read_corpus(unpacked(path, order.out, journal), order.reading)
        print(f"{path}: {corpus.said}", flush=True)
        corpora.append(corpus)
    if not any(corpus.utterances for corpus in corpora):
        raise UsageError("prepare_data.py: only noise, and no recordings of people: give a corpus of them too")
    return corpora


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
    utterances, tree = merged(corpora), order.out.absolute() / "wav"
    failed = write_anew(utterances, tree, order.workers)
    paths = sorted({utterance.path for utterance in utterances}.difference(failed))
    sounds = {**listen_to_all(paths, journal, order.workers), **failed}
    faults = find_faults(utterances, sounds, order.limits)
    write_bad_files(order.out / "bad_files.txt", [(shown(corpora, utterances[i]), *faults[i]) for i in faults])
    good = [utterance for i, utterance in enumerate(utterances) if i not in faults]
    if order.trim:
        print(f"{plural(trim(good, sounds, tree, order.workers), 'recording')} trimmed to the speech")
    root = root_of(good, tree)
    tested, apart, trials, said = choose_trials(order, good)
    train = [u for u in good if u.speaker not in tested and not (apart and u.part == "test")]
    write_rows(order.out / "train_list.txt", [(utterance.speaker, utterance.listed) for utterance in train])
    hours = sum(sounds[utterance.path].seconds for utterance in train) / 3600
    save_path = f"exps/{order.out.resolve().name}"
    keys = {"train_list": str(order.out / "train_list.txt"), "test_list": str(next(iter(trials.values())))}
    keys |= {"train_path": str(root), "test_path": str(root), "save_path": save_path}
    base = base_of(order.config, hours)
    write_config(order.out / "config.yaml", base, keys | noise_keys(order, corpora, base))
    people = len({utterance.speaker for utterance in train})
    print(f"{order.out / 'train_list.txt'}: {len(train)} recordings of {people} people to train on, {hours:.2f} hours")
    print(said)
    tell_faults(order.out / "bad_files.txt", faults, len(utterances))
    print("next:")
    for line in commands(order.out / "config.yaml", save_path):
        print(f"  {line}")
    return 0


def choose_trials(order: Order, good: list[Utterance]) -> tuple[set[str], bool, dict[str, Path], str]:
    """(people kept out of training, whether what a corpus sets apart is too, {name: trial list}, what to say).

    The official lists if they are at hand, else trials that are drawn.
    """
    official, lines, tested = official_lists(order.inputs), [], set()
    listed = {utterance.listed for utterance in good}
    for name, path in official.items():
        people, line = check_official(path, name, listed)
        tested |= people
        lines.append(f"{path}: {line}")
    if official:
        return tested, True, official, "\n".join(lines)
    tested, apart, why = held_out(good, order.share, np.random.default_rng(order.seed))
    path = order.out / "trials.txt"
    trials, how = trials_of([utterance for utterance in good if utterance.speaker in tested], order.seed)
    write_rows(path, trials)
    targets = sum(label for label, *_ in trials)
    said = f"{path}: {len(trials)} trials of {len(tested)} other people, {why}; {targets} of one person"
    return tested, apart, {"trials": path}, said + (f" ({how})" if how else "")


def noise_keys(order: Order, corpora: list[Corpus], base: Path) -> dict:
    """Keys of the augmentation: by what noise is given; without any, none of a configuration of ours."""
    musan = order.musan or next((corpus.musan for corpus in corpora if corpus.musan), "")
    rirs = order.rirs or next((corpus.rirs for corpus in corpora if corpus.rirs), "")
    if musan and not order.musan:
        musan = str(cut_noise(musan, order.out.absolute() / "noise", order.workers))
    if musan or rirs:
        return {"augment": True, "musan_path": musan, "rir_path": rirs}
    if order.config or "augment: true" not in base.read_text(encoding="utf-8"):
        return {}
    return {"augment": False, "musan_path": "", "rir_path": ""}


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
