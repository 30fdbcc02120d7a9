"""The model card: of a run, of weights alone; what is unknown is said so, and the owner's licence stays."""

import json
import re
import shutil

import pytest
import torch

import export
import trainSpeakerNet
from exporting import card
from scoring.backend import Backend
from scoring.calibration import LogisticCalibration
from settings.command_line import run
from speaker_model import load_model
from storage.safetensors_file import ENDING


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("run")
    keys = {"train_list": data / "train_list.txt", "train_path": data / "wav", "test_list": data / "trials.txt"}
    keys |= {"test_path": data / "wav", "save_path": folder, "model": "XVector", "channels": 8, "stats_channels": 16}
    keys |= {"n_mels": 24, "nOut": 12, "trainfunc": "aamsoftmax", "optimizer": "adam", "scheduler": "cosine"}
    keys |= {"batch_size": 6, "max_frames": 40, "max_epoch": 1, "test_interval": 1, "eval_frames": 0}
    keys |= {"nDataLoaderThread": 0, "threads": 1, "picture_format": "none", "device": "cpu", "speed_perturb": True}
    assert trainSpeakerNet.main([f"--{name}={value}" for name, value in keys.items()]) == 0
    return folder


def card_of(checkpoint, out, *more):
    """The text of the card of an export."""
    assert run(export.main, ["--initial_model", str(checkpoint), "--out", str(out), *more]) == 0
    return out.with_suffix(".md").read_text()


def rows_of(text):
    """{first cell: other cells} of all tables."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return {first: rest for first, *rest in rows}


def test_a_run_tells_its_figures_intervals_lists_and_threshold(trained, data, tmp_path, capsys):
    checkpoint, out = trained / "model" / "model_best.model", tmp_path / "x.pt"
    text = card_of(checkpoint, out)
    assert capsys.readouterr().out.endswith(
        f"{tmp_path / 'x.md'}: what is known of it; the licence is yours to write\n"
    )
    rows, events = rows_of(text), (trained / "result" / "metrics.jsonl").read_text().splitlines()
    result = next(e for e in map(json.loads, events) if e["event"] == "eval")
    assert "The best of" not in text  # there is one
    low, high = result["eer_low"], result["eer_high"]
    assert rows["EER"] == [f"{result['eer']:.2f} %", f"{low:.2f} to {high:.2f}"]
    assert rows["minDCF, 1 % of one speaker"][0] == f"{result['min_dcf_0.01']:.4f}"
    assert f"From **{result['threshold']:.4f}** on" in text and f"over {result['interval']} |" in text
    assert f"{result['trials']:,} trials of" in text and "is the natural-log likelihood ratio" in text
    hashes = re.findall(r"SHA-256 `(\w{64})`", text)
    noted = (trained / "result" / "config.yaml").read_text()
    assert len(set(hashes)) == 2 and all(digest in noted for digest in hashes)
    assert (rows["Speakers"], rows["Recordings"]) == (["6"], ["30"])
    assert rows["Augmentation"] == ["`speed_perturb: True`"] and rows["Hours, languages, devices"] == ["unknown"]
    parameters = sum(p.numel() for p in torch.jit.load(str(out)).parameters())
    assert rows["Model"][0].endswith(f", {parameters:,} parameters") and "Language: unknown." in text


def test_the_best_of_several_evaluations_says_so(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    metrics = tmp_path / "run" / "result" / "metrics.jsonl"
    more = json.dumps({"event": "eval", "epoch": 2, "eer": 50.0})
    metrics.write_text(f'{metrics.read_text()}{more}\n{{"event": "eval", "epo')  # which a crash cut
    text = card_of(tmp_path / "run" / "model" / "model_best.model", tmp_path / "x.pt")
    assert "The best of 2 evaluations on these trials" in text and "| EER |" in text


def test_its_three_lines_of_python_run(trained, data, tmp_path, monkeypatch):
    import soundfile

    monkeypatch.chdir(tmp_path)
    shutil.copy(sorted((data / "wav").rglob("*.flac"))[0], "A.flac")
    soundfile.write("A.wav", *soundfile.read("A.flac"))
    for name in ("x.onnx", "x.pt"):
        text = card_of(trained / "model" / "model_best.model", tmp_path / name)
        space: dict = {}
        exec(text.split("```python\n")[1].split("```")[0], space)
        assert space["embedding"].shape == (12,)


def test_weights_alone_tell_nothing_and_a_card_of_another_epoch_has_no_figures(trained, tmp_path):
    best = trained / "model" / "model_best"
    for ending in (".model", ENDING):
        shutil.copy(best.with_suffix(ending), tmp_path / f"alone{ending}")
        text = card_of(tmp_path / f"alone{ending}", tmp_path / "y.pt")
        assert "Unknown: no evaluation of these weights lies beside the checkpoint." in text
        assert "A threshold is unknown" in text and rows_of(text)["Speakers"][0].endswith("classes of the loss")
    state = torch.load(best.with_suffix(".model"), weights_only=True)
    torch.save(state["model_state_dict"], tmp_path / "bare.pt")
    text = card_of(tmp_path / "bare.pt", tmp_path / "y.pt", "--config", str(trained / "result" / "config.yaml"))
    assert "Unknown: the checkpoint carries no configuration of this trainer." in text
    state["epoch"] = 7
    for ending in (".eer", ".calibration"):
        shutil.copy(best.with_suffix(ending), trained / "model" / f"other{ending}")
    torch.save(state, trained / "model" / "other.model")
    text = card_of(trained / "model" / "other.model", tmp_path / "z.pt")
    assert "its interval is unknown" in text and "| EER |" not in text  # the calibration is of these weights
    state["model_state_dict"] = {name: 2 * value for name, value in state["model_state_dict"].items()}
    torch.save(state, trained / "model" / "other.model")
    assert "Unknown: no evaluation" in card_of(trained / "model" / "other.model", tmp_path / "z.pt")


def test_a_file_that_differs_from_the_model_promises_no_threshold(trained, tmp_path):
    model = load_model(trained / "model" / "model_best.model")
    (tmp_path / "x.pt").write_bytes(b"")
    text = card.write(model, card.Export(tmp_path / "x.pt", "waveform", "unknown", 0.5, 0.3)).read_text()
    assert "**It differs from the trained model, by up to 0.3 in a value" in text and "From **" not in text


def test_a_calibration_of_score_py_tells_its_threshold_alone(trained, tmp_path):
    shutil.copy(trained / "model" / "model_best.model", tmp_path / "x.model")
    calibration = LogisticCalibration([10.0], -4.0, 0.05)
    identity = load_model(tmp_path / "x.model").identity
    Backend(calibration=calibration, identity=identity, caution="few trials").save(tmp_path / "x.calibration")
    text = card_of(tmp_path / "x.model", tmp_path / "x.pt")
    assert "Calibrated, 10.0000 x cosine - 4.0000 is" in text and "Caution: few trials;" in text
    assert "a cosine of 0.6944." in text  # (log(19) + 4) / 10
    Backend(calibration=LogisticCalibration([2.0], 0.5, 0.05), identity=identity).save(tmp_path / "x.calibration")
    text = card_of(tmp_path / "x.model", tmp_path / "x.pt")
    assert "2.0000 x cosine + 0.5000 is" in text and "a cosine of 1.2222, which no pair reaches: at this prior" in text
    assert "Unknown: no evaluation of these weights" in text


def test_the_speech_alone_of_recordings_is_told_and_measured(trained, data, tmp_path, monkeypatch):
    checkpoint = trained / "model" / "model_best.model"
    state = torch.load(checkpoint, weights_only=True)
    state["config"]["vad"] = "energy"
    torch.save(state, tmp_path / "v.model")
    told = "The figures are of the speech of each recording alone, as `vad: energy` finds it; the file takes"
    assert told not in card_of(checkpoint, tmp_path / "a.pt")
    assert told in card_of(tmp_path / "v.model", tmp_path / "b.pt")
    model, heard = load_model(tmp_path / "v.model"), []

    def read(x):
        heard.append(x.shape[1])
        return torch.from_numpy(model.embed_batch(x))

    monkeypatch.setattr("corpus.speech.kept_spans", lambda x, rate, vad: [(0, 9000)] if vad == "energy" else None)
    export.evaluate(read, model, "waveform", str(data / "trials.txt"), str(data / "wav"))
    assert set(heard) == {9000}


def test_the_licence_of_its_owner_stays_and_other_files_are_not_replaced(trained, tmp_path, capsys):
    checkpoint, out = trained / "model" / "model_best.model", tmp_path / "x.pt"
    text = card_of(checkpoint, out, "--language", "Welsh")
    assert "Language: Welsh, as who exported it says." in text and "## Licence\nNot stated." in text
    out.with_suffix(".md").write_text(text[: text.index("Not stated.")] + "CC BY 4.0\n\nAsk us.\n")
    assert card_of(checkpoint, out).endswith("## Licence\nCC BY 4.0\n\nAsk us.\n")
    for _ in range(2):  # another form of the model has a card of its own, under the same licence
        assert run(export.main, ["--initial_model", str(checkpoint), "--out", str(tmp_path / "x.onnx")]) == 0
        assert str(tmp_path / "x.onnx.md") in capsys.readouterr().out
        text = (tmp_path / "x.onnx.md").read_text()
        assert "| `x.onnx` (ONNX" in text and text.endswith("## Licence\nCC BY 4.0\n\nAsk us.\n")
    assert "| `x.pt` (TorchScript" in out.with_suffix(".md").read_text()
    out.unlink()  # what its card was of
    assert "| `x.onnx` (ONNX" in card_of(checkpoint, tmp_path / "x.onnx")
    (tmp_path / "README.md").write_text("mine")
    capsys.readouterr()
    assert run(export.main, ["--initial_model", str(checkpoint), "--out", str(tmp_path / "README.pt")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("--out: its model card would replace") and error.count("\n") == 1
    assert (tmp_path / "README.md").read_text() == "mine"
