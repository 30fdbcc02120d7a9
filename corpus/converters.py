"""Recordings that libsndfile does not know (m4a, webm, AAC, wma ..), read through PyAV or ffmpeg if there is one."""

import importlib.util
import itertools
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

from corpus.containers import AudioError
from errors import shell_path

TIMEOUT = 600  # seconds for one file
MOST_MESSAGE = 200  # letters
# First bytes, and ffmpeg's name of the container. Named, so that no playlist that leads to other files is followed.
MAGIC = (
    (4, b"ftyp", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (0, b"#!AMR", "amr"),
    (0, b"wvpk", "wv"),
    (0, b"MAC ", "ape"),
    (0, b"NIST_1A", "nistsphere"),
    (0, b"RIFF", "wav"),
    (0, b"FORM", "aiff"),
    (0, b"caff", "caf"),
    (0, b"OggS", "ogg"),
)


def container_of(head: bytes) -> str:
    """ffmpeg's name of the container that a file begins as, empty for none of those above."""
    for place, magic, name in MAGIC:
        if head[place : place + len(magic)] == magic:
            return name
    return "aac" if len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0 else ""


def open_converted(path, reason: str) -> "Converted":
    """Open a file that libsndfile does not read for ``reason``; AudioError says how to convert it."""
    with open(path, "rb") as file:
        container = container_of(file.read(16))
    if not container:
        raise AudioError(f"{reason}: no recording of a known kind")
    if importlib.util.find_spec("av"):
        return Converted("PyAV", *_by_pyav(path, container))
    if program := shutil.which("ffmpeg"):
        return Converted("ffmpeg", *_by_ffmpeg(program, path, container))
    name = Path(path)
    command = f"ffmpeg -i {shell_path(name.name)} -ar 16000 -ac 1 {shell_path(f'{name.stem}.wav')}"
    raise AudioError(f"{reason} ({container}); install ffmpeg or PyAV to have it read, or convert it: {command}")


class Converted:
    """Samples that another program decodes, read as a soundfile.SoundFile is, from the start only."""

    frames = 2**63 - 1  # not known

    def __init__(self, program: str, rate: int, channels: int, blocks, end):
        self.format, self.samplerate, self.channels = program, rate, channels
        self.blocks = blocks
        self.end = end
        self.left = np.empty((0, channels), np.float32)

    def read(self, count: int, dtype="float32", always_2d=True) -> np.ndarray:
        """The next samples (count, channels) float32, fewer at the end."""
        parts = [self.left]
        found = len(self.left)
        while found < count and (block := next(self.blocks, None)) is not None:
            parts.append(block)
            found += len(block)
        x = np.concatenate(parts)
        self.left = x[count:]
        return x[:count]

    def close(self):
        """End the program; a generator that nothing was taken from yet would not do it."""
        self.blocks.close()
        self.end()


def _by_pyav(path, container: str):
    """(rate, channels, generator of blocks, what ends it) of the first audio stream."""
    import av

    try:
        file = av.open(os.fspath(path), format=container)
        if not file.streams.audio:
            file.close()
            raise AudioError("no sound in it")
        stream = file.streams.audio[0]
        rate, channels = stream.rate, stream.channels
    except av.FFmpegError as error:
        raise AudioError(f"PyAV cannot read it: {error.strerror}") from error

    def blocks():
        resampler = av.AudioResampler(format="flt")
        try:
            for frame in itertools.chain(file.decode(stream), [None]):  # None: what the resampler still holds
                for part in resampler.resample(frame):
                    yield part.to_ndarray().reshape(-1, channels)
        except av.FFmpegError as error:
            raise AudioError(f"damaged: PyAV: {error.strerror}") from error

    return rate, channels, blocks(), file.close


def _by_ffmpeg(program: str, path, container: str):
    """(rate, channels, generator of blocks, what ends it) of the first audio stream, by a process behind a pipe."""
    words = [program, "-nostdin", "-loglevel", "error", "-xerror", "-protocol_whitelist", "file,pipe"]
    words += ["-f", container, "-i", f"file:{os.fspath(path)}", "-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "-"]
    messages = tempfile.TemporaryFile()  # noqa: SIM115 (closed by ``end``)
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages)
    timer = threading.Timer(TIMEOUT, process.kill)
    timer.daemon = True
    timer.start()

    def blocks(width):
        while data := process.stdout.read(width << 14):
            yield np.frombuffer(data[: len(data) // width * width], ">f4").astype(np.float32).reshape(-1, width // 4)
        _check(process, messages, timer)

    def end():
        timer.cancel()
        process.stdout.close()
        process.kill()
        process.wait()
        messages.close()

    header = process.stdout.read(24)
    if len(header) < 24:
        try:
            _check(process, messages, timer)  # raises what ffmpeg had to say
            raise AudioError("no samples")
        finally:
            end()
    _, start, _, _, rate, channels = struct.unpack(">4s5I", header)
    process.stdout.read(start - 24)
    return rate, channels, blocks(4 * channels), end


def _check(process, messages, timer):
    """AudioError if ffmpeg ended badly or had anything to say: it calls half a file a success."""
    status = process.wait()
    messages.seek(0)
    said = messages.read(1 << 16).decode(errors="replace").strip().splitlines()
    if not timer.is_alive():
        raise AudioError(f"ffmpeg did not end within {TIMEOUT} s")
    if status or said:
        text = said[0].split("] ", 1)[-1][:MOST_MESSAGE] if said else f"exit status {status}"
        raise AudioError(f"damaged: ffmpeg: {text}")
