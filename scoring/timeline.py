"""Who speaks when: the windows of a recording, each compared with all who are enrolled, smoothed over time."""

import itertools
import math
from dataclasses import asdict, dataclass

import numpy as np

from corpus.audio import MIN_SECONDS
from corpus.sliding import put_together
from errors import UsageError
from scoring.verification import EVEN, Verifier, percent
from storage.speaker_store import MEANING, NOBODY, SILENCE

TURN = 2.0  # seconds
MOST_COMPARISONS = 1 << 20  # of windows with speakers at a time: about 100 MB


def smoothed(llrs: np.ndarray, heard: np.ndarray, prior: float, stay: float, weight: float) -> np.ndarray:
    """Posteriors (T, N + 1) of N speakers and of nobody (last) in each of T windows, given all windows.

    ``llrs`` (T, N): log-likelihood ratios against nobody; where ``heard`` (T,) is False they say nothing. A hidden
    Markov model: a window keeps the state of the one before with probability ``stay`` and else draws it anew, a speaker
    with prior / N, nobody with 1 - prior (Landini et al. 2022, "Bayesian HMM clustering of x-vector sequences (VBx)",
    section 2, whose loop probability is ``stay`` and whose factor F_A is ``weight``). Forward-backward algorithm
    (Rabiner 1989, "A tutorial on hidden Markov models", section III.A), each step scaled to sum 1.
    """
    windows, speakers = llrs.shape
    start = np.append(np.full(speakers, prior / speakers), 1 - prior)

    def likelihoods(t):
        if not heard[t]:
            return np.ones(speakers + 1)
        logs = np.append(weight * llrs[t], 0.0)
        return np.exp(logs - logs.max())

    found, before = np.empty((windows, speakers + 1)), start
    for t in range(windows):
        state = (stay * before + (1 - stay) * start if t else start) * likelihoods(t)
        found[t] = before = state / state.sum()
    after = np.ones(speakers + 1)
    for t in range(windows - 2, -1, -1):
        later = likelihoods(t + 1) * after
        after = stay * later + (1 - stay) * (start @ later)
        after /= after.sum()
        both = found[t] * after
        found[t] = both / both.sum()
    return found


def cells(times: np.ndarray, seconds: float) -> np.ndarray:
    """Edges (T + 1,) in s of the parts of a recording that windows (T, 2) decide on: midway between their middles."""
    middles = np.asarray(times).mean(axis=1)
    return np.concatenate([[0.0], (middles[1:] + middles[:-1]) / 2, [seconds]])


@dataclass(frozen=True)
class Segment:
    """A part of a recording, in s: a speaker, None for nobody who is enrolled; ``silence``: nothing was heard.

    ``probability``: the mean over its time of what it says, None in silence.
    """

    start: float
    end: float
    speaker: str | None
    probability: float | None
    silence: bool = False

    @property
    def label(self) -> str:
        """What a table calls it."""
        return SILENCE if self.silence else self.speaker or NOBODY


class Timeline:
    """Who speaks when in a recording of ``seconds``, of whose windows (T, 2) one begins every ``step`` s.

    ``edges`` (T + 1,) in s part it, one part a window; ``posteriors`` (T, N + 1) of ``names`` (N,) and of nobody.
    """

    def __init__(self, names: list[str], times, llrs, heard, prior: float, turn: float, step: float):
        self.names, self.heard, self.prior, self.turn, self.step = names, np.asarray(heard), prior, turn, step
        times = np.asarray(times)
        self.seconds, self.window = float(times[-1, 1]), float(times[0, 1] - times[0, 0])
        self.edges = cells(times, self.seconds)
        weight = self.seconds / (len(times) * self.window)  # windows that share audio count it once
        self.posteriors = smoothed(np.asarray(llrs), self.heard, prior, math.exp(-step / turn), weight)
        self.decided = self.posteriors.argmax(axis=1)  # the number of a speaker, or of nobody: least expected error
        self.segments = self._segments()

    def _segments(self) -> list[Segment]:
        state = np.where(self.heard, self.decided, -1)
        first = np.flatnonzero(np.append(True, np.diff(state) != 0)).tolist()
        found = []
        for begin, end in zip(first, [*first[1:], len(state)]):
            number, widths = int(state[begin]), np.diff(self.edges[begin : end + 1])
            sure = None if number < 0 else float(np.average(self.posteriors[begin:end, number], weights=widths))
            name = self.names[number] if 0 <= number < len(self.names) else None
            found.append(Segment(float(self.edges[begin]), float(self.edges[end]), name, sure, number < 0))
        return found

    def totals(self) -> dict[str, float]:
        """{label: seconds}, most first."""
        found: dict[str, float] = {}
        for segment in self.segments:
            found[segment.label] = found.get(segment.label, 0.0) + segment.end - segment.start
        return dict(sorted(found.items(), key=lambda pair: -pair[1]))

    def lines(self) -> list[str]:
        """A table of the segments, and how long each speaks, for a terminal."""
        width = max(len(segment.label) for segment in self.segments)
        lines = [f"{'start s':>9}  {'end s':>9}  {'speaker':{width}}  probability"]
        for s in self.segments:
            sure = "" if s.probability is None else percent(s.probability)
            lines.append(f"{s.start:9.2f}  {s.end:9.2f}  {s.label:{width}}  {sure}".rstrip())
        told = ", ".join(f"{label} {length:.1f} s" for label, length in self.totals().items())
        where = f"windows of {self.window:g} s every {self.step:g} s, turns of {self.turn:g} s"
        return [*lines, f"{told} ({where}; {percent(self.prior)} of the time is of somebody who is enrolled, --prior)"]

    def values(self) -> dict:
        """The result as plain values for JSON."""
        keys = ("seconds", "window", "step", "turn", "prior")
        segments = [asdict(segment) for segment in self.segments]
        return {**{key: getattr(self, key) for key in keys}, "segments": segments, "totals": self.totals()}

    def rttm(self, recording: str) -> str:
        """The named segments in NIST's RTTM (RT-09 evaluation plan, appendix A); white space in names becomes '_'.

        UsageError for two speakers whose names then are the same.
        """
        words = {name: "_".join(name.split()) for name in self.names}
        if len(set(words.values())) < len(words):
            twin = next(name for name in words if list(words.values()).count(words[name]) > 1)
            raise UsageError(f"--rttm: two speakers would be called '{words[twin]}': RTTM has no white space in names")
        recording = "_".join(recording.split())
        return "".join(
            f"SPEAKER {recording} 1 {s.start:.3f} {s.end - s.start:.3f} <NA> <NA> {words[s.speaker]} <NA> <NA>\n"
            for s in self.segments
            if s.speaker is not None
        )


def follow(verifier: Verifier, store, path, window: float, step: float, turn: float = TURN, prior=None) -> Timeline:
    """Find out who of a store speaks when in the file ``path``; ``prior``: share of the time that is of one of them.

    ``turn`` in s: how long somebody speaks on average. Of each window only its comparisons are kept. UsageError for a
    file in which nothing is heard, or without a calibration.
    """
    if not verifier.calibrated or verifier.threshold_given:
        raise UsageError(
            "--along: decides by probability, so it takes no --threshold and needs a calibration: a --backend of "
            "score.py --calibrate, or the .calibration that trainSpeakerNet.py --eval leaves beside the checkpoint"
        )
    for name in (NOBODY, SILENCE):
        if name in store.speakers:
            raise UsageError(
                f"{store.path}: somebody is enrolled as '{name}', which means {MEANING[name]} in a table of who speaks "
                "when; enroll them by another name, and forget this one with enroll.py --remove"
            )
    speakers = list(store.speakers.values())
    times, llrs, heard, reason = [], [], [], ""
    blocks = verifier.model.iter_windows(path, window, step, min_seconds=MIN_SECONDS)
    at_once = max(1, MOST_COMPARISONS // (32 * len(speakers)))  # the speakers are prepared anew each time
    while several := list(itertools.islice(blocks, at_once)):
        block, embeddings, reasons = put_together(several)
        sound = np.array([row not in reasons for row in range(len(block))])
        part = np.zeros((len(block), len(speakers)))
        if sound.any():
            part[sound] = verifier.scores(speakers, embeddings[sound], np.diff(block[sound], axis=1)[:, 0])[1]
        reason = reason or next(iter(reasons.values()), "")
        times.append(block)
        llrs.append(part)
        heard.append(sound)
    if not np.concatenate(heard).any():
        raise UsageError(f"{path}: no speech to follow: {reason}")
    parts = np.concatenate(times), np.concatenate(llrs), np.concatenate(heard)
    return Timeline(list(store.speakers), *parts, EVEN if prior is None else prior, turn, step)
