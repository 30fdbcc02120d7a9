"""fetch_model.py: a checkpoint from a web server to the commands that it prints, which run as printed."""

import hashlib
import re
import shlex
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from foreign_models import taoruijie, voice, wespeaker_resnet
from programs import ROOT
from web_server import serving

import embed
import fetch_model
import trainSpeakerNet
from settings.command_line import run
from storage import download


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0.01)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as site:
        yield site


@pytest.fixture
def table(site, tmp_path):
    """Writes a table of one row and returns the flags that take it and put the file below tmp_path."""

    def write(url="/model.pt", **keys):
        row = {"project": "theirs", "url": site.url(url), "file": "model.pt", "config": "taoruijie_ecapa512"}
        row |= {"page": "https://example.org", "licence": "MIT", "from": "LICENSE", "data": "VoxCeleb2"}
        (tmp_path / "table.yaml").write_text(yaml.safe_dump({"mine": row | keys}))
        return ["mine", "--table", str(tmp_path / "table.yaml"), "--dir", str(tmp_path / "got")]

    return write


def small():
    """A checkpoint of taoruijie's kind in bytes, the keys that make it small, and what it embeds."""
    file, keys, theirs = taoruijie()
    return as_bytes(file), {name: keys[name] for name in ("channels",)}, theirs


def as_bytes(file) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(file, buffer)
    return buffer.getvalue()


def fetch(capsys, words):
    status = run(fetch_model.main, words)
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def speech(folder, monkeypatch):
    """Speakers of noise below ``folder``/my, with lists, and A.wav, in the current folder."""
    monkeypatch.chdir(folder)
    rng, names = np.random.default_rng(0), []
    for speaker in ("a", "b"):
        for k in range(4):
            path = folder / "my" / "wav" / speaker / f"{k}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, 0.1 * rng.normal(size=12000), 16000)
            names.append(f"{speaker}/{k}.wav")
    (folder / "my" / "train.txt").write_text("".join(f"{name[0]} {name}\n" for name in names))
    (folder / "my" / "trials.txt").write_text(
        "1 a/0.wav a/1.wav\n1 b/0.wav b/1.wav\n0 a/0.wav b/0.wav\n0 a/1.wav b/1.wav\n"
    )
    soundfile.write(folder / "A.wav", voice(20000)[0].numpy(), 16000)


def test_the_commands_that_are_printed_run_as_printed(site, table, tmp_path, capsys, monkeypatch):
    content, keys, theirs = small()
    site.files["/model.pt"] = content
    status, out, err = fetch(capsys, table(keys=keys))
    assert (status, err) == (0, "") and "theirs's model.pt, licence: MIT, LICENSE" in out
    assert f"SHA-256 {hashlib.sha256(content).hexdigest()}; none is published" in out
    speech(tmp_path, monkeypatch)
    scripts = {"embed.py": embed.main, "trainSpeakerNet.py": trainSpeakerNet.main}
    lines = [shlex.split(line)[1:] for line in out.splitlines() if line.startswith("python ")]
    assert [line[0] for line in lines] == ["trainSpeakerNet.py", "embed.py", "trainSpeakerNet.py"]
    quick = ["--max_epoch", "3", "--batch_size", "4", "--max_frames", "40", "--nDataLoaderThread", "0"]
    for line in lines:
        more = quick if "--train_list" in line else []
        assert run(scripts[line[0]], [*line[1:], *more]) == 0, capsys.readouterr().err
    x = torch.from_numpy(soundfile.read("A.wav", dtype="float32")[0])
    ours = torch.from_numpy(np.load("A.npy"))
    assert torch.nn.functional.cosine_similarity(ours, theirs(x[None])[0], dim=0) > 1 - 1e-5
    assert (tmp_path / "exps" / "mine_tuned" / "model" / "model_best.model").is_file()


def test_the_command_to_give_again_is_quoted():
    row = SimpleNamespace(name="mine")
    assert fetch_model.command_of(row, Path("pretrained/mine")) == "python fetch_model.py mine"
    assert shlex.split(fetch_model.command_of(row, Path("my models/mine")))[2:] == ["mine", "--dir", "my models"]


def test_an_archive_is_opened_and_a_second_call_needs_no_network(site, table, tmp_path, capsys):
    file, keys, _ = wespeaker_resnet()
    keys = {name: value for name, value in keys.items() if name != "features"}
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("voxceleb/avg_model.pt", as_bytes(file))
        archive.writestr("voxceleb/config.yaml", "model: other")
    site.files["/a.zip"] = (tmp_path / "a.zip").read_bytes()
    words = table("/a.zip", file="avg_model.pt", config="wespeaker_resnet34", keys=keys)
    assert fetch(capsys, words)[0] == 0
    folder = tmp_path / "got" / "mine"
    assert {path.name for path in folder.iterdir()} - {".fetch.lock"} == {
        "avg_model.pt",
        "avg_model.pt.sha256",
        "config.yaml",
    }
    site.files.clear()
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + "# mine\n")
    status, out, _ = fetch(capsys, words)
    assert status == 0 and "that of the first download" in out and len(site.asked) == 1
    assert (folder / "config.yaml").read_text().endswith("# mine\n")  # what somebody changed is left
    # The same from a file that came another way, and another file in its place.
    (folder / "avg_model.pt").unlink()
    assert fetch(capsys, [*words, "--from", str(tmp_path / "a.zip")])[0] == 0
    assert (folder / "avg_model.pt").is_file() and (tmp_path / "a.zip").is_file()
    file["seg_1.weight"] += 1
    (tmp_path / "other.pt").write_bytes(as_bytes(file))
    status, _, err = fetch(capsys, [*words, "--from", str(tmp_path / "other.pt")])
    assert status == 2 and "not the file that came first" in err and "it is not kept" in err and err.count("\n") == 1
    (folder / "avg_model.pt").write_bytes((tmp_path / "other.pt").read_bytes())
    status, _, err = fetch(capsys, words)
    assert status == 2 and "remove it and run the command again" in err


def test_a_published_sum_is_held_to(site, table, tmp_path, capsys):
    content, keys, _ = small()
    site.files["/model.pt"] = content
    wrong = "0" * 64
    status, _, err = fetch(capsys, table(keys=keys, sha256=wrong))
    assert status == 2 and err.count("\n") == 1
    assert f"its SHA-256 is {hashlib.sha256(content).hexdigest()}, not {wrong}; it is not kept" in err
    assert [path.name for path in (tmp_path / "got" / "mine").iterdir()] == [".fetch.lock"]
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    status, out, _ = fetch(capsys, table(keys=keys, git_blob=blob))
    assert status == 0 and f"git blob {blob}, as published" in out
    assert not (tmp_path / "got" / "mine" / "model.pt.sha256").exists()
    status, _, err = fetch(capsys, table(keys=keys, git_blob="0" * 40))
    assert status == 2 and "its git blob is" in err


@pytest.mark.parametrize(
    "content, said",
    [
        (b"<html>log in</html>", "a web page, not a checkpoint; see https://example.org, get 'model.pt' there"),
        (b"junk" * 100, "remove it and fetch it again"),
        (None, "the server says 404 Not Found; get the file another way (https://example.org) and give it: python"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_a_line(content, said, site, table, tmp_path, capsys):
    if content:
        site.files["/model.pt"] = content
    status, _, err = fetch(capsys, table())
    assert status == 2 and said in err and err.count("\n") == 1, err
    assert not list((tmp_path / "got" / "mine").glob("*.sha256"))


def test_a_pickle_that_runs_something_is_refused(site, table, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    site.files["/model.pt"] = as_bytes({"a": torch.ones(2), "b": Evil()})
    status, _, err = fetch(capsys, table())
    assert status == 2 and "restricted loading" in err and not (tmp_path / "ran").exists()


def test_a_file_that_does_not_fit_its_row_is_refused(site, table, capsys):
    site.files["/model.pt"], _, _ = small()
    status, _, err = fetch(capsys, table())
    assert status == 2 and re.search(r"\d+ of \d+ tensors of ECAPA_TDNN match", err) and "fetch it again" in err


def test_names_and_flags(capsys, tmp_path):
    status, out, _ = fetch(capsys, ["--list"])
    assert status == 0 and "speechbrain-ecapa" in out and "CC BY 4.0" in out
    assert fetch(capsys, ["speechbrain-ecappa"])[2].endswith("did you mean 'speechbrain-ecapa'? (--list shows all)\n")
    assert fetch(capsys, [])[2] == "fetch_model.py: give the name of a checkpoint, or --list\n"
    assert "--max_mb: must be above 0" in fetch(capsys, ["x", "--max_mb", "0"])[2]
    (tmp_path / "file").write_text("")
    status, _, err = fetch(capsys, ["speechbrain-ecapa", "--dir", str(tmp_path / "file")])
    assert status == 2 and "cannot be written: Not a directory" in err
    assert "--from: no such file" in fetch(capsys, ["rawnet3", "--dir", str(tmp_path), "--from", "none.pt"])[2]
    assert (ROOT / "fetch_model.py").is_file()
