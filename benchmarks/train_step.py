"""Time training steps of this checkout, of a plain eager loop, and of other toolkits, A B A B in one run.

python benchmarks/train_step.py                                             # the models of RESULTS.md
python benchmarks/train_step.py --models "ECAPA_TDNN channels=512" --rounds 5 --variants plain,ours,ours:mixedprec=true
python benchmarks/train_step.py --models ResNetSE34L --against ../voxceleb_trainer --json steps.json

A step is features, forward pass, loss of 1,211 classes, backward pass and Adam, on 32 rows of 2 s. Each variant lives
in a process of its own with the settings of its own, and waits while another is measured:

plain            the same network in the shortest loop there is: torch's defaults, Adam, no guard, no norm, no clipping
ours             ``train_step`` of the trainer with the guard, and what trainSpeakerNet.py sets for this machine
ours:KEY=VALUE   the same with this key, as ours:mixedprec=true; several are joined by +
against          the network and loss of a checkout that has voxceleb_trainer's shape, in the plain loop
speechbrain      SpeechBrain's ECAPA-TDNN, filter banks and AAM softmax from its package, in the plain loop

The limit is what a product of two matrices of 2,048 rows reaches in this run. Where there is a GPU all variants use it.
"""

import argparse
import contextlib
import importlib
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from alternate import Variant, compared, serve, take_turns, times_as_fast

ROOT = Path(__file__).resolve().parent.parent
MODELS = (
    "ECAPA_TDNN channels=512,ECAPA_TDNN channels=1024,ResNetSE34L,ResNetSE34V2,ResNet34 n_mels=80,CAMPPlus n_mels=80,"
    "ReDimNet n_mels=72"
)
CLASSES, SAMPLES = 1211, 32240  # 2 s, and what the last window of 25 ms reaches over them


# ---------------------------------------------------------------------------------------------- one variant's process


def words_of(model: str, rows: int, data: str) -> list[str]:
    """The configuration of a run, as words of the command line."""
    from bench_postmortem import words_of as words_on_voices

    return [*words_on_voices(model, rows, Path(data)), f"--nClasses={CLASSES}"]


def device():
    """Where all variants compute: a GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_batch(rows: int):
    """Waveforms (1, rows, samples) of noise and labels (rows,), the same in every process, on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(1)
    data = torch.randn(1, rows, SAMPLES, generator=generator) * 0.1
    return data, torch.randint(0, CLASSES, (rows,), generator=generator)


def plain_loop(network, rows: int):
    """The shortest training loop: returns a function that takes a step and returns its loss."""
    import torch

    network.to(device())
    batch = make_batch(rows)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)

    def step():
        optimizer.zero_grad()
        loss = network(*(part.to(device()) for part in batch))[0]
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def plain(spec: dict):
    """The step of a plain loop around this checkout's network."""
    from settings.reader import load_config
    from SpeakerNet import SpeakerNet

    config, *_ = load_config(words_of(spec["model"], spec["rows"], spec["data"]))
    return plain_loop(SpeakerNet(config.values()).train(), spec["rows"])


def ours(spec: dict):
    """The step of this checkout's trainer."""
    from bench_training import build

    words = words_of(spec["model"], spec["rows"], spec["data"])
    words += [f"--{setting}" for setting in spec["keys"]]
    with contextlib.redirect_stdout(sys.stderr):
        trainer = build(words, tempfile.mkdtemp(dir=spec["data"]))
    given = {"batch_size": spec["rows"], "nPerSpeaker": 1, "max_frames": 200, "gradient_accumulation_steps": 1}
    changed = [key for key, value in given.items() if getattr(trainer.config, key) != value]
    if changed:
        raise SystemExit(f"{spec['name']}: all variants train on one batch of noise, so {changed[0]} tells nothing")
    data, label = make_batch(spec["rows"])
    names = [f"row {i}" for i in range(spec["rows"])]
    batch = {"data": data, "label": label, "files": names}

    def step():
        trainer.progress.batch += 1
        done = trainer.train_step([batch])  # on a GPU the step before: this one is still computed
        return done.loss if done is not None else float("nan")

    return step


def against(spec: dict):
    """The step of a plain loop around the network and loss of another checkout of voxceleb_trainer's shape."""
    import torch

    sys.path.insert(0, spec["against"])
    name, *keys = spec["model"].split()
    options = {"nOut": 512, "n_mels": 40, "encoder_type": "SAP", "log_input": True} | dict(k.split("=") for k in keys)
    model = importlib.import_module(f"models.{name}").MainModel(**options)
    loss = importlib.import_module("loss.aamsoftmax").LossFunction(nOut=512, nClasses=CLASSES, margin=0.2, scale=30)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.loss = model, loss

        def forward(self, data, label):
            return self.loss(self.model(data[0]), label)

    return plain_loop(Network().train(), spec["rows"])


def speechbrain(spec: dict):
    """The step of a plain loop around SpeechBrain's ECAPA-TDNN with its features and loss."""
    import torch
    from speechbrain.lobes.features import Fbank
    from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN, Classifier
    from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
    from speechbrain.processing.features import InputNormalization

    width = int(dict(k.split("=") for k in spec["model"].split()[1:]).get("channels", 512))

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.features, self.norm = Fbank(n_mels=80), InputNormalization(norm_type="sentence", std_norm=False)
            self.model = ECAPA_TDNN(80, channels=[width] * 4 + [3 * width], lin_neurons=192)
            self.classifier = Classifier(192, out_neurons=CLASSES)
            self.loss = LogSoftmaxWrapper(AdditiveAngularMargin(margin=0.2, scale=30))

        def forward(self, data, label):
            lengths = torch.ones(data.shape[1], device=data.device)
            x = self.model(self.norm(self.features(data[0]), lengths), lengths)
            return (self.loss(self.classifier(x), label.unsqueeze(1)),)

    return plain_loop(Network().train(), spec["rows"])


def limit(spec: dict):
    """A product of two matrices, the most work that this machine does in a second; returns what it takes of it."""
    import torch

    a, b = (torch.randn(2048, 2048, device=device()) for _ in range(2))

    def step():
        return float((a @ b)[0, 0])

    return step


def make_step(spec: dict):
    """The step of a variant."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import torch

    torch.manual_seed(0)
    return globals()[spec["variant"]](spec)


# ---------------------------------------------------------------------------------------------------- all of them


def count_flops(model: str, rows: int, data: str) -> float:
    """Floating-point operations of products and convolutions in one step, forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    from settings.reader import load_config
    from SpeakerNet import SpeakerNet

    config, *_ = load_config(words_of(model, rows, data))
    network, batch = SpeakerNet(config.values()).train(), make_batch(2)
    with FlopCounterMode(display=False) as counter:
        network(*batch)[0].backward()
    return counter.get_total_flops() * rows / 2


def measure(model: str, args, data: str) -> dict:
    """Time all variants of a model, round after round."""
    spec = {"model": model, "rows": args.rows, "data": data, "against": args.against}
    names = [name for name in args.variants.split(",") if name != "speechbrain" or model.startswith("ECAPA_TDNN")]
    names = [*names, *(["against"] if args.against else []), "limit"]
    variants = [Variant(name, spec, __file__) for name in names]
    take_turns(variants, args.rounds, args.steps, warm=3)  # which compiles, and fills the allocator
    flops, limits = count_flops(model, args.rows, data), variants.pop()
    limit_rate = 2 * 2048**3 / np.median(limits.rounds)
    rows = []
    for variant in variants:
        found = compared(variant, variants[0])
        rate = flops / found["seconds"]
        rows.append({**found, "gflops": rate / 1e9, "share": rate / limit_rate})
    return {"model": model, "gflop": flops / 1e9, "limit_gflops": limit_rate / 1e9, "variants": rows}


def table(result: dict, rows: int) -> list[str]:
    """The rows of one model in the table."""
    lines = []
    for v in result["variants"]:
        speed = f"{v['seconds']:.3f} | {rows / v['seconds']:.1f} | {v['gflops']:.0f} | {100 * v['share']:.0f} %"
        lines.append(f"| {result['model']} | {v['variant']} | {speed} | {times_as_fast(v)} | {v['memory_gb']:.2f} |")
    return lines


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", default=MODELS, help=f"models with their keys, comma-separated (default {MODELS})")
    parser.add_argument("--variants", default="plain,ours", help="comma-separated, see above (default plain,ours)")
    parser.add_argument("--against", default="", help="a checkout of voxceleb_trainer's shape to time as well")
    parser.add_argument("--rows", type=int, default=32, help="rows in a batch (default 32)")
    parser.add_argument("--steps", type=int, default=3, help="steps of a variant in a round (default 3)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        spec = json.loads(args.worker)
        serve(lambda: make_step(spec))
        return 0
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from bench_postmortem import make_voices
    from bench_training import machine

    named = machine(device())
    print(f"{named}, {args.rows} rows of 2 s, {args.rounds} rounds of {args.steps} steps")
    print("| model | variant | step s | utterances/s | GFLOP/s | of the limit | times as fast as the first | GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    results = []
    with tempfile.TemporaryDirectory() as data:
        with contextlib.redirect_stdout(io.StringIO()):
            make_voices(Path(data))
        for model in args.models.split(","):
            results.append(measure(model, args, data))
            print("\n".join(table(results[-1], args.rows)), flush=True)
    if args.json:
        content = {"machine": named, "command": sys.argv[1:], "rows": args.rows, "models": results}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
