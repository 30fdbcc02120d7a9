"""Read audio as 16 kHz mono float32, only the part that is used."""

import math
import os
import re
from fractions import Fraction

import numpy as np
import soundfile
from scipy.signal import resample_poly

SAMPLE_RATE = 16000
MIN_SAMPLES = SAMPLE_RATE // 2  # shorter files are repeated to half a second before evaluation

# What a recording must have: for an embedding one window of features, to be enrolled or decided on a bit of speech.
MIN_EMBED_SECONDS, MIN_SECONDS = 0.025, 0.3
SILENT_DB = -80.0  # RMS, of full scale

NORMAL = Fraction(1)
# An mp3 frame borrows bits from up to nine before it; decoding that starts at a crop would begin with garbage.
MP3_PREROLL = 10 * 1152
# libsndfile's log of a wav file whose header promises other than what is there. Programs that write to a pipe put a
# placeholder of 2 GiB or more there, which is no promise.
PROMISED_BYTES = re.compile(r"data : (\d+) \(should be (\d+)\)")
PLACEHOLDER_BYTES = 0x7FFF0000


class AudioError(Exception):
    """A file that cannot be used, with the reason."""


def samples_of(frames: int) -> int:
    """Samples that give ``frames`` windows of 25 ms every 10 ms, as voxceleb_trainer counts them."""
    return frames * 160 + 240


def native(path) -> str | bytes:
    """A path as libsndfile takes any: soundfile itself cannot pass on a name that is not UTF-8."""
    return os.fspath(path) if os.name == "nt" else os.fsencode(path)


def _open(path):
    try:
        audio = soundfile.SoundFile(native(path))
    except (OSError, RuntimeError, TypeError, UnicodeError) as error:  # soundfile's own error is a RuntimeError
        reason = getattr(error, "error_string", str(error)) if os.path.isfile(path) else "no such file"
        raise AudioError(reason) from error
    if audio.frames <= 0:
        audio.close()
        raise AudioError("no samples")
    return audio


def _ratio(rate: int, speed: Fraction) -> Fraction:
    """Output samples for each sample of the file."""
    return Fraction(SAMPLE_RATE, rate) / speed


def audio_length(path) -> int:
    """Samples of a file at 16 kHz, from its header alone."""
    with _open(path) as audio:
        return math.ceil(audio.frames * _ratio(audio.samplerate, NORMAL))


def resample(x: np.ndarray, rate: int, speed: Fraction = NORMAL) -> np.ndarray:
    """Bring one channel (samples,) float32 to 16 kHz; ``speed`` above 1 is faster."""
    ratio = _ratio(rate, speed)
    return x if ratio == 1 else resample_poly(x, ratio.numerator, ratio.denominator).astype(np.float32)


def read_blocks(path, samples: int = 1 << 18):
    """Yield (rate, block (samples, channels) float32) of a whole file as it is stored.

    Raises AudioError as ``read_audio`` does, and also for a wav file shorter than its header says, which libsndfile
    would silently take for a shorter recording.
    """
    with _open(path) as audio:
        log = PROMISED_BYTES.search(audio.extra_info)
        promised, found = map(int, log.groups()) if log else (0, 0)
        if found < promised < PLACEHOLDER_BYTES:
            raise AudioError(f"truncated: the header promises {promised} bytes of samples, {found} are there")
        done = 0
        while done < audio.frames:
            try:
                block = audio.read(min(samples, audio.frames - done), dtype="float32", always_2d=True)
            except (OSError, RuntimeError) as error:
                raise AudioError(getattr(error, "error_string", str(error))) from error
            done += len(block)
            if not len(block):
                raise AudioError(f"truncated: the header promises {audio.frames} samples, reading ends at {done}")
            yield audio.samplerate, block


def decibels(x: np.ndarray) -> float:
    """Level of a waveform in dB of full scale, by its RMS; -inf for digital silence."""
    power = float(np.mean(np.square(x, dtype=np.float64)))
    return 10 * math.log10(power) if power else -math.inf


def wrap_pad(x: np.ndarray, samples: int) -> np.ndarray:
    """Repeat a short signal up to ``samples``."""
    return np.pad(x, (0, samples - len(x)), "wrap") if len(x) < samples else x


def read_audio(path, samples=0, position=0.0, speed: Fraction = NORMAL, first_channel=False, start=None):
    """Read a crop as 16 kHz mono float32.

    ``samples`` to return, 0 for the whole file; ``position`` in [0, 1) places the crop, or ``start`` does, its first
    sample in the file; ``speed`` above 1 is faster.
    Several channels are averaged, or with ``first_channel`` the first is taken.
    Returns (x (samples,) float32, first sample in the file at its own rate, the file's rate, its channels).
    Raises AudioError for an unreadable, empty or truncated file.
    """
    with _open(path) as audio:
        rate, channels, total = audio.samplerate, audio.channels, audio.frames
        ratio = _ratio(rate, speed)
        wanted = min(math.ceil(samples / ratio), total) if samples else total
        start = int(position * (total - wanted + 1)) if start is None else min(start, total - wanted)
        preroll = min(start, MP3_PREROLL) if audio.format == "MP3" else 0
        try:
            if start:
                audio.seek(start - preroll)
            x = audio.read(preroll + wanted, dtype="float32", always_2d=True)[preroll:]
        except (OSError, RuntimeError) as error:
            raise AudioError(getattr(error, "error_string", str(error))) from error
    if len(x) < wanted:
        raise AudioError(f"truncated: the header promises {total} samples, reading ends at {start + len(x)}")
    x = x[:, 0] if channels == 1 or first_channel else x.mean(axis=1)
    x = resample(x, rate, speed)
    if samples:
        x = wrap_pad(x, samples)[:samples]
    return np.ascontiguousarray(x), start, rate, channels
