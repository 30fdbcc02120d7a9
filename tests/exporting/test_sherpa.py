"""export.py --for sherpa-onnx: metadata and features, by a reference of our own and by the package if it is here."""

import numpy as np
import onnxruntime
import pytest
import soundfile
from reference_features import kaldi_fbank
from samples import speaker_model

import export
from exporting import formats, forms
from settings import plugins
from settings.command_line import run
from speaker_model import load_model
from storage.files import save_atomically

FITTING = {"features": "sherpa-onnx", "n_mels": 80}


@pytest.fixture
def exported(settings, tools, tmp_path, capsys):
    """Export a tiny model with other keys; returns (checkpoint, file, exit status, stdout, stderr)."""

    def make(*more, **keys):
        path, out = tmp_path / "model.model", tmp_path / "x.onnx"
        save_atomically(tools.build({**settings, **keys}).state.capture(), path)
        capsys.readouterr()
        status = run(export.main, ["--initial_model", str(path), "--out", str(out), "--for", "sherpa-onnx", *more])
        return path, out, status, *capsys.readouterr()

    return make


@pytest.fixture
def recordings(data):
    return sorted((data / "wav").rglob("*.flac"))[::11][:3]


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x)


@pytest.mark.parametrize("norm", ["mean", "meanvar"])
def test_it_takes_the_features_that_sherpa_onnx_computes(norm, exported, recordings):
    path, out, status, _, _ = exported("--language", "English", input_norm=norm, **FITTING)
    assert status == 0
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    read = {"framework": "wespeaker", "language": "English", "sample_rate": "16000", "normalize_samples": "1"}
    assert {**read, "output_dim": "12"}.items() <= facts.items() and "feature_normalize_type" not in facts
    (given,), (gives,) = session.get_inputs(), session.get_outputs()
    assert (given.shape, gives.shape[1]) == (["batch", "frames", 80], 12)
    model = load_model(path)
    for file in recordings:
        x = soundfile.read(file, dtype="float32")[0]
        features = kaldi_fbank(x[None], 80, "povey", 7600.0, snip_edges=False).numpy()[None]
        embedding = session.run(None, {given.name: features})[0][0]
        assert np.abs(unit(embedding) - unit(model.embed_file(file))).max() < 1e-4


def test_sherpa_onnx_itself_gives_the_same_embeddings(exported, recordings):
    sherpa_onnx = pytest.importorskip("sherpa_onnx")
    path, out, status, _, _ = exported("--int8", **FITTING)
    assert status == 0
    model = load_model(path)
    for name, most in ((out, 1e-4), (out.with_name("x_int8.onnx"), 0.1)):
        config = sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(name))
        extractor = sherpa_onnx.SpeakerEmbeddingExtractor(config)
        assert extractor.dim == 12
        for file in recordings:
            x, rate = soundfile.read(file, dtype="float32")
            stream = extractor.create_stream()
            stream.accept_waveform(rate, x)
            stream.input_finished()
            assert np.abs(unit(extractor.compute(stream)) - unit(model.embed_file(file))).max() < most


def test_other_features_are_refused_with_the_key_to_train_with(exported):
    _, out, status, _, error = exported(frontend="fbank", n_mels=80)
    assert (status, error.count("\n")) == (1, 1) and not out.exists()
    assert error.endswith(": sherpa-onnx does not compute its frontend: fbank; train with frontend: sherpa_onnx\n")
    _, _, status, _, error = exported(features="sherpa-onnx", n_mels=24)
    assert (status, error.count("\n")) == (2, 1)
    assert error.endswith("train with n_mels: 80 and features: sherpa-onnx\n") and "n_mels is 24" in error


def test_a_model_without_the_key_takes_the_front_end_of_that_name(tmp_path):
    for name, own in (("sherpa_onnx", ""), ("", "features: voxceleb_trainer")):
        model = speaker_model("ResNetSE34L", n_mels=80)
        if name:
            model.network.__S__.frontend.plugin = plugins.call(plugins.load("frontend", name), {"n_mels": 80})
        assert (forms.foreign_features(model), forms.key_of_sherpa(model.config)) == (own, "frontend: sherpa_onnx")
        path = tmp_path / "x.onnx"
        formats.write(forms.exportable(model, "sherpa-onnx"), model, "sherpa-onnx", path)
        assert (export.check(formats.reader(path), model, "sherpa-onnx") < 1e-4) == bool(name)


def test_a_model_without_features_and_an_input_of_ones_own_are_refused(capsys):
    with pytest.raises(export.UsageError, match="--for sherpa-onnx: RawNet3 has no features"):
        export.exportable(speaker_model("RawNet3"), "sherpa-onnx")
    for words in (["--out", "x.pt"], ["--out", "x.onnx", "--input", "features"]):
        assert run(export.main, ["--initial_model", "none.model", "--for", "sherpa-onnx", *words]) == 2
        assert capsys.readouterr().err.startswith("--for sherpa-onnx: takes ONNX with an input of its own")
