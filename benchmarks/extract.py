"""Time the extraction of embeddings from whole recordings of different lengths, A B A B in one run.

python benchmarks/extract.py
python benchmarks/extract.py --models "ResNet34 n_mels=80,CAMPPlus n_mels=80" --files 100 --seconds 3 8

Each variant lives in a process of its own and embeds all files in its turn:

plain            one file after the other: soundfile, torch's defaults, the same network without gradients
ours             ``SpeakerModel.embed_files``, what embed.py does
ours:bfloat16    the same with --precision bfloat16
ours:onnx        the same with --onnx
ours:onnx+int8   the same with the file that export.py --int8 writes
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from alternate import Variant, compared, serve, take_turns, times_as_fast

ROOT = Path(__file__).resolve().parent.parent
MODELS = "ECAPA_TDNN channels=512 n_mels=80 nOut=192,ResNet34 n_mels=80 nOut=256,CAMPPlus n_mels=80 nOut=512"


def make_recordings(folder: Path, count: int, shortest: float, longest: float) -> list[str]:
    """Write ``count`` recordings of noise whose level varies, of different lengths in seconds; returns their paths."""
    import soundfile

    rng, paths = np.random.default_rng(0), []
    for number, seconds in enumerate(rng.uniform(shortest, longest, count)):
        x = rng.standard_normal(int(16000 * seconds))
        x *= 0.05 + 0.04 * np.sin(np.arange(len(x)) / 900.0)
        paths.append(str(folder / f"{number:05d}.wav"))
        soundfile.write(paths[-1], x, 16000)
    return paths


def model_of(spec: dict):
    """The same model with random weights in every process."""
    from bench_export import build

    name, *keys = spec["model"].split()
    return build({"model": name, **{key: int(value) for key, value in (k.split("=") for k in keys)}})


def plain(spec: dict):
    """One file after the other."""
    import soundfile
    import torch

    network = model_of(spec).network

    def embed():
        rows = []
        with torch.no_grad():
            for path in spec["paths"]:
                x, _ = soundfile.read(path, dtype="float32")
                rows.append(network(torch.from_numpy(x)[None])[0].numpy())
        return kept(spec, np.stack(rows))

    return embed


def ours(spec: dict):
    """What embed.py does with its flags."""
    from training.allocator import keep_freed_memory

    keep_freed_memory()
    model = model_of(spec)
    if "bfloat16" in spec["keys"]:
        model.compute_in_bfloat16()
    if "onnx" in spec["keys"]:
        model.compute_by_onnx(spec["int8" if "int8" in spec["keys"] else "onnx"])
    return lambda: kept(spec, model.embed_files(spec["paths"], workers=spec["workers"])[0])


def kept(spec: dict, rows) -> str:
    """Keep embeddings for a comparison; returns their file."""
    path = Path(spec["folder"], f"{spec['name'].replace(':', '_')}.npy")
    np.save(path, rows)
    return str(path)


def make_work(spec: dict):
    """The work of a variant."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    return globals()[spec["variant"]](spec)


def lowest_cosine(a, b) -> float:
    """The lowest cosine of the rows of two files of embeddings."""
    a, b = (np.load(path).astype(np.float64) for path in (a, b))
    return float((np.einsum("nd,nd->n", a, b) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())


def measure(model: str, args, folder: Path, paths: list[str]) -> list[dict]:
    """Time all variants of a model, round after round."""
    spec = {"model": model, "folder": str(folder), "paths": paths, "workers": args.workers}
    names = args.variants.split(",")
    if any("onnx" in name for name in names):
        from exporting import formats, forms

        exported, network = folder / "model.onnx", model_of(spec)
        formats.write(forms.exportable(network, "waveform"), network, "waveform", exported)
        spec["onnx"], spec["int8"] = str(exported), str(folder / "model_int8.onnx")
        if any("int8" in name for name in names):
            from exporting.eight_bits import quantise_onnx

            quantise_onnx(exported, Path(spec["int8"]))
    variants = [Variant(name, spec, __file__) for name in names]
    take_turns(variants, args.rounds, 1, warm=1)
    found = [compared(variant, variants[0]) for variant in variants]
    return [{**each, "model": model, "cosine": lowest_cosine(found[0]["value"], each["value"])} for each in found]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", default=MODELS, help=f"models with their keys, comma-separated (default {MODELS})")
    variants = "plain,ours,ours:bfloat16,ours:onnx"
    parser.add_argument("--variants", default=variants, help=f"comma-separated, see above (default {variants})")
    parser.add_argument("--files", type=int, default=40, help="recordings (default 40)")
    parser.add_argument("--seconds", type=float, nargs=2, default=(3.0, 8.0), help="shortest and longest (default 3 8)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read, of ours (default 0)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    if args.worker:
        spec = json.loads(args.worker)
        serve(lambda: make_work(spec))
        return 0
    import torch
    from bench_training import machine

    named = machine(torch.device("cpu"))
    print(f"{named}, {args.files} recordings of {args.seconds[0]:g} to {args.seconds[1]:g} s, {args.rounds} rounds")
    print("| model | variant | files/s | times as fast as the first | lowest cosine with it | GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        paths = make_recordings(Path(folder), args.files, *args.seconds)
        for model in args.models.split(","):
            for each in measure(model, args, Path(folder), paths):
                row = f"{args.files / each['seconds']:.1f} | {times_as_fast(each)} | {each['cosine']:.6f}"
                print(f"| {model} | {each['variant']} | {row} | {each['memory_gb']:.2f} |", flush=True)
                results.append(each)
    if args.json:
        content = {"machine": named, "command": sys.argv[1:], "results": results}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
