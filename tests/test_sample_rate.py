"""A run at 8 kHz: its rows, its dumps and all that is done with its model, and what contradicts it."""

from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import onnxruntime
import programs
import pytest
import scipy
import soundfile
import torch
from trainers import command

import embed
import enroll
import export
import make_demo_data
import prepare_data
import serve
import verify
from corpus.audio import read_crop, samples_of
from corpus.augmentation import AugmentWAV, apply_draws
from corpus.crop import Crop
from postmortem.provenance import same_as_files
from settings import plugins
from settings.command_line import run
from settings.policy import checked
from speaker_model import load_model
from storage.dump import read_dump

RATE = 8000
POLICY = "[telephone, {noise: {snr: 10}}, reverb, {packet_loss: {p: 0.5}}, {speed: {p: 0.5}}, chunk_drop]"
KEYS = {
    **{"model": "ECAPA_TDNN", "channels": 8, "aggregate": 16, "n_mels": 24, "nOut": 12, "trainfunc": "aamsoftmax"},
    **{"optimizer": "adam", "scheduler": "cosine", "lr": 0.01, "batch_size": 4, "max_frames": 40, "max_epoch": 1},
    **{"eval_frames": 0, "picture_format": "none", "nDataLoaderThread": 0, "threads": 1, "augment_cache": "none"},
    **{"sample_rate": RATE, "nan_inject": "2:loss", "augmentation": POLICY},
}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run at 8 kHz through the command line: its ``model``, the ``words`` of its command, a ``dump``, a ``file``."""
    folder, rng = tmp_path_factory.mktemp("narrow"), np.random.default_rng(0)
    for place, rate in (("musan/noise", 44100), ("rir", 16000)):
        (folder / place).mkdir(parents=True)
        soundfile.write(folder / place / "a.wav", rng.normal(0, 0.1, rate) * np.geomspace(1, 1e-3, rate), rate)
    lists = {"train_list": data / "train_list.txt", "test_list": data / "trials.txt"}
    lists |= {"train_path": data / "wav", "test_path": data / "wav", "save_path": folder / "run"}
    lists |= {"musan_path": folder / "musan", "rir_path": folder / "rir"}
    words = [f"--{key}={value}" for key, value in {**KEYS, **lists}.items()]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    (dump,) = (folder / "run" / "debug_nan").glob("nan_batch_*.pt")
    file = sorted((data / "wav").rglob("*.flac"))[0]
    model = str(folder / "run" / "model" / "last.model")
    return SimpleNamespace(folder=folder, words=words, dump=dump, model=model, file=file, data=data)


def at_8_khz(path):
    x, rate = soundfile.read(path, dtype="float32")
    assert rate == 2 * RATE
    return scipy.signal.resample_poly(x, 1, 2).astype(np.float32)


def test_a_model_embeds_at_its_rate_without_being_told(trained, tmp_path, capsys):
    model, x = load_model(trained.model), at_8_khz(trained.file)
    with torch.inference_mode():
        expected = model.network(torch.from_numpy(x)[None])[0].numpy()
    assert model.sample_rate == RATE and model.window == 300 * RATE
    assert np.allclose(model.embed(x), expected, atol=1e-5)  # without a rate the wave is at the model's
    wide = soundfile.read(trained.file, dtype="float32")[0]
    assert np.allclose(model.embed(wide, 2 * RATE), expected, atol=1e-5)
    assert (
        run(embed.main, ["--initial_model", trained.model, "--wav", str(trained.file), "--out", f"{tmp_path}/a.npy"])
        == 0
    )
    assert np.allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-5)
    many, problems = model.embed_files([trained.file])
    assert not problems and np.allclose(many[0], expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"0.01 s \(80 samples at 8 kHz\)"):
        model.embed(x[:80])


def test_its_export_is_of_its_rate_and_gives_the_same_embeddings(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "SECONDS", (0.5, 1.3))
    out, words = tmp_path / "m.onnx", ["--initial_model", trained.model, "--wav", str(trained.file), "--out"]
    assert run(export.main, ["--initial_model", trained.model, "--out", str(out)]) == 0
    assert "waveform -> embedding of 12, 8000 Hz" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["sample_rate"] == str(RATE)
    assert (
        run(embed.main, [*words, str(tmp_path / "a.npy")])
        == run(embed.main, [*words, str(tmp_path / "b.npy"), "--onnx", str(out)])
        == 0
    )
    assert np.allclose(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"), atol=1e-4)
    plain = session.run(None, {"waveform": at_8_khz(trained.file)[None]})[0][0]
    assert np.allclose(plain, np.load(tmp_path / "a.npy"), atol=1e-4)


def test_people_are_enrolled_and_verified_at_its_rate(trained, tmp_path, capsys):
    model, store = ["--initial_model", trained.model], ["--store", str(tmp_path / "s.npz")]
    assert run(enroll.main, ["Ann", str(trained.file), *model, *store]) == 0
    assert run(verify.main, [str(trained.file), str(trained.file), *model, "--threshold", "0.5"]) == 0
    assert "same speaker: score 1.0000" in capsys.readouterr().out


def test_its_dumps_are_of_its_rate_and_are_replayed(trained):
    dump = read_dump(trained.dump)
    assert dump["config"]["sample_rate"] == RATE and {info["sample_rate"] for info in dump["files"]} == {RATE}
    assert dump["data"].shape == (1, 4, samples_of(40, RATE)) == (1, 4, 40 * 80 + 120)
    assert same_as_files(dump["data"], dump["files"], range(4))
    kinds = {draw["kind"] for info in dump["files"] for draw in info["augment"]}
    assert {"telephone", "noise", "reverb", "chunk_drop"} <= kinds
    done = programs.analyser(trained.dump)
    assert done.returncode == 0 and "VERIFIED  remove nan_inject" in done.stdout, done.stdout + done.stderr


def test_a_row_of_another_rate_is_made_again_from_its_origin_alone(trained):
    crop = Crop(str(trained.file), start=1600, rate=2 * RATE, sample_rate=RATE)
    x = crop.load(1000)[0]
    assert np.allclose(x[50:-50], at_8_khz(trained.file)[850:1750], atol=1e-3)
    assert crop.sample_in_file(100) == 1800 and crop.second_in_file(100) == pytest.approx(1800 / 16000)
    info = crop.to_dict()
    assert Crop.from_dict(info).sample_rate == RATE
    del info["sample_rate"]  # as a dump from before there was the key
    assert len(Crop.from_dict(info).load(2000)[0]) == 2000 and "sample_rate" not in Crop("a").to_dict()


@pytest.mark.parametrize("rate", [8000, 22050, 48000])
def test_every_augmentation_draws_at_any_rate_what_makes_the_row_again(trained, rate):
    names = [name for name in plugins.available("augmentation") if name != "amr" or find_spec("av")]
    policy = checked([{name: {}} for name in names if name not in ("music", "babble")], "augmentation")
    around = AugmentWAV(trained.folder / "musan", trained.folder / "rir", policy=policy, sample_rate=rate)
    x = read_crop(trained.file, rate // 2, sample_rate=rate).x
    y, draws, _ = around.augment(x, np.random.default_rng(0))
    assert len(y) == rate // 2 and np.isfinite(y).all() and not np.array_equal(x, y)
    assert np.array_equal(apply_draws(x, draws, rate), y)


def test_a_band_is_in_hz_at_any_rate(trained):
    for rate in (8000, 48000):
        around = AugmentWAV("", "", policy=checked(["telephone"], "augmentation"), sample_rate=rate)
        x = np.random.default_rng(0).normal(0, 0.1, rate).astype(np.float32)
        power = [np.abs(np.fft.rfft(wave)) ** 2 for wave in (x, around.augment(x, np.random.default_rng(0))[0])]
        gain = 10 * np.log10(
            [(power[1][a:b].sum() + 1e-9) / power[0][a:b].sum() for a, b in ((1, 150), (600, 3000), (3700, 4000))]
        )
        assert gain[0] < -20 and abs(gain[1]) < 0.3 and gain[2] < -30, (rate, gain)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sample_rate=8010"], "command line: --sample_rate: must be a multiple of 25, got 8010"),
        (["--sample_rate=7000"], "command line: --sample_rate: must be at least 8000, got 7000"),
        (["--sample_rate=96000"], "command line: --sample_rate: must be at most 48000, got 96000"),
        (
            ["--model=RawNet3", "--encoder_type=ECA", "--allow_unknown"],
            "--sample_rate: 8000, but models/RawNet3.py works at 16000 Hz only",
        ),
        (["--sample_rate=16000"], "last.model: was trained with sample_rate 8000, not 16000; choose another save_path"),
        (["--augmentation=[{telephone: {high: 4500}}]"], "expected 0 < low < high < 4000 Hz"),
        (["--augmentation=[{telephone: {sample_rate: 16000}}]"], "telephone: unknown key 'sample_rate'"),
        (["--initial_model=MODEL", "--sample_rate=16000", "--save_path=NEW"], "16000, but MODEL was trained with 8000"),
        (["--initial_model=MODEL", "--sample_rate=16000", "--eval"], "16000, but MODEL was trained with 8000"),
    ],
)
def test_what_contradicts_a_rate_is_one_line(trained, tmp_path, words, said):
    filled = [word.replace("MODEL", trained.model).replace("NEW", str(tmp_path)) for word in words]
    own = [word for word in trained.words if word.partition("=")[0] not in {w.partition("=")[0] for w in words}]
    done = command(*own, *filled)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert said.replace("MODEL", trained.model) in done.stderr


def test_a_command_that_only_uses_a_model_refuses_another_rate(trained, tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text("model: ECAPA_TDNN\nsample_rate: 16000\n")
    words = [
        "--initial_model",
        trained.model,
        "--config",
        str(config),
        "--wav",
        str(trained.file),
        "--out",
        f"{tmp_path}/a.npy",
    ]
    assert run(embed.main, words) == 2
    error = capsys.readouterr().err
    assert (
        error == f"{config}:2: sample_rate: 16000, but {trained.model} was trained with 8000; leave sample_rate out\n"
    )


def test_prepared_data_is_trained_on_at_the_rate_that_was_given(trained, tmp_path, capsys):
    words = [str(trained.data / "wav"), "--out", str(tmp_path / "out"), "--sample_rate"]
    assert run(prepare_data.main, [*words, str(RATE)]) == 0
    assert f"sample_rate: {RATE}\n" in (tmp_path / "out" / "config.yaml").read_text()
    assert "resampled to 8,000 Hz" in (tmp_path / "out" / "set.html").read_text()
    for more, said in (
        (["7999"], "command line: --sample_rate: must be at least 8000, got 7999"),
        (
            ["16000", "--initial_model", trained.model],
            f"--sample_rate: 16000, but {trained.model} was trained with 8000",
        ),
    ):
        capsys.readouterr()
        assert run(prepare_data.main, [*words, *more]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_the_page_hears_recordings_of_any_rate_at_that_of_the_model(trained, tmp_path):
    pytest.importorskip("fastapi")
    model, heard = load_model(trained.model), []
    service = serve.VerificationService(SimpleNamespace(model=model, unlike=lambda u: ""), str(tmp_path / "s.npz"))
    soundfile.write(tmp_path / "narrow.wav", at_8_khz(trained.file), RATE, subtype="FLOAT")
    for path in (trained.file, tmp_path / "narrow.wav"):
        with open(path, "rb") as file:
            utterance, drawn = service.embed_upload(SimpleNamespace(file=file, filename=path.name))
        assert drawn["rate"] == RATE and drawn["frames"] and drawn["bands"] == 80
        heard.append(utterance.embedding)
    assert np.allclose(heard[0], heard[1], atol=1e-4)
    assert np.allclose(heard[1], model.embed(at_8_khz(trained.file)), atol=1e-5)


def test_demo_voices_are_the_same_people_at_any_rate(tmp_path, capsys):
    size = ["--speakers", "1", "--trial_speakers", "2", "--utterances", "1", "--trial_utterances", "2", "--seconds=1"]
    for rate in (RATE, 16000):
        assert run(make_demo_data.main, ["--out", str(tmp_path / str(rate)), *size, "--sample_rate", str(rate)]) == 0
    files = sorted(path.relative_to(tmp_path / "8000") for path in (tmp_path / "8000").rglob("*.flac"))
    assert len(files) == 5
    for file in files:
        narrow, rate = soundfile.read(tmp_path / "8000" / file, dtype="float32")
        assert rate == RATE and np.allclose(narrow, at_8_khz(tmp_path / "16000" / file), atol=1e-3)
    capsys.readouterr()
    assert run(make_demo_data.main, ["--out", str(tmp_path / "x"), "--sample_rate", "7990"]) == 2
    assert capsys.readouterr().err == "--sample_rate: expected a multiple of 25 from 8000 to 48000 Hz, got 7990\n"
    for words in ("--trial_speakers 1", "--seconds nan", "--seconds 0", "--seed -1", "--speakers -2", "--nontargets 0"):
        assert run(make_demo_data.main, ["--out", str(tmp_path / "x"), *words.split()]) == 2
        assert capsys.readouterr().err.startswith(f"{words.split()[0]}: must be at least ")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    assert run(make_demo_data.main, ["--out", str(tmp_path / "file" / "x"), *size]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("--out: cannot write '")
