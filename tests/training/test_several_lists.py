"""Several train lists with roots and weights of their own, and several trial lists in one evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from errors import UsageError
from training.start import configure


@pytest.fixture
def lists(settings, data, tmp_path):
    """Keys of a run with two train lists and two trial lists, from two folders."""
    lines = (data / "train_list.txt").read_text().splitlines()
    (tmp_path / "one.txt").write_text("\n".join(lines[:20]))
    (tmp_path / "two.txt").write_text("\n".join(line.replace(" ", " wav/") for line in lines[15:]))
    trials = (data / "trials.txt").read_text().splitlines()
    (tmp_path / "short.txt").write_text("\n".join([*trials[:20], *trials[-20:]]))
    second = [f"{label} wav/{a} wav/{b}" for label, a, b in map(str.split, trials)]
    (tmp_path / "whole.txt").write_text("\n".join(second))
    train = [str(tmp_path / "one.txt"), {"list": str(tmp_path / "two.txt"), "root": str(data), "weight": 2}]
    tested = {"short": str(tmp_path / "short.txt"), "whole": {"list": str(tmp_path / "whole.txt"), "root": str(data)}}
    return {**settings, "train_list": train, "test_list": tested}


def test_a_run_takes_several_lists_and_says_the_figures_of_each(lists, write, tools, tmp_path):
    done = tools.command("--config", write({**lists, "best_list": "whole", "max_epoch": 1, "test_interval": 1}))
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'two.txt'}: 15 utterances of 3 speakers, weight 2" in done.stdout
    assert "whole 136 trials, short 40 trials" in done.stdout
    assert "Epoch 1  whole  EER" in done.stdout and "Epoch 1  short  EER" in done.stdout
    result = tmp_path / "run" / "result"
    event = [json.loads(line) for line in (result / "metrics.jsonl").read_text().splitlines()][-1]
    assert event["list"] == "whole" and event["trials"] == 136 and event["lists"]["short"]["trials"] == 40
    best = float((tmp_path / "run" / "model" / "model_best.eer").read_text())
    assert best == pytest.approx(event["eer"], abs=1e-4)
    assert len((result / "trials_epoch_1.txt").read_text().splitlines()) == 136
    assert len((result / "trials_short_epoch_1.txt").read_text().splitlines()) == 40
    assert "Epoch 1, VEER of short " in (result / "scores.txt").read_text()
    again = yaml.safe_load((result / "config.yaml").read_text())
    assert again["train_list"][1]["weight"] == 2 and list(again["test_list"]) == ["short", "whole"]


def test_figures_of_a_list_are_those_of_an_evaluation_of_it_alone(lists, tools, data):
    both = tools.build(lists, test_list=json.dumps(lists["test_list"]), train_list=json.dumps(lists["train_list"]))
    result = both.evaluator.run(both.network, 1)
    alone = tools.build(lists, test_list=lists["test_list"]["short"], train_list=json.dumps(lists["train_list"]))
    assert set(alone.evaluator.files) < set(both.evaluator.files)  # a file of both lists is embedded once
    one = alone.evaluator.run(both.network, 1)
    whole = tools.build(lists, test_list=data / "trials.txt", train_list=data / "train_list.txt")
    other = whole.evaluator.run(both.network, 1)
    assert both.evaluator.files == whole.evaluator.files
    assert np.array_equal(result["scores"], one["scores"]) and result["eer"] == one["eer"]
    assert np.array_equal(result["others"]["whole"]["scores"], other["scores"])
    assert set(result) - set(one) == {"list", "others"}


def test_a_weight_multiplies_the_rows_of_a_list(lists, tools):
    trainer = tools.build(lists, test_list=json.dumps(lists["test_list"]), train_list=json.dumps(lists["train_list"]))
    plan = [row for batch in trainer.sampler.plan(1) for row in batch]
    parts = trainer.dataset.parts[[utterance for ((utterance, _),) in plan]]
    assert np.bincount(parts).tolist() == [20, 30] and len(set(plan)) == 50
    batch = next(iter(trainer.loader))
    for info in batch["files"]:
        source = trainer.dataset.list.source(info["utterance"])
        assert info["list_path"] == source.path and info["path"].startswith(source.root)
        line = Path(source.path).read_text().splitlines()[info["line"] - 1]
        assert info["path"].endswith(line.split()[1])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("train_list", "[{list: /no/such, root: .}]", "train_list: no such file: '/no/such'"),
        (
            "train_list",
            "[{list: a, rot: b}]",
            "list 1: unknown 'rot'; an entry has list, root, weight, prefix, pack",
        ),
        ("train_list", "[{list: a, weight: 0}]", "list 1: weight must be a number above 0, as 0.5 or 1.0e+6; got '0'"),
        ("train_list", "[{list: a, weight: 1e9}]", "1.0e+6; got the text '1e9'"),
        ("test_list", "{O: {list: LIST, root: /no/such}}", "command line: --test_list: no such folder: '/no/such'"),
        ("train_list", "{a: b}", "train_list: expected a path, or lists as [a.txt, {list: b.txt, root: B}]"),
        ("test_list", "[a, b]", "test_list: expected a path, or lists as {O: a.txt, E: {list: b.txt, root: B}}"),
        ("test_list", "{a b: c}", "test_list: 'a b' is no name of a list"),
        ("test_list", "{NO: a}", "test_list: YAML reads the name of a list as 'False'; put it into quotes"),
        ("test_list", "{1: a, '1': b}", "test_list: '1' and '1' name two lists, but their files the same; rename one"),
        ("test_list", "{o: a, O: b}", "test_list: 'o' and 'O' name two lists, but their files the same; rename one"),
        ("test_list", "{O: a, O: b}", "duplicate key 'O'"),
        ("best_list", "E", "best_list: must be a name, and test_list gives none; got 'E'"),
    ],
)
def test_a_mistake_in_lists_is_one_line(settings, key, value, words):
    with pytest.raises(UsageError) as error:
        value = value.replace("LIST", settings["test_list"])
        configure([f"--{name}={given}" for name, given in {**settings, key: value}.items()])
    assert words in str(error.value) and "\n" not in str(error.value)
