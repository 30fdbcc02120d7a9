"""Calibration: scores, and quality measures of the two sides of a trial, to natural-log likelihood ratios."""

import numpy as np

from scoring.error_rates import checked_trials, softplus

MEASURES = ("log_duration", "magnitude", "cohort_mean")
FOLDS = 5  # of speakers, for likelihood ratios of the trials that teach them
RIDGE, MOST_STEPS = 1e-3, 200  # of the regression: a weight on its slopes, shared by all trials; Newton's steps


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
        weight = np.where(labels == 1, prior / targets, (1 - prior) / (len(labels) - targets))
        slopes, intercept = _regression((x - center) / scale, labels, weight, RIDGE / len(labels))
        weights = slopes / scale
        # Trained on trials weighted to the prior, the regression gives posterior log odds: take the prior's off again.
        bias = intercept - weights @ center - np.log(prior / (1 - prior))
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


def _regression(x, labels, weight, ridge: float):
    """Slopes (K,) and intercept of the logistic regression of labels (N,) 0/1 on x (N, K), by Newton's method.

    Minimises sum of weight (N,) x log loss + ridge / 2 x slopes squared; a step that does not lower it is halved.
    """
    x = np.column_stack([x, np.ones(len(x))])
    sign, penalty = 1.0 - 2.0 * labels, np.append(np.full(x.shape[1] - 1, ridge), 0.0)

    def cost(theta):
        return weight @ softplus(sign * (x @ theta)) + theta @ (penalty * theta) / 2

    theta = np.zeros(x.shape[1])
    now = cost(theta)
    for _ in range(MOST_STEPS):
        share = 1 / (1 + np.exp(-np.clip(x @ theta, -500, 500)))
        slope = x.T @ (weight * (share - labels)) + penalty * theta
        curvature = (x.T * (weight * share * (1 - share))) @ x + np.diag(penalty)
        step = np.linalg.lstsq(curvature, slope, rcond=None)[0]
        if slope @ step < 1e-14:
            break
        while (then := cost(theta - step)) > now and slope @ step > 1e-14:
            step = step / 2
        if then >= now:
            break
        theta, now = theta - step, then
    return theta[:-1], theta[-1]


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


def calibrated_llrs(scores, labels, speakers=None, prior: float = 0.5, folds: int = FOLDS, seed: int = 0):
    """Map scores (N,), or features (N, K), to natural-log likelihood ratios (N,), each trial by what others taught.

    ``speakers`` (N, 2) of ``trial_speakers`` are dealt into folds. A trial has two speakers; its map is learnt on the
    trials that have none in the folds of these two. Without ``speakers``, or if they are so few that a class would be
    missing, the trials are dealt instead: their maps know the speakers and are a little too good. ``folds_over`` says
    which it was. A cosine is no likelihood ratio; actDCF and Cllr of one are meaningless without this. ``prior``: that
    of ``LogisticCalibration.fit``.
    """
    x = _columns(scores)
    if x.shape[1] == 1:
        checked, labels = checked_trials(x, labels)
        x = checked[:, None]
    labels = np.asarray(labels).astype(np.int64)
    if (np.ptp(x, axis=0) <= 1e-12 * np.abs(x).max(axis=0)).all():
        return np.zeros(len(x))  # a collapsed model: equal scores say nothing
    cells = None if speakers is None else _folds_of_speakers(labels, speakers, folds, seed)
    cells = _folds_of_trials(labels, folds, seed) if cells is None else cells
    llrs = np.empty(len(x))
    for cell in np.unique(cells, axis=0):
        learn = ~np.isin(cells, cell).any(axis=1)
        if len(np.unique(labels[learn])) < 2:  # a single trial of a class: nothing to hold out
            learn = np.ones(len(x), bool)
        mapped = (cells == cell).all(axis=1)
        llrs[mapped] = LogisticCalibration.fit(x[learn], labels[learn], prior, _numbered(x)).llrs(x[mapped])
    return llrs


def folds_over(labels, speakers, folds: int = FOLDS, seed: int = 0) -> str:
    """Over what the folds of ``calibrated_llrs`` are: "speakers" or "trials"."""
    return "trials" if speakers is None or _folds_of_speakers(labels, speakers, folds, seed) is None else "speakers"


def _folds_of_speakers(labels, speakers, folds: int, seed: int):
    """Folds of the two speakers of each trial (N, 2), the lower first; None if what a pair leaves is of one class.

    Speakers are numbered in the order of their numbers, so that a list without some of its trials has the same folds.
    """
    number = np.unique(speakers, return_inverse=True)[1].reshape(-1, 2)
    people = int(number.max()) + 1
    fold = np.empty(people, np.int64)
    fold[np.random.default_rng(seed).permutation(people)] = np.arange(people) % min(folds, people)
    cells, labels = np.sort(fold[number], axis=1), np.asarray(labels)
    for cell in np.unique(cells, axis=0):
        if len(np.unique(labels[~np.isin(cells, cell).any(axis=1)])) < 2:
            return None
    return cells


def _folds_of_trials(labels, folds: int, seed: int):
    """Fold of each trial, twice (N, 2), with both classes in every fold."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    fold = np.empty(len(labels), np.int64)
    fold[order] = np.arange(len(labels)) % max(2, min(folds, np.bincount(labels).min()))
    return np.stack([fold, fold], axis=1)


def _numbered(x) -> tuple:
    return tuple(map(str, range(x.shape[1])))
