"""Measure scoring against the field's habits, in alternating order (A B A B) in one run, on random embeddings.

OMP_NUM_THREADS=2 python benchmarks/scoring.py            # 137,924 embeddings, 552,536 trials, a cohort of 5,994
python benchmarks/scoring.py --small                      # a hundredth of that, in seconds

Every ratio is the median of the rounds' ratios, beside the smallest and the largest. The results of both ways are
compared before anything is timed.
"""

import argparse
import os
import sys
import threading
import time
from operator import itemgetter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before this folder, whose scoring.py this is

EMBEDDINGS, DIMENSION, TRIALS, COHORT, TOP_N = 137_924, 192, 552_536, 5_994, 300
LOOPED_TRIALS = 20_000
P_TARGET, C_MISS, C_FA = 0.05, 1, 1


def alternate(rounds: int, ways: dict) -> dict:
    """Seconds of each way, {name: [seconds of each round]}; the ways take turns, after one round that warms up."""
    seconds = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def row(name: str, ratios, wanted: str, detail: str) -> str:
    """A line of the table."""
    ratios = np.asarray(ratios)
    spread = f"{np.median(ratios):8.2f}   ({ratios.min():.2f} to {ratios.max():.2f})"
    return f"{name:<58} {spread:<28} {wanted:<12} {detail}"


def one_call_per_trial(x, pairs) -> list:
    """The field's habit: one similarity call per trial in a Python loop."""
    import torch
    import torch.nn.functional as F

    x = torch.from_numpy(x)
    return [F.cosine_similarity(x[a], x[b], dim=0).item() for a, b in pairs.tolist()]


def three_functions(scores, labels):
    """voxceleb_trainer's way: roc_curve, then sorted Python lists walked for the error rates and for minDCF."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(labels, scores, pos_label=1)
    crossing = np.nanargmin(np.absolute(1 - tpr - fpr))
    eer = 100 * max(fpr[crossing], 1 - tpr[crossing])
    order, thresholds = zip(*sorted(enumerate(scores), key=itemgetter(1)))
    sorted_labels = [labels[i] for i in order]
    misses, passes = [], []
    for i, label in enumerate(sorted_labels):
        misses.append((misses[-1] if i else 0) + label)
        passes.append((passes[-1] if i else 0) + 1 - label)
    targets = sum(labels)
    nontargets = len(labels) - targets
    miss_rates = [m / float(targets) for m in misses]
    alarm_rates = [1 - p / float(nontargets) for p in passes]
    best, threshold = float("inf"), thresholds[0]
    for i in range(len(miss_rates)):
        cost = C_MISS * miss_rates[i] * P_TARGET + C_FA * alarm_rates[i] * (1 - P_TARGET)
        if cost < best:
            best, threshold = cost, thresholds[i]
    return eer, best / min(C_MISS * P_TARGET, C_FA * (1 - P_TARGET)), threshold


def all_figures(scores, labels):
    """EER, minDCF, actDCF and Cllr, from the scores sorted once."""
    from scoring.error_rates import ErrorRates

    rates = ErrorRates.of(scores, labels)
    costs = (P_TARGET, C_MISS, C_FA)
    return 100 * rates.eer()[0], rates.min_dcf(*costs)[0], rates.act_dcf(*costs), rates.cllr()


class PeakMemory:
    """The largest resident set of this process within a ``with`` block beyond that before it, in MB (Linux)."""

    def _resident(self):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def _watch(self):
        while not self.stop.wait(0.002):
            self.peak = max(self.peak, self._resident())

    def __enter__(self):
        self.before = self.peak = self._resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.megabytes = max(self.peak, self._resident()) - self.before


def cosine_rows(x, pairs, rounds: int):
    """Cosine trials against the loop and against gathering the rows."""
    from scoring.cosine import cosine_scores

    looped = pairs[:LOOPED_TRIALS]
    assert np.allclose(cosine_scores(x, looped[:500]), one_call_per_trial(x, looped[:500]), atol=1e-5)
    left, right = (np.ascontiguousarray(pairs[:, side]) for side in (0, 1))
    buffers = [np.empty((len(pairs), x.shape[1]), x.dtype) for _ in range(2)]

    def gather_again():
        np.take(x, left, axis=0, out=buffers[0], mode="clip")
        np.take(x, right, axis=0, out=buffers[1], mode="clip")

    ways = {
        "cosine": lambda: cosine_scores(x, pairs),
        "loop": lambda: one_call_per_trial(x, looped),
        "gather": lambda: (x[pairs[:, 0]], x[pairs[:, 1]]),
        "gather_again": gather_again,
    }
    s = {name: np.array(values) for name, values in alternate(rounds, ways).items()}
    loop = s["loop"] * len(pairs) / len(looped)
    took = f"{np.median(s['cosine']):.3f} s"
    yield row(
        "one call per trial in a loop / cosine_scores",
        loop / s["cosine"],
        "at least 50",
        f"{np.median(loop):.1f} s ({len(looped):,} trials timed, scaled to {len(pairs):,}) / {took}",
    )
    gathers = {"x[pairs[:, 0]], x[pairs[:, 1]]": "gather", "the same into memory that is there": "gather_again"}
    for name, key in gathers.items():
        detail = f"{took} / {np.median(s[key]):.3f} s"
        yield row(f"cosine_scores / {name}", s["cosine"] / s[key], "at most 1.5" if key == "gather" else "", detail)


def metric_rows(trials: int, rng, rounds: int):
    """All figures against the three functions."""
    labels = (rng.random(trials) < 0.5).astype(np.int64)
    scores = rng.normal(labels * 3.0 - 1.5, 1.0)
    ours, theirs = all_figures(scores, labels), three_functions(scores, labels)
    assert abs(ours[0] - theirs[0]) < 0.1 and abs(ours[1] - theirs[1]) < 1e-9
    ways = {"three": lambda: three_functions(scores, labels), "ours": lambda: all_figures(scores, labels)}
    s = {name: np.array(values) for name, values in alternate(rounds, ways).items()}
    detail = f"{np.median(s['three']):.2f} s / {np.median(s['ours']):.3f} s"
    name = "voxceleb_trainer's way / EER + minDCF + actDCF + Cllr"
    yield row(name, s["three"] / s["ours"], "at least 20", detail)


def cohort_rows(x, cohort, top_n: int, rounds: int):
    """AS-norm statistics against the bare matrix product."""
    from scoring.normalization import cohort_statistics

    expected = np.sort(x[:200] @ cohort.T, axis=1)[:, -top_n:].astype(np.float64)
    mean, deviation = cohort_statistics(x[:200], cohort, top_n)
    assert np.allclose(mean, expected.mean(axis=1)) and np.allclose(deviation, expected.std(axis=1))
    with PeakMemory() as memory:
        cohort_statistics(x, cohort, top_n)
    out = np.empty((4096, len(cohort)), np.float32)

    def bare():
        for begin in range(0, len(x), len(out)):
            part = x[begin : begin + len(out)]
            np.matmul(part, cohort.T, out=out[: len(part)])

    ways = {"bare": bare, "statistics": lambda: cohort_statistics(x, cohort, top_n)}
    s = {name: np.array(values) for name, values in alternate(rounds, ways).items()}
    detail = f"{np.median(s['bare']):.2f} s / {np.median(s['statistics']):.2f} s; peak memory {memory.megabytes:.0f} MB"
    name = f"bare matrix product / AS-norm, top {top_n} of {len(cohort):,}"
    yield row(name, s["bare"] / s["statistics"], "at least .35", detail)


def machine() -> str:
    """The machine in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    return f"{model[0] if model else 'CPU'}, {cores} cores, load {os.getloadavg()[0]:.1f}, numpy {np.__version__}"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of A B (default 5)")
    parser.add_argument("--small", action="store_true", help="a hundredth of the sizes, to see that it runs")
    args = parser.parse_args()
    share = 100 if args.small else 1
    rng = np.random.default_rng(0)
    x = rng.standard_normal((EMBEDDINGS // share, DIMENSION), dtype=np.float32)
    cohort = rng.standard_normal((max(COHORT // share, 59), DIMENSION), dtype=np.float32)
    pairs = rng.integers(0, len(x), (TRIALS // share, 2))
    print(machine())
    print(f"{len(x):,} embeddings of {DIMENSION} dimensions, {len(pairs):,} trials, {args.rounds} rounds")
    print(f"{'ratio':<58} {'median   (range)':<28} {'wanted':<12} medians of the seconds", flush=True)
    from scoring.cosine import length_normalize

    top_n = max(TOP_N // share, 3)
    parts = (
        lambda: cosine_rows(x, pairs, args.rounds),
        lambda: metric_rows(len(pairs), rng, args.rounds),
        lambda: cohort_rows(length_normalize(x), length_normalize(cohort), top_n, args.rounds),
    )
    for part in parts:
        for line in part():
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
