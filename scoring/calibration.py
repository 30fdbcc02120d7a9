"""Calibration: scores, and quality measures of the two sides of a trial, to natural-log likelihood ratios."""

import numpy as np

from scoring.error_rates import checked_trials

MEASURES = ("log_duration", "magnitude", "cohort_mean")


class LogisticCalibration:
    """An affine map of features (N, K) to log-likelihood ratios: weights . features + bias, in nats.

    With one column it calibrates a score; with the scores of several systems it fuses them; with quality measures
    beside the score it is QMF. ``names`` says what the columns are.
    """

    def __init__(self, weights, bias: float, prior: float = 0.5, names=("score",)):
        self.weights = np.atleast_1d(np.asarray(weights, np.float64))
        self.bias, self.prior, self.names = float(bias), float(prior), tuple(names)
        if self.weights.ndim != 1 or not np.isfinite([*self.weights, self.bias]).all():
            raise ValueError("the weights of a calibration must be finite numbers")
        if len(self.names) != len(self.weights):
            raise ValueError(f"{len(self.weights)} weights but {len(self.names)} names")

    @classmethod
    def fit(cls, features, labels, prior: float = 0.5, names=("score",)):
        """Learn the map from features (N, K) or (N,) with labels (N,) 0/1, by prior-weighted logistic regression.

        Minimises prior * mean over targets of log(1 + exp(-(llr + logit prior))) + (1 - prior) * the same for
        nontargets (Bruemmer and du Preez 2006, "Application-independent evaluation of speaker detection", section 8),
        with a weak ridge so that separable trials give finite weights. The share of targets in the list plays no part.
        Non-finite features or a single class are a ValueError.
        """
        from sklearn.linear_model import LogisticRegression

        x, labels = _columns(features), np.asarray(labels).astype(np.int64)
        if not np.isfinite(x).all():
            raise ValueError("features to calibrate on hold NaN or Inf")
        if labels.shape != (len(x),):
            raise ValueError(f"{len(x)} rows of features but labels of shape {labels.shape}")
        if len(np.unique(labels)) < 2:
            raise ValueError("calibration needs target and nontarget trials")
        if not 0 < prior < 1:
            raise ValueError(f"the prior must lie between 0 and 1, got {prior}")
        center, scale = x.mean(axis=0), x.std(axis=0)
        scale = np.where(scale > 1e-12 * np.maximum(np.abs(center), 1), scale, 1.0)
        targets = labels.sum()
        weight = np.where(labels == 1, prior / targets, (1 - prior) / (len(labels) - targets)) * len(labels)
        model = LogisticRegression(C=1000.0, solver="newton-cholesky", tol=1e-8, max_iter=200)
        model.fit((x - center) / scale, labels, sample_weight=weight)
        weights = model.coef_[0] / scale
        # Trained on trials weighted to the prior, the regression gives posterior log odds: take the prior's off again.
        bias = model.intercept_[0] - weights @ center - np.log(prior / (1 - prior))
        return cls(weights, bias, prior, names)

    def llrs(self, features, names=None) -> np.ndarray:
        """Map features (N, K) or (N,) to natural-log likelihood ratios (N,).

        ``names`` of the columns, if there are others too or in another order; a missing one is a ValueError.
        """
        x = _columns(features)
        if names is not None:
            missing = [name for name in self.names if name not in names]
            if missing:
                raise ValueError(f"the calibration needs {', '.join(missing)} of each trial")
            x = x[:, [list(names).index(name) for name in self.names]]
        if x.shape[1] != len(self.weights):
            raise ValueError(f"the calibration takes {', '.join(self.names)}, got {x.shape[1]} columns")
        return x @ self.weights + self.bias

    def to_dict(self) -> dict:
        """The map as plain numbers, for JSON."""
        return {
            "kind": "logistic",
            "names": list(self.names),
            "weights": self.weights.tolist(),
            "bias": self.bias,
            "prior": self.prior,
        }

    @classmethod
    def from_dict(cls, values: dict):
        """The map that ``to_dict`` gave; ValueError for anything else."""
        if values.get("kind") != "logistic":
            raise ValueError(f"unknown kind of calibration {values.get('kind')!r}")
        return cls(values["weights"], values["bias"], values["prior"], values["names"])


def _columns(features) -> np.ndarray:
    features = np.asarray(features, np.float64)
    return features[:, None] if features.ndim == 1 else features


def quality_measures(enrolled: dict, tests: dict):
    """Columns of quality measures of trials, for QMF (Thienpondt et al. 2021).

    ``enrolled`` and ``tests``: {measure: (N,)} of the two sides of each trial; measures are ``MEASURES`` (log of the
    seconds, length of the raw embedding, mean of the cohort scores). Returns (names, (N, 2 x measures)): the smaller
    and the larger value of each. Their difference is a linear function of these, so the regression needs no more.
    """
    names, columns = [], []
    for measure in MEASURES:
        if measure in enrolled:
            names += [f"{measure}_min", f"{measure}_max"]
            columns += [
                np.minimum(enrolled[measure], tests[measure]),
                np.maximum(enrolled[measure], tests[measure]),
            ]
    return names, np.stack(columns, axis=1) if columns else np.empty((0, 0))


def bayes_threshold(prior: float, c_miss: float = 1.0, c_fa: float = 1.0) -> float:
    """The log-likelihood ratio from which accepting costs less: log(c_fa (1 - prior) / (c_miss prior))."""
    return float(np.log(c_fa * (1 - prior) / (c_miss * prior)))


def calibrated_llrs(scores, labels, folds=5, seed=0):
    """Map scores to log-likelihood ratios by logistic regression, each fold with a map learnt on the others.

    A cosine is no likelihood ratio; actDCF and Cllr of one are meaningless without this. Natural logarithm.
    """
    scores, labels = checked_trials(scores, labels)
    if np.ptp(scores) <= 1e-12 * np.abs(scores).max():
        return np.zeros(len(scores))  # a collapsed model: equal scores say nothing
    order = np.random.default_rng(seed).permutation(len(scores))
    order = order[np.argsort(labels[order], kind="stable")]  # both classes in every fold
    fold = np.empty(len(scores), np.int64)
    fold[order] = np.arange(len(scores)) % max(2, min(folds, np.bincount(labels).min()))
    llrs = np.empty(len(scores))
    for k in range(fold.max() + 1):
        learn = fold != k
        if len(np.unique(labels[learn])) < 2:  # a single trial of a class: nothing to hold out
            learn = np.ones(len(scores), bool)
        llrs[fold == k] = LogisticCalibration.fit(scores[learn], labels[learn]).llrs(scores[fold == k])
    return llrs
