"""Measure what the guard against non-finite steps costs: three kinds of steps in turn, in one run.

python benchmarks/bench_guard.py --config configs/demo.yaml

With the guard; with all of it but the copy of weights and moments and the check of the update; and with none of it:
no host check, no buffer copy, no norm of buffers, no finite check; the gradient norm stays, for clipping.
Other words go to trainSpeakerNet.py's configuration reader.
"""

import argparse
import sys
import tempfile
import time
import types

import numpy as np
import torch
from bench_training import build, machine
from torch import nn


def unguarded_step(self, window):
    """The same step with nothing but forward, backward, norm, clip and step."""
    self.optimizer.zero_grad(set_to_none=True)
    (batch,) = window
    data, label = batch["data"].to(self.device), batch["label"].to(self.device)
    amp_dtype = self.step.amp_dtype
    with torch.autocast(self.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
        loss, accuracy = self.step.parallel(data, label)
    loss.float().backward()
    gradients = [p.grad for p in self.step.parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    loss, accuracy, norm = torch.stack([loss.detach().float(), accuracy.detach().float(), norm]).tolist()
    if self.config.grad_clip and norm > self.config.grad_clip:
        torch._foreach_mul_(gradients, self.config.grad_clip / norm)
    self.optimizer.step()
    if self.scheduler_unit == "iteration":
        self.scheduler.step()


class Trusting:
    """Stands for the guard of the update, and lets every update pass."""

    def take(self):
        """Keep nothing."""

    def spoiled(self, ranks, refused: str = "") -> tuple[dict, str]:
        """Find nothing."""
        return {}, ""


def kinds_of_steps(trainer, batch) -> dict:
    """The three kinds of steps as functions."""
    bare, guard = types.MethodType(unguarded_step, trainer), trainer.step.guard

    def guarded(update_guard):
        trainer.step.guard = update_guard
        trainer.accept(batch)
        trainer.train_step([batch])

    return {
        "with": lambda: guarded(guard),
        "unchecked update": lambda: guarded(Trusting()),
        "without": lambda: bare([batch]),
    }


def timed(step, clock, device) -> float:
    """Seconds of a step."""
    begin = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def ratio(one, other) -> str:
    """The median ratio of pairs with its 95 % interval by bootstrap."""
    pairs = np.array(one) / np.array(other)
    draws = np.random.default_rng(0).choice(pairs, (2000, len(pairs)))
    low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
    return f"{np.median(pairs):.4f} (95 % CI {low:.4f} to {high:.4f})"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=40, help="steps of each kind (default 40)")
    args, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build([*words, "--nan_check=now"], folder)  # whose parts can be timed
        print(machine(trainer.device), trainer.config.model, trainer.step.amp_dtype or torch.float32)
        trainer.sampler.set_position(1)
        guard, steps = trainer.step.guard, kinds_of_steps(trainer, next(iter(trainer.loader)))
        seconds = {name: [] for name in steps}
        # On a CPU the time that this process computed: what other programs take away does not count.
        clock = time.perf_counter if trainer.device.type == "cuda" else time.process_time
        names = list(steps)
        for number in range(args.steps + 2):
            names = names[1:] + names[:1]  # none is always the first
            for name in names:
                took = timed(steps[name], clock, trainer.device)
                if number >= 2:  # the first warm up
                    seconds[name].append(took)
        medians = ", ".join(f"{1e3 * np.median(values):.1f} ms {name}" for name, values in seconds.items())
        print(f"median step: {medians} (the guard)")
        print(f"median ratio, with over without: {ratio(seconds['with'], seconds['without'])}")
        print(f"median ratio, with over unchecked update: {ratio(seconds['with'], seconds['unchecked update'])}")
        takes = np.median([timed(guard.take, clock, trainer.device) for _ in range(20)])
        checks = np.median([timed(guard.spoiled, clock, trainer.device) for _ in range(20)])
        print(f"alone: copy of weights and moments {1e3 * takes:.1f} ms, check of the update {1e3 * checks:.1f} ms")
        kilobytes = sum(b.numel() * b.element_size() for b in trainer.network.buffers()) / 1e3
        megabytes = sum(guard.sizes().values()) / 1e6
        print(f"memory: {kilobytes:.0f} kB of buffers, {megabytes:.1f} MB of weights and moments")
    return 0


if __name__ == "__main__":
    sys.exit(main())
