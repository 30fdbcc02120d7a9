"""The key ``frontend``: front ends of the house and of a user, from the YAML file to an export and a NaN."""

import json
import re
import shutil

import numpy as np
import programs
import pytest
import soundfile
import torch
import yaml
from programs import ROOT
from reference_features import kaldi_fbank, torchaudio_or_skip
from samples import SMALL, VALUES

import trainSpeakerNet
from errors import UsageError
from frontend.chains import with_convolutions
from models.frontend import FrontEnd
from settings import plugins
from SpeakerNet import SpeakerNet
from storage import checkpoint
from storage.dump import read_dump

names = pytest.mark.parametrize("name", sorted(set(plugins.available("frontend")) - {"ssl"}))  # test_ssl.py

MINE = '''"""A learned matrix of pieces of a waveform; NaN in training for what is quieter than ``quietest``."""

import torch


class FrontEnd(torch.nn.Module):
    def __init__(self, n_mels, quietest=0.0, sample_rate=16000):
        super().__init__()
        self.hop, self.quietest = sample_rate // 100, quietest
        self.mix = torch.nn.Parameter(torch.randn(n_mels, self.hop) / self.hop**0.5)

    def forward(self, x):
        level = (x.square().mean(dim=1) - self.quietest**2 * self.training)[:, None, None]
        return torch.conv1d(x[:, None], self.mix[:, None], stride=self.hop) / torch.sqrt(level)
'''


def built(name, **more):
    return plugins.call(plugins.load("frontend", name), {**VALUES, **more})


def voices(rows=3, samples=8000):
    return 0.1 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(1))


@names
def test_a_front_end_gives_the_same_for_a_row_alone_under_autocast_and_as_convolutions(name):
    module, x = built(name), voices()
    features = module(x)
    assert features.shape[:2] == (3, VALUES["n_mels"]) and 48 <= features.shape[2] <= 51
    assert features.dtype is torch.float32 and not features.requires_grad and not module.state_dict()
    assert torch.allclose(features, torch.cat([module(row[None]) for row in x]), atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), features)
    assert torch.allclose(with_convolutions(module)(x), features, atol=2e-3, rtol=1e-3)
    assert module(0 * x).isfinite().all()
    assert 48 <= built(name, sample_rate=8000)(voices(samples=4000)).shape[2] <= 51


def test_the_front_end_of_the_guide_is_one():
    guide, space = (ROOT / "docs" / "extending.md").read_text(), {}
    exec(guide.split("## A front end")[1].split("```python\n")[1].split("```")[0], space)
    module = space["FrontEnd"](24)
    features = FrontEnd("", 24, "mean", plugin=module)(voices())
    features.square().mean().backward()
    assert features.shape[:2] == (3, 24) and 45 < features.shape[2] < 50 and module.filters.grad.any()


def test_mfcc_are_a_cosine_transform_of_kaldis_filters():
    x, bins = voices(1), 24
    logs = kaldi_fbank(x * 32768, bins).double().numpy()
    number, place = np.arange(13)[:, None], (np.arange(bins) + 0.5) / bins
    transform = np.sqrt(2 / bins) * np.cos(np.pi * number * place)
    transform[0] /= np.sqrt(2)
    expected = logs @ (transform * (1 + 11 * np.sin(np.pi * number / 22))).T
    assert np.allclose(built("mfcc", n_mels=13, mel_bins=bins)(x)[0].T.numpy(), expected, atol=5e-3)


def test_mfcc_are_torchaudios():
    kaldi, x = torchaudio_or_skip().compliance.kaldi, voices(1)
    theirs = kaldi.mfcc(x * 32768, num_ceps=20, num_mel_bins=30, dither=0.0, window_type="hamming")
    assert torch.allclose(built("mfcc", n_mels=20, mel_bins=30)(x)[0].T, theirs, atol=1e-2)


@pytest.mark.parametrize(
    "features, n_mels, empty", [("speechbrain", 80, 0), ("speechbrain", 200, 21), ("wespeaker", 200, 10)]
)
def test_filters_without_a_frequency_are_warned_of(settings, tools, capsys, features, n_mels, empty):
    keys = {"model": "ECAPA_TDNN", "channels": 16, "features": features, "n_mels": n_mels}
    tools.build(settings, **keys).begin()
    said = f"WARNING: n_mels: {empty} of {n_mels} filters of the features '{features}' lie between two frequencies"
    assert (said in capsys.readouterr().out) == bool(empty)


@pytest.mark.parametrize("model", plugins.available("models"))
def test_every_model_takes_a_front_end_or_has_none(model):
    values = {**VALUES, **SMALL.get(model, {}), "model": model, "trainfunc": "", "nPerSpeaker": 1, "frontend": "mfcc"}
    network = SpeakerNet(values).eval()
    own = getattr(network.__S__, "frontend", None)
    assert network(voices()).shape == (3, VALUES["nOut"])
    if "frontend" in plugins.declaration("models", model).keys:
        assert type(own.plugin).__module__ == "frontend.mfcc"
    else:
        assert own is None


def test_a_chain_of_the_model_as_a_plug_in_gives_the_same_features():
    x = voices()
    for name, features in (("fbank", "wespeaker"), ("logmel", "voxceleb_trainer")):
        for norm in ("none", "mean", "meanvar"):
            chosen = FrontEnd("", 40, norm, spec_augment=(5, 5), plugin=built(name))
            assert torch.equal(chosen.eval()(x), FrontEnd(features, 40, norm).eval()(x))
            assert not torch.equal(chosen.train()(x), chosen.eval()(x))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout with a front end of a user."""
    folder = tmp_path_factory.mktemp("copy") / "checkout"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "data", "exps", "tests", "__pycache__"))
    (folder / "frontend" / "mine.py").write_text(MINE)
    return folder


def quiet(data):
    """A level that few of the training files are below."""
    files = sorted((data / "wav").glob("train*/*/*.flac"))
    return float(np.sort([np.sqrt(np.mean(soundfile.read(file)[0] ** 2)) for file in files])[1])


@pytest.fixture
def trained(settings, data, checkout, tmp_path):
    """A run with that front end, of which some steps are NaN."""
    path = tmp_path / "mine.yaml"
    keys = {**settings, "frontend": "mine", "quietest": quiet(data), "max_epoch": 1, "max_bad_files_pct": 100}
    path.write_text(yaml.safe_dump({**keys, "test_interval": 1}))
    done = programs.run(checkout / "trainSpeakerNet.py", "--config", path, cwd=checkout)
    assert done.returncode == 0, done.stderr
    return tmp_path / "run", done.stdout


def test_a_users_front_end_trains_is_exported_and_answers_for_its_nan(trained, checkout, data, tmp_path):
    run, said = trained
    assert "NaN/Inf LOSS" in said and "best EER" in said
    model = run / "model" / "model_best.model"
    state = checkpoint.load(model)
    assert state["config"]["frontend"] == "mine" and "__S__.frontend.plugin.mix" in state["model_state_dict"]
    dump = next((run / "debug_nan").glob("nan_batch_*.pt"))
    assert "frontend/mine.py" in read_dump(dump)["source_hashes"]
    found = json.loads(programs.run(checkout / "analyze_nan_debug.py", dump, "--json", cwd=checkout).stdout)
    assert found["cause"] == "frontend" and found["location"]["source"].startswith("frontend/mine.py:14"), found
    assert found["replay"]["reproduced"] == "bit_equal"
    assert not any("sample_rate" in fix["text"] for fix in found["recommendations"])
    file = max((data / "wav").rglob("*.flac"), key=lambda path: np.mean(soundfile.read(path)[0] ** 2))
    words = ["--initial_model", model]
    done = programs.run(checkout / "export.py", *words, "--out", tmp_path / "m.onnx", cwd=checkout)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = []
    for more in ([], ["--onnx", tmp_path / "m.onnx"]):
        out = tmp_path / f"{len(more)}.npy"
        done = programs.run(checkout / "embed.py", *words, "--wav", file, "--out", out, *more, cwd=checkout)
        assert done.returncode == 0, done.stderr
        rows.append(np.load(out))
    assert np.allclose(*rows, atol=1e-4)
    text = (checkout / "frontend" / "mine.py").read_text()
    (checkout / "frontend" / "mine.py").write_text(text + "\n# changed\n")
    found = json.loads(programs.run(checkout / "analyze_nan_debug.py", dump, "--json", cwd=checkout).stdout)
    (checkout / "frontend" / "mine.py").write_text(text)
    assert found["replay"]["reproduced"] is None and "frontend/mine.py" in json.dumps(found["evidence"])


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Write a front end as frontend/own.py of a checkout."""
    root = tmp_path / "checkout"
    (root / "frontend").mkdir(parents=True)
    for folder in ("models", "loss", "optimizer", "scheduler"):
        (root / folder).symlink_to(plugins.ROOT / folder)
    package = plugins.importlib.import_module("frontend")
    monkeypatch.setattr(package, "__path__", [str(root / "frontend"), *package.__path__])
    monkeypatch.setattr(plugins, "ROOT", root)

    def write(source):
        (root / "frontend" / "own.py").write_text(source)
        plugins.sys.modules.pop("frontend.own", None)
        plugins.importlib.invalidate_caches()

    yield write
    plugins.sys.modules.pop("frontend.own", None)


@pytest.mark.parametrize(
    ("text", "replaced", "line"),
    [
        (
            "class FrontEnd",
            "class Front",
            "command line: frontend: the plug-in file 'frontend/own.py' does not define FrontEnd",
        ),
        ("x[:, None]", "x", "frontend/own.py:14: RuntimeError: "),
        (
            "self.mix[:, None]",
            "self.mix[1:, None]",
            "frontend/own.py: must give (2, n_mels 24, frames) of 2 waveforms, it gives (2, 23, 50)",
        ),
        (
            "self.quietest**2 * self.training",
            "9",
            "frontend/own.py: gives NaN or Inf for noise, and must give finite float32",
        ),
        ("torch.nn.Module", "object", "frontend/own.py: FrontEnd makes no torch.nn.Module"),
        (
            "import torch\n",
            "import torch\nimport torchh\n",
            "frontend/own.py:4: ModuleNotFoundError: No module named 'torchh'",
        ),
        ("n_mels, quietest", "n_mels, bands, quietest", "frontend/own.py: needs a value for 'bands'"),
        ("sample_rate // 100", "sample_rate / 0", "frontend/own.py:9: ZeroDivisionError: "),
    ],
)
def test_what_is_wrong_with_a_front_end_is_one_line(mine, settings, capsys, text, replaced, line):
    assert text in MINE
    mine(MINE.replace(text, replaced))
    assert (
        trainSpeakerNet.main([f"--{k}={v}" for k, v in {**settings, "frontend": "own", "device": "cpu"}.items()]) == 2
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(line), error


def test_a_front_end_that_does_not_know_the_rate_works_at_the_usual_one_only(mine, settings, capsys):
    mine(MINE.replace("sample_rate", "rate"))
    words = [f"--{k}={v}" for k, v in {**settings, "frontend": "own", "device": "cpu", "sample_rate": 8000}.items()]
    assert trainSpeakerNet.main(words) == 2
    own = "frontend/own.py works at 16000 Hz only: its FrontEnd names no sample_rate; leave it out"
    assert capsys.readouterr().err == f"command line: --sample_rate: 8000, but {own}\n"


def test_the_key_is_checked_and_what_does_not_use_it_is_said(settings, tools, tmp_path, capsys):
    def said(**keys):
        status = trainSpeakerNet.main([f"--{k}={v}" for k, v in {**settings, **keys}.items()] + ["--print_config"])
        found = capsys.readouterr()
        return status, found.err, yaml.safe_load(found.out) or {}

    status, error, _ = said(frontend="mfc")
    assert (status, error) == (2, "command line: frontend: no plug-in 'frontend/mfc.py' - did you mean 'mfcc'?\n")
    assert "no plug-in 'frontend/plp.py'; there are fbank, logmel, mfcc" in said(frontend="plp")[1]
    status, error, _ = said(mel_bins=30)
    assert status == 2 and "'--mel_bins' - a key of frontend/mfcc.py, which is not chosen" in error
    status, error, config = said(frontend="mfcc", mel_bins=30, features="speechbrain")
    assert status == 0 and config["mel_bins"] == 30 and config["lifter"] == 22.0
    assert error == "command line: '--features' is not used: the features are those of frontend/mfcc.py\n"
    keys = {k: v for k, v in settings.items() if k not in ("channels", "aggregate", "n_mels")}
    words = [f"--{k}={v}" for k, v in {**keys, "model": "RawNet3", "encoder_type": "ECA", "frontend": "fbank"}.items()]
    assert trainSpeakerNet.main([*words, "--print_config"]) == 0
    own = "command line: '--frontend' is not used: models/RawNet3.py computes features of its own\n"
    assert capsys.readouterr().err == own


def test_a_checkpoint_knows_its_front_end_and_refuses_another(settings, tools, tmp_path, capsys):
    from speaker_model import load_model
    from storage.files import save_atomically

    paths = []
    for number, keys in enumerate(({}, {"frontend": "mfcc", "mel_bins": 30}, {"frontend": "mfcc", "mel_bins": 40})):
        trainer = tools.build({**settings, "save_path": str(tmp_path / str(number))}, **keys)
        paths.append(tmp_path / f"{number}.model")
        save_atomically(trainer.state.capture(), paths[-1])
    models = [load_model(path) for path in paths]
    assert len({model.identity for model in models}) == 3
    assert models[1].network.__S__.frontend.plugin.banks.shape == (257, 30)
    state = checkpoint.load(paths[0])
    for name in ("frontend", "sample_rate"):  # as a checkpoint from before there were these keys
        del state["config"][name]
    save_atomically(state, tmp_path / "old.model")
    assert load_model(tmp_path / "old.model").identity == models[0].identity
    for path, keys, line in (
        (paths[1], "frontend: fbank", f"frontend: fbank, but {paths[1]} was trained with mfcc; leave frontend out"),
        (paths[2], "mel_bins: 50", f"mel_bins: 50, but {paths[2]} was trained with 40; leave mel_bins out"),
        (tmp_path / "old.model", "frontend: mfcc", "frontend: mfcc, but .* was trained with none; leave frontend out"),
    ):
        (tmp_path / "c.yaml").write_text(f"model: ECAPA_TDNN\n{keys}\n")
        with pytest.raises(UsageError, match=re.escape(line).replace(r"\.\*", ".*")):
            load_model(path, str(tmp_path / "c.yaml"))
