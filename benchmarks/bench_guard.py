"""Measure what the guard against non-finite steps costs: steps with it and steps without it, A B B A in one run.

python benchmarks/bench_guard.py --config configs/demo.yaml

Without it: no host check, no buffer copy, no norm of buffers, no finite check; the gradient norm stays, for clipping.
Other words go to trainSpeakerNet.py's configuration reader.
"""

import argparse
import sys
import tempfile
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
    with torch.autocast(self.device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
        loss, accuracy = self.parallel(data, label)
    loss.float().backward()
    gradients = [p.grad for p in self.parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    loss, accuracy, norm = torch.stack([loss.detach().float(), accuracy.detach().float(), norm]).tolist()
    if self.config.grad_clip and norm > self.config.grad_clip:
        torch._foreach_mul_(gradients, self.config.grad_clip / norm)
    self.optimizer.step()
    if self.scheduler_unit == "iteration":
        self.scheduler.step()


def main() -> int:
    """Run the benchmark."""
    import time

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps (default 40)")
    args, words = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(words, folder)
        print(machine(trainer.device), trainer.config.model, trainer.amp_dtype or torch.float32)
        bare = types.MethodType(unguarded_step, trainer)
        trainer.sampler.set_position(1)
        batch = next(iter(trainer.loader))
        seconds = {"with": [], "without": []}
        # On a CPU the time that this process computed: what other programs take away does not count.
        clock = time.perf_counter if trainer.device.type == "cuda" else time.process_time
        for number in range(args.steps + 2):
            for name in ("with", "without") if number % 2 else ("without", "with"):  # neither is always the first
                begin = clock()
                if name == "with":
                    trainer.accept(batch)
                    trainer.train_step([batch])
                else:
                    bare([batch])
                if trainer.device.type == "cuda":
                    torch.cuda.synchronize()
                if number >= 2:  # the first pairs warm up
                    seconds[name].append(clock() - begin)
        medians = {name: float(np.median(values)) for name, values in seconds.items()}
        pairs = np.array(seconds["with"]) / np.array(seconds["without"])
        draws = np.random.default_rng(0).choice(pairs, (2000, len(pairs)))
        low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
        kilobytes = sum(b.numel() * b.element_size() for b in trainer.network.buffers()) / 1e3
        print(f"median step {1e3 * medians['with']:.1f} ms with, {1e3 * medians['without']:.1f} ms without the guard")
        print(f"median ratio of a pair {np.median(pairs):.4f} (95 % CI {low:.4f} to {high:.4f})")
        print(f"memory: {kilobytes:.0f} kB, a copy of the buffers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
