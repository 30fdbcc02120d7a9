"""Windows of a recording: where they begin, what they hold, and what is held in memory."""

import tracemalloc

import numpy as np
import pytest
import soundfile

from corpus.audio import AudioError, read_crop
from corpus.sliding import grid_fault, sliding_windows


def write(path, seconds, rate=16000, channels=1, **more):
    rng = np.random.default_rng(round(1000 * seconds))
    x = rng.uniform(-0.2, 0.2, (round(seconds * rate), channels)).astype(np.float32)
    soundfile.write(path, x, rate, **more)
    return path


def times_of(path, window, step, **more):
    return [(round(start, 4), round(end, 4)) for start, end, _ in sliding_windows(path, window, step, **more)]


def test_windows_begin_every_step_and_the_last_one_ends_with_the_file(tmp_path):
    path = write(tmp_path / "a.wav", 4.7)
    assert times_of(path, 3, 1) == [(0, 3), (1, 4), (1.7, 4.7)]
    assert times_of(path, 2, 2) == [(0, 2), (2, 4), (2.7, 4.7)]
    assert times_of(path, 4.7, 1) == [(0, 4.7)]
    assert times_of(path, 9, 1) == [(0, 4.7)]  # shorter than a window: one of its own length
    exact = write(tmp_path / "b.wav", 5.0)
    assert times_of(exact, 3, 1) == [(0, 3), (1, 4), (2, 5)]
    # What is left of less than 10 ms would be a second window of the same name.
    soundfile.write(tmp_path / "c.wav", np.full(16000 * 5 + 159, 0.1), 16000)
    assert times_of(tmp_path / "c.wav", 3, 1) == [(0, 3), (1, 4), (2, 5)]
    soundfile.write(tmp_path / "c.wav", np.full(16000 * 5 + 160, 0.1), 16000)
    assert times_of(tmp_path / "c.wav", 3, 1)[-2:] == [(2, 5), (2.01, 5.01)]
    soundfile.write(tmp_path / "c.wav", np.full(16, 0.1), 16000)
    assert times_of(tmp_path / "c.wav", 3, 1) == [(0, 0.001)]
    # A step that is no whole number of samples does not drift.
    thirds = times_of(exact, 1 / 3, 1 / 3)
    assert len(thirds) == 15 and thirds[9] == (3.0, 3.3333)


@pytest.mark.parametrize(
    "name, rate, channels, channel",
    [
        ("a.wav", 16000, 1, "mix"),
        ("a.flac", 44100, 2, "mix"),
        ("a.flac", 8000, 3, "2"),
        ("a.wav", 22050, 2, "loudest"),
    ],
)
def test_a_window_is_the_crop_that_begins_there(name, rate, channels, channel, tmp_path):
    path = write(tmp_path / name, 18.3, rate, channels)  # more than a block
    found = list(sliding_windows(path, 2.5, 1.1, channel))
    assert len(found) == 16 and len({len(x) for _, _, x in found}) == 1
    for start, _, x in found[::5] + found[-1:]:
        crop = read_crop(path, len(x), start=round(start * rate), channel=channel)
        assert np.allclose(x, crop.x, atol=1e-6) and x.dtype == np.float32


def test_memory_does_not_grow_with_the_recording(tmp_path):
    peaks = []
    for seconds in (60, 600):
        path = write(tmp_path / "long.wav", seconds)
        tracemalloc.start()
        windows = sum(1 for _ in sliding_windows(path, 3, 1))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert windows == seconds - 2
    assert peaks[1] < 1.1 * peaks[0] and peaks[1] < 600 * 16000 * 4 / 4


def test_grids_that_cannot_be_are_named():
    assert grid_fault(3, 1) == grid_fault(1, 1) == ""
    assert grid_fault(0, 0) == "window: must be at least 0.025 s, got 0"
    assert grid_fault(0.2, 0.1, 0.3) == "window: must be at least 0.3 s, got 0.2"
    assert "step: must be at least 0.01 s, got 0" in grid_fault(1, 0)
    assert "step: 5 s is longer than the window of 3 s" in grid_fault(3, 5)
    for value in (float("nan"), float("inf"), -1):
        assert "window" in grid_fault(value, 1) and "step" in grid_fault(3, value)


def test_a_file_that_cannot_be_read_is_an_audio_error(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    with pytest.raises(AudioError):
        list(sliding_windows(tmp_path / "a.wav", 3, 1))
    whole = write(tmp_path / "b.wav", 30.0)
    (tmp_path / "cut.wav").write_bytes(whole.read_bytes()[:500_000])
    with pytest.raises(AudioError, match="truncated"):
        list(sliding_windows(tmp_path / "cut.wav", 3, 1))
