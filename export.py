"""Export a model to ONNX, TorchScript or torch.export, checked against PyTorch at several lengths before it is written.

python export.py --initial_model exps/demo/model/model_best.model --out demo.onnx
python export.py --initial_model exps/demo/model/model_best.model --out demo.pt --input features
python export.py --initial_model exps/demo/model/model_best.model --out demo.onnx --for sherpa-onnx
python export.py --initial_model exps/demo/model/model_best.model --out demo.onnx --int8 --test_list T --test_path WAV
"""

import functools
import sys
import tempfile
from pathlib import Path

from corpus.lists import none_below, read_trials
from errors import UsageError
from exporting import card
from exporting.eight_bits import quantise_onnx
from exporting.formats import NAMES, SHORTEST, reader, write
from exporting.forms import FORMS, example, exportable, foreign_features, input_of, key_of_sherpa
from settings.command_line import Parser, check_not_read, existing_file, existing_folder, need, run
from speaker_model import add_model_arguments, model_from
from storage.files import replacing, write_atomically

SECONDS = (0.5, 1.3, 3.0, 7.0)  # lengths that an export is checked at, in batches of
BATCHES = (1, 3)


def main(argv) -> int:
    """Run the command line: 0 written, 1 refused because it differs from PyTorch, 2 bad usage."""
    parser = Parser("export.py", __doc__.splitlines()[0])
    add_model_arguments(parser, embeds=False)
    endings = "model.onnx, model.pt for TorchScript, or model.pt2 for torch.export"
    parser.add_argument("--out", required=True, metavar="FILE", help=endings)
    parser.add_argument("--input", choices=("waveform", "features"), help="what it takes in (default waveform)")
    parser.add_argument("--for", dest="runtime", choices=("sherpa-onnx",), help="take in what this runtime computes")
    parser.add_argument("--language", default="unknown", help="what the speakers speak, for the metadata and the card")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of unit embeddings (1e-4)")
    parser.add_argument("--int8", action="store_true", help="also quantise weights to 8 bits, to FILE_int8.onnx")
    parser.add_argument("--test_list", default="", help="trials to measure the EER of fp32 and int8 on")
    parser.add_argument("--test_path", default="", help="folder that the paths of test_list are relative to")
    args = parser.parse_args(argv)
    out = Path(args.out)
    check_usage(args, out)
    if out.suffix == ".onnx":
        need("export.py", "onnx", "onnxruntime")
    return export(args, out)


def check_usage(args, out: Path):
    """UsageError for what does not go together."""
    if out.suffix not in NAMES:
        raise UsageError(f"--out: '{out}' must end in .onnx, .pt (TorchScript) or .pt2 (torch.export)")
    if not out.resolve().parent.is_dir():
        raise UsageError(f"--out: no such folder: '{out.parent}'")
    check_not_read("--out", out, (args.initial_model, args.config))
    card.refuse_others(out)
    if not args.tolerance > 0:
        raise UsageError(f"--tolerance: must be above 0, got {args.tolerance:g}")
    if not args.language.strip():
        raise UsageError("--language: must not be empty; leave it out if it is unknown")
    if args.runtime and (args.input or out.suffix != ".onnx"):
        raise UsageError(f"--for {args.runtime}: takes ONNX with an input of its own; give --out FILE.onnx, no --input")
    if args.int8 and out.suffix != ".onnx":
        raise UsageError("--int8: quantises ONNX models; give --out FILE.onnx")
    if bool(args.test_list) != bool(args.test_path) or (args.test_list and not args.int8):
        raise UsageError("--test_list: goes with --test_path and --int8, to measure what quantising costs")
    if args.test_list:
        _, first, second = read_trials(existing_file(args.test_list, "--test_list"))  # said before the export
        root = existing_folder(args.test_path, "--test_path")
        if fault := none_below(root, args.test_list, [*first, *second]):
            raise UsageError(f"--test_path: {fault}")


def export(args, out: Path) -> int:
    """Export, check, write, and describe."""
    model, kind = model_from(args), args.runtime or args.input or "waveform"
    network = exportable(model, kind)
    with tempfile.TemporaryDirectory() as folder:
        unchecked = Path(folder, out.name)
        shortest = write(network, model, kind, unchecked, args.language)
        worst = check(reader(unchecked), model, kind, shortest)
        if worst > args.tolerance:
            much = f"differs from PyTorch by {worst:.2e}, more than {args.tolerance:g}"
            print(f"{out}: not written: {much}{why(model, kind)}", file=sys.stderr)
            return 1
        write_atomically(out, unchecked.read_bytes())
    what = f"{FORMS[kind].takes.partition(' (')[0]} -> embedding of {model.dimension}, {model.sample_rate} Hz"
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, {what}")
    measured = quantise(args, model, kind, out) if args.int8 else []
    page = card.write(model, card.Export(out, kind, args.language, shortest, worst, measured))
    print(f"{page}: what is known of it; the licence is yours to write")
    return 0


def why(model, kind: str) -> str:
    """What to do about a difference that comes from features other than those of the runtime."""
    own = foreign_features(model) if kind == "sherpa-onnx" else ""
    return f": sherpa-onnx does not compute its {own}; train with {key_of_sherpa(model.config)}" if own else ""


# ------------------------------------------------------------------------------------------------------- checks


def differences(found, expected):
    """Largest difference of length-normalised embeddings (B, D), and largest cosine distance."""
    from torch.nn.functional import normalize

    found, expected = normalize(found.double(), dim=1), normalize(expected.double(), dim=1)
    return float((found - expected).abs().max()), float((1 - (found * expected).sum(dim=1)).max())


def check(read, model, kind: str, shortest: float = SHORTEST) -> float:
    """Compare an exported model with PyTorch at every length and batch; prints and returns the largest difference.

    ``shortest``: seconds that the file takes at least.
    """
    worst = 0.0
    if shortest > SHORTEST:
        print(f"takes {shortest:g} s and longer; this format fixes the sizes of what is shorter")
    for seconds in SECONDS:
        for batch in BATCHES:
            given, expected = example(model, kind, max(seconds, shortest), batch)
            largest, distance = differences(read(given), expected)
            worst = max(worst, largest if largest == largest else float("inf"))
            length = f"{max(seconds, shortest):4.1f} s x {batch}"
            print(f"{length}: largest difference {largest:.1e}, cosine distance {distance:.1e}")
    return worst


def quantise(args, model, kind: str, out: Path) -> list[str]:
    """Write the int8 model beside the fp32 one; says what it costs, and returns that in lines."""
    target = out.with_name(f"{out.stem}_int8.onnx")
    with replacing(target) as temporary:
        left, layers = quantise_onnx(out, temporary)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB, int8 weights in {layers - left} of {layers} layers")
    exact, coarse = reader(out), reader(target)
    if args.test_list:
        both, trials = (("fp32", exact), ("int8", coarse)), (args.test_list, args.test_path)
        found = [f"{name}: {evaluate(read, model, kind, *trials)}" for name, read in both]
        print("\n".join(found))
        return found
    given = [example(model, kind, seconds, 3)[0] for seconds in SECONDS]
    distance = max(differences(coarse(x), exact(x))[1] for x in given)
    found = [f"cosine of int8 with fp32 embeddings of noise: at least {1 - distance:.4f}"]
    print(found[0])
    print("no EER was measured: give --test_list and --test_path")
    return found


def evaluate(read, model, kind: str, test_list: str, test_path: str) -> str:
    """EER and minDCF with their intervals of an exported model, each file alone, or its speech by the key ``vad``."""
    import numpy as np
    import torch

    from corpus.audio import AudioError, least_samples, read_crop, wrap_pad
    from corpus.speech import joined, kept_spans, no_speech
    from scoring.cosine import cosine_scores
    from scoring.figures import evaluation_metrics
    from scoring.intervals import trial_speakers

    labels, first, second = read_trials(test_list)
    number = {file: i for i, file in enumerate(sorted({*first, *second}))}
    rows, rate = [], model.sample_rate
    for file in number:
        try:
            x = read_crop(Path(test_path, file), channel=model.config.channel, sample_rate=rate).x
        except AudioError as error:
            raise UsageError(f"{Path(test_path, file)}: {error}") from error
        x = joined(x, kept_spans(x, rate, model.vad))
        if not len(x):
            raise UsageError(f"{Path(test_path, file)}: {no_speech(model.vad)}")
        x = torch.from_numpy(wrap_pad(x, least_samples(rate))[None])
        rows.append(read(input_of(model, kind, x))[0].numpy())
    scores = cosine_scores(np.stack(rows), np.array([[number[a], number[b]] for a, b in zip(first, second)]))
    found = evaluation_metrics(scores, labels, speakers=trial_speakers(labels, first, second)[0])
    eer = (
        f"EER {found['eer']:.2f} % (95 % CI over {found['interval']} {found['eer_low']:.2f} to {found['eer_high']:.2f})"
    )
    return f"{eer}  minDCF(0.05) {found['min_dcf_0.05']:.4f}  {found['trials']} trials"


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
