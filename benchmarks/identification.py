"""How often a stranger gets a name among 1 to 1,000 enrolled speakers: by one comparison's threshold, by probability.

python benchmarks/identification.py                                     # simulated, with exact likelihood ratios
python benchmarks/identification.py --embeddings e.npz --speakers list  # of a model: lines 'speaker name'

Of a model's embeddings half of the speakers teach the calibration; of the others some are enrolled by one recording,
and all of their further recordings are tests, in --turns random divisions. Half of the tests count as strangers.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from scoring.calibration import LogisticCalibration
from scoring.cosine import length_normalize
from scoring.identification import NAMED, speaker_posterior
from storage.embedding_files import read_embeddings

HEAD = "| enrolled | strangers named by a threshold | by probability | own name found | wrong of named | promised |"


def simulated(enrolled: int, strangers: bool, trials: int, rng, dimension=16, within=0.25):
    """Exact log-likelihood ratios (trials, enrolled) of recordings of speaker 0, or of strangers.

    A recording is its speaker's mean, of unit variance, plus noise of variance ``within``; one of each is enrolled.
    """
    speakers = rng.standard_normal((trials, enrolled, dimension))
    heard = speakers + math.sqrt(within) * rng.standard_normal(speakers.shape)
    who = rng.standard_normal((trials, dimension)) if strangers else speakers[:, 0]
    test = who + math.sqrt(within) * rng.standard_normal(who.shape)
    shrink = 1 / (1 + within)  # of the mean of a speaker, given one recording
    spread, alone = shrink * within + within, 1 + within

    def log_density(x, variance):
        return -0.5 * (np.square(x).sum(-1) / variance + dimension * math.log(2 * math.pi * variance))

    return log_density(test[:, None] - shrink * heard, spread) - log_density(test, alone)[:, None]


class Counts:
    """Outcomes of tests of strangers and of enrolled speakers, each kind being half of them."""

    def __init__(self):
        self.tests, self.by_threshold, self.named, self.right = [0, 0], 0.0, [0, 0], 0
        self.weights, self.wrong, self.promised = [], [], []

    def add(self, llrs, owner: int | None):
        """Count a test with its log-likelihood ratios (N,); ``owner``: the place of its speaker, None of a stranger."""
        shares, _ = speaker_posterior(llrs)
        best, stranger = int(shares.argmax()), owner is None
        self.tests[stranger] += 1
        self.by_threshold += stranger and llrs.max() > 0
        if shares[best] > NAMED:
            self.named[stranger] += 1
            self.right += best == owner
            self.weights.append(stranger)
            self.wrong.append(best != owner)
            self.promised.append(1 - shares[best])

    def row(self, enrolled: int) -> str:
        """A line of the table; the interval of what was promised is that of its errors by chance (95 %)."""
        of = np.where(self.weights, 1 / self.tests[1], 1 / max(self.tests[0], 1))
        promised, total = np.array(self.promised), of.sum()
        expected = (of * promised).sum() / total
        spread = 1.96 * math.sqrt((of**2 * promised * (1 - promised)).sum()) / total
        figures = (self.by_threshold / self.tests[1], self.named[1] / self.tests[1], self.right / max(self.tests[0], 1))
        cells = [f"{100 * x:.1f} %" for x in (*figures, (of * np.array(self.wrong)).sum() / total)]
        return f"| {enrolled:,} | {' | '.join(cells)} | {100 * expected:.1f} ± {100 * spread:.1f} % |"


def simulation(enrolled: int, trials: int) -> Counts:
    """Tests with exact likelihood ratios."""
    counts, rng = Counts(), np.random.default_rng(enrolled)
    for strangers in (True, False):
        for _ in range(trials // 100):
            for llrs in simulated(enrolled, strangers, 100, rng):
                counts.add(llrs, None if strangers else 0)
    return counts


def of_a_model(x, speakers, enrolled: int, turns: int) -> Counts:
    """Tests with length-normalised embeddings (N, D) of ``speakers`` (N,): cosines, calibrated on other speakers."""
    counts, rng = Counts(), np.random.default_rng(0)
    everyone = np.unique(speakers)
    for _ in range(turns):
        order = rng.permutation(everyone)
        held_out = np.flatnonzero(np.isin(speakers, order[: len(order) // 2]))
        a, b = np.triu_indices(len(held_out), 1)
        same = speakers[held_out[a]] == speakers[held_out[b]]
        calibration = LogisticCalibration.fit((x[held_out[a]] * x[held_out[b]]).sum(1), same)
        gallery = order[len(order) // 2 :][:enrolled]
        chosen = [rng.choice(np.flatnonzero(speakers == who)) for who in gallery]
        for test in np.flatnonzero(np.isin(speakers, order[len(order) // 2 :])):
            if test not in chosen:
                own = np.flatnonzero(gallery == speakers[test])
                counts.add(calibration.llrs(x[chosen] @ x[test]), int(own[0]) if len(own) else None)
    return counts


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--trials", type=int, default=2000, help="simulated tests of each kind (default 2000)")
    parser.add_argument("--embeddings", default="", help="embeddings of embed.py")
    parser.add_argument("--speakers", default="", help="list 'speaker name' of them")
    parser.add_argument("--turns", type=int, default=20, help="random divisions of the speakers (default 20)")
    args = parser.parse_args()
    print(HEAD, "| --- | --- | --- | --- | --- | --- |", sep="\n")
    if not args.embeddings:
        for enrolled in (1, 10, 100, 1000):
            print(simulation(enrolled, args.trials).row(enrolled), flush=True)
        return 0
    names, x = read_embeddings(args.embeddings)
    lines = Path(args.speakers).read_text(encoding="utf-8").splitlines()
    owner = {name: speaker for speaker, name in (line.split(maxsplit=1) for line in lines)}
    speakers = np.array([owner[name] for name in names])
    half = len(np.unique(speakers)) - len(np.unique(speakers)) // 2
    for enrolled in (n for n in (1, 10, 100, 1000) if n < half):
        print(of_a_model(length_normalize(x), speakers, enrolled, args.turns).row(enrolled), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
