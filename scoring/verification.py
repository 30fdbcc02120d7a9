"""From recordings to a decision: embeddings, the back-end's score, its probability, the stored threshold."""

import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from corpus.audio import MIN_SECONDS, SAMPLE_RATE, AudioError, audio_length
from errors import UsageError
from scoring.backend import Backend
from scoring.calibration import bayes_threshold
from scoring.enrollment import enrollment_weights
from settings.command_line import existing_file
from storage.speaker_store import Utterance

EVEN = 0.5  # the prior of as many comparisons of one speaker as of two
PRIOR = "share of comparisons that are of one speaker (default: the calibration's)"
NO_DECISION = (
    "no decision: give --threshold, or a --backend that has a calibration or a threshold; "
    "trainSpeakerNet.py --eval leaves one beside the checkpoint"
)


@dataclass(frozen=True)
class Verdict:
    """The result of a comparison. ``llr`` (natural logarithm) and ``probability`` need a calibrated back-end."""

    score: float
    llr: float | None
    probability: float | None  # of the same speaker, if a share ``prior`` of the comparisons is
    prior: float | None
    threshold: float | None  # on the log-likelihood ratio if there is one, else on the score
    threshold_from: str | None  # where the threshold comes from
    same: bool | None
    threshold_moves: bool = False  # with the prior

    def values(self) -> dict:
        """Return the fields as a dict for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return lines for a terminal: decision and probability, the decision with another prior, the figures."""
        if self.same is None:
            return [f"score {self.score:.4f} (not calibrated)", NO_DECISION]
        sign = ">=" if self.same else "<"
        threshold = f"{sign} threshold {self.threshold:.4f} ({self.threshold_from})"
        if self.llr is None:
            decided = f"{self.word}: score {self.score:.4f} {threshold}"
            return [decided, "not calibrated, so nobody can say how sure that is"]
        lines = [f"{self.word}: {self.certainty}, if {percent(self.prior)} of the comparisons are of one speaker"]
        if self.threshold_moves and self.prior != EVEN:
            other = self.at(EVEN)
            lines.append(f"with --prior {EVEN}, as many of one speaker as of two: {other.word}, {other.certainty}")
        return [*lines, f"score {self.score:.4f}, log-likelihood ratio {self.llr:+.3f} {threshold}"]

    @property
    def word(self) -> str:
        """The decision."""
        return "same speaker" if self.same else "different speakers"

    @property
    def certainty(self) -> str:
        """The probability of what was decided: a threshold other than Bayes' may decide for the less likely."""
        sure = self.probability if self.same else 1 - self.probability
        return f"{'only ' * (sure < 0.5)}{percent(sure)} sure"

    def at(self, prior: float) -> "Verdict":
        """Return the verdict on the same pair with another prior."""
        threshold = bayes_threshold(prior) if self.threshold_moves else self.threshold
        probability = Backend().probability(self.llr, prior)
        changed = {"probability": probability, "prior": prior, "threshold": threshold, "same": self.llr >= threshold}
        return replace(self, **changed)


def percent(share: float) -> str:
    """Return a share in whole percent, with decimals below 1 % and above 99 %, never as 0 or 100 %."""
    if not 1e-4 <= share <= 1 - 1e-4:
        return "less than 0.01 %" if share < 0.5 else "more than 99.99 %"
    return f"{100 * share:.0f} %" if 0.01 <= share <= 0.99 else f"{100 * share:.2f} %"


def embed_recording(model, path) -> Utterance:
    """Embed a file to enroll or to decide on; UsageError for one that is too short, silent or gives no embedding."""
    try:
        seconds = audio_length(path) / SAMPLE_RATE
    except AudioError as error:
        raise UsageError(f"{path}: {error}") from error
    embedding, acoustics = model.hear_file(path, MIN_SECONDS)
    return Utterance(embedding, seconds, os.path.abspath(path), acoustics)


def embed_to_decide(verifier, path) -> Utterance:
    """Embed a file to decide on; a line on stderr if it is unlike what the calibration was learnt on."""
    utterance = embed_recording(verifier.model, path)
    unlike = verifier.unlike(utterance, str(path))
    if unlike:
        print(f"warning: {unlike}", file=sys.stderr)
    return utterance


class Verifier:
    """A model and a back-end that belong together; ``threshold`` and ``prior`` replace the back-end's."""

    def __init__(self, model, backend, threshold: float | None = None, prior: float | None = None):
        backend.check_identity(model.identity)
        self.model, self.backend = model, backend
        self.prior = backend.prior if prior is None else prior
        self.threshold_moves = self.calibrated and threshold is None and backend.threshold is None
        self.threshold_given = threshold is not None
        given = (threshold, "--threshold") if self.threshold_given else None
        self.threshold, self.threshold_from = given or backend.decision_threshold(self.prior)

    @property
    def cautions(self) -> list[str]:
        """Why its decisions on pairs may be wrong, whatever the recordings: a line each."""
        return [*self.cautions_of_scores, *filter(None, [self.out_of_reach(self.threshold, self.threshold_from)])]

    @property
    def cautions_of_scores(self) -> list[str]:
        """Why its scores and probabilities may be wrong, whatever is decided by them."""
        return [*self.backend.cautions, *filter(None, [self.backend.unlike(self.model.vad)])]

    def out_of_reach(self, threshold: float | None, threshold_from: str | None) -> str:
        """A line if no pair of recordings can reach a threshold, else ""."""
        highest = self.backend.highest
        if highest is None or threshold is None or threshold <= highest:
            return ""
        return (
            f"no pair reaches the threshold {threshold:.4f} ({threshold_from}), not even a recording and "
            f"itself, which have {highest:.4f}: nobody is taken for anybody; choose a --threshold or a --prior"
        )

    def unlike(self, utterance: Utterance, name: str = "") -> str:
        """In what a recording differs from those that the calibration was learnt on, in a line, "" if in nothing.

        ``name``: what to call it.
        """
        heard, sound = self.backend.heard, utterance.acoustics
        found = heard.unlike(sound) if heard and sound else []
        if not found:
            return ""
        return (
            f"{name or utterance.source}: unlike what the calibration was learnt on: {', '.join(found)}; its "
            "probability may be wrong"
        )

    @property
    def calibrated(self) -> bool:
        """Whether scores are turned into log-likelihood ratios."""
        return self.backend.calibration is not None

    def compare(self, enrolled: list[Utterance], test: Utterance) -> Verdict:
        """Compare an utterance with those of one speaker."""
        return self.compare_all([enrolled], test)[0]

    def compare_all(self, speakers: list[list[Utterance]], test: Utterance) -> list[Verdict]:
        """Compare an utterance with those of each speaker."""
        scores, llrs = self.scores(speakers, test.embedding[None], np.array([test.seconds]))
        found = [None] * len(speakers) if llrs is None else llrs[0]
        return [self._verdict(float(score), llr) for score, llr in zip(scores[0], found)]

    def scores(self, speakers: list[list[Utterance]], tests: np.ndarray, seconds: np.ndarray):
        """Scores (T, N) of embeddings (T, D) of ``seconds`` (T,) against N speakers, and their log-likelihood ratios.

        The ratios are (T, N) too, or None without a calibration.
        """
        rows = [utterance for speaker in speakers for utterance in speaker]
        owner = np.repeat(np.arange(len(speakers)), [len(speaker) for speaker in speakers])
        pairs = np.stack(
            [np.tile(np.arange(len(speakers)), len(tests)), np.repeat(np.arange(len(tests)), len(speakers))], 1
        )
        lengths = np.array([u.seconds for u in rows]), seconds
        enrolled = np.stack([u.embedding for u in rows])
        weights = np.concatenate([enrollment_weights([u.acoustics for u in speaker]) for speaker in speakers])
        scores, names, features = self.backend.score_trials(enrolled, tests, pairs, owner, *lengths, weights)
        shape = len(tests), len(speakers)
        llrs = self.backend.calibrate(names, features).reshape(shape) if self.calibrated else None
        return scores.reshape(shape), llrs

    def _verdict(self, score: float, llr) -> Verdict:
        if llr is None:
            same = None if self.threshold is None else score >= self.threshold
            return Verdict(score, None, None, None, self.threshold, self.threshold_from, same)
        llr = float(llr)
        probability = self.backend.probability(llr, self.prior)
        threshold = self.threshold, self.threshold_from
        return Verdict(score, llr, probability, self.prior, *threshold, llr >= self.threshold, self.threshold_moves)


def add_verifier_arguments(parser, prior: str = PRIOR):
    """Add the flags that ``verifier_from`` reads, beside those of the model; ``prior``: what --prior is a share of."""
    parser.add_argument(
        "--backend",
        default="",
        metavar="FILE",
        help="back-end that score.py saved; default: the calibration that training left beside the checkpoint, if any",
    )
    parser.add_argument(
        "--threshold", type=float, help="accept from here on: a log-likelihood ratio, or a score without calibration"
    )
    parser.add_argument("--prior", type=float, help=prior)


def verifier_from(args, load_model, of_pairs: bool = True) -> Verifier:
    """Load the back-end that the flags name, then the model by ``load_model(args)``; its cautions go to stderr.

    ``of_pairs``: whether it decides on pairs of recordings; of a decision over many its threshold says nothing.
    """
    if args.prior is not None and not 0 < args.prior < 1:
        raise UsageError(f"--prior: must lie between 0 and 1, got {args.prior:g}")
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise UsageError(f"--threshold: must be a finite number, got {args.threshold:g}")
    existing_file(args.initial_model, "--initial_model")
    backend = backend_from(args)  # before the model, which takes longer to load
    verifier = Verifier(load_model(args), backend, args.threshold, args.prior)
    pairs = of_pairs or verifier.threshold_given or not verifier.calibrated
    for caution in verifier.cautions if pairs else verifier.cautions_of_scores:
        print(f"warning: {caution}", file=sys.stderr)
    return verifier


def backend_from(args) -> Backend:
    """The back-end of --backend, else what training left beside the checkpoint, else the plain cosine."""
    if args.backend:
        return Backend.load(args.backend)
    calibration, threshold = (Path(args.initial_model).with_suffix(e) for e in (".calibration", ".threshold"))
    if calibration.is_file():
        return Backend.load(calibration)
    if threshold.is_file():
        try:
            value = float(threshold.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{threshold}: holds no number") from error
        return Backend(threshold=value, source=str(threshold))
    return Backend()


def add_store_argument(parser):
    """Add --store."""
    parser.add_argument(
        "--store", default="speakers.npz", metavar="FILE", help="enrolled speakers (default speakers.npz)"
    )
