"""What the figures of scores say: widths of intervals, scores the wrong way round, calibrations of a few trials."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import binomtest

import score
import tuneThreshold
from scoring import plots
from scoring.cautions import few_errors
from scoring.comparison import compare
from scoring.figures import evaluation_metrics
from scoring.files import write_scores
from scoring.intervals import bootstrap_interval, no_error_bound
from settings.command_line import run


def people(speakers, utterances=4, separation=30.0, seed=0):
    """Scores, labels and both sides of every trial of a few speakers, in the VoxCeleb layout."""
    rng = np.random.default_rng(seed)
    paths = [f"id{s:03d}/rec{u}/a.wav" for s in range(speakers) for u in range(utterances)]
    one, other = np.triu_indices(len(paths), 1)
    labels = (one // utterances == other // utterances).astype(int)
    scores = rng.normal(separation * labels, 1.0)
    return scores, labels, [paths[i] for i in one], [paths[i] for i in other]


@pytest.fixture
def scored(tmp_path):
    """Write a score file of ``people`` and return its path."""

    def written(*arguments, turn=1.0, **more):
        scores, *rest = people(*arguments, **more)
        path = tmp_path / f"scores_{len(list(tmp_path.iterdir()))}.txt"
        write_scores(path, turn * scores, *rest)
        return str(path)

    return written


def said(main, capsys, *words):
    """(status, stdout, stderr) of a command line."""
    status = run(main, [str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def numbered(scores, labels, first, second):
    speakers = np.array([[int(path[2:5]) for path in side] for side in (first, second)]).T
    return scores, labels, speakers


def test_no_error_among_a_few_people_is_not_an_eer_of_zero_for_sure():
    low, high = bootstrap_interval(*numbered(*people(8)), draws=50)["eer"]
    assert low == 0 and high == pytest.approx(100 * (1 - 0.025 ** (1 / 8)))
    more = bootstrap_interval(*numbered(*people(30)), draws=50)
    assert 0 < more["eer"][1] < high and 3 / 30 < more["eer"][1] / 100 < 4 / 30  # somewhat above the rule of three
    fewest = bootstrap_interval(*numbered(*people(4)), draws=50)
    assert fewest["eer"] == (0, 50) and fewest["min_dcf_0.05"] == (0, 1)  # worse than knowing nothing is nothing
    scores, labels, *_ = people(8)
    assert bootstrap_interval(scores, labels, draws=50)["eer"][1] == pytest.approx(100 * no_error_bound(labels.sum()))
    for name in ("min_dcf_0.01", "act_dcf_0.05"):
        assert fewest[name][0] == 0 < more[name][1] <= fewest[name][1]


def test_intervals_with_errors_are_those_of_the_bootstrap():
    found = bootstrap_interval(*numbered(*people(12, separation=3.0)), draws=200)
    assert 0 < found["eer"][0] < found["eer"][1] < 100 * no_error_bound(12)


def test_the_bound_is_that_of_clopper_and_pearson():
    for units in (1, 12, 500):
        assert no_error_bound(units) == pytest.approx(binomtest(0, units).proportion_ci(0.95, "exact").high)


def test_scores_the_wrong_way_round_are_said_in_one_line(scored, capsys, tmp_path):
    turned = scored(8, turn=-1.0, separation=4.0)
    _, out, _ = said(tuneThreshold.main, capsys, turned, "--draws", 50)
    assert sum("wrong way round" in line for line in out.splitlines()) == 1
    assert "higher must mean more alike" in out
    _, out, _ = said(tuneThreshold.main, capsys, scored(8, separation=4.0), "--draws", 50)
    assert "wrong way round" not in out
    _, out, _ = said(tuneThreshold.main, capsys, scored(8, separation=0.0), "--draws", 50)
    assert "wrong way round" not in out  # scores that know nothing are near 50 % on either side


def test_an_evaluation_says_that_scores_are_the_wrong_way_round():
    from training.evaluation import describe

    scores, labels, speakers = numbered(*people(8, separation=4.0))
    for turn, times in ((1, 0), (-1, 1)):
        result = evaluation_metrics(turn * scores, labels, speakers=speakers, draws=50)
        result |= {"epoch": 3, "nan_scores": 0, "nan_files": [], "nan_pairs": [], "failed": None}
        lines = describe(result, SimpleNamespace(dcf_p_target=0.05))
        assert sum("wrong way round" in line for line in lines) == times


def test_a_calibration_of_forty_target_trials_is_called_a_guess():
    scores, labels, first, second = people(4, separation=2.0)
    speakers = numbered(scores, labels, first, second)[2]
    caution = few_errors(scores, labels, speakers)
    assert (
        "24 target and 96 nontarget trials of 4 speakers" in caution
        and "fewer than 30 errors its probabilities are a guess" in caution
    )
    assert few_errors(*people(60, separation=1.0)[:2]) == ""


def two_systems(gain, seed=0):
    """Labels, both sides, and scores (2, N) of two systems that err on the same voices, B less by ``gain``."""
    scores, labels, first, second = people(14, separation=2.0, seed=seed)
    return labels, first, second, np.stack([scores, scores + gain * labels])


def test_a_paired_interval_tells_what_two_overlapping_ones_do_not():
    labels, *sides, scores = two_systems(0.4)
    found = compare(labels, *sides, scores, (0.05,), 200)
    a, b, change = found["A"]["eer"], found["B"]["eer"], found["difference"]["eer"]
    assert a["low"] < b["high"]  # the intervals overlap: the same speakers are hard for both
    assert change["high"] < 0 and change["p"] < 0.05 and change["value"] == pytest.approx(b["value"] - a["value"])
    alone = bootstrap_interval(scores[1], *numbered(scores[1], labels, *sides)[1:], draws=200)
    assert (b["low"], b["high"]) == pytest.approx(alone["eer"])
    same = compare(labels, *sides, scores[[0, 0]], (0.05,), 200)["difference"]["eer"]
    assert same == {"value": 0, "low": 0, "high": 0, "p": 1}
    over_trials = compare(labels, ["a"] * len(labels), ["b"] * len(labels), scores, (0.05,), 100)  # paired there too
    assert over_trials["difference"]["eer"]["high"] < 0 and "too narrow" in over_trials["interval"]


def test_two_systems_are_compared_in_plain_words_and_one_picture(tmp_path, capsys):
    labels, first, second, scores = two_systems(0.4)
    write_scores(tmp_path / "a.txt", scores[0], labels, first, second)
    order = np.random.default_rng(0).permutation(len(labels))  # another form, in another order
    sides = [[side[i] for i in order] for side in (first, second)]
    write_scores(tmp_path / "b.txt", scores[1][order], labels[order], *sides, "kaldi")
    out = tmp_path / "out"
    words = ("--compare", tmp_path / "a.txt", tmp_path / "b.txt", "--draws", 100)
    words += ("--out", out, "--pictures", "pdf", "svg")
    status, text, _ = said(score.main, capsys, *words)
    assert status == 0 and "EER: B is better, and that is unlikely to be chance (p" in text
    assert "95 % intervals over speakers, the same for both" in text
    result = json.loads((out / "result.json").read_text())
    assert result["difference"]["eer"]["high"] < 0 and set(result["A"]) == {"eer", "min_dcf_0.01", "min_dcf_0.05"}
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "compare.pdf").read_bytes().startswith(b"%PDF")
    legend = (out / "compare.svg").read_text()
    assert all(str(tmp_path / name)[-20:] in legend for name in ("a.txt", "b.txt"))  # which is which
    noise = np.random.default_rng(1).normal(0, 0.5, len(scores[0]))
    write_scores(tmp_path / "b.txt", scores[0] + noise, labels, first, second)
    assert "EER: the difference may be chance" in said(score.main, capsys, *words[:5])[1]
    write_scores(tmp_path / "b.txt", scores[1][9:], labels[9:], first[9:], second[9:])
    status, text, error = said(score.main, capsys, *words)
    assert (status, text, error.count("\n")) == (2, "", 1) and "no score of 9 of the" in error


def test_pictures_of_a_score_file_as_svg(scored, tmp_path, capsys):
    words = (scored(8, separation=3.0), "--draws", 50, "--out", tmp_path / "out", "--pictures", "svg")
    assert said(tuneThreshold.main, capsys, *words)[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}.{ending}" for name in ("det", "roc", "scores", "calibration") for ending in ("png", "svg")
    }
    text = (tmp_path / "out" / "calibration.svg").read_text()
    assert "always deciding by the prior" in text  # as text, not as outlines


@pytest.mark.parametrize(
    ("targets", "nontargets", "separation"), [(20000, 20000, 3.0), (40, 400, 2.0), (60, 600, -3.0)]
)
def test_no_labels_of_a_det_curve_collide_and_both_minima_are_seen(targets, nontargets, separation):
    rng = np.random.default_rng(0)
    labels = np.repeat([1, 0], [targets, nontargets])
    rates = plots.ErrorRates.of(rng.normal(separation * labels, 1), labels)
    figure = plots._det("title", rates, {"eer": 100 * float(rates.eer()[0])}, (1.0, 1.0))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent() for label in ticks]
        assert len(boxes) > 3 and not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    points = [line for line in axes.lines if line.get_label().startswith("minDCF")]
    low, high = axes.get_xlim()
    assert len(points) == 2 and all(low <= x <= high for line in points for x in (*line.get_xdata(), *line.get_ydata()))
    assert points[0].get_markersize() < points[1].get_markersize() and points[1].get_markerfacecolor() == "none"
    assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0  # below, off the curve
