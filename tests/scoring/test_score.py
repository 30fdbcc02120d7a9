"""score.py through the real command line on tiny embeddings with known answers, and the scoring benchmark."""

import contextlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from programs import ROOT

from corpus.lists import read_trials
from errors import UsageError
from score import main
from scoring.backend import Backend
from scoring.calibration import LogisticCalibration
from scoring.chain import without_trial_speakers
from scoring.held_out import check_held_out, make_trials
from settings.command_line import run
from storage import embedding_files


def command(*words):
    """Run a script as a user does: (status, stdout, stderr)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
    )
    return done.returncode, done.stdout, done.stderr


def score(*words, status=0):
    """Run score.py's command line in this process: its stdout, or for status 2 its one line of stderr."""
    out, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(complaint):
        found = run(main, [*map(str, words), "--draws", "50"])
    assert found == status, complaint.getvalue()
    if status == 2:
        assert complaint.getvalue().count("\n") == 1 and out.getvalue() == ""
        return complaint.getvalue()
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Embeddings of 24 evaluation, 80 held-out and 30 cohort speakers, with their lists, in the VoxCeleb layout."""
    out = tmp_path_factory.mktemp("scoring")
    rng = np.random.default_rng(0)
    names, rows = [], []
    for kind, speakers, utterances in (("ev", 24, 4), ("ho", 80, 4), ("co", 30, 3)):
        for s in range(speakers):
            place = rng.standard_normal(16) + 0.5
            for u in range(utterances):
                names.append(f"{kind}{s:02d}/session{u % 2}/{u}.wav")
                rows.append(place + 0.8 * rng.standard_normal(16))
    np.savez(out / "all.npz", names=np.array(names), embeddings=np.array(rows, dtype=np.float32))
    np.savez(out / "other.npz", names=np.array(names[:1]), embeddings=np.ones((1, 16), dtype=np.float32))
    for kind in ("ev", "ho"):
        own = [n for n in names if n.startswith(kind)]
        trials = make_trials(np.unique([n[:4] for n in own], return_inverse=True)[1], own, 300, 1)
        (out / f"{kind}.txt").write_text("".join(f"{y} {a} {b}\n" for y, a, b in zip(*trials)))
    (out / "cohort.txt").write_text("".join(f"{n[:4]} {n}\n" for n in names if n.startswith("co")))
    (out / "two.txt").write_text(
        "1 ev00/session0/0.wav ev00/session1/1.wav\n0 ev00/session0/0.wav ev01/session1/1.wav\n"
    )
    (out / "alien.txt").write_text("1 x/a.wav x/b.wav\n")
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
    both = [f"{'fm'[s % 2]}{p}" for s, p in zip(labels, paths)]
    y, first, second = make_trials(labels, both, 40, seed=3, prefix=1)
    assert len(y) == 80 and all(a[0] == b[0] for a, b in zip(first, second))
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


def test_score_file_and_figures_of_known_embeddings(tmp_path):
    write_embeddings(tmp_path / "e.npz", {"a": [2, 0], "b": [0, 3], "c": [1, 1], "d": [-1, 0]})
    (tmp_path / "t.txt").write_text("1 a c\n1 b c\n0 a b\n0 a d\n")
    words = ("--trials", tmp_path / "t.txt", "--embeddings", tmp_path / "e.npz", "--out", tmp_path / "out")
    status, out, complaint = command("score.py", *words, "--draws", "50")
    assert status == 0, complaint
    assert "4 trials, 2 of them target; cosine" in out and "EER %         0.00" in out
    rows = [line.split() for line in (tmp_path / "out/scores.txt").read_text().splitlines()]
    assert [r[1:] for r in rows] == [["1", "a", "c"], ["1", "b", "c"], ["0", "a", "b"], ["0", "a", "d"]]
    assert np.allclose([float(r[0]) for r in rows], [np.sqrt(0.5), np.sqrt(0.5), 0, -1])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["scores"]["figures"]["eer"] == 0 and result["calibrated"] is None
    assert result["options"]["trials"] == str(tmp_path / "t.txt") and len(result["sha256"]) == 2
    pictures = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert pictures == {"det.png", "roc.png", "scores.png", "calibration.png"}


def write_embeddings(path, rows: dict):
    np.savez(path, names=np.array(list(rows)), embeddings=np.array(list(rows.values()), dtype=np.float32))


def test_enrollment_by_several_utterances(tmp_path):
    rows = {"s1": [1, 0], "s2": [0, 5], "t": [3, 3], "u": [1, 0], "v": [0, -1]}
    write_embeddings(tmp_path / "e.npz", rows)
    (tmp_path / "enroll.txt").write_text("S s1 s2\nV v\n")
    (tmp_path / "t.txt").write_text("S t target\nS u nontarget\nV u nontarget\n")
    words = ("--trials", tmp_path / "t.txt", "--embeddings", tmp_path / "e.npz", "--enroll", tmp_path / "enroll.txt")
    for by, first in (("mean", 1.0), ("scores", np.sqrt(0.5))):
        score(*words, "--enroll_by", by, "--out", tmp_path / by, "--form", "kaldi")
        scores = [float(line.split()[2]) for line in (tmp_path / by / "scores.txt").read_text().splitlines()]
        assert np.allclose(scores, [first, np.sqrt(0.5) if by == "mean" else 0.5, 0])
    (tmp_path / "t.txt").write_text("1 s1 s2\n0 s1 v\n")
    said = score(*words, status=2)
    assert (
        "--enroll: has none of the models of the trials, such as s1; the first name of each trial, of the held" in said
    )


def test_models_without_any_embedding_are_one_line(tmp_path):
    write_embeddings(tmp_path / "e.npz", {"t": [3, 3], "u": [1, 0], "s1": [np.nan, 0], "v": [np.inf, 0]})
    (tmp_path / "enroll.txt").write_text("S s1\nV v\n")
    (tmp_path / "t.txt").write_text("S t target\nV u nontarget\n")
    words = ("--trials", tmp_path / "t.txt", "--embeddings", tmp_path / "e.npz", "--enroll", tmp_path / "enroll.txt")
    assert "--enroll: no utterance has a finite embedding; the first, s1" in score(*words, status=2)


def test_lost_embeddings_are_named_counted_and_bound_the_error_rate(tmp_path):
    rows = {f"g{i}": [np.cos(i / 9), np.sin(i / 9)] for i in range(10)}
    write_embeddings(tmp_path / "e.npz", {**rows, "bad": [np.nan, 1]})
    trials = [f"{int(abs(i - j) < 4)} g{i} g{j}" for i in range(10) for j in range(i)]
    (tmp_path / "t.txt").write_text("\n".join([*trials, "1 bad g1", "0 g2 gone"]) + "\n")
    words = ("--trials", tmp_path / "t.txt", "--embeddings", tmp_path / "e.npz", "--out", tmp_path / "out")
    out = score(*words)
    assert "bad: non-finite embedding: 1 NaN and 0 Inf of 2 values; spoils 1 trial" in out
    assert "gone: not in" in out
    assert "2 scores are non-finite (1 of target trials): EER 0.00 % without them" in out
    lost = (tmp_path / "out/nan_trials.txt").read_text().splitlines()
    assert lost == ["nan 1 bad g1", "nan 0 g2 gone"]
    out = score(*words, "--max_nan_score_pct", "1", status=1)
    assert "no figures of the scores: 4.3 % of the scores are non-finite (--max_nan_score_pct 1)" in out
    assert json.loads((tmp_path / "out/result.json").read_text())["scores"]["figures"] is None


def test_the_whole_chain_and_its_saved_backend(folder, tmp_path):
    whole = ("--trials", folder / "ev.txt", "--embeddings", folder / "all.npz", "--durations", folder / "seconds.txt")
    chain = ("--cohort", folder / "cohort.txt", "--submean", "--norm", "asnorm", "--top_n", "20", "--qmf")
    more = ("--calibrate", folder / "ho.txt", "--out", tmp_path / "out", "--save_backend", tmp_path / "b.npz")
    out = score(*whole, *chain, *more)
    assert "sub-mean + cosine + AS-norm (top 20 of 30) + QMF calibration on" in out
    result = json.loads((tmp_path / "out/result.json").read_text())
    before, after = (result[key]["figures"] for key in ("scores", "calibrated"))
    assert after["cllr"] < before["cllr"] and after["act_dcf_0.01"] < before["act_dcf_0.01"]
    assert after["min_cllr"] <= after["cllr"] and after["min_dcf_0.05"] <= after["act_dcf_0.05"]
    low, high = result["scores"]["intervals"]["eer"]
    assert low <= before["eer"] <= high

    data = np.load(folder / "all.npz")
    names, x = data["names"].tolist(), data["embeddings"]
    backend = Backend.load(tmp_path / "b.npz")
    assert backend.needs_durations
    lengths = dict(line.split() for line in (folder / "seconds.txt").read_text().splitlines())
    for line in (tmp_path / "out/llrs.txt").read_text().splitlines()[::40]:
        value, _, first, second = line.split()
        pair = [x[names.index(n)] for n in (first, second)]
        llr = backend.llr(*pair, *(float(lengths[n]) for n in (first, second)))
        assert llr == pytest.approx(float(value), abs=1e-4)
    words = ("--backend", tmp_path / "b.npz", "--out", tmp_path / "again", "--by", "prefix:3")
    again = score(*whole, *words)
    assert "ev0-ev1" in again and "pooled" in again
    assert json.loads((tmp_path / "again/result.json").read_text())["by_condition"][0]["group"] == "pooled"
    assert "AS-norm (top 20 of 30) + QMF calibration" in again and "these very trials" not in again
    seen = score("--trials", folder / "ho.txt", *whole[2:], "--backend", tmp_path / "b.npz")
    assert f"WARNING: {tmp_path / 'b.npz'}: its calibration was learnt on these very trials" in seen
    assert (tmp_path / "again/llrs.txt").read_text() == (tmp_path / "out/llrs.txt").read_text()


def test_the_threshold_of_a_wanted_rate_is_learnt_on_the_held_out_trials(folder, tmp_path):
    words = ("--trials", folder / "ev.txt", "--embeddings", folder / "all.npz", "--calibrate", folder / "ho.txt")
    score(*words, "--save_backend", tmp_path / "b.npz", "--false_accept", "0.1")
    backend = Backend.load(tmp_path / "b.npz")
    labels, first, second = read_trials(folder / "ho.txt")
    data = np.load(folder / "all.npz")
    row = {name: i for i, name in enumerate(data["names"].tolist())}
    pairs = np.array([[row[a], row[b]] for a, b in zip(first, second)])
    _, names, features = backend.score_trials(data["embeddings"], data["embeddings"], pairs)
    accepted = backend.decision(backend.calibrate(names, features))[labels == 0]
    assert accepted.sum() == int(0.1 * len(accepted))
    score(*words[:4], "--save_backend", tmp_path / "raw.npz")
    raw = Backend.load(tmp_path / "raw.npz")
    assert raw.calibration is None and -1 < raw.threshold < 1
    # A back-end that is read and saved again keeps what no option changes; a new calibration has the prior it is for.
    score(*words[:4], "--backend", tmp_path / "b.npz", "--save_backend", tmp_path / "same.npz")
    assert Backend.load(tmp_path / "same.npz").header() == backend.header()
    score(*words, "--backend", tmp_path / "b.npz", "--p_target", "0.2", "--save_backend", tmp_path / "new.npz")
    new = Backend.load(tmp_path / "new.npz")
    assert (new.prior, new.calibration.prior, new.threshold) == (0.2, 0.2, None)
    backend.vad, backend.caution = "energy", "learnt on few errors"
    backend.save(tmp_path / "vad.npz")
    said = score(*words[:4], "--backend", tmp_path / "vad.npz")
    assert "made with vad energy" in said and "vad.npz: learnt on few errors" in said
    score(*words, "--backend", tmp_path / "vad.npz", "--save_backend", tmp_path / "anew.npz")
    assert Backend.load(tmp_path / "anew.npz").vad == "none"  # that of the trials that it was learnt on


def test_a_model_gives_the_embeddings_and_its_identity(data, settings, tools, tmp_path):
    from speaker_model import load_model
    from storage.files import save_atomically

    save_atomically(tools.build(settings).state.capture(), tmp_path / "m.model")
    trials = ("--trials", data / "trials.txt", "--root", data / "wav")
    out = score(
        *trials, "--initial_model", tmp_path / "m.model", "--save_backend", tmp_path / "b.npz", "--out", tmp_path
    )
    assert "trials" in out
    model, backend = load_model(tmp_path / "m.model"), Backend.load(tmp_path / "b.npz")
    assert backend.identity == model.identity
    value, _, first, second = (tmp_path / "scores.txt").read_text().splitlines()[3].split()
    x = [model.embed_file(data / "wav" / name) for name in (first, second)]
    assert backend.score(*x) == pytest.approx(float(value), abs=1e-5)

    elsewhere = score(*trials[:3], tmp_path, "--initial_model", tmp_path / "m.model", status=2)
    first = read_trials(data / "trials.txt")[1][0]
    assert elsewhere.startswith(f"--root: below '{tmp_path}': no embedding of the ")
    assert elsewhere.endswith(f"utterances; the first, {first}: no such file\n")

    files = [str(p.relative_to(data / "wav")) for p in sorted((data / "wav").rglob("*.flac"))]
    x = np.random.default_rng(0).standard_normal((len(files), 12))
    embedding_files.write_embeddings(tmp_path / "e.npz", files, x, model.identity)
    score(*trials, "--embeddings", tmp_path / "e.npz", "--backend", tmp_path / "b.npz")
    embedding_files.write_embeddings(tmp_path / "other.npz", files, x, "another")
    words = (*trials, "--embeddings", tmp_path / "other.npz", "--backend", tmp_path / "b.npz")
    assert "b.npz: made with embeddings of another model" in score(*words, status=2)
    words = (*trials, "--embeddings", tmp_path / "e.npz", tmp_path / "other.npz")
    assert "other.npz: embeddings of another model" in score(*words, status=2)


def test_fusion_learns_on_held_out_scores_of_both_systems(folder, tmp_path):
    words = ("--embeddings", folder / "all.npz")
    for kind in ("ev", "ho"):
        score("--trials", folder / f"{kind}.txt", *words, "--out", tmp_path / kind)
        lines = (tmp_path / kind / "scores.txt").read_text().splitlines()
        rng = np.random.default_rng(len(kind))
        other = [f"{5 * float(v) + rng.normal(0, 1)} {rest}" for v, rest in (line.split(" ", 1) for line in lines)]
        (tmp_path / f"{kind}.other").write_text("\n".join(other) + "\n")
    fuse = (
        "--fuse",
        tmp_path / "ev.other",
        "--fuse_calibrate",
        tmp_path / "ho.other",
        "--calibrate",
        folder / "ho.txt",
    )
    out = score("--trials", folder / "ev.txt", *words, *fuse, "--out", tmp_path / "fused")
    assert "fusion with 1 score file" in out and "score files" not in out
    weights = json.loads((tmp_path / "fused/result.json").read_text())["calibration"]
    assert f"weights: score {weights['weights'][0]:.4g}, system 1 {weights['weights'][1]:.4g}" in out
    alone = score("--trials", folder / "ev.txt", *fuse, "--out", tmp_path / "alone")
    assert "calibrated" in alone
    held_out = np.array([float(line.split()[0]) for line in (tmp_path / "ho/scores.txt").read_text().splitlines()])
    other = np.array([float(line.split()[0]) for line in (tmp_path / "ho.other").read_text().splitlines()])
    labels, _, _ = read_trials(folder / "ho.txt")
    expected = LogisticCalibration.fit(np.stack([held_out, other], axis=1), labels, 0.05, ["a", "b"])
    mine = float((tmp_path / "ev/scores.txt").read_text().split()[0])
    theirs = float((tmp_path / "ev.other").read_text().split()[0])
    fused = float((tmp_path / "fused/llrs.txt").read_text().split()[0])
    assert fused == pytest.approx(expected.llrs([[mine, theirs]])[0], abs=1e-6)


def test_held_out_trials_without_errors_are_warned_of(folder, tmp_path):
    rows = (folder / "ho.txt").read_text().splitlines()
    (tmp_path / "few.txt").write_text("\n".join([*rows[:5], *rows[-5:]]) + "\n")
    words = ("--trials", folder / "ev.txt", "--embeddings", folder / "all.npz", "--calibrate", tmp_path / "few.txt")
    assert "fewer than 30 errors its probabilities are a guess" in score(*words)


def test_cohort_speakers_of_the_trials_are_left_out_and_plda_trains(folder, tmp_path):
    cohort = (folder / "cohort.txt").read_text() + "ev00 ev00/session0/0.wav\nho01 ho01/session0/0.wav\n"
    (tmp_path / "cohort.txt").write_text(cohort)
    words = ("--trials", folder / "ev.txt", "--embeddings", folder / "all.npz", "--cohort", tmp_path / "cohort.txt")
    out = score(*words, "--train_plda", "--lda_dimension", "8", "--norm", "snorm", "--save_backend", tmp_path / "p.npz")
    assert "1 of 92 utterances are of speakers of the trials: left out" in out
    assert "PLDA of 91 utterances of 31 speakers: dimension 8" in out and "PLDA of dimension 8 + S-norm" in out
    out = score(*words[:4], "--plda", tmp_path / "p.npz")
    assert "PLDA of dimension 8" in out and "norm" not in out.splitlines()[0]


def test_cohort_speakers_are_those_of_the_trials_whatever_the_list_calls_them():
    trials, lines = ["a/9.wav", "c/1.wav"], []
    names = ["a/1.wav", "b/1.wav", "e/1.wav", "e/2.wav"]
    kept = without_trial_speakers(names, ["Ann", "Ben", "Ann", "Ann"], trials, lines.append)
    assert kept == (["b/1.wav"], ["Ben"]) and "3 of 4 utterances" in lines[0]
    assert without_trial_speakers(names, None, trials, print)[0] == names[1:]
    assert without_trial_speakers(["1.wav", "2.wav", "3.wav"], ["Ann", "Ann", "Ben"], ["1.wav"], print)[0] == ["3.wav"]
    names = ["wav/1.wav", "wav/2.wav"]  # a folder of several people says nothing of who they are
    assert without_trial_speakers(names, ["Ann", "Ben"], ["wav/9.wav"], print) == (names, ["Ann", "Ben"])
    with pytest.raises(UsageError, match="every speaker of it occurs"):
        without_trial_speakers(["a/1.wav"], ["Ann"], trials, print)


def test_held_out_list_from_the_command_line(folder, tmp_path):
    out = score("--make_trials", folder / "cohort.txt", tmp_path / "h.txt", "--pairs", "15", "--speakers", "9")
    assert "15 target and 15 nontarget trials of 9 speakers" in out
    labels, first, second = read_trials(tmp_path / "h.txt")
    assert labels.sum() == 15 and len({p[:4] for p in first + second}) == 9


def test_a_held_out_list_of_names_with_spaces_is_read_again(tmp_path):
    rows = [f"Anna M\u00fcller {s}\tAnna M\u00fcller {s}/day {u}/{u}.wav\n" for s in range(8) for u in range(3)]
    (tmp_path / "train.txt").write_text("".join(rows), encoding="utf-8")
    score("--make_trials", tmp_path / "train.txt", tmp_path / "h.txt", "--pairs", "5", "--speakers", "4")
    drawn = read_trials(tmp_path / "h.txt")
    assert len(drawn[0]) == 10 and {name.split("/")[1] for name in drawn[1]} <= {"day 0", "day 1", "day 2"}


def test_usage_errors_come_before_torch_and_without_a_traceback():
    code = "import sys, score; from settings.command_line import run; status = run(score.main, ['--trials', 'none']);"
    code += " sys.exit(status if 'torch' not in sys.modules else 9)"
    assert command("-c", code) == (
        2,
        "",
        "score.py: give --embeddings FILE, or --initial_model with --root, or --fuse SCORES\n",
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "--trials FILE is needed"),
        ("--trials {f}/ev.txt", "give --embeddings FILE, or --initial_model"),
        ("--trials {f}/none.txt --embeddings {f}/all.npz", "--trials: no such file"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --cohort {f}/cohort.txt", "--cohort is of no use without"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --submean", "--submean needs --cohort"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --norm asnorm", "--norm asnorm needs --cohort"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --qmf", "--qmf needs --calibrate"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --calibrate {f}/ho.txt --calibrate_folds", "not both"),
        ("--trials {f}/two.txt --embeddings {f}/all.npz --calibrate_folds", "two.txt: only 2 speakers; give held-out"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --p_target 1", "--p_target must lie between 0 and 1"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --calibrate {f}/ev.txt", "shares 24 speakers"),
        (
            "--trials {f}/ev.txt --embeddings {f}/all.npz --durations {f}/ev.txt --norm none",
            "ev.txt:1: expected 'utter",
        ),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --backend {f}/all.npz", "not a back-end of score.py"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --false_accept 0.1", "needs --save_backend"),
        (
            "--trials {f}/alien.txt --embeddings {f}/all.npz",
            "all.npz: has none of the 2 utterances, such as 'x/a.wav'; its names are like '",
        ),
        ("--make_trials {f}/cohort.txt /tmp/x --pairs 0", "--pairs must be at least 1, got 0"),
        ("--make_trials {f}/cohort.txt {f}/./cohort.txt", "cohort.txt' is read by this command and would be"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --save_backend {f}/all.npz", "all.npz' is read by this command"),
        (
            "--trials {f}/ev.txt --embeddings {f}/all.npz --cohort {f}/cohort.txt --norm asnorm --top_n 1",
            "--top_n must be at least 2, got 1",
        ),
        ("--make_trials {f}/ev.txt /tmp/x", "ev.txt:1: expected 'speaker path'"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz {f}/other.npz", "other.npz: 'ev00/session0/0.wav' has another"),
        (
            "--trials {f}/ev.txt --embeddings {f}/all.npz --fuse {f}/ev.txt --calibrate {f}/ho.txt",
            "--fuse_calibrate take",
        ),
        ("--trials {f}/ev.txt --initial_model x", "--initial_model needs --root"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --out {f}/ev.txt/x", "--out: cannot write into"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --save_backend {f}/b.json", "b.json' must end in .npz"),
        (
            "--trials {f}/ev.txt --embeddings {f}/all.npz --save_backend {f}/ev.txt/b.npz",
            "--save_backend: cannot write",
        ),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --by duration:2", "--by duration needs --root"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --by gender", "--by gender: must be prefix:N"),
        ("--trials {f}/ev.txt --embeddings {f}/all.npz --root {f}/none", "--root: no such folder: '"),
    ],
)
def test_usage_errors_are_one_line(folder, words, message):
    assert message in score(*words.format(f=folder).split(), status=2)


def test_benchmark_runs():
    status, out, complaint = command("benchmarks/scoring.py", "--small", "--rounds", "1")
    assert status == 0, complaint
    for name in ("one call per trial", "x[pairs[:, 0]]", "EER + minDCF + actDCF + Cllr", "AS-norm"):
        assert name in out
