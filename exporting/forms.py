"""What an exported model takes in: waveforms, the model's own features, or those that sherpa-onnx computes."""

import contextlib
import copy
from dataclasses import dataclass

from errors import UsageError

BANDS = 80  # of the features that sherpa-onnx computes for speaker models


@dataclass(frozen=True)
class Form:
    """A kind of input: the ``name`` of the tensor, its ``axes`` that may have any size, and what it is in words."""

    name: str
    axes: dict
    takes: str


FORMS = {
    "waveform": Form("waveform", {0: "batch", 1: "samples"}, "waveform (batch, samples)"),
    "features": Form("features", {0: "batch", 2: "frames"}, "features (batch, n_mels, frames)"),
    "sherpa-onnx": Form("x", {0: "batch", 1: "frames"}, "features of sherpa-onnx (batch, frames, 80)"),
}


def exportable(model, kind: str):
    """A copy of the model's network that takes the input of a form: with a front end of plain convolutions, or none.

    UsageError where the model cannot take it.
    """
    from torch import nn

    from frontend.chains import take_convolutions

    network = copy_of(model).cpu().eval()
    if kind == "waveform":
        take_convolutions(network)
    elif getattr(network, "frontend", None) is None:
        flag = "--input" if kind == "features" else f"--for {kind}"
        raise UsageError(f"{flag}: {model.config.model} has no features; it takes waveforms")
    else:
        network.frontend = nn.Identity() if kind == "features" else behind_sherpa(network.frontend, model.config)
    replace_spectrograms(network)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


def copy_of(model):
    """A copy of the model's network; it is built anew where a plug-in keeps what cannot be copied.

    That are locks, files, and tensors of a graph, as those of torch.nn.utils.weight_norm.
    """
    with contextlib.suppress(RuntimeError, TypeError):
        network = copy.deepcopy(model.network.__S__)
        if all(parameter.is_leaf for parameter in network.parameters()):
            return network
    anew = type(model.network)(model.config.values())
    anew.load_state_dict(model.network.state_dict())
    return anew.__S__


def behind_sherpa(front, config):
    """What is left of a front end behind the features that sherpa-onnx gives (B, frames, 80): its normalisation."""
    from torch import nn

    if not hasattr(front, "normalize"):
        raise UsageError(
            f"--for sherpa-onnx: models/{config.model}.py has a front end of its own; sherpa-onnx takes models that "
            "are trained with its features (docs/export.md)"
        )
    if config.n_mels != BANDS:
        raise UsageError(
            f"--for sherpa-onnx: n_mels is {config.n_mels}; sherpa-onnx computes {BANDS} bands: train with "
            f"n_mels: {BANDS} and {key_of_sherpa(config)}"
        )

    class Normalization(nn.Module):
        def forward(self, x):
            return front.normalize(x.transpose(1, 2))

    return Normalization()


def key_of_sherpa(config) -> str:
    """The key that gives a model the features of sherpa-onnx: the one that it has its own by."""
    return "features: sherpa-onnx" if hasattr(config, "features") and not config.frontend else "frontend: sherpa_onnx"


def foreign_features(model) -> str:
    """Of which features a model is, if they are not those that sherpa-onnx computes."""
    front = model.network.__S__.frontend
    plugin = getattr(front, "plugin", None)
    own = getattr(plugin or front, "features", "its own")
    if own == "sherpa-onnx":
        return ""
    return f"frontend: {model.config.frontend}" if plugin else f"features: {own}"


def replace_spectrograms(network):
    """Put real convolutions in the place of torchaudio's spectrograms, which plug-ins may hold: ONNX knows no complex
    numbers. One with settings that ``ConvolutionSpectrogram`` lacks is left as it is.
    """
    from frontend.chains import ConvolutionSpectrogram

    for name, module in list(network.named_modules()):
        kind = type(module)
        if kind.__module__.startswith("torchaudio.") and kind.__name__ == "Spectrogram" and module.power == 2.0:
            if module.pad or module.normalized or not (module.center and module.onesided):
                continue
            parent, _, child = name.rpartition(".")
            plain = ConvolutionSpectrogram(module.window, module.n_fft, module.hop_length, module.pad_mode)
            setattr(network.get_submodule(parent), child, plain)


def speech_like(sample_rate: int, seconds: float, batch: int):
    """Noise with the slope and the slow changes of speech (batch, samples), the same in every call."""
    import torch

    generator = torch.Generator().manual_seed(int(1000 * seconds) + batch)
    samples = int(seconds * sample_rate)
    wave = torch.randn(batch, samples, generator=generator)
    level = 0.05 + 0.04 * torch.sin(torch.arange(samples) / 900.0 + torch.arange(batch)[:, None])
    return level * (wave + 2 * torch.roll(wave, 1, dims=1) + torch.roll(wave, 2, dims=1))


def input_of(model, kind: str, wave):
    """What an exported model takes in of waveforms (batch, samples)."""
    from frontend.chains import Chain

    if kind == "waveform":
        return wave
    if kind == "features":
        return model.network.__S__.frontend(wave.to(model.device)).cpu()
    return Chain("sherpa-onnx", BANDS, sample_rate=model.sample_rate)(wave).transpose(1, 2).contiguous()


def example(model, kind: str, seconds: float, batch: int):
    """An input of speech-like noise, and its embeddings (batch, D) by PyTorch from the waveform on."""
    import torch

    wave = speech_like(model.sample_rate, seconds, batch)
    with torch.inference_mode():
        embeddings = torch.from_numpy(model.embed_batch(wave))
        given = input_of(model, kind, wave)
    return given.clone(), embeddings


def metadata(model, kind: str, language: str) -> dict[str, str]:
    """What a program that runs the model needs to know; for sherpa-onnx by the names that it reads.

    They are those of sherpa-onnx/csrc/speaker-embedding-extractor-model.cc. A wespeaker model is one whose features
    come as they are; ``normalize_samples`` 1 leaves the samples in [-1, 1].
    """
    import torch

    config = model.config
    keys = {"model": config.model, "input": kind, "sample_rate": model.sample_rate}
    keys |= {"dimension": model.dimension, "language": language}
    names = ("frontend", "features", "n_mels", "input_norm")
    keys |= {name: getattr(config, name) for name in names if getattr(config, name, "") != ""}
    if kind == "sherpa-onnx":
        keys |= {"framework": "wespeaker", "output_dim": model.dimension, "normalize_samples": 1}
    keys |= {"identity": model.identity, "torch": torch.__version__}
    return {name: str(value) for name, value in keys.items()}
