"""Variants of one piece of work that take turns, A B A B, each in a process of its own that waits for its turn."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


class Variant:
    """A process of ``script`` that repeats a piece of work when it is asked to."""

    def __init__(self, name: str, spec: dict, script: str):
        self.name, self.rounds, self.value, self.memory, self.first = name, [], None, 0.0, 0.0
        kind, _, keys = name.partition(":")
        spec = {**spec, "variant": kind, "keys": [key for key in keys.split("+") if key], "name": name}
        command = [sys.executable, str(Path(script).resolve()), "--worker", json.dumps(spec)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def take(self, times: int) -> list[float]:
        """Do the work so many times and return the seconds of each; RuntimeError if the process has ended."""
        print(times, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"variant {self.name} failed; its error stands above")
        answer = json.loads(line)
        self.value, self.memory = answer["value"], answer["memory_gb"]
        return answer["seconds"]

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def serve(make_work):
    """Be the process of a variant: for each line on stdin do ``make_work()`` so often, and answer with the seconds.

    What the work returns last goes back as ``value``; what it prints goes to stderr.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    work, value = make_work(), None
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            begin = time.perf_counter()
            value = work()
            seconds.append(time.perf_counter() - begin)
        print(json.dumps({"seconds": seconds, "value": value, "memory_gb": peak_memory()}), file=answers, flush=True)


def peak_memory() -> float:
    """Largest resident memory of this process in GB.

    From Linux's own file: what getrusage says there begins with the memory of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


def take_turns(variants: list[Variant], rounds: int, times: int, warm: int):
    """Let each variant warm up, then measure all of them round after round: medians in ``rounds``; ends them."""
    for variant in variants:
        variant.first = sum(variant.take(warm))
    for _ in range(rounds):
        for variant in variants:
            variant.rounds.append(float(np.median(variant.take(times))))
    for variant in variants:
        variant.close()


def compared(variant: Variant, first: Variant) -> dict:
    """Seconds of a variant, and how many times as fast as the first it is: median, lowest and highest of the rounds."""
    ratios = [other / own for other, own in zip(first.rounds, variant.rounds)]
    found = {"variant": variant.name, "seconds": float(np.median(variant.rounds)), "rounds": variant.rounds}
    found |= {"ratio": float(np.median(ratios)), "lowest": min(ratios), "highest": max(ratios)}
    return {**found, "warm_up": variant.first, "memory_gb": variant.memory, "value": variant.value}


def times_as_fast(found: dict) -> str:
    """A cell of a table: ratio and its range."""
    return f"{found['ratio']:.2f} ({found['lowest']:.2f} to {found['highest']:.2f})"
