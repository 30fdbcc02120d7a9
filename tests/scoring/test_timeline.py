"""Who speaks when: the smoothing against all paths written out, the segments, and simulated conversations."""

import itertools
import json
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from errors import UsageError
from scoring import timeline
from scoring.identification import speaker_posterior
from scoring.plots import draw_timeline
from scoring.timeline import Timeline, cells, follow, smoothed


def by_all_paths(llrs, heard, prior, stay, weight):
    """The same posteriors from the probability of every sequence of states."""
    windows, speakers = llrs.shape
    start = [*[prior / speakers] * speakers, 1 - prior]
    found = np.zeros((windows, speakers + 1))
    for path in itertools.product(range(speakers + 1), repeat=windows):
        probability = 1.0
        for t, state in enumerate(path):
            drawn = start[state]
            probability *= drawn if t == 0 else (1 - stay) * drawn + stay * (path[t - 1] == state)
            if heard[t] and state < speakers:
                probability *= math.exp(weight * llrs[t, state])
        for t, state in enumerate(path):
            found[t, state] += probability
    return found / found.sum(axis=1, keepdims=True)


def test_the_smoothing_is_the_sum_over_all_paths():
    rng = np.random.default_rng(0)
    llrs, heard = rng.normal(0, 3, (6, 2)), np.array([True, True, False, True, True, True])
    for prior, stay, weight in ((0.5, 0.8, 1.0), (0.2, 0.95, 0.3), (0.9, 0.0, 1.0)):
        found = smoothed(llrs, heard, prior, stay, weight)
        assert np.allclose(found, by_all_paths(llrs, heard, prior, stay, weight), atol=1e-12)


def test_without_memory_a_window_is_what_identification_says_of_it():
    llrs = np.random.default_rng(1).normal(0, 4, (5, 7))
    found = smoothed(llrs, np.ones(5, bool), 0.3, 0.0, 1.0)
    for row, own in zip(found, llrs):
        shares, nobody = speaker_posterior(own, 0.3)
        assert np.allclose(row, [*shares, nobody])


def test_large_ratios_and_long_recordings_stay_finite():
    llrs = np.tile([[900.0, -900.0], [-900.0, 900.0]], (500, 1))
    found = smoothed(llrs, np.ones(1000, bool), 0.5, 0.9, 1.0)
    assert np.isfinite(found).all() and np.allclose(found.sum(axis=1), 1) and found[0, 0] > 0.999


def grid(count, window=3.0, step=1.0):
    starts = step * np.arange(count)
    return np.stack([starts, starts + window], axis=1)


def test_segments_meet_midway_between_the_windows_and_say_silence():
    times = np.array([[0, 3], [1, 4], [2, 5], [2.7, 5.7]])
    assert np.allclose(cells(times, 5.7), [0, 2, 3, 3.85, 5.7])
    llrs = np.array([[9.0, -9], [9, -9], [-9, 9], [-9, -9], [0, 0], [-9, -9], [9, -9]])
    heard = np.array([True] * 4 + [False] + [True] * 2)
    found = Timeline(["ann", "bob"], grid(7, 1.0), llrs, heard, 0.5, 0.5, 1.0)
    assert [(s.start, s.end, s.label) for s in found.segments] == [
        (0, 2, "ann"),
        (2, 3, "bob"),
        (3, 4, "nobody"),
        (4, 5, "silence"),
        (5, 6, "nobody"),
        (6, 7, "ann"),
    ]
    assert found.totals() == {"ann": 3, "nobody": 2, "bob": 1, "silence": 1}
    assert all(s.probability > 0.9 for s in found.segments if not s.silence)
    values = json.loads(json.dumps(found.values()))
    assert values["segments"][3] == {"start": 4, "end": 5, "speaker": None, "probability": None, "silence": True}
    assert (values["window"], values["step"], values["seconds"]) == (1, 1, 7)
    lines = found.lines()
    assert lines[1].split()[:3] == ["0.00", "2.00", "ann"] and lines[4].split() == ["4.00", "5.00", "silence"]
    assert lines[-1].startswith("ann 3.0 s, nobody 2.0 s, bob 1.0 s, silence 1.0 s (windows of 1 s every 1 s")


def test_a_recording_weighs_by_its_length_however_its_windows_share_it():
    """The last window is moved back to end with the file: of 2.1 s two windows hear nearly the same."""
    sure = []
    for times in ([[0, 2.1]], [[0, 2], [0.1, 2.1]], [[0, 2], [1, 3]]):
        llrs, heard = np.full((len(times), 1), 8.0), np.ones(len(times), bool)
        found = Timeline(["ann"], times, llrs, heard, 0.5, 1e9, 1.0)
        odds = found.posteriors[0, 0] / found.posteriors[0, 1]
        sure.append(math.log(odds))
        assert "every 1 s" in found.lines()[-1]
    assert np.allclose(sure, [8, 8 * 2.1 / 2, 8 * 3 / 2], rtol=1e-4)


def test_rttm_has_one_line_a_named_segment_and_no_white_space_in_names():
    llrs = np.array([[9.0, -9]] * 3 + [[-9.0, -9]] * 2 + [[-9.0, 9]] * 2)
    found = Timeline(["Anna Müller", "bob"], grid(7, 1.0), llrs, np.ones(7, bool), 0.5, 0.5, 1.0)
    assert found.rttm("my call") == (
        "SPEAKER my_call 1 0.000 3.000 <NA> <NA> Anna_Müller <NA> <NA>\n"
        "SPEAKER my_call 1 5.000 2.000 <NA> <NA> bob <NA> <NA>\n"
    )
    twins = Timeline(["a b", "a_b"], grid(7, 1.0), llrs, np.ones(7, bool), 0.5, 0.5, 1.0)
    with pytest.raises(UsageError, match="two speakers would be called 'a_b'"):
        twins.rttm("x")


def test_speakers_are_prepared_once_for_many_windows(monkeypatch):
    rng, calls = np.random.default_rng(4), []
    blocks = [(grid(5) + 5 * k, rng.normal(size=(5, 2)), {1: "silent"} if k == 3 else {}) for k in range(6)]

    def scores(speakers, embeddings, seconds):
        calls.append(len(embeddings))
        assert np.allclose(seconds, 3)
        return None, embeddings

    model = SimpleNamespace(iter_windows=lambda *args, **more: iter(blocks))
    verifier = SimpleNamespace(calibrated=True, threshold_given=False, model=model, scores=scores)
    store = SimpleNamespace(speakers={"ann": [], "bob": []})
    whole = follow(verifier, store, "a.wav", 3.0, 1.0)
    assert calls == [29] and np.flatnonzero(~whole.heard).tolist() == [16]
    monkeypatch.setattr(timeline, "MOST_COMPARISONS", 130)
    assert np.array_equal(follow(verifier, store, "a.wav", 3.0, 1.0).posteriors, whole.posteriors)
    assert calls[1:] == [10, 9, 10]


def conversation(rng, seconds, speakers, turn, prior, separation):
    """States a second, as the model has them, and ratios of Gaussian scores whose ratios are exact."""
    start = np.append(np.full(speakers, prior / speakers), 1 - prior)
    states = [rng.choice(speakers + 1, p=start)]
    for _ in range(seconds - 1):
        states.append(states[-1] if rng.random() < math.exp(-1 / turn) else rng.choice(speakers + 1, p=start))
    llrs = rng.normal(-separation / 2, math.sqrt(separation), (seconds, speakers))
    for t, state in enumerate(states):
        if state < speakers:
            llrs[t, state] += separation
    return np.array(states), llrs


def test_of_simulated_conversations_more_is_named_rightly_and_as_much_as_promised():
    rng, right, alone, promised = np.random.default_rng(5), [], [], []
    for _ in range(20):
        states, llrs = conversation(rng, 300, 4, 10.0, 0.7, 5.0)
        found = Timeline([*"abcd"], grid(300, 1.0), llrs, np.ones(300, bool), 0.7, 10.0, 1.0)
        right.append(np.mean(found.decided == states))
        single = smoothed(llrs, np.ones(300, bool), 0.7, 0.0, 1.0)
        sure = np.where(single.max(axis=1) > 0.5, single.argmax(axis=1), 4)
        alone.append(np.mean(sure == states))
        promised.append(np.mean(found.posteriors[np.arange(300), found.decided]))
    assert np.mean(right) > np.mean(alone) + 0.08 and np.mean(right) > 0.9
    assert abs(np.mean(right) - np.mean(promised)) < 0.01


def test_the_picture_takes_any_names_and_any_number_of_speakers(tmp_path):
    rng = np.random.default_rng(3)
    names = ["$x$", "Борис", "明", "n" * 200, *map(str, range(30))]
    llrs = rng.normal(-8, 1, (200, len(names)))
    llrs[np.arange(200), np.arange(200) // 6] += 16
    heard = np.arange(200) % 50 > 3
    said = draw_timeline(tmp_path / "a.png", Timeline(names, grid(200), llrs, heard, 0.5, 5.0, 1.0), "$ in a name.wav")
    assert said == f"{tmp_path / 'a.png'}: boxes stand for letters that the font of the picture lacks"
    data = (tmp_path / "a.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width > 1000 and 300 < height < 2000
    nobody = Timeline(["a", "b"], grid(5), np.full((5, 2), -9.0), np.ones(5, bool), 0.5, 5.0, 1.0)
    assert draw_timeline(tmp_path / "nobody.png", nobody, "nobody") == ""
