"""Archives as they were downloaded: checked, joined if they come in parts, and unpacked."""

import hashlib
import io
import itertools
import lzma
import os
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from corpus.folders import is_audio
from errors import UsageError, first_line, size_text
from preparation.corpora import UNSAFE
from preparation.journal import Journal, stamp

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
PART = re.compile(r"(?P<stem>.+?)(\.zip|\.tar\.gz|\.tgz|\.tar)?[._]?(part)?[._-]?(?P<part>a[a-z]|\d{2,3})$")
FIRST = ("aa", "00", "01", "000", "001")
PIECE = 1 << 22  # bytes at a time
# MD5 sums that VoxCeleb publishes.
KNOWN = {
    "vox1_dev_wav_partaa": "e395d020928bc15670b570a21695ed96",
    "vox1_dev_wav_partab": "bbfaaccefab65d82b21903e81a8a8020",
    "vox1_dev_wav_partac": "017d579a2a96a077f40042ec33e51512",
    "vox1_dev_wav_partad": "7bb1e9f70fddc7a678fa998ea8b3ba19",
    "vox1_test_wav.zip": "185fdc63c3c739954633d50379a3d102",
    "vox2_dev_aac_partaa": "da070494c573e5c0564b1d11c3b20577",
    "vox2_dev_aac_partab": "17fe6dab2b32b48abaf1676429cdd06f",
    "vox2_dev_aac_partac": "1de58e086c5edf63625af1cb6d831528",
    "vox2_dev_aac_partad": "5a043eb03e15c5a918ee6a52aad477f9",
    "vox2_dev_aac_partae": "cea401b624983e2d0b2a87fb5d59aa60",
    "vox2_dev_aac_partaf": "fc886d9ba90ab88e7880ee98effd6ae9",
    "vox2_dev_aac_partag": "d160ecc3f6ee3eed54d55349531cb42e",
    "vox2_dev_aac_partah": "6b84a81b9af72a9d9eecbb3b1f602e65",
    "vox2_test_aac.zip": "0d2b3ea430a821c33263b5ea37ede312",
}
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError)
HASHES = {32: "md5", 40: "sha1", 64: "sha256"}  # by the length of their text


def archives_of(path: Path) -> dict[str, list[Path]]:
    """{name: [parts in order]} of the archives in a folder, or of the one given."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    found = {}
    for file in files:
        part = PART.match(file.name)
        if file.name.lower().endswith(ENDINGS):
            stem = re.sub(r"(\.tar)?\.\w+$", "", file.name)
            found[file.name if stem in found else stem] = [file]  # as of ok.tar.gz and ok.zip
        elif part and part["part"] in FIRST and not is_audio(file.name) and _begins_as_archive(file):
            parts = sorted(p for p in file.parent.iterdir() if _is_part_of(p, part["stem"]))
            _check_whole(parts)
            found[file.name if part["stem"] in found else part["stem"]] = parts
    late = next(
        (p for p in files if re.search(r"part_?a[b-z]$", p.name) and PART.match(p.name)["stem"] not in found), None
    )
    if late is not None and not _begins_as_archive(first := late.with_name(late.name[:-1] + "a")):
        raise UsageError(f"{late}: the first part of this archive, {first.name}, is missing or none")
    return found


def _begins_as_archive(file: Path) -> bool:
    """Whether a first part holds what an archive begins with."""
    try:
        with open(file, "rb") as opened:
            return opened.read(4).startswith((b"PK\x03\x04", b"\x1f\x8b", b"BZh"))
    except FileNotFoundError:
        return False


def _check_whole(parts: list[Path]):
    """UsageError if a part between the first and the last is missing."""
    for before, after in itertools.pairwise(parts):
        name = PART.match(before.name)["part"]
        wanted = name[0] + chr(ord(name[1]) + 1) if name.isalpha() else f"{int(name) + 1:0{len(name)}d}"
        if PART.match(after.name)["part"] != wanted:
            raise UsageError(f"{after}: the part '{wanted}' of this archive is missing, before it lies {before.name}")


def _is_part_of(file: Path, stem: str) -> bool:
    part = PART.match(file.name)
    return bool(part) and part["stem"] == stem and file.is_file()


def unpacked(path: Path, out: Path, journal: Journal) -> Path:
    """The folder of what the archives in a folder, or the archive given, hold; the path itself if there are none.

    Archives beside recordings are left as they are, for they were unpacked already as a rule.
    """
    found = archives_of(path)
    if not found:
        return path
    if path.is_dir() and has_recordings(path):
        print(f"{path}: has recordings, so its archives stay packed; give {next(iter(found.values()))[0]} to unpack it")
        return path
    folder = _folder_for(path, out / "unpacked", journal)
    for name, parts in found.items():
        stamps = "|".join(stamp(str(part)) for part in parts)
        key, begun = f"unpacked|{folder / name}|{stamps}", f"begun|{folder / name}"
        if journal.get(key) is None or journal.get(begun) != stamps or not (folder / name).is_dir():
            check_sums(parts, journal)
            if journal.get(begun) not in (None, stamps):
                shutil.rmtree(folder / name, ignore_errors=True)  # of another archive that lay there
            if journal.get(begun) != stamps:
                journal.add(begun, stamps)
            unpack(parts, folder / name)
            if journal.get(key) is None:
                journal.add(key, True)
        print(f"{parts[0]}{f' and {len(parts) - 1} more parts' if parts[1:] else ''}: unpacked to {folder / name}")
    for table in (p for p in path.iterdir() if p.suffix in (".csv", ".txt", ".TXT")) if path.is_dir() else ():
        shutil.copyfile(table, folder / table.name)  # lists and tables of speakers beside the archives
    return folder


def _folder_for(path: Path, home: Path, journal: Journal) -> Path:
    """The folder for what is packed in ``path``: that of its name, with a number if another path has that."""
    name = path.name.removesuffix("".join(path.suffixes) if path.is_file() else "") or path.name
    folder, number = home / name, 1
    while journal.get(f"folder|{folder}") not in (None, str(path.absolute())):
        number += 1
        folder = home / f"{name}~{number}"
    if journal.get(f"folder|{folder}") is None:
        journal.add(f"folder|{folder}", str(path.absolute()))
    return folder


def has_recordings(folder: Path) -> bool:
    """Whether there is a recording below a folder."""
    return any(is_audio(name) for _, _, names in os.walk(folder) for name in names)


def check_sums(parts: list[Path], journal: Journal):
    """Hold the parts against the sums that are known, or in a file beside them such as md5sums.txt or NAME.md5."""
    for part in parts:
        wanted = _sums_beside(part.parent).get(part.name) or KNOWN.get(part.name)
        if wanted is None or journal.get(key := "sum|" + stamp(str(part))) == wanted:
            continue
        digest = hashlib.new(HASHES[len(wanted)])
        with open(part, "rb") as file, _bar(part.stat().st_size, f"checking {part.name}") as bar:
            while piece := file.read(PIECE):
                digest.update(piece)
                bar.update(len(piece))
        if digest.hexdigest() != wanted:
            kind = HASHES[len(wanted)].upper()
            raise UsageError(f"{part}: its {kind} sum is {digest.hexdigest()}, not {wanted}: download it again")
        journal.add(key, wanted)


def _sums_beside(folder: Path) -> dict[str, str]:
    """{file name: sum} of the tables of sums in a folder, lines 'SUM  NAME'."""
    sums = {}
    for table in sorted(p for p in folder.iterdir() if re.search(r"(md5|sha1|sha256)", p.name.lower())):
        if table.is_file() and table.stat().st_size < PIECE:
            for line in table.read_text(errors="replace").splitlines():
                words = line.split()
                if words and re.fullmatch(r"[0-9a-fA-F]+", words[0]) and len(words[0]) in HASHES:
                    name = words[1].lstrip("*") if len(words) > 1 else table.stem
                    sums[os.path.basename(name)] = words[0].lower()
    return sums


def _bar(total: int, words: str):
    hidden = not os.isatty(2)
    return tqdm(total=total, desc=words, unit="B", unit_scale=True, leave=False, ascii=True, disable=hidden)


class Joined(io.RawIOBase):
    """The parts of a file, read as one."""

    def __init__(self, parts: list[Path]):
        super().__init__()
        self.files = [open(part, "rb") for part in parts]  # noqa: SIM115 (closed with this object)
        self.sizes = [part.stat().st_size for part in parts]
        self.place = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: sum(self.sizes)}[whence]
        return self.place

    def tell(self):
        return self.place

    def readinto(self, buffer):
        at = self.place
        for file, size in zip(self.files, self.sizes):
            if at < size:
                file.seek(at)
                count = file.readinto(memoryview(buffer).cast("B")[: size - at])
                self.place += count
                return count
            at -= size
        return 0

    def close(self):
        for file in self.files:
            file.close()
        super().close()


def unpack(parts: list[Path], folder: Path):
    """Unpack an archive; members that are there in full are left. Nothing is written outside of the folder.

    UsageError for a member with a path that leads outside, a link or a device, and for an archive that is damaged.
    """
    try:
        with io.BufferedReader(Joined(parts), PIECE) as file:
            folder.mkdir(parents=True, exist_ok=True)
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    _unpack_zip(archive, parts[0], folder)
            else:
                file.seek(0)
                with tarfile.open(fileobj=file, mode="r:*") as archive:
                    _unpack_tar(archive, parts, folder)
    except DAMAGED as error:
        unknown = not str(error) or "not be opened" in str(error) or "not a zip" in str(error)  # words of no help
        why = "damaged, or not whole: download it again" if unknown else first_line(error)
        why += ": damaged, download it again" if not unknown and getattr(error, "errno", None) is None else ""
        raise UsageError(f"{parts[0]}: cannot be unpacked to '{folder}': {why}") from error
    except RuntimeError as error:  # what zipfile raises without a password
        raise UsageError(f"{parts[0]}: cannot be unpacked to '{folder}': {error}: unpack it by hand") from error


def _unpack_zip(archive: zipfile.ZipFile, path: Path, folder: Path):
    members = [member for member in archive.infolist() if not member.is_dir()]
    for member in members:
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UsageError(f"{path}: refused: '{member.filename}' is a link")
    places = [place_of(member.filename, path, folder) for member in members]
    left = [(member, place) for member, place in zip(members, places) if not _is_there(place, member.file_size)]
    total = sum(member.file_size for member, _ in left)
    _check_room(total, path, folder)
    with _bar(total, f"unpacking {path.name}") as bar:
        for member, place in left:
            with archive.open(member) as source:
                _write(source, place)
            bar.update(member.file_size)


def _unpack_tar(archive: tarfile.TarFile, parts: list[Path], folder: Path):
    with _bar(sum(part.stat().st_size for part in parts), f"unpacking {parts[0].name}") as bar:
        for member in archive:
            if member.isdir():
                continue
            if not member.isfile():
                raise UsageError(f"{parts[0]}: refused: '{member.name}' is a link or a device")
            place = place_of(member.name, parts[0], folder)
            if not _is_there(place, member.size):
                _write(archive.extractfile(member), place)
            bar.n = archive.fileobj.tell()
            bar.refresh()
        while archive.fileobj.read(PIECE):  # only at its end does a packed stream say whether it is whole
            pass


def place_of(name: str, path: Path, folder: Path) -> Path:
    """Where a member goes; UsageError if that is outside of the folder, or no name of a file."""
    inside = PurePosixPath(name.replace("\\", "/"))
    parts = [part for part in inside.parts if part != "."]
    if inside.is_absolute() or not parts or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise UsageError(f"{path}: refused: '{name}' leads out of the folder")
    if os.name == "nt":
        parts = [UNSAFE.sub("_", part) for part in parts]
    return folder.joinpath(*parts)


def _check_room(total: int, path: Path, folder: Path):
    free = shutil.disk_usage(folder).free
    if total > free:
        raise UsageError(f"{path}: needs {size_text(total)} below '{folder}', {size_text(free)} are free")


def _is_there(place: Path, size: int) -> bool:
    return place.is_file() and place.stat().st_size == size


def _write(source, place: Path):
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{place.name}.part")
    with open(part, "wb") as file:
        shutil.copyfileobj(source, file, PIECE)
    os.replace(part, place)
