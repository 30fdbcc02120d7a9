"""Trial lists and score files in the field's forms, conditions, and the command line of tuneThreshold.py."""

import os
import subprocess
import sys

import numpy as np
import programs
import pytest
import soundfile

from errors import UsageError
from scoring.conditions import groups_of, read_table
from scoring.files import (
    SCORE_FORMS,
    TRIAL_FORMS,
    Trials,
    join_labels,
    read_scores,
    read_trials_any,
    write_scores,
    write_trials,
)
from tuneThreshold import ComputeEER

LABELS = np.array([1, 0, 1, 0])
FIRST = ["id1/a/1.wav", "id1/a/1.wav", "id2/c/1.wav", "id2/c/1.wav"]
SECOND = ["id1/b/2.wav", "id3/d/1.wav", "id2/e/5.wav", "id1/b/2.wav"]
SCORES = np.array([0.1 + 0.2, -1 / 3, 1e-17, 5.0])


@pytest.mark.parametrize("form", SCORE_FORMS)
def test_score_files_come_back_as_they_were(tmp_path, form):
    write_scores(tmp_path / "s", SCORES, LABELS, FIRST, SECOND, form)
    back = read_scores(tmp_path / "s")
    assert back.form == form and np.array_equal(back.scores, SCORES)  # every digit
    assert (back.first, back.second) == (FIRST, SECOND)
    assert back.labels is None if "label" not in SCORE_FORMS[form] else np.array_equal(back.labels, LABELS)


@pytest.mark.parametrize("form", TRIAL_FORMS)
def test_trial_lists_come_back_as_they_were(tmp_path, form):
    write_trials(tmp_path / "t", LABELS, FIRST, SECOND, form)
    back = read_trials_any(tmp_path / "t")
    assert back.form == form and np.array_equal(back.labels, LABELS) and (back.first, back.second) == (FIRST, SECOND)


FORMS = [
    (read_trials_any, "1 a b\n0 a c\n", "voxceleb"),
    (read_trials_any, "target a b\nnontarget a c\n", "voxceleb"),
    (read_trials_any, "a b target\na c nontarget\n", "kaldi"),
    (read_trials_any, "a b 1\n\na c 0", "kaldi"),
    (read_trials_any, "\ufeff1 a b\r\n0 a c\r\n", "voxceleb"),  # byte-order mark, CRLF
    (read_trials_any, "  1\ta\tb \n0 \u00e9 c\n", "voxceleb"),
    (read_trials_any, "1 1 b\n0 a 1\n", "voxceleb"),  # names that look like labels: the second line decides
    (read_scores, "0.5 1 a b\n-1e-3 0 a c\n", "voxceleb"),
    (read_scores, "a b 0.5 target\na c nan nontarget\n", "wespeaker"),
    (read_scores, "a b 0.5\na c 1\n", "kaldi"),
    (read_scores, "0.5 a b\n1 a c\n", "voxsrc"),
]


@pytest.mark.parametrize("read, text, form", FORMS)
def test_the_form_is_known_by_the_content(tmp_path, read, text, form):
    (tmp_path / "list").write_bytes(text.encode())
    assert read(tmp_path / "list").form == form and len(read(tmp_path / "list")) == 2


MISTAKES = [
    (read_trials_any, "1 a b\n0 a c\n1 a\n", ":3: expected 'label a b' as in line 1, got 2 columns"),
    (read_trials_any, "\n\na b target\na b c target\n", ":4: expected 'a b label' as in line 3, got 4 columns"),
    (read_trials_any, "1 a b\nyes a c\n", ":2: the label must be 0, 1, nontarget or target, got 'yes'"),
    (read_trials_any, "a b\n", ":1: expected 'label a b' or 'a b label', got 'a b'"),
    (read_trials_any, "a b 0.5 target\n", ":1: expected 'label a b' or 'a b label', got 'a b 0.5 target'"),
    (read_trials_any, "1 a 0\n0 b 1\n", "can be read as voxceleb or kaldi: say which form it has"),
    (read_trials_any, " \n\n", "the trial list is empty"),
    (read_scores, "0.5 1 a b\n0.5x 0 a c\n", ":2: the score must be a number, got '0.5x'"),
    (read_scores, "0.5 1 a b\n0.5 2 a c\n", ":2: the label must be 0, 1, nontarget or target, got '2'"),
    (read_scores, "a b c\n", ":1: expected 'score label a b' or 'a b score label' or 'a b score' or 'score a b', got"),
    (read_scores, "", "the score file is empty"),
    (read_scores, "1 a b\n0 a c\n", "a trial list, and no score file: each line has 0 or 1 where its score should be"),
    (read_scores, "0.5 1 a b\n\0", "not a UTF-8 text file"),
]


@pytest.mark.parametrize("read, text, message", MISTAKES)
def test_mistakes_are_one_line_with_the_line_number(tmp_path, read, text, message):
    (tmp_path / "list").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "list")
    assert (
        message in str(caught.value) and str(tmp_path / "list") in str(caught.value) and "\n" not in str(caught.value)
    )


def test_white_space_beyond_ascii_separates_columns_too(tmp_path):
    (tmp_path / "list").write_text("1 a\u00a0b\n0 a c\n0 \u3000 a c\n", encoding="utf-8")
    assert read_trials_any(tmp_path / "list").second == ["b", "c", "c"]
    (tmp_path / "list").write_text("1 a b\n0 a\u00a0c d\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r":2: expected .* got 4 column"):
        read_trials_any(tmp_path / "list")


def test_scores_without_labels_take_them_from_the_list(tmp_path):
    scored = Trials(FIRST[::-1], SECOND[::-1], None, SCORES[::-1], path="scores")
    trials = Trials(FIRST[:3], SECOND[:3], LABELS[:3], path="trials")
    joined = join_labels(scored, trials)
    assert np.array_equal(joined.scores, SCORES[:3]) and np.array_equal(joined.labels, LABELS[:3])
    trials.second = ["new", *SECOND[1:3]]
    with pytest.raises(
        UsageError, match=r"scores: no score of 1 of the 3 trials of trials, the first: id1/a/1.wav new"
    ):
        join_labels(scored, trials)


def test_groups_of_trials(tmp_path):
    (tmp_path / "list").write_text("1 id1/a id1/b phone\n0 id1/a id3/d mic\n1 id2/c id2/e phone\n0 id2/c id1/b mic\n")
    trials = read_trials_any(tmp_path / "list", columns=True)
    assert groups_of("prefix:3", trials) == ["id1", "id1-id3", "id2", "id1-id2"]
    assert groups_of("prefix:2", trials) == ["id"] * 4
    assert groups_of("column:4", trials) == ["phone", "mic", "phone", "mic"]
    (tmp_path / "speakers.tsv").write_text("corpus\tspeaker_id\tgender\nx\tid1\tf\nx\tid2\tm\n")
    assert groups_of(f"{tmp_path}/speakers.tsv:gender", trials) == ["f", "f-unknown", "m", "f-m"]
    (tmp_path / "files.csv").write_text("path,device\nid1/a,one\nid1/b,two\n")
    assert read_table(f"{tmp_path}/files.csv", "device") == {"id1/a": "one", "id1/b": "two"}
    for name, seconds in (("id1/a", 1), ("id1/b", 3), ("id3/d", 2), ("id2/c", 5), ("id2/e", 4)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, np.zeros(800 * seconds), 800, format="WAV")
    found = groups_of("duration:2,4", trials, tmp_path)
    assert found == ["under 2 s", "under 2 s", "4 s and more", "2 to 4 s"]


CONDITIONS = [
    ("column:9", "the list has 4 columns"),
    ("column:x", "needs a whole number of at least 1, got 'x'"),
    ("gender", "must be prefix:N, column:N, FILE:COLUMN or duration:SECONDS,.."),
    ("nowhere.tsv:gender", "nowhere.tsv: cannot be read: No such file"),
    ("duration:2,1", "the edges must rise from above 0"),
    ("duration:a", "the edges must be seconds"),
    ("duration:2", "needs --test_path"),
]


@pytest.mark.parametrize("condition, message", CONDITIONS)
def test_conditions_that_cannot_be(condition, message):
    with pytest.raises(UsageError) as caught:
        groups_of(condition, Trials(["a"], ["b"], columns=[["1"]] * 4))
    assert message in str(caught.value)


def command(*arguments):
    return programs.run(programs.ROOT / "tuneThreshold.py", *arguments)


def test_a_reader_who_leaves_ends_the_output_quietly(tmp_path):
    (tmp_path / "scores").write_text("".join(f"{i} {i % 2} a{i % 9}/x b/{i}\n" for i in range(40)))
    root = programs.ROOT
    for word, codes in ((tmp_path / "scores", {141}), ("--help", {0, 141})):  # argparse may swallow it
        reader, writer = os.pipe()
        os.close(reader)
        words = [sys.executable, "tuneThreshold.py", str(word)]
        done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, cwd=root, timeout=100)
        os.close(writer)
        assert done.returncode in codes and done.stderr == b""


def test_the_command_line(tmp_path):
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(8), 20)
    labels = np.tile([1, 0], 80)
    other = np.where(labels == 1, owner, (owner + 3) % 8)
    first, second = ([f"id{s}/v/{i}.wav" for i, s in enumerate(side)] for side in (owner, other))
    scores = rng.normal(labels * 2.0, 1)
    write_scores(tmp_path / "scores", scores, None, first, second, "kaldi")
    write_trials(tmp_path / "trials", labels, first, second, "kaldi")
    done = command(tmp_path / "scores", "--trials", tmp_path / "trials", "--by", "column:3", "--false_accept", "0.05")
    assert done.returncode == 0, done.stderr
    _, pooled, nontarget, target, note, calibration, wanted = done.stdout.splitlines()
    assert float(pooled.split()[1]) == pytest.approx(ComputeEER(scores, labels)[0], abs=0.01) and "*" not in pooled
    assert "only nontargets" in nontarget and "only targets" in target and note.startswith("miss and false accept")
    assert calibration.startswith("actDCF and Cllr: of scores calibrated on these trials")
    assert wanted.startswith("false accept 0.05: threshold ") and wanted.endswith("accepts 5.00 %")
    # A threshold is printed so that it does what is said of it: 0.5 would accept both trials.
    write_scores(tmp_path / "equal", np.array([0.5, 0.5, np.nan]), [0, 1, 1], ["a", "b", "b"], ["b", "b", "b"])
    done = command(tmp_path / "equal", "--false_accept", "0")
    value = float(done.stdout.splitlines()[-1].split("threshold ")[1].split(",")[0])
    assert value > 0.5 and done.stderr.count("filtered 1 of 3 scores") == 1
    for arguments, message in (
        ([tmp_path / "scores"], "no labels in a file of 'kaldi' scores: give --trials"),
        ([tmp_path / "nowhere"], "cannot be read: No such file"),
        ([tmp_path / "scores", "--p_target", "2"], "--p_target must lie between 0 and 1"),
        ([tmp_path / "scores", "--tri", "x"], "unrecognized arguments"),
        ([tmp_path / "scores", "--by", "column:4"], "--by column:4: needs --trials, the list with the columns"),
    ):
        failed = command(*arguments)
        assert failed.returncode == 2 and message in failed.stderr and len(failed.stderr.splitlines()) == 1
