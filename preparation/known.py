"""Corpora by their own folders: VoxCeleb, VoxBlink, CN-Celeb, LibriSpeech, and the noise of MUSAN and RIRS_NOISES."""

import collections
import os
import re
from pathlib import Path

from corpus.folders import find_recordings
from corpus.lists import LIST_TEXT, numbered_lines
from errors import UsageError, plural
from preparation.corpora import Corpus, Reading, Utterance, children_of, gender_of, part_of

VOX = re.compile(r"id\d{5,6}$")  # VoxCeleb1 and 2, VoxBlink, CN-Celeb
LIBRI = re.compile(r"(train|dev|test)-(clean|other)")
RIRS = re.compile(r"(^|[^a-z])(b?rirs?|(room[-_ ]?)?impulse[-_ ]?responses?)([^a-z]|$)")  # names of their folders
DEEP = 4  # folders below the one given in which a layout is looked for


def folders_below(folder: Path, deep: int = DEEP):
    """The folder and those below it, level by level; of each level the first hundred, for there may be a million."""
    level = [folder]
    for _ in range(deep):
        yield from level
        level = [inner for outer in level for inner in _children(outer)][:100]


def _children(folder: Path) -> list[Path]:
    return children_of(folder)[:100]


# ---------------------------------------------------------------------------------------------- VoxCeleb, VoxBlink


def is_voxceleb(folder: Path) -> bool:
    """Whether there are folders id10001/VIDEO/."""
    return any(VOX.match(inner.name) and _children(inner) for inner in folders_below(folder))


def read_voxceleb(folder: Path, reading: Reading) -> Corpus:
    """VoxCeleb1, VoxCeleb2 or VoxBlink: id10001/VIDEO/00001.wav below any folders; the video is the session."""
    genders = _vox_genders(folder)
    found, others = {}, 0
    for path in find_recordings(folder):
        parts = path.relative_to(folder).parts
        at = next((i for i, part in enumerate(parts[:-1]) if VOX.match(part)), None)
        if at is None:
            others += 1
            continue
        speaker, name = parts[at], "/".join(parts[at + 1 :])
        utterance = Utterance(
            str(path), speaker, name, "/".join(parts[at + 1 : -1]), genders.get(speaker, ""), part_of(parts[:at])
        )
        key = f"{speaker}/{name.rpartition('.')[0]}"
        if key not in found or path.suffix.lower() != ".m4a":  # the same as wav, beside it
            found[key] = utterance
    if not found:
        raise UsageError(f"prepare_data.py: no id10001/VIDEO/FILE below '{folder}'")
    utterances = list(found.values())
    people = len({utterance.speaker for utterance in utterances})
    said = f"{_vox_name(utterances)}: {plural(len(utterances), 'recording')}, {plural(people, 'person')}"
    said += f"; {plural(others, 'recording')} in no folder of a person left out" if others else ""
    return Corpus("voxceleb", folder, said, utterances)


def _vox_name(utterances) -> str:
    first = {utterance.speaker[:3] for utterance in utterances}
    if any(len(utterance.speaker) > 7 for utterance in utterances):
        return "VoxBlink2"
    return {frozenset(["id1"]): "VoxCeleb1", frozenset(["id0"]): "VoxCeleb2"}.get(frozenset(first), "VoxCeleb layout")


def _vox_genders(folder: Path) -> dict[str, str]:
    """Gender of each speaker by vox1_meta.csv, vox2_meta.csv or VoxBlink's spk2gender, in the folder or below it."""
    genders = {}
    for inner in folders_below(folder, 3):
        for name in ("vox1_meta.csv", "vox2_meta.csv", "spk2gender"):
            if os.path.isfile(inner / name):
                for line in (inner / name).read_text(**LIST_TEXT).splitlines():
                    cells = [cell.strip() for cell in re.split(r"[,\t ]+", line.strip())]
                    if VOX.match(cells[0]):
                        genders[cells[0]] = next(filter(None, map(gender_of, cells[1:])), "")
    return genders


# -------------------------------------------------------------------------------------------------------- CN-Celeb


def is_cnceleb(folder: Path) -> bool:
    """Whether there is a folder data/ with id00000/singing-01-001.flac."""
    for inner in folders_below(folder, 3):
        data = inner / "data"
        person = next((p for p in _children(data) if VOX.match(p.name)), None) if os.path.isdir(data) else None
        if person is not None and any(re.match(r"[a-z_]+-\d+-\d+\.", p) for p in os.listdir(person)):
            return True
    return False


def read_cnceleb(folder: Path, reading: Reading) -> Corpus:
    """CN-Celeb 1 and 2: data/id00000/GENRE-SESSION-NUMBER.flac to train on, and eval/ with the trials of its lists.

    Without eval/, who is not in dev/dev.lst is for tests.
    """
    lists = [p for inner in folders_below(folder, 3) if os.path.isfile(p := inner / "dev" / "dev.lst")]
    trained = {name for path in lists for name in path.read_text(**LIST_TEXT).split()}
    table = next(
        (p for inner in folders_below(folder, 3) if os.path.isfile(p := inner / "eval" / "lists" / "trials.lst")), None
    )
    utterances = []
    for path in find_recordings(folder):
        inside, home = path.parent.name, path.parent.parent
        if VOX.match(inside) and home.name == "data":
            known = home.parent.name.startswith("CN-Celeb2") or not trained or inside in trained
            if known or table is None:  # else eval/ has him
                session = path.stem.rpartition("-")[0]
                utterances.append(Utterance(str(path), inside, path.name, session, "", "train" if known else "test"))
        elif home.name == "eval" and table is not None and inside in ("enroll", "test"):
            speaker, _, name = path.name.partition("-")
            session = name.rpartition("-")[0] if inside == "test" else ""
            utterances.append(Utterance(str(path), speaker, f"{inside}/{path.name}", session, "", "test"))
    people = len({utterance.speaker for utterance in utterances})
    genres = len({utterance.session.partition("-")[0] for utterance in utterances if utterance.session})
    said = f"CN-Celeb: {plural(len(utterances), 'recording')}, {plural(people, 'person')}, {plural(genres, 'genre')}"
    trials = {"CN-Celeb": _cnceleb_trials(table, utterances)} if table is not None else {}
    return Corpus("cnceleb", folder, said, utterances, trials=trials)


def _cnceleb_trials(table: Path, utterances: list[Utterance]) -> list[tuple[int, str, str]]:
    """Trials of lines 'id00800-enroll test/id00800-singing-01-001.wav 1', by the places of the utterances."""
    place = {Path(u.path).stem: u.listed for u in utterances if u.part == "test"}
    trials = []
    for number, columns in numbered_lines(table):
        names = [Path(name).stem for name in columns[:2]]
        if len(columns) != 3 or columns[2] not in ("0", "1") or any(name not in place for name in names):
            raise UsageError(f"{table}:{number}: expected 'ID-enroll test/FILE 0|1' of files in {table.parent.parent}")
        trials.append((int(columns[2]), place[names[0]], place[names[1]]))
    return trials


# ------------------------------------------------------------------------------------------------------ LibriSpeech


def is_librispeech(folder: Path) -> bool:
    """Whether there are folders such as train-clean-100/19/198/."""
    return any(
        LIBRI.match(inner.name) and any(p.name.isdigit() for p in _children(inner))
        for inner in folders_below(folder, 3)
    )


def read_librispeech(folder: Path, reading: Reading) -> Corpus:
    """LibriSpeech: SUBSET/SPEAKER/CHAPTER/FILE, the chapter is the session; dev and test subsets are for tests."""
    genders = {}
    table = next((p for inner in folders_below(folder, 3) if os.path.isfile(p := inner / "SPEAKERS.TXT")), None)
    for line in table.read_text(**LIST_TEXT).splitlines() if table else ():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 2 and cells[0].isdigit():
            genders[cells[0]] = gender_of(cells[1])
    utterances, subsets = [], collections.Counter()
    for path in find_recordings(folder):
        parts = path.relative_to(folder.parent).parts
        at = next((i for i, part in enumerate(parts[:-2]) if LIBRI.match(part)), None)
        if at is not None:
            speaker = parts[at + 1]
            part = "train" if parts[at].startswith("train") else "test"
            session = "/".join(parts[at + 2 : -1])
            name = "/".join(parts[at + 2 :])
            utterances.append(Utterance(str(path), speaker, name, session, genders.get(speaker, ""), part))
            subsets[parts[at]] += 1
    people = len({utterance.speaker for utterance in utterances})
    said = (
        f"LibriSpeech: {plural(len(utterances), 'recording')}, {plural(people, 'person')}, {', '.join(sorted(subsets))}"
    )
    return Corpus("librispeech", folder, said, utterances)


# ------------------------------------------------------------------------------------------------------------ noise


def is_musan(folder: Path) -> bool:
    """Whether there are folders music/, noise/ and speech/ side by side."""
    return any({"music", "noise", "speech"} <= {p.name for p in _children(inner)} for inner in folders_below(folder, 2))


def read_musan(folder: Path, reading: Reading) -> Corpus:
    """MUSAN, or noise in its folders."""
    found = next(p for p in folders_below(folder, 2) if {"music", "noise", "speech"} <= {q.name for q in _children(p)})
    return Corpus("musan", folder, "MUSAN: noise, music and babble to augment with", musan=str(found))


def is_rirs(folder: Path) -> bool:
    """Whether it is RIRS_NOISES: a folder simulated_rirs/ or one of real ones; or a folder that is named for such."""
    return bool(_rirs(folder)) or bool(RIRS.search(folder.name.lower()))


def _rirs(folder: Path) -> list[Path]:
    names = ("simulated_rirs", "real_rirs_isotropic_noises")
    return sorted((p for p in folders_below(folder, 3) if p.name in names), key=lambda p: p.name != names[0])


def read_rirs(folder: Path, reading: Reading) -> Corpus:
    """RIRS_NOISES: its simulated impulse responses, or its real ones, or all of a folder named for them."""
    found = next(iter(_rirs(folder)), folder)
    said = f"RIRS_NOISES: room impulse responses of {found.name} to augment with"
    if found == folder:
        said = "room impulse responses by its name, to augment with (--corpus folder if they are people)"
    return Corpus("rirs", folder, said, rirs=str(found))
