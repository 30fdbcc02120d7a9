"""The table of published checkpoints: what it says of each, and how a downloaded file becomes one that can be used.

`python -m storage.published docs/models.md` writes the table into the page anew.
"""

import hashlib
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path, PurePosixPath, PureWindowsPath

import yaml

from errors import UsageError, first_line
from settings import plain_yaml, plugins
from storage.files import PIECE, replacing, write_atomically

TABLE = Path(__file__).with_name("published.yaml")
CONFIGS = plugins.ROOT / "configs" / "interop"
BEGIN, END = "<!-- checkpoints: made by storage/published.py -->\n", "<!-- end of checkpoints -->"
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, ValueError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Published:
    """A checkpoint that a project publishes. The comment at the top of the table says what each field means."""

    name: str
    project: str
    url: str
    file: str
    config: str
    page: str
    licence: str
    licence_from: str
    data: str
    eer: str
    how: str = ""
    sha256: str = ""
    git_blob: str = ""
    keys: dict = field(default_factory=dict)

    @property
    def base(self) -> Path:
        """The configuration of its architecture and features, to which ``keys`` come."""
        return CONFIGS / f"{self.config}.yaml"


def read_table(path=TABLE) -> dict[str, Published]:
    """{name: checkpoint} of a table; UsageError that names the row and the key for what it may not hold."""
    try:
        rows = plain_yaml.load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(rows, dict) or not rows:
        raise UsageError(f"{path}: expected rows by name")
    return {str(name): _row(str(name), row, f"{path}: {name}") for name, row in rows.items()}


def _row(name: str, row, where: str) -> Published:
    known = {f.name: f for f in fields(Published) if f.name != "name"}
    if not isinstance(row, dict):
        raise UsageError(f"{where}: expected keys and values")
    row = {"licence_from" if key == "from" else key: value for key, value in row.items()}
    for key, value in row.items():
        if key not in known:
            raise UsageError(f"{where}: unknown key '{key}'")
        if not isinstance(value, dict if key == "keys" else str):
            raise UsageError(f"{where}: {key}: expected {'keys and values' if key == 'keys' else 'a text'}")
    needed = [key for key in ("project", "url", "file", "config", "page", "licence") if not row.get(key)]
    if needed:
        raise UsageError(f"{where}: {needed[0]} is missing")
    for key, letters in (("sha256", 64), ("git_blob", 40)):
        value = row.get(key, "")
        if value and (len(value) != letters or set(value) - set("0123456789abcdef")):
            raise UsageError(f"{where}: {key}: expected {letters} small hexadecimal digits, got '{value}'")
    for key in ("file", "config"):
        if {PurePosixPath(row[key]).name, PureWindowsPath(row[key]).name} != {row[key]} or row[key].startswith("."):
            raise UsageError(f"{where}: {key}: expected the name of a file, got '{row[key]}'")
    if not (CONFIGS / f"{row['config']}.yaml").is_file():
        raise UsageError(f"{where}: config: no such file: configs/interop/{row['config']}.yaml")
    return Published(name, **{"licence_from": "", "data": "", "eer": "-", **row})


def sums_of(path) -> tuple[str, str]:
    """The SHA-256 of a file, and what git calls a blob of its content (SHA-1 of a header and the bytes)."""
    size = Path(path).stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            sha256.update(piece)
            blob.update(piece)
    return sha256.hexdigest(), blob.hexdigest()


def is_archive(path) -> bool:
    """Whether a file is a zip or tar archive of files, and no checkpoint, which torch packs as a zip too."""
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                return not any(PurePosixPath(name).name == "data.pkl" for name in archive.namelist())
        except (*DAMAGED, OSError):
            return False  # the reader of checkpoints says what it is
    with open(path, "rb") as file:
        begin = file.read(262)
    packed = begin.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")) or begin[257:] == b"ustar"
    return packed and tarfile.is_tarfile(path)


def is_web_page(path) -> bool:
    """Whether a file is HTML: what a server sends that wants a login or has moved the file."""
    with open(path, "rb") as file:
        begin = file.read(512).lstrip().lower()
    return begin.startswith((b"<!doctype html", b"<html", b"<?xml"))


def take(path, name: str, target, limit: int):
    """Put the checkpoint ``name`` at ``target``: the file ``path`` itself, or the one of that name in an archive.

    Of an archive nothing else is written and no path of it is used; ``limit``: bytes that the file may have. UsageError
    if it holds no such file, two of them, or a link in its place, or is damaged.
    """
    if not is_archive(path):
        with open(path, "rb") as source:
            return _copy(source, target, limit, path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                files = {member.filename: member for member in archive.infolist() if not member.is_dir()}
                with archive.open(files[_only(files, name, path)]) as source:
                    return _copy(source, target, limit, path)
        with tarfile.open(path) as archive:
            members = {member.name: member for member in archive if member.isfile()}
            with archive.extractfile(members[_only(members, name, path)]) as source:
                return _copy(source, target, limit, path)
    except DAMAGED as error:
        raise UsageError(f"{path}: damaged: {first_line(error)}; remove it and run the command again") from error


def _only(names, name: str, path) -> str:
    """The one of the paths in an archive whose last part is ``name``."""
    found = [inside for inside in names if PurePosixPath(inside.replace("\\", "/")).name == name]
    if len(found) != 1:
        held = ", ".join(sorted(PurePosixPath(inside).name for inside in names)[:5]) or "no files"
        raise UsageError(f"{path}: holds {len(found) or 'no'} file{'s' * (len(found) > 1)} '{name}', but {held}")
    return found[0]


def _copy(source, target, limit: int, path):
    with replacing(target) as temporary, open(temporary, "wb") as file:
        left = limit
        while piece := source.read(PIECE):
            left -= len(piece)
            if left < 0:
                raise UsageError(f"{path}: its checkpoint is larger than the {limit / 1e6:g} MB allowed (--max_mb)")
            file.write(piece)


def markdown(rows: dict[str, Published]) -> str:
    """The table for docs/models.md."""
    heads = "`fetch_model.py`", "configuration", "trained on", "EER on O / E / H (%)", "licence", "sum"
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows.values():
        keys = "".join(f", `{key}: {value}`" for key, value in row.keys.items())
        eer = row.eer + (f" ({row.how})" if row.how and row.eer != "-" else "")
        known = "SHA-256" if row.sha256 else "git" if row.git_blob else "-"
        cells = f"[`{row.name}`]({row.page})", f"`{row.config}`{keys}", row.data, eer, row.licence, known
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv) -> int:
    """Write the table into the pages that are named."""
    for path in argv:
        before, _, rest = Path(path).read_text(encoding="utf-8").partition(BEGIN)
        if not rest:
            raise UsageError(f"{path}: no line {BEGIN.strip()}")
        write_atomically(path, (before + BEGIN + markdown(read_table()) + END + rest.partition(END)[2]).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
