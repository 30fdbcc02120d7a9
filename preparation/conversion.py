"""Recordings that are written anew: m4a as flac, parts of files, speech without silence around it, noise in pieces."""

import collections
import functools
import importlib.util
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from corpus.audio import AudioError
from corpus.decode import Recording, native, reading
from corpus.folders import find_recordings
from corpus.measuring import scan
from corpus.tars import binary, is_member
from errors import UsageError, plural
from preparation.corpora import Utterance
from preparation.findings import Sound
from preparation.journal import Journal, stamp
from preparation.tree import unlink
from storage.files import WriteError, write_atomically

CONVERTED = (".m4a", ".aac", ".webm", ".wma", ".mp4")  # what libsndfile does not read
SLACK = 0.1  # seconds that a part may end behind its file
PIECE_SECONDS = 5.0  # of noise


def write_anew(
    utterances: list[Utterance], among: list[Utterance], tree: Path, journal: Journal, workers: int
) -> dict[str, Sound]:
    """Convert what libsndfile does not read, cut parts of files to flac, and copy members of tar files, below ``tree``.

    Changes their paths. What was made of the same part of the same file is left. No name is that of another of
    ``among``. Returns {path: sound with its error} of those that cannot be read; their paths stay.
    """
    wanted = [u for u in utterances if u.is_part or u.path.lower().endswith(CONVERTED) or is_member(u.path)]
    _make_room([u for u in among if not u.path.startswith(os.path.join(tree, ""))], wanted, tree, journal)
    if not wanted:
        return {}
    first = next((u.path for u in wanted if u.path.lower().endswith(CONVERTED)), "")
    if first and importlib.util.find_spec("av") is None and shutil.which("ffmpeg") is None:
        raise UsageError(f"{first}: ffmpeg or PyAV is needed to convert it: pip install av")
    for speaker in {utterance.speaker for utterance in wanted}:
        unlink(tree / speaker)
    failed, stems = {}, collections.Counter(os.path.splitext(u.listed)[0] for u in among)
    for utterance in wanted:
        stem, ending = os.path.splitext(utterance.name)
        if stems[f"{utterance.speaker}/{stem}"] > 1:  # 1.m4a and 1.wav
            _clear(tree / utterance.speaker / stem, journal)  # the place is for the other's
            utterance.name = f"{stem}~{ending[1:]}{ending}"
    for utterance, written in scan(wanted, workers, functools.partial(_anew, tree=tree, journal=journal), "converted"):
        stem = os.path.splitext(utterance.name)[0]
        if isinstance(written, Sound):
            channel = f"@channel {utterance.channel}" if utterance.channel else ""
            utterance.path += f"{channel}@{utterance.start:g}" if utterance.is_part else ""
            failed[utterance.path] = written
        else:
            key, made = _made_of(utterance, tree)
            if journal.get(key) != [*made, written.suffix]:
                journal.add(key, [*made, written.suffix])
            utterance.path, utterance.name = str(written), stem + written.suffix
            utterance.start, utterance.seconds, utterance.channel = 0.0, 0.0, 0
    return failed


def _made_of(utterance: Utterance, tree: Path) -> tuple[str, list]:
    """The key of the file that is made of an utterance, and what tells it from one of another source or part."""
    key = f"made|{tree / os.path.splitext(utterance.listed)[0]}"
    channel = [utterance.channel] if utterance.channel else []
    return key, [stamp(utterance.path), utterance.start, utterance.seconds, *channel]


def _make_room(utterances: list[Utterance], wanted: list[Utterance], tree: Path, journal: Journal):
    """Take away what an earlier call made at the places of files that are used as they are, as of 1.wav after 1.m4a."""
    made = set(map(id, wanted))
    for utterance in utterances:
        place = tree / os.path.splitext(utterance.listed)[0]
        if id(utterance) not in made and journal.get(f"made|{place}") is not None:
            unlink(tree / utterance.speaker)
            _clear(place, journal)


def _clear(place: Path, journal: Journal):
    """Take away what an earlier call made at a place, which is given without its ending."""
    made = journal.get(f"made|{place}")
    if made is not None:
        for ending in {".flac", ".wav", made[-1]}:
            place.with_name(place.name + ending).unlink(missing_ok=True)


def _anew(utterance: Utterance, tree: Path, journal: Journal) -> "Path | Sound":
    place = tree / os.path.splitext(utterance.listed)[0]
    key, made = _made_of(utterance, tree)
    *before, ending = journal.get(key) or [""]
    if before == made and (there := place.with_name(place.name + ending)).is_file():
        return there
    for ending in (".flac", ".wav"):
        place.with_name(place.name + ending).unlink(missing_ok=True)
    if not utterance.is_part and not utterance.path.lower().endswith(CONVERTED):
        return copy_member(utterance.path, place.with_name(place.name + os.path.splitext(utterance.path)[1]))
    try:
        return write_part(utterance.path, place, utterance.start, utterance.seconds, utterance.channel)
    except AudioError as error:
        return Sound(error=str(error))


def copy_member(path: str, place: Path) -> "Path | Sound":
    """Write the bytes of a member of a tar file; a Sound with the error if they cannot be read."""
    try:
        with binary(path) as file:
            content = file.read()
    except OSError as error:
        return Sound(error=f"cannot be opened: {error.strerror}")
    place.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(place, content)
    return place


def write_part(path: str, place: Path, start: float = 0.0, seconds: float = 0.0, channel: int = 0) -> Path:
    """Write a recording, or ``seconds`` of it from ``start`` on, as flac at its own rate; AudioError if there is less.

    ``channel``, from 1, is the one that is written, 0 for all. ``place`` is the file without its ending. Samples beyond
    full scale or not finite are kept, as a wav of floats.
    """
    with Recording(path) as recording:
        rate = recording.rate
        if channel > recording.channels:
            raise AudioError(f"has {plural(recording.channels, 'channel')}, and no channel {channel}")
        with reading():
            if start or seconds:
                begin, frames = round(start * rate), recording.frames
                count = round(seconds * rate) if seconds else frames - begin
                if begin >= frames or begin + count > frames + SLACK * rate:
                    end = start + (seconds or 0)
                    raise AudioError(f"truncated: the part ends at {end:.2f} s, the recording at {frames / rate:.2f} s")
                x = recording.read(begin, min(count, frames - begin))
            else:
                x = np.concatenate(list(recording.blocks()))
    x = x[:, channel - 1 : channel] if channel else x
    whole = np.isfinite(x).all() and np.abs(x).max() <= 1 and x.shape[1] <= 8
    place = place.with_name(place.name + (".flac" if whole else ".wav"))
    write_sound(place, x, rate)
    return place


def write_sound(place: Path, x: np.ndarray, rate: int):
    """Write samples (samples, channels) as flac of 16 bit or as wav of floats, under a temporary name first."""
    part = place.with_name(f".{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".flac":
            soundfile.write(native(part), x, rate, format="FLAC", subtype="PCM_16")
        else:
            from scipy.io import wavfile  # a tenth of a second that --help does not need

            wavfile.write(part, rate, x)  # libsndfile writes the time into a wav of floats
        os.replace(part, place)
    except (OSError, soundfile.SoundFileError) as error:
        part.unlink(missing_ok=True)
        raise WriteError(place, getattr(error, "strerror", None) or str(error)) from error


def trim(utterances: list[Utterance], sounds: dict[str, Sound], tree: Path, journal: Journal, workers: int) -> int:
    """Write those with silence at an end without it, change their paths; returns how many."""
    wanted = []
    for utterance in utterances:
        sound = sounds[utterance.path]
        if sound.has_edges:
            utterance.start, utterance.seconds = sound.begin, sound.end - sound.begin
            wanted.append(utterance)
    for utterance in wanted:
        stem, ending = os.path.splitext(utterance.name)
        utterance.name = f"{stem}_trimmed{ending}"
    sources = [utterance.path for utterance in wanted]
    lengths = [utterance.seconds for utterance in wanted]
    failed = write_anew(wanted, utterances, tree, journal, workers)
    if failed:
        path, sound = next(iter(failed.items()))
        raise UsageError(f"{path}: has changed while it was read: {sound.error}")
    for utterance, source, seconds in zip(wanted, sources, lengths):
        sound = sounds[source]
        samples = round(seconds * sound.rate)
        sounds[utterance.path] = replace(sound, samples=samples, begin=0.0, end=seconds)
    return len(wanted)


def cut_noise(folder: str, out: Path, journal: Journal, workers: int) -> Path:
    """Cut the recordings of MUSAN into pieces of 5 s, so that one is read at once; returns the folder of the pieces."""
    sources = find_recordings(folder)
    if sources and all(path.stat().st_size < 4 * PIECE_SECONDS * 16000 for path in sources[:50]):
        return Path(folder)  # in pieces already
    target = out / "musan_split"
    stems = collections.Counter(path.with_suffix("") for path in sources)
    stems.update({place for path in sources for place in path.parents})  # beside a.wav may lie a.flac, or a folder a
    places = {
        path: target / (path if stems[path.with_suffix("")] > 1 else path.with_suffix("")).relative_to(folder)
        for path in sources
    }
    work = functools.partial(_cut, places=places, journal=journal)
    for path, key in scan(sources, workers, work, "cut"):
        if journal.get(key) != stamp(str(path)):
            journal.add(key, stamp(str(path)))
    wanted = set(places.values())
    for piece in list(target.rglob("*.flac")):
        if piece.parent not in wanted and piece.is_file():
            piece.unlink()  # of a recording that is gone
    return target


def _cut(path: Path, places: dict[Path, Path], journal: Journal) -> str:
    """Cut a recording unless it was; returns the key of its pieces."""
    place = places[path]
    key = f"cut|{place}"
    if place.is_dir() and journal.get(key) == stamp(str(path)):
        return key
    part = place.with_name(f".{place.name}.part")
    try:
        with Recording(path) as recording:
            rate = recording.rate
            size = round(PIECE_SECONDS * rate)
            pieces = [block for block in recording.blocks(size) if len(block) >= size // 2]
    except AudioError:
        return key  # the loader names it where it is asked for
    for number, block in enumerate(pieces):
        write_sound(part / f"{round(number * PIECE_SECONDS):05d}.flac", block, rate)
    shutil.rmtree(place, ignore_errors=True)
    if pieces:
        os.replace(part, place)
    return key
