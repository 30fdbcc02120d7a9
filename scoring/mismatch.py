"""What a calibration was learnt on, and in what a recording at hand differs from it."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from corpus.acoustics import Acoustics, listen_to
from corpus.audio import SAMPLE_RATE, AudioError

MOST_FILES = 400  # that are listened to
SHARES = (5, 95)  # percentiles that the range of a measure lies between


class Measure(NamedTuple):
    """How a measure of ``Acoustics`` is shown, and how far from a range of it a recording may be and still be alike."""

    title: str
    unit: str
    scale: float = 1.0  # of the unit in that of ``Acoustics``
    least: float = 1.0  # times the lower end
    most: float = 1.0  # times the upper end
    below: float = 0.0  # dB under the lower end
    above: float = 0.0  # dB over the upper end

    def covers(self, ends: tuple, value: float) -> bool:
        """Whether a value is alike to a range of ``ends`` (low, high)."""
        highest = math.inf if self.most == math.inf else ends[1] * self.most + self.above
        return ends[0] * self.least - self.below <= value <= highest


MEASURES = {
    "seconds": Measure("length", "s", least=0.5, most=4.0),
    "level": Measure("level", "dB", below=10.0, above=10.0),
    "snr": Measure("SNR", "dB", below=6.0, most=math.inf),
    "bandwidth": Measure("bandwidth", "kHz", 1000.0, least=0.8, most=1.25),
    "rate": Measure("rate", "kHz", 1000.0, most=math.inf),
}


@dataclass(frozen=True)
class Heard:
    """The recordings that a calibration was learnt on: range (low, high) of each of ``MEASURES``, codecs, files."""

    ranges: dict
    codecs: tuple
    files: int

    @classmethod
    def of(cls, recordings: list[Acoustics]) -> "Heard":
        """Of recordings: for each measure its 5th and 95th percentile."""
        ranges = {}
        for name in MEASURES:
            values = [getattr(recording, name) for recording in recordings]
            ranges[name] = tuple(float(end) for end in np.percentile(values, SHARES))
        return cls(ranges, tuple(sorted({recording.codec for recording in recordings})), len(recordings))

    @classmethod
    def in_files(cls, paths, channel: str = "mix", sample_rate: int = SAMPLE_RATE, vad: str = "none"):
        """Of audio files, or ``MOST_FILES`` of them; None if none of those can be read."""
        paths = sorted(paths)
        chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, MOST_FILES).astype(int))] if paths else []

        def listen(path):
            try:
                return listen_to(path, channel, sample_rate, vad)
            except AudioError:
                return None

        with ThreadPoolExecutor(4) as pool:
            found = [acoustics for acoustics in pool.map(listen, chosen) if acoustics is not None]
        return cls.of(found) if found else None

    def unlike(self, recording: Acoustics) -> list[str]:
        """In what a recording differs from them, as 'length 1 s (2.9 to 4.5 s)'."""
        found = []
        for name, measure in MEASURES.items():
            (low, high), value, unit = self.ranges[name], getattr(recording, name), measure.unit
            if not measure.covers((low, high), value):
                low, high, value = (number / measure.scale for number in (low, high, value))
                ends = f"{low:.3g} to {high:.3g}" if low != high else f"{low:.3g}"
                found.append(f"{measure.title} {value:.3g} {unit} ({ends} {unit})")
        if recording.codec not in self.codecs:
            found.append(f"codec {recording.codec} ({', '.join(self.codecs)})")
        return found

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {"ranges": {k: list(v) for k, v in self.ranges.items()}, "codecs": self.codecs, "files": self.files}

    @classmethod
    def from_dict(cls, values: dict) -> "Heard":
        """What ``to_dict`` gave; ValueError, KeyError or TypeError for anything else."""
        ranges = {name: tuple(float(end) for end in values["ranges"][name]) for name in MEASURES}
        if not all(len(ends) == 2 and np.isfinite(ends).all() for ends in ranges.values()):
            raise ValueError("ranges of what was heard that are none")
        return cls(ranges, tuple(map(str, values["codecs"])), int(values["files"]))
