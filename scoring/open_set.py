"""Open-set figures of a trial list: how often the right one of many is named, and how often a stranger is."""

import numpy as np

from errors import UsageError
from scoring.error_rates import ErrorRates
from scoring.identification import NAMED, speaker_posterior
from scoring.verification import EVEN

RANKS = (1, 5, 10)
ALARMS = (0.01, 0.1)  # shares of strangers that get a name


class Tests:
    """The trials (N,) of a list by their test, each a search of the test among all who are compared with it.

    ``mates``: tests of a speaker who is among these, ``strangers``: others. Where there are no strangers each mate is
    searched once more without its own speaker's trials, and ``left_out`` is true.
    """

    def __init__(self, labels, tests, values):
        labels, values = np.asarray(labels), np.asarray(values, np.float64)
        finite = np.isfinite(values)
        names, test = np.unique(np.asarray(tests)[finite], return_inverse=True)
        labels, values = labels[finite], values[finite]
        order = np.lexsort((-values, test))
        parts = np.split(order, np.cumsum(np.bincount(test, minlength=len(names)))[:-1]) if len(names) else []
        searches = [(values[part], labels[part]) for part in parts]
        self.mates = [search for search in searches if search[1].any()]
        self.strangers = [v for v, own in searches if not own.any()]
        self.left_out = not self.strangers
        if self.left_out:
            alone = [v[own == 0] for v, own in self.mates]
            self.strangers = [v for v in alone if len(v)]
        self.candidates = int(np.median([len(part) for part in parts])) if parts else 0


def open_set_figures(labels, tests, values, calibrated: bool = False, prior: float = EVEN) -> dict:
    """Open-set figures of trials (N,): labels 0/1, names of the tests, and scores or, ``calibrated``, their llrs.

    All rates in %. ``top_K``: tests of enrolled speakers whose own speaker is among the K best, with the ends of its
    95 % interval. ``dir_at_F``: those whose speaker is the best and above the threshold that a share F of the strangers
    passes, the detection and identification rate (Phillips, Grother and Micheals 2011, "Evaluation methods in face
    recognition"). ``detection_eer``: of the best value of mates against that of strangers, whoever it
    is of. With llrs, by the posterior of ``speaker_posterior``: ``stranger_named``, ``named_right``, ``named_wrong``.
    UsageError where no test is compared with two.
    """
    found = Tests(labels, tests, values)
    if not found.mates or found.candidates < 2:
        raise UsageError("--open_set: the list compares no test with several enrolled speakers, one of whom is its own")
    rank = np.array([int(np.flatnonzero(own)[0]) for _, own in found.mates])
    best = np.array([v[0] for v, _ in found.mates])
    alarms = np.sort([v[0] for v in found.strangers])
    figures = {"tests": len(found.mates), "strangers": len(alarms), "candidates": found.candidates}
    figures["left_out"] = found.left_out
    for k in (k for k in RANKS if k < found.candidates):
        figures[f"top_{k}"] = _rate(rank < k)
    for share in ALARMS if len(alarms) else ():
        allowed = int(share * len(alarms) + 1e-9)  # strangers that may pass
        threshold = alarms[len(alarms) - allowed - 1]
        figures[f"dir_at_{share:g}"] = _rate((rank == 0) & (best > threshold))
    if len(alarms):
        figures["detection_eer"] = 100 * float(ErrorRates.of(*_joined(best, alarms)).eer()[0])
    if calibrated and len(alarms):
        named = [bool(speaker_posterior(v, prior)[0].max() > NAMED) for v in found.strangers]
        right = [(own[0] == 1, bool(speaker_posterior(v, prior)[0].max() > NAMED)) for v, own in found.mates]
        figures["stranger_named"] = _rate(named)
        figures["named_right"] = _rate([own and name for own, name in right])
        figures["named_wrong"] = _rate([name and not own for own, name in right])
    return figures


def _joined(targets, nontargets):
    return np.concatenate([targets, nontargets]), np.repeat([1, 0], [len(targets), len(nontargets)])


def _rate(flags) -> list[float]:
    """[share, lower, upper end of its 95 % interval] in % (Wilson 1927), of tests as if independent."""
    n, share, z = len(flags), float(np.mean(flags)), 1.96
    middle, half = share + z * z / (2 * n), z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    ends = (max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n)))
    return [100 * float(x) for x in (share, *ends)]


def open_set_lines(figures: dict) -> list[str]:
    """The figures as lines for a terminal."""
    strangers = "each of them once more without its own speaker" if figures["left_out"] else "tests of strangers"
    lines = [
        f"open set: {figures['tests']} tests of enrolled speakers among {figures['candidates']} (median), "
        f"{figures['strangers']} {strangers}"
    ]
    names = {f"top_{k}": f"own speaker among the best {k}" if k > 1 else "own speaker is the best" for k in RANKS}
    names |= {f"dir_at_{a:g}": f"and above what {100 * a:g} % of strangers pass (DIR at FAR {a:g})" for a in ALARMS}
    names |= {
        "stranger_named": "strangers who are named, by probability",
        "named_right": "named rightly, by probability",
        "named_wrong": "named wrongly, by probability",
    }
    width = max(map(len, names.values()))
    for key, name in names.items():
        if key in figures:
            share, low, high = figures[key]
            lines.append(f"{name:{width}}  {share:6.2f} % ({low:.2f} to {high:.2f})")
    if "detection_eer" in figures:
        lines.append(f"{'EER of enrolled or not, whoever it is':{width}}  {figures['detection_eer']:6.2f} %")
    return [*lines, "95 % intervals over tests as if independent"]
