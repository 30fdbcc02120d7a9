"""Evaluating and fine-tuning a checkpoint: its own configuration says what makes an embedding."""

import pytest
import torch

import trainSpeakerNet
from errors import UsageError
from settings.reader import to_yaml
from speaker_model import load_model
from storage import checkpoint, safetensors_file
from training.start import configure

OF_THE_MODEL = ("model", "channels", "aggregate", "n_mels", "nOut", "input_norm")


@pytest.fixture
def trained(settings, tools):
    """(checkpoint of a model without normalised features, keys of the run that are not the model's)."""
    trainer = tools.build({**settings, "input_norm": "none"})
    trainer.saver.last()
    path = trainer.files.model / "last.model"
    others = {key: value for key, value in settings.items() if key not in OF_THE_MODEL}
    return path, {**others, "initial_model": str(path), "save_path": f"{settings['save_path']}_2", "device": "cpu"}


def words(keys, **more):
    return [f"--{key}={value}" for key, value in {**keys, **more}.items()]


def test_evaluation_takes_what_makes_an_embedding_from_the_checkpoint(trained, tools, capsys):
    path, keys = trained
    config, _, notes, _ = configure(words(keys, eval=True))
    assert [getattr(config, key) for key in OF_THE_MODEL] == ["ECAPA_TDNN", 8, 16, 24, 12, "none"]
    (note,) = notes
    assert note.startswith(f"taken from {path}: ") and "n_mels: 24" in note and "global_context" not in note
    assert trainSpeakerNet.main(words(keys, eval=True)) == 0
    assert "EER" in capsys.readouterr().out


def test_safetensors_start_a_run_as_the_checkpoint_does(trained, tools):
    path, keys = trained
    file = path.with_suffix(".safetensors")
    file.write_bytes(safetensors_file.encoded(checkpoint.load(path)))
    config, _, notes, _ = configure(words(keys, initial_model=file))
    assert config.channels == 8 and notes[0].startswith(f"taken from {file}: ")
    trainer, before = tools.build(keys, initial_model=file), torch.load(path, weights_only=True)
    trainer.begin()
    after = trainer.network.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before["model_state_dict"].items())
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UsageError, match=r"last.safetensors: damaged, or not a safetensors file: "):
        checkpoint.load(file)


@pytest.mark.parametrize("more", [{"eval": True}, {}], ids=["evaluation", "fine-tuning"])
def test_features_that_the_model_was_not_trained_with_are_refused(trained, more, write):
    path, keys = trained
    yaml = write({"model": "ECAPA_TDNN", "input_norm": "mean", "n_mels": 24})
    with pytest.raises(UsageError) as caught:
        configure(["--config", yaml, *words(keys, **more, channels=16)])
    norm, channels = sorted(str(caught.value).splitlines())
    assert norm.startswith(f"{yaml}:2: input_norm: mean, but {path} was trained with none; leave input_norm out")
    assert channels.startswith(f"command line: --channels: 16, but {path} was trained with 8; leave channels out")
    assert ("--allow_partial" in norm) is not bool(more)


def test_fine_tuning_may_change_the_features_on_purpose(trained):
    path, keys = trained
    config, _, notes, _ = configure(words(keys, input_norm="mean", allow_partial=True))
    assert (config.input_norm, config.channels) == ("mean", 8)
    assert f"--input_norm: mean, but {path} was trained with none (allow_partial)" in "\n".join(notes)
    with pytest.raises(UsageError, match="--input_norm: mean, but"):  # an evaluation may not
        configure(words(keys, input_norm="mean", allow_partial=True, eval=True))
    assert configure(words(keys, spec_augment="[4, 8]"))[0].spec_augment == [4, 8]  # of training alone


def test_another_model_is_one_mistake(trained):
    path, keys = trained
    with pytest.raises(UsageError) as caught:
        configure(words(keys, model="ResNetSE34L", eval=True))
    assert str(caught.value) == (
        f"command line: --model: ResNetSE34L, but {path} was trained with ECAPA_TDNN; leave model out"
    )


def test_a_checkpoint_without_configuration_is_read_by_the_keys_that_are_written(trained, settings, tmp_path):
    path, keys = trained
    bare = tmp_path / "bare.model"
    torch.save(torch.load(path, weights_only=True)["model_state_dict"], bare)
    model = {key: settings[key] for key in OF_THE_MODEL if key in settings}
    config = configure(words({**keys, **model}, initial_model=bare, eval=True))[0]
    assert config.channels == 8 and config.input_norm == "mean"


def test_embedding_with_a_yaml_file_that_contradicts_the_checkpoint_is_refused(trained, tmp_path):
    path, _ = trained
    yaml = tmp_path / "x.yaml"
    yaml.write_text(to_yaml({"model": "ECAPA_TDNN", "n_mels": 24, "input_norm": "mean"}))
    with pytest.raises(UsageError, match=r"x.yaml:3: input_norm: mean, but .*last.model was trained with none"):
        load_model(path, str(yaml))
    yaml.write_text("model: ECAPA_TDNN\n")
    assert load_model(path, str(yaml)).config.input_norm == "none"
