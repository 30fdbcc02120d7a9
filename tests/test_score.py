"""score.py through the real command line on tiny embeddings with known answers, and the scoring benchmark."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scoring.held_out import check_held_out, make_trials
from speaker_lists import UsageError

ROOT = Path(__file__).resolve().parent.parent


def score(*words, script="score.py", status=0):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )
    assert done.returncode == status, done.stderr
    if status == 2:
        assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
        assert done.stdout == ""
        return done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Embeddings of 24 evaluation, 24 held-out and 30 cohort speakers, with their lists, in the VoxCeleb layout."""
    out = tmp_path_factory.mktemp("scoring")
    rng = np.random.default_rng(0)
    names, rows = [], []
    for kind, speakers, utterances in (("ev", 24, 4), ("ho", 24, 4), ("co", 30, 3)):
        for s in range(speakers):
            place = rng.standard_normal(16) + 0.5
            for u in range(utterances):
                names.append(f"{kind}{s:02d}/session{u % 2}/{u}.wav")
                rows.append(place + 0.8 * rng.standard_normal(16))
    np.savez(out / "all.npz", names=np.array(names), embeddings=np.array(rows, dtype=np.float32))
    for kind in ("ev", "ho"):
        own = [n for n in names if n.startswith(kind)]
        trials = make_trials(np.unique([n[:4] for n in own], return_inverse=True)[1], own, 120, 1)
        (out / f"{kind}.txt").write_text("".join(f"{y} {a} {b}\n" for y, a, b in zip(*trials)))
    (out / "cohort.txt").write_text("".join(f"{n[:4]} {n}\n" for n in names if n.startswith("co")))
    (out / "seconds.txt").write_text("".join(f"{n} {2 + i % 5}\n" for i, n in enumerate(names)))
    return out


def test_made_trials_are_seeded_held_out_and_cross_sessions():
    paths = [f"id{s}/rec{u // 2}/{u}.wav" for s in range(10) for u in range(6)]
    labels = np.repeat(np.arange(10), 6)
    y, first, second = make_trials(labels, paths, 40, seed=3, speakers=5)
    assert (y.sum(), len(y)) == (40, 80) and len(set(zip(first, second))) == 80
    for label, a, b in zip(y, first, second):
        assert (a.split("/")[0] == b.split("/")[0]) == bool(label)
        assert not label or a.split("/")[1] != b.split("/")[1]
    assert len({p.split("/")[0] for p in first + second}) == 5
    again = make_trials(labels, paths, 40, seed=3, speakers=5)
    assert again[1:] == (first, second) and make_trials(labels, paths, 40, seed=4, speakers=5)[1] != first
    few = make_trials(np.array([0, 0, 1]), ["a/1/x", "a/1/y", "b/1/z"], 50)
    assert few[0].tolist() == [1, 0, 0] and few[1:] == (["a/1/x", "a/1/x", "a/1/y"], ["a/1/y", "b/1/z", "b/1/z"])
    with pytest.raises(ValueError, match="two speakers"):
        make_trials(np.array([0, 0]), ["a/1/x", "a/1/y"], 5)


def test_shared_speakers_are_refused_or_said_loudly():
    with pytest.raises(UsageError, match=r"held\.txt: shares 1 speakers with ev\.txt \(a \.\.\)"):
        check_held_out("held.txt", ["a/1/x", "c/1/x"], "ev.txt", ["a/2/y", "b/1/x"], False)
    assert "WARNING" in check_held_out("held.txt", ["a/1/x"], "ev.txt", ["a/2/y"], True)
    assert check_held_out("held.txt", ["c/1/x"], "ev.txt", ["a/2/y"], False) == ""
    assert "only utterances were compared" in check_held_out("held.txt", ["utt1"], "ev.txt", ["utt2"], False)
    with pytest.raises(UsageError, match="shares 1 utterances"):
        check_held_out("held.txt", ["utt1"], "ev.txt", ["utt1"], False)


def test_benchmark_runs():
    out = score("--small", "--rounds", "1", script="benchmarks/scoring.py")
    for name in ("one call per trial", "x[pairs[:, 0]]", "EER + minDCF + actDCF + Cllr", "AS-norm"):
        assert name in out
