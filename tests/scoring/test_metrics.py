"""tuneThreshold.py against independent short versions and published examples."""

import itertools
import math

import numpy as np
import pytest
from sklearn.metrics import roc_curve

import tuneThreshold as tt
from scoring import intervals
from scoring.calibration import calibrated_llrs
from scoring.error_rates import ErrorRates
from scoring.figures import condition_table, evaluation_metrics, table_lines


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


def test_everything_comes_with_a_star_import():  # as voxceleb_trainer's scripts do it
    names = {}
    exec("from tuneThreshold import *", names)
    assert {"tuneThresholdfromScore", "ComputeErrorRates", "ComputeMinDcf", "ComputeEER"} <= names.keys()
    assert {"bootstrap_interval", "calibrated_llrs", "evaluation_metrics", "condition_table"} <= names.keys()


def test_act_dcf_and_cllr_by_hand():
    llrs, labels = np.array([4.0, 1.0, -2.0, 3.5]), [1, 1, 0, 0]
    # log(0.95 / 0.05) = 2.94: one of two targets missed, one of two nontargets accepted
    assert tt.ComputeActDcf(llrs, labels, 0.05, 1, 1) == pytest.approx((0.5 * 0.05 + 0.5 * 0.95) / 0.05)
    by_hand = (np.log2(1 + np.exp(-4)) + np.log2(1 + np.exp(-1))) / 4 + (
        np.log2(1 + np.exp(-2)) + np.log2(1 + np.exp(3.5))
    ) / 4
    assert tt.ComputeCllr(llrs, labels) == pytest.approx(by_hand)
    assert tt.ComputeCllr([0.0, 0.0], [0, 1]) == pytest.approx(1.0)


CASES = {
    "ties": trials(5, 150, ties=True),
    "continuous": trials(6, 150),
    "separable": (np.array([0.1, 0.2, 0.2, 0.8, 0.9]), np.array([0, 0, 0, 1, 1])),
    "inverted": (np.array([0.9, 0.8, 0.2, 0.1]), np.array([0, 0, 1, 1])),
    "equal": (np.full(5, 0.5), np.array([0, 0, 1, 1, 1])),
    "one of each": (np.array([0.3, 0.2]), np.array([1, 0])),
    "few targets": (trials(8, 400)[0], (np.arange(400) % 57 == 3).astype(int)),
}


def naive_pav(scores, labels):
    """Blocks [targets, nontargets] of rising share of targets, equal scores together."""
    blocks = []
    for score in sorted(set(scores)):
        here = [y for s, y in zip(scores, labels) if s == score]
        blocks.append([sum(here), len(here) - sum(here)])
        while len(blocks) > 1 and blocks[-2][0] * sum(blocks[-1]) >= blocks[-1][0] * sum(blocks[-2]):
            last = blocks.pop()
            blocks[-1] = [blocks[-1][0] + last[0], blocks[-1][1] + last[1]]
    return blocks


def lower_hull(points):
    """Andrew's monotone chain over (x, y)."""
    hull = []
    for p in sorted(set(points)):
        while len(hull) > 1:
            (ax, ay), (bx, by) = hull[-2:]
            if (bx - ax) * (p[1] - ay) - (by - ay) * (p[0] - ax) > 0:
                break
            hull.pop()
        hull.append(p)
    return hull


@pytest.mark.parametrize("name", CASES)
def test_every_figure_of_hard_cases(name):
    scores, labels = CASES[name]
    s, y = scores.tolist(), labels.tolist()
    points = naive_rates(s, y)
    rates = ErrorRates.of(scores, labels)
    eer, threshold = tt.ComputeEER(scores, labels)
    assert eer == pytest.approx(naive_eer(s, y), abs=1e-9)
    miss, alarm = rates.at(threshold)
    assert min(miss, alarm) <= eer / 100 + 1e-9 <= max(miss, alarm) + 2e-9
    for prior in (0.01, 0.5, 0.9):
        smallest = min(2 * m * prior + 3 * a * (1 - prior) for m, a in points) / min(2 * prior, 3 * (1 - prior))
        cost, place = rates.min_dcf(prior, 2.0, 3.0)
        assert cost == pytest.approx(smallest)
        assert tt.ComputeMinDcf(*tt.ComputeErrorRates(scores, labels), prior, 2, 3)[0] == pytest.approx(smallest)
        m, a = rates.at(place)
        assert 2 * m * prior + 3 * a * (1 - prior) == pytest.approx(smallest * min(2 * prior, 3 * (1 - prior)))
        bayes = math.log(3 * (1 - prior) / (2 * prior))
        errors = [sum(1 for v, w in zip(s, y) if w == c and (v >= bayes) != c) for c in (1, 0)]
        actual = 2 * prior * errors[0] / sum(y) + 3 * (1 - prior) * errors[1] / (len(y) - sum(y))
        assert tt.ComputeActDcf(s, y, prior, 2, 3) == pytest.approx(actual / min(2 * prior, 3 * (1 - prior)))
    hull = lower_hull([(a, m) for m, a in points])
    crossing = next(
        (x0 * y1 - x1 * y0) / (x0 - x1 - y0 + y1)
        for (x0, y0), (x1, y1) in itertools.pairwise(hull)
        if y0 >= x0 and y1 <= x1
    )
    assert tt.ComputeRocchEER(s, y) == pytest.approx(100 * crossing, abs=1e-9)
    assert tt.ComputeRocchEER(s, y) <= eer + 1e-9
    t, n = sum(y), len(y) - sum(y)
    cost = sum(
        (k * math.log2(1 + m * t / (k * n)) / t if k else 0) + (m * math.log2(1 + k * n / (m * t)) / n if m else 0)
        for k, m in naive_pav(s, y)
    )
    assert tt.ComputeMinCllr(s, y) == pytest.approx(cost / 2, abs=1e-12)
    softplus = [math.log2(1 + math.exp(-v if w else v)) / (t if w else n) for v, w in zip(s, y)]
    assert tt.ComputeCllr(s, y) == pytest.approx(sum(softplus) / 2)
    assert tt.ComputeMinCllr(s, y) <= tt.ComputeCllr(s, y) + 1e-12


@pytest.mark.parametrize("name", CASES)
def test_tuned_thresholds_are_those_of_roc_curve(name):  # voxceleb_trainer computes them from it
    scores, labels = CASES[name]
    fpr, tpr, thresholds = roc_curve(labels, scores, pos_label=1)
    tuned, eer, found_fpr, found_fnr = tt.tuneThresholdfromScore(scores, labels, [1, 0.1, 0.01], [0.2])
    assert np.array_equal(found_fpr, fpr) and np.array_equal(found_fnr, 1 - tpr)
    wanted = [np.nanargmin(np.absolute(0.2 - (1 - tpr)))] + [np.nanargmin(np.absolute(r - fpr)) for r in (1, 0.1, 0.01)]
    assert tuned == [[thresholds[i], fpr[i], 1 - tpr[i]] for i in wanted]
    nearest = np.nanargmin(np.absolute(1 - tpr - fpr))
    assert eer == max(fpr[nearest], 1 - tpr[nearest]) * 100


def test_published_examples():
    # scikit-learn's documentation of roc_curve
    _, _, fpr, fnr = tt.tuneThresholdfromScore([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], [0.5])
    assert fpr.tolist() == [0, 0, 0.5, 0.5, 1] and (1 - fnr).tolist() == [0, 0.5, 0.5, 1, 1]
    # SpeechBrain's documentation of EER and minDCF
    scores, labels = [0.6, 0.7, 0.8, 0.5, 0.4, 0.3, 0.2, 0.1], [1, 1, 1, 1, 0, 0, 0, 0]
    assert tt.ComputeEER(scores, labels) == (0, pytest.approx(0.45)) and ErrorRates.of(scores, labels).min_dcf()[0] == 0
    # by hand: 0 0 (1 0) 1 1 pools the middle two; hull (1, 0), (1/3, 0), (0, 1/3), (0, 1)
    scores, labels = [0, 1, 2, 3, 4, 5], [0, 0, 1, 0, 1, 1]
    assert tt.ComputeRocchEER(scores, labels) == pytest.approx(100 / 6)
    assert tt.ComputeEER(scores, labels)[0] == pytest.approx(100 / 3)
    assert tt.ComputeMinCllr(scores, labels) == pytest.approx(1 / 3)


def kaldi_eer(targets, nontargets):
    """The rule of Kaldi's compute-eer: the first target, ascending, above the nontarget of the same quantile."""
    targets, nontargets = sorted(targets), sorted(nontargets)
    for k, target in enumerate(targets):
        place = len(nontargets) - 1 - int(len(nontargets) * k / len(targets))
        if place < 0 or nontargets[place] < target:
            return k / len(targets)
    return 1.0


@pytest.mark.parametrize("seed", range(3))
def test_eer_conventions_of_other_toolkits(seed):
    scores, labels = trials(seed, 500)
    ours = tt.ComputeEER(scores, labels)[0] / 100
    assert abs(ours - kaldi_eer(scores[labels == 1], scores[labels == 0])) <= 1 / min(labels.sum(), 500 - labels.sum())
    # wespeaker: one operating point a trial, the line between the last with fewer misses and the first with more
    y = labels[np.argsort(scores)]
    miss, alarm = y.cumsum() / y.sum(), 1 - (1 - y).cumsum() / (1 - y).sum()
    after, before = np.flatnonzero(miss >= alarm)[0], np.flatnonzero(miss < alarm)[-1]
    share = (miss[after] - alarm[after]) / (alarm[before] - alarm[after] - (miss[before] - miss[after]))
    assert ours == pytest.approx(miss[after] + share * (miss[before] - miss[after]))


def test_600000_trials():
    rng = np.random.default_rng(0)
    labels = (rng.random(600_000) < 0.3).astype(np.int64)
    scores = np.round(rng.normal(labels * 3.0 - 1.5, 1.0), 4)  # with ties
    y = labels[np.argsort(scores, kind="stable")]
    last = np.append(np.flatnonzero(np.diff(np.sort(scores))), len(y) - 1)
    miss = np.append(0, y.cumsum()[last]) / y.sum()
    alarm = 1 - np.append(0, (1 - y).cumsum()[last]) / (1 - y).sum()
    after = np.argmax(miss >= alarm)
    (m0, m1), (a0, a1) = miss[after - 1 : after + 1], alarm[after - 1 : after + 1]
    rates = ErrorRates.of(scores, labels)
    assert rates.eer()[0] == pytest.approx((m0 * (a1 - m1) - m1 * (a0 - m0)) / (a1 - m1 - a0 + m0))
    assert rates.min_dcf(0.01)[0] == pytest.approx(np.min(0.01 * miss + 0.99 * alarm) / 0.01)
    assert rates.min_dcf(0.01)[0] == pytest.approx(
        np.min(0.01 * rates.convex_hull()[0] + 0.99 * rates.convex_hull()[1]) / 0.01
    )
    llrs, bound = 3 * scores, np.log(19)
    errors = np.mean(llrs[labels == 1] < bound), np.mean(llrs[labels == 0] >= bound)
    assert tt.ComputeActDcf(llrs, labels, 0.05, 1, 1) == pytest.approx(errors[0] + 19 * errors[1])
    cost = np.logaddexp(0, -llrs[labels == 1]).mean() + np.logaddexp(0, llrs[labels == 0]).mean()
    assert tt.ComputeCllr(llrs, labels) == pytest.approx(cost / 2 / np.log(2))
    assert tt.ComputeMinCllr(llrs, labels) < tt.ComputeCllr(llrs, labels)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rate", [0, 0.01, 0.1, 1 / 3, 0.5, 1])
def test_thresholds_at_wanted_rates(name, rate):
    scores, labels = CASES[name]
    places = [*sorted(set(scores.tolist())), np.nextafter(scores.max(), np.inf)]
    good = [t for t in places if np.mean(scores[labels == 0] >= t) <= rate + 1e-12]
    assert tt.threshold_at_false_accept(scores, labels, rate) == good[0]
    found = tt.threshold_at_false_reject(scores, labels, rate)
    assert np.mean(scores[labels == 1] < found) <= rate + 1e-12
    higher = min(scores[(scores > found) & (labels == 1)], default=np.inf)
    assert rate == 1 or np.mean(scores[labels == 1] < higher) > rate
    with pytest.raises(ValueError, match="between 0 and 1"):
        tt.threshold_at_false_accept(scores, labels, 1.5)


def test_weighted_rates_are_those_of_repeated_trials():
    scores, labels = trials(3, 200, ties=True)
    rng = np.random.default_rng(0)
    targets, nontargets = (np.sort(scores[labels == value]) for value in (1, 0))
    weights = [rng.poisson(1.0, (5, len(x))).astype(np.float32) for x in (targets, nontargets)]
    weighted = ErrorRates(targets, nontargets, *[intervals._running_sums(w) for w in weights])
    eer, costs = weighted.eer()[0], weighted.min_dcf(0.05)[0]
    for k in range(5):
        repeated = [np.repeat(x, w[k].astype(int)) for x, w in zip((targets, nontargets), weights)]
        plain = ErrorRates(*repeated)
        assert eer[k] == pytest.approx(plain.eer()[0]) and costs[k] == pytest.approx(plain.min_dcf(0.05)[0], rel=1e-5)


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
    lambda s, y: tt.ComputeRocchEER(s, y),
    lambda s, y: tt.ComputeMinCllr(s, y),
    lambda s, y: tt.threshold_at_false_accept(s, y, 0.1),
    lambda s, y: tt.threshold_at_false_reject(s, y, 0.1),
    lambda s, y: evaluation_metrics(s, y, draws=50),
    lambda s, y: condition_table(s, y, draws=50),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_nan_is_filtered_before_anything_sorts_and_said(function, capsys):
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


def test_bootstrap_interval_covers_the_true_eer():
    from scipy.stats import norm

    true = 100 * norm.cdf(-0.75)
    found = [tt.bootstrap_interval(*trials(seed, 600), draws=200)["eer"] for seed in range(40)]
    covered = sum(low <= true <= high for low, high in found)
    assert covered >= 34 and all(high - low > 1 for low, high in found)


def voices(seed, speakers=25):
    """Trials whose scores depend on the speakers: some are hard to know, some are easy to take for others."""
    rng = np.random.default_rng(seed)
    known, alike = rng.normal(0, 0.7, (2, speakers))
    own = np.arange(500) * speakers // 500
    a = rng.integers(0, speakers, 500)
    b = (a + rng.integers(1, speakers, 500)) % speakers
    scores = np.append(2.25 + known[own] + rng.normal(size=500), alike[a] + alike[b] + rng.normal(size=500))
    return scores, np.repeat([1, 0], 500), np.stack([np.append(own, a), np.append(own, b)], axis=1)


def test_intervals_over_speakers_cover_where_those_over_trials_do_not():
    from scipy.stats import norm

    # targets N(2.25, 1 + 0.49), nontargets N(0, 1 + 2 x 0.49): both rates are norm.cdf(-2.25 / (their deviations))
    true = 100 * norm.cdf(-2.25 / (1.49**0.5 + 1.98**0.5))
    covered = {"speakers": 0, "trials": 0}
    for seed in range(40):
        scores, labels, speakers = voices(seed)
        for name, given in (("speakers", speakers), ("trials", None)):
            low, high = tt.bootstrap_interval(scores, labels, given, draws=200)["eer"]
            covered[name] += low <= true <= high
    assert covered["speakers"] >= 34 and covered["trials"] <= 28


def test_speakers_are_drawn_and_trials_weighted():
    _, labels, speakers = voices(0, speakers=6)
    classes = [np.flatnonzero(labels == value) for value in (1, 0)]
    rng = np.random.default_rng(3)
    targets, nontargets = next(intervals._weights(speakers, classes, 50, rng))
    drawn = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), 50)
    assert drawn.sum(axis=1).tolist() == [6] * 50
    assert np.array_equal(targets, drawn[:, speakers[classes[0], 0]])  # once as often as its speaker, not squared
    assert np.array_equal(nontargets, drawn[:, speakers[classes[1], 0]] * drawn[:, speakers[classes[1], 1]])


def test_intervals_do_not_depend_on_blocks_order_or_names(monkeypatch):
    scores, labels, speakers = voices(1)
    whole = tt.bootstrap_interval(scores, labels, speakers, draws=60)
    assert set(whole) == {"eer", "min_dcf_0.01", "act_dcf_0.01", "min_dcf_0.05", "act_dcf_0.05", "cllr"}
    order = np.random.default_rng(0).permutation(len(scores))
    named = np.array([f"id{k:03d}" for k in range(100)])[speakers]
    monkeypatch.setattr(intervals, "ELEMENTS", 3000)
    for other in (
        tt.bootstrap_interval(scores, labels, named, draws=60),
        tt.bootstrap_interval(scores[order], labels[order], speakers[order], draws=60),
    ):
        assert np.allclose(list(whole.values()), list(other.values()), rtol=1e-5)
    holes = np.append(scores, np.nan), np.append(labels, 1), np.concatenate([speakers, [[0, 0]]])
    assert np.allclose(list(tt.bootstrap_interval(*holes, draws=60).values()), list(whole.values()))
    with pytest.raises(ValueError, match="at least 4"):
        tt.bootstrap_interval(scores, labels, speakers % 3)
    with pytest.raises(ValueError, match=r"shape \(1000, 2\)"):
        tt.bootstrap_interval(scores, labels, speakers[:, 0])


def test_why_there_is_no_interval_over_speakers():
    paths = [f"id{k}/v/{i}.wav" for k in range(4) for i in range(2)]
    labels, first, second = [1, 1, 0, 0, 0], paths[0:1] + paths[2:6], paths[1:2] + paths[3:4] + paths[5:8]
    found, why = tt.trial_speakers(labels, first, second)
    assert why == "" and found.tolist() == [[0, 0], [1, 1], [1, 2], [2, 3], [2, 3]]
    assert tt.trial_speakers([0, 1, 0, 0, 0], first, second)[1].startswith("first folders are no speakers: id0/v/0.wav")
    assert "speaker of a.wav is unknown" in tt.trial_speakers([1], ["a.wav"], ["b/c.wav"])[1]
    assert "only 2 speakers" in tt.trial_speakers(labels[:2], first[:2], second[:2])[1]
    sides = [
        [f"shards/b.tar/{path}" if i % 2 else f"a.tar/{path}" for i, path in enumerate(p)] for p in (first, second)
    ]
    assert tt.trial_speakers(labels, *sides)[0].tolist() == found.tolist()
    below = [[f"/data/{path}" for path in paths] for paths in (first, second)]
    assert tt.trial_speakers(labels, *below)[1] == "all paths begin with 'data', which is no speaker"
    renamed = {"id0": "x", "id1": "y", "id2": "z", paths[6]: "v", paths[7]: "v"}
    assert tt.trial_speakers(labels, first, second, renamed)[0].tolist() == [[1, 1], [2, 2], [2, 3], [3, 0], [3, 0]]


def test_table_by_condition():
    scores, labels, speakers = voices(2)
    first, second = (np.where(side < 12, "f", "m") for side in speakers.T)
    groups = [a if a == b else "f-m" for a, b in zip(first, second)]
    rows = condition_table(scores, labels, [groups], 0.1, speakers, draws=50)
    assert [row["group"] for row in rows] == ["pooled", "f", "f-m", "m"]
    threshold = tt.ComputeEER(scores, labels)[1]
    pooled, f, mixed, _ = rows
    assert pooled["eer"] == tt.ComputeEER(scores, labels)[0] and pooled["interval"] == "speakers"
    chosen = np.array(groups) == "f"
    assert f["eer"] == tt.ComputeEER(scores[chosen], labels[chosen])[0] and f["trials"] == chosen.sum()
    assert f["miss"] == pytest.approx(100 * np.mean(scores[chosen & (labels == 1)] < threshold))
    assert mixed["miss"] is None and "eer" not in mixed and mixed["targets"] == 0
    only = scores[(np.array(groups) == "f-m")]
    assert mixed["false_accept"] == pytest.approx(100 * np.mean(only >= threshold))
    text = table_lines(rows, 0.1)
    assert "minDCF(0.1)" in text[0] and "only nontargets: no EER" in text[3] and len(text) == 7
    assert text[-1].startswith("actDCF and Cllr: of scores calibrated on these trials")
    assert rows[0].pop("folds") == "speakers" and table_lines(rows, 0.1) == text[:-1]


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
    llrs = calibrated_llrs(scores * 0.1 + 0.3, labels)
    assert (
        tt.ComputeActDcf(llrs, labels, 0.05, 1, 1)
        < 1.15 * tt.ComputeMinDcf(*tt.ComputeErrorRates(scores, labels), 0.05, 1, 1)[0]
    )
    assert tt.ComputeCllr(llrs, labels) < tt.ComputeCllr(scores * 0.1 + 0.3, labels)


def test_trials_that_nothing_is_left_of_are_refused_in_one_line(capsys):
    with pytest.raises(ValueError, match="all trials have label 1 once 1 with NaN or Inf scores are left out"):
        tt.ComputeEER([0.5, np.nan], [1, 0])
    with pytest.raises(ValueError, match="no trials left: all 2 scores are NaN or Inf"):
        tt.tuneThresholdfromScore([np.inf, np.nan], [1, 0], [1])
    assert not capsys.readouterr().err
