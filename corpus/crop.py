"""The origin of a row of a batch, enough to make it again: written by the loader, kept in dumps, read by the replay."""

import functools
import pickle
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path

import numpy as np

from config import KEYS, SAMPLE_RATE
from corpus.audio import NORMAL, AudioError, read_crop
from corpus.augmentation import apply_draws, values_of_dumps
from corpus.list_lines import stamp_of
from corpus.pack import HEADER, Pack
from corpus.tars import is_member
from errors import UsageError


@dataclass
class Crop:
    """A crop of a recording, with everything that was drawn for it.

    ``line`` is that of the list, ``start`` the first sample counted at the file's own ``rate``, ``speed`` that of a
    speed copy. ``augment`` holds a dict for each augmentation: its kind, file and draws, or the ``reason`` why it could
    not be used. ``replaced`` are files that could not be used in its place. ``peak`` and ``rms`` are of the row, the
    second of one that is dumped.
    ``pack`` is the folder of a pack that it was read from, as its ``pack_row``, whose samples have the checksum
    ``pack_crc``; ``list_path`` the list, if a run has several. The row is at ``sample_rate``.
    """

    path: str
    line: int = 0
    start: int = 0
    rate: int = SAMPLE_RATE
    speed: float = 1.0
    channel: str = "mix"
    utterance: int | None = None
    augment: list[dict] = field(default_factory=list)
    replaced: list[dict] = field(default_factory=list)
    peak: float = 0.0
    rms: float | None = None
    pack: str = ""
    pack_row: int = 0
    pack_crc: int = -1  # not known, of an older dump
    list_path: str = ""
    sample_rate: int = SAMPLE_RATE  # of a dump that does not say it too
    refused: str = ""  # why it must not be made again, set by who reads a dump

    @classmethod
    def from_dict(cls, info: dict) -> "Crop":
        """Read what ``to_dict`` wrote; keys of other versions are left out."""
        known = {part.name for part in fields(cls)}
        return cls(**{name: value for name, value in info.items() if name in known})

    def to_dict(self) -> dict:
        """The crop as a dump holds it."""
        info = dict(vars(self))  # not ``asdict``, whose copies take longer than the draws
        del info["refused"]
        if not self.replaced:
            del info["replaced"]
        if self.rms is None:
            del info["rms"]
        if self.utterance is None:
            del info["utterance"]
        if not self.pack:
            del info["pack"], info["pack_row"], info["pack_crc"]
        if not self.list_path:
            del info["list_path"]
        if self.sample_rate == SAMPLE_RATE:
            del info["sample_rate"]
        return info

    @property
    def place(self) -> str:
        """Where the list names it."""
        return f"{self.list_path}:{self.line}" if self.list_path else f"list line {self.line}"

    @property
    def draws(self) -> list[dict]:
        """The augmentations that were applied."""
        return [draw for draw in self.augment if "reason" not in draw]

    def load(self, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Read the crop again: (as it is in the file, with its augmentation), each (samples,) float32.

        A crop of a pack is read from it while it has the same recording there, and else from the file.
        AudioError if one of its files cannot be read or a value is not one that a crop has, or if it is ``refused``.
        """
        if self.refused:
            raise AudioError(self.refused)
        with values_of_dumps("the crop"):
            return self._load(samples)

    def _load(self, samples: int) -> tuple[np.ndarray, np.ndarray]:
        low, high = KEYS["sample_rate"].low, KEYS["sample_rate"].high
        if not low <= self.sample_rate <= high:  # an absurd one makes an absurd filter
            raise AudioError(f"a row at {self.sample_rate} Hz, which no run has")
        opened = self._packed() if self.pack else None
        for path in (*([] if opened else [self.path]), *(draw["path"] for draw in self.draws if "path" in draw)):
            if not is_there(path):  # a dump may name anything: pipes and devices are not opened
                raise AudioError(f"no such file: {path}")
        speed = Fraction(self.speed).limit_denominator(100) if self.speed != 1.0 else NORMAL
        how = {"channel": str(self.channel), "opened": opened, "sample_rate": self.sample_rate}
        clean = read_crop(self.path, samples, start=int(self.start), speed=speed, **how).x
        with np.errstate(over="ignore", invalid="ignore"):
            return clean, apply_draws(clean, self.augment, self.sample_rate)

    def _packed(self):
        """The recording in the pack that it was read from, None if only the file is left; AudioError without both."""
        try:
            pack = _opened(self.pack, stamp_of(Path(self.pack, HEADER)))
            row, crc = self.pack_row, self.pack_crc
            if row < len(pack) and self.path.endswith(pack.paths[row]) and crc in (-1, int(pack.index["crc"][row])):
                return pack.recording(row, self.path)
            reason = f"{self.pack} was written anew"
        except (UsageError, OSError) as error:
            reason = f"and its pack: {error}"
        if not is_there(self.path):
            raise AudioError(f"no such file: {self.path}; {reason}")
        return None

    def sample_in_file(self, index: int) -> int:
        """Sample of the file, at its own rate, that sample ``index`` of the crop was made from."""
        return int(self.start) + round(index * self.rate / self.sample_rate * self.speed)

    def second_in_file(self, index: int) -> float:
        """Second of the file that sample ``index`` of the crop was made from."""
        return self.start / self.rate + index / self.sample_rate * self.speed


def is_there(path: str) -> bool:
    """Whether there is such a file, or such a member of a tar file."""
    return Path(path).is_file() or is_member(path)


@functools.lru_cache(maxsize=4)
def _opened(folder: str, stamp) -> Pack:
    """A pack as it is now, by the ``stamp`` of its header: the rows of a dump are made again one by one."""
    return Pack(folder)


class Provenance:
    """The origins of a batch's rows, a dict each as ``Crop.to_dict`` gives it, to be read and set like a list.

    They cross from a loader process as one record that is opened only if somebody asks: few batches are dumped, and
    torch would look through each dict of each for tensors to pin.
    """

    def __init__(self, files: list[dict] | bytes):
        self.files = files

    def __reduce__(self):
        packed = self.files if isinstance(self.files, bytes) else pickle.dumps(self.files, pickle.HIGHEST_PROTOCOL)
        return Provenance, (packed,)

    def opened(self) -> list[dict]:
        """The dicts themselves."""
        if isinstance(self.files, bytes):
            self.files = pickle.loads(self.files)
        return self.files

    def __len__(self):
        return len(self.opened())

    def __getitem__(self, row):
        return self.opened()[row]

    def __setitem__(self, row: int, info: dict):
        self.opened()[row] = info

    def __eq__(self, other):
        return self.opened() == list(other)

    __hash__ = None
