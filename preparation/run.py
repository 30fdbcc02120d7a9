"""From corpora to all that a run needs, step by step; each step knows what an earlier call has done."""

import collections
import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from corpus.locks import folder_lock
from errors import UsageError, hours_text, plural
from preparation.archives import unpacked
from preparation.conversion import cut_noise, trim, write_anew
from preparation.corpora import Corpus, Reading, Utterance, keep_only, merged
from preparation.findings import KINDS, Limits, find_faults, listen_to_all
from preparation.journal import Journal
from preparation.layouts import read_corpus
from preparation.outputs import write_bad_files, write_run
from preparation.page import render
from preparation.shards import is_webdataset
from preparation.tree import root_of
from preparation.trials import divide
from storage.files import write_atomically


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
    initial_model: str = ""
    trim: bool = False
    vad: str = "energy"
    musan: str = ""
    rirs: str = ""
    sample_rate: int = 0  # 0 for that of the configuration


def prepare(order: Order) -> int:
    """Run every step; 0 done."""
    for path in order.inputs:
        if path.is_dir() and Path(os.path.realpath(order.out)).is_relative_to(os.path.realpath(path)):
            raise UsageError(f"--out: '{order.out}' lies inside of '{path}', whose recordings are read")
    busy = f"--out: another prepare_data.py writes into '{order.out}'"
    with working_folder(order.out) as work, folder_lock(work / "lock", busy):
        journal = Journal(work / "files.jsonl")
        try:
            return _prepare(order, read_corpora(order, journal), journal)
        finally:
            journal.close()


def read_corpora(order: Order, journal: Journal) -> list[Corpus]:
    """Unpack what is packed, and read each corpus; a line says what it is."""
    corpora = []
    for path in order.inputs:
        try:
            if path.is_dir():
                os.scandir(path).close()
            as_it_is = order.reading.layout in ("", "webdataset") and is_webdataset(path)
            folder = path if as_it_is else unpacked(path, order.out, journal)
            corpus = read_corpus(folder, replace(order.reading, unpacked=folder != path))
        except OSError as error:
            raise UsageError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error
        if order.reading.only and corpus.utterances:
            keep_only(corpus, order.reading.only)
        print(f"{path}: {corpus.said}", flush=True)
        corpora.append(corpus)
    if not any(corpus.utterances for corpus in corpora):
        if any(corpus.musan or corpus.rirs for corpus in corpora):
            raise UsageError("prepare_data.py: only noise, and no recordings of people: give a corpus of them too")
        raise UsageError("prepare_data.py: no recording of a person in what was given")
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
    failed = write_anew(utterances, utterances, tree, journal, order.workers)
    paths = sorted({utterance.path for utterance in utterances}.difference(failed))
    sounds = {**listen_to_all(paths, journal, order.workers, order.vad), **failed}
    faults = find_faults(utterances, sounds, order.limits)
    good = [utterance for i, utterance in enumerate(utterances) if i not in faults]
    bad = [(shown(corpora, utterances[i]), *faults[i]) for i in faults]
    write_bad_files(order.out / "bad_files.txt", bad)
    found = [(faults[i][0], utterances[i].path) for i in faults]
    tell_faults(order.out / "bad_files.txt", found, len(utterances))
    if order.trim:
        print(f"{plural(trim(good, sounds, tree, journal, order.workers), 'recording')} trimmed to the speech")
    own = {name: rows for corpus in corpora for name, rows in corpus.trials.items()}
    division = divide(good, order.inputs, order.out / "trials.txt", order.share, order.seed, own)
    root = root_of(good, tree)
    hours = sum(sounds[utterance.path].seconds for utterance in division.train) / 3600
    noise = {"musan": order.musan or given(corpora, "musan"), "rirs": order.rirs or given(corpora, "rirs")}
    if noise["musan"] and not order.musan:
        noise["musan"] = str(cut_noise(noise["musan"], order.out.absolute() / "noise", journal, order.workers))
    base = order.config, order.initial_model, order.sample_rate
    files = write_run(order.out, root, division, base, hours, noise)
    said = [corpus.said for corpus in corpora]
    page = render(files.name, said, good, sounds, bad, division.facts(), files.sample_rate)
    write_atomically(order.out / "set.html", page.encode("utf-8", "surrogateescape"))
    print(f"{files.train_list}: {division.of_train()} to train on, {hours_text(hours)}")
    print(division.said)
    print(f"{order.out / 'set.html'}: the page of the set")
    print("next:")
    for line in files.commands():
        print(f"  {line}")
    return 0


def given(corpora: list[Corpus], kind: str) -> str:
    """The folder of noise ("musan") or of impulse responses ("rirs") that a corpus is, '' if none is."""
    return next((folder for corpus in corpora if (folder := getattr(corpus, kind))), "")


def shown(corpora: list[Corpus], utterance: Utterance) -> str:
    """The path of an utterance below the one corpus, or in full among several."""
    path = Path(utterance.path)
    inside = len(corpora) == 1 and path.is_relative_to(corpora[0].root)
    return path.relative_to(corpora[0].root).as_posix() if inside else str(path)


def tell_faults(path: Path, found: list[tuple[str, str]], of: int):
    """Say how many files are left out, by kind, and where one that is missing was looked for; (kind, file) of each."""
    if not found:
        return
    counts = collections.Counter(kind for kind, _ in found)
    print(f"{path}: {len(found)} of {plural(of, 'file')} left out")
    for kind in KINDS:
        if counts[kind]:
            place = f", as {dict(reversed(found))[kind]}" if kind == "missing" else ""
            print(f"  {counts[kind]:6} {kind}: {KINDS[kind]}{place}")
