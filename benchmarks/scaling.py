"""Steps a second with one process and with several, and what the exchange between GPUs costs on paper.

python benchmarks/scaling.py                                          # one and two processes of one thread each
python benchmarks/scaling.py --models ResNet34 --worlds 1,2,4 --keys sync_batchnorm=true
python benchmarks/scaling.py --paper                                  # the table for 8 to 64 GPUs; nothing is run

Each process takes steps of the trainer on its own rows of 2 s, with the exchange of flags that the loop makes for each
batch. With as many cores as processes the efficiency is 1 where the exchange costs nothing; the memory of a machine is
shared by its cores, so that two processes without any exchange ("apart") are measured beside them. "kept" are weights
and moments of a process, of which the guard has a copy, "peak" is all of its memory, "sent" what it sends in a step.
"""

import argparse
import contextlib
import io
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from several import outputs_of
from train_step import ROOT, make_batch, words_of

BYTES_SENT = re.compile(r"bytes_sent:(\d+)")
CLASSES_BYTES = 4 * 256 * 5994  # the head of VoxCeleb2-dev over embeddings of 256 values
WORLDS = (8, 16, 32, 64)
# Seconds of a step of one GPU (128 rows of 2 s, bf16, 80 TFLOP/s reached of an H100's dense 990), parameters.
PAPER = {"ECAPA-TDNN 512": (1.91, 6_190_720), "ResNet34": (9.02, 6_634_336), "ResNet293": (55.10, 28_626_016)}
ROWS, REACHED = 128, 80e12
# Bytes a second between the GPUs of a ring at its narrowest place, and seconds until a message has arrived.
LINKS = {"400 Gbit/s a GPU": (40e9, 15e-6), "100 Gbit/s a machine of 8": (10e9, 25e-6), "10 Gbit/s": (1.1e9, 50e-6)}
BACKWARD = 2 / 3  # share of a step in which gradients are ready bit by bit, so that their exchange is hidden
FLAGS = 3  # small exchanges that nothing hides: of the batch on the host, of the step on the GPU, of signals and saves


def on_paper() -> list[str]:
    """Rows of the table of efficiencies that are expected."""
    lines = ["| model | step of one GPU | gradients | link | " + " | ".join(f"{n} GPUs" for n in WORLDS) + " |"]
    lines.append("|" + " --- |" * (4 + len(WORLDS)))
    for model, (gflop, parameters) in PAPER.items():
        step = 3e9 * gflop * ROWS / REACHED
        size = 4 * parameters + CLASSES_BYTES
        for link, (speed, delay) in LINKS.items():
            shares = [f"{100 * step / expected(step, size, speed, delay, world):.0f} %" for world in WORLDS]
            lines.append(f"| {model} | {1000 * step:.0f} ms | {size / 1e6:.0f} MB | {link} | {' | '.join(shares)} |")
    return lines


def expected(step: float, size: int, speed: float, delay: float, world: int) -> float:
    """Seconds of a step of ``world`` GPUs: a ring's all-reduce beside the backward pass, small exchanges behind it."""
    ring = 2 * (world - 1) / world * size / speed + 2 * (world - 1) * delay
    small = FLAGS * 2 * (world - 1).bit_length() * delay
    return step + max(0.0, ring - BACKWARD * step) + small


# ------------------------------------------------------------------------------------------------------ measured


def take_steps(spec: dict) -> dict:
    """Median seconds of a step of this process, MB of the weights and moments that it keeps, and of its peak."""
    from bench_training import build

    words = [*words_of(spec["model"], spec["rows"], spec["data"]), "--threads", "1", "--device", "cpu"]
    words += [f"--{key}" for key in spec["keys"]]
    with contextlib.redirect_stdout(sys.stderr):
        trainer = build(words, tempfile.mkdtemp(dir=spec["data"]))
    data, label = make_batch(spec["rows"])
    data = data[..., : spec["samples"]]
    batch = {"data": data, "label": label, "files": [f"row {i}" for i in range(spec["rows"])]}
    seconds, sent = [], sent_bytes()
    for _ in range(spec["steps"] + 2):
        begin = time.perf_counter()
        trainer.ranks.each([0, spec["rows"]])
        trainer.progress.batch += 1
        trainer.train_step([batch])
        trainer.ranks.highest_of([0, 0, 0])
        seconds.append(time.perf_counter() - begin)
    sent = (sent_bytes() - sent) / 1e6 / (spec["steps"] + 2)
    trainer.ranks.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {
        "seconds": statistics.median(seconds[2:]),
        "kept": trainer.step.guard.size / 1e6,
        "peak": peak,
        "sent": sent,
    }


def sent_bytes() -> float:
    """What this process has sent over its open TCP connections, as ss of iproute2 counts; NaN without it."""
    try:
        lines = subprocess.run(["ss", "-tinHp"], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return math.nan
    told = [counts for head, counts in zip(lines[::2], lines[1::2]) if f"pid={os.getpid()}," in head]
    return float(sum(int(found.group(1)) for found in map(BYTES_SENT.search, told) if found))


def measure(spec: dict, world: int, together: bool) -> dict:
    """The largest figures of ``world`` processes, which exchange or are apart."""
    outputs = outputs_of([sys.executable, __file__, "--worker", json.dumps(spec)], world, together)
    found = [json.loads(text.splitlines()[-1]) for text in outputs]
    return {key: max(each[key] for each in found) for key in found[0]}


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    models = "ECAPA_TDNN channels=512,ResNet34 n_mels=80"
    parser.add_argument("--models", default=models, help=f"models with their keys, comma-separated (default {models})")
    parser.add_argument("--worlds", default="1,2", help="numbers of processes (default 1,2)")
    parser.add_argument("--keys", default="", help="comma-separated keys of the run, as ddp_compress=bf16")
    parser.add_argument("--rows", type=int, default=16, help="rows of one process (default 16)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of a row (default 2)")
    parser.add_argument("--steps", type=int, default=8, help="steps that count, behind two (default 8)")
    parser.add_argument("--no_apart", action="store_true", help="do not measure processes that exchange nothing")
    parser.add_argument("--paper", action="store_true", help="print what is expected of 8 to 64 GPUs, and run nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    if args.worker:
        print(json.dumps(take_steps(json.loads(args.worker))))
        return 0
    if args.paper:
        print("\n".join(on_paper()))
        return 0
    from bench_postmortem import make_voices

    head = [
        "model",
        "processes",
        "step s",
        "steps/s",
        "utterances/s",
        "efficiency",
        "apart",
        "kept MB",
        "peak MB",
        "sent MB",
    ]
    print(f"| {' | '.join(head)} |\n" + "|" + " --- |" * len(head))
    with tempfile.TemporaryDirectory() as data:
        with contextlib.redirect_stdout(io.StringIO()):
            make_voices(Path(data))
        for model in args.models.split(","):
            keys = list(filter(None, args.keys.split(",")))
            spec = {"model": model, "rows": args.rows, "steps": args.steps, "data": data, "keys": keys}
            spec["samples"] = round(16000 * args.seconds) + 240
            alone = None
            for world in map(int, args.worlds.split(",")):
                found = measure(spec, world, together=True)
                step = found["seconds"]
                apart = measure(spec, world, together=False)["seconds"] if world > 1 and not args.no_apart else step
                alone = alone or step
                cells = [f"{step:.3f}", f"{1 / step:.2f}", f"{world * args.rows / step:.1f}"]
                cells += [f"{100 * alone / step:.0f} %", f"{100 * alone / apart:.0f} %"]
                cells += [f"{found['kept']:.0f}", f"{found['peak']:.0f}", f"{found['sent']:.1f}"]
                print(f"| {model} | {world} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
