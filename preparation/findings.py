"""What is measured of each file, read once, and the kinds of faults that keep one out of the lists."""

import functools
import hashlib
import math
import re
from dataclasses import dataclass, fields

import numpy as np

from corpus.audio import SILENT_DB
from corpus.measuring import Measure, Source, judge, measure, scan
from corpus.quality import HUGE, LOUD
from corpus.speech import DETECTORS, extent
from preparation.corpora import Utterance
from preparation.journal import Journal, stamp

# What keeps a file out: kind -> title, in the order of the page.
KINDS = {
    "missing": "is not there, or may not be read",
    "empty": "holds nothing",
    "not audio": "no recording of a known kind",
    "truncated": "ends before its header says",
    "wrong header": "the header contradicts itself",
    "damaged": "cannot be decoded to its end",
    "nonfinite": "NaN or Inf samples",
    "too loud": f"samples beyond {LOUD:g}, where full scale is 1",
    "silent": f"below {SILENT_DB:g} dBFS",
    "constant": "no sound, only an offset",
    "channels cancel": "channels in opposite phase: their mean is nearly silent",
    "clipped": "flat tops at full scale",
    "short": "shorter than --min_seconds",
    "long": "longer than --max_seconds",
    "little speech": "less speech than --min_speech",
    "two speakers": "the same audio under two speakers",
    "duplicate": "the same audio twice under one speaker",
    "name": "a name that no list can hold",
}
# How the reader's words tell kinds; the first that fits.
WORDS = (
    ("missing", r"no such file|cannot be opened|does not exist"),
    ("empty", r"^empty file|^no samples"),
    ("truncated", r"^truncated|^cut|promises \d+ .*(reading ends|there are)|shorter than"),
    ("wrong header", r"^a rate of|more than its size"),
    (
        "not audio",
        r"not a regular file|no recording of a known kind|libsndfile cannot read it|no sound in it|Format not recogni",
    ),
)
EDGE = 0.1  # seconds of silence at an end that --trim leaves
CLIPPED = 0.01  # share of samples in flat tops at full scale


@dataclass(slots=True)
class Sound(Measure):
    """A measure with the hash of the audio, the power without the offset, and where speech is (seconds)."""

    hash: str = ""
    varying: float = 0.0  # power without the mean
    speech: float = 0.0  # seconds
    begin: float = 0.0  # of the speech, with a margin
    end: float = 0.0

    @property
    def level(self) -> float:
        """dB of full scale."""
        return 10 * math.log10(self.power) if self.power else -math.inf

    @property
    def has_edges(self) -> bool:
        """Whether there is silence to trim before or behind its speech."""
        return self.end > self.begin and (self.begin > EDGE or self.seconds - self.end > EDGE)


@dataclass(frozen=True)
class Limits:
    """What a file must have to be used: seconds, 0 for no limit; ``trim``: once the silence at its ends is cut off."""

    shortest: float = 0.5
    longest: float = 0.0
    speech: float = 0.0
    trim: bool = False


def listen(path: str, vad: str = "energy") -> Sound:
    """Read a whole file once and measure all that the lists and the page need; ``vad`` is a name of ``DETECTORS``."""
    detector, audio = DETECTORS[vad](), hashlib.blake2b(digest_size=16)

    def watch(rate, block):
        detector.add(rate, block)
        audio.update(np.ascontiguousarray(block, np.float32))

    measured = measure(Source(path, path, {"train"}), watch)
    sound = Sound(**{f.name: getattr(measured, f.name) for f in fields(measured)})
    if sound.error:
        return sound
    spans = detector.spans()
    sound.hash = audio.hexdigest()
    sound.varying = max(sound.power - sound.mean**2, 0.0)
    sound.speech = sum(end - begin for begin, end in spans)
    sound.begin, sound.end = extent(spans)
    sound.end = min(sound.end, sound.seconds)
    return sound


def listen_to_all(paths: list[str], journal: Journal, workers: int, vad: str = "energy") -> dict[str, Sound]:
    """Sound of each file {path: sound}; what the journal knows already is not read again."""
    before = "" if vad == "energy" else f"{vad}|"
    keys = {path: before + stamp(path) for path in paths}
    new = [path for path in paths if journal.get(keys[path]) is None]
    for path, sound in scan(new, workers, functools.partial(listen, vad=vad), of=len(paths)):
        journal.add(keys[path], [getattr(sound, name) for name in _names()])
    return {path: _restored(journal.get(keys[path])) for path in paths}


@functools.cache
def _names() -> list[str]:
    return [f.name for f in fields(Sound)]


def _restored(values: list) -> Sound:
    sound = Sound(**dict(zip(_names(), values)))
    sound.notes = [tuple(note) for note in sound.notes]
    return sound


def fault_of(sound: Sound, limits: Limits) -> tuple[str, str] | None:
    """(kind, detail) of what keeps a file out of the lists, or None."""
    if sound.error:
        kind = next((kind for kind, words in WORDS if re.search(words, sound.error)), "damaged")
        return kind, sound.error
    found = dict(judge(sound, {"train"}))
    if "nonfinite" in found or "silent" in found:
        kind = "nonfinite" if "nonfinite" in found else "silent"
        return kind, found[kind]
    if "huge" in found or "loud" in found:
        return "too loud", f"largest sample {sound.peak:.6g}" + (f", beyond {HUGE:g}" if "huge" in found else "")
    if sound.varying < 10 ** (SILENT_DB / 10):
        return "constant", f"mean {sound.mean:.3g} all along"
    if "channels cancel" in found:
        return "channels cancel", found["channels cancel"]
    if sound.flat > CLIPPED:
        return "clipped", f"{100 * sound.flat:.2g} % of the samples"
    left = sound.end - sound.begin if limits.trim and sound.has_edges else sound.seconds
    said = f"{left:.2f} s" + (f" of {sound.seconds:.2f} s once it is trimmed" if left < sound.seconds else "")
    if left < limits.shortest:
        return "short", said
    if limits.longest and left > limits.longest:
        return "long", said
    if limits.speech and sound.speech < limits.speech:
        return "little speech", f"{sound.speech:.2f} s of {sound.seconds:.2f} s"
    return None


def find_faults(utterances: list[Utterance], sounds: dict[str, Sound], limits: Limits) -> dict[int, tuple[str, str]]:
    """{number of an utterance: (kind, detail)} of those that are left out, duplicates among the others included."""
    found, same = {}, {}
    for i, utterance in enumerate(utterances):
        sound = sounds[utterance.path]
        fault = unlistable(utterance) or fault_of(sound, limits)
        if fault:
            found[i] = fault
        else:
            same.setdefault(sound.hash, []).append(i)
    for rows in same.values():
        if len(rows) < 2:
            continue
        first = utterances[rows[0]]
        stranger = next((utterances[i] for i in rows if utterances[i].speaker != first.speaker), None)
        if stranger is not None:  # nobody knows whose it is
            for i in rows:
                other = stranger if utterances[i].speaker == first.speaker else first
                found[i] = ("two speakers", f"the same audio as {other.listed}")
        else:
            for i in rows[1:]:
                found[i] = ("duplicate", f"the same audio as {first.listed}")
    return dict(sorted(found.items()))


def unlistable(utterance: Utterance) -> tuple[str, str] | None:
    """A fault of the name: a tab or a line break in it, or a space at its end, which a list cannot hold."""
    for cell in (utterance.speaker, utterance.listed):
        if re.search(r"[\t\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029\0]", cell) or cell != cell.strip():
            return "name", f"{cell!r}: rename it"
    return None
