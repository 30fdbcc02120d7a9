"""What a device can do to a row of a batch, and the base of plug-ins whose work it can take over (augment_on)."""

import functools
from typing import NamedTuple

import numpy as np

from augmentation.waveforms import gain_for

ADD, CONVOLVE, MULTIPLY, CLIP, SILENCE = "add", "convolve", "multiply", "clip", "silence"


class Operation(NamedTuple):
    """One operation on a row x (samples,).

    | kind | result |
    | --- | --- |
    | ADD | x + number * array; of an int16 array its 32768th part |
    | CONVOLVE | x convolved with the taps ``array``, from sample ``first`` of the result on |
    | MULTIPLY | number * x |
    | CLIP | x between -number and number |
    | SILENCE | x with 0 in ``count`` samples from ``first`` on |

    ``relative``: the number is to be multiplied by what x has before the first operation of the plug-in: its RMS (ADD),
    its largest absolute sample (CLIP). The product is what the draw names ``found``.
    """

    kind: str
    number: float = 1.0
    array: np.ndarray | None = None
    relative: bool = False
    first: int = 0
    count: int = 0
    found: str = ""

    def growth(self, samples: int, draw: dict) -> float:
        """The factor by which the largest sample of a row (samples,) grows at most."""
        if self.kind == ADD:  # the energy of what is added lies snr_db below that of the row, and may be in one sample
            return 1 + samples**0.5 * 10 ** (-draw["snr_db"] / 20)
        if self.kind == CONVOLVE:  # Cauchy and Schwarz
            return len(self.array) ** 0.5 * float(np.linalg.norm(self.array))
        return abs(self.number) if self.kind == MULTIPLY else 1.0


def added(draw: dict, noise: np.ndarray, stored: np.ndarray) -> Operation:
    """Add a noise (samples,) at the gain of its draw, or else at its ratio; ``stored``: the same, perhaps as int16."""
    if "gain" in draw:
        return Operation(ADD, draw["gain"], stored)
    at_full_scale = gain_for(float(len(noise)), noise, draw["snr_db"])  # for a row with an RMS of 1
    return Operation(ADD, at_full_scale, stored, relative=True, found="gain")


def filter_of(taps: np.ndarray) -> Operation:
    """Filter with taps whose middle is at time 0, as ``waveforms.filtered``."""
    return Operation(CONVOLVE, array=taps, first=len(taps) // 2)


class OnDevice:
    """Base of a plug-in that a device can stand in for.

    ``choose`` draws all that is at random without the waveform, which may not be there yet; ``measure`` adds to the
    draws what depends on it; ``operation`` says what ``apply`` does.
    """

    def choose(self, samples: int, rng, sounds) -> list[dict]:
        """Draw all that is at random for a crop of so many samples."""
        raise NotImplementedError

    def measure(self, x, draws: list[dict], sounds):
        """Add to the draws what depends on the waveform x (samples,); here nothing."""

    def draw(self, x, rng, sounds) -> list[dict]:
        """Draw for a waveform that is there."""
        draws = self.choose(len(x), rng, sounds)
        self.measure(x, draws, sounds)
        return draws

    def operation(self, draw: dict, samples: int, sounds) -> Operation:
        """What ``apply`` does with a draw to a row of so many samples; relative if the draw was not measured."""
        raise NotImplementedError


@functools.lru_cache(maxsize=256)
def can_wait(plugin: type) -> bool:
    """Whether a device can stand in for a plug-in.

    Not for one that has an ``apply`` of its own and its base's ``operation``, or a ``draw`` of its own and its base's
    ``choose``: they would not agree.
    """

    def depth(name):
        return next((number for number, base in enumerate(plugin.__mro__) if name in vars(base)), len(plugin.__mro__))

    return issubclass(plugin, OnDevice) and depth("operation") <= depth("apply") and depth("choose") <= depth("draw")
