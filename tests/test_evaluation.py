"""Scoring, non-finite scores, subsets, checkpoints of other trainers."""

import types

import numpy as np
import pytest
import torch

import checkpoint
from evaluation import balanced_subset, describe, score_pairs
from speaker_lists import UsageError
from utils import save_atomically


def test_cosine_scores_against_a_loop():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    pairs = np.array([[0, 1], [2, 3], [1, 1]])
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=2, keepdims=True)
    expected = [np.mean([u @ v for u in unit[a] for v in unit[b]]) for a, b in pairs]
    assert np.allclose(score_pairs(x, pairs), expected, atol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
def test_euclidean_scores_against_a_loop(normalize):
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    pairs = np.array([[0, 1], [2, 3]])
    y = x.numpy() / (np.linalg.norm(x.numpy(), axis=2, keepdims=True) if normalize else 1)
    expected = [-np.mean([np.linalg.norm(u - v) for u in y[a] for v in y[b]]) for a, b in pairs]
    assert np.allclose(score_pairs(x, pairs, "euclidean", normalize), expected, atol=1e-6)


def test_a_zero_embedding_scores_zero_and_a_nan_one_nan():  # nan.md C10
    x = torch.ones(3, 1, 4)
    x[1], x[2, 0, 0] = 0, float("nan")
    scores = score_pairs(x, np.array([[0, 1], [0, 2]]))
    assert scores[0] == 0 and np.isnan(scores[1])


def test_a_subset_of_the_trials_is_random_and_balanced():  # bug 6
    labels = np.array([1] * 300 + [0] * 700)
    chosen = balanced_subset(labels, 100, 1)
    assert len(set(chosen)) == 100 and labels[chosen].sum() == 50 and list(chosen) == sorted(chosen)
    assert chosen[:50].max() > 150 and not np.array_equal(chosen, balanced_subset(labels, 100, 2))
    assert len(balanced_subset(np.array([1] * 5 + [0] * 95), 50, 1)) == 50


@pytest.fixture
def evaluator(settings, tools):
    trainer = tools.build(settings)
    return trainer.evaluator, trainer


def poison(evaluator, files):
    embed = evaluator.embed

    def bad(*arguments):
        embeddings, problems = embed(*arguments)
        embeddings = embeddings.clone()
        embeddings[files] = float("nan")
        return embeddings, problems

    evaluator.embed = bad


def test_nan_scores_are_counted_named_and_bound_the_eer(evaluator, tmp_path):  # bug 24
    evaluator, trainer = evaluator
    evaluator.config.max_nan_score_pct = 50.0
    clean = evaluator.run(trainer.network, 1)
    poison(evaluator, [2])
    result = evaluator.run(trainer.network, 1)
    touched = int((evaluator.pairs == 2).any(axis=1).sum())
    assert result["nan_scores"] == touched and result["trials"] == clean["trials"] - touched
    assert result["nan_files"][0]["path"] == evaluator.files[2] and result["nan_files"][0]["trials"] == touched
    assert result["eer_worst"] >= result["eer"]
    text = "\n".join(describe(result, trainer.config))
    assert evaluator.files[2] in text and f"{touched} scores are non-finite" in text
    evaluator.write_trials(tmp_path, result)
    assert len((tmp_path / "nan_trials_epoch_1.txt").read_text().splitlines()) == touched
    assert len((tmp_path / "trials_epoch_1.txt").read_text().splitlines()) == result["trials"]


def test_above_the_limit_no_single_eer_is_given(evaluator):
    evaluator, trainer = evaluator
    poison(evaluator, [2])
    result = evaluator.run(trainer.network, 1)
    assert "% of the scores are non-finite (max_nan_score_pct 5)" in result["failed"]
    assert result["eer"] is None and result["cllr"] is None and result["nan_scores"] > 0


def test_a_collapsed_model_is_evaluated_and_drawn(evaluator, tmp_path):
    evaluator, trainer = evaluator
    embed = evaluator.embed
    evaluator.embed = lambda *a: (torch.ones_like(embed(*a)[0]), {})
    result = evaluator.run(trainer.network, 1)
    assert result["eer"] == pytest.approx(50) and result["min_dcf_0.05"] == pytest.approx(1)
    assert len(evaluator.draw(tmp_path, result)) == 3
    result["scores"] = 1 - 1e-16 * np.arange(len(result["scores"]))
    assert len(evaluator.draw(tmp_path, result)) == 3


def test_too_many_nan_scores_fail_the_evaluation_and_training_goes_on(evaluator):
    evaluator, trainer = evaluator
    poison(evaluator, list(range(len(evaluator.files))))
    trainer.epoch = 2
    trainer.evaluate()
    assert '"failed": "all scores are non-finite"' in trainer.files.metrics.read_text()
    assert trainer.best["eer"] is None and not (trainer.files.model / "model_best.model").exists()


def test_an_unreadable_test_file_is_named(settings, tools, data, tmp_path):
    import shutil

    shutil.copytree(data / "wav", tmp_path / "wav")
    victim = sorted((tmp_path / "wav").glob("trial*/**/*.flac"))[0]
    victim.write_text("not audio")
    trainer = tools.build(settings, test_path=tmp_path / "wav")
    result = trainer.evaluator.run(trainer.network, 1)
    (bad,) = result["nan_files"]
    assert str(victim).endswith(bad["path"]) and bad["reason"] and bad["trials"] == result["nan_scores"] > 0


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.__S__ = torch.nn.Linear(2, 2)
        self.__L__ = torch.nn.Linear(2, 3)


def layouts():
    torch.manual_seed(0)
    own = Net().state_dict()
    model = {k.removeprefix("__S__."): v for k, v in own.items() if k.startswith("__S__.")}
    yield "model_state_dict", {"model_state_dict": own, "epoch": 3}
    yield "bare", own
    yield "ddp", {f"module.{k}": v for k, v in own.items()}
    yield "compiled", {k.replace("__S__.", "__S__._orig_mod."): v for k, v in own.items()}
    yield "published", {"model": model}
    yield "state_dict", {"state_dict": model}
    yield "ddp and compiled", {f"module._orig_mod.{k}": v for k, v in own.items()}


@pytest.mark.parametrize("name, state", list(layouts()))
def test_checkpoints_of_other_trainers(tmp_path, name, state):  # field.md 4.4; bug 30
    torch.save(state, tmp_path / "x.model")
    torch.manual_seed(9)
    network = Net()
    faults = checkpoint.load_weights(network, checkpoint.load(tmp_path / "x.model"), "x")
    assert not faults["model"] and not faults["unused"]
    torch.manual_seed(0)
    assert torch.equal(network.__S__.weight, Net().__S__.weight)


def test_a_part_called_module_keeps_its_name():
    network = torch.nn.Module()
    network.__S__ = torch.nn.Module()
    network.__S__.module = torch.nn.Linear(2, 2)
    faults = checkpoint.load_weights(network, network.state_dict(), "x")
    assert not any(faults.values())


def test_damaged_checkpoints_are_one_line(tmp_path):
    import pickle

    good = tmp_path / "good.model"
    save_atomically({"a": torch.zeros(1000)}, good)
    cases = {
        "cut": good.read_bytes()[:1500],
        "text": b"hello",
        "empty": b"",
        "list": pickle.dumps([1]),
        "code": pickle.dumps(types.SimpleNamespace(x=1)),
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError) as caught:
            checkpoint.load(tmp_path / name)
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.model"
    save_atomically({"a": 1}, path)
    monkeypatch.setattr(torch, "save", lambda state, f: (f.write(b"half"), (_ for _ in ()).throw(OSError("disk full"))))
    with pytest.raises(OSError, match="disk full"):
        save_atomically({"a": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_nothing_hides_warnings_and_yaml_files_are_tracked(tools):  # bugs 43, 45
    sources = [p for p in tools.root.rglob("*.py") if ".venv" not in p.parts and "tests" not in p.parts]
    assert sources and not any("simplefilter" in p.read_text() or "filterwarnings" in p.read_text() for p in sources)
    assert "yaml" not in (tools.root / ".gitignore").read_text()
