"""Measure training steps a second and loader utterances a second of a configuration.

python benchmarks/bench_training.py --config configs/demo.yaml
python benchmarks/bench_training.py --config configs/demo.yaml --compare mixedprec=false mixedprec=true

With --compare the two settings are measured A B A B .. in one run, and the ratio of their median step times is
printed with the lowest and highest ratio of a pair. Other words go to trainSpeakerNet.py's configuration reader.
"""

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from corpus.loader import make_loader
from DatasetLoader import SpeakerBatchSampler, TrainDataset, collate
from settings.checks import check_paths
from settings.reader import load_config
from SpeakerNet import ModelTrainer
from training.allocator import keep_freed_memory
from training.precision import choose_kernels
from training.ranks import Ranks
from training.run_files import RunFiles


class NoTrials:
    """Stands for the evaluator, which is not measured."""

    labels, loader = (), None


def build(words, folder):
    """Build a trainer as trainSpeakerNet.py does, writing into ``folder``."""
    config, written, _, _ = load_config([*words, "--save_path", folder])
    check_paths(config, written)
    keep_freed_memory()
    choose_kernels(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    ranks = Ranks(config)
    dataset = TrainDataset(config)
    sampler = SpeakerBatchSampler(dataset, config, config.nPerSpeaker > 1)
    trainer = ModelTrainer(config, ranks, dataset, sampler, NoTrials(), RunFiles(config, True))
    trainer.network.train()
    return trainer


def time_steps(trainer, batches, device) -> np.ndarray:
    """Seconds of each training step on batches already in memory."""
    seconds = []
    for batch in batches:
        begin = time.perf_counter()
        trainer.train_step([batch])
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return np.array(seconds)


def time_loader(trainer, workers: int) -> float:
    """Utterances a second that the loader delivers when nothing else is computed."""
    trainer.sampler.set_position(1)
    loader = make_loader(trainer.dataset, trainer.sampler, collate, trainer.config, workers)
    count, begin = 0, None
    for batch in loader:
        if begin is None:  # the first batch pays for starting the workers
            begin = time.perf_counter()
            continue
        count += batch["data"].shape[0] * batch["data"].shape[1]
    return count / (time.perf_counter() - begin) if count else float("nan")


def machine(device) -> str:
    """Name the machine."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = f"{len(names)} x {names[0]}" if names else processor
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{processor}{gpu}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=10, help="steps in a round (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--compare", nargs=2, metavar="KEY=VALUE", help="two settings to measure A B A B")
    args, words = parser.parse_known_args()
    variants = [[f"--{setting}"] for setting in args.compare] if args.compare else [[]]
    with tempfile.TemporaryDirectory() as folder:
        trainers = [build(words + extra, f"{folder}/{i}") for i, extra in enumerate(variants)]
        device = trainers[0].device
        print(machine(device))
        for workers in sorted({0, trainers[0].config.nDataLoaderThread}):
            print(f"loader, {workers} worker(s): {time_loader(trainers[0], workers):.0f} utterances/s")
        trainers[0].sampler.set_position(1)
        batches = []
        for batch in trainers[0].loader:
            batches.append(batch)
            if len(batches) == args.steps:
                break
        for trainer in trainers:
            time_steps(trainer, batches[:2], device)  # warm-up
        seconds = [[] for _ in trainers]
        for _ in range(args.rounds):
            for trainer, seen in zip(trainers, seconds):
                seen.append(time_steps(trainer, batches, device))
        rows = batches[0]["data"].shape[0] * batches[0]["data"].shape[1]
        for extra, seen in zip(variants, seconds):
            median = float(np.median(np.concatenate(seen)))
            name = " ".join(extra) or "training"
            print(f"{name}: {1 / median:.2f} steps/s, {rows / median:.0f} utterances/s ({rows} a step)")
        if args.compare:
            ratios = [np.median(b) / np.median(a) for a, b in zip(*seconds)]
            print(f"time of B over A: {np.median(ratios):.3f} (pairs {min(ratios):.3f} to {max(ratios):.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
