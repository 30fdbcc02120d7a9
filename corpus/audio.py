"""Read audio as mono float32 at the rate that a model works at, only the part that is used."""

import functools
import math
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
import scipy

from config import SAMPLE_RATE, frame_samples
from corpus.containers import AudioError
from corpus.decode import BLOCK, Recording, native, reading

__all__ = ["AudioError", "audio_length", "native", "read_blocks", "read_crop", "resample", "wrap_pad"]

# What a recording must have: for an embedding one window of features, to be enrolled or decided on a bit of speech.
MIN_EMBED_SECONDS, MIN_SECONDS = 0.025, 0.3
SILENT_DB = -80.0  # RMS, of full scale

NORMAL = Fraction(1)
# What ``speed_perturb`` makes of an utterance: class speaker + copy x speakers is a speaker at a speed.
SPEEDS = (NORMAL, Fraction(9, 10), Fraction(11, 10))
CANCEL_DB = 20.0  # that the mean of the channels may lie below the loudest of them
CHANNELS = ("mix", "1", "2", "loudest")  # values of the key ``channel``


@dataclass
class Excerpt:
    """A piece of a recording as it was read.

    ``x`` (samples,) float32; ``start``, its first sample in the file, counted at the file's ``rate``; the
    ``channels`` of the file and the ``channel`` taken ("mix", or its number from 1); ``notes`` (kind, text);
    ``codec`` of ``Recording``.
    """

    x: np.ndarray
    start: int
    rate: int
    channels: int
    channel: str
    notes: list[tuple[str, str]] = field(default_factory=list)
    codec: str = "lossless"


def samples_of(frames: int, sample_rate: int = SAMPLE_RATE) -> int:
    """Samples that give ``frames`` windows of 25 ms every 10 ms, as voxceleb_trainer counts them."""
    hop, window = frame_samples(sample_rate)
    return frames * hop + window - hop


def least_samples(sample_rate: int = SAMPLE_RATE) -> int:
    """Half a second: what shorter files are repeated to before evaluation."""
    return sample_rate // 2


def class_count(speakers: int, speed_perturb: bool) -> int:
    """Classes of a train list: its speakers, or each of them at each speed."""
    return speakers * (len(SPEEDS) if speed_perturb else 1)


@functools.lru_cache(maxsize=256)
def _ratio(rate: int, speed: Fraction, sample_rate: int) -> Fraction:
    """Output samples for each sample of the file."""
    if rate == sample_rate and speed is NORMAL:
        return NORMAL  # fractions are slow
    return Fraction(sample_rate, rate) / speed


def audio_length(path, sample_rate: int = SAMPLE_RATE) -> int:
    """Samples of a file at ``sample_rate``, from its header alone if that gives its length."""
    with Recording(path) as recording:
        return math.ceil(recording.frames * _ratio(recording.rate, NORMAL, sample_rate))


def resample(x: np.ndarray, rate: int, speed: Fraction = NORMAL, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Bring one channel (samples,) float32 at ``rate`` to ``sample_rate``; ``speed`` above 1 is faster."""
    ratio = _ratio(rate, speed, sample_rate)
    if ratio is NORMAL or ratio == 1:
        return x
    up, down = ratio.numerator, ratio.denominator
    return scipy.signal.resample_poly(x, up, down, window=_low_pass(max(up, down))).astype(np.float32, copy=False)


@functools.lru_cache(maxsize=64)
def _low_pass(factor: int) -> np.ndarray:
    """The filter that ``resample_poly`` designs anew in each call for the larger of its two factors."""
    return scipy.signal.firwin(20 * factor + 1, 1 / factor, window=("kaiser", 5.0)).astype(np.float32)


def read_blocks(path, samples: int = BLOCK, notes: list | None = None):
    """Yield (rate, block (samples, channels) float32) of a whole file as it is stored; AudioError as ``read_crop``.

    ``notes`` gets the (kind, text) on the file once all of it was read.
    """
    with Recording(path) as recording:
        mixer = Mixer(recording.channels, "mix")
        for block in recording.blocks(samples):
            if notes is not None:
                mixer.mix(block)
            yield recording.rate, block
        if notes is not None:
            notes += recording.notes + mixer.notes()


def decibels(x: np.ndarray) -> float:
    """Level of a waveform in dB of full scale, by its RMS; -inf for digital silence."""
    blocks = (x[i : i + BLOCK] for i in range(0, len(x), BLOCK))  # a long recording as float64 fills the memory
    power = sum(float(np.square(block, dtype=np.float64).sum()) for block in blocks) / len(x)
    return 10 * math.log10(power) if power else -math.inf


def wrap_pad(x: np.ndarray, samples: int) -> np.ndarray:
    """Repeat a short signal up to ``samples``."""
    return np.pad(x, (0, samples - len(x)), "wrap") if len(x) < samples else x


def read_crop(
    path,
    samples=0,
    position=0.0,
    speed: Fraction = NORMAL,
    start=None,
    channel: str = "mix",
    opened=None,
    sample_rate: int = SAMPLE_RATE,
) -> Excerpt:
    """Read a crop as mono float32 at ``sample_rate``.

    ``samples`` to return, 0 for the whole file; ``position`` in [0, 1) places the crop, or ``start`` does, its first
    sample in the file; ``speed`` above 1 is faster. ``channel``: "mix" for the mean of all, a number from 1, or
    "loudest" for that of the most energy in the whole file. ``opened`` is the recording if it need not be opened.
    Raises AudioError for a file that is unreadable, empty, truncated or damaged, or lacks the channel.
    """
    with opened or Recording(path) as recording:
        channel = channel_of(recording, channel)
        if samples and recording.channels == 1 and recording.rate == sample_rate and speed is NORMAL:
            wanted, start = _piece(samples, recording.frames, position, start)
            x = recording.read(start, wanted)[:, 0]
            return Excerpt(wrap_pad(x, samples), start, sample_rate, 1, channel, recording.notes, recording.codec)
        ratio = _ratio(recording.rate, speed, sample_rate)
        mixer = Mixer(recording.channels, channel)
        if samples:
            needed = samples if ratio is NORMAL else math.ceil(samples / ratio)
            wanted, start = _piece(needed, recording.frames, position, start)
            x = mixer.mix(recording.read(start, wanted))
        else:
            with reading():
                start = 0
                x = np.concatenate([mixer.mix(block) for block in recording.blocks()])
        with reading():
            x = resample(x, recording.rate, speed, sample_rate)
            if samples:
                x = wrap_pad(x, samples)[:samples]
            x = np.ascontiguousarray(x)
        notes = recording.notes + mixer.notes()
        return Excerpt(x, start, recording.rate, recording.channels, channel, notes, recording.codec)


def _piece(samples: int, total: int, position: float, start: int | None) -> tuple[int, int]:
    """How many samples of a recording a crop takes, and the first of them."""
    wanted = min(samples, total)
    return wanted, int(position * (total - wanted + 1)) if start is None else min(start, total - wanted)


def channel_of(recording: Recording, channel: str) -> str:
    """ "mix", or the number of the channel to take, from 1."""
    if recording.channels == 1 and channel in ("loudest", "mix"):
        return "mix"
    if channel == "loudest":
        return str(recording.loudest())
    if channel != "mix" and int(channel) > recording.channels:
        raise AudioError(f"has {recording.channels} channel{'s' * (recording.channels > 1)}, not channel {channel}")
    return channel


class Mixer:
    """Makes one channel of several, and knows whether they cancel. ``channel``: "mix", or a number from 1."""

    def __init__(self, channels: int, channel: str):
        self.channels, self.channel = channels, channel
        self.before, self.after = 0.0, 0.0  # energy of each channel, and of their mean

    def mix(self, block: np.ndarray) -> np.ndarray:
        """Make (samples,) of a block (samples, channels)."""
        if self.channel != "mix" or self.channels == 1:
            return block[:, 0 if self.channel == "mix" else int(self.channel) - 1]
        x = block.mean(axis=1)
        self.before = self.before + np.einsum("ij,ij->j", block, block, dtype=np.float64)
        self.after += float(np.dot(x, x))
        return x

    def notes(self) -> list[tuple[str, str]]:
        """[("channels cancel", how much)] if the mean lost more than ``CANCEL_DB`` against the loudest channel."""
        loss = loss_db(float(np.max(self.before)), self.after)
        if not loss > CANCEL_DB:
            return []
        lost = "all" if math.isinf(loss) else f"{loss:.0f} dB"
        return [
            ("channels cancel", f"the mean of its {self.channels} channels loses {lost}; set channel: 1, 2 or loudest")
        ]


def note_on_files(kind: str, files: dict[str, str], noun: str = "file") -> str:
    """A note of one kind on ``files`` {path: text} in a line: how many, and what is said of the first."""
    first = min(files)
    return f"{kind}: {len(files)} {noun}{'s' if len(files) > 1 else ''}, the first {first}: {files[first]}"


def loss_db(before: float, after: float) -> float:
    """How far an energy ``after`` lies below another, in dB; 0 if neither is positive and finite."""
    if not (0 < before < math.inf and after >= 0):
        return 0.0
    return math.inf if after == 0 else 10 * math.log10(before / after)
