"""Measure training steps a second and loader utterances a second of a configuration.

python benchmarks/bench_training.py --config configs/demo.yaml
python benchmarks/bench_training.py --config configs/demo.yaml --compare mixedprec=false mixedprec=true

With --compare the two settings are measured A B A B .. in one run, each on batches of its own, and the ratio of their
median times of an utterance is printed with the lowest and highest ratio of a pair. Other words go to
trainSpeakerNet.py's configuration reader. A step has as many batches as gradient_accumulation_steps says.
"""

import argparse
import itertools
import platform
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from corpus.loader import make_loader, usable_cores
from DatasetLoader import SpeakerBatchSampler, TrainDataset, collate
from settings.checks import check_paths
from settings.reader import load_config
from SpeakerNet import ModelTrainer
from training.allocator import keep_freed_memory
from training.compilation import compile_model
from training.precision import choose_kernels
from training.ranks import Ranks
from training.run_files import RunFiles

THREADS = torch.get_num_threads()


class NoTrials:
    """Stands for the evaluator, which is not measured."""

    labels, loader = (), None


def build(words, folder):
    """Build a trainer as trainSpeakerNet.py does, writing into ``folder``."""
    config, written, _, _ = load_config([*words, "--save_path", folder])
    check_paths(config, written)
    keep_freed_memory()
    set_process(config)
    ranks = Ranks(config)
    dataset = TrainDataset(config)
    sampler = SpeakerBatchSampler(dataset, config, config.nPerSpeaker > 1)
    trainer = ModelTrainer(config, ranks, dataset, sampler, NoTrials(), RunFiles(config, True))
    compile_model(trainer.step, config, trainer.log, trainer.backbone)
    trainer.enter_epoch()
    return trainer


def set_process(config):
    """Set what holds for the whole process as a configuration says: threads, kernels, precision of products."""
    choose_kernels(config)
    torch.set_num_threads(config.threads or THREADS)


def windows_of(trainer, steps: int) -> list[list[dict]]:
    """The windows of batches of the first steps of an epoch, in memory."""
    trainer.sampler.set_position(1)
    size = trainer.config.gradient_accumulation_steps
    batches = list(itertools.islice(trainer.loader, steps * size))
    return [batches[first : first + size] for first in range(0, len(batches), size)]


def rows_of(window: list[dict]) -> int:
    """Utterances of a step."""
    return sum(batch["label"].shape[0] * batch["data"].shape[0] for batch in window)


def time_steps(trainer, windows) -> np.ndarray:
    """Seconds of each training step on windows of batches already in memory."""
    seconds = []
    for window in windows:
        begin = time.perf_counter()
        trainer.train_step(window)
        if trainer.device.type == "cuda":
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


def compare(trainers, steps: int, rounds: int) -> list[tuple[int, list[np.ndarray]]]:
    """(utterances of a step, seconds of the steps of each round) of each trainer, which take turns."""
    windows = [windows_of(trainer, steps) for trainer in trainers]
    seconds: list[list[np.ndarray]] = [[] for _ in trainers]
    for number in range(rounds + 1):
        for trainer, own, seen in zip(trainers, windows, seconds):
            set_process(trainer.config)
            took = time_steps(trainer, own if number else own[:2])
            if number:  # the first round warms up
                seen.append(took)
    return [(rows_of(own[0]), seen) for own, seen in zip(windows, seconds)]


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
        names = [" ".join(extra) or "training" for extra in variants]
        print(machine(trainers[0].device))
        for name, trainer in zip(names, trainers):
            of = f"{name}: " if args.compare else ""
            for workers in sorted({0, min(trainer.config.nDataLoaderThread, usable_cores())}):
                print(f"{of}loader, {workers} worker(s): {time_loader(trainer, workers):.0f} utterances/s")
        seconds = compare(trainers, args.steps, args.rounds)
        for name, (rows, seen) in zip(names, seconds):
            median = float(np.median(np.concatenate(seen)))
            print(f"{name}: {1 / median:.2f} steps/s, {rows / median:.0f} utterances/s ({rows} a step)")
        if args.compare:
            (rows_a, a), (rows_b, b) = seconds
            ratios = [np.median(y) / rows_b / (np.median(x) / rows_a) for x, y in zip(a, b)]
            print(f"time of B over A: {np.median(ratios):.3f} (pairs {min(ratios):.3f} to {max(ratios):.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
