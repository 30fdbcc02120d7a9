"""Cosine, cohort normalisation, PLDA, calibration and the whole back-end, against short independent versions."""

import json

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from errors import UsageError
from scoring.backend import Backend
from scoring.calibration import LogisticCalibration, bayes_threshold, quality_measures
from scoring.cosine import cosine_scores, length_normalize, paired_products, score_pairs
from scoring.normalization import as_norm, cohort_statistics, s_norm, speaker_means, symmetric_norm
from scoring.plda import PLDA, expectation_maximization, lda


def voices(speakers, utterances, dimension=8, spread=0.5, seed=0):
    """Embeddings (N, D) float32 around a random place for each speaker, and the speakers (N,)."""
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(speakers), utterances)
    places = rng.standard_normal((speakers, dimension)) * np.linspace(2, 0.5, dimension) + 0.7
    return (places[names] + spread * rng.standard_normal((len(names), dimension))).astype(np.float32), names


def all_pairs(names):
    pairs = np.stack(np.triu_indices(len(names), 1), axis=1)
    return pairs, (names[pairs[:, 0]] == names[pairs[:, 1]]).astype(int)


def cosine(a, b):
    return float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b))


def test_cosine_scores_against_a_loop_with_and_without_the_mean():
    x, _ = voices(30, 5)
    pairs = np.random.default_rng(1).integers(0, len(x), (1500, 2))  # several blocks, the last not full
    mean = x.mean(axis=0)
    for m in (None, mean):
        y = (x if m is None else x - m).astype(np.float64)
        assert np.allclose(cosine_scores(x, pairs, m), [cosine(y[a], y[b]) for a, b in pairs], atol=2e-6)
    assert np.allclose(cosine_scores(x.astype(float), pairs), score_pairs(x[:, None], pairs), atol=1e-14)


def test_pairs_outside_the_embeddings_are_refused():
    x, _ = voices(3, 2)
    for pair in ([0, 6], [-1, 0]):
        with pytest.raises(ValueError, match="column must lie between 0 and 5"):
            paired_products(x, x, np.array([pair]))
    assert cosine_scores(x, np.empty((0, 2), int)).shape == (0,)


@pytest.mark.parametrize("mode, normalize", [("cosine", True), ("euclidean", True), ("euclidean", False)])
def test_scores_of_several_crops_against_loops(mode, normalize):
    x = np.random.default_rng(0).standard_normal((6, 3, 5))
    pairs = np.array([[0, 1], [2, 3], [4, 4], [5, 0]])
    y = x / np.linalg.norm(x, axis=2, keepdims=True) if normalize else x
    if mode == "cosine":
        expected = [np.mean([u @ v for u in y[a] for v in y[b]]) for a, b in pairs]
    else:
        expected = [-np.mean([np.linalg.norm(u - v) for u in y[a] for v in y[b]]) for a, b in pairs]
    assert np.allclose(score_pairs(x, pairs, mode, normalize), expected, atol=1e-12)


def test_zero_and_non_finite_embeddings():
    x = np.ones((4, 3), np.float32)
    x[1], x[2, 0], x[3, 1] = 0, np.nan, np.inf
    scores = cosine_scores(x, np.array([[0, 0], [0, 1], [0, 2], [0, 3]]))
    assert scores[0] == pytest.approx(1) and scores[1] == 0 and np.isnan(scores[2:]).all()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("top_n", [1, 7, 40, 0, 500])
def test_cohort_statistics_equal_the_sorted_scores(top_n, ties):
    rng = np.random.default_rng(0)
    x, cohort = rng.standard_normal((45, 6)), rng.standard_normal((90, 6))
    if ties:  # small integers: many equal scores, and sums that are exact in float32
        x, cohort = np.round(x), np.round(cohort)
    x, cohort = x.astype(np.float32), cohort.astype(np.float32)
    x[3, 2] = np.nan
    mean, deviation = cohort_statistics(x, cohort, top_n, block=16)
    for i in range(len(x)):
        top = sorted((x[i] @ c for c in cohort), reverse=True)[: top_n or None]
        expected = (np.mean(top, dtype=float), np.std(top, dtype=float)) if i != 3 else (np.nan, np.nan)
        assert np.allclose((mean[i], deviation[i]), expected, atol=0 if ties else 1e-6, rtol=1e-12, equal_nan=True)


def test_as_norm_and_s_norm_against_the_naive_way():
    x, names = voices(5, 4, seed=1)
    cohort = length_normalize(voices(60, 1, seed=2)[0])
    x = length_normalize(x)
    pairs, _ = all_pairs(names)
    scores = cosine_scores(x, pairs)
    for top_n, got in ((10, as_norm(x, pairs, scores, cohort, 10)), (60, s_norm(x, pairs, scores, cohort))):
        for (a, b), score, normalised in zip(pairs, scores, got):
            sides = [np.sort(cohort @ x[i])[-top_n:].astype(float) for i in (a, b)]
            assert normalised == pytest.approx(np.mean([(score - s.mean()) / s.std() for s in sides]), abs=1e-5)


def test_a_cohort_without_spread_and_a_bad_one():
    same = np.ones((4, 2), np.float32)
    statistics = cohort_statistics(same, same, 2)
    assert (statistics[1] == 0).all()
    assert np.isfinite(symmetric_norm(np.ones(4), statistics, statistics)).all()
    with pytest.raises(ValueError, match="NaN or Inf"):
        cohort_statistics(same, same * np.nan)
    with pytest.raises(ValueError, match="empty"):
        cohort_statistics(same, same[:0])


def test_speaker_means_against_a_loop():
    x, names = voices(4, 3)
    order = np.random.default_rng(0).permutation(len(x))
    got_names, means = speaker_means(x[order], names[order].astype(str))
    assert got_names == ["0", "1", "2", "3"]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert np.allclose(means, [unit[names == n].mean(axis=0) for n in range(4)], atol=1e-6)


def test_expectation_maximization_finds_the_model_and_never_loses_likelihood():
    rng = np.random.default_rng(0)
    between, within = np.diag([4.0, 1.0]), np.array([[0.6, 0.2], [0.2, 0.4]])
    count = rng.integers(1, 6, 600)
    speakers = np.repeat(np.arange(600), count)
    places = rng.multivariate_normal([1, -2], between, 600)
    z = places[speakers] + rng.multivariate_normal([0, 0], within, len(speakers))
    mean, b, w, history = expectation_maximization(z, speakers, 200, 1e-9)
    assert (np.diff(history) > -1e-12).all()
    assert np.allclose(mean, [1, -2], atol=0.2) and np.allclose(w, within, atol=0.05)
    assert np.allclose(b, between, atol=0.6)
    mean, b, w, _ = expectation_maximization(z, speakers, 4, 0)
    stated = expectation_maximization(z, speakers, 5, 0)[3][-1]
    total = 0
    for s in range(600):
        own = z[speakers == s]
        n = len(own)
        covariance = np.kron(np.ones((n, n)), b) + np.kron(np.eye(n), w)
        total += multivariate_normal.logpdf(own.ravel(), np.tile(mean, n), covariance)
    assert stated == pytest.approx(total / z.size, abs=1e-10)


def naive_log_ratio(plda, enrolled, test):
    """Joint density of all utterances as one speaker over that as two, in the model's coordinates."""

    def log_density(utterances):
        n = len(utterances)
        covariance = np.kron(np.ones((n, n)), np.diag(plda.psi)) + np.eye(n * len(plda.psi))
        return multivariate_normal.logpdf(np.ravel(utterances), np.zeros(n * len(plda.psi)), covariance)

    return log_density([*enrolled, test]) - log_density(enrolled) - log_density([test])


def test_plda_scores_are_the_gaussian_log_density_ratio():
    x, names = voices(60, 4)
    plda, history = PLDA.fit(x, names, lda_dimension=5)
    assert history[-1] > history[0] and plda.psi.shape == (5,) and (np.diff(plda.psi) <= 0).all()
    z = plda.project(x)
    backend = Backend(plda=plda)
    for n in (1, 2, 4):
        expected = [naive_log_ratio(plda, z[:n], t) for t in z[4:9]]
        assert np.allclose(backend.score(x[:n], x[4:9]), expected, atol=1e-9)
    pairs, labels = all_pairs(names)
    scores = backend.score_trials(x, x, pairs)[0]
    assert scores[labels == 1].mean() > 0 > scores[labels == 0].mean()


def test_lda_separates_and_whitens():
    x, names = voices(40, 6)
    x = x.astype(float)
    projection = lda(x - x.mean(axis=0), names)
    z = (x - x.mean(axis=0)) @ projection
    means = np.stack([z[names == n].mean(axis=0) for n in range(40)])
    assert np.allclose(np.cov((z - means[names]).T, bias=True), np.eye(8), atol=1e-4)
    spread = np.cov(means.T, bias=True)
    assert np.allclose(spread, np.diag(np.diag(spread)), atol=1e-8) and (np.diff(np.diag(spread)) < 0).all()


@pytest.mark.parametrize("bad", ["nan", "one speaker", "one utterance each"])
def test_plda_refuses_what_cannot_train_it(bad):
    x, names = voices(5, 3)
    if bad == "nan":
        x[2, 2] = np.nan
    names = {"one speaker": names * 0, "one utterance each": np.arange(15)}.get(bad, names)
    with pytest.raises(ValueError, match="PLDA"):
        PLDA.fit(x, names)


def test_calibration_recovers_the_true_log_likelihood_ratio():
    rng = np.random.default_rng(0)
    labels = (np.arange(200_000) % 10 == 0).astype(int)
    scores = rng.normal(np.where(labels == 1, 0.5, -0.1), 0.2)  # the true ratio is 15 s - 3
    for prior in (0.5, 0.05):
        map_ = LogisticCalibration.fit(scores, labels, prior)
        assert map_.weights[0] == pytest.approx(15, abs=0.4) and map_.bias == pytest.approx(-3, abs=0.2)
    again = LogisticCalibration.from_dict(json.loads(json.dumps(map_.to_dict())))
    assert np.array_equal(again.llrs(scores), map_.llrs(scores))


def test_calibration_minimises_the_prior_weighted_cost():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 400)
    x = rng.normal(labels[:, None] * [1.0, 0.4, 0.0], [1, 2, 30])
    prior = 0.1

    def cost(weights, bias):
        odds = x @ weights + bias + np.log(prior / (1 - prior))
        target, nontarget = np.logaddexp(0, -odds[labels == 1]).mean(), np.logaddexp(0, odds[labels == 0]).mean()
        return prior * target + (1 - prior) * nontarget

    found = LogisticCalibration.fit(x, labels, prior, ["a", "b", "c"])
    best = cost(found.weights, found.bias)
    for step in np.eye(4) * [1, 1, 0.1, 1] * 0.02:
        for sign in (-1, 1):
            assert cost(found.weights + sign * step[:3], found.bias + sign * step[3]) > best


def test_fusion_beats_each_system_and_separable_trials_stay_finite():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, 4000)
    systems = rng.normal(labels[:, None] * [1.0, 1.0], 1.0)

    def errors(llrs):
        return np.mean((llrs > 0) != labels)

    fused = LogisticCalibration.fit(systems, labels, names=["one", "two"]).llrs(systems)
    assert errors(fused) < 0.9 * min(errors(LogisticCalibration.fit(s, labels).llrs(s)) for s in systems.T)
    apart = LogisticCalibration.fit(np.arange(20), np.arange(20) >= 10)
    assert np.isfinite(apart.weights).all() and apart.weights[0] > 1


def test_calibration_refuses_bad_input():
    for x, labels, message in (
        ([1.0, np.nan], [0, 1], "NaN or Inf"),
        ([1.0, 2.0], [1, 1], "target and nontarget"),
        ([1.0, 2.0], [0, 1, 1], "labels of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            LogisticCalibration.fit(x, labels)
    with pytest.raises(ValueError, match="the calibration takes score"):
        LogisticCalibration([1.0], 0).llrs(np.ones((3, 2)))


def test_quality_measures_are_the_smaller_and_the_larger_side():
    names, x = quality_measures(
        {"magnitude": np.array([1.0, 5]), "log_duration": np.array([2.0, 2])},
        {"magnitude": np.array([3.0, 4]), "log_duration": np.array([1.0, 3])},
    )
    assert names == ["log_duration_min", "log_duration_max", "magnitude_min", "magnitude_max"]
    assert x.tolist() == [[1, 2, 1, 3], [2, 3, 4, 5]]


@pytest.fixture
def chain():
    """A back-end with every stage, and embeddings to score."""
    x, names = voices(20, 6, seed=3)
    rng = np.random.default_rng(0)
    seconds = rng.uniform(2, 9, len(x))
    backend = Backend(mean=x.mean(axis=0), identity="abc", prior=0.1)
    backend.set_cohort(*voices(50, 3, seed=4), top_n=20)
    pairs, labels = all_pairs(names)
    scores, columns, features = backend.score_trials(x, x, pairs, None, seconds, seconds)
    backend.calibration = LogisticCalibration.fit(features, labels, 0.1, columns)
    return backend, x, names, pairs, labels, seconds, scores, features


def test_the_chain_equals_its_parts(chain):
    backend, x, _, pairs, _, seconds, scores, features = chain
    y = length_normalize(x - x.mean(axis=0))
    raw, names = voices(50, 3, seed=4)
    cohort = length_normalize(speaker_means(raw - x.mean(axis=0), names)[1])
    assert np.allclose(scores, as_norm(y, pairs, cosine_scores(y, pairs), cohort, 20), atol=1e-5)
    assert len(backend.calibration.names) == 7 and features.shape == (len(pairs), 7)
    magnitude = np.linalg.norm(x, axis=1)
    column = backend.calibration.names.index("magnitude_max")
    assert np.allclose(features[:, column], np.maximum(*magnitude[pairs.T]), atol=1e-5)
    a, b = pairs[5]
    assert backend.score(x[a], x[b]) == pytest.approx(scores[5], abs=1e-5)
    llr = backend.llr(x[a], x[b], seconds[a], seconds[b])
    assert backend.needs_durations and llr == pytest.approx(backend.calibration.llrs(features[5:6])[0], abs=1e-4)
    assert backend.decision(llr) == (llr >= np.log(9)) and bayes_threshold(0.1) == pytest.approx(np.log(9))
    assert backend.probability(0.0) == pytest.approx(0.1) and backend.probability(np.log(9)) == pytest.approx(0.5)
    assert backend.probability(np.array([-1e4, 1e4])).tolist() == [0, 1]
    with pytest.raises(UsageError, match="needs log_duration_min, log_duration_max of each trial"):
        backend.llr(x[a], x[b])


@pytest.mark.parametrize("kind", ["cosine", "plda"])
@pytest.mark.parametrize("enrollment", ["mean", "scores"])
def test_enrollment_from_several_utterances(kind, enrollment):
    x, _ = voices(12, 5, seed=5)
    plda = PLDA.fit(*voices(60, 4, seed=6))[0] if kind == "plda" else None
    backend = Backend(plda=plda, enrollment=enrollment)
    backend.set_cohort(voices(40, 1, seed=7)[0], top_n=10)
    enrolled, models = x[[0, 5, 1, 2, 6]], np.array([0, 1, 0, 0, 1])
    pairs = np.array([[0, 3], [1, 3], [1, 8], [0, 8]])
    got = backend.score_trials(enrolled, x, pairs, models, np.full(5, 2.0), np.full(60, 3.0))
    for (model, test), score in zip(pairs, got[0]):
        rows = enrolled[models == model]
        assert backend.score(rows, x[test]) == pytest.approx(score, abs=1e-5)
        if enrollment == "scores":
            assert np.mean([backend.score(row, x[test]) for row in rows]) == pytest.approx(score, abs=1e-5)
    if kind == "cosine" and enrollment == "mean":
        unit = length_normalize(enrolled[models == 0]).mean(axis=0)
        assert backend.score(unit, x[3]) == pytest.approx(got[0][0], abs=1e-5)
    assert got[1][0] == "score" and np.array_equal(got[2][:, 0], got[0])
    assert np.allclose(got[2][:, 1], np.log(2 if enrollment == "scores" else 3))


@pytest.mark.parametrize("kind", ["cosine", "plda"])
def test_a_saved_backend_scores_the_same(chain, tmp_path, kind):
    backend, x, names, pairs, _, seconds, _, _ = chain
    if kind == "plda":
        backend.plda = PLDA.fit(x - backend.mean, names)[0]
        backend.set_cohort(x, names, 5)
    backend.threshold = 0.25
    backend.save(tmp_path / "b.npz")
    loaded = Backend.load(tmp_path / "b.npz", "abc")
    before, after = (b.score_trials(x, x, pairs, None, seconds, seconds) for b in (backend, loaded))
    assert np.array_equal(before[2], after[2]) and before[1] == after[1]
    assert loaded.header() == backend.header() and loaded.describe() == backend.describe()
    with pytest.raises(UsageError, match=r"b\.npz: made with embeddings of another model \(abc, this one is xyz\)"):
        Backend.load(tmp_path / "b.npz", "xyz")


def test_a_calibration_without_arrays_is_json(chain, tmp_path):
    backend = Backend(calibration=LogisticCalibration([12.0], -3.0), threshold=1.5, identity="m")
    backend.save(tmp_path / "model_best.calibration")
    assert json.loads((tmp_path / "model_best.calibration").read_text())["calibration"]["weights"] == [12.0]
    loaded = Backend.load(tmp_path / "model_best.calibration")
    assert loaded.llr(np.array([1.0, 0]), np.array([1.0, 0])) == pytest.approx(9) and loaded.decision(1.5)
    with pytest.raises(UsageError, match=r"saved as \.npz"):
        chain[0].save(tmp_path / "b.json")


def test_damaged_files_and_missing_stages_are_usage_errors(chain, tmp_path):
    whole = tmp_path / "b.npz"
    chain[0].save(whole)
    content = whole.read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "old.json").write_text(json.dumps({**chain[0].header(), "format_version": 9}))
    (tmp_path / "other.json").write_text(json.dumps({**chain[0].header(), "score": "euclidean"}))
    np.savez(tmp_path / "foreign.npz", x=np.ones(3))
    for name in ("half.npz", "text.npz", "foreign.npz", "old.json", "other.json", "none.npz"):
        with pytest.raises(UsageError, match=name):
            Backend.load(tmp_path / name)
    size = chain[1].shape[1]
    with pytest.raises(UsageError, match=rf"b\.npz: for embeddings of size {size}, these are of {size + 1}"):
        Backend.load(whole).score(np.ones(size + 1), np.ones(size + 1))
    for call in (lambda b: b.llr(np.ones(2), np.ones(2)), lambda b: b.decision(0.5)):
        with pytest.raises(UsageError, match="calibration"):
            call(Backend())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prior", 1.5),
        ("prior", float("nan")),
        ("threshold", float("nan")),
        ("calibration", []),
        ("calibration", {"weights": [float("nan")]}),
        ("calibration", {"weights": [[1.0]]}),
        ("calibration", {"bias": float("inf")}),
        ("calibration", "logistic"),
        ("calibration", [1]),
    ],
)
def test_values_that_would_decide_wrongly_without_a_word_are_refused(tmp_path, key, value):
    header = Backend(calibration=LogisticCalibration([12.0], -3.0)).header()
    value = {**header["calibration"], **value} if isinstance(value, dict) else value
    path = tmp_path / "model_best.calibration"
    path.write_text(json.dumps({**header, key: value}))
    with pytest.raises(UsageError, match="damaged, or not a back-end"):
        Backend.load(path)


def test_a_header_nested_without_end_is_a_usage_error(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100000)
    with pytest.raises(UsageError, match="damaged"):
        Backend.load(tmp_path / "deep.json")


@pytest.mark.parametrize("enrollment", ["mean", "scores"])
def test_a_model_without_an_utterance_is_refused(enrollment):
    x, pairs = np.random.default_rng(0).normal(size=(3, 4)), np.array([[1, 0], [2, 1]])
    with pytest.raises(ValueError, match=r"models must be numbered 0 \.\. 2 without gaps"):
        Backend(enrollment=enrollment).score_trials(x, x, pairs, [0, 0, 2])
