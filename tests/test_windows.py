"""embed.py --window and identify.py --along through the command line, on voices joined to a conversation."""

import itertools
import json
import re

import numpy as np
import pytest
import soundfile

import embed
import enroll
import identify
import trainSpeakerNet
from scoring.backend import Backend
from scoring.calibration import LogisticCalibration
from settings.command_line import run
from speaker_model import load_model
from storage.embedding_files import read_embeddings, window_name

RATE = 16000


def call(script, capsys, *words):
    status = run(script.main, [str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="session")
def voices(data):
    """{speaker: [wave of each utterance]} of the training speakers."""
    folders = sorted(p for p in (data / "wav").iterdir() if p.name.startswith("train"))
    return {p.name: [soundfile.read(f, dtype="float32")[0] for f in sorted(p.rglob("*.flac"))] for p in folders}


@pytest.fixture(scope="session")
def model(data, tmp_path_factory):
    """A checkpoint that tells the training speakers apart, with a calibration beside it."""
    folder = tmp_path_factory.mktemp("windows")
    keys = {"train_list": data / "train_list.txt", "test_list": data / "trials.txt", "save_path": folder}
    keys |= {"train_path": data / "wav", "test_path": data / "wav", "model": "ECAPA_TDNN", "channels": 16}
    keys |= {"aggregate": 32, "n_mels": 24, "nOut": 12, "trainfunc": "aamsoftmax", "margin": 0.1, "scale": 15}
    keys |= {"optimizer": "adam", "scheduler": "cosine", "lr": 0.01, "batch_size": 10, "max_frames": 60}
    keys |= {"max_epoch": 20, "test_interval": 20, "eval_frames": 0, "patience": 0, "picture_format": "none"}
    keys |= {"nDataLoaderThread": 0, "threads": 1, "seed": 3}
    assert trainSpeakerNet.main([str(word) for key, value in keys.items() for word in (f"--{key}", value)]) == 0
    path = folder / "model" / "model_best.model"
    identity = load_model(path).identity
    Backend(calibration=LogisticCalibration([12.0], -5.0), identity=identity).save(path.with_suffix(".calibration"))
    return path


def joined(voices, path, turns, silence=1.0):
    """Write turns (speaker, number of utterances; None: silence) to a file; returns [(start, end, speaker)] in s."""
    pieces, truth, place, used = [], [], 0, {}
    for speaker, count in turns:
        if speaker is None:
            piece = np.zeros(round(silence * RATE), np.float32)
        else:
            first = used.get(speaker, 1)  # utterance 0 is enrolled
            own = voices[speaker][1:]
            piece = np.concatenate([own[(first + i) % len(own)] for i in range(count)])
            used[speaker] = first + count
        truth.append((place / RATE, (place + len(piece)) / RATE, speaker))
        pieces.append(piece)
        place += len(piece)
    soundfile.write(path, np.concatenate(pieces), RATE)
    return truth


def share_right(truth, segments, names) -> float:
    """Share of the time of a recording, in steps of 10 ms, whose speaker is named rightly."""

    def at(rows, t):
        return next((name for start, end, name in rows if start <= t < end), None)

    found = [(s["start"], s["end"], s["speaker"]) for s in segments]
    moments = np.arange(0, truth[-1][1] - 0.005, 0.01) + 0.005
    right = [at(found, t) == (name if (name := at(truth, t)) in names else None) for t in moments]
    return float(np.mean(right))


def test_windows_are_embedded_by_name_and_each_as_its_piece_alone(model, voices, tmp_path, capsys):
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    joined(voices, a, [("train000", 3), (None, 1), ("train001", 1)], silence=3.0)
    joined(voices, b, [("train002", 1)])
    words = ("--initial_model", model, "--dir", tmp_path, "--window", 1, "--step", 0.5)
    status, out, err = call(embed, capsys, *words, "--out", tmp_path / "w.npz")
    names, x = read_embeddings(tmp_path / "w.npz")
    assert status == 0 and re.search(r"a\.wav: \d of \d+ windows left out, the first at 3\.00 s: silent: all zero", err)
    assert f"{len(names)} embeddings of dimension 12, " in out and names == sorted(names)
    assert names[0] == window_name("a.wav", 0, 1) == "a.wav#00000.000-00001.000"
    length = soundfile.info(b).duration
    assert [n for n in names if n.startswith("b")] == [f"b.wav#00000.000-{length:09.3f}"]  # shorter than a window
    network = load_model(model)
    times, y, reasons = network.embed_windows(a, 1, 0.5, batch_size=3)
    kept = [i for i in range(len(times)) if i not in reasons]
    assert np.allclose(y[kept], x[: len(kept)], atol=1e-5) and np.isnan(y[sorted(reasons)]).all()
    wave = soundfile.read(a, dtype="float32")[0]
    for i, name in zip(kept, names):
        start, end = times[i]
        assert [float(t) for t in re.fullmatch(r"a\.wav#([\d.]+)-([\d.]+)", name).groups()] == [
            round(start, 3),
            round(end, 3),
        ]
        assert np.allclose(y[i], network.embed(wave[round(start * RATE) : round(end * RATE)]), atol=1e-4)
    assert call(embed, capsys, *words, "--out", tmp_path / "w.ark")[0] == 0
    assert read_embeddings(tmp_path / "w.scp")[0] == names


def test_recordings_without_a_voice_and_files_that_are_none(model, voices, tmp_path, capsys):
    joined(voices, tmp_path / "a.wav", [("train000", 1)])
    soundfile.write(tmp_path / "silent.wav", np.zeros(3 * RATE), RATE)
    (tmp_path / "none.wav").write_bytes(b"RIFF")
    files = [tmp_path / name for name in ("a.wav", "silent.wav", "none.wav")]
    words = ("--initial_model", model, "--window", 0.8, "--out", tmp_path / "w.npz", "--wav")
    status, _, err = call(embed, capsys, *words, *files)
    assert status == 1 and "silent.wav: 4 of 4 windows left out" in err and err.count("\n") == 2
    assert all(name.startswith(str(files[0])) for name in read_embeddings(tmp_path / "w.npz")[0])
    status, _, err = call(embed, capsys, *words, *files[1:])
    assert status == 2 and "no window of 2 recordings could be embedded; nothing is written" in err


@pytest.mark.parametrize(
    "words, said",
    [
        (["--window", 0], "--window: must be at least 0.025 s, got 0"),
        (["--window", 3, "--step", 5], "--step: 5 s is longer than the window of 3 s"),
        (["--window", 3, "--step", 0], "--step: must be at least 0.01 s, got 0"),
        (["--step", 1], "--step: is from a window to the next; give --window too"),
        (["--window", 3, "--workers", 2], "--workers: reads whole recordings"),
        (["--window", 3, "--out", "e.npy"], "--out: a .npy file holds one embedding"),
    ],
)
def test_windows_that_cannot_be_are_one_line(words, said, capsys, tmp_path):
    status, _, err = call(embed, capsys, "--initial_model", "x", "--wav", "y", "--out", tmp_path / "e.npz", *words)
    assert status == 2 and err.startswith(said) and err.count("\n") == 1, err


@pytest.fixture
def store(model, voices, tmp_path, capsys):
    """Three of the voices, enrolled by one utterance each."""
    for name in ("train000", "train001", "train002"):
        soundfile.write(tmp_path / f"{name}.wav", voices[name][0], RATE)
        words = ("--store", tmp_path / "speakers.npz", "--initial_model", model)
        assert call(enroll, capsys, name, tmp_path / f"{name}.wav", *words)[0] == 0
    return tmp_path / "speakers.npz"


def test_who_speaks_when_is_named_drawn_and_written_for_others(model, voices, store, tmp_path, capsys):
    turns = [("train000", 4), ("train001", 3), (None, 1), ("train000", 3), ("train004", 4), ("train002", 4)]
    truth = joined(voices, tmp_path / "call.wav", turns, silence=2.0)
    words = (
        "--along",
        tmp_path / "call.wav",
        "--store",
        store,
        "--initial_model",
        model,
        "--window",
        1,
        "--step",
        0.25,
    )
    files = ("--rttm", tmp_path / "call.rttm", "--picture", tmp_path / "call.png")
    status, out, _ = call(identify, capsys, *words, *files, "--json")
    found = json.loads(out)
    assert status == 0 and found["seconds"] == pytest.approx(truth[-1][1], abs=1e-3)
    segments = found["segments"]
    assert all(a["end"] == b["start"] for a, b in itertools.pairwise(segments))
    share = share_right(truth, segments, ("train000", "train001", "train002"))
    assert share > 0.5, (share, segments)  # by chance a quarter; a few steps of training differ by processor
    assert any(s["silence"] for s in segments)
    assert (tmp_path / "call.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in (tmp_path / "call.rttm").read_text().splitlines()]
    named = [s for s in segments if s["speaker"]]
    assert [row[7] for row in rows] == [s["speaker"] for s in named] and {row[1] for row in rows} == {"call"}
    assert np.allclose([float(row[3]) + float(row[4]) for row in rows], [s["end"] for s in named], atol=2e-3)
    status, out, _ = call(identify, capsys, *words)
    assert status == 0 and out.splitlines()[0].split() == ["start", "s", "end", "s", "speaker", "probability"]
    assert "turns of 2 s" in out.splitlines()[-1]


def test_a_short_file_is_one_window_and_what_cannot_be_followed_is_one_line(model, voices, store, tmp_path, capsys):
    def along(*words):
        return call(identify, capsys, *words, "--along", "--store", store, "--initial_model", model)

    status, out, _ = along(tmp_path / "train000.wav")
    assert status == 0 and len(out.splitlines()) == 3
    soundfile.write(tmp_path / "silent.wav", np.zeros(8 * RATE), RATE)
    soundfile.write(tmp_path / "short.wav", voices["train000"][0][:1600], RATE)
    name = tmp_path / "train000.wav"
    for words, said in (
        ((tmp_path / "silent.wav",), "silent.wav: no speech to follow: silent: all zero"),
        ((tmp_path / "short.wav",), "short.wav: no speech to follow: too short: 0.1 s"),
        ((name, "--window", 0), "--window: must be at least 0.3 s, got 0"),
        ((name, "--window", 1, "--step", 2), "--step: 2 s is longer than the window of 1 s"),
        ((name, "--turn", 0), "--turn: must be above 0 s, got 0"),
        ((name, "--threshold", 1), "--along: decides by probability, so it takes no --threshold"),
        ((name, "--top", 3), "--top: does not go with --along"),
        ((name, "--picture", "a.jpg"), "--picture: is written as .png, got 'a.jpg'"),
        ((name, "--rttm", tmp_path / "no" / "a.rttm"), "--rttm: no such folder"),
    ):
        status, _, err = along(*words)
        assert status == 2 and said in err and err.count("\n") == 1, err
    words = (name, "--store", store, "--initial_model", model)
    status, _, err = call(identify, capsys, *words, "--rttm", tmp_path / "a.rttm")
    assert status == 2 and err == "--rttm: goes with --along\n"
    Backend(identity=load_model(model).identity).save(tmp_path / "plain.json")
    status, _, err = along(name, "--backend", tmp_path / "plain.json")
    assert status == 2 and "needs a calibration" in err
