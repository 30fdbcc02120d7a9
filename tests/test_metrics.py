"""tuneThreshold.py against independent short versions."""

import itertools

import numpy as np
import pytest

import tuneThreshold as tt


def trials(seed, n=400, ties=False):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    labels[:2] = 0, 1
    scores = rng.normal(labels * 1.5, 1)
    return (np.round(scores, 1) if ties else scores), labels


def naive_rates(scores, labels):
    """Operating points (miss, false alarm) for 'accept >= t' at every t, in rising t."""
    points = []
    for t in [*sorted(set(scores)), np.inf]:
        accept = [s >= t for s in scores]
        miss = sum(1 for a, y in zip(accept, labels) if y == 1 and not a) / sum(labels)
        alarm = sum(1 for a, y in zip(accept, labels) if y == 0 and a) / (len(labels) - sum(labels))
        points.append((miss, alarm))
    return points


def naive_eer(scores, labels):
    points = naive_rates(scores, labels)
    for (m0, a0), (m1, a1) in itertools.pairwise(points):
        if m1 >= a1:
            share = (a0 - m0) / ((a0 - m0) + (m1 - a1))
            return 100 * (m0 + share * (m1 - m0))
    raise AssertionError("the rates never cross")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_eer(seed, ties):
    scores, labels = trials(seed, 120, ties)
    eer, threshold = tt.ComputeEER(scores, labels)
    assert eer == pytest.approx(naive_eer(list(scores), list(labels)), abs=1e-9)
    assert scores.min() <= threshold <= scores.max() + 1e-9
    order = np.random.default_rng(seed).permutation(len(scores))
    assert tt.ComputeEER(scores[order], labels[order]) == (pytest.approx(eer), pytest.approx(threshold))


@pytest.mark.parametrize("prior", [0.01, 0.05, 0.5, 0.9])
def test_min_dcf(prior):
    scores, labels = trials(5, 150, ties=True)
    costs = [m * prior * 2.0 + a * (1 - prior) * 3.0 for m, a in naive_rates(scores, labels)]
    value, _ = tt.ComputeMinDcf(*tt.ComputeErrorRates(scores, labels), prior, 2.0, 3.0)
    assert value == pytest.approx(min(costs) / min(2.0 * prior, 3.0 * (1 - prior)))


def test_voxceleb_trainer_results_without_ties():
    scores, labels = trials(7)
    fnrs, fprs, thresholds = tt.ComputeErrorRates(list(scores), list(labels))
    order = np.argsort(scores)
    assert np.allclose(thresholds, scores[order])
    assert np.allclose(fnrs, np.cumsum(labels[order]) / labels.sum())
    assert np.allclose(fprs, 1 - np.cumsum(1 - labels[order]) / (1 - labels).sum())
    tuned, eer, fpr, fnr = tt.tuneThresholdfromScore(scores, labels, [1, 0.1], [0.2])
    assert len(tuned) == 3 and abs(tuned[0][2] - 0.2) < 0.02 and abs(tuned[2][1] - 0.1) < 0.02
    assert eer == pytest.approx(100 * min(np.maximum(fpr, fnr)), abs=0.6)


def test_act_dcf_and_cllr_by_hand():
    llrs, labels = np.array([4.0, 1.0, -2.0, 3.5]), [1, 1, 0, 0]
    # log(0.95 / 0.05) = 2.94: one of two targets missed, one of two nontargets accepted
    assert tt.ComputeActDcf(llrs, labels, 0.05, 1, 1) == pytest.approx((0.5 * 0.05 + 0.5 * 0.95) / 0.05)
    by_hand = (np.log2(1 + np.exp(-4)) + np.log2(1 + np.exp(-1))) / 4 + (
        np.log2(1 + np.exp(-2)) + np.log2(1 + np.exp(3.5))
    ) / 4
    assert tt.ComputeCllr(llrs, labels) == pytest.approx(by_hand)
    assert tt.ComputeCllr([0.0, 0.0], [0, 1]) == pytest.approx(1.0)


def test_perfect_and_useless_scores():
    assert tt.ComputeEER([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1])[0] == 0
    assert tt.ComputeEER([0.5] * 4, [0, 0, 1, 1])[0] == pytest.approx(50)
    assert tt.ComputeMinDcf(*tt.ComputeErrorRates([0.5] * 4, [0, 0, 1, 1]), 0.05, 1, 1)[0] == pytest.approx(1)


FUNCTIONS = [
    lambda s, y: tt.ComputeEER(s, y),
    lambda s, y: tt.ComputeErrorRates(s, y),
    lambda s, y: tt.tuneThresholdfromScore(s, y, [0.1]),
    lambda s, y: tt.ComputeActDcf(s, y, 0.05, 1, 1),
    lambda s, y: tt.ComputeCllr(s, y),
    lambda s, y: tt.bootstrap_interval(s, y, draws=50),
    lambda s, y: tt.evaluation_metrics(s, y),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_is_filtered_before_anything_sorts_and_said(function, capsys):  # bug 24
    scores, labels = trials(9)
    clean = function(scores, labels)
    capsys.readouterr()
    dirty = function(np.append(scores, [np.nan, np.inf]), np.append(labels, [1, 0]))
    assert "filtered 2 of 402 scores" in capsys.readouterr().err
    assert repr(clean) == repr(dirty)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "scores, labels", [([], []), ([1.0, 2.0], [1, 1]), ([1.0, 2.0], [0, 2]), ([1.0], [0, 1]), ([np.nan] * 2, [0, 1])]
)
def test_trials_that_define_no_rate_are_a_value_error(function, scores, labels):
    with pytest.raises(ValueError):
        function(scores, labels)


def test_bootstrap_interval_covers_the_true_eer():  # bug 5
    from scipy.stats import norm

    true = 100 * norm.cdf(-0.75)
    intervals = [tt.bootstrap_interval(*trials(seed, 600), draws=200)["eer"] for seed in range(40)]
    covered = sum(low <= true <= high for low, high in intervals)
    assert covered >= 34 and all(high - low > 1 for low, high in intervals)


def test_figures_of_a_score_file_by_group(tmp_path, capsys):
    path = tmp_path / "trials.txt"
    lines = [f"{0.1 * i + (i % 2)} {i % 2} aa{i}/x aa{i + 1 - i % 2}/y" for i in range(20)]
    path.write_text("\n".join([*lines, "0.3 1 bb1/x bb1/y", "0.4 1 bb2/x bb2/y"]) + "\n")
    assert tt.main([str(path), "--prefix", "2"]) == 0
    heading, pooled, first, second, *_ = capsys.readouterr().out.splitlines()
    assert heading.split()[:3] == ["group", "EER", "%"] and pooled.split()[0] == "pooled"
    assert pooled.split()[-2:] == ["22", "12"] and first.split()[0] == "aa" and float(first.split()[1]) > 0
    assert second.split()[:6] == ["bb", "only", "targets:", "no", "EER", "100.00"]


def test_calibration_makes_cosines_meaningful():
    scores, labels = trials(11, 4000)
    llrs = tt.calibrated_llrs(scores * 0.1 + 0.3, labels)
    assert (
        tt.ComputeActDcf(llrs, labels, 0.05, 1, 1)
        < 1.15 * tt.ComputeMinDcf(*tt.ComputeErrorRates(scores, labels), 0.05, 1, 1)[0]
    )
    assert tt.ComputeCllr(llrs, labels) < tt.ComputeCllr(scores * 0.1 + 0.3, labels)
