"""Who is kept out of training, the trials of them, and VoxCeleb1's own lists."""

import collections

import numpy as np
import pytest
import yaml

from errors import UsageError
from preparation import trials
from preparation.corpora import Utterance
from preparation.outputs import write_run
from preparation.trials import divide


def utterance(speaker, session, number, gender="", part=""):
    return Utterance(f"/x/{speaker}/{session}/{number}.wav", speaker, f"{session}/{number}.wav", session, gender, part)


def people(count, sessions=3, each=2, **more):
    return [
        utterance(f"p{i:02}", f"s{s}", n, gender="fm"[i % 2], **more)
        for i in range(count)
        for s in range(sessions)
        for n in range(each)
    ]


def read(path):
    return [line.split() for line in path.read_text().splitlines()]


def test_trials_are_balanced_across_sessions_and_of_one_gender(tmp_path):
    good = people(20)
    division = divide(good, [], tmp_path / "trials.txt", 0.3, 1)
    rows = read(tmp_path / "trials.txt")
    tested = {path.split("/")[0] for _, *pair in rows for path in pair}
    assert len(tested) == 6 and tested.isdisjoint(u.speaker for u in division.train)
    assert len(division.train) == 14 * 6 and len(set(map(tuple, rows))) == len(rows)
    labels = collections.Counter(label for label, *_ in rows)
    assert labels["1"] == labels["0"] == 6 * 12  # all pairs of two sessions: 3 pairs of sessions, 2 x 2 of each
    for label, a, b in rows:
        one, other = a.split("/"), b.split("/")
        assert (one[0] == other[0]) == (label == "1") and (label == "0" or one[1] != other[1])
        assert int(one[0][1:]) % 2 == int(other[0][1:]) % 2
    assert "6 of the 6 people across sessions, nontargets of one gender" in division.said
    again = divide(people(20), [], tmp_path / "again.txt", 0.3, 1)
    assert (tmp_path / "again.txt").read_bytes() == (tmp_path / "trials.txt").read_bytes()
    assert [u.listed for u in again.train] == [u.listed for u in division.train]
    divide(people(20), [], tmp_path / "other.txt", 0.3, 2)
    assert (tmp_path / "other.txt").read_bytes() != (tmp_path / "trials.txt").read_bytes()


def test_a_corpus_that_sets_people_apart_is_followed_unless_they_are_the_same(tmp_path):
    good = people(8, part="train")
    for u in good[-18:]:
        u.part = "test"
    division = divide(good, [], tmp_path / "t.txt", 0, 1)
    assert {u.speaker for u in division.train} == {f"p{i:02}" for i in range(5)}
    assert "3 other people, whom the corpus sets apart" in division.said
    for i, u in enumerate(good):
        u.part = ("train", "test")[i % 2]  # everybody in both
    division = divide(good, [], tmp_path / "t.txt", 0, 1)
    assert "drawn at random" in division.said and len(division.train) == 6 * 6


def test_at_most_a_hundred_people_are_kept_unless_a_share_is_given(tmp_path):
    good = people(600, sessions=2, each=1)
    assert "of 100 other people" in divide(good, [], tmp_path / "t.txt", 0, 1).said
    assert "of 120 other people" in divide(good, [], tmp_path / "t.txt", 0.2, 1).said


@pytest.fixture
def vox():
    """VoxCeleb1 with two people of dev and two of test, and one of VoxCeleb2."""
    parts = {"id10001": "train", "id10002": "train", "id10270": "test", "id10271": "test", "id00012": "train"}
    return [utterance(name, "v", f"{n:05}", part=part) for name, part in parts.items() for n in (1, 2)]


def trial_list(path, count, *speakers):
    lines = [f"1 {a}/v/00001.wav {a}/v/00002.wav\n" for a in speakers]
    lines += [f"0 {speakers[0]}/v/00001.wav {speakers[1]}/v/00002.wav\n"] * (count - len(lines))
    path.write_text("".join(lines))


def test_the_official_lists_say_who_is_tested(vox, tmp_path, monkeypatch):
    meta = tmp_path / "vox1" / "meta"
    meta.mkdir(parents=True)
    (tmp_path / "my set").mkdir()
    trial_list(meta / "veri_test2.txt", 37_611, "id10270", "id10271")
    division = divide(vox, [tmp_path / "vox1"], tmp_path / "t.txt", 0, 1)
    assert division.trials == {"O": meta / "veri_test2.txt"} and not (tmp_path / "t.txt").exists()
    assert {u.speaker for u in division.train} == {"id10001", "id10002", "id00012"}
    assert "VoxCeleb1-O: 37611 trials, the known number, of 2 people" in division.said
    monkeypatch.setitem(trials.OFFICIAL, "list_test_all2.txt", ("E", 9))
    trial_list(meta / "list_test_all2.txt", 9, "id10001", "id10002", "id10270", "id10999")
    division = divide(vox, [tmp_path / "vox1"], tmp_path / "t.txt", 0, 1)
    assert list(division.trials) == ["O", "E"] and {u.speaker for u in division.train} == {"id00012"}
    assert "VoxCeleb1-E: 9 trials, the known number, of 4 people; 2 of its files are not at hand" in division.said
    files = write_run(tmp_path / "my set", tmp_path, division, ("", "", 0), 1.0, {"musan": "", "rirs": ""})
    written = yaml.safe_load(files.config.read_text())
    assert list(written["test_list"]) == ["O", "E"] and written["test_list"]["O"] == str(meta / "veri_test2.txt")
    division = divide(vox[:-2], [tmp_path / "vox1"], tmp_path / "t.txt", 0, 1)  # without VoxCeleb2
    assert list(division.trials) == ["O"] and len(division.train) == 4
    assert "VoxCeleb1-E: not used, for all who are left to train on are in it" in division.said


def test_an_official_list_that_is_not_whole_or_of_other_files_is_refused(vox, tmp_path):
    trial_list(tmp_path / "veri_test2.txt", 37_610, "id10270", "id10271")
    with pytest.raises(UsageError, match=r"has 37610 trials, VoxCeleb1-O has 37611: copy it again"):
        divide(vox, [tmp_path], tmp_path / "t.txt", 0, 1)
    trial_list(tmp_path / "veri_test2.txt", 37_611, "id10273", "id10274")
    with pytest.raises(UsageError, match=r"none of its 4 files is at hand, such as id10273/v/00001.wav"):
        divide(vox, [tmp_path], tmp_path / "t.txt", 0, 1)
    trial_list(tmp_path / "veri_test2.txt", 37_611, "id10270", "id10271")
    with pytest.raises(UsageError, match="nobody is left to train on: give VoxCeleb2 too"):
        divide([u for u in vox if u.part == "test"], [tmp_path], tmp_path / "t.txt", 0, 1)
    assert sum(count for _, count in trials.OFFICIAL.values()) == np.sum([37611, 579818, 550894, 37720, 581480, 552536])
