"""Error and speed of exported models: PyTorch, ONNX and int8 ONNX in turn, in one run.

python benchmarks/bench_export.py                                  # ResNet34, ECAPA-TDNN 1024 and CAM++, random weights
python benchmarks/bench_export.py --rounds 10 --seconds 2 10
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from settings.command_line import Parser, run

MODELS = {
    "ResNet34": {"model": "ResNet34", "n_mels": 80, "nOut": 256},
    "ECAPA-TDNN 1024": {"model": "ECAPA_TDNN", "channels": 1024, "n_mels": 80, "nOut": 192},
    "CAM++": {"model": "CAMPPlus", "n_mels": 80, "nOut": 512},
}


def build(keys: dict):
    """A full-size model with random weights, as speaker_model gives one."""
    import torch

    from settings.reader import Setting, resolve
    from speaker_model import SpeakerModel
    from SpeakerNet import SpeakerNet

    torch.manual_seed(0)
    config = resolve({name: Setting(value, "here") for name, value in {**keys, "eval": True}.items()}, [])
    return SpeakerModel(SpeakerNet(config.values()), config, torch.device("cpu"), "random")


def timed(call, given) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call(given)
    return time.perf_counter() - start


def main(argv) -> int:
    """Print a table."""
    parser = Parser("benchmarks/bench_export.py", __doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, nargs="+", default=[2.0, 10.0], help="utterance lengths (default 2 10)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds of PyTorch, ONNX, int8 (default 5)")
    args = parser.parse_args(argv)
    import torch

    import export
    from exporting import eight_bits, formats, forms

    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the start; one utterance at a time,")
    print("median of ms per utterance, and the ratio of PyTorch's time to that of the other (least, largest of pairs)")
    print("| model | s | PyTorch | ONNX | ratio | int8 | ratio | largest difference | int8 cosine |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name, keys in MODELS.items():
        model = build(keys)
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")]
            formats.write(forms.exportable(model, "waveform"), model, "waveform", paths[0])
            eight_bits.quantise_onnx(*paths)
            exact, coarse = (formats.reader(path) for path in paths)
            for seconds in args.seconds:
                given, expected = forms.example(model, "waveform", seconds, 1)
                calls = (model.embed_batch, exact, coarse)
                error = export.differences(exact(given), expected)[0]
                cosine = 1 - export.differences(coarse(given), expected)[1]
                times = [[timed(call, given) for call in calls] for _ in range(args.rounds + 1)][1:]
                print(row(name, seconds, times, error, cosine), flush=True)
    return 0


def row(name: str, seconds: float, times, error: float, cosine: float) -> str:
    """A line of the table."""
    medians = [1000 * statistics.median(column) for column in zip(*times)]
    cells = [name, f"{seconds:g}", f"{medians[0]:.1f}"]
    for index in (1, 2):
        pairs = [t[0] / t[index] for t in times]
        cells += [f"{medians[index]:.1f}", f"{statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})"]
    return f"| {' | '.join([*cells, f'{error:.1e}', f'{cosine:.4f}'])} |"


if __name__ == "__main__":
    sys.exit(run(main))
