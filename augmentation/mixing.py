"""Recordings that are added to a crop: what noise, music and babble share."""

from augmentation.ranges import counts, decibels
from augmentation.waveforms import energy, gain_for, mix


class Mixed:
    """Adds ``count`` recordings of a category, each at a signal-to-noise ratio in dB drawn from ``snr``."""

    category = ""  # folder of musan_path

    def __init__(self, snr, count):
        self.snr, self.count = decibels("snr", snr), counts("count", count)

    def draw(self, x, rng, sounds) -> list[dict]:
        """Draw recordings, their places and levels."""
        there = sounds.count(self.category)
        count = min(int(rng.integers(self.count[0], self.count[1] + 1)), there)
        if not count:
            return []
        numbers = rng.choice(there, count, replace=False).tolist() if count > 1 else [int(rng.integers(there))]
        signal, draws = energy(x), []
        for number in numbers:
            snr, position = float(rng.uniform(*self.snr)), rng.random()
            noise, draw = sounds.crop(self.category, number, len(x), position)
            if noise is not None:
                draw |= {"snr_db": snr, "gain": gain_for(signal, noise, snr)}
                if not draw["gain"]:
                    draw["reason"] = "silent"
                    sounds.note_silence(noise, draw["path"])
            draws.append({"kind": self.category, **draw})
        return draws

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Add the recording."""
        return mix(x, sounds.noise(draw["path"], len(x), draw["start"]), draw["gain"])
