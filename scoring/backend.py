"""The scoring back-end as one object: two sets of embeddings in, scores, log-likelihood ratios and decisions out."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from errors import UsageError
from scoring.calibration import LogisticCalibration, bayes_threshold, quality_measures
from scoring.cosine import length_normalize, paired_products
from scoring.mismatch import Heard
from scoring.normalization import cohort_statistics, speaker_means, symmetric_norm
from scoring.plda import ARRAYS, PLDA
from storage.arrays import DAMAGE, read_arrays, write_arrays
from storage.files import write_atomically

FORMAT_VERSION = 1
ENROLLMENTS = ("mean", "scores")


@dataclass
class Side:
    """One side of the trials: vectors whose dot product with the other side's is the score, and their measures."""

    vectors: np.ndarray  # (rows, V)
    statistics: tuple | None  # (mean (rows,), deviation (rows,)) of the cohort scores
    measures: dict  # {name of MEASURES: (rows,)}


@dataclass
class Backend:
    """Sub-mean -> cosine or PLDA -> S-norm or AS-norm -> calibration -> threshold; each stage may be absent.

    ``mean`` (D,) is subtracted from every embedding. ``plda`` replaces the cosine. ``cohort`` (set by ``set_cohort``)
    normalises the scores by each side's ``top_n`` best cohort scores (0: the whole cohort, S-norm). Several utterances
    of a speaker are one model by their mean (PLDA: by the book, by their number), or with ``enrollment`` "scores" the
    mean of their scores. ``calibration`` maps to log-likelihood ratios. ``threshold`` is on the log-likelihood ratio
    if there is a calibration, else on the score; None is the Bayes threshold of ``prior`` (share of target trials).
    ``identity`` says of which model the embeddings are (SpeakerModel.identity).
    """

    mean: np.ndarray | None = None
    plda: PLDA | None = None
    cohort: np.ndarray | None = None
    top_n: int = 300
    enrollment: str = "mean"
    calibration: LogisticCalibration | None = None
    threshold: float | None = None
    prior: float = 0.05
    identity: str = ""
    source: str = "the back-end"  # the file it was read from, for messages
    crop_seconds: float = 0.0  # of the crops whose scores the trainer's calibration was learnt on; 0: whole recordings
    caution: str = ""  # why the calibration is a guess, if it is (scoring.cautions.few_errors)
    vad: str = "none"  # of the embeddings that it was made with
    heard: Heard | None = None  # the recordings that the calibration was learnt on, where they are known
    test_list_sha256: str = ""  # of the trials that the calibration was learnt on (corpus.lists.list_hash)

    @property
    def dimension(self) -> int | None:
        """Size of the embeddings that it takes, None if it takes any."""
        if self.mean is not None:
            return len(self.mean)
        if self.plda is not None:
            return len(self.plda.center)
        return None if self.cohort is None else self.cohort.shape[1]

    def prepare(self, x) -> np.ndarray:
        """Embeddings (N, D) as scoring takes them: less the mean, then length-normalised, or in PLDA's coordinates."""
        x = np.asarray(x)
        if self.dimension not in (None, x.shape[-1]):
            raise UsageError(f"{self.source}: for embeddings of size {self.dimension}, these are of {x.shape[-1]}")
        if self.mean is not None:
            x = x - self.mean.astype(x.dtype)
        return length_normalize(x) if self.plda is None else self.plda.project(x)

    def set_cohort(self, x, speakers=None, top_n: int = 300):
        """Normalise scores by a cohort (C, D) of raw embeddings, or by the means of its ``speakers`` if given."""
        prepared = self.prepare(x)
        if speakers is not None:
            prepared = self._means(prepared, speakers)
        if len(prepared) < 2 or top_n == 1:
            raise UsageError("one cohort score has no deviation to divide by: take a larger --cohort, or --top_n")
        self.cohort = prepared
        self.top_n = top_n

    def _means(self, prepared, groups, weights=None):
        """Means of prepared rows by group, in sorted order of the groups; unit length for cosine."""
        if self.plda is None and weights is None:
            return length_normalize(speaker_means(prepared, groups)[1])
        index = np.unique(np.asarray(groups), return_inverse=True)[1]
        weights = np.ones(len(index)) if weights is None else weights
        sums = np.stack([np.bincount(index, weights * column) for column in prepared.T], axis=1)
        means = (sums / np.bincount(index, weights)[:, None]).astype(prepared.dtype)
        return length_normalize(means) if self.plda is None else means

    def score_trials(self, enrolled, tests, pairs, models=None, enrolled_seconds=None, test_seconds=None, weights=None):
        """Score trials (N, 2) of a model and a test: (scores (N,) float64, names (K,), features (N, K)).

        enrolled (E, D), tests (T, D): raw embeddings; pass the same array twice if both sides are drawn from it.
        models (E,): number 0 .. M-1 of the model that each enrolled row belongs to, or None: each row is a model.
        weights (E,): how much each enrolled row counts in its model (``enrollment_weights``), or None: all alike.
        The first column of the features is the score; quality measures follow: of durations if both seconds, (E,)
        and (T,), are given, of the raw embeddings' lengths, of the cohort's mean scores.
        """
        pairs = np.asarray(pairs)
        single = models is None
        if not single and not np.bincount(models).all():
            raise ValueError(f"models must be numbered 0 .. {np.max(models)} without gaps")
        if self.enrollment == "scores" and not single:
            seconds = enrolled_seconds, test_seconds
            return self._average_scores(enrolled, tests, pairs, np.asarray(models), *seconds, weights)
        test_side = self._side(tests, test_seconds, tests=True)
        if single and enrolled is tests:  # the ratio is symmetric, so the cohort's statistics serve both sides
            vectors = test_side.vectors
            vectors = vectors if self.plda is None else self.plda.enrolled_vectors(self.prepare(tests))
            enrolled_side = Side(vectors, test_side.statistics, test_side.measures)
        else:
            enrolled_side = self._side(enrolled, enrolled_seconds, models=models, weights=weights)
        scores = paired_products(enrolled_side.vectors, test_side.vectors, pairs)
        sides = ((enrolled_side, pairs[:, 0]), (test_side, pairs[:, 1]))
        if self.cohort is not None:
            scores = symmetric_norm(scores, *(tuple(s[rows] for s in side.statistics) for side, rows in sides))
        names, measures = quality_measures(*({k: v[rows] for k, v in side.measures.items()} for side, rows in sides))
        return scores, ("score", *names), np.column_stack([scores, measures])

    def _average_scores(self, enrolled, tests, pairs, models, enrolled_seconds, test_seconds, weights=None):
        """``score_trials`` of every utterance of each model, averaged."""
        order = np.argsort(models, kind="stable")
        count = np.bincount(models, minlength=int(pairs[:, 0].max()) + 1)[pairs[:, 0]]
        first = np.searchsorted(models[order], pairs[:, 0])
        begin = np.cumsum(count) - count
        rows = order[np.repeat(first - begin, count) + np.arange(count.sum())]
        expanded = np.stack([rows, np.repeat(pairs[:, 1], count)], axis=1)
        _, names, features = self.score_trials(enrolled, tests, expanded, None, enrolled_seconds, test_seconds)
        weights = np.ones(len(rows)) if weights is None else np.asarray(weights)[rows]
        features = np.add.reduceat(features * weights[:, None], begin, axis=0)
        features /= np.add.reduceat(weights, begin)[:, None]
        return features[:, 0], names, features

    def _side(self, x, seconds, models=None, tests=False, weights=None) -> Side:
        x = np.asarray(x)
        prepared, magnitude = self.prepare(x), np.sqrt(np.einsum("nd,nd->n", x, x, dtype=np.float64))
        count = np.ones(len(x), int)
        if models is not None:
            models = np.asarray(models)
            count = np.bincount(models)
            prepared, magnitude = self._means(prepared, models, weights), np.bincount(models, magnitude) / count
            seconds = None if seconds is None else np.bincount(models, seconds)
        vectors = prepared
        against = self.cohort
        if self.plda is not None:
            vectors = self.plda.test_vectors(prepared) if tests else self.plda.enrolled_vectors(prepared, count)
        measures = {"magnitude": magnitude}
        if seconds is not None:
            measures["log_duration"] = np.log(np.maximum(seconds, 1e-3))
        statistics = None
        if self.cohort is not None:
            scored = vectors
            if (
                self.plda is not None
            ):  # a test is scored against the cohort as if it were enrolled: the ratio is symmetric
                against = self.plda.test_vectors(self.cohort)
                scored = self.plda.enrolled_vectors(prepared, count) if tests else vectors
            statistics = cohort_statistics(scored, against, self.top_n)
            measures["cohort_mean"] = statistics[0]
        return Side(vectors, statistics, measures)

    def _one_speaker(self, enrolled, tests, enrolled_seconds, test_seconds):
        enrolled, tests = np.atleast_2d(enrolled), np.asarray(tests)
        many = np.atleast_2d(tests)
        models = np.zeros(len(enrolled), int)
        pairs = np.stack([np.zeros(len(many), int), np.arange(len(many))], axis=1)
        seconds = [None if s is None else np.atleast_1d(s) for s in (enrolled_seconds, test_seconds)]
        found = self.score_trials(enrolled, many, pairs, models, *seconds)
        return found, tests.ndim == 1

    def score(self, enrolled, tests):
        """Score tests (D,) -> float, or (M, D) -> (M,), against one speaker enrolled with (D,) or (n, D)."""
        (scores, _, _), one = self._one_speaker(enrolled, tests, None, None)
        return float(scores[0]) if one else scores

    def llr(self, enrolled, tests, enrolled_seconds=None, test_seconds=None):
        """Natural-log likelihood ratios of tests (D,) or (M, D) against one speaker enrolled with (D,) or (n, D).

        The seconds of each utterance are needed if ``needs_durations``.
        """
        (_, names, features), one = self._one_speaker(enrolled, tests, enrolled_seconds, test_seconds)
        llrs = self.calibrate(names, features)
        return float(llrs[0]) if one else llrs

    @property
    def needs_durations(self) -> bool:
        """Whether the calibration looks at how long the utterances are."""
        return self.calibration is not None and any(n.startswith("log_duration") for n in self.calibration.names)

    def calibrate(self, names, features) -> np.ndarray:
        """Log-likelihood ratios (N,) of what ``score_trials`` gave; UsageError without a calibration."""
        if self.calibration is None:
            raise UsageError(f"{self.source}: has no calibration; score.py --calibrate TRIALS --save_backend makes one")
        try:
            return self.calibration.llrs(features, names)
        except ValueError as error:
            raise UsageError(f"{self.source}: {error}") from error

    def decision_threshold(self, prior: float | None = None):
        """What decisions are made at, and where it comes from: the stored threshold, else Bayes', else (None, None)."""
        prior = self.prior if prior is None else prior
        if self.threshold is not None:
            return self.threshold, f"stored in {self.source}"
        if self.calibration is not None:
            return bayes_threshold(prior), f"Bayes, prior {100 * prior:.4g} %"
        return None, None

    @property
    def highest(self) -> float | None:
        """The score that no pair can pass, a log-likelihood ratio or a cosine; None if unknown, as with a cohort."""
        if self.plda is not None or self.cohort is not None:
            return None
        if self.calibration is None:
            return 1.0
        weights, bias = self.calibration.weights, self.calibration.bias
        return float(abs(weights[0]) + bias) if len(weights) == 1 else None

    def decision(self, values):
        """Accept (True) or not: log-likelihood ratios, or scores if there is no calibration, at the threshold."""
        threshold, _ = self.decision_threshold()
        if threshold is None:
            raise UsageError(f"{self.source}: has neither a calibration nor a threshold, so it cannot decide")
        accepted = np.asarray(values) >= threshold
        return bool(accepted) if accepted.ndim == 0 else accepted

    def probability(self, llrs, prior: float | None = None):
        """Probability that it is the same speaker, at a prior (default the back-end's)."""
        prior = self.prior if prior is None else prior
        odds = np.asarray(llrs, np.float64) + np.log(prior / (1 - prior))
        values = np.exp(-np.logaddexp(0, -odds))
        return float(values) if values.ndim == 0 else values

    def check_identity(self, identity: str):
        """UsageError if the embeddings to score are of another model than the back-end's."""
        if self.identity and identity and self.identity != identity:
            raise UsageError(
                f"{self.source}: made with embeddings of another model ({self.identity[:12]}, this one is "
                f"{identity[:12]}): make a back-end for this model with score.py --save_backend"
            )

    def unlike(self, vad: str) -> str:
        """What to say of embeddings of speech that another ``vad`` found, or "" if there is nothing."""
        if vad == self.vad or (self.calibration is None and self.threshold is None):
            return ""
        return f"{self.source}: made with vad {self.vad}, these embeddings are of vad {vad}: its decisions may be wrong"

    @property
    def cautions(self) -> list[str]:
        """Why its probabilities and decisions may be wrong: a line each, beginning with the file it was read from."""
        found = [self.caution] if self.caution else []
        if self.crop_seconds:
            found.append(
                f"learnt on the scores of crops of {self.crop_seconds:g} s (eval_frames), not of whole recordings, "
                "which score higher as a rule"
            )
        return [
            f"{self.source}: {text}; score.py --calibrate TRIALS --save_backend makes a better one" for text in found
        ]

    def describe(self) -> str:
        """The chain in a few words."""
        parts = ["sub-mean"] if self.mean is not None else []
        parts.append("cosine" if self.plda is None else f"PLDA of dimension {len(self.plda.psi)}")
        if self.cohort is not None:
            adaptive = 0 < self.top_n < len(self.cohort)
            parts.append(f"AS-norm (top {self.top_n} of {len(self.cohort)})" if adaptive else "S-norm")
        if self.calibration is not None:
            parts.append("QMF calibration" if len(self.calibration.names) > 1 else "calibration")
        return " + ".join(parts)

    def header(self) -> dict:
        """What is not an array, as plain values for JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "score": "cosine" if self.plda is None else "plda",
            "top_n": self.top_n,
            "enrollment": self.enrollment,
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "threshold": self.threshold,
            "prior": self.prior,
            "identity": self.identity,
            "caution": self.caution,
            "vad": self.vad,
            "heard": self.heard.to_dict() if self.heard else None,
            "test_list_sha256": self.test_list_sha256,
            "eval_frames": round(100 * self.crop_seconds),  # the trainer's word for it
        }

    def save(self, path):
        """Write to one file, whole or not at all: .npz, or JSON under any other ending if there are no arrays."""
        path, header = Path(path), json.dumps(self.header(), indent=1)
        arrays = {"mean": self.mean, "cohort": self.cohort}
        arrays.update({f"plda_{k}": v for k, v in self.plda.arrays().items()} if self.plda else {})
        arrays = {k: v for k, v in arrays.items() if v is not None}
        if path.suffix == ".npz":
            write_arrays(path, header=np.str_(header), **arrays)
        elif arrays:
            raise UsageError(f"{path}: a back-end with a mean, a cohort or PLDA is saved as .npz")
        else:
            write_atomically(path, (header + "\n").encode())

    @classmethod
    def load(cls, path, identity: str = "") -> "Backend":
        """Read what ``save`` wrote (also a trainer's model_best.calibration); UsageError for anything else.

        ``identity``: that of the model in use; a back-end of another model is refused.
        """
        header, arrays = _read(path)
        try:
            if header["format_version"] != FORMAT_VERSION:
                raise UsageError(f"{path}: format {header['format_version']}, this program reads {FORMAT_VERSION}")
            if header["score"] not in ("cosine", "plda") or header["enrollment"] not in ENROLLMENTS:
                raise UsageError(
                    f"{path}: for score '{header['score']}', which only the trainer's evaluation computes; give a "
                    "--backend that score.py --save_backend made"
                )
            plda = None
            if header["score"] == "plda":
                plda = PLDA(**{name: arrays[f"plda_{name}"] for name in ARRAYS})
            calibration = header["calibration"]
            calibration = None if calibration is None else LogisticCalibration.from_dict(calibration)
            prior, threshold = float(header["prior"]), header["threshold"]
            if not 0 < prior < 1 or not np.isfinite(0.0 if threshold is None else float(threshold)):
                raise ValueError(f"prior {prior:g}, threshold {threshold}")
            backend = cls(
                arrays.get("mean"),
                plda,
                arrays.get("cohort"),
                int(header["top_n"]),
                header["enrollment"],
                calibration,
                None if threshold is None else float(threshold),
                prior,
                str(header["identity"]),
                str(path),
                float(header.get("eval_frames", 0)) / 100,
                str(header.get("caution", "")),
                str(header.get("vad", "none")),
                Heard.from_dict(header["heard"]) if header.get("heard") else None,
                str(header.get("test_list_sha256", "")),
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path}: damaged, or not a back-end of score.py ({error})") from error
        if not all(np.isfinite(a).all() for a in arrays.values()):
            raise UsageError(f"{path}: damaged: holds values that are not finite")
        backend.check_identity(identity)
        return backend


def _read(path):
    """Header and arrays of a back-end file, without pickle."""
    try:
        if not zipfile.is_zipfile(path):
            return json.loads(Path(path).read_text(encoding="utf-8")), {}
        arrays = read_arrays(path)
        return json.loads(str(arrays.pop("header"))), arrays
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except DAMAGE as error:
        raise UsageError(f"{path}: damaged, or not a back-end of score.py") from error
