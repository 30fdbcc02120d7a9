"""What verify.py, enroll.py, identify.py and embed.py accept, and the words in which they decide."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

import embed
import enroll
import identify
import trainSpeakerNet
import verify
from scoring.backend import Backend
from scoring.calibration import LogisticCalibration
from scoring.verification import Verifier, percent
from settings.command_line import run
from speaker_model import load_model
from storage.files import save_atomically


@pytest.fixture(scope="session")
def wav(data):
    """Recordings (speaker, number) of the tiny voices."""
    speakers = sorted(p for p in (data / "wav").iterdir() if p.is_dir())
    files = [sorted(p.rglob("*.flac")) for p in speakers]
    return lambda speaker, number: str(files[speaker][number])


@pytest.fixture
def model(settings, tools, tmp_path):
    """A checkpoint of an untrained tiny model that carries its configuration."""

    path = tmp_path / "model_best.model"
    save_atomically(tools.build(settings).state.capture(), path)
    return str(path)


@pytest.fixture
def odd(tmp_path):
    """Files that say nothing of a voice: (path, what is said of it)."""
    rng = np.random.default_rng(0)
    kinds = {
        "zeros": (np.zeros(16000), "silent: all zero"),
        "hiss": (1e-5 * rng.standard_normal(16000), "silent: -100 dB"),
        "antiphase": (np.outer(0.1 * rng.standard_normal(16000), [1, -1]), "silent: all zero"),
        "sample": (0.1 * np.ones(1), "too short"),
        "blink": (0.1 * rng.standard_normal(3200), "too short: 0.2 s (3200 samples at 16 kHz), needs 0.3 s"),
    }
    for name, (x, _) in kinds.items():
        soundfile.write(tmp_path / f"{name}.wav", x, 16000, subtype="FLOAT")
    return {name: (str(tmp_path / f"{name}.wav"), said) for name, (_, said) in kinds.items()}


def call(script, capsys, *words):
    status = run(script.main, [str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("kind", ["zeros", "hiss", "antiphase", "sample", "blink"])
def test_nobody_is_enrolled_or_verified_with_silence_or_a_blink(kind, odd, model, wav, capsys, tmp_path):
    path, fault = odd[kind]
    store = tmp_path / "speakers.npz"
    for script, words in (
        (verify, (wav(0, 0), path)),
        (verify, (path, path)),
        (enroll, ("ann", wav(0, 0), path, "--store", store)),
    ):
        status, out, error = call(script, capsys, *words, "--initial_model", model)
        assert (status, out, error.count("\n")) == (2, "", 1) and f"{path}: {fault}" in error, error
    assert not store.exists()
    assert call(enroll, capsys, "ann", wav(0, 0), "--store", store, "--initial_model", model)[0] == 0
    status, out, error = call(identify, capsys, path, "--store", store, "--initial_model", model)
    assert (status, out) == (2, "") and fault in error


def test_embed_names_silence_and_leaves_it_out(odd, model, wav, capsys, tmp_path):
    files = [path for path, _ in odd.values()]
    words = ("--initial_model", model, "--out", tmp_path / "many.npz")
    status, out, error = call(embed, capsys, "--wav", wav(0, 0), *files, *words)
    assert status == 1 and "2 embeddings of dimension 12, 4 left out" in out  # a blink has an embedding
    assert [f"{path}: {fault[:9]}" in error for path, fault in odd.values()] == [True] * 4 + [False]
    status, _, error = call(embed, capsys, "--wav", files[0], "--initial_model", model, "--out", tmp_path / "one.npy")
    assert status == 2 and error == f"{files[0]}: silent: all zero\n"


def test_an_averaged_model_decides_after_its_evaluation(settings, tools, write, wav, capsys, tmp_path):
    """The newcomer's path: average_checkpoints.py, --eval, verify.py."""
    import average_checkpoints

    trainer = tools.build(settings)
    (tmp_path / "model").mkdir()
    for epoch in (1, 2):
        save_atomically(trainer.state.capture(), tmp_path / "model" / f"model00000000{epoch}.model")
    model, calibration = tmp_path / "avg.model", tmp_path / "avg.calibration"
    assert call(average_checkpoints, capsys, tmp_path / "model", "--out", model)[0] == 0
    compared = (wav(0, 0), wav(1, 0), "--initial_model", model)
    out = call(verify, capsys, *compared)[1]
    assert "no decision" in out and "trainSpeakerNet.py --eval leaves one" in out
    Backend(threshold=0.5, identity="ab" * 32).save(calibration)  # of an average that was here before
    words = ("--config", write(settings), "--eval", "--initial_model", model, "--save_path", tmp_path / "eval")
    status, out, _ = call(trainSpeakerNet, capsys, *words)
    assert status == 0 and f"calibration: {calibration}" in out
    assert f"python verify.py A.wav B.wav --initial_model {model}" in out
    status, out, error = call(verify, capsys, *compared, "--json")
    assert json.loads(out)["same"] in (True, False) and "fewer than 30 errors its probabilities are a guess" in error
    before = calibration.read_text()
    out = call(trainSpeakerNet, capsys, *words, "--max_test_pairs", 40)[1]
    assert f"{calibration} stays" in out and calibration.read_text() == before


def test_a_calibration_says_that_it_is_a_guess_where_it_decides(model, wav, capsys, tmp_path):
    identity = load_model(model).identity
    caution = "learnt on 40 target and 400 nontarget trials of 4 speakers"
    for name in ("model_best.calibration", "backend.npz"):
        made = Backend(calibration=LogisticCalibration([20.0], -10.0), identity=identity, caution=caution)
        made.save(tmp_path / name)
        more = ("--backend", tmp_path / name) if name.endswith("npz") else ()
        status, _, error = call(verify, capsys, wav(0, 0), wav(1, 0), "--initial_model", model, *more)
        assert status == 0 and f"{name}: {caution}" in error and error.count("\n") == 1
    assert Path(tmp_path / "model_best.calibration").is_file()


def verdict_at(llr, prior, threshold=None):
    """What is said of a log-likelihood ratio."""
    backend = Backend(calibration=LogisticCalibration([1.0], 0.0), threshold=threshold, prior=prior, source="b.npz")
    return Verifier(SimpleNamespace(identity=""), backend)._verdict(0.3, llr)


def test_a_verdict_says_the_same_or_not_and_how_sure_in_plain_words():
    first, second, third = verdict_at(4.871, 0.05).lines()
    assert first == "same speaker: 87 % sure, if 5 % of the comparisons are of one speaker"
    assert second == "with --prior 0.5, as many of one speaker as of two: same speaker, 99.24 % sure"
    assert third == "score 0.3000, log-likelihood ratio +4.871 >= threshold 2.9444 (Bayes, prior 5 %)"
    first, second, _ = verdict_at(1.0, 0.05).lines()  # the prior decides
    assert first.startswith("different speakers: 87 % sure") and "with --prior 0.5" in second
    assert second.endswith("same speaker, 73 % sure")
    assert len(verdict_at(1.0, 0.5).lines()) == 2  # it is at that prior already
    assert verdict_at(30.0, 0.5).lines()[0].startswith("same speaker: more than 99.99 % sure")
    first, second = verdict_at(1.0, 0.05, threshold=0.5).lines()  # a stored threshold is above the prior
    assert first.startswith("same speaker: only 13 % sure") and "stored in b.npz" in second
    assert [percent(x) for x in (0.5, 0.0099, 0.9901, 1.0, 0.0)] == [
        *("50 %", "0.99 %", "99.01 %", "more than 99.99 %", "less than 0.01 %")
    ]


def test_identify_says_that_it_is_nobody_of_how_many(model, wav, capsys, tmp_path):
    identity = load_model(model).identity
    Backend(calibration=LogisticCalibration([0.0], -1.0), identity=identity).save(tmp_path / "model_best.calibration")
    more = ("--initial_model", model, "--store", tmp_path / "speakers.npz")
    for speaker, name in enumerate(("ann", "bob")):
        call(enroll, capsys, name, wav(speaker, 0), *more)
    out = call(identify, capsys, wav(2, 0), *more)[1]
    assert re.search(r"speaker: nobody who is enrolled; the nearest is \w+\n73 % sure, if 50 %", out)
