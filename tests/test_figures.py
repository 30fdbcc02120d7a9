"""What the figures of scores say: widths of intervals, scores the wrong way round, calibrations of a few trials."""

import numpy as np
import pytest
from scipy.stats import binomtest

import tuneThreshold
from command_line import run
from scoring.cautions import few_errors
from scoring.files import write_scores
from scoring.intervals import bootstrap_interval, no_error_bound


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


def test_an_evaluation_says_that_scores_are_the_wrong_way_round(settings, tools):
    from evaluation import describe

    trainer = tools.build(settings, max_test_pairs=40)
    evaluator = trainer.evaluator
    result = evaluator.run(trainer.network, 1)
    told = {"scores": evaluator.labels * -1.0 + 1e-3 * np.arange(40), "nan_scores": 0, "nan_files": [], "failed": None}
    told = {**result, **told, **evaluator.figures(evaluator.labels * -1.0, np.ones(40, bool))}
    assert sum("wrong way round" in line for line in describe(told, trainer.config)) == 1


def test_a_calibration_of_forty_target_trials_is_called_a_guess():
    scores, labels, first, second = people(4, separation=2.0)
    speakers = numbered(scores, labels, first, second)[2]
    caution = few_errors(scores, labels, speakers)
    assert "24 target and 96 nontarget trials of 4 speakers" in caution and "fewer than 30 is a guess" in caution
    assert few_errors(*people(60, separation=1.0)[:2]) == ""
