"""Resuming with another evaluation: EERs that cannot be compared are not, and trials of known voices are told."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from scoring.cautions import known_voices
from training.progress import new_best
from training.protocol import LIST, differences, list_before, protocol_of
from trainSpeakerNet import describe_run

BEST = {"eer": 0.0, "epoch": 1, "threshold": 0.5, "waited": 1}


def test_another_trial_list_starts_the_best_anew_and_replaces_model_best(settings, tools, data, tmp_path, capsys):
    first = tools.build(settings, max_epoch=3, test_interval=1)
    first.progress.best = dict(BEST)
    first.saver.last()
    (first.files.model / "model_best.model").write_text("of the easy list")
    hard = tmp_path / "hard.txt"
    hard.write_text("".join((data / "trials.txt").read_text().splitlines(keepends=True)[::2]))
    again = tools.build(settings, test_list=hard, max_epoch=3, test_interval=1)
    assert again.resume() and again.progress.best == new_best()
    assert "best EER so far, 0.00 % at epoch 1, is of another protocol (test_list): best and" in capsys.readouterr().out
    again.progress.epoch = again.progress.step = 1
    again.evaluate()
    again.saver.settle(wait=True)
    assert again.progress.best["epoch"] == 1 and torch.load(first.files.model / "model_best.model", weights_only=True)
    again.saver.last()
    once_more = tools.build(settings, test_list=hard, max_epoch=3, test_interval=1)
    assert once_more.resume() and once_more.progress.best == again.progress.best
    assert "protocol" not in capsys.readouterr().out


def config_of(settings, **more):
    values = {"num_eval": 10, "max_test_pairs": 0, "score_mode": "cosine", "eval_frames": 300, "seed": 3, **more}
    return SimpleNamespace(**{**settings, **values})


@pytest.mark.parametrize(
    "before, now, names",
    [
        ({}, {"eval_frames": 0}, ["eval_frames"]),
        ({}, {"num_eval": 5}, ["num_eval"]),
        ({"eval_frames": 0}, {"eval_frames": 0, "num_eval": 5}, []),
        ({}, {"score_mode": "euclidean"}, ["score_mode"]),
        ({}, {"max_test_pairs": 10}, ["max_test_pairs"]),
        ({}, {"seed": 4}, []),
        ({"max_test_pairs": 10}, {"max_test_pairs": 10, "seed": 4}, ["seed"]),
        ({}, {"lr": 1.0, "max_epoch": 9}, []),
    ],
)
def test_what_an_eer_depends_on_is_compared_in_old_states_too(settings, tmp_path, before, now, names):
    old, new = config_of(settings, **before), config_of(settings, **now)
    for state in ({"protocol": protocol_of(old), "config": {}}, {"config": vars(old)}):
        assert differences(protocol_of(new), state, "") == names


def test_a_list_of_the_same_name_and_other_content_is_another_one(settings, tmp_path, data):
    trials, same = tmp_path / "trials.txt", tmp_path / "moved.txt"
    trials.write_text((data / "trials.txt").read_text())
    same.write_text(trials.read_text())
    old = config_of(settings, test_list=str(trials))
    protocol = protocol_of(old)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"run_info": {"sha256": {"test_list": protocol[LIST]}}}))
    assert differences(protocol_of(config_of(settings, test_list=str(same))), {"protocol": protocol}, "") == []
    trials.write_text(trials.read_text() + "0 a b\n")
    for state in ({"protocol": protocol}, {"config": vars(old)}):
        assert differences(protocol_of(old), state, list_before(tmp_path)) == ["test_list"]


def test_people_of_the_train_list_in_the_trials_are_counted_at_the_start(
    settings, tools, data, tmp_path, capsys, monkeypatch
):
    trained = [line.split()[1] for line in (data / "train_list.txt").read_text().splitlines()]
    trials = tmp_path / "trials.txt"
    trials.write_text(f"{(data / 'trials.txt').read_text()}1 {trained[0]} {trained[1]}\n0 {trained[0]} {trained[6]}\n")
    describe_run(tools.build(settings, test_list=trials), {})
    said = capsys.readouterr().out
    assert "WARNING: the trials share 2 of the 6 speakers, the first 'train000' and 3 files with the train list" in said
    describe_run(tools.build(settings), {})
    assert "share" not in capsys.readouterr().out
    other = known_voices(["anna"], ["a/1.wav"], ["anna/2.wav", "x.wav"], "train", "test")
    assert other.startswith("the trials share 1 of the 1 speakers, the first 'anna' with the train list")
    assert known_voices(["anna"], ["a/1.wav"], ["b/1.wav"], "set/", "./set/../set") == ""
    assert "share 1 file " in known_voices(["anna"], ["a/1.wav"], ["a/./1.wav"], "set/", "./set/../set")
    monkeypatch.chdir(tmp_path)
    for train, trial, *roots in (
        ("a/1.wav", "a/1.wav", tmp_path / "set", "set"),
        (str(tmp_path / "set" / "a.tar" / "1.wav"), "a.tar/1.wav", "", "set"),
        ("a/1.wav", str(tmp_path / "set" / "a" / "1.wav"), "set", "elsewhere"),
    ):
        assert "share 1 file " in known_voices(["anna"], [train], [trial], *map(str, roots))
