"""What a corpus is to the rest of this room: utterances of people, and the trials that it brings."""

import collections
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from corpus.lists import LIST_TEXT
from errors import UsageError

SPLITS = {"train": "train", "dev": "train", "val": "train", "valid": "train", "validation": "train"}
SPLITS |= {"test": "test", "eval": "test", "evaluation": "test"}
GENDERS = {"f": "f", "female": "f", "w": "f", "woman": "f", "female_feminine": "f"}
GENDERS |= {"m": "m", "male": "m", "man": "m", "male_masculine": "m"}
NAMED = 10  # names that are said
UNSAFE = re.compile(r'[/\\:*?"<>|\x00-\x1f]')  # what no system's file name may hold


@dataclass(slots=True)
class Utterance:
    """A recording of a person, or a part of one.

    ``name`` is its path below the person's folder in the lists, ``session`` the occasion it is from ('' if unknown),
    ``gender`` 'f', 'm' or '', ``part`` 'train', 'test' or '' if the corpus leaves it open. ``seconds`` is 0 for all
    that follows ``start``; ``channel``, from 1, is the one that is his, 0 for all.
    """

    path: str
    speaker: str
    name: str
    session: str = ""
    gender: str = ""
    part: str = ""
    start: float = 0.0
    seconds: float = 0.0
    channel: int = 0

    @property
    def is_part(self) -> bool:
        """Whether it is less than its file."""
        return bool(self.start or self.seconds or self.channel)

    @property
    def listed(self) -> str:
        """Its path in the lists."""
        return f"{self.speaker}/{self.name}"


@dataclass
class Corpus:
    """Utterances below ``root``, and what was recognised, in a line; trial lists and folders of noise it brings."""

    layout: str
    root: Path
    said: str
    utterances: list[Utterance] = field(default_factory=list)
    musan: str = ""
    rirs: str = ""
    trials: dict[str, list[tuple[int, str, str]]] = field(default_factory=dict)  # its own {name: [(label, path, path)]}


@dataclass(frozen=True)
class Reading:
    """What the command line says on how a corpus is to be read."""

    layout: str = ""  # '' to have it recognised
    speaker_level: int = 0  # 0 to have it found
    speaker_pattern: str = ""
    only: str = ""  # a list of the utterances to take
    work: str = ""  # folder to write recordings to that lie in tables
    unpacked: bool = False  # whether the first level of folders is that of archives, which are no people


def children_of(folder: Path) -> list[Path]:
    """The folders in a folder that are not hidden, sorted; none of one that cannot be read.

    ``find_recordings`` says which cannot.
    """
    try:
        with os.scandir(folder) as entries:  # asks the system about no file, of which there may be a million
            found = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
    except PermissionError:
        return []
    return [folder / name for name in found]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def gender_of(text: str) -> str:
    """'f', 'm' or '' of a word of a table."""
    return GENDERS.get(text.strip().lower(), "")


def as_folder(speaker: str) -> str:
    """A speaker's name as the name of a folder that every system can have."""
    return UNSAFE.sub("_", speaker).strip(" .") or "_"


class FolderNames:
    """Speakers as names of folders, no two of them the same: `a/b` and `a_b` are two people."""

    def __init__(self):
        self.given: dict[str, str] = {}
        self.taken: set[str] = set()

    def of(self, speaker: str, shown: str = "") -> str:
        """The folder of a speaker; ``shown`` is to be seen of a long name."""
        if speaker not in self.given:
            free, number = as_folder(shown or speaker), 1
            while free in self.taken:
                number += 1
                free = f"{as_folder(shown or speaker)}~{number}"
            self.given[speaker] = free
            self.taken.add(free)
        return self.given[speaker]


def part_of(above) -> str:
    """'train', 'test' or '' by the names of folders above a speaker, as dev, test-clean or vox1_dev_wav."""
    words = [word for name in above for word in re.split(r"[-_.]", name.lower())]
    return next((SPLITS[word] for word in words if word in SPLITS), "")


def merged(corpora: list[Corpus]) -> list[Utterance]:
    """The utterances of all corpora, sorted as they are listed, no two at one place.

    A speaker's name that occurs in several corpora gets that of the corpus in front: two people, as far as is known. A
    line says which names.
    """
    owners = collections.Counter(name for corpus in corpora for name in {u.speaker for u in corpus.utterances})
    several = {name for name, count in owners.items() if count > 1}
    names, found = _prefixes(corpora, set(owners), several), []
    for corpus, prefix in zip(corpora, names):
        for utterance in corpus.utterances:
            if utterance.speaker in several:
                utterance.speaker = f"{prefix}-{utterance.speaker}"
            found.append(utterance)
    if several:
        shown = ", ".join(sorted(several)[:NAMED]) + (" .." if len(several) > NAMED else "")
        example = " and ".join(f"{prefix}-{min(several)}" for prefix in names if prefix)
        what = "name is" if len(several) == 1 else "names are"
        print(f"{len(several)} {what} in several corpora, taken for different people: {shown}; listed as {example}")
    found.sort(key=lambda u: (u.speaker, u.name, u.path, u.start))
    taken, numbers = set(), {}
    for utterance in found:
        (stem, ending), place = os.path.splitext(utterance.name), utterance.listed
        number = numbers.get(place, 1)  # those below are taken
        while utterance.listed in taken:  # as of train/ann/1.wav and test/ann/1.wav
            number += 1
            utterance.name = f"{stem}~{number}{ending}"
        numbers[place] = number
        taken.add(utterance.listed)
    return found


def _prefixes(corpora: list[Corpus], names: set[str], several: set[str]) -> list[str]:
    """A prefix for each corpus, '' if none is needed: its folder, that with the one above it, or that with a number.

    No two are the same, and none makes a name that somebody else has.
    """
    given, roots = [], collections.Counter(as_folder(corpus.root.name) for corpus in corpora)
    for corpus in corpora:
        own = several.intersection(utterance.speaker for utterance in corpus.utterances)
        if not own:
            given.append("")
            continue
        prefix = as_folder(corpus.root.name)
        if roots[prefix] > 1:
            prefix = f"{as_folder(corpus.root.parent.name)}-{prefix}"
        free, number = prefix, 1
        while free in given or names.intersection(f"{free}-{name}" for name in own):
            number += 1
            free = f"{prefix}{number}"
        given.append(free)
    return given


def keep_only(corpus: Corpus, path: str):
    """Keep the utterances of a list, as VoxBlink's utt_clean, lines id00000-VIDEO-00001 or id00000/VIDEO/00001.wav."""
    try:
        lines = Path(path).read_text(**LIST_TEXT).splitlines()
    except OSError as error:
        raise UsageError(f"--only: cannot read '{path}': {error.strerror}") from error

    def key(name):
        return re.sub(r"\.\w{2,4}$", "", name.strip()).replace("/", "-")

    chosen = set(map(key, lines))
    before, corpus.utterances = len(corpus.utterances), [u for u in corpus.utterances if key(u.listed) in chosen]
    if before and not corpus.utterances:
        raise UsageError(f"--only: '{path}' names none of the {before} recordings of '{corpus.root}'")
    corpus.said += f"; {len(corpus.utterances)} of them by --only"
