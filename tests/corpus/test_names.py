"""Names of files that an encoding lacks, and recordings where links and other formats put them."""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import programs
import pytest
import soundfile
import torch
from programs import ROOT

import analyze_nan_debug
import embed
import enroll
from corpus.augmentation import find_noise, find_rirs
from corpus.folders import find_recordings
from corpus.measuring import Source, measure
from errors import write_any_text
from preflight.files import report_files
from preflight.report import Report
from scoring.files import read_scores
from scoring.sources import _duration
from settings.command_line import picture, run
from storage.files import save_atomically
from storage.speaker_store import SpeakerStore

CAFE = os.fsdecode(b"caf\xe9.wav")  # written by a system whose names are Latin-1


def tone(path, seconds=0.9, seed=0):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "wb") as file:
            samples = np.random.default_rng(seed).normal(0, 0.1, int(16000 * seconds))
            soundfile.write(file, samples, 16000, format="FLAC" if str(path).endswith("flac") else "WAV")
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 names only")
    return path


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_any_text_can_be_printed(encoding, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    write_any_text()
    for stream in streams:
        print(f"{picture(chr(0x1F6A8))}NaN of 名前.wav and {CAFE}", file=stream, flush=True)
    written = [stream.buffer.getvalue().decode(encoding) for stream in streams]
    name = "名前" if encoding == "utf-8" else "\\u540d\\u524d"
    alarm = f"{chr(0x1F6A8)} " if encoding == "utf-8" else ""
    assert written == [f"{alarm}NaN of {name}.wav and caf\\udce9.wav\n"] * 2


def test_every_command_line_prints_through_such_streams():
    scripts = [p for p in ROOT.glob("*.py") if "__main__" in p.read_text(encoding="utf-8")]
    assert len(scripts) > 10
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert re.search(r"sys\.exit\((run\(main\)|command\(\))\)|^    write_any_text\(\)", text, re.M), script


def test_a_nan_and_names_of_all_kinds_do_not_end_a_run_whose_output_is_cp1252(
    settings, data, write, tools, tmp_path, monkeypatch
):
    wav = tmp_path / "wav"
    shutil.copytree(data / "wav", wav)
    tone(wav / "l1" / CAFE, seed=1)
    (wav / "名前.wav").touch()
    train = (data / "train_list.txt").read_bytes() + "train000 名前.wav\n".encode() + b"train001 l1/caf\xe9.wav\n"
    trials = (data / "trials.txt").read_bytes()
    trials += b"0 l1/caf\xe9.wav " + trials.split()[1] + b"\n"
    (tmp_path / "train.txt").write_bytes(train)
    (tmp_path / "trials.txt").write_bytes(trials)
    for kind in ("noise", "music", "speech"):
        tone(tmp_path / "musan" / kind / CAFE)
    keys = {"train_list": str(tmp_path / "train.txt"), "test_list": str(tmp_path / "trials.txt")}
    keys |= {"train_path": str(wav), "test_path": str(wav), "musan_path": str(tmp_path / "musan"), "augment": True}
    keys |= {"augment_prob": 1.0, "max_epoch": 1, "test_interval": 1, "nan_inject": "2:data", "max_bad_files_pct": 50}
    keys |= {"nDataLoaderThread": 1}
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    done = programs.run_anew(ROOT / "trainSpeakerNet.py", "--config", write({**settings, **keys}))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert "\nNaN/Inf DATA DETECTED AT BATCH 2\n" in done.stdout
    assert "\\u540d\\u524d.wav" in done.stdout  # the empty file is named
    result = Path(settings["save_path"], "result")
    for line in (result / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        json.loads(line)
    assert f"l1/{CAFE}" in read_scores(result / "trials_epoch_1.txt").first
    dumps = {path: torch.load(path, weights_only=True) for path in result.parent.glob("debug_nan/nan_batch_2_*.pt")}
    (dump,) = (path for path, content in dumps.items() if content["reason"] == "batch_nonfinite")  # not the bad file's
    drawn = [draw["path"] for row in dumps[dump]["files"] for draw in row["augment"]]
    assert drawn and {Path(path).name for path in drawn} == {CAFE}
    assert analyze_nan_debug.main([str(dump), "--no-replay", "--html", str(tmp_path / "page.html")]) == 0
    assert "caf\\udce9.wav" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.fixture
def checkpoint(settings, tools, tmp_path):
    path = tmp_path / "model.model"
    save_atomically(tools.build(settings).state.capture(), path)
    return path


def test_a_name_that_is_not_utf8_is_embedded_under_it(checkpoint, tmp_path):
    folder = tmp_path / "l1"
    tone(folder / CAFE)
    tone(folder / "a.wav", 1.1)
    (tmp_path / "list").write_bytes(b"caf\xe9.wav\na.wav\n")
    words = ["--initial_model", str(checkpoint), "--out", str(tmp_path / "e.npz")]
    for given in (["--dir", str(folder)], ["--list", str(tmp_path / "list"), "--root", str(folder)]):
        assert run(embed.main, [*words, *given]) == 0
        with np.load(tmp_path / "e.npz") as file:
            assert sorted(file["names"].tolist()) == ["a.wav", CAFE]
    assert _duration(folder / CAFE) == pytest.approx(0.9)
    words = ["ann", str(folder / CAFE), "--store", str(tmp_path / "s.npz"), "--initial_model", str(checkpoint)]
    assert run(enroll.main, words) == 0
    (heard,) = SpeakerStore.open(tmp_path / "s.npz", "", 0).utterances("ann")
    assert heard.source == str(folder / CAFE)


def test_a_name_that_is_not_utf8_is_in_the_report_of_a_preflight(tmp_path):
    path, report = tone(tmp_path / CAFE, 0), Report()
    measured = [(source, measure(source)) for source in [Source(str(path), "list:1", {"train"})]]
    report_files(measured, 2.0, False, report)
    report.write(tmp_path)
    assert "caf\\udce9.wav  no samples" in (tmp_path / "preflight.txt").read_text(encoding="utf-8")


def test_recordings_behind_links_and_in_other_formats_are_found(tmp_path):
    musan, other = tmp_path / "musan", tmp_path / "disk"
    tone(other / "deep" / "b.flac")
    tone(musan / "noise" / "a.wav")
    tone(musan / "speech" / "x" / "c.WAV")
    try:
        (musan / "music").symlink_to(other, target_is_directory=True)
        (other / "round").symlink_to(musan, target_is_directory=True)  # a way back to where the walk began
        (tmp_path / "link").symlink_to(musan, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    found = {kind: [Path(p).relative_to(musan).as_posix() for p in files] for kind, files in find_noise(musan).items()}
    assert found == {"noise": ["noise/a.wav"], "music": ["music/deep/b.flac"], "speech": ["speech/x/c.WAV"]}
    assert len(find_rirs(tmp_path / "link")) == 3


def test_noise_is_found_in_the_order_of_before(tmp_path):
    for name in ("noise/b/2.wav", "noise/b-1/1.wav", "noise/a.wav", "noise/B/x.wav", "noise/b/10.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_recordings(tmp_path) == sorted(tmp_path.rglob("*.wav"))
