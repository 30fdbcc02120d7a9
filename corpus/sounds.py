"""Recordings that are mixed into speech: whole, mono, at its rate, cut from a pack or read from their own files.

A crop is cut from the whole recording as it is at that rate. ``read_noise`` and ``read_rir`` make it again from the
file alone, bit for bit, wherever the pack has gone.
"""

import collections
import copy
import os
import threading

import numpy as np

from augmentation.waveforms import SILENT_POWER, energy
from config import SAMPLE_RATE
from corpus.audio import AudioError, read_crop, wrap_pad
from corpus.decode import Recording
from corpus.sound_pack import Pack

# Containers in which a crop has the bits that it has in the whole recording.
EXACT = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC"}

MOST_DECODED = 1 << 26  # samples: 256 MB of each process


class Sounds:
    """Recordings by number, at ``sample_rate``.

    ``channel``: "mix", or "1" for impulse responses. ``pack`` has them in the same order.
    """

    def __init__(self, paths, channel: str = "mix", pack: Pack | None = None, sample_rate: int = SAMPLE_RATE):
        # An array, not a list of objects: forked workers would copy such a list page by page.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.channel, self.pack, self.sample_rate = channel, pack, sample_rate

    def __len__(self):
        return len(self.paths)

    def path(self, number: int) -> str:
        """The file of a recording."""
        return os.fsdecode(self.paths[number])

    def crop(self, number: int, samples: int, position: float) -> tuple[np.ndarray, int]:
        """Cut a crop at ``position`` in [0, 1) -> ((samples,) float32, its first sample); AudioError."""
        stored = None if self.pack is None else self.pack.stored(number)
        if stored is None:
            x, start = read_noise(self.path(number), samples, position, sample_rate=self.sample_rate)
        else:
            x, start = _cut(stored, samples, position)
        if (stored is None or stored.dtype != np.int16) and not np.isfinite(x).all():
            raise AudioError("non-finite samples")
        return x, start

    def short(self, number: int, samples: int, start: int) -> np.ndarray | None:
        """The samples of a crop as a pack stores them, int16; None if none does."""
        stored = None if self.pack is None else self.pack.stored(number)
        whole = stored is not None and stored.dtype == np.int16 and len(stored) >= samples
        return stored[start : start + samples] if whole else None

    def response(self, number: int) -> np.ndarray:
        """An impulse response of unit energy, (samples,) float32; AudioError if it has none."""
        if self.pack is None:
            return read_rir(self.path(number), self.sample_rate)
        return unit_energy(_to_float(self.pack.stored(number)))


class Untouched(Sounds):
    """Recordings that are not read: a policy is tried on noise in the place of each."""

    def __init__(self, recordings: Sounds):
        self.paths, self.sample_rate, self.pack = recordings.paths, recordings.sample_rate, None

    def crop(self, number: int, samples: int, position: float) -> tuple[np.ndarray, int]:
        """As that of ``Sounds``, noise."""
        return np.random.default_rng(number).normal(0, 0.1, samples).astype(np.float32), 0

    def response(self, number: int) -> np.ndarray:
        """As that of ``Sounds``, decaying noise."""
        samples = self.sample_rate // 10
        return unit_energy(self.crop(number, samples, 0)[0] * np.geomspace(1, 1e-3, samples, dtype=np.float32))


def read_noise(
    path: str, samples: int, position: float = 0.0, start: int | None = None, sample_rate: int = SAMPLE_RATE
) -> tuple[np.ndarray, int]:
    """Cut a crop, at ``position`` in [0, 1) or from ``start`` on, of a whole recording at a rate -> (x, start)."""
    with Recording(path) as recording:
        exact = recording.rate == sample_rate and recording.format in EXACT
    if exact:
        crop = read_crop(path, samples, position, start=start, sample_rate=sample_rate)
        return crop.x, crop.start
    return _cut(_whole(path, "mix", sample_rate, _stamp(path)), samples, position, start)


def read_rir(path: str, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Read an impulse response, scaled to unit energy; of several channels the first."""
    return unit_energy(_whole(path, "1", sample_rate, _stamp(path)))


def _stamp(path: str) -> tuple:
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns


class Decoded:
    """Whole recordings, each decoded once while it is among the last of up to ``most`` samples together."""

    def __init__(self, most: int = MOST_DECODED):
        self.most, self.samples, self.lock = most, 0, threading.Lock()
        self.kept: collections.OrderedDict[tuple, np.ndarray] = collections.OrderedDict()

    def __call__(self, path: str, channel: str, sample_rate: int, stamp: tuple) -> np.ndarray:
        """A recording as it is now, which ``stamp`` says."""
        key = path, channel, sample_rate, stamp
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        x = read_crop(path, channel=channel, sample_rate=sample_rate).x
        with self.lock:
            self.samples += 0 if key in self.kept else len(x)
            self.kept[key] = x
            while self.samples > self.most:
                self.samples -= len(self.kept.popitem(last=False)[1])
        return x


_whole = Decoded()


def unit_energy(rir: np.ndarray) -> np.ndarray:
    """Scale an impulse response to unit energy; AudioError if it has none."""
    total = energy(rir)
    if not np.isfinite(total) or total < SILENT_POWER:
        raise AudioError("impulse response without energy" if np.isfinite(total) else "non-finite samples")
    return rir * np.float32(1 / np.sqrt(total))


def _cut(stored: np.ndarray, samples: int, position: float, start: int | None = None) -> tuple[np.ndarray, int]:
    wanted = min(samples, len(stored))
    start = int(position * (len(stored) - wanted + 1)) if start is None else min(start, len(stored) - wanted)
    return wrap_pad(_to_float(stored[start : start + wanted]), samples), start


def _to_float(stored: np.ndarray) -> np.ndarray:
    """Samples in [-1, 1] float32 of samples as they are stored, int16 or float32."""
    if stored.dtype == np.int16:
        x = stored.astype(np.float32)
        x *= np.float32(1 / 32768)
        return x
    return stored


class Files:
    """What ``apply`` of an augmentation gets when a row of a dump is made again: recordings by their paths."""

    def __init__(self, sample_rate: int = SAMPLE_RATE):
        self.sample_rate = sample_rate

    def noise(self, path: str, samples: int, start: int) -> np.ndarray:
        """A crop (samples,) from ``start`` on of a recording; AudioError."""
        return read_noise(path, samples, start=start, sample_rate=self.sample_rate)[0]

    def rir(self, path: str) -> np.ndarray:
        """An impulse response of unit energy; AudioError."""
        return read_rir(path, self.sample_rate)


class Surroundings:
    """What ``draw`` and ``apply`` of an augmentation get while training: the recordings by category and number.

    The categories are the folders of ``musan_path``, and "rir". ``unusable`` are (event kind, file, reason).
    """

    def __init__(
        self,
        noise: dict[str, list[str]],
        rirs: list[str],
        pack: Pack | None,
        rir_pack: Pack | None,
        sample_rate: int = SAMPLE_RATE,
    ):
        self.sample_rate = sample_rate
        self.recordings = Sounds([path for files in noise.values() for path in files], "mix", pack, sample_rate)
        self.rirs = Sounds(rirs, "1", rir_pack, sample_rate)
        ends = np.cumsum([0, *map(len, noise.values())]).tolist()
        self.ranges = {category: (ends[i], ends[i + 1]) for i, category in enumerate(noise)}
        self.kept, self.unusable = {}, []

    def untouched(self) -> "Surroundings":
        """The same recordings by number, none of which is read."""
        other = copy.copy(self)
        other.recordings, other.rirs = Untouched(self.recordings), Untouched(self.rirs)
        other.kept, other.unusable = {}, []
        return other

    def count(self, category: str) -> int:
        """How many recordings a category has."""
        first, end = self.ranges.get(category, (0, 0))
        return len(self.rirs) if category == "rir" else end - first

    def crop(self, category: str, number: int, samples: int, position: float) -> tuple[np.ndarray | None, dict]:
        """Cut a crop at ``position`` in [0, 1) -> (x, {path, start}), or (None, {path, reason})."""
        number += self.ranges[category][0]
        path = self.recordings.path(number)
        try:
            x, start = self.recordings.crop(number, samples, position)
        except AudioError as error:
            return None, self._refused(path, error)
        self.kept[path, samples, start] = x, number
        return x, {"path": path, "start": start}

    def response(self, number: int) -> tuple[np.ndarray | None, dict]:
        """An impulse response of unit energy -> (rir, {path}), or (None, {path, reason})."""
        path = self.rirs.path(number)
        try:
            self.kept[path] = self.rirs.response(number)
        except AudioError as error:
            return None, self._refused(path, error)
        return self.kept[path], {"path": path}

    def _refused(self, path: str, error: AudioError) -> dict:
        self.unusable.append(("augmentation", path, str(error)))
        return {"path": path, "reason": str(error)}

    def note_silence(self, noise: np.ndarray, path: str):
        """Take note of a recording that adds nothing, if it is one."""
        if energy(noise) / len(noise) < SILENT_POWER:
            self.unusable.append(("silent noise", path, "a silent crop, adds nothing"))

    def noise(self, path: str, samples: int, start: int) -> np.ndarray:
        """As that of ``Files``; the crop was drawn just now."""
        return self.kept[path, samples, start][0]

    def stored(self, path: str, samples: int, start: int) -> np.ndarray:
        """As ``noise``, or the same samples times 32768 as int16, if a pack has them so."""
        x, number = self.kept[path, samples, start]
        short = self.recordings.short(number, samples, start)
        return x if short is None else short

    def rir(self, path: str) -> np.ndarray:
        """As that of ``Files``."""
        return self.kept[path]
