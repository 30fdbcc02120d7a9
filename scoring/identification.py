"""Which of many enrolled speakers a recording is of, or nobody: one decision over all, and not one for each."""

import math
from dataclasses import dataclass

import numpy as np

from scoring.verification import EVEN, NO_DECISION, Utterance, Verdict, Verifier, percent

NAMED = 0.5  # a speaker who is likelier than everybody else and nobody together is named


def speaker_posterior(llrs, prior: float = EVEN) -> tuple[np.ndarray, float]:
    """The probability of each enrolled speaker (N,), and that of nobody, from log-likelihood ratios (N,).

    ``prior``: share of the recordings that are of somebody who is enrolled, of each alike. A speaker weighs
    prior / N exp(llr), nobody 1 - prior, since an llr compares with nobody: Brummer and de Villiers 2010, "The speaker
    partitioning problem", section 3, for one test recording. With N = 1 it is the probability of a comparison.
    """
    llrs = np.asarray(llrs, np.float64)
    logs = np.append(llrs + math.log(prior / len(llrs)), math.log1p(-prior))
    weights = np.exp(logs - logs.max())
    shares = weights / weights.sum()
    return shares[:-1], float(shares[-1])


def nameless(verifier: Verifier, enrolled: int, prior: float | None = None) -> str:
    """A line if no recording can make one of so many speakers likelier than all else together, else "".

    With the others unlike it, a speaker passes one half where prior / N exp(llr) passes 1 - prior.
    """
    if verifier.threshold_given or not verifier.calibrated:
        return ""
    prior = EVEN if prior is None else prior
    bound, highest = -math.log(prior / enrolled / (1 - prior)), verifier.backend.highest
    if highest is None or highest > bound:
        return ""
    return (
        f"nobody of {enrolled} can be named at prior {percent(prior)}: that takes a log-likelihood ratio above "
        f"{bound:.4f}, and a recording and itself have {highest:.4f}; choose a larger --prior, or a --threshold"
    )


@dataclass(frozen=True)
class Candidate:
    """An enrolled speaker, and how likely it is of a recording; without a calibration nobody can say.

    Under a threshold that is given the probability is that of the comparison with this speaker alone.
    """

    name: str
    verdict: Verdict
    probability: float | None


class Identification:
    """What a recording is found to be. ``candidates``: the likeliest of all who are ``enrolled``, best first.

    ``speaker``: who is named, None for nobody; ``decided``: whether there is something to decide by. ``nobody``: the
    probability of a stranger; ``evidence``: the logarithm of the mean likelihood ratio over all who are enrolled, from
    which both follow at another ``prior``.
    """

    def __init__(self, verifier: Verifier, names, verdicts: list[Verdict], most: int, prior: float | None = None):
        self.enrolled, self.prior = len(verdicts), EVEN if prior is None else prior
        llrs = [v.llr for v in verdicts if v.llr is not None]
        self.by_probability = bool(llrs) and not verifier.threshold_given
        self.nobody: float | None = None
        self.evidence: float | None = None
        probabilities = [v.probability for v in verdicts]  # of a single comparison
        if self.by_probability:
            shares, self.nobody = speaker_posterior(llrs, self.prior)
            probabilities = shares.tolist()
            highest = max(llrs)
            self.evidence = highest + math.log(np.mean(np.exp(np.subtract(llrs, highest))))
        found = [Candidate(*each) for each in zip(names, verdicts, probabilities)]
        found.sort(key=lambda c: c.verdict.score if c.verdict.llr is None else c.verdict.llr, reverse=True)
        self.candidates, best = found[:most], found[0]
        same = best.probability > NAMED if self.by_probability else best.verdict.same
        self.decided, self.speaker = same is not None, best.name if same else None

    def values(self) -> dict:
        """The result as plain values for JSON."""
        names = ("speaker", "decided", "by_probability", "nobody", "prior", "evidence", "enrolled")
        rows = [{"name": c.name, **c.verdict.values(), "probability": c.probability} for c in self.candidates]
        for row in rows:
            row["same"] = row["name"] == self.speaker if self.decided else None
            if self.by_probability:  # the threshold and the prior of a pair decide nothing here
                row.update(prior=self.prior, threshold=None, threshold_from=None, threshold_moves=False)
        return {**{name: getattr(self, name) for name in names}, "speakers": rows}

    def lines(self) -> list[str]:
        """Lines for a terminal: the likeliest speakers, nobody, the decision."""
        best = self.candidates[0]
        width = max(len(c.name) for c in self.candidates)
        lines = [f"{c.name:{width}}  {figures_of(c)}" for c in self.candidates]
        if not self.decided:
            return [*lines, f"nearest: {best.name}; {NO_DECISION}"]
        if self.nobody is not None:
            lines.append(f"nobody who is enrolled: probability {percent(self.nobody)}")
        several = self.nobody is not None and self.nobody <= NAMED  # it is somebody, and not clear who
        none = "not clear who" if several else "nobody who is enrolled"
        lines.append(f"speaker: {self.speaker or f'{none}; the nearest is {best.name}'}")
        if self.nobody is None:
            return [*lines, *best.verdict.lines(), *self.cautions()]
        sure = self.nobody if self.speaker is None else best.probability
        if self.speaker is None and several:
            somebody = percent(1 - self.nobody)
            said = f"{somebody} sure that it is somebody, but no one of them is likelier than all others together"
        else:
            said = f"{percent(sure)} sure"
        return [*lines, f"{said}, if {percent(self.prior)} of the recordings are of somebody who is enrolled (--prior)"]

    def cautions(self) -> list[str]:
        """What to say of a threshold of one comparison that decides over many."""
        if self.by_probability or not self.decided or self.enrolled < 2:
            return []
        return [
            f"caution: this threshold is one of a single comparison; the best of {self.enrolled} strangers passes it "
            f"up to {self.enrolled} times as often. A calibrated back-end decides over all of them at once"
        ]


def figures_of(candidate: Candidate) -> str:
    """The figures of an enrolled speaker."""
    verdict = candidate.verdict
    if verdict.llr is None or candidate.probability is None:
        return f"score {verdict.score:.4f}"
    likely = f"log-likelihood ratio {verdict.llr:+.3f}  probability {percent(candidate.probability)}"
    return f"score {verdict.score:.4f}  {likely}"


def identify(verifier: Verifier, store, test: Utterance, most: int = 5, prior: float | None = None) -> Identification:
    """Find out which speaker of a store an utterance is of, if any; ``prior`` as of ``speaker_posterior``, or 0.5."""
    verdicts = verifier.compare_all(list(store.speakers.values()), test)
    return Identification(verifier, list(store.speakers), verdicts, most, prior)
