"""Recordings that are added to a crop: what noise, music and babble share."""

from augmentation.operations import OnDevice, Operation, added
from augmentation.ranges import counts, decibels
from augmentation.waveforms import energy, gain_for, mix


class Mixed(OnDevice):
    """Adds ``count`` recordings of a category, each at a signal-to-noise ratio in dB drawn from ``snr``."""

    category = ""  # folder of musan_path

    def __init__(self, snr, count):
        self.snr, self.count = decibels("snr", snr), counts("count", count)

    def choose(self, samples, rng, sounds) -> list[dict]:
        """Draw recordings, their places and ratios."""
        there = sounds.count(self.category)
        least, most = self.count
        count = min(least if least == most else int(rng.integers(least, most + 1)), there)
        if not count:
            return []
        numbers = rng.choice(there, count, replace=False).tolist() if count > 1 else [int(rng.integers(there))]
        draws, (lowest, highest) = [], self.snr
        for number in numbers:
            snr, position = lowest + (highest - lowest) * rng.random(), rng.random()
            noise, draw = sounds.crop(self.category, number, samples, position)
            if noise is not None:
                draw["snr_db"] = snr
            draws.append({"kind": self.category, **draw})
        return draws

    def measure(self, x, draws, sounds):
        """Find the factor of each recording."""
        signal = energy(x)
        for draw in draws:
            if "reason" in draw:
                continue
            noise = sounds.noise(draw["path"], len(x), draw["start"])
            draw["gain"] = gain_for(signal, noise, draw["snr_db"])
            if not draw["gain"]:
                draw["reason"] = "silent"
                sounds.note_silence(noise, draw["path"])

    @staticmethod
    def apply(x, draw: dict, sounds):
        """Add the recording."""
        return mix(x, sounds.noise(draw["path"], len(x), draw["start"]), draw["gain"])

    def operation(self, draw, samples, sounds) -> Operation:
        """Add the recording."""
        place = draw["path"], samples, draw["start"]
        noise = sounds.noise(*place)
        found = added(draw, noise, sounds.stored(*place))
        if not found.number:
            sounds.note_silence(noise, draw["path"])
        return found
