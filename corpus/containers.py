"""What the header of an audio file promises, held against what is there: whole, repaired or unusable.

libsndfile shortens many recordings whose header promises more than is there without telling, takes some lengths that
are only estimates at their word, and others that are no lengths at all. So the promises are read here first.
"""

import functools
import io
import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass
from typing import NamedTuple

from corpus.tars import Window, binary

FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe is not waited for
HEAD = 4096  # bytes read at once; most headers lie within
TAIL = 4096  # bytes behind the samples that are passed over: tags and padding
PLACEHOLDER = 0x7FFF0000  # sizes from here on that a file is too short for come from programs that write to a pipe
MOST_CHUNKS = 1000
MOST_CHANNELS = 1024  # of libsndfile
SAMPLES_PER_BYTE = 1000  # more than any codec makes of a byte, digital silence apart

NO_LENGTH = "no length in the header, as of a file written to a pipe: read to its end"
NO_INDEX = "no length in the header (mp3 without Xing): read to its end"
TOO_SHORT = "the header promises less than is there: read to its end"
NO_END = "ogg without its end mark: read as far as it goes"
UNCHECKED = "the header gives no length that can be checked: a cut file is read as a shorter one"


class AudioError(Exception):
    """A file that cannot be used, with the reason."""


class Plain(NamedTuple):
    """A wav file of 16 bit PCM: its first sample lies ``start`` bytes behind its beginning."""

    start: int
    frames: int
    rate: int
    channels: int


class Finding(NamedTuple):
    """What is known of a file before it is decoded.

    ``repair`` says how a header that is wrong is made good, empty for a whole file. ``patch`` (offset, bytes) is what
    libsndfile is to see in place of the header's own. ``counted``: the length is known only once all is decoded.
    ``stamp`` (size, time of change) tells a file from what lay at its path before. ``mpeg``: it begins as an mp3.
    ``plain``: where the samples of a file lie that needs no decoder. ``member``: it is part of a tar file.
    """

    stamp: tuple[int, int]
    repair: str = ""
    patch: tuple[int, bytes] | None = None
    counted: bool = False
    mpeg: bool = False
    plain: Plain | None = None
    member: bool = False


class _Bytes:
    """A file to look into: ``head``, its first bytes, ``size``, and ``at`` for any others.

    That of a member of a tar file is ``size`` bytes from ``begin`` on.
    """

    def __init__(self, handle: int, path, status: os.stat_result, begin: int = 0, size: int | None = None):
        self.handle, self.path, self.begin = handle, path, begin
        self.size = status.st_size if size is None else size
        if begin:
            os.lseek(handle, begin, os.SEEK_SET)
        self.head = os.read(handle, HEAD if size is None else min(HEAD, size))
        self.stamp = (self.size, status.st_mtime_ns)

    def at(self, place: int, count: int) -> bytes:
        if place + count <= len(self.head):
            return self.head[place : place + count]
        os.lseek(self.handle, self.begin + place, os.SEEK_SET)
        return os.read(self.handle, max(0, min(count, self.size - place)))

    def finding(self, **more) -> Finding:
        return Finding(self.stamp, member=self.begin > 0, **more)


def examine(path) -> Finding:
    """Read the header of a file; AudioError if it cannot be opened, is none, is empty, or promises too much."""
    found, handle = opened(path)
    os.close(handle)
    return found


def opened(path) -> tuple[Finding, int]:
    """What ``examine`` finds, and the file, which is open still; AudioError as there."""
    begin, size = 0, None
    try:
        try:
            handle = os.open(path, FLAGS)
        except (FileNotFoundError, NotADirectoryError):  # it may be a member of a tar file
            with Window(path) as member:
                handle, begin, size = os.dup(member.file.fileno()), member.begin, member.size
    except FileNotFoundError as error:
        raise AudioError("no such file") from error
    except OSError as error:
        raise AudioError(f"cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a NUL, or half of a character of UTF-16
        raise AudioError("cannot be opened: the name of no file") from error
    try:
        return _found(handle, path, begin, size), handle
    except BaseException:
        os.close(handle)
        raise


def _found(handle: int, path, begin: int, size: int | None) -> Finding:
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise AudioError("not a regular file")
        file = _Bytes(handle, path, status, begin, size)
        if not file.head:
            raise AudioError("empty file")
        check = CHECKS.get(file.head[:4]) or (_mpeg if is_mpeg(file.head) else None)
        return check(file) if check else file.finding()
    except (struct.error, IndexError):  # the file ends inside its header
        return file.finding()
    except OSError as error:
        raise AudioError(f"cannot be read: {error.strerror}") from error


def _truncated(promised, found, unit: str = "bytes of samples") -> AudioError:
    return AudioError(f"truncated: the header promises {promised} {unit}, {found} are there")


# ------------------------------------------------------------------------------------- chunks: wav, w64, aiff, caf


@dataclass(frozen=True)
class _Layout:
    """How a container writes its chunks: ``entry`` id and size, the place of the ``first``, the id of the samples."""

    entry: str
    first: int
    samples: bytes
    align: int = 2
    counts_entry: bool = False  # the size is that of the entry too
    inside: int = 0  # bytes of the chunk of samples before the first sample


_GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_RIFF = _Layout("<4sI", 12, b"data")
_LAYOUTS = {
    b"RIFF": _RIFF,
    b"RIFX": _Layout(">4sI", 12, b"data"),
    b"RF64": _RIFF,
    b"BW64": _RIFF,
    b"riff": _Layout("<16sQ", 40, b"data" + _GUID, align=8, counts_entry=True),
    b"FORM": _Layout(">4sI", 12, b"SSND", inside=8),
    b"caff": _Layout(">4sQ", 8, b"data", align=1, inside=4),
}


def _chunks(file: _Bytes, layout: _Layout, place: int):
    """Yield (id, place of the content, size of the content, place of the size) of each chunk from ``place`` on."""
    entry = struct.calcsize(layout.entry)
    for _ in range(MOST_CHUNKS):
        if place + entry > file.size:
            return
        name, size = struct.unpack(layout.entry, file.at(place, entry))
        size -= entry if layout.counts_entry and size >= entry else 0
        yield name, place + entry, size, place + len(name)
        place += entry + size + -size % layout.align


def _chunked(file: _Bytes) -> Finding:
    """Check the chunk of samples of a wav, rf64, w64, aiff or caf file."""
    layout = _LAYOUTS[file.head[:4]]
    if layout is _RIFF and (plain := _usual(file)):
        return file.finding(plain=plain)
    found = wide = None  # (place, size, place of the size) of the samples; (size, its place) of RF64
    form = b""
    for name, *chunk in _chunks(file, layout, layout.first):
        if name == b"ds64":
            wide = struct.unpack("<Q", file.at(chunk[0] + 8, 8))[0], chunk[0] + 8
        elif name == b"fmt " and not form:
            form = file.at(chunk[0], 16)
        elif name == layout.samples:
            found = chunk
            break
    if found is None:
        return file.finding()
    start, size, field = found
    width = 4 if layout.entry.endswith("I") else 8
    if wide and size == 0xFFFFFFFF:
        (size, field), width = wide, 8
    there = file.size - start
    least = 1 << 62 if width == 8 else PLACEHOLDER
    if size > there:
        if size < least:
            raise _truncated(size - layout.inside, max(there - layout.inside, 0))
        # libsndfile knows placeholders of 4 bytes, not those of 8.
        return file.finding(repair=NO_LENGTH, patch=_size_patch(layout, field, width, there) if width == 8 else None)
    if _goes_on(file, layout, start + size + -size % layout.align, size):
        repair = TOO_SHORT if size > layout.inside else NO_LENGTH
        return file.finding(repair=repair, patch=_size_patch(layout, field, width, there))
    return file.finding(plain=_plain(file, form, start, size))


def _plain(file: _Bytes, form: bytes, start: int, size: int) -> Plain | None:
    """Where the samples of 16 bit PCM lie; None for any other encoding, and for all that libsndfile may refuse."""
    if file.head[:4] != b"RIFF" or file.head[8:12] != b"WAVE" or len(form) < 16:
        return None
    kind, channels, rate, _, width, bits = struct.unpack("<HHIIHH", form)
    if (kind, bits) != (1, 16) or not 0 < channels <= MOST_CHANNELS or width != 2 * channels or not size:
        return None
    chunks = [name for name, *_ in _chunks(file, _RIFF, _RIFF.first)]
    plain = Plain(file.begin + start, size // width, rate, channels)
    return plain if chunks.count(b"fmt ") == chunks.count(b"data") == 1 else None


def _usual(file: _Bytes) -> Plain | None:
    """What ``_plain`` finds of a file as most are, but faster: it is whole, and the samples are its last chunk."""
    head, place = file.head, 36
    if head[:4] != b"RIFF" or head[8:20] != b"WAVEfmt \x10\0\0\0":
        return None
    while head[place : place + 4] == b"LIST":
        size = int.from_bytes(head[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    kind, channels, rate, _, width, bits = struct.unpack_from("<HHIIHH", head, 20)
    start, size = place + 8, int.from_bytes(head[place + 4 : place + 8], "little")
    whole = head[place : place + 4] == b"data" and start + size == file.size and size
    if not whole or (kind, bits) != (1, 16) or not 0 < channels <= MOST_CHANNELS or width != 2 * channels:
        return None
    return Plain(file.begin + start, size // width, rate, channels)


def _size_patch(layout, field, width, size) -> tuple[int, bytes]:
    size += struct.calcsize(layout.entry) if layout.counts_entry else 0
    return field, size.to_bytes(width, "little" if layout.entry[0] == "<" else "big")


def _goes_on(file: _Bytes, layout: _Layout, place: int, size: int) -> bool:
    """Whether samples go on at ``place``, behind the ``size`` bytes that the header promises: no chunk and no tag."""
    left = file.size - place
    if left <= 0 or (left <= TAIL and left < size):
        return False
    for name, _, length, field in _chunks(file, layout, place):
        printable = all(32 <= letter < 127 for letter in name[:4])
        return not printable or field + length > file.size + TAIL
    return False


# ------------------------------------------------------------------------------------------------------ au, sphere


def _au(file: _Bytes) -> Finding:
    order = ">" if file.head[:4] == b".snd" else "<"
    start, size = struct.unpack(f"{order}II", file.at(4, 8))
    there = file.size - start
    unknown = 0xFFFFFFFF
    if size == unknown:
        return file.finding(repair=NO_LENGTH)
    if size > there:
        raise _truncated(size, max(there, 0))
    if there > size and not (there - size <= TAIL and there - size < size):
        patch = (8, struct.pack(f"{order}I", unknown))
        return file.finding(repair=TOO_SHORT if size else NO_LENGTH, patch=patch)
    return file.finding()


def _sphere(file: _Bytes) -> Finding:
    start = int(file.head[8:16])
    fields = dict(re.findall(rb"^(\w+) -\w+ (\S+)", file.at(0, min(start, 1 << 16)), re.MULTILINE))
    try:
        size = int(fields[b"sample_count"]) * int(fields.get(b"channel_count", 1)) * int(fields[b"sample_n_bytes"])
    except (KeyError, ValueError):
        return file.finding(repair=NO_LENGTH)
    there = file.size - start
    if b"embedded" in fields.get(b"sample_coding", b""):  # compressed
        return file.finding()
    if size > there:
        raise _truncated(size, there)
    longer = there - size > TAIL or there - size >= size
    return file.finding(repair=TOO_SHORT if longer else "")  # libsndfile reads to the end whatever the header says


# ------------------------------------------------------------------------------------------------------------ flac


def _flac(file: _Bytes, place: int = 0) -> Finding:
    info = file.at(place + 8, 34)
    total = int.from_bytes(info[10:18], "big") & ((1 << 36) - 1)
    if total == 0 or total > SAMPLES_PER_BYTE * file.size:
        return file.finding(repair=NO_LENGTH, counted=True)
    end = _last_flac_sample(file, info, total)
    if end is not None and end < total:
        raise _truncated(total, end, "samples")
    if end is not None and end > total:
        patch = place + 8 + 13, bytes([info[13] & 0xF0, 0, 0, 0, 0])  # a total of 0, which is "not known"
        return file.finding(repair=TOO_SHORT, counted=True, patch=patch)
    return file.finding()


def _last_flac_sample(file: _Bytes, info: bytes, total: int) -> int | None:
    """Samples up to the end of the last frame, None if no frame is found near the end of the file.

    The header of the last frame is there even if its end is cut off: decoding finds that.
    """
    least, most, largest = (int.from_bytes(info[a:b], "big") for a, b in ((0, 2), (2, 4), (7, 10)))
    window = min((largest or 1 << 15) + 512, file.size)
    found = None
    for size in (window, min(window + (1 << 16), file.size)):
        tail = file.at(file.size - size, size)
        place = len(tail)
        while (place := max(tail.rfind(b"\xff\xf8", 0, place), tail.rfind(b"\xff\xf9", 0, place))) >= 0:
            end = _flac_frame_end(tail[place : place + 16], least if least == most else None)
            if end is not None and (found is None or abs(end - total) < abs(found - total)):
                found = end
            if found == total:
                return total
        if found is not None:
            return found
    return None


def _flac_frame_end(header: bytes, block: int | None) -> int | None:
    """Number of the sample behind a frame, None for bytes that are no frame header; ``block``: samples of each."""
    there, header = len(header), header.ljust(16, b"\0")  # a frame of silence may be as short as its header
    if header[3] & 1:
        return None
    number, used = _coded_number(header[4:11])
    if number is None:
        return None
    place = 4 + used
    code = header[2] >> 4
    if code in (6, 7):
        width = code - 5
        samples = int.from_bytes(header[place : place + width], "big") + 1
        place += width
    elif code:
        samples = 192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8
    else:
        return None
    rate = header[2] & 15
    place += {12: 1, 13: 2, 14: 2}.get(rate, 0)
    if rate == 15 or place >= there or _crc8(header[:place]) != header[place]:
        return None
    if header[1] & 1:  # blocks of different lengths: the number is that of the first sample
        return number + samples
    return None if block is None else number * block + samples


def _coded_number(code: bytes) -> tuple[int | None, int]:
    """The number that FLAC writes as UTF-8 would, and its bytes."""
    ones = 8 - (~code[0] & 0xFF).bit_length()
    if ones == 0:
        return code[0], 1
    if ones == 1 or ones > 7 or any(byte >> 6 != 2 for byte in code[1:ones]):
        return None, 0
    number = code[0] & (0x7F >> ones)
    for byte in code[1:ones]:
        number = number << 6 | byte & 63
    return number, ones


def _crc8(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc << 1 ^ 0x07 * (crc >> 7)) & 0xFF
    return crc


# ------------------------------------------------------------------------------------------------------------- ogg


def _ogg(file: _Bytes) -> Finding:
    repair, problem = _walk_ogg(os.fspath(file.path), file.stamp)
    if problem:
        raise AudioError(problem)
    return file.finding(repair=repair)


@functools.lru_cache(maxsize=1 << 14)
def _walk_ogg(path, stamp) -> tuple[str, str]:
    """Go through the pages of a file: (how it is repaired, what is wrong with it), both empty for a whole one.

    libogg passes over a page that does not fit its checksum: a second of sound is gone, and nobody is told.
    """
    serial = None
    number = None
    ended = False
    place = 0
    with io.BufferedReader(binary(path)) as file:
        while header := file.read(27):
            if len(header) < 27 or header[:4] != b"OggS":
                return ("", "") if ended else ("", f"damaged: no page of sound at byte {place}")
            segments = file.read(header[26])
            size = sum(segments)
            body = file.read(size)
            if len(segments) < header[26] or len(body) < size:
                return "", f"truncated: the last page promises {size} bytes, {len(body)} are there"
            own, page = struct.unpack("<II", header[14:22])
            if serial not in (None, own):
                return "", "several recordings in one file, one behind the other or side by side: split it"
            if number not in (None, page - 1) or _ogg_crc(header, segments, body) != header[22:26]:
                return "", f"damaged: the page of sound at byte {place} is lost or spoilt"
            serial = own
            number = page
            ended = bool(header[5] & 4)
            place += 27 + len(segments) + size
    return ("" if ended else NO_END), ""


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_crc(header: bytes, segments: bytes, body: bytes) -> bytes:
    """The checksum of a page as it is written: that of zlib with all bits the other way round, and nothing added."""
    page = b"".join((header[:22], b"\0\0\0\0", header[26:], segments, body)).translate(_REVERSED)
    crc = zlib.crc32(page, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "little").translate(_REVERSED)[::-1]


# ------------------------------------------------------------------------------------------------------------- mp3


def is_mpeg(head: bytes) -> bool:
    """Whether a file begins as an mp3 does: with a tag or a frame; AAC (ADTS) is none."""
    return head[:3] == b"ID3" or (len(head) > 3 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 6 != 0)


def _mpeg(file: _Bytes) -> Finding:
    """Look for the Xing header, the only place where an mp3 says how long it is."""
    place = _behind_tags(file, 0)
    head = file.at(place, 64)
    if head[:4] == b"fLaC":
        return _flac(file, place)
    if head[:1] != b"\xff" or not is_mpeg(head):
        return file.finding(mpeg=True, repair=NO_INDEX, counted=True)
    newest, mono = head[1] & 8, head[3] >> 6 == 3  # MPEG 1, not 2 or 2.5
    tag = 4 + ((17 if mono else 32) if newest else (9 if mono else 17))
    flags, frames, size = struct.unpack(">III", head[tag + 4 : tag + 16])
    if head[tag : tag + 4] not in (b"Xing", b"Info") or not flags & 1:
        return file.finding(mpeg=True, repair=NO_INDEX, counted=True)
    there = file.size - place
    if flags & 2 and there < size * 0.95:  # some writers count a frame more or less
        raise _truncated(size, there, "bytes of frames")
    if frames * 1152 > SAMPLES_PER_BYTE * file.size or (flags & 2 and _mpeg_at(file, place + size)):
        return file.finding(mpeg=True, repair=TOO_SHORT, counted=True, patch=(place + tag, bytes(4)))
    return file.finding(mpeg=True)


def _behind_tags(file: _Bytes, place: int) -> int:
    """Place behind the ID3 tags at ``place``."""
    while (head := file.at(place, 10))[:3] == b"ID3" and len(head) == 10:
        size = 0
        for byte in head[6:10]:
            size = size << 7 | byte & 127
        place += 10 + size + (10 if head[5] & 16 else 0)
    return place


def _mpeg_at(file: _Bytes, place: int) -> bool:
    """Whether frames go on behind those that the Xing header counts: mp3 files one behind the other."""
    place = _behind_tags(file, place)
    head = file.at(place, 4)
    return file.size - place > TAIL and head[:1] == b"\xff" and is_mpeg(head)


CHECKS = {
    **dict.fromkeys(_LAYOUTS, _chunked),
    b".snd": _au,
    b"dns.": _au,
    b"NIST": _sphere,
    b"fLaC": _flac,
    b"OggS": _ogg,
}
