"""W&B and MLflow get what TensorBoard gets, and their failures end no run; both packages are played by stand-ins."""

import sys
from types import SimpleNamespace

import pytest

import trainSpeakerNet


class Recorded:
    """A module that takes note of every call; ``fails`` names a function that raises."""

    def __init__(self, fails=""):
        self.calls, self.fails = [], fails
        self.__spec__ = SimpleNamespace(name="stand-in")

    def __getattr__(self, name):
        def call(*arguments, **more):
            if name == self.fails:
                raise ConnectionError("no route to the server\nand more of it")
            self.calls.append((name, arguments, more))
            return self if name == "init" else SimpleNamespace(info=SimpleNamespace(run_id="run7"))

        return call

    def called(self, name):
        return [(arguments, more) for called, arguments, more in self.calls if called == name]


@pytest.fixture
def played(monkeypatch):
    """Put a stand-in in the place of a package."""

    def play(name, **options):
        module = Recorded(**options)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return play


@pytest.fixture
def words(settings):
    keys = {**settings, "max_epoch": 1, "test_interval": 1, "log_interval": 4, "device": "cpu"}
    keys["picture_format"] = "png"
    return [f"--{key}={value}" for key, value in keys.items()]


def test_wandb_gets_points_figures_and_pictures(played, words, settings, tmp_path):
    wandb = played("wandb")
    assert trainSpeakerNet.main([*words, "--tracker=wandb"]) == 0
    ((_, made),) = wandb.called("init")
    assert made["name"] == "run" and made["resume"] == "allow" and made["config"]["lr"] == settings["lr"]
    logged = {tag: entry for (entry,), _ in wandb.called("log") for tag in entry}
    assert logged["Step/loss"]["step"] == 8 and logged["Train/Loss"]["epoch"] == 1 and "Val/eer_high" in logged
    assert "Val/det" in logged and wandb.called("finish")
    (((picture, *_), _), *_) = wandb.called("Image")
    assert picture.startswith(str(tmp_path / "run" / "result"))
    again = played("wandb")
    trainSpeakerNet.main([*words, "--tracker=wandb"])
    assert again.called("init")[0][1]["id"] == made["id"]


def test_mlflow_goes_on_with_its_run(played, words, settings):
    mlflow = played("mlflow")
    assert trainSpeakerNet.main([*words, "--tracker=mlflow"]) == 0
    assert mlflow.called("start_run") == [((), {"run_id": None, "run_name": "run"})]
    parameters = [values for (values,), _ in mlflow.called("log_params")]
    assert all(len(values) <= 100 for values in parameters)
    assert {key: value for values in parameters for key, value in values.items()}["lr"] == str(settings["lr"])
    metrics = {tag: more["step"] for (tag, _), more in mlflow.called("log_metric")}
    assert metrics["Step/grad_norm"] == 8 and metrics["Val/EER"] == 1 and mlflow.called("log_artifact")
    again = played("mlflow")
    trainSpeakerNet.main([*words, "--tracker=mlflow"])
    assert again.called("start_run") == [((), {"run_id": "run7", "run_name": None})] and not again.called("log_params")


@pytest.mark.parametrize("function", ["init", "log"])
def test_a_tracker_that_fails_is_said_once_and_ends_no_run(played, words, capsys, function):
    wandb = played("wandb", fails=function)
    assert trainSpeakerNet.main([*words, "--tracker=wandb"]) == 0
    line = "tracker: wandb: ConnectionError: no route to the server; the run goes on without it"
    assert capsys.readouterr().err.count(line) == 1 and not wandb.called("finish")


def test_a_tracker_that_is_not_installed_is_a_mistake(words, capsys, monkeypatch):
    monkeypatch.setattr("settings.command_line.importlib.util.find_spec", lambda name: None)
    assert trainSpeakerNet.main([*words, "--tracker=mlflow"]) == 2
    assert capsys.readouterr().err == "tracker: needs mlflow: pip install mlflow\n"
