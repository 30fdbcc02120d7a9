"""Measure memory and time of a step of the loss's head: whole on each process, split over them, with a share drawn.

python benchmarks/class_parallel.py --classes 100000 --steps 5
python benchmarks/class_parallel.py --classes 1000000 --steps 2 --variants plain,split,sampled

A step is the trainer's: AAM-softmax of 64 embeddings of 192 values a process, both passes, norm, Adam, and the guard
with its copy of weights and moments. The model is one linear layer. The processes talk over gloo, one thread each.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
from several import outputs_of
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import Config
from loss.aamsoftmax import LossFunction
from training.class_parallel import split_classes
from training.generators import seed_everything
from training.ranks import Ranks
from training.step import Step

SIZE, ROWS = 192, 64
VARIANTS = {  # class_parallel, class_sample_rate
    "plain": (False, 1.0),
    "split": (True, 1.0),
    "sampled": (True, 0.1),
    "sampled-whole": (False, 0.1),
}


class Network(nn.Module):
    """A linear layer in the place of a model, and the loss."""

    def __init__(self, classes: int, rate: float):
        super().__init__()
        self.__S__ = nn.Linear(SIZE, SIZE)
        self.__L__ = LossFunction(SIZE, classes, margin=0.2, scale=30.0)
        if rate < 1.0:
            self.__L__.sample(rate, 1)

    @property
    def loss(self):
        """The loss."""
        return self.__L__

    def forward(self, data, label):
        return self.__L__(self.__S__(data), label)


def measure(classes: int, variant: str, steps: int) -> dict:
    """Take steps as one process of all; returns the median time in s, the peak memory in GB and the losses."""
    torch.set_num_threads(1)
    parallel, rate = VARIANTS[variant]
    config = Config(device="cpu", class_parallel=parallel, class_sample_rate=rate, batch_size=ROWS)
    ranks = Ranks(config)
    seed_everything(1)
    network = Network(classes, rate)
    split_classes(network, config, ranks, lambda text: None)
    step = Step(network, ranks, None, torch.optim.Adam(network.parameters(), lr=1e-3, fused=True), 5.0)
    if ranks.world > 1:
        step.parallel = nn.parallel.DistributedDataParallel(network)
    generator = torch.Generator().manual_seed(ranks.rank)
    times, losses = [], []
    for _ in range(steps + 1):  # the first makes the moments
        batch = {
            "data": torch.randn(ROWS, SIZE, generator=generator),
            "label": torch.randint(classes, (ROWS,), generator=generator),
        }
        begin = time.perf_counter()
        losses.append(step.take([batch]).loss)
        times.append(time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    ranks.close()
    return {"seconds": statistics.median(times[1:]), "peak": peak, "losses": losses}


def run(classes: int, variant: str, steps: int, processes: int) -> list[dict]:
    """Measure a variant in processes of its own."""
    words = ["--classes", str(classes), "--variants", variant, "--steps", str(steps), "--measure"]
    return [json.loads(text.splitlines()[-1]) for text in outputs_of([sys.executable, __file__, *words], processes)]


def main():
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, nargs="+", default=[100_000])
    parser.add_argument("--variants", default="plain,split,sampled", help=", ".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.classes[0], given.variants, given.steps)))
        return
    print("| classes | variant | processes | step s | peak GB of a process | mean loss of the last step |")
    print("| --- | --- | --- | --- | --- | --- |")
    for classes in given.classes:
        for variant in given.variants.split(","):
            found = run(classes, variant, given.steps, given.processes)
            seconds, peak = max(f["seconds"] for f in found), max(f["peak"] for f in found)
            loss = statistics.mean(f["losses"][-1] for f in found)
            print(
                f"| {classes:,} | {variant} | {given.processes} | {seconds:.2f} | {peak:.2f} | {loss:.4f} |", flush=True
            )


if __name__ == "__main__":
    main()
