"""Several recordings of a speaker count by their speech and noise, in a store and in score.py."""

from dataclasses import replace

import numpy as np
import pytest
import soundfile

import enroll
import verify
from corpus.acoustics import Acoustics
from scoring.backend import Backend
from scoring.enrollment import enrollment_weights
from scoring.plda import PLDA
from scoring.sources import Source

CLEAN = Acoustics(5.0, 4.0, -25.0, 40.0, 8000.0, 16000.0, "lossless")


def test_less_speech_and_more_noise_count_less():
    assert enrollment_weights([CLEAN, None]).tolist() == [1, 1]
    few, noisy, long = replace(CLEAN, speech=1.0), replace(CLEAN, snr=10.0), replace(CLEAN, speech=100.0)
    weights = enrollment_weights([CLEAN, few, noisy, long])
    assert weights / weights[0] == pytest.approx([1, 0.25, 1.01 / 11, 2.5])
    assert (enrollment_weights([replace(CLEAN, speech=0.0, snr=-50.0)]) > 0).all()


@pytest.mark.parametrize("enrollment", ["mean", "scores"])
def test_a_weighted_model_is_the_weighted_mean(enrollment):
    rng = np.random.default_rng(0)
    x, tests, weights = rng.standard_normal((5, 8)), rng.standard_normal((2, 8)), np.array([1, 3, 0.5, 2, 4])
    models, pairs = np.array([0, 0, 1, 1, 1]), np.array([[0, 0], [1, 1], [1, 0]])
    backend = Backend(enrollment=enrollment)
    found, _, _ = backend.score_trials(x, tests, pairs, models, weights=weights)
    for score, (model, test) in zip(found, pairs):
        unit = x[models == model] / np.linalg.norm(x[models == model], axis=1, keepdims=True)
        mean = np.average(unit, axis=0, weights=weights[models == model])
        mean = mean if enrollment == "scores" else mean / np.linalg.norm(mean)
        assert score == pytest.approx(mean @ tests[test] / np.linalg.norm(tests[test]))
    alike = backend.score_trials(x, tests, pairs, models, weights=np.full(5, 7.0))[0]
    assert np.allclose(alike, backend.score_trials(x, tests, pairs, models)[0])


def test_weights_of_plda_are_of_its_mean():
    rng = np.random.default_rng(1)
    train = np.repeat(rng.standard_normal((20, 6)), 5, axis=0) + 0.3 * rng.standard_normal((100, 6))
    backend = Backend(plda=PLDA.fit(train, np.repeat(np.arange(20), 5))[0])
    args = train[:3], train[3:5], np.array([[0, 0], [0, 1]]), np.zeros(3, int)
    plain = backend.score_trials(*args)[0]
    assert np.allclose(plain, backend.score_trials(*args, weights=np.full(3, 2.0))[0])
    assert not np.allclose(plain, backend.score_trials(*args, weights=np.array([1, 1, 9]))[0])


def test_a_store_and_score_py_weigh_alike(data, tmp_path, tools, settings, capsys):
    from score import main
    from settings.command_line import run
    from speaker_model import load_model
    from storage.files import save_atomically
    from storage.speaker_store import SpeakerStore

    path = tmp_path / "model_best.model"
    save_atomically(tools.build(settings).state.capture(), path)
    files = sorted((data / "wav").rglob("*.flac"))[:3]
    (tmp_path / "a").mkdir()
    for name, file in zip(("a/1.wav", "a/2.wav", "a/3.wav"), files):
        x, rate = soundfile.read(file, dtype="float32")
        x = x + 4 * x.std() * np.random.default_rng(0).standard_normal(len(x)) if name == "a/2.wav" else x
        soundfile.write(tmp_path / name, x, rate, subtype="FLOAT")
    wavs, more = [str(tmp_path / f"a/{i}.wav") for i in (1, 2)], ["--initial_model", str(path)]
    store = ["--store", str(tmp_path / "s.npz")]
    assert run(enroll.main, ["a", *wavs, *more, *store]) == 0
    weights = enrollment_weights([u.acoustics for u in SpeakerStore.open(store[1], "", 0).utterances("a")])
    assert weights[1] < 0.5 * weights[0]
    assert run(verify.main, [str(tmp_path / "a/3.wav"), "--speaker", "a", *more, *store]) == 0
    said = float(capsys.readouterr().out.split("score ")[1].split()[0])
    unit = [x / np.linalg.norm(x) for x in (load_model(path).embed_file(tmp_path / f"a/{i}.wav") for i in (1, 2, 3))]
    mean = np.average(unit[:2], axis=0, weights=weights)
    assert said == pytest.approx(mean @ unit[2] / np.linalg.norm(mean), abs=1e-4)
    (tmp_path / "enroll.txt").write_text("A a/1.wav a/2.wav\n")
    (tmp_path / "trials.txt").write_text("1 A a/3.wav\n0 A a/2.wav\n")
    words = ["--trials", "trials.txt", "--enroll", "enroll.txt", "--out", "out"]
    words = [str(tmp_path / w) if "." in w or w == "out" else w for w in words]
    root = ["--root", str(tmp_path), "--draws", "5"]
    assert run(main, [*words, *more, *root, "--enroll_weights", "quality"]) == 0
    assert float((tmp_path / "out/scores.txt").read_text().split()[0]) == pytest.approx(said, abs=1e-4)
    assert run(main, [*words[:4], *more, "--enroll_weights", "quality"]) == 2
    assert Source([], None, str(tmp_path)).acoustics(["a/2.wav"])[0].snr < 10
