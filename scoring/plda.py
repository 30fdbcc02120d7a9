"""PLDA as the two-covariance model, with LDA and length normalisation before it."""

import numpy as np
import scipy

from scoring.cosine import length_normalize

ARRAYS = ("center", "projection", "mean", "transform", "psi")


class PLDA:
    """Two-covariance PLDA: a speaker is y ~ N(mean, B), an utterance of it x ~ N(y, W).

    Embeddings are centred, projected by LDA, length-normalised to sqrt(dimension), then rotated so that W is the
    identity and B is diagonal (``psi``); in those coordinates every score is a sum over dimensions.
    """

    def __init__(self, center, projection, mean, transform, psi):
        self.center, self.projection, self.mean, self.transform, self.psi = (
            np.ascontiguousarray(a, np.float64)  # the layout of a saved file, in which sums run in the same order
            for a in (center, projection, mean, transform, psi)
        )

    @classmethod
    def fit(cls, x, speakers, lda_dimension: int = 0, iterations: int = 50, tolerance: float = 1e-5):
        """Learn from embeddings (N, D) with a speaker each: LDA, length normalisation, EM.

        ``lda_dimension`` 0 keeps min(D, speakers - 1). EM stops after ``iterations`` or if the log-likelihood of a
        value grows by less than ``tolerance``. Returns (model, log-likelihood after each iteration). Fewer than two
        speakers, or no speaker with two utterances, is a ValueError.
        """
        x = np.asarray(x, np.float64)
        speakers = np.unique(np.asarray(speakers), return_inverse=True)[1]
        if not np.isfinite(x).all():
            raise ValueError("embeddings to train PLDA on hold NaN or Inf")
        if speakers.max() < 1 or np.bincount(speakers).max() < 2:
            raise ValueError("PLDA needs two speakers and a speaker with two utterances")
        center = x.mean(axis=0)
        projection = lda(x - center, speakers, lda_dimension)
        z = length_normalize((x - center) @ projection) * np.sqrt(projection.shape[1])
        mean, between, within, history = expectation_maximization(z, speakers, iterations, tolerance)
        psi, vectors = scipy.linalg.eigh(between, within)  # vectors.T @ within @ vectors is the identity
        return cls(center, projection, mean, vectors[:, ::-1], np.maximum(psi[::-1], 0.0)), history

    def project(self, x) -> np.ndarray:
        """Embeddings (..., D) to the coordinates of the model (..., d), float64."""
        z = (np.asarray(x, np.float64) - self.center) @ self.projection
        return (length_normalize(z) * np.sqrt(self.projection.shape[1]) - self.mean) @ self.transform

    def enrolled_vectors(self, means, counts=1) -> np.ndarray:
        """Vectors (M, 2 d + 1) whose dot products with ``test_vectors`` are log-likelihood ratios.

        ``means`` (M, d): mean of the ``project``-ed utterances of each speaker, ``counts`` (M,): how many they are.
        The speaker given n utterances of mean m is N(n psi m / (n psi + 1), psi / (n psi + 1)) (Ioffe 2006,
        "Probabilistic linear discriminant analysis"; Bruemmer and de Villiers 2010, "Speaker partitioning").
        """
        means = np.asarray(means, np.float64)
        counts = np.broadcast_to(np.asarray(counts, np.float64), (len(means),))[:, None]
        gain = counts * self.psi / (counts * self.psi + 1)
        expected = gain * means
        same = 1 + self.psi / (counts * self.psi + 1)
        other = 1 + self.psi
        # log N(t; expected, same) - log N(t; 0, other), sorted by powers of t
        linear = expected / same
        square = (1 / other - 1 / same) / 2
        constant = (np.log(other / same) - expected**2 / same).sum(axis=1, keepdims=True) / 2
        return np.concatenate([linear, square, constant], axis=1)

    def test_vectors(self, z) -> np.ndarray:
        """Vectors (N, 2 d + 1) of ``project``-ed test utterances (N, d)."""
        z = np.asarray(z, np.float64)
        return np.concatenate([z, z**2, np.ones((len(z), 1))], axis=1)

    def arrays(self) -> dict:
        """The model as named arrays, for npz."""
        return {name: getattr(self, name) for name in ARRAYS}


def lda(x, speakers, dimension: int = 0) -> np.ndarray:
    """Linear discriminant analysis of x (N, D) with speakers (N,) 0 .. S-1: projection (D, d), within-class white.

    ``dimension`` 0, or too large, keeps min(D, S - 1).
    """
    count = np.bincount(speakers)
    means = np.stack([np.bincount(speakers, column) for column in x.T], axis=1) / count[:, None]
    residual = x - means[speakers]
    within = residual.T @ residual / len(x)
    centred = means - x.mean(axis=0)
    between = (centred.T * count) @ centred / len(x)
    # the ridge gives directions that no speaker varies in a finite, small weight
    within += np.eye(len(within)) * 1e-6 * np.trace(within) / len(within)
    vectors = scipy.linalg.eigh(between, within)[1][:, ::-1]
    most = min(x.shape[1], len(count) - 1)
    return vectors[:, : min(dimension, most) if dimension > 0 else most]


def expectation_maximization(z, speakers, iterations: int = 50, tolerance: float = 1e-5):
    """Maximum likelihood of the two-covariance model on z (N, d), speakers (N,) 0 .. S-1.

    Returns (mean (d,), between (d, d), within (d, d), log-likelihood per value before each update).
    """
    count = np.bincount(speakers)
    means = np.stack([np.bincount(speakers, column) for column in z.T], axis=1) / count[:, None]
    residual = z - means[speakers]
    scatter = residual.T @ residual  # around the speaker means: no iteration changes it
    mean = means.mean(axis=0)
    within = scatter / max(len(z) - len(count), 1)
    within += np.eye(len(within)) * 1e-6 * np.trace(within) / len(within)
    between = np.cov(means.T, bias=True).reshape(within.shape) + within * 1e-3
    history = []
    for _ in range(iterations):
        # In the coordinates where within is the identity and between diagonal, each posterior is a sum over dimensions.
        psi, vectors = scipy.linalg.eigh(between, within)
        back = np.linalg.inv(vectors)
        centred = (means - mean) @ vectors
        history.append(_log_likelihood(psi, vectors, centred, scatter, count) / z.size)
        gain = count[:, None] * psi / (count[:, None] * psi + 1)
        posterior = gain * centred  # speaker minus mean, expected, (S, d)
        variance = psi / (count[:, None] * psi + 1)
        error = centred - posterior
        shift = posterior.mean(axis=0)
        new_between = np.diag(variance.mean(axis=0)) + posterior.T @ posterior / len(count) - np.outer(shift, shift)
        new_within = (error.T * count) @ error + np.diag((count[:, None] * variance).sum(axis=0))
        mean = mean + shift @ back
        between = back.T @ new_between @ back
        within = (scatter + back.T @ new_within @ back) / len(z)
        between, within = (between + between.T) / 2, (within + within.T) / 2
        if len(history) > 1 and history[-1] - history[-2] < tolerance:
            break
    return mean, between, within, history


def _log_likelihood(psi, vectors, centred, scatter, count) -> float:
    """Log-likelihood of all utterances: speaker means and residuals, in coordinates where within is the identity."""
    n = count[:, None]
    values = count.sum() * len(psi)
    # n utterances of a speaker: their mean ~ N(0, psi + 1/n), their residuals ~ N(0, 1) in n - 1 directions
    fit = (n * centred**2 / (n * psi + 1) + np.log(n * psi + 1)).sum()
    residual = np.einsum("di,de,ei->", vectors, scatter, vectors)
    log_determinant = 2 * count.sum() * np.linalg.slogdet(vectors)[1]
    return (log_determinant - values * np.log(2 * np.pi) - fit - residual) / 2
