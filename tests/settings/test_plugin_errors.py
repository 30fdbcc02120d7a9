"""Whatever a plug-in raises is one line with its place; the whole traceback comes with --traceback."""

import sys
from pathlib import Path

import pytest
import torch

import errors
import trainSpeakerNet
from settings import command_line, plugins
from storage import checkpoint

HEAD = """import torch


class MainModel(torch.nn.Module):
    def __init__(self, nOut=12):
        super().__init__()
"""
BODY = """        self.layer = torch.nn.Linear(100, nOut)
        self.norm = torch.nn.BatchNorm1d(nOut)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        out = self.norm(self.layer(x[:, :100]))
        FAIL
        return out
"""
IN_CONSTRUCTOR = HEAD + "        sizes = {'a': 1}\n        self.size = sizes['b']\n"
AT_IMPORT = "import torch\n\nMainModel = torch.nn.Lineer\n"
IN_FORWARD = HEAD + BODY.replace("FAIL", "torch.zeros(3) @ torch.zeros(4)")
LATER = HEAD + BODY.replace("FAIL", "assert self.calls < 4, 'the fourth call'")
IN_EVALUATION = HEAD + BODY.replace("FAIL", "assert self.training, 'in evaluation'")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """Write a model as models/Wrong.py of a checkout."""
    root = tmp_path / "checkout"
    (root / "models").mkdir(parents=True)
    for folder in ("loss", "optimizer", "scheduler"):
        (root / folder).symlink_to(plugins.ROOT / folder)
    package = plugins.importlib.import_module("models")
    monkeypatch.setattr(package, "__path__", [str(root / "models"), *package.__path__])
    monkeypatch.setattr(plugins, "ROOT", root)

    def write(source):
        (root / "models" / "Wrong.py").write_text(source)
        plugins.importlib.invalidate_caches()

    yield write
    sys.modules.pop("models.Wrong", None)


@pytest.fixture
def arguments(settings):
    """The command line of a run with that model."""
    left = {k: v for k, v in settings.items() if k not in ("channels", "aggregate", "n_mels")}
    return [f"--{k}={v}" for k, v in {**left, "model": "Wrong", "device": "cpu"}.items()]


CASES = {
    "constructor": (IN_CONSTRUCTOR, "models/Wrong.py:8: KeyError: 'b'"),
    "import": (AT_IMPORT, "models/Wrong.py:3: AttributeError: module 'torch.nn' has no attribute 'Lineer'"),
    "forward": (IN_FORWARD, "models/Wrong.py:14: RuntimeError: inconsistent tensor size"),
    "evaluation": (IN_EVALUATION, "models/Wrong.py:14: AssertionError: in evaluation"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_plug_in_that_raises_is_one_line_with_its_place(model, arguments, capsys, case):
    source, line = CASES[case]
    model(source)
    assert trainSpeakerNet.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(line) and said[0].endswith("; --traceback shows all of it")


def test_traceback_prints_all_of_it_and_then_the_line(model, arguments, capsys):
    model(IN_CONSTRUCTOR)
    assert trainSpeakerNet.main([*arguments, "--traceback"]) == 2
    said = capsys.readouterr().err
    assert "self.size = sizes['b']" in said and said.splitlines()[-1].startswith("models/Wrong.py:8: KeyError: 'b'")


def test_an_exception_in_the_middle_of_a_run_saves_the_state_before_its_step(model, arguments, settings, capsys):
    model(LATER)
    arguments.append("--max_epoch=1")
    assert trainSpeakerNet.main(arguments) == 2
    assert "models/Wrong.py:14: AssertionError: the fourth call" in capsys.readouterr().err
    last = f"{settings['save_path']}/model/last.model"
    broken = checkpoint.load(last)
    assert broken["step"] == 3 and broken["sampler_state"]["batch"] == 3
    assert broken["model_state_dict"]["__S__.norm.num_batches_tracked"] == 3
    sys.modules.pop("models.Wrong")
    model(LATER.replace("self.calls < 4", "True"))
    assert trainSpeakerNet.main(arguments) == 0  # the mended model goes on where it was
    mended = checkpoint.load(last)["model_state_dict"]
    settings["save_path"] += "_undisturbed"
    assert trainSpeakerNet.main([*arguments, f"--save_path={settings['save_path']}"]) == 0
    undisturbed = checkpoint.load(f"{settings['save_path']}/model/last.model")["model_state_dict"]
    assert all(torch.equal(mended[name], undisturbed[name]) for name in undisturbed)


def test_the_small_commands_say_it_alike(model, capsys):
    model(IN_CONSTRUCTOR)
    sys.modules.pop("models.Wrong", None)

    def main(argv):
        plugins.load("models", "Wrong")()

    assert command_line.run(main, []) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert command_line.run(main, ["--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # not of a plug-in: a fault of this program
        command_line.run(lambda argv: 1 / 0, [])
    assert command_line.Parser("x.py", "X").parse_args(["--traceback"]).traceback


def test_the_place_of_an_exception_is_no_line_of_a_package_that_is_installed_in_the_checkout():
    package = errors.ROOT / ".venv" / "lib" / "python3" / "site-packages" / "torch" / "checks.py"
    names = {}
    exec(compile("def check():\n    raise ValueError('below 0')\n", str(package), "exec"), names)
    mine = compile("\n\ncheck()\n", str(errors.ROOT / "loss" / "mine.py"), "exec")
    with pytest.raises(ValueError) as raised:
        exec(mine, names)
    assert errors.with_place(raised.value) == f"{Path('loss') / 'mine.py'}:3: ValueError: below 0"
