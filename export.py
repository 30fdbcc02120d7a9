"""Export a model to ONNX or TorchScript, checked against PyTorch at several lengths before it is written.

python export.py --initial_model exps/demo/model/model_best.model --out demo.onnx
python export.py --initial_model exps/demo/model/model_best.model --out demo.pt --input features
python export.py --initial_model exps/demo/model/model_best.model --out demo.onnx --int8 --test_list T --test_path WAV
"""

import contextlib
import functools
import os
import re
import sys
import tempfile
from pathlib import Path

from corpus.lists import read_trials
from errors import UsageError, first_line
from settings.command_line import Parser, existing_file, need, run
from speaker_model import add_model_arguments, model_from
from storage.exported import open_session
from storage.files import replacing, write_atomically

SECONDS = (0.5, 1.3, 3.0, 7.0)  # lengths that an export is checked at, in batches of
BATCHES = (1, 3)
ENDINGS = (".onnx", ".pt")
OPSET = 17
# Said of every model: of lengths in a trace, of slices that are not folded, of the older exporter.
EXPECTED = re.compile(r"TracerWarning|Constant folding|ONNX export mode is set|DeprecationWarning")


def main(argv) -> int:
    """Run the command line: 0 written, 1 refused because it differs from PyTorch, 2 bad usage."""
    parser = Parser("export.py", __doc__.splitlines()[0])
    add_model_arguments(parser, embeds=False)
    parser.add_argument("--out", required=True, metavar="FILE", help="model.onnx, or model.pt for TorchScript")
    parser.add_argument("--input", default="waveform", choices=("waveform", "features"), help="what it takes in")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of unit embeddings (1e-4)")
    parser.add_argument("--int8", action="store_true", help="also quantise weights to 8 bits, to FILE_int8.onnx")
    parser.add_argument("--test_list", default="", help="trials to measure the EER of fp32 and int8 on")
    parser.add_argument("--test_path", default="", help="folder that the paths of test_list are relative to")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.suffix not in ENDINGS:
        raise UsageError(f"--out: '{out}' must end in .onnx or .pt (TorchScript)")
    if not out.resolve().parent.is_dir():
        raise UsageError(f"--out: no such folder: '{out.parent}'")
    if not args.tolerance > 0:
        raise UsageError(f"--tolerance: must be above 0, got {args.tolerance:g}")
    if args.int8 and out.suffix != ".onnx":
        raise UsageError("--int8: quantises ONNX models; give --out FILE.onnx")
    if bool(args.test_list) != bool(args.test_path) or (args.test_list and not args.int8):
        raise UsageError("--test_list: goes with --test_path and --int8, to measure what quantising costs")
    if args.test_list:
        read_trials(existing_file(args.test_list, "--test_list"))  # what is wrong with it is said before the export
    if args.test_list and args.input != "waveform":
        raise UsageError("--test_list: is measured on waveforms; leave --input as it is")
    if out.suffix == ".onnx":
        need("export.py", "onnx", "onnxruntime")
    return export(args, out)


def export(args, out: Path) -> int:
    """Export, check, write."""
    model = model_from(args)
    network = exportable(model, args.input)
    with tempfile.TemporaryDirectory() as folder:
        unchecked = Path(folder, out.name)
        write = write_onnx if out.suffix == ".onnx" else write_torchscript
        write(network, model, args.input, unchecked)
        worst = check(reader(unchecked), model, args.input)
        if worst > args.tolerance:
            print(
                f"{out}: not written: differs from PyTorch by {worst:.2e}, more than {args.tolerance:g}",
                file=sys.stderr,
            )
            return 1
        write_atomically(out, unchecked.read_bytes())
    what = f"{args.input} -> embedding of {model.dimension}, {model.sample_rate} Hz"
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {what}")
    return quantise(args, model, out) if args.int8 else 0


# --------------------------------------------------------------------------------------------- what is exported


def exportable(model, kind: str):
    """A copy of the model as it is exported: a front end of plain convolutions, or none at all."""
    import copy

    from torch import nn

    from frontend.chains import with_convolutions

    network = copy.deepcopy(model.network.__S__).cpu().eval()
    own = getattr(network, "frontend", None)
    if kind == "features":
        if own is None:
            raise UsageError(f"--input: {model.config.model} has no features; it takes waveforms")
        network.frontend = nn.Identity()
    else:
        network = with_convolutions(network)
    replace_spectrograms(network)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network


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


def example(model, kind: str, seconds: float, batch: int):
    """Speech-like noise (batch, samples), or its features (batch, n_mels, frames), and its embeddings by PyTorch."""
    import torch

    generator = torch.Generator().manual_seed(int(1000 * seconds) + batch)
    samples = int(seconds * model.sample_rate)
    wave = torch.randn(batch, samples, generator=generator)
    level = 0.05 + 0.04 * torch.sin(torch.arange(samples) / 900.0 + torch.arange(batch)[:, None])
    wave = level * (wave + 2 * torch.roll(wave, 1, dims=1) + torch.roll(wave, 2, dims=1))
    with torch.inference_mode():
        embeddings = torch.from_numpy(model.embed_batch(wave))
        given = wave if kind == "waveform" else model.network.__S__.frontend(wave.to(model.device)).cpu()
    return given.clone(), embeddings


def write_onnx(network, model, kind: str, path: Path):
    """Write an ONNX file that takes any batch and length.

    By torch's exporter that traces: the newer one, by torch.export, takes minutes for the larger models and fixes the
    length of some without a word. What a trace may bake in, the check would show.
    """
    import onnx
    import torch

    given, _ = example(model, kind, 2.0, 2)
    axes = {
        kind: {0: "batch", given.dim() - 1: "samples" if kind == "waveform" else "frames"},
        "embedding": {0: "batch"},
    }
    with torch.inference_mode(False), torch.no_grad(), answered_by_the_check():
        names = {"input_names": [kind], "output_names": ["embedding"], "dynamic_axes": axes}
        try:
            with without_stdout():  # an exporter that fails prints the whole graph
                torch.onnx.export(network, (given,), str(path), opset_version=OPSET, dynamo=False, **names)
        except (RuntimeError, TypeError, ValueError) as error:  # its errors carry the whole graph after the first line
            where = f"models/{model.config.model}.py"
            where += f" with frontend/{model.config.frontend}.py" if model.config.frontend else ""
            text = f"ONNX cannot hold it: {first_line(error)} TorchScript can: --out {path.stem}.pt"
            raise UsageError(f"{where}: {text}") from error
    proto = onnx.load(path)
    onnx.helper.set_model_props(proto, metadata(model, kind))
    onnx.save(proto, path)


@contextlib.contextmanager
def without_stdout():
    """Drop what is written to stdout, by compiled code too."""
    sys.stdout.flush()
    own, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)


@contextlib.contextmanager
def answered_by_the_check():
    """Drop what the exporters say of every model, that values depend on the example; show whatever else they say.

    Whether something of the example was baked in, the comparison at other lengths and batches tells.
    """
    import warnings

    with warnings.catch_warnings(record=True) as said:
        yield
    for warning in said:
        if not EXPECTED.search(f"{warning.category.__name__}: {warning.message}"):
            print(f"{warning.category.__name__}: {warning.message}", file=sys.stderr)


def metadata(model, kind: str) -> dict[str, str]:
    """What a program that runs the model needs to know."""
    import torch

    keys = {"model": model.config.model, "input": kind, "sample_rate": model.sample_rate, "dimension": model.dimension}
    keys |= {
        name: getattr(model.config, name)
        for name in ("frontend", "features", "n_mels", "input_norm")
        if getattr(model.config, name, "") != ""
    }
    return {
        name: str(value) for name, value in {**keys, "identity": model.identity, "torch": torch.__version__}.items()
    }


def write_torchscript(network, model, kind: str, path: Path):
    """Write a TorchScript file by tracing."""
    import json

    import torch

    given, _ = example(model, kind, 2.0, 2)
    with torch.inference_mode(False), torch.no_grad(), answered_by_the_check():
        traced = torch.jit.trace(network, given, check_trace=False)
    traced.save(str(path), _extra_files={"metadata.json": json.dumps(metadata(model, kind))})


def reader(path: Path):
    """A function that runs an exported file: input tensor -> embeddings tensor."""
    import torch

    if path.suffix == ".pt":
        loaded = torch.jit.load(str(path))

        def run_script(given):
            with torch.inference_mode():
                return loaded(given).float()

        return run_script
    session = open_session(path)
    name = session.get_inputs()[0].name
    return lambda given: torch.from_numpy(session.run(None, {name: given.numpy()})[0])


# ------------------------------------------------------------------------------------------------------- checks


def differences(found, expected):
    """Largest difference of length-normalised embeddings (B, D), and largest cosine distance."""
    from torch.nn.functional import normalize

    found, expected = normalize(found.double(), dim=1), normalize(expected.double(), dim=1)
    return float((found - expected).abs().max()), float((1 - (found * expected).sum(dim=1)).max())


def check(read, model, kind: str) -> float:
    """Compare an exported model with PyTorch at every length and batch; prints and returns the largest difference."""
    worst = 0.0
    for seconds in SECONDS:
        for batch in BATCHES:
            given, expected = example(model, kind, seconds, batch)
            largest, distance = differences(read(given), expected)
            worst = max(worst, largest if largest == largest else float("inf"))
            print(f"{seconds:4.1f} s x {batch}: largest difference {largest:.1e}, cosine distance {distance:.1e}")
    return worst


def quantise(args, model, out: Path) -> int:
    """Write the int8 model beside the fp32 one and say what it costs."""
    target = out.with_name(f"{out.stem}_int8.onnx")
    with replacing(target) as temporary:
        quantise_onnx(out, temporary)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, int8 weights")
    exact, coarse = reader(out), reader(target)
    if args.test_list:
        for kind, read in (("fp32", exact), ("int8", coarse)):
            print(f"{kind}: {evaluate(read, args.test_list, args.test_path, model.sample_rate)}")
        return 0
    given = [example(model, args.input, seconds, 3)[0] for seconds in SECONDS]
    distance = max(differences(coarse(x), exact(x))[1] for x in given)
    print(f"cosine of int8 with fp32 embeddings of noise: at least {1 - distance:.4f}")
    print("no EER was measured: give --test_list and --test_path")
    return 0


def quantise_onnx(source: Path, target: Path):
    """Quantise the weights of matrix products and convolutions to int8, those of the front end left as they are."""
    import logging

    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    spectrum = [node.name for node in onnx.load(source).graph.node if "/frontend/" in node.name]
    log = logging.getLogger()
    level = log.level
    log.setLevel(logging.ERROR)  # it recommends a pre-processing that changes nothing here
    try:
        quantize_dynamic(source, target, weight_type=QuantType.QUInt8, per_channel=True, nodes_to_exclude=spectrum)
    finally:
        log.setLevel(level)


def evaluate(read, test_list: str, test_path: str, sample_rate: int) -> str:
    """EER and minDCF with their intervals of an exported model that takes waveforms, each file alone."""
    import numpy as np
    import torch

    from corpus.audio import AudioError, least_samples, read_crop, wrap_pad
    from scoring.cosine import cosine_scores
    from scoring.figures import evaluation_metrics
    from scoring.intervals import trial_speakers

    labels, first, second = read_trials(test_list)
    number = {file: i for i, file in enumerate(sorted({*first, *second}))}
    rows = []
    for file in number:
        try:
            x = read_crop(Path(test_path, file), sample_rate=sample_rate).x
        except AudioError as error:
            raise UsageError(f"{Path(test_path, file)}: {error}") from error
        x = wrap_pad(x, least_samples(sample_rate))
        rows.append(read(torch.from_numpy(x[None]))[0].numpy())
    scores = cosine_scores(np.stack(rows), np.array([[number[a], number[b]] for a, b in zip(first, second)]))
    found = evaluation_metrics(scores, labels, speakers=trial_speakers(labels, first, second)[0])
    eer = (
        f"EER {found['eer']:.2f} % (95 % CI over {found['interval']} {found['eer_low']:.2f} to {found['eer_high']:.2f})"
    )
    return f"{eer}  minDCF(0.05) {found['min_dcf_0.05']:.4f}  {found['trials']} trials"


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
