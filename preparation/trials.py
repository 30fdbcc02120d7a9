"""Who is kept out of training, and the trials of them."""

import collections
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from corpus.lists import read_trials
from errors import UsageError, plural
from preparation.corpora import Utterance
from preparation.outputs import write_rows
from scoring.held_out import make_trials
from scoring.intervals import MIN_SPEAKERS

FEWEST_PEOPLE = 4  # two to train on, two for the trials
SHARE, MOST_HELD_OUT = 0.2, 100  # of the people by default
TARGETS_EACH, MOST_TARGETS = 100, 10_000  # target trials of a person, and in all
# VoxCeleb1's lists: name, and trials.
OFFICIAL = {
    "veri_test2.txt": ("O", 37_611),
    "list_test_all2.txt": ("E", 579_818),
    "list_test_hard2.txt": ("H", 550_894),
    "veri_test.txt": ("O_uncleaned", 37_720),
    "list_test_all.txt": ("E_uncleaned", 581_480),
    "list_test_hard.txt": ("H_uncleaned", 552_536),
}


def official_lists(folders: list[Path]) -> dict[str, Path]:
    """VoxCeleb1's trial lists {name: path} in the folders or one below; UsageError for a list that is not whole."""
    found = {}
    for folder in folders:
        for file, (name, count) in OFFICIAL.items():
            path = next((p for p in (folder / file, *sorted(folder.glob(f"*/{file}"))) if p.is_file()), None)
            if path is None or name in found:
                continue
            trials = len(read_trials(path)[0])
            if trials != count:
                raise UsageError(f"{path}: has {trials} trials, VoxCeleb1-{name} has {count}: copy it again")
            found[name] = path
    return found


@dataclass
class Division:
    """Who trains and who is tested: recordings to train on, {name: trial list}, and what to say of them."""

    train: list[Utterance]
    trials: dict[str, Path]
    said: str

    def of_train(self) -> str:
        """How much there is to train on."""
        people = len({utterance.speaker for utterance in self.train})
        return f"{plural(len(self.train), 'recording')} of {plural(people, 'person')}"

    def facts(self) -> list[tuple[str, str]]:
        """(term, text) for the page."""
        said = [line.partition(": ")[2].partition(" (")[0] for line in self.said.splitlines()]
        return [("To train on", self.of_train()), *(("To test on", line) for line in said)]


def divide(good: list[Utterance], folders: list[Path], path: Path, share: float, seed: int, own=None) -> Division:
    """Divide the people: official lists that are at hand say who is tested, else trials are drawn and go to ``path``.

    ``own`` {name: trials} are those that a corpus brings as tables of its own; they are written beside ``path``.
    """
    official = official_lists(folders)
    for name, rows in (own or {}).items():
        official[name] = path.with_name(f"trials_{name}.txt")
        write_rows(official[name], rows)
    if official:
        return _by_official(good, official)
    tested, apart, why = held_out(good, share, np.random.default_rng(seed))
    trials, how = trials_of([utterance for utterance in good if utterance.speaker in tested], seed)
    write_rows(path, trials)
    targets = sum(label for label, *_ in trials)
    said = f"{path}: {plural(len(trials), 'trial')} of {len(tested)} other people, {why}; {targets} of one person"
    train = [u for u in good if u.speaker not in tested and not (apart and u.part == "test")]
    return Division(train, {"trials": path}, said + (f" ({how})" if how else ""))


def _by_official(good: list[Utterance], official: dict[str, Path]) -> Division:
    """Train on all who are in none of the lists; a list that leaves nobody is not used."""
    listed, train, lines, used = {utterance.listed for utterance in good}, good, [], {}
    for name, path in official.items():
        people, line = check_official(path, name, listed)
        left = [u for u in train if u.speaker not in people and u.part != "test"]
        if left:
            train, used[name] = left, path
        else:
            line = f"{title(name)}: not used, for all who are left to train on are in it"
        lines.append(f"{path}: {line}")
    if not used:
        raise UsageError("\n".join([*lines, "prepare_data.py: nobody is left to train on: give VoxCeleb2 too"]))
    return Division(train, used, "\n".join(lines))


def title(name: str) -> str:
    """'VoxCeleb1-O' of 'O'; a list that a corpus brings has its name."""
    return f"VoxCeleb1-{name}" if name in dict(OFFICIAL.values()) else name


def check_official(path: Path, name: str, listed: set[str]) -> tuple[set[str], str]:
    """(people of an official list, a line on those of its files that are not at hand)."""
    _, first, second = read_trials(path)
    files = set(first) | set(second)
    missing = files - listed
    if len(missing) == len(files):
        raise UsageError(f"{path}: none of its {plural(len(files), 'file')} is at hand, such as {min(missing)}")
    people = {file.partition("/")[0] for file in files}
    known = ", the known number" if name in dict(OFFICIAL.values()) else ""
    note = f"{title(name)}: {len(first)} trials{known}, of {plural(len(people), 'person')}"
    return people, note + (f"; {len(missing)} of its files are not at hand" if missing else "")


def held_out(utterances: list[Utterance], share: float, rng) -> tuple[set[str], bool, str]:
    """(people for the trials, whether the corpus sets them apart, why they): those it does, or a share at random."""
    counts = collections.Counter(utterance.speaker for utterance in utterances)
    able = sorted(name for name, count in counts.items() if count > 1)
    parts = {}
    for utterance in utterances:
        parts.setdefault(utterance.part or "train", set()).add(utterance.speaker)
    test, train = parts.get("test", set()), parts.get("train", set())
    if test and not share and test.isdisjoint(train) and len(test.intersection(able)) > 1 and len(train) > 1:
        return test, True, "whom the corpus sets apart"
    count = max(2, round((share or SHARE) * len(counts)))
    if not share:
        count = min(max(count, min(MIN_SPEAKERS, len(counts) // 3)), MOST_HELD_OUT)
    if share and len(counts) >= FEWEST_PEOPLE and len(able) > 1 and len(counts) - count < 2:
        raise UsageError(
            f"prepare_data.py: --share {share:g}: {count} of {len(counts)} people for the trials leave "
            f"{len(counts) - count} to train on; wanted: at least 2, so at most --share "
            f"{math.floor(100 * (len(counts) - 2) / len(counts)) / 100:g}"
        )
    if len(counts) < FEWEST_PEOPLE or len(able) < 2 or len(counts) - count < 2:
        raise UsageError(
            f"prepare_data.py: {plural(len(counts), 'person')} with usable recordings, {len(able)} of them with more "
            f"than one; wanted: at least {FEWEST_PEOPLE}, two of them with two recordings"
        )
    return set(rng.choice(able, min(count, len(able)), replace=False).tolist()), False, "drawn at random"


def trials_of(utterances: list[Utterance], seed: int) -> tuple[list[tuple[int, str, str]], str]:
    """([(label, path, path)], how they were drawn): as many of one person as of two.

    Both sides of a target trial are of two sessions where a person has several, and nontarget trials are of people of
    one gender where it is known.
    """
    speakers = sorted({utterance.speaker for utterance in utterances})
    number = {name: i for i, name in enumerate(speakers)}
    labels = np.array([number[utterance.speaker] for utterance in utterances])
    gender = {}
    for utterance in utterances:
        gender.setdefault(utterance.speaker, utterance.gender)
    groups = [gender[name] for name in speakers]
    several = collections.Counter(groups)
    if any(several[group] < 2 for group in several if group):  # a man among women has nobody to be held against
        groups = [""] * len(speakers)
    pairs = min(MOST_TARGETS, sum(_possible(utterances)))
    try:
        drawn = make_trials(
            labels, [u.listed for u in utterances], pairs, seed, sessions=[u.session for u in utterances], kinds=groups
        )
    except ValueError as error:
        raise UsageError(f"prepare_data.py: {error}") from error
    across = sum(len(sessions) > 1 for sessions in _sessions(utterances).values())
    how = [f"{across} of the {len(speakers)} people across sessions"] if across else []
    how += ["nontargets of one gender"] if len(set(groups)) > 1 else []
    return [(int(label), a, b) for label, a, b in zip(*drawn)], ", ".join(how)


def _sessions(utterances) -> dict[str, collections.Counter]:
    sessions = {}
    for utterance in utterances:
        sessions.setdefault(utterance.speaker, collections.Counter())[utterance.session] += 1
    return sessions


def _possible(utterances):
    """How many target trials there can be of each person, at most ``TARGETS_EACH``."""
    for sessions in _sessions(utterances).values():
        total = sessions.total()
        same = sum(count * (count - 1) // 2 for count in sessions.values())
        pairs = total * (total - 1) // 2
        yield min(pairs - same if len(sessions) > 1 else pairs, TARGETS_EACH)
