"""Decode recordings: what is there and no more, from the start if seeking or the header's length cannot be trusted."""

import contextlib
import functools
import io
import os

import numpy as np
import soundfile

from corpus import converters
from corpus.containers import NO_INDEX, SAMPLES_PER_BYTE, UNCHECKED, AudioError, Plain, opened
from corpus.mpg123 import messages_to, summary
from corpus.tars import Placed, Window, binary

# An mp3 frame borrows bits from up to nine before it; decoding that starts at a crop would begin with garbage.
MP3_PREROLL = 10 * 1152
LOSSLESS = ("PCM", "FLOAT", "DOUBLE", "ALAC")  # beginnings of libsndfile's names of codings
BLOCK = 1 << 18  # samples read at once
BLOCK_VALUES = 1 << 22  # of all channels
RATES = (1000, 1000000)  # Hz; an absurd rate makes an absurd number of samples when it is changed
UNKNOWN = 2**63 - 1  # libsndfile's number of samples of a file whose length it does not know
CHECKED = {"WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "CAF", "NIST", "FLAC", "OGG", "MP3", "HTK"}
# One frame may have so many times the bits of another: a length that an mp3 never reaches, whatever its first frame.
MP3_LENGTHENED = 64

# Called with the path of each file that is opened: a loader process lets the main process know what it reads.
on_open = None


class Recording:
    """An audio file that is open: ``rate``, ``channels``, ``frames`` (samples of each channel) and ``notes``.

    A note is (kind, text): what was repaired, what decoded it, or what the decoder had to say. AudioError if the
    file cannot be used. To be closed, or used in a with statement. ``convert`` False: no other program is asked to
    decode what libsndfile does not know.
    """

    def __init__(self, path, convert: bool = True):
        if on_open is not None:
            on_open(path)
        self.path = path
        self.convert = convert
        self.found, handle = opened(path)
        self.lines = [] if self.found.mpeg else None
        self.audio = None
        self.forward = False
        if self.found.plain:
            self.audio = _Samples(handle, self.found.plain)
        else:
            os.close(handle)
            self._begin()
        self.rate, self.channels = self.audio.samplerate, self.audio.channels
        self.most = SAMPLES_PER_BYTE * self.found.stamp[0] + (1 << 24)
        self.counted = self.found.counted or self.audio.frames == UNKNOWN
        try:
            self._check()
        except AudioError:
            self.close()
            raise

    def _check(self):
        if not RATES[0] <= self.rate <= RATES[1]:
            raise AudioError(f"a rate of {self.rate} Hz, which no recording has")
        if not self.counted and self.audio.frames > self.most:
            raise AudioError(f"the header promises {self.audio.frames} samples, more than its size can hold")
        if self.audio.frames <= 0:
            raise AudioError("no samples")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Close the file."""
        if self.audio is not None:
            self.audio.close()

    @property
    def format(self) -> str:
        """libsndfile's name of the container, or who decodes it in its place."""
        return self.audio.format

    @property
    def codec(self) -> str:
        """What its samples were coded with, as "MP3" or "ULAW"; "lossless" if all of them are what they were."""
        if isinstance(self.audio, converters.Converted):
            return os.path.splitext(os.fspath(self.path))[1].lstrip(".").upper() or "unknown"
        kind = getattr(self.audio, "subtype", "PCM")
        return "lossless" if kind.startswith(LOSSLESS) else "MP3" if kind.startswith("MPEG") else kind

    @property
    def frames(self) -> int:
        """Samples of each channel; counted by decoding if the header does not give them."""
        return _count(os.fspath(self.path), self.found.stamp) if self.counted else self.audio.frames

    @property
    def notes(self) -> list[tuple[str, str]]:
        """(kind, text) of all that is to be said of the file so far."""
        notes = [("repaired", self.found.repair)] if self.found.repair else []
        if isinstance(self.audio, converters.Converted):
            notes = [("converted", f"read through {self.audio.format}; as a wav file it is read faster")]
        elif self.audio.format not in CHECKED:
            notes = [("repaired", UNCHECKED)]
        return notes + ([("decoder warnings", summary(self.lines))] if self.lines else [])

    def loudest(self) -> int:
        """The channel of the most energy in the whole file, from 1."""
        return _loudest(os.fspath(self.path), self.found.stamp)

    def _begin(self):
        """Open the file at its first sample, for the second time too."""
        if self.found.plain:
            self.audio.seek(0)
            return
        self.close()
        try:
            with messages_to(self.lines):
                self.audio = _Forward(self._file())
        except (OSError, RuntimeError, TypeError, UnicodeError) as error:  # soundfile's own error is a RuntimeError
            reason = getattr(error, "error_string", str(error)).rstrip(".")
            if "does not exist" in reason:  # as libsndfile says of a file that is there and has no samples
                reason = "libsndfile cannot read it"
            if not self.convert or self.found.member:
                raise AudioError(reason) from error
            self.audio = converters.open_converted(self.path, reason)
        self.forward = isinstance(self.audio, converters.Converted) or not self.audio.can_seek()

    def _file(self):
        if self.found.patch or self.found.repair == NO_INDEX:
            return _Presented(self.path, self.found.patch, MP3_LENGTHENED if self.found.mpeg else 1)
        return Window(self.path) if self.found.member else native(self.path)

    def _read(self, count: int, lines=None) -> np.ndarray:
        lines = self.lines if lines is None else lines
        with reading():
            if lines is None:
                return self.audio.read(count, dtype="float32", always_2d=True)
            with messages_to(lines):
                return self.audio.read(count, dtype="float32", always_2d=True)

    def blocks(self, size: int = BLOCK):
        """Yield all samples in blocks (samples, channels) float32; AudioError if there are fewer than promised."""
        self._begin()
        size = max(1, min(size, BLOCK_VALUES // self.channels))
        done = 0
        while self.counted or done < self.audio.frames:
            block = self._read(size if self.counted else min(size, self.audio.frames - done))
            if not len(block):
                break
            done += len(block)
            if done > self.most:
                raise AudioError(f"decodes to more than {self.most} samples, which its size cannot hold")
            yield block
        if not self.counted and done < self.audio.frames:
            raise self._short(done)
        if not done:
            raise AudioError("no samples")

    def read(self, start: int, count: int) -> np.ndarray:
        """Read ``count`` samples from ``start`` on -> (count, channels) float32."""
        x = None
        if not self.counted and not self.forward:
            preroll = min(start, MP3_PREROLL) if self.audio.format == "MP3" else 0
            try:
                if start:
                    self.audio.seek(start - preroll)
                if preroll:
                    self._read(preroll, lines=[])  # whose messages are of frames that begin in the middle
                x = self._read(count)
            except (soundfile.SoundFileError, AudioError):
                self._begin()  # some files cannot be sought although libsndfile says that they can
        if x is None:
            x = self._from_the_start(start, count)
        if len(x) < count:
            raise self._short(start + len(x))
        return x

    def _from_the_start(self, start: int, count: int) -> np.ndarray:
        """Decode and drop what lies before ``start``, then read."""
        self._begin()
        while start and len(dropped := self._read(min(start, BLOCK))):
            start -= len(dropped)
        return self._read(count) if not start else np.empty((0, self.channels), np.float32)

    def _short(self, found: int) -> AudioError:
        return AudioError(f"truncated: the header promises {self.frames} samples, reading ends at {found}")


class _Forward(soundfile.SoundFile):
    """libsndfile without soundfile's own seek after each read: some files cannot do it, and it slows down FLAC."""

    def seekable(self):
        return False

    def can_seek(self) -> bool:
        return super().seekable()


class _Samples:
    """A wav file of 16 bit PCM with the methods of soundfile that are used here, in a tenth of its time."""

    format = "WAV"

    def __init__(self, handle: int, plain: Plain):
        self.handle, self.plain, self.place = handle, plain, 0
        self.samplerate, self.channels, self.frames = plain.rate, plain.channels, plain.frames

    def can_seek(self) -> bool:
        return True

    def seek(self, frame: int):
        self.place = frame

    def read(self, frames: int, dtype: str, always_2d: bool) -> np.ndarray:
        """Read as soundfile does -> (frames, channels) float32, fewer at the end of the file."""
        width = 2 * self.channels
        wanted = max(0, min(frames, self.frames - self.place)) * width
        os.lseek(self.handle, self.plain.start + self.place * width, os.SEEK_SET)
        data = os.read(self.handle, wanted)
        while len(data) < wanted and (more := os.read(self.handle, wanted - len(data))):
            data += more
        x = np.frombuffer(data, "<i2", len(data) // width * self.channels).astype(np.float32)
        x *= np.float32(1 / 32768)
        x = x.reshape(-1, self.channels)
        self.place += len(x)
        return x

    def close(self):
        """Close the file, once."""
        if self.handle >= 0:
            os.close(self.handle)
        self.handle = -1

    __del__ = close


class _Presented(Placed):
    """A file as libsndfile is to see it: with other bytes in its header, or ``longer`` by a factor.

    libmpg123 guesses the length of an mp3 without a Xing header from its size and first frame, and reads no further.
    Of a file that seems many times longer it reads all that there is.
    """

    def __init__(self, path, patch: tuple[int, bytes] | None, longer: int = 1):
        super().__init__()
        self.file = binary(path)
        self.size = self.file.seek(0, os.SEEK_END) * longer
        self.patch = patch or (0, b"")

    def readinto(self, buffer):
        buffer = memoryview(buffer).cast("B")  # soundfile's own takes no numbers
        self.file.seek(self.place)
        count = self.file.readinto(buffer)
        if self.size - 128 <= self.place < self.size and not count:  # libmpg123 looks for a tag in the last 128 bytes
            count = min(len(buffer), self.size - self.place)
            buffer[:count] = bytes(count)
        at, new = self.patch
        for offset in range(max(at, self.place), min(at + len(new), self.place + count)):
            buffer[offset - self.place] = new[offset - at]
        self.place += count
        return count


def read_bytes(content, start: int, count: int) -> np.ndarray:
    """Decode ``count`` samples from ``start`` on of an encoded recording in memory -> (count, channels) float32."""
    with _Forward(io.BytesIO(content)) as audio:
        if start:
            audio.seek(start)
        return audio.read(count, dtype="float32", always_2d=True)


def native(path) -> str | bytes:
    """A path as libsndfile takes any: soundfile itself cannot pass on a name that is not UTF-8."""
    return os.fspath(path) if os.name == "nt" else os.fsencode(path)


@contextlib.contextmanager
def reading():
    """Turn what goes wrong while samples are read into an AudioError."""
    try:
        yield
    except MemoryError as error:
        raise AudioError("too long for the memory of this machine") from error
    except (OSError, RuntimeError) as error:
        raise AudioError(getattr(error, "error_string", str(error)).rstrip(".")) from error


@functools.lru_cache(maxsize=1 << 16)
def _count(path, stamp) -> int:
    """Decode a file to its end to count its samples, once for each ``stamp``."""
    with Recording(path) as recording:
        return sum(len(block) for block in recording.blocks())


@functools.lru_cache(maxsize=1 << 16)
def _loudest(path, stamp) -> int:
    """The channel of the most energy in a whole file, from 1; decoded once for each ``stamp``."""
    with Recording(path) as recording:
        power = sum(np.square(block, dtype=np.float64).sum(axis=0) for block in recording.blocks())
    return int(np.argmax(power)) + 1
