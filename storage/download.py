"""One file from a web server: resumed after a cut, and never larger than allowed."""

import contextlib
import errno
import http.client
import json
import os
import shutil
import socket
import ssl
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from errors import UsageError, first_line

PIECE = 1 << 18  # bytes at a time
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row that bring nothing new
PAUSE = 1.0  # seconds before the second attempt, twice as long before each further one
SPARE = 1 << 20  # bytes of the disk that are left free
# What Python raises where a server or the way to it fails: the file may be had later, or elsewhere.
BROKEN = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, socket.timeout, ConnectionError, TimeoutError)


class DownloadError(UsageError):
    """A file did not come; one line that names its address. ``later``: what came is kept for the next attempt."""

    def __init__(self, url: str, reason: str, later: bool = False):
        super().__init__(f"{url}: {reason}")
        self.later = later


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows from http to http or https, and from https to https."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after not in ("http", "https") or (before, after) == ("https", "http"):
            raise DownloadError(req.full_url, f"refused: it leads to '{newurl}', which is neither https nor as safe")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """What opens http and https, and neither files nor ftp; proxies are those of the environment."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


@dataclass
class _Part:
    """What has come of a file, beside the note that says of which version it is."""

    path: Path  # of the bytes

    @property
    def note(self) -> Path:
        """The file of the note."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def size(self) -> int:
        """Bytes that have come."""
        return self.path.stat().st_size if self.path.is_file() else 0

    def version(self, url: str) -> str:
        """What the server called the version that the bytes are of, "" if that is not known."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        known = isinstance(note, dict) and note.get("url") == url and isinstance(note.get("version"), str)
        return note["version"] if known else ""

    def begin(self, url: str, version: str):
        """Forget what has come, and note what comes now."""
        self.path.write_bytes(b"")
        self.note.write_text(json.dumps({"url": url, "version": version}), encoding="utf-8")

    def forget(self):
        """Remove both files."""
        for path in (self.path, self.note):
            path.unlink(missing_ok=True)


def download(url: str, part, limit: int, progress: bool = True) -> Path:
    """Fetch ``url`` into the file ``part`` and return its path when it is whole; DownloadError if it does not come.

    A ``part`` that an attempt before has left is continued (HTTP range) if the server still has the same version of
    the file, by its strong ETag or its date. A connection that breaks is tried again as long as something new comes.
    ``limit``: bytes that the file may have at most.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(url, "refused: only http and https are fetched")
    kept, pause, failed = _Part(Path(part)), PAUSE, 0
    while True:
        before = kept.size
        try:
            _attempt(url, kept, limit, progress)
            kept.note.unlink(missing_ok=True)
            return kept.path
        except urllib.error.HTTPError as error:
            if error.code == 416 and kept.size:  # what is kept reaches beyond the file: another version
                kept.forget()
                continue
            if error.code < 500 and error.code not in (408, 429):
                raise DownloadError(url, f"the server says {error.code} {error.reason}") from error
            reason = f"the server says {error.code} {error.reason}"
        except BROKEN as error:
            reason = _reason(error)
        except OSError as error:
            raise _disk(kept.path, error) from error
        failed = 0 if kept.size > before else failed + 1
        if failed == 0:
            pause = PAUSE
        if failed >= ATTEMPTS or _hopeless(reason):
            came = f"; {megabytes(kept.size)} have come and are kept, the same command goes on" if kept.size else ""
            raise DownloadError(url, f"{reason}{came}", later=True)
        time.sleep(pause)
        pause *= 2


def _hopeless(reason: str) -> bool:
    """Whether trying again at once is of no use: no network, no such server, or one that is not who it says."""
    return reason.startswith(("no network", "no trust"))


def _reason(error) -> str:
    """A broken connection in a few words."""
    cause = getattr(error, "reason", error)
    if isinstance(cause, (socket.gaierror, ConnectionRefusedError)) or getattr(cause, "errno", None) in (
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
    ):
        return f"no network, or no such server ({first_line(cause)})"
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"no trust in the server ({getattr(cause, 'verify_message', '') or first_line(cause)})"
    if isinstance(cause, (socket.timeout, TimeoutError)):
        return f"no answer for {TIMEOUT:g} s"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was cut"
    return f"the connection failed ({first_line(cause) if isinstance(cause, BaseException) else cause})"


def _disk(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: cannot be written: {error.strerror or error}")


def _attempt(url: str, kept: _Part, limit: int, progress: bool):
    """Ask once, for the rest of what is kept if there is any, and write what comes."""
    from tqdm import tqdm

    version = kept.version(url)
    have = kept.size if version else 0
    request = urllib.request.Request(url, headers={"User-Agent": "fetch_model", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        request.add_header("If-Range", version)
    with contextlib.closing(_opener().open(request, timeout=TIMEOUT)) as answer:
        if have and not (answer.status == 206 and _begins_at(answer.headers, have)):
            have = 0
        total = _total(answer.headers, have)
        _check(url, kept.path, total, have, limit)
        if not have:
            kept.begin(url, _version_of(answer.headers))
        hidden = not (progress and os.isatty(2))
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, leave=False, ascii=True, disable=hidden)
        with bar, open(kept.path, "ab") as file:
            while piece := answer.read(PIECE):
                have += len(piece)
                if have > limit:
                    file.close()
                    kept.forget()
                    raise DownloadError(url, _too_large(have, limit))
                file.write(piece)
                bar.update(len(piece))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have < total:
        raise http.client.IncompleteRead(b"", total - have)


def _begins_at(headers, place: int) -> bool:
    return headers.get("Content-Range", "").startswith(f"bytes {place}-")


def _total(headers, have: int) -> int | None:
    """Bytes of the whole file, None if the server does not say."""
    length = headers.get("Content-Length", "")
    return have + int(length) if length.isdigit() else None


def _version_of(headers) -> str:
    """What an If-Range may hold (RFC 9110, section 13.1.5): a strong ETag, else the date of the last change."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _check(url: str, path: Path, total: int | None, have: int, limit: int):
    """DownloadError for a file that is larger than allowed, UsageError for one that the disk has no room for."""
    if total is None:
        return
    if total > limit:
        raise DownloadError(url, _too_large(total, limit))
    free = shutil.disk_usage(path.parent).free
    if total - have + SPARE > free:
        raise UsageError(f"{path.parent}: needs {megabytes(total - have)} for {url}, {megabytes(free)} are free")


def _too_large(size: int, limit: int) -> str:
    return f"{megabytes(size)} or more, larger than the {megabytes(limit)} that are allowed (--max_mb)"


def megabytes(count: int) -> str:
    """'26.6 MB'."""
    return f"{count / 1e6:.1f} MB"
