"""Checkpoints of other toolkits give their own embeddings, and training starts from them."""

import re

import pytest
import torch
import torch.nn.functional as F
import yaml
from foreign_cases import CASES
from foreign_models import centred_fbank, resnetse34l, speechbrain_fbank, taoruijie, voice
from programs import ROOT

from models.frontend import FrontEnd
from settings import plugins
from settings.reader import load_config
from storage import checkpoint, interop

MODELS = plugins.available("models")


class Holder(torch.nn.Module):
    """A network with the model alone."""

    def __init__(self, model):
        super().__init__()
        self.__S__ = model


def read(file, keys):
    model = plugins.call(plugins.load("models", keys["model"]), {"nOut": 192, "n_mels": 80, **keys}).eval()
    faults = checkpoint.load_weights(Holder(model), file, "file")
    unused = [name for name in faults["unused"] if not name.startswith("__L__.")]
    assert not faults["model"] and not unused, (faults["model"], unused)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("samples", [24000, 41234])
def test_a_foreign_checkpoint_gives_its_own_embedding(case, samples):
    file, keys, embed = case()
    model, x = read(file, keys), voice(samples)
    with torch.inference_mode():
        ours, theirs = model(x), embed(x)
    assert 1 - float(F.cosine_similarity(ours, theirs)) < 1e-5
    assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    "form",
    [
        lambda file: file,
        lambda file: {name.removeprefix("__S__."): t for name, t in file.items() if "__L__" not in name},
        lambda file: {"model": file, "optimizer": {}, "epoch": 3},
        lambda file: {f"module.{name}": tensor for name, tensor in file.items()},
    ],
)
def test_the_four_forms_of_voxceleb_trainer(form):
    file, keys, _ = resnetse34l()
    known, other = read(file, keys).state_dict(), read(form(file), keys).state_dict()
    assert all(torch.equal(known[name], other[name]) for name in known)


def test_projects_are_recognised_and_our_own_files_are_not():
    names = {case.__name__: checkpoint.toolkit_of(case()[0]).name for case in CASES}
    assert names["taoruijie"] == "TaoRuijie/ECAPA-TDNN" and names["wespeaker_ecapa"] == "wespeaker"
    assert names["speechbrain"] == names["threedspeaker"] == "SpeechBrain or 3D-Speaker"
    assert names["campplus"] == names["wespeaker_xvector"] == names["wespeaker_resnet"] == "wespeaker or 3D-Speaker"
    assert names["wespeaker_redimnet_b1"] == names["wespeaker_redimnet_b3"] == "wespeaker or 3D-Speaker"
    assert names["resnetse34l"] == names["resnetse34v2"] == names["vggvox"] == "voxceleb_trainer"
    assert names["eres2net"] == names["eres2netv2"] == names["wespeaker_simam"] == "wespeaker or 3D-Speaker"
    assert names["rawnet3"] == "RawNet3" and names["wespeaker_eres2net"] == "wespeaker"
    for name in MODELS:
        values = {"nOut": 16, "n_mels": 40, "channels": 8, "aggregate": 8, "m_channels": 4, "encoder_type": "ASP"}
        own = Holder(plugins.call(plugins.load("models", name), values)).state_dict()
        assert interop.recognise(own) is None and checkpoint.weights_of(own, "own").keys() == own.keys()


CONFIGS = sorted(ROOT.glob("configs/interop/*.yaml"))


@pytest.mark.parametrize("path", [p for p in CONFIGS if yaml.safe_load(p.read_text())["model"] in MODELS], ids=str)
def test_the_configuration_of_a_foreign_checkpoint_fits_its_model(path):
    config, _, notes, _ = load_config(["--config", str(path)])
    written = yaml.safe_load(path.read_text())
    assert not notes and all(getattr(config, key) == value for key, value in written.items())
    assert path.stem.startswith(written.get("features", "voxceleb_trainer"))


def test_feature_chains_against_the_originals():
    x = voice()
    assert torch.allclose(FrontEnd("speechbrain", 80, "mean")(x), speechbrain_fbank(x), atol=2e-3)
    for features, window, scale in (("wespeaker", "hamming", 32768), ("3dspeaker", "povey", 1)):
        assert torch.allclose(FrontEnd(features, 80, "mean")(x), centred_fbank(x, window, scale), atol=2e-3)


def test_training_starts_from_a_foreign_file_and_lists_what_does_not_fit(settings, tools, tmp_path, capsys):
    from errors import UsageError
    from training.finetuning import load_initial

    file, keys, embed = taoruijie()
    keys = {**keys, "nOut": 192, "n_mels": 80, "aggregate": 1536, "initial_model": str(tmp_path / "their.model")}
    torch.save(file, keys["initial_model"])
    trainer = tools.build({**settings, **keys})
    load_initial(trainer.network, trainer.dataset, trainer.config, trainer.log)
    said = capsys.readouterr().out
    assert "(TaoRuijie/ECAPA-TDNN)" in said and "loss.weight: (9, 192) in the file, (6, 192) in the model" in said
    assert "features" not in said
    with torch.inference_mode():
        assert torch.allclose(trainer.network.eval()(voice()), embed(voice()), atol=1e-3)
    trainer = tools.build({**settings, **keys, "features": "wespeaker"})
    load_initial(trainer.network, trainer.dataset, trainer.config, trainer.log)
    assert "its features are those of taoruijie, the configuration has features: wespeaker" in capsys.readouterr().out
    other = tools.build({**settings, **keys, "layout": "wespeaker"})
    with pytest.raises(UsageError, match=r"2 of the file are unknown|--allow_partial"):
        load_initial(other.network, other.dataset, other.config, other.log)
    other.config.allow_partial = True
    load_initial(other.network, other.dataset, other.config, other.log)
    said = capsys.readouterr().out
    assert "not used: model.bn_output.weight" in said and "more\n" not in said
    deaf = tools.build({**settings, **keys, "channels": 8, "allow_partial": True})
    load_initial(deaf.network, deaf.dataset, deaf.config, deaf.log)
    said = capsys.readouterr().out
    loaded, total = map(int, re.search(r"(\d+) of (\d+) tensors loaded", said).groups())
    assert said.count("starts fresh: model.") == 20 and f"  starts fresh: {total - loaded - 20} more\n" in said
