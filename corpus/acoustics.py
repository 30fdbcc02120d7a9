"""How a recording sounds: its length and speech, level, signal-to-noise ratio, bandwidth, rate and codec."""

from dataclasses import asdict, dataclass

import numpy as np

from config import SAMPLE_RATE
from corpus.audio import AudioError, read_crop
from corpus.speech import FRAME, Energy, kept_spans, speech_frames

WINDOW = 0.032  # seconds of the spectra that bandwidth is seen in
SPEECH_BAND, STEP = (300.0, 3400.0), 500.0  # Hz: where all speech is; what the spectrum is averaged over
EMPTY_DB = 60.0  # below the strongest part of that band


@dataclass(frozen=True)
class Acoustics:
    """What a recording is like, as a model hears it."""

    seconds: float  # of what is embedded
    speech: float  # seconds of it that are speech, by energy
    level: float  # RMS of the speech in dB of full scale
    snr: float  # dB, estimated
    bandwidth: float  # Hz up to which there is sound
    rate: float  # Hz of the file, at most that of the model
    codec: str  # "lossless", or the name of a coding that loses something

    @classmethod
    def of(cls, x: np.ndarray, sample_rate: int = SAMPLE_RATE, rate: int = 0, codec: str = "lossless", seconds=None):
        """Measure a waveform (samples,) at ``sample_rate``, which was read from a file of ``rate`` Hz.

        ``seconds``: what is embedded of it, if that is not all.
        """
        energy = Energy()
        energy.add(sample_rate, x[:, None])
        levels = energy.levels() if len(x) >= FRAME * sample_rate else np.full(1, -100.0)
        marked = speech_frames(levels)
        heard = levels[marked] if marked.any() else levels
        level = 10 * np.log10(np.mean(10 ** (heard / 10)))
        whole = len(x) / sample_rate
        speech, seconds = float(marked.mean()) * whole, whole if seconds is None else seconds
        file_rate = float(min(rate or sample_rate, sample_rate))
        of_sound = float(level), snr_of(levels), bandwidth_of(x, sample_rate)
        return cls(seconds, min(speech, seconds), *of_sound, file_rate, codec)

    @classmethod
    def from_dict(cls, values: dict) -> "Acoustics":
        """What ``to_dict`` gave; ValueError, KeyError or TypeError for anything else."""
        numbers = {k: float(v) for k, v in dict(values).items() if k != "codec"}
        if not np.isfinite(list(numbers.values())).all():
            raise ValueError("measures of a recording that are no numbers")
        return cls(**numbers, codec=str(values["codec"]))

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


def snr_of(levels: np.ndarray) -> float:
    """Estimate a signal-to-noise ratio in dB from the levels in dB of frames of 20 ms.

    The 95th percentile, which is speech, less the 10th, which is a pause or a quiet sound: NIST's STNR with percentiles
    in the place of its histogram. It is too low for speech without pauses and blind to a noise as brief as speech is.
    """
    quiet, loud = np.percentile(levels, (10, 95))
    return float(loud - quiet)


def bandwidth_of(x: np.ndarray, sample_rate: int = SAMPLE_RATE) -> float:
    """Frequency in Hz above which the mean spectrum of a waveform (samples,) is empty.

    That is ``EMPTY_DB`` below its strongest part. Telephone speech ends near 4,000 Hz whatever the rate of its file.
    """
    size = round(WINDOW * sample_rate)
    x = np.pad(x, (0, max(size - len(x), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(x, size)[:: size // 2]
    power = np.zeros(size // 2 + 1)
    window = np.hanning(size)
    for begin in range(0, len(frames), 1024):  # a long recording needs no more memory
        power += np.square(np.abs(np.fft.rfft(frames[begin : begin + 1024] * window))).sum(axis=0)
    width = sample_rate / size
    bins = max(round(STEP / width), 1)
    running = np.convolve(power, np.full(bins, 1 / bins), "valid")
    centers = (np.arange(len(running)) + (bins - 1) / 2) * width
    inside = (centers >= SPEECH_BAND[0]) & (centers <= SPEECH_BAND[1])
    filled = np.flatnonzero(running >= max(running[inside].max() * 10 ** (-EMPTY_DB / 10), 1e-30))
    if not len(filled):
        return 0.0
    return sample_rate / 2 if filled[-1] == len(running) - 1 else float(centers[filled[-1]])


def listen_to(path, channel: str = "mix", sample_rate: int = SAMPLE_RATE, vad: str = "none") -> Acoustics:
    """Measure an audio file; AudioError for one that cannot be read or holds NaN or Inf."""
    crop = read_crop(path, channel=channel, sample_rate=sample_rate)
    if not len(crop.x) or not np.isfinite(crop.x).all():
        raise AudioError("holds nothing, or samples that are NaN or Inf")
    kept = sum(end - begin for begin, end in kept_spans(crop.x, sample_rate, vad))
    return Acoustics.of(crop.x, sample_rate, crop.rate, crop.codec, kept / sample_rate)
