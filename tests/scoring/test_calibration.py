"""Calibration: its regression, folds over speakers, and the same figures from the trainer and from score.py."""

import json
import shlex

import numpy as np
import programs
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import verify
from scoring.calibration import LogisticCalibration, calibrated_llrs, folds_over
from settings.command_line import run
from storage.files import save_atomically
from training.calibration import Calibrator


def by_sklearn(x, labels, prior):
    """Weights and bias of the same regression by another solver."""
    weight = np.where(labels == 1, prior / labels.sum(), (1 - prior) / (labels == 0).sum()) * len(labels)
    center, scale = x.mean(axis=0), x.std(axis=0)
    model = LogisticRegression(C=1000.0, tol=1e-9, max_iter=5000).fit((x - center) / scale, labels, weight)
    weights = model.coef_[0] / scale
    return weights, model.intercept_[0] - weights @ center - np.log(prior / (1 - prior))


@pytest.mark.parametrize("apart, columns, prior", [(0.4, 1, 0.05), (0.2, 3, 0.5), (9, 2, 0.01)])
def test_the_regression_is_that_of_another_solver(apart, columns, prior):
    rng = np.random.default_rng(columns)
    labels = (rng.random(500) < 0.3).astype(int)
    x = rng.normal(labels[:, None] * apart, 0.3, (500, columns))
    found = LogisticCalibration.fit(x, labels, prior, [str(k) for k in range(columns)])
    weights, bias = by_sklearn(x, labels, prior)
    assert found.weights == pytest.approx(weights, rel=1e-3) and found.bias == pytest.approx(bias, rel=1e-3)


def people(speakers=12, trials=600, seed=0):
    """Scores, labels and speakers (N, 2); each speaker has a bias of its own."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, speakers, trials)
    labels = rng.integers(0, 2, trials)
    second = np.where(labels == 1, first, (first + rng.integers(1, speakers, trials)) % speakers)
    own = rng.normal(0, 1, speakers)
    return rng.normal(labels * 2 + own[first] + own[second], 1), labels, np.stack([first, second], axis=1)


def test_a_trial_is_mapped_by_what_trials_of_other_speakers_taught():
    scores, labels, speakers = people()
    llrs = calibrated_llrs(scores, labels, speakers, 0.2)
    assert folds_over(labels, speakers) == "speakers"
    fold = np.empty(12, int)
    fold[np.random.default_rng(0).permutation(12)] = np.arange(12) % 5
    for trial in (0, 1, 2, 77, 300):
        of_its_folds = np.isin(fold[speakers], fold[speakers[trial]]).any(axis=1)
        others = ~of_its_folds
        weights, bias = by_sklearn(scores[others, None], labels[others], 0.2)
        assert llrs[trial] == pytest.approx(weights[0] * scores[trial] + bias, rel=1e-3, abs=1e-3)
        changed = np.where(of_its_folds, scores * 3 - 1, scores)
        changed[trial] = scores[trial]
        assert calibrated_llrs(changed, labels, speakers, 0.2)[trial] == pytest.approx(llrs[trial])
    assert not np.allclose(calibrated_llrs(scores, labels, None, 0.2), llrs)


def test_folds_are_of_trials_where_those_of_few_speakers_lack_a_class():
    scores, labels, speakers = people(3)
    assert folds_over(labels, speakers) == "trials" == folds_over(labels, None)
    assert np.array_equal(calibrated_llrs(scores, labels, speakers), calibrated_llrs(scores, labels))
    assert not calibrated_llrs(np.ones(600), labels, speakers).any()


def test_the_trainer_and_score_py_give_the_same_figures(settings, tools, data, tmp_path, write):
    path = tmp_path / "model_best.model"
    save_atomically(tools.build(settings).state.capture(), path)
    done = tools.command("--config", write(settings), "--eval", "--initial_model", path)
    assert done.returncode == 0 and "(calibrated, folds over speakers; at best" in done.stdout, done.stderr
    lines = (tmp_path / "run/result/metrics.jsonl").read_text().splitlines()
    (event,) = (e for e in map(json.loads, lines) if e["event"] == "eval")
    assert event["folds"] == "speakers"
    words = ("--trials", data / "trials.txt", "--initial_model", path, "--root", data / "wav", "--draws", 50)
    done = programs.run(programs.ROOT / "score.py", *words, "--calibrate_folds", "--out", tmp_path / "out")
    assert done.returncode == 0 and "calibration on the trials, in folds over speakers" in done.stdout, done.stderr
    figures = json.loads((tmp_path / "out/result.json").read_text())["calibrated"]["figures"]
    for name in ("cllr", "act_dcf_0.01", "act_dcf_0.05"):
        assert figures[name] == pytest.approx(event[name], abs=1e-5)


def test_the_command_that_an_evaluation_ends_with_runs(settings, tools, data, tmp_path, write, capsys):
    """Of a checkpoint that carries no configuration too, and from a folder whose name has a space."""
    (tmp_path / "my models").mkdir()
    path = tmp_path / "my models" / "bare.pt"
    torch.save(tools.build(settings).network.state_dict(), path)
    done = tools.command("--config", write(settings), "--eval", "--initial_model", path)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("to compare recordings: python verify.py "))
    words = shlex.split(line.partition("verify.py ")[2])
    assert words[:2] == ["A.wav", "B.wav"], done.stderr
    recordings = map(str, sorted((data / "wav").rglob("*.flac"))[:2])
    assert run(verify.main, [*recordings, *words[2:]]) == 0, capsys.readouterr().err
    assert "log-likelihood ratio" in capsys.readouterr().out


def test_the_calibration_of_crops_is_learnt_on_whole_files(settings, tools):
    trainer = tools.build(settings, eval_frames=40, num_eval=2)
    whole = tools.build(settings).evaluator
    evaluator, network = trainer.evaluator, trainer.network
    assert "whole_scores" not in evaluator.run(network, 1) and "whole_scores" not in evaluator.run(
        network, 1, best=1e-9
    )
    result = evaluator.run(network, 1, best=None)
    expected = whole.run(network, 1)
    assert np.allclose(result["whole_scores"], expected["scores"], atol=1e-5)
    assert not np.allclose(result["scores"], expected["scores"], atol=1e-3)
    made = evaluator.calibrator.learn(network.state_dict(), result)
    assert made["eval_frames"] == 0 and made["heard"]["files"] == len(evaluator.files)
    assert made["calibration"] == whole.calibrator.learn(network.state_dict(), expected)["calibration"]


def test_a_calibration_is_learnt_on_crops_where_too_few_whole_files_give_a_score(settings, tools):
    """As on a GPU whose memory is too small for them: the run goes on, and verify.py says of what it is."""
    trainer = tools.build(settings, eval_frames=40, num_eval=1)
    evaluator, weights = trainer.evaluator, trainer.network.state_dict()
    result = evaluator.run(trainer.network, 1)
    crops = evaluator.calibrator.learn(weights, result)
    labels, why = evaluator.labels, "learnt on crops, for too few whole files gave a score"
    for whole in (np.full(len(labels), np.nan), np.where(labels == 1, 0.5, np.nan)):
        made = evaluator.calibrator.learn(weights, {**result, "whole_scores": whole})
        assert made.pop("caution") == "; ".join(filter(None, [why, crops["caution"]]))
        assert made == {key: value for key, value in crops.items() if key != "caution"} and made["eval_frames"] == 40


def test_trials_of_speakers_of_the_training_are_left_out_where_others_are_there(settings, tools):
    trainer = tools.build(settings)
    evaluator, network = trainer.evaluator, trainer.network
    result = evaluator.run(network, 1)
    speakers = sorted({path.split("/")[0] for path in evaluator.first})
    for known, left in ((speakers[:1], False), (speakers[:3], True)):
        learnt = Calibrator(evaluator.config, evaluator, known).learn(network.state_dict(), result)["learnt_on"]
        sides = zip(evaluator.first, evaluator.second)
        own = sum(not {a.split("/")[0], b.split("/")[0]} & set(known) for a, b in sides)
        assert learnt == (len(evaluator.labels) if left else own) and own < len(evaluator.labels)
