"""Open-set figures of a trial list, against counting by hand and through the command line."""

import json

import numpy as np
import pytest

import score
import scoring.open_set
from errors import UsageError
from scoring.open_set import open_set_figures, open_set_lines
from settings.command_line import run


def searches(rng, enrolled=6, mates=40, strangers=200):
    """Trials of tests m0.. of enrolled speaker 0 and of strangers s0..: labels, tests, values."""
    labels = np.r_[np.tile([1] + [0] * (enrolled - 1), mates), np.zeros(enrolled * strangers, int)]
    tests = [f"m{i // enrolled}" for i in range(mates * enrolled)]
    tests += [f"s{i // enrolled}" for i in range(strangers * enrolled)]
    values = rng.normal(0, 1, len(labels)) + 2.5 * labels
    return labels, np.array(tests), values


def test_figures_are_those_of_counting():
    labels, tests, values = searches(np.random.default_rng(1))
    order = np.random.default_rng(2).permutation(len(labels))  # a list comes in any order
    figures = open_set_figures(labels[order], tests[order], values[order], calibrated=True)
    mate, stranger = values[:240].reshape(40, 6), values[240:].reshape(200, 6)
    rank = (mate[:, 1:] > mate[:, :1]).sum(1)
    assert figures["top_1"][0] == pytest.approx(100 * np.mean(rank == 0))
    assert figures["top_5"][0] == pytest.approx(100 * np.mean(rank < 5)) and "top_10" not in figures
    for share in (0.01, 0.1):
        passed = np.sort(stranger.max(1))[::-1][int(200 * share)]  # which 1 % of 200 strangers lie above
        right = (rank == 0) & (mate[:, 0] > passed)
        assert figures[f"dir_at_{share:g}"][0] == pytest.approx(100 * right.mean())
    crossing = [abs(np.mean(mate.max(1) < t) - np.mean(stranger.max(1) >= t)) for t in values]
    threshold = values[int(np.argmin(crossing))]
    assert figures["detection_eer"] == pytest.approx(100 * np.mean(stranger.max(1) >= threshold), abs=2.0)
    odds = np.exp(stranger) / 6
    assert figures["stranger_named"][0] == pytest.approx(100 * np.mean(odds.max(1) > 0.5 * (odds.sum(1) + 1)))
    odds = np.exp(mate) / 6
    named = odds.max(1) > 0.5 * (odds.sum(1) + 1)
    assert figures["named_right"][0] == pytest.approx(100 * np.mean(named & (rank == 0)))
    assert figures["named_wrong"][0] == pytest.approx(100 * np.mean(named & (rank > 0)))
    assert all(low <= share <= high for share, low, high in (figures["top_1"], figures["named_wrong"]))
    assert not figures["left_out"] and "200 tests of strangers" in open_set_lines(figures)[0]


def test_without_strangers_each_test_is_one_without_its_own_speaker():
    labels, tests, values = searches(np.random.default_rng(3), strangers=0)
    figures = open_set_figures(labels, tests, values)
    others = values.reshape(40, 6)[:, 1:].max(1)
    best = values.reshape(40, 6)
    right = (best.argmax(1) == 0) & (best[:, 0] > np.sort(others)[::-1][4])
    assert figures["left_out"] and figures["strangers"] == 40
    assert figures["dir_at_0.1"][0] == pytest.approx(100 * right.mean()) and "stranger_named" not in figures


def test_a_list_that_searches_for_nobody_is_refused():
    with pytest.raises(UsageError, match="compares no test with several"):
        open_set_figures([1, 0], ["a", "b"], [1.0, 0.0])


def test_an_interval_lies_between_0_and_100():
    figures = open_set_figures([1, 0] * 30, np.repeat(np.arange(30), 2), [9.0, 1.0] * 30)
    assert figures["top_1"][0] == figures["top_1"][2] == 100.0
    lines = open_set_lines({**figures, "named_wrong": scoring.open_set._rate([False] * 212)})
    assert any("0.00 % (0.00 to 1.78)" in line for line in lines), lines


def test_score_prints_them_and_writes_them(tmp_path, capsys):
    rng = np.random.default_rng(4)
    centres = rng.standard_normal((8, 12))
    names = [f"p{s}/{u}" for s in range(8) for u in range(3)]
    x = np.repeat(centres, 3, axis=0) + 0.3 * rng.standard_normal((24, 12))
    np.savez(tmp_path / "e.npz", names=np.array(names), embeddings=x.astype(np.float32))
    lines = [f"{int(s == t)} p{s}/0 p{t}/{u}" for t in range(8) for u in (1, 2) for s in range(6)]
    (tmp_path / "trials.txt").write_text("\n".join(lines) + "\n")
    words = ["--trials", tmp_path / "trials.txt", "--embeddings", tmp_path / "e.npz", "--open_set"]
    assert run(score.main, [*map(str, words), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr()
    assert "open set: 12 tests of enrolled speakers among 6 (median), 4 tests of strangers" in out.out, out.err
    found = json.loads((tmp_path / "out" / "result.json").read_text())["open_set"]
    assert found["top_1"][0] == 100.0
