"""What a calibration was learnt on, and in what a recording at hand differs from it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from corpus.acoustics import Acoustics, listen_to
from corpus.audio import SAMPLE_RATE, AudioError

MOST_FILES = 400  # that are listened to
SHARES = (5, 95)  # percentiles that the range of a measure lies between
# Measure -> (name, unit, what a unit is in the measure's own, share of the lower end that is still alike, of the upper
# end, dB below the lower end, dB above the upper end). More length and less noise are alike at any time within reason.
MEASURES = {
    "seconds": ("length", "s", 1.0, 0.5, 4.0, 0.0, 0.0),
    "level": ("level", "dB", 1.0, 1.0, 1.0, 10.0, 10.0),
    "snr": ("SNR", "dB", 1.0, 1.0, np.inf, 6.0, 0.0),
    "bandwidth": ("bandwidth", "kHz", 1000.0, 0.8, 1.25, 0.0, 0.0),
    "rate": ("rate", "kHz", 1000.0, 1.0, np.inf, 0.0, 0.0),
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
        for name, (title, unit, scale, least, most, below, above) in MEASURES.items():
            (low, high), value = self.ranges[name], getattr(recording, name)
            highest = np.inf if most == np.inf else high * most + above
            if not low * least - below <= value <= highest:
                ends = f"{low / scale:.3g} to {high / scale:.3g}" if low != high else f"{low / scale:.3g}"
                found.append(f"{title} {value / scale:.3g} {unit} ({ends} {unit})")
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
