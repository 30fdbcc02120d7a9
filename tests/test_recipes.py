"""Every shipped YAML, with its full-size model, takes two steps on tiny voices and embeds; recipes say their source."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from programs import ROOT

from settings.reader import load_config, table_defaults

SHORTER = {"wespeaker_wavlm_ecapa512.yaml": {"ssl_blocks": 1}}  # of 316 million parameters
SHORTER["WavLM_MHFA.yaml"] = {"ssl_blocks": 1, "n_mels": 2 * 768}
CONFIGS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(scope="session")
def surroundings(tmp_path_factory):
    """Folders of noise, music, babble and impulse responses, one short file of each kind."""
    root = tmp_path_factory.mktemp("surroundings")
    rng = np.random.default_rng(0)
    for category in ("noise/a", "music/a", "speech/a", "rir/a"):
        (root / category).mkdir(parents=True)
        sound = rng.normal(size=16000) * np.exp(-np.arange(16000) / (200 if category == "rir/a" else 1e5))
        soundfile.write(root / category / "x.wav", 0.1 * sound, 16000)
    return root


MODELS = {path: yaml.safe_load((ROOT / path).read_text())["model"] for path in CONFIGS}
OWN = {path: model for path, model in MODELS.items() if not path.startswith("configs/interop")}
TRAINED = [path for path, model in MODELS.items() if path in OWN or model not in OWN.values()]


@pytest.mark.parametrize("path", TRAINED)
def test_two_steps(path, data, surroundings, tmp_path, tools):
    keys = {"train_list": data / "train_list.txt", "train_path": data / "wav", "test_list": data / "trials.txt"}
    keys |= {"test_path": data / "wav", "musan_path": surroundings, "rir_path": surroundings / "rir"}
    keys |= {"save_path": tmp_path, "batch_size": 3, "max_frames": 48, "nDataLoaderThread": 0, "threads": 1}
    if "teacher_checkpoint" in yaml.safe_load((ROOT / path).read_text()):
        teacher = tools.build({"config": ROOT / "configs/small_speech.yaml", **keys, "save_path": tmp_path / "teacher"})
        teacher.saver.last()
        keys["teacher_checkpoint"] = teacher.files.model / "last.model"
    trainer = tools.build({"config": ROOT / path, **keys, **SHORTER.get(Path(path).name, {})})
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters() if p.requires_grad}
    trainer.network.train()
    for batch in tools.batches(trainer)[:2]:
        attempt = trainer.train_step([batch])
        assert attempt is not None and attempt.finite and attempt.norm > 0
    assert trainer.progress.step == 2
    after = dict(trainer.network.named_parameters())
    moved = sum(not torch.equal(after[name], p) for name, p in before.items())
    assert moved > len(before) / 2  # a step of a low rate may be lost in rounding, as beside a BN weight of 1
    with torch.inference_mode():
        out = trainer.network.eval()(batch["data"][0])
    assert out.shape == (len(batch["label"]), trainer.config.nOut) and out.isfinite().all()


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.startswith(("configs/recipes", "configs/interop"))])
def test_a_recipe_says_whose_it_is_and_what_to_expect(path):
    comment = "".join(line for line in (ROOT / path).read_text().splitlines(True) if line.startswith("#"))
    assert re.search(r"EER .*\d\.\d+|voxceleb_trainer|3D-Speaker|TaoRuijie|SpeechBrain", comment), comment
    if path.startswith("configs/recipes"):
        assert re.search(r"Published EER on VoxCeleb1-O.*: \d\.\d+", comment) and re.search(r"README|paper", comment)


@pytest.mark.parametrize("path", [p for p in CONFIGS if not p.startswith("configs/interop")])
def test_a_configuration_leaves_no_key_to_a_default_that_is_not_its_models(path):
    config, written, _, _ = load_config(["--config", str(ROOT / path)])
    assert table_defaults(config, written) == []


@pytest.mark.parametrize("path", [p for p in CONFIGS if "wespeaker_" in p and p.startswith("configs/recipes")])
def test_what_is_to_be_averaged_is_kept(path):  # wespeaker/bin/train.py saves each of the last num_avg epochs
    text = (ROOT / path).read_text()
    assert "the mean of the last ten epochs" in text and yaml.safe_load(text)["test_interval"] == 1


SCALED = [p for p in CONFIGS if "recipes/wespeaker_" in p or "recipes/redimnet2" in p]


@pytest.mark.parametrize("path", [*SCALED, "configs/ResNet34_AAM.yaml", "configs/large_margin.yaml"])
def test_the_rate_of_wespeakers_trainer_goes_by_the_rows_of_a_step(path):  # scale_ratio in wespeaker/bin/train.py
    assert yaml.safe_load((ROOT / path).read_text())["lr_reference_batch"] == 64


def test_keys_that_nobody_wrote_are_told_with_the_models_own_default():
    words = ["--model", "RawNet3", "--trainfunc", "aamsoftmax", "--margin", "0.2", "--nOut", "256"]
    config, written, _, _ = load_config(words)
    assert table_defaults(config, written) == [
        "models/RawNet3.py has the table's default for encoder_type: SAP (its own is ECA)",
        "loss/aamsoftmax.py has the table's default for scale: 30.0 (its own is 15.0)",
    ]
