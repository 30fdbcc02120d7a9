"""Who is named among many: the probability of each enrolled speaker and of nobody."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.identification import simulated
from scoring.backend import Backend
from scoring.identification import Identification, speaker_posterior
from scoring.verification import Verdict, percent


def test_the_posterior_is_bayes_rule_and_that_of_a_comparison_for_one_speaker():
    llrs, prior = np.array([3.0, -1.0, 0.5]), 0.3
    likelihoods = [*(prior / 3 * np.exp(llrs)), 1 - prior]
    shares, nobody = speaker_posterior(llrs, prior)
    assert np.allclose([*shares, nobody], np.divide(likelihoods, sum(likelihoods)))
    (share,), nobody = speaker_posterior([2.5], prior)
    assert share == pytest.approx(Backend().probability(2.5, prior)) and share + nobody == pytest.approx(1)
    shares, nobody = speaker_posterior([900.0, -900.0], 0.5)  # no overflow
    assert (shares[0], shares[1], nobody) == (pytest.approx(1), 0, 0)


@pytest.mark.parametrize("enrolled", [1, 10, 100, 1000])
def test_wrong_names_are_as_frequent_as_promised_with_any_number_of_speakers(enrolled):
    rng, trials, prior = np.random.default_rng(enrolled), 1000, 0.5
    promised, wrong, one_threshold, named = [], [], [], 0
    for strangers in (True, False):
        for llrs in simulated(enrolled, strangers, trials, rng):
            shares, _ = speaker_posterior(llrs, prior)
            best = int(shares.argmax())
            if strangers:
                one_threshold.append(llrs.max() > 0)
                named += shares[best] > 0.5
            if shares[best] > 0.5:
                promised.append(1 - shares[best])
                wrong.append(strangers or best != 0)
    error = math.sqrt(sum(p * (1 - p) for p in promised)) / len(promised)
    assert len(promised) > 20 and abs(np.mean(wrong) - np.mean(promised)) < 3.5 * error + 1e-3
    if enrolled >= 100:  # what a threshold of one comparison would do to strangers
        assert np.mean(one_threshold) > 4 * named / trials


def verdict(llr, threshold=2.0, score=0.5):
    return Verdict(score, llr, 0.9, 0.05, threshold, "test", None if threshold is None else llr >= threshold)


def test_a_threshold_that_is_given_decides_with_a_caution():
    given, free = (SimpleNamespace(threshold_given=given) for given in (True, False))
    verdicts = [verdict(2.2), verdict(-3.0), verdict(1.0)]
    found = Identification(given, "abc", verdicts, 2)
    assert found.speaker == "a" and "best of 3 strangers passes it up to 3 times as often" in found.lines()[-1]
    assert found.values()["nobody"] is None and not Identification(given, "a", verdicts[:1], 2).cautions()
    found = Identification(free, "abc", verdicts, 2)
    shares, nobody = speaker_posterior([2.2, -3.0, 1.0], 0.5)
    assert found.speaker == "a" and [c.name for c in found.candidates] == ["a", "c"]
    assert found.lines()[2:] == [
        f"nobody who is enrolled: probability {percent(nobody)}",
        "speaker: a",
        f"{percent(shares[0])} sure, if 50 % of the recordings are of somebody who is enrolled (--prior)",
    ]
    found = Identification(free, "abc", verdicts, 2, prior=0.2)
    assert found.speaker is None and found.lines()[-1].startswith(percent(found.nobody) + " sure, if 20 %")
    twins = Identification(free, "ab", [verdict(4.0), verdict(4.0)], 2)
    assert twins.speaker is None and "but no one of them is likelier than all others together" in twins.lines()[-1]
    assert twins.lines()[-2] == "speaker: not clear who; the nearest is a"  # and not nobody, which has few percent
    values = twins.values()
    again = 0.5 * math.exp(values["evidence"])  # what the page computes at another prior
    assert 0.5 / (again + 0.5) == pytest.approx(values["nobody"]) and values["speakers"][0]["same"] is False
    first = values["speakers"][0]  # the pair's verdict has prior 0.05 and a threshold, which do not decide
    assert first["prior"] == 0.5 and first["threshold"] is None and not first["threshold_moves"]
    assert Identification(given, "a", verdicts[:1], 2).values()["speakers"][0]["threshold"] == 2.0


def test_without_a_calibration_or_a_threshold_nobody_is_named():
    undecided = [Verdict(0.7, None, None, None, None, None, None), Verdict(0.4, None, None, None, None, None, None)]
    found = Identification(SimpleNamespace(threshold_given=False), "ab", undecided, 5)
    assert found.speaker is None and not found.decided and found.lines()[-1].startswith("nearest: a; no decision")
    assert [row["same"] for row in found.values()["speakers"]] == [None, None]
