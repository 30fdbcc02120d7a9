"""embed.py, speaker_model and the files of embeddings, through the command line, against evaluation and originals."""

import pickle
import re

import numpy as np
import programs
import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from foreign_cases import CASES
from foreign_models import (
    resnetse34l,
    resnetse34v2,
    speechbrain,
    taoruijie,
    voice,
    wespeaker_ecapa,
    wespeaker_resnet,
)
from foreign_res2net import eres2net
from foreign_tdnn import campplus
from programs import ROOT

import embed
from errors import UsageError
from settings import plugins
from settings.command_line import run
from speaker_model import load_model
from storage.embedding_files import read_embeddings, read_identity, write_embeddings
from storage.files import save_atomically


@pytest.fixture(scope="session")
def wave(tmp_path_factory):
    """A file of 16-bit samples at 16 kHz, and its samples as they are read."""
    path = tmp_path_factory.mktemp("wave") / "voice.wav"
    soundfile.write(path, voice(31234)[0].numpy(), 16000)
    return path, soundfile.read(path, dtype="float32")[0]


@pytest.fixture
def checkpoint(settings, tools, tmp_path):
    """A checkpoint of a tiny model that carries its configuration, and the trainer it is of."""

    trainer = tools.build(settings)
    path = tmp_path / "model_best.model"
    save_atomically(trainer.state.capture(), path)
    return path, trainer


def call(*words):
    return run(embed.main, [str(word) for word in words])


def command(*words):
    return programs.run(ROOT / "embed.py", *words)


@pytest.mark.parametrize("case", CASES)
def test_a_foreign_checkpoint_gives_its_own_embedding(case, wave, tmp_path):
    path, x = wave
    file, keys, theirs = case()
    torch.save(file, tmp_path / "their.model")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"nOut": 192, "n_mels": 80, "trainfunc": "aamsoftmax", **keys}))
    words = ("--config", tmp_path / "x.yaml", "--wav", path, "--out", tmp_path / "e.npy")
    assert call("--initial_model", tmp_path / "their.model", *words) == 0
    ours = torch.from_numpy(np.load(tmp_path / "e.npy"))
    assert ours.dim() == 1 and 1 - float(F.cosine_similarity(ours, theirs(torch.from_numpy(x)[None])[0], dim=0)) < 1e-5


FULL_SIZE = {  # of each project's published VoxCeleb model
    "voxceleb_trainer_resnetse34l": lambda: resnetse34l("SAP", 512, (16, 32, 64, 128)),
    "voxceleb_trainer_resnetse34v2": lambda: resnetse34v2(512, (32, 64, 128, 256)),
    "taoruijie_ecapa512": lambda: taoruijie(512),
    "taoruijie_ecapa1024": lambda: taoruijie(1024),
    "speechbrain_ecapa1024": lambda: speechbrain("speechbrain", 1024, 3072),
    "wespeaker_resnet34": lambda: wespeaker_resnet(32),
    "wespeaker_ecapa512_glob": lambda: wespeaker_ecapa(512),
    "3dspeaker_ecapa1024": lambda: speechbrain("3dspeaker", 1024, 3072),
    "3dspeaker_campplus": lambda: campplus("3dspeaker", 32, 128, 32, (12, 24, 16), 512),
    "3dspeaker_eres2net": lambda: eres2net("base", 32, n_out=192),
}


@pytest.mark.parametrize("case", FULL_SIZE)
def test_the_shipped_configuration_reads_the_published_size(case, wave, tmp_path, capsys):
    file, _, theirs = FULL_SIZE[case]()
    torch.save(file, tmp_path / "their.model")
    words = ("--config", ROOT / "configs" / "interop" / f"{case}.yaml", "--wav", wave[0], "--out", tmp_path / "e.npy")
    assert call("--initial_model", tmp_path / "their.model", *words) == 0 and capsys.readouterr().err == ""
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(wave[1])[None])[0]
    assert 1 - float(F.cosine_similarity(torch.from_numpy(np.load(tmp_path / "e.npy")), expected, dim=0)) < 1e-5


VT_FORMS = {  # __S__ and __L__ names as it saves them, and what other releases of it and of its users made of them
    "bare": lambda file: {n.removeprefix("__S__."): t for n, t in file.items() if not n.startswith("__L__.")},
    "model": lambda file: {"model": VT_FORMS["bare"](file)},
    "prefixed": lambda file: file,
    "module": lambda file: {f"module.{name}": tensor for name, tensor in file.items()},
    "module inside": lambda file: {name.replace("__S__.", "__S__.module."): t for name, t in file.items()},
    "training": lambda file: {
        "epoch": 3,
        "model_state_dict": {f"module.{name}": tensor for name, tensor in file.items()},
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]},
        "scheduler_state_dict": {"step_size": 10, "last_epoch": 3, "_last_lr": [0.001]},
    },
}


@pytest.mark.parametrize("form", VT_FORMS)
def test_the_forms_of_voxceleb_trainer(form, wave, tmp_path):
    file, keys, theirs = resnetse34v2()
    criterion = {"__L__.softmax.fc.weight": torch.ones(9, 48), "__L__.angleproto.w": torch.tensor(10.0)}
    torch.save(VT_FORMS[form](file | criterion), tmp_path / "their.model")
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"trainfunc": "softmaxproto", **keys}))
    ours = torch.from_numpy(load_model(tmp_path / "their.model", str(tmp_path / "x.yaml")).embed_file(wave[0]))
    assert 1 - float(F.cosine_similarity(ours, theirs(torch.from_numpy(wave[1])[None])[0], dim=0)) < 1e-5


def test_classifiers_of_others_are_no_part_of_the_model(wave, tmp_path, capsys):
    file, keys, _ = wespeaker_resnet()
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"n_mels": 80, "nOut": 256, "trainfunc": "sphereface2", **keys}))
    for more in ({"projection.bias": torch.ones(1, 1)}, {"projection.trans.0.weight": torch.ones(256)}):
        torch.save(file | more, tmp_path / "their.model")
        assert load_model(tmp_path / "their.model", str(tmp_path / "x.yaml")).dimension == 256
    # An embedding of another size alone is read from the file; anything else of another size is refused.
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"n_mels": 80, **keys, "nOut": 192}))
    assert load_model(tmp_path / "their.model", str(tmp_path / "x.yaml")).embed_file(wave[0]).shape == (256,)
    assert "embeddings of 256 values, not of the 192" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"n_mels": 40, **keys, "nOut": 192}))
    with pytest.raises(UsageError, match="tensors of ResNet34 match"):
        load_model(tmp_path / "their.model", str(tmp_path / "x.yaml"))


def test_a_foreign_checkpoint_without_a_configuration_is_one_line(wave, tmp_path, capsys):
    small = ("TaoRuijie/ECAPA-TDNN", "with its sizes, as the files of configs/interop do")
    theirs = "configs/interop/{}_campplus.yaml"
    either = ("wespeaker or 3D-Speaker", f"{theirs.format('3dspeaker')} or {theirs.format('wespeaker')}")
    full = plugins.call(plugins.load("models", "CAMPPlus"), {"nOut": 192}).state_dict()
    for state, (whose, which) in ((CASES[0]()[0], small), (full, either)):
        torch.save(state, tmp_path / "their.model")
        assert call("--initial_model", tmp_path / "their.model", "--wav", wave[0], "--out", tmp_path / "e.npy") == 2
        said = f"is a checkpoint of {whose} and carries no configuration; give --config {which}\n"
        assert capsys.readouterr().err == f"{tmp_path / 'their.model'}: {said}"


def test_what_is_no_checkpoint_is_refused_without_advice_to_load_it_unrestricted(wave, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("# a list\n")
    torch.save({"model": ROOT}, tmp_path / "code.model")
    for name, reason in (
        ("list.txt", "damaged, or not a checkpoint: it begins with b'# a ', as nothing that torch.save writes"),
        ("code.model", "not a checkpoint that restricted loading accepts: asks for 'pathlib."),
    ):
        assert call("--initial_model", tmp_path / name, "--wav", wave[0], "--out", tmp_path / "e.npy") == 2
        said = capsys.readouterr().err
        assert said.startswith(f"{tmp_path / name}: {reason}")
        assert said.count("\n") == 1 and "weights_only" not in said


def test_a_checkpoint_of_plug_ins_that_are_gone(checkpoint, wave, tmp_path, capsys):
    path, _ = checkpoint
    state = torch.load(path, weights_only=True)
    expected = load_model(path).embed_file(wave[0])
    state["config"] |= {"trainfunc": "gone", "scheduler": "gone_too", "its_key": 3, "train_list": "/no/such/list.txt"}
    torch.save(state, tmp_path / "gone.model")
    assert np.array_equal(load_model(tmp_path / "gone.model").embed_file(wave[0]), expected)
    state["config"]["model"] = "Vanished"
    torch.save(state, tmp_path / "gone.model")
    assert call("--initial_model", tmp_path / "gone.model", "--wav", wave[0], "--out", tmp_path / "e.npy") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "gone.model: model: no plug-in 'models/Vanished.py'" in error


def test_one_recording_on_the_command_line(checkpoint, wave, tmp_path):
    path, trainer = checkpoint
    done = command("--initial_model", path, "--threads", 1, "--wav", wave[0], "--out", tmp_path / "e.npy")
    assert (done.returncode, done.stderr) == (0, "") and "e.npy: 1 embedding of dimension 12" in done.stdout
    with torch.inference_mode():
        expected = trainer.network.eval()(torch.from_numpy(wave[1])[None])[0].numpy()
    assert np.array_equal(np.load(tmp_path / "e.npy"), expected)  # not length-normalised
    done = command("--initial", path, "--wav", wave[0], "--out", tmp_path / "e.npy")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "torch" not in done.stderr


def test_many_files_equal_each_alone(checkpoint, data, tmp_path, capsys):
    path, _ = checkpoint
    for ending in ("npz", "ark"):
        assert call("--initial_model", path, "--dir", data / "wav", "--out", tmp_path / f"e.{ending}") == 0
    names, x = read_embeddings(tmp_path / "e.npz")
    assert names == sorted(str(p.relative_to(data / "wav")) for p in (data / "wav").rglob("*.flac"))
    model = load_model(path)
    for name, row in list(zip(names, x))[::7]:
        assert np.allclose(model.embed_file(data / "wav" / name), row, atol=1e-5)
    for form in ("ark", "scp"):
        others, y = read_embeddings(tmp_path / f"e.{form}")
        assert others == names and np.array_equal(x, y)
    assert (
        call(
            "--initial_model",
            path,
            "--list",
            data / "train_list.txt",
            "--root",
            data / "wav",
            "--out",
            tmp_path / "l.npz",
        )
        == 0
    )
    listed, z = read_embeddings(tmp_path / "l.npz")  # a train list names many files alike: the paths are the names
    assert set(listed) < set(names) and np.allclose(z[0], x[names.index(listed[0])], atol=1e-5)
    scp = tmp_path / "wav.scp"
    scp.write_text(f"utt1 {data / 'wav' / names[0]}\nutt2 {data / 'wav' / names[1]}\n")
    assert call("--initial_model", path, "--scp", scp, "--out", tmp_path / "s.npz") == 0
    assert read_embeddings(tmp_path / "s.npz")[0] == ["utt1", "utt2"]


def test_files_that_give_nothing_are_named_and_left_out(checkpoint, wave, tmp_path, capsys):
    path, _ = checkpoint
    spoilt = wave[1].copy()
    spoilt[8000] = np.nan
    soundfile.write(tmp_path / "nan.wav", spoilt, 16000, subtype="FLOAT")
    (tmp_path / "empty.wav").write_bytes(b"")
    files = [wave[0], tmp_path / "nan.wav", tmp_path / "empty.wav"]
    assert call("--initial_model", path, "--wav", *files, "--out", tmp_path / "e.npz") == 1
    captured = capsys.readouterr()
    assert "nan.wav: 1 NaN or Inf sample, the first at 0.500 s" in captured.err and "empty.wav: " in captured.err
    assert "1 embeddings of dimension 12, 2 left out" in captured.out
    assert read_embeddings(tmp_path / "e.npz")[0] == [str(wave[0])]
    assert call("--initial_model", path, "--wav", *files[1:], "--out", tmp_path / "none.npz") == 2
    assert not (tmp_path / "none.npz").exists()
    assert call("--initial_model", path, "--wav", files[1], "--out", tmp_path / "none.npy") == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--wav", "{wave}", "--out", "x.txt"], "choose one of these endings"),
        (["--wav", "{wave}", "{wave}2", "--out", "e.npz"], "no such file"),
        (["--wav", "{wave}", "{wave}", "--out", "e.npz"], "stands there twice"),
        (["--wav", "{wave}", "--dir", ".", "--out", "e.npz"], "give one of"),
        (["--scp", "{scp}", "--out", "e.npz"], "a pipe"),
        (["--scp", "{ok}.scp", "--out", "{ok}.ark"], "ok.scp' is read by this command and would be lost"),
        (["--wav", "{wave}", "--out", "/no/such/e.npz"], "no such folder"),
        (
            ["--list", "{list}", "--root", ".", "--out", "e.npz"],
            "list.txt' is below '.', the first being 'a/b.wav'",
        ),
        (["--dir", "{wave}", "--out", "e.npz"], "--dir: a file, and not a folder: '"),
        (["--wav", "{wave}", "--threads", "two", "--out", "e.npz"], "--threads: expected a whole number, got 'two'"),
        (["--wav", "{wave}", "--batch_size", "0", "--out", "e.npz"], "--batch_size: must be at least 1, got 0"),
        (["--wav", "{wave}", "--window", "1s", "--out", "e.npz"], "--window: expected a number, got '1s'"),
    ],
)
def test_bad_usage_is_one_line(words, said, wave, tmp_path, capsys):
    (tmp_path / "wav.scp").write_text("utt1 sox x.wav -t wav - |\n")
    (tmp_path / "any.model").write_bytes(b"x")
    (tmp_path / "ok.scp").write_text(f"utt1 {wave[0]}\n")
    (tmp_path / "list.txt").write_text("one a/b.wav\ntwo a/c.wav\n")
    places = {"wave": wave[0], "scp": tmp_path / "wav.scp", "ok": tmp_path / "ok", "list": tmp_path / "list.txt"}
    words = [word.format(**places) for word in words]
    assert call("--initial_model", tmp_path / "any.model", *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error, error


def test_a_wave_in_memory_equals_its_file(checkpoint, wave, tmp_path):
    model, x = load_model(checkpoint[0]), wave[1]
    assert (model.dimension, model.sample_rate) == (12, 16000)
    assert np.array_equal(model.embed(x), model.embed_file(wave[0]))
    assert np.array_equal(model.embed((x * 32768).astype(np.int16)), model.embed(x))
    stereo = np.stack([x, 0.5 * x])
    for rate, subtype in ((8000, "FLOAT"), (44100, "FLOAT")):
        soundfile.write(tmp_path / "other.wav", stereo.T, rate, subtype=subtype)
        assert np.array_equal(model.embed(stereo, rate), model.embed_file(tmp_path / "other.wav"))
    many = np.random.default_rng(0).uniform(-0.1, 0.1, (11, 9000)).astype(np.float32)
    soundfile.write(tmp_path / "many.wav", many.T, 16000, subtype="FLOAT")
    assert np.array_equal(model.embed(many), model.embed_file(tmp_path / "many.wav"))
    assert model.embed(x[:400]).shape == (12,)  # repeated to half a second, as in evaluation
    spoilt = x.copy()
    spoilt[16000] = np.inf
    wrong = ((x[:0], "empty"), (spoilt, r"first at 1\.000 s"), (x.astype(np.int32), "int32"), (stereo.T, "transpose"))
    for bad, said in wrong:
        with pytest.raises(ValueError, match=said):
            model.embed(bad)


def test_identity_is_that_of_the_embedding_space(checkpoint, settings, tmp_path):
    path, trainer = checkpoint
    model = load_model(path)
    bare = tmp_path / "bare.model"
    torch.save(trainer.network.state_dict(), bare)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**settings, "lr": 0.5, "spec_augment": [3, 3]}))
    assert load_model(bare, str(tmp_path / "x.yaml")).identity == model.identity
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**settings, "features": "3dspeaker"}))
    assert load_model(bare, str(tmp_path / "x.yaml")).identity != model.identity
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**settings, "chanels": 8}))
    with pytest.raises(UsageError, match=r"x\.yaml:.*'chanels' - did you mean 'channels'"):
        load_model(bare, str(tmp_path / "x.yaml"))
    with torch.no_grad():
        next(trainer.network.__S__.parameters()).view(-1)[0] += 1e-3
    torch.save(trainer.network.state_dict(), bare)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings))
    assert load_model(bare, str(tmp_path / "x.yaml")).identity != model.identity
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({**settings, "channels": 16}))
    with pytest.raises(UsageError, match=r"tensors of ECAPA_TDNN match.*: give those that it was trained with"):
        load_model(bare, str(tmp_path / "x.yaml"))
    with torch.no_grad():
        next(trainer.network.__S__.parameters()).view(-1)[0] = np.nan
    torch.save(trainer.network.state_dict(), bare)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UsageError, match="1 tensors are not finite"):
        load_model(bare, str(tmp_path / "x.yaml"))


def test_files_of_embeddings_refuse_what_they_cannot_hold(tmp_path):
    x = np.ones((2, 3), np.float32)
    with pytest.raises(UsageError, match="white space"):
        write_embeddings(tmp_path / "e.ark", ["a b", "c"], x)
    with pytest.raises(UsageError, match="holds one embedding"):
        write_embeddings(tmp_path / "e.npy", ["a", "b"], x)
    assert not list(tmp_path.iterdir())
    (tmp_path / "e.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(UsageError, match="damaged"):
        read_embeddings(tmp_path / "e.npz")
    np.savez(tmp_path / "e.npz", names=np.array(["a"]), embeddings=x)
    with pytest.raises(UsageError, match="one embedding for each of 1 names"):
        read_embeddings(tmp_path / "e.npz")
    np.savez(tmp_path / "e.npz", names=np.array(["a", "b"]), embeddings=x * 1j)
    with pytest.raises(UsageError, match="complex64, not real numbers"):
        read_embeddings(tmp_path / "e.npz")
    for name, content in (("text.npz", b"hello"), ("objects.npz", pickle.dumps({}))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="damaged, or no file of embeddings") as refused:
            read_embeddings(tmp_path / name)
        assert "unsafe" not in str(refused.value) and "allow_pickle" not in str(refused.value)


def test_a_list_of_vectors_runs_no_command(tmp_path):
    write_embeddings(tmp_path / "e.ark", ["a", "b"], np.ones((2, 3), np.float32))
    (tmp_path / "e.scp").write_text(f"a touch {tmp_path}/ran; cat {tmp_path}/e.ark |\n")
    with pytest.raises(UsageError, match=r"e\.scp:1: a pipe"):
        read_embeddings(tmp_path / "e.scp")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "e.scp").write_text(f"a {tmp_path}/no.ark:2\n")
    with pytest.raises(UsageError, match=r"e\.scp:1: no such file"):
        read_embeddings(tmp_path / "e.scp")


@pytest.mark.parametrize("ending", ["ark", "npz"])
def test_a_damaged_file_of_embeddings_is_one_line(ending, tmp_path):
    path = tmp_path / f"e.{ending}"
    write_embeddings(path, ["a", "b"], np.ones((2, 5), np.float32), "identity")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for trial in range(300):
        spoilt = bytearray(whole)
        if trial % 3:
            for place in rng.integers(len(whole), size=3):
                spoilt[place] = rng.integers(256)
        path.write_bytes(spoilt if trial % 3 else whole[: rng.integers(len(whole))])
        try:
            read_embeddings(path)
            read_identity(path)
        except UsageError as error:
            refused += "\n" not in str(error)
    assert refused > 100


def test_the_commands_of_the_guide(checkpoint, data, tmp_path, monkeypatch, capsys):
    guide = (ROOT / "docs" / "embedding.md").read_text()
    (tmp_path / "exps" / "demo" / "model").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    checkpoint[0].rename(tmp_path / "exps" / "demo" / "model" / "model_best.model")
    (tmp_path / "data" / "demo").symlink_to(data)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    torch.save(wespeaker_resnet(32)[0], tmp_path / "avg_model.pt")
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", rng.normal(0, 0.1, 5 * 16000), 16000)
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^python embed.py (.*)$", guide, re.M)
    assert len(lines) == 5 and [call(*line.split()) for line in lines] == [0] * 5, capsys.readouterr().err
    assert len(read_embeddings("long.npz")[0]) == 3
    one = np.load("one.npy")
    names, x = read_embeddings("demo.npz")
    assert np.allclose(x[names.index("trial000/session0/00000.flac")], one, atol=1e-5)
    assert set(read_embeddings("train.ark")[0]) < set(names) and np.load("theirs.npy").shape == (256,)
    capsys.readouterr()
    exec(re.search(r"```python\n(.*?)```", guide, re.S).group(1), {})
    dimension, cosine = capsys.readouterr().out.split()
    assert dimension == "12" and -1 <= float(cosine) <= 1


def test_a_mask_of_infinities_is_no_fault_of_a_checkpoint(checkpoint):
    from storage import checkpoint as reading

    _, trainer = checkpoint
    trainer.network.__S__.register_buffer("mask", torch.full((3,), -torch.inf))
    state = {name: t.clone() for name, t in trainer.network.state_dict().items()}
    reading.load_model_exactly(trainer.network, state, "a.model", "ECAPA_TDNN")
    trainer.network.__S__.mask.zero_()
    with pytest.raises(UsageError, match=r"1 tensors are not finite \(__S__\.mask\)"):
        reading.load_model_exactly(trainer.network, state, "a.model", "ECAPA_TDNN")
