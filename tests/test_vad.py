"""Voice activity as a key: what is kept, the same in every command, what is stored says it, and speech that is not."""

import importlib.util

import numpy as np
import pytest
import soundfile
import torch

import embed
import enroll
import identify
import verify
from corpus.speech import MARGIN, joined, kept_spans
from errors import UsageError
from scoring.backend import Backend
from scoring.calibration import LogisticCalibration
from scoring.sources import Source
from settings.command_line import run
from speaker_model import load_model
from storage.embedding_files import read_identity
from storage.files import save_atomically

RATE = 16000


@pytest.fixture
def model(settings, tools, tmp_path):
    """A checkpoint of an untrained tiny model."""
    path = tmp_path / "model_best.model"
    save_atomically(tools.build(settings).state.capture(), path)
    return path


@pytest.fixture
def recording(data, tmp_path):
    """A voice, 2 s of silence, the voice again; and its first part alone with the margin behind it."""
    voice, _ = soundfile.read(next((data / "wav").rglob("*.flac")), dtype="float32")
    faint = 1e-5 * np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)
    soundfile.write(tmp_path / "gap.wav", np.concatenate([voice, faint, voice]), RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "silent.wav", faint * 0, RATE)
    return tmp_path / "gap.wav"


def call(script, capsys, *words):
    status = run(script.main, [str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("share", [0.01, 0.03, 0.3])
@pytest.mark.parametrize("below", [25, 40])
def test_speech_is_found_by_its_level_however_little_of_a_recording_it_is(share, below):
    noise = np.random.default_rng(2).standard_normal(180 * RATE).astype(np.float32)
    x = 0.1 * 10 ** (-below / 20) * noise
    begin, end = 60 * RATE, round((60 + 180 * share) * RATE)
    x[begin:end] = 0.1 * noise[begin:end]
    ((first, last),) = kept_spans(x, RATE, "energy")
    assert abs(first - (begin - MARGIN * RATE)) <= 320 and abs(last - (end + MARGIN * RATE)) <= 320


def test_spans_have_margins_and_are_joined():
    x = 1e-5 * np.random.default_rng(1).standard_normal(3 * RATE).astype(np.float32)
    for begin in (0.5, 2.0):
        x[int(begin * RATE) : int((begin + 0.5) * RATE)] += 0.1
    spans = kept_spans(x, RATE, "energy")
    assert spans == [(6400, 17600), (30400, 41600)] and (0.5 - MARGIN) * RATE == 6400
    assert np.array_equal(joined(x, spans), np.concatenate([x[6400:17600], x[30400:41600]]))
    assert joined(x, kept_spans(x, RATE, "none")) is x and not len(joined(x, []))


def test_what_is_said_of_nan_is_not_that_there_is_no_speech(model, settings, tools, tmp_path):
    x = 0.1 * np.random.default_rng(3).standard_normal(RATE).astype(np.float32)
    x[500] = np.nan
    soundfile.write(tmp_path / "nan.wav", x, RATE, subtype="FLOAT")
    network = load_model(model)
    network.config.vad = "energy"
    _, problems = network.embed_files([tmp_path / "nan.wav"])
    assert "NaN" in problems[0] and "no speech" not in problems[0]


def test_every_way_to_embed_hears_the_same_speech(model, recording, capsys, tmp_path):
    network = load_model(model)
    whole = network.embed_file(recording)
    network.config.vad = "energy"
    x, _ = soundfile.read(recording, dtype="float32")
    speech = joined(x, kept_spans(x, RATE, "energy"))
    assert len(speech) < 0.75 * len(x)
    alone = network.embed_file(recording)
    assert np.allclose(alone, network.embed_batch(speech[None])[0], atol=1e-5) and not np.allclose(alone, whole)
    assert np.array_equal(alone, network.embed(x, RATE))
    many, problems = network.embed_files([recording, tmp_path / "silent.wav"])
    assert np.allclose(many[0], alone, atol=1e-5) and problems == {1: "no speech in it (vad energy)"}
    words = ("--initial_model", model, "--wav", recording, "--out", tmp_path / "e.npz", "--vad", "energy")
    assert call(embed, capsys, *words)[0] == 0
    assert read_identity(tmp_path / "e.npz", "vad") == "energy"
    assert np.allclose(Source([tmp_path / "e.npz"]).embeddings([str(recording)])[0][0], alone, atol=1e-5)
    assert "embeds windows as they are" in call(embed, capsys, *words, "--window", 1)[2]
    assert call(embed, capsys, *words[:-3], tmp_path / "n.npz")[0] == 0
    with pytest.raises(UsageError, match=r"n\.npz: embeddings of speech by vad none, those before by vad energy"):
        Source([tmp_path / "e.npz", tmp_path / "n.npz"])


def test_an_evaluation_hears_it_too(settings, tools, recording, tmp_path):
    (tmp_path / "trials.txt").write_text("1 gap.wav gap.wav\n0 gap.wav silent.wav\n")
    where = {"test_list": tmp_path / "trials.txt", "test_path": tmp_path}
    trainer = tools.build(settings, vad="energy", **where)
    found, problems = trainer.evaluator.embed(trainer.network)
    assert problems == {1: "no speech in it (vad energy)"}
    x, _ = soundfile.read(recording, dtype="float32")
    speech = torch.from_numpy(joined(x, kept_spans(x, RATE, "energy")))
    alone = trainer.network(speech[None]).detach().numpy()[0]
    cosine = found[0].numpy().ravel() @ alone / np.linalg.norm(alone) / np.linalg.norm(found[0].numpy())
    assert cosine == pytest.approx(1, abs=1e-5)


def test_a_store_and_a_calibration_know_their_vad(model, recording, capsys, tmp_path):
    more = ("--initial_model", model, "--store", tmp_path / "s.npz")
    assert call(enroll, capsys, "ann", recording, *more, "--vad", "energy")[0] == 0
    assert call(enroll, capsys, "--list", "--store", tmp_path / "s.npz")[1] == "ann  1 recording\n"
    for script, words in ((verify, ("--speaker", "ann")), (identify, ())):
        status, _, error = call(script, capsys, recording, *words, *more)
        assert status == 2 and error.count("\n") == 1
        assert "enrolled with vad energy, this is vad none: give --vad energy, or enroll" in error
        assert call(script, capsys, recording, *words, *more, "--vad", "energy")[0] == 0
    Backend(calibration=LogisticCalibration([20.0], -10.0)).save(tmp_path / "b.npz")
    words = (recording, recording, *more[:2], "--backend", tmp_path / "b.npz")
    assert "vad" not in call(verify, capsys, *words)[2]
    status, _, error = call(verify, capsys, *words, "--vad", "energy")
    assert status == 0 and "b.npz: made with vad none, these embeddings are of vad energy" in error
    status, _, error = call(verify, capsys, recording, tmp_path / "silent.wav", *more[:2], "--vad", "energy")
    assert status == 2 and error.count("\n") == 1 and "silent.wav: silent: all zero" in error


@pytest.mark.skipif(importlib.util.find_spec("silero_vad") is not None, reason="silero-vad is installed")
def test_silero_is_an_extra(model, recording, capsys, settings, tools):
    status, _, error = call(verify, capsys, recording, recording, "--initial_model", model, "--vad", "silero")
    assert status == 2 and error == "vad: silero: needs silero-vad: pip install silero-vad\n"
    with pytest.raises(UsageError, match="vad: silero: needs silero-vad"):
        tools.build(settings, vad="silero")


def test_silero_hears_no_speech_in_noise(model, tmp_path, capsys):
    pytest.importorskip("silero_vad")
    noise = 0.1 * np.random.default_rng(0).standard_normal(2 * RATE).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", noise, RATE)
    words = ("--initial_model", model, "--wav", tmp_path / "noise.wav", "--out", tmp_path / "n.npy", "--vad", "silero")
    status, _, error = call(embed, capsys, *words)
    assert status == 2 and error == f"{tmp_path / 'noise.wav'}: no speech in it (vad silero)\n"
