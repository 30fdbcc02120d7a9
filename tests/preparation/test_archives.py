"""Archives are joined, checked and unpacked, and nothing leaves the folder."""

import hashlib
import io
import os
import tarfile
import types
import zipfile

import pytest

from errors import UsageError
from preparation import archives
from preparation.archives import archives_of, unpack, unpacked
from preparation.journal import Journal


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "files.jsonl")
    yield journal
    journal.close()


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_parts_of_an_archive_are_joined_and_checked(tmp_path, journal, capsys):
    content = {f"wav/id1000{i}/v/0.wav": os.urandom(3000) for i in range(3)}
    data = zipped(tmp_path / "whole.zip", content).read_bytes()
    down = tmp_path / "down"
    down.mkdir()
    for i, letter in enumerate("abc"):
        (down / f"vox_dev_parta{letter}").write_bytes(data[i * 4000 : (i + 1) * 4000 if i < 2 else None])
    (down / "vox_dev.md5").write_text(
        "".join(f"{hashlib.md5(p.read_bytes()).hexdigest()}  {p.name}\n" for p in sorted(down.glob("*part*")))
    )
    (down / "list_of_trials.txt").write_text("1 a b\n")
    folder = unpacked(down, tmp_path / "out", journal)
    assert "vox_dev_partaa and 2 more parts: unpacked" in capsys.readouterr().out
    assert {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.wav")} == {
        f"vox_dev/{name}": value for name, value in content.items()
    }
    assert (folder / "list_of_trials.txt").exists()
    changed = bytearray((down / "vox_dev_partab").read_bytes())
    changed[100] ^= 1
    (down / "vox_dev_partab").write_bytes(changed)
    with pytest.raises(UsageError, match=r"vox_dev_partab: its MD5 sum is \w+, not \w+: download it again"):
        unpacked(down, tmp_path / "out", journal)


def test_what_is_there_in_full_is_not_written_again(tmp_path, journal):
    archive = zipped(tmp_path / "a.zip", {"x/1.wav": b"one", "x/2.wav": b"two"})
    unpack([archive], tmp_path / "out")
    (tmp_path / "out" / "x" / "1.wav").write_bytes(b"ONE")  # of the same size: left
    (tmp_path / "out" / "x" / "2.wav").write_bytes(b"t")  # cut by a kill
    unpack([archive], tmp_path / "out")
    assert [(tmp_path / "out" / "x" / f"{i}.wav").read_bytes() for i in (1, 2)] == [b"ONE", b"two"]


def test_an_archive_goes_on_where_there_is_room_for_what_is_left_of_it(tmp_path, monkeypatch):
    archive = zipped(tmp_path / "a.zip", {"x/1.wav": bytes(3000), "x/2.wav": bytes(2000)})
    unpack([archive], tmp_path / "out")
    (tmp_path / "out" / "x" / "2.wav").unlink()  # killed before it came
    free = [1999]
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=free[0]))
    with pytest.raises(UsageError, match=r"a\.zip: needs 2 kB below"):
        unpack([archive], tmp_path / "out")
    free[0] = 2000
    unpack([archive], tmp_path / "out")
    assert (tmp_path / "out" / "x" / "2.wav").read_bytes() == bytes(2000)


@pytest.mark.parametrize("name", ["../evil.wav", "/evil.wav", "a/../../evil.wav", "C:\\evil.wav", "..\\evil.wav"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_path_that_leads_out_is_refused(tmp_path, name, kind):
    archive = tmp_path / "in" / f"a.{kind}"
    archive.parent.mkdir()
    if kind == "zip":
        zipped(archive, {"good.wav": b"x", name: b"x"})
    else:
        with tarfile.open(archive, "w") as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    with pytest.raises(UsageError, match=r"refused: '.*' leads out of the folder"):
        unpack([archive], tmp_path / "in" / "out")
    assert not list(tmp_path.rglob("evil*")) and not list(tmp_path.rglob("good*"))


def test_links_and_devices_are_refused_and_damage_is_said(tmp_path):
    archive = tmp_path / "a.tar.gz"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        with tarfile.open(archive, "w:gz") as tar:
            member = tarfile.TarInfo("link")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        with pytest.raises(UsageError, match="'link' is a link or a device"):
            unpack([archive], tmp_path / "out")
    whole = zipped(tmp_path / "b.zip", {"1.wav": os.urandom(9999)}).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[:5000])
    with pytest.raises(UsageError, match=r"b\.zip: cannot be unpacked"):
        unpack([tmp_path / "b.zip"], tmp_path / "out")


def test_archives_beside_recordings_stay_packed(tmp_path, journal, capsys):
    folder = tmp_path / "vox"
    (folder / "wav").mkdir(parents=True)
    zipped(folder / "dev.zip", {"wav/1.wav": b"x"})
    assert unpacked(folder, tmp_path / "out", journal) == tmp_path / "out" / "unpacked" / "vox"
    (folder / "wav" / "1.wav").write_bytes(b"x")
    assert unpacked(folder, tmp_path / "out2", journal) == folder and not (tmp_path / "out2").exists()
    assert f"so its archives stay packed; give {folder / 'dev.zip'} to unpack it" in capsys.readouterr().out
    assert unpacked(folder / "dev.zip", tmp_path / "out2", journal) == tmp_path / "out2" / "unpacked" / "dev"


def test_only_archives_are_taken_for_such(tmp_path):
    for name in ("ann_01", "notes.txt", "vox1_dev_wav_partaa", "a.wav"):
        (tmp_path / name).write_bytes(b"RIFF no archive")
    assert archives_of(tmp_path) == {}
