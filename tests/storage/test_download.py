"""Files from a web server: whole, resumed, or not at all."""

import errno
import os
import shutil
import ssl
from collections import namedtuple

import pytest
from web_server import serving

from errors import UsageError
from storage import download as module
from storage.download import DownloadError, download

CONTENT = os.urandom(1_000_000)
ROOM = 10**9


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as site:
        site.files["/a.pt"] = CONTENT
        yield site


def test_a_file_comes_whole_and_a_connection_that_is_cut_twice_goes_on_where_it_was(site, tmp_path):
    site.cuts["/a.pt"] = [300_000, 200_000]
    assert download(site.url("/a.pt"), tmp_path / "part", ROOM).read_bytes() == CONTENT
    assert [(wanted, status) for _, wanted, status in site.asked] == [
        ("", 200),
        ("bytes=300000-", 206),
        ("bytes=500000-", 206),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_later_call_goes_on_with_what_an_earlier_one_kept(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    site.cuts["/a.pt"] = [400_000, 0, 0]
    with pytest.raises(DownloadError, match=r"cut; 0\.4 MB have come and are kept, the same command goes on"):
        download(site.url("/a.pt"), tmp_path / "part", ROOM)
    assert download(site.url("/a.pt"), tmp_path / "part", ROOM).read_bytes() == CONTENT
    assert site.asked[-1] == ("/a.pt", "bytes=400000-", 206)


def test_parts_of_two_versions_are_never_joined(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    site.cuts["/a.pt"] = [400_000, 0]
    with pytest.raises(DownloadError):
        download(site.url("/a.pt"), tmp_path / "part", ROOM)
    site.tag, site.files["/a.pt"], site.files["/b.pt"] = '"two"', CONTENT[::-1], b"other"
    assert download(site.url("/a.pt"), tmp_path / "part", ROOM).read_bytes() == CONTENT[::-1]
    # Bytes without a note of their version, and those of another address, are not built upon either.
    (tmp_path / "part").write_bytes(b"left by somebody")
    assert download(site.url("/b.pt"), tmp_path / "part", ROOM).read_bytes() == b"other"
    site.files["/a.pt"] = b"short"  # what is kept is longer than the file is now
    site.tag = '"three"'
    module._Part(tmp_path / "part").begin(site.url("/a.pt"), '"three"')
    (tmp_path / "part").write_bytes(CONTENT)
    assert download(site.url("/a.pt"), tmp_path / "part", ROOM).read_bytes() == b"short"


def test_a_weak_tag_is_none(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    site.tag = 'W/"one"'
    site.cuts["/a.pt"] = [400_000]
    assert download(site.url("/a.pt"), tmp_path / "part", ROOM).read_bytes() == CONTENT
    assert [wanted for _, wanted, _ in site.asked] == ["", ""]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.pt", "data:,hello"])
def test_a_redirect_leads_to_the_web_only(site, tmp_path, target):
    site.moved = {"/good": site.url("/a.pt"), "/bad": target}
    assert download(site.url("/good"), tmp_path / "part", ROOM).read_bytes() == CONTENT
    with pytest.raises(DownloadError, match=r"refused: it leads to|is not allowed"):
        download(site.url("/bad"), tmp_path / "part", ROOM)
    with pytest.raises(DownloadError, match="refused: only http and https"):
        download(target, tmp_path / "part", ROOM)


def test_a_redirect_from_https_to_http_is_refused():
    request = module.urllib.request.Request("https://example.org/a")
    with pytest.raises(DownloadError, match="neither https nor as safe"):
        module._Redirects().redirect_request(request, None, 302, "Found", {}, "http://example.org/a")


def test_what_goes_wrong_is_one_line(site, tmp_path, monkeypatch):
    def fails(path, limit=ROOM):
        with pytest.raises(UsageError) as caught:
            download(path if path.startswith("http") else site.url(path), tmp_path / "part", limit)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert fails("/none.pt") == f"{site.url('/none.pt')}: the server says 404 Not Found"
    assert "no network, or no such server" in fails("http://127.0.0.1:9/a.pt")
    assert fails("/a.pt", 999).endswith("1.0 MB or more, larger than the 0.0 MB that are allowed (--max_mb)")
    assert not (tmp_path / "part").exists()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    assert "needs 1.0 MB for" in fails("/a.pt") and "0.0 MB are free" in fails("/a.pt")
    monkeypatch.undo()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    assert fails("/a.pt") == f"{tmp_path / 'part'}: cannot be written: No space left on device"


def test_a_server_whose_certificate_is_wrong_is_asked_once(tmp_path, monkeypatch):
    asked = []

    class Opener:
        def open(self, request, timeout):
            asked.append(request.full_url)
            raise module.urllib.error.URLError(ssl.SSLCertVerificationError("certificate verify failed"))

    monkeypatch.setattr(module, "_opener", Opener)
    monkeypatch.setattr(ssl.SSLCertVerificationError, "verify_message", "self-signed certificate", raising=False)
    with pytest.raises(DownloadError, match=r"no trust in the server \(self-signed certificate\)"):
        download("https://example.org/a.pt", tmp_path / "part", ROOM)
    assert len(asked) == 1


def test_a_server_that_says_no_length_is_cut_off_at_the_limit(site, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_total", lambda *_: None)
    with pytest.raises(DownloadError, match=r"larger than the 0\.5 MB"):
        download(site.url("/a.pt"), tmp_path / "part", 500_000)
    assert not list(tmp_path.iterdir())
    assert download(site.url("/a.pt"), tmp_path / "part", ROOM).read_bytes() == CONTENT
