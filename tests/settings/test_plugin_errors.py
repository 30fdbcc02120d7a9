"""Whatever a plug-in raises is one line with its place; the whole traceback comes with --traceback."""

import functools
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
def plug_in(tmp_path, monkeypatch):
    """Write a plug-in as FOLDER/Wrong.py of a checkout that has the others too."""
    root, folders = tmp_path / "checkout", ("models", "loss", "optimizer", "scheduler")
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for path in (plugins.ROOT / folder).glob("*.py"):
            (root / folder / path.name).symlink_to(path)
        package = plugins.importlib.import_module(folder)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(root / folder)])
    monkeypatch.setattr(plugins, "ROOT", root)

    def write(folder, source):
        (root / folder / "Wrong.py").write_text(source)
        plugins.importlib.invalidate_caches()
        sys.modules.pop(f"{folder}.Wrong", None)

    yield write
    for folder in folders:
        sys.modules.pop(f"{folder}.Wrong", None)


@pytest.fixture
def model(plug_in):
    """Write a model as models/Wrong.py of a checkout."""
    return functools.partial(plug_in, "models")


@pytest.fixture
def arguments(settings):
    """The command line of a run with that model."""
    left = {k: v for k, v in settings.items() if k not in ("channels", "aggregate", "n_mels")}
    return [f"--{k}={v}" for k, v in {**left, "model": "Wrong", "device": "cpu"}.items()]


HEAD_OF_LOSS = """import torch
from utils import accuracy


class LossFunction(torch.nn.Module):
    def __init__(self, nOut, nClasses, **kwargs):
        super().__init__()
        self.fc, self.kept = torch.nn.Linear(nOut, nClasses), []

    def forward(self, x, label=None):
        scores = self.fc(x)
"""
KEEPS = (
    HEAD_OF_LOSS
    + """        self.kept = [*self.kept[-1:], x.mean(0)]
        scores = scores + torch.stack(self.kept).mean()
        return torch.nn.functional.cross_entropy(scores, label), accuracy(scores, label)
"""
)
ENDS = "import sys\n\ndef MainModel(nOut):\n    sys.exit('no GPU')\n"
SCHEDULE = "from torch.optim.lr_scheduler import OneCycleLR\n\ndef Scheduler(optimizer, **keys):\n"
SCHEDULE += "    return OneCycleLR(optimizer, 0.1, total_steps=3), 'iteration'\n"
RATES = "from torch.optim.lr_scheduler import LambdaLR\n\ndef Scheduler(optimizer, **keys):\n"
RATES += "    return LambdaLR(optimizer, lambda step: [1, 2, 3, 2, 1][step]), 'iteration'\n"
SPARSE = "import torch\n\ndef Optimizer(parameters, **keys):\n    return torch.optim.SparseAdam(parameters)\n"
MISTAKES = {  # folder, source, what is said of it
    "no super": ("models", HEAD.replace("        super().__init__()\n", "") + BODY, "first; --traceback"),
    "package": (
        "models",
        "import not_here\n\ndef MainModel(nOut):\n    pass\n",
        " - pip install not_here; --traceback",
    ),
    "helper": ("models", "from models.other import *\n\ndef MainModel(nOut):\n    pass\n", "bring models/other.py too"),
    "name": ("models", HEAD.replace("MainModel", "Model") + BODY, "does not define MainModel, but Model"),
    "file": ("models", HEAD + "        open('mean.txt')\n", "a relative path begins at the current folder"),
    "exit": ("models", ENDS, "models/Wrong.py:4: ends the program (no GPU); raise an exception"),
    "argument": ("models", HEAD.replace("=12", ", width") + BODY, "needs a value for 'width'; set the key, or give"),
    "graph": (
        "loss",
        KEEPS,
        "graph a second time (or directly access saved tensors after they have already been freed)",
    ),
    "update": ("optimizer", SPARSE, "optimizer/Wrong.py: its step fails: RuntimeError: SparseAdam does not support"),
    "schedule": (
        "scheduler",
        SCHEDULE,
        "its total_steps, 3, are fewer than the 16 of this run: take max_epoch x steps",
    ),
}
KEYS = {"models": "model", "loss": "trainfunc", "optimizer": "optimizer", "scheduler": "scheduler"}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_usual_mistake_is_one_line_that_says_what_to_do(plug_in, settings, capsys, case):
    folder, source, words = MISTAKES[case]
    plug_in(folder, source)
    left = {k: v for k, v in settings.items() if folder != "models" or k not in ("channels", "aggregate", "n_mels")}
    assert (
        trainSpeakerNet.main([f"--{k}={v}" for k, v in {**left, KEYS[folder]: "Wrong", "device": "cpu"}.items()]) == 2
    )
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and words in said[0] and "Wrong.py" in said[0]


def test_a_plug_in_that_changes_a_list_it_is_given_leaves_the_configuration_alone(plug_in):
    plug_in("models", "def MainModel(sizes=[1, 2], **keys):\n    sizes.append(3)\n    return sizes\n")
    values = {"sizes": [4, 5]}
    assert plugins.build("models", "Wrong", values) == [4, 5, 3] and values == {"sizes": [4, 5]}


def test_a_run_whose_schedule_ends_too_early_goes_on_with_a_mended_one(plug_in, settings, capsys):
    keys = {**settings, "scheduler": "Wrong", "device": "cpu", "max_epoch": 1}
    plug_in("scheduler", RATES)
    assert trainSpeakerNet.main([f"--{k}={v}" for k, v in keys.items()]) == 2
    broken = checkpoint.load(f"{keys['save_path']}/model/last.model")
    assert broken["step"] == 4 and broken["optimizer_state_dict"]["state"][0]["step"] == 4
    assert broken["scheduler_state_dict"]["last_epoch"] == 4
    assert "scheduler/Wrong.py:4: IndexError: list index out of range" in capsys.readouterr().err
    plug_in("scheduler", RATES.replace("[step]", "[step % 5]"))
    assert trainSpeakerNet.main([f"--{k}={v}" for k, v in keys.items()]) == 0
    ended = checkpoint.load(f"{keys['save_path']}/model/last.model")
    assert ended["step"] == 8 and ended["scheduler_state_dict"]["last_epoch"] == 8


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


FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 39.38 GiB of which 1 GiB is free."
ASSERT = "CUDA error: device-side assert triggered\nCUDA kernel errors might be reported at some other API call."
OF_DEVICE = {
    "memory": (
        torch.cuda.OutOfMemoryError(FULL),
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB - a smaller batch_size with grad",
    ),
    "index": (
        RuntimeError(ASSERT),
        "RuntimeError: CUDA error: device-side assert triggered - an earlier operation",
    ),
}


@pytest.mark.parametrize("case", OF_DEVICE)
def test_an_error_of_a_gpu_is_one_line_wherever_it_is_noticed(model, arguments, capsys, monkeypatch, case):
    error, line = OF_DEVICE[case]
    model(HEAD + BODY.replace("FAIL", "pass"))

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(torch.Tensor, "backward", fails)
    assert trainSpeakerNet.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(line) and said[0].endswith("; --traceback shows all of it")


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
