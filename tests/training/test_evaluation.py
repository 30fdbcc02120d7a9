"""Scoring, non-finite scores, subsets, checkpoints of other trainers."""

import json
import types

import numpy as np
import pytest
import soundfile
import torch

from corpus.lists import list_hash
from DatasetLoader import TestDataset
from errors import UsageError
from scoring import plots
from scoring.backend import Backend
from scoring.cosine import score_pairs
from scoring.error_rates import ErrorRates
from scoring.intervals import trial_speakers
from storage import checkpoint
from storage.files import save_atomically
from training.evaluation import describe, stratified_subset
from tuneThreshold import ComputeEER


def test_a_zero_embedding_scores_zero_and_a_nan_one_nan():
    x = torch.ones(3, 1, 4)
    x[1], x[2, 0, 0] = 0, float("nan")
    scores = score_pairs(x, np.array([[0, 1], [0, 2]]))
    assert scores[0] == 0 and np.isnan(scores[1])


def ordered_list(speakers=20, each=100):
    """A trial list ordered by speaker, as VoxCeleb's is, whose first speakers are the easy ones; with its scores."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(speakers), 2 * each)
    labels = np.tile(np.repeat([1, 0], each), speakers)
    other = np.where(labels == 1, owner, (owner + rng.integers(1, speakers, len(owner))) % speakers)
    scores = rng.normal(labels * (3 - 2.5 * owner / speakers), 1)
    sides = [[f"id{s:02d}/v/{i}.wav" for i, s in enumerate(side)] for side in (owner, other)]
    return labels, *sides, scores


def test_a_subset_of_the_trials_is_random_balanced_and_of_every_speaker():
    labels, first, second, _ = ordered_list()
    labels[:60] = 1  # 1,060 more of one class play no part
    speakers = np.array([[int(p[2:4]) for p in side] for side in (first, second)]).T
    chosen = stratified_subset(labels, speakers, 400, 1)
    assert len(set(chosen)) == 400 and labels[chosen].sum() == 200 and list(chosen) == sorted(chosen)
    assert not np.array_equal(chosen, stratified_subset(labels, speakers, 400, 2))
    assert np.array_equal(chosen, stratified_subset(labels, speakers, 400, 1))
    for value in (0, 1):
        assert set(speakers[chosen][labels[chosen] == value].ravel()) == set(range(20))
    share = np.bincount(speakers[chosen][labels[chosen] == 1, 0]) / np.bincount(speakers[labels == 1, 0])
    assert np.all(np.abs(share - 200 / labels.sum()) <= 1.5 / 100)  # each speaker's targets: the same share
    rare = np.where(np.arange(len(labels)) == 555, 77, speakers[:, 0])  # a speaker of a single trial stays
    assert 555 in stratified_subset(labels, np.stack([rare, speakers[:, 1]], 1), 400, 1)


def test_a_subset_without_speakers_is_balanced():
    labels = np.array([1] * 5 + [0] * 95)
    assert len(stratified_subset(labels, None, 50, 1)) == 50
    assert labels[stratified_subset(labels, None, 8, 1)].sum() == 4


def test_the_error_rate_of_a_subset_is_that_of_the_list():
    labels, first, second, scores = ordered_list()
    speakers, why = trial_speakers(labels, first, second)
    whole = ComputeEER(scores, labels)[0]
    subsets = [stratified_subset(labels, speakers, 400, seed) for seed in range(30)]
    rates = [ComputeEER(scores[chosen], labels[chosen])[0] for chosen in subsets]
    assert not why and abs(np.mean(rates) - whole) < 0.8
    assert abs(ComputeEER(scores[:400], labels[:400])[0] - whole) > 8  # the habit: the first lines


def test_one_trial_is_no_evaluation(settings, tools):
    with pytest.raises(UsageError, match="max_test_pairs: 1 trial is of one class"):
        tools.build({**settings, "max_test_pairs": 1})
    assert sorted(tools.build({**settings, "max_test_pairs": 2}).evaluator.labels) == [0, 1]


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


def test_nan_scores_are_counted_named_and_bound_the_eer(evaluator, tmp_path):
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
    others = [tmp_path / f"trials_{name}_epoch_7.txt" for name in ("O", "epoch", "epoch_2")]  # of other lists
    for path in (*others, tmp_path / "trials_epoch_0.txt"):
        path.write_text("")
    evaluator.write_trials(tmp_path, clean)
    assert sorted(tmp_path.glob("*trials*")) == sorted([*others, tmp_path / "trials_epoch_1.txt"])


def test_crops_are_reduced_as_they_come_and_score_as_all_of_them(settings, tools):
    settings.update(num_eval=4, eval_frames=40)
    trainer = tools.build(settings)
    trainer.evaluator.embed(trainer.network)  # the first pass of a network may settle its kernels
    crops = {}
    forward = trainer.network.forward

    def listen(x):
        out = forward(x)
        crops.setdefault("all", []).append(out.reshape(-1, 4, out.shape[-1]).double())
        return out

    trainer.network.forward = listen
    embeddings, _ = trainer.evaluator.embed(trainer.network)
    assert embeddings.shape == (len(trainer.evaluator.files), settings["nOut"])  # no crop is kept
    whole = torch.zeros(len(trainer.evaluator.files), 4, settings["nOut"], dtype=torch.float64)
    for members, out in zip(trainer.evaluator.dataset.plan, crops["all"]):
        whole[members] = out
    scores = trainer.evaluator.run(trainer.network, 1)["scores"]
    assert np.allclose(scores, score_pairs(whole, trainer.evaluator.pairs), atol=1e-12)


def test_a_single_infinite_value_of_an_embedding_is_told_as_such(evaluator):
    evaluator, trainer = evaluator
    evaluator.config.max_nan_score_pct = 100.0
    forward = trainer.network.forward

    def spoil(x):
        out = forward(x)
        out[0, 3] = float("inf")
        return out

    trainer.network.forward = spoil
    file = evaluator.run(trainer.network, 1)["nan_files"][0]
    assert "0 NaN, 1 Inf" in file["statistics"].rpartition("embedding")[2]


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
    evaluator.config.picture_format = "png"
    assert len(evaluator.draw(tmp_path, result)) == 4
    result["scores"] = 1 - 1e-16 * np.arange(len(result["scores"]))
    assert len(evaluator.draw(tmp_path, result)) == 4


def test_the_best_evaluation_leaves_a_calibration(settings, tools, data):
    from speaker_model import load_model

    trainer = tools.build(settings, max_epoch=1, test_interval=1, max_test_pairs=40)
    trainer.run()
    folder = trainer.files.model
    made = json.loads((folder / "model_best.calibration").read_text())
    assert made["trials"] == 40 and made["targets"] == 20 and made["score_mode"] == "cosine"
    assert made["test_list_sha256"] == list_hash(data / "trials.txt") and made["eval_frames"] == 0
    assert made["score_threshold"] == pytest.approx(float((folder / "model_best.threshold").read_text()), abs=1e-6)
    model = load_model(folder / "model_best.model", device="cpu")
    assert made["identity"] == model.identity
    backend = Backend.load(folder / "model_best.calibration", model.identity)
    evaluator = trainer.evaluator
    (line,) = [e for e in map(json.loads, trainer.files.metrics.read_text().splitlines()) if e["event"] == "eval"]
    assert line["interval"] == "speakers" and line["eer_low"] <= line["eer"] <= line["eer_high"]
    a, b = (model.embed_file(data / "wav" / side[0]) for side in (evaluator.first, evaluator.second))
    trials = next(trainer.files.result.glob("trials_epoch_*.txt")).read_text().splitlines()
    assert float(backend.score(a, b[None])[0]) == pytest.approx(float(trials[0].split()[0]), abs=1e-5)
    if backend.calibration is None:  # an untrained model: scores that do not rise with the probability of a target
        assert made["threshold"] == made["score_threshold"]
    else:
        assert made["threshold"] is None and made["calibration"]["prior"] == trainer.config.dcf_p_target


def test_scores_that_say_nothing_get_no_calibration(evaluator):
    evaluator, trainer = evaluator
    result = evaluator.run(trainer.network, 1)
    for scores in (np.full(len(evaluator.labels), 0.5), 1.0 - evaluator.labels):
        made = evaluator.calibrator.learn(trainer.network.state_dict(), {**result, "scores": scores})
        assert made["calibration"] is None and made["threshold"] == ComputeEER(scores, evaluator.labels)[1]
    told = {**result, "scores": evaluator.labels * 0.4 + 0.1}
    made = evaluator.calibrator.learn(trainer.network.state_dict(), told)
    assert made["calibration"]["weights"][0] > 0 and made["threshold"] is None
    evaluator.config.dcf_c_miss = 10.0
    prior = evaluator.config.dcf_p_target
    made = evaluator.calibrator.learn(trainer.network.state_dict(), told)
    assert made["threshold"] == pytest.approx(np.log((1 - prior) / (10 * prior)))


def test_an_interval_over_trials_says_why(evaluator):
    evaluator, trainer = evaluator
    assert "over speakers)" in "\n".join(describe(evaluator.run(trainer.network, 1), trainer.config))
    evaluator.speakers, evaluator.no_speakers = trial_speakers(evaluator.labels, ["a"] * 80, ["b"] * 80)
    result = evaluator.run(trainer.network, 1)
    assert result["interval"] == "trials"
    assert "over trials: the speaker of a is unknown)" in "\n".join(describe(result, trainer.config))


def test_pictures_of_many_trials_draw_few_points(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200_000)
    scores = rng.normal(labels * 2.0, 1)
    rates = ErrorRates.of(scores, labels)
    miss, alarm = plots._curve(rates)
    x, y = plots._thinned(alarm, miss)
    assert len(x) < 5000 < len(miss) and (x[0], y[0], x[-1], y[-1]) == (alarm[0], miss[0], alarm[-1], miss[-1])
    across = np.abs(np.interp(alarm[::97], x[::-1], y[::-1]) - miss[::97])
    along = np.abs(np.interp(miss[::97], y, x) - alarm[::97])
    assert np.minimum(across, along).max() < 0.001
    eer, threshold = rates.eer()
    result = {"eer": 100 * eer, "threshold": threshold, "trials": len(labels), "targets": int(labels.sum())}
    names = [path.name for path in plots.draw_all(tmp_path, scores, labels, result, llrs=2 * scores - 2)]
    assert names == ["det.png", "roc.png", "scores.png", "calibration.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_pictures_of_separable_and_of_inverted_trials(tmp_path):
    for scores in ([0.1, 0.2, 0.8, 0.9], [0.9, 0.8, 0.2, 0.1]):
        eer, threshold = ComputeEER(scores, [0, 0, 1, 1])
        result = {"eer": eer, "threshold": threshold, "trials": 4, "targets": 2, "eer_low": eer, "eer_high": eer}
        assert len(plots.draw_all(tmp_path, np.array(scores), np.array([0, 0, 1, 1]), result)) == 4


def test_too_many_nan_scores_fail_the_evaluation_and_training_goes_on(evaluator):
    evaluator, trainer = evaluator
    poison(evaluator, list(range(len(evaluator.files))))
    trainer.progress.epoch = 2
    trainer.evaluate()
    assert '"failed": "all scores are non-finite"' in trainer.files.metrics.read_text()
    assert trainer.progress.best["eer"] is None and not (trainer.files.model / "model_best.model").exists()


def test_an_unreadable_test_file_is_named(settings, tools, data, tmp_path):
    import shutil

    shutil.copytree(data / "wav", tmp_path / "wav")
    victim = sorted((tmp_path / "wav").glob("trial*/**/*.flac"))[0]
    victim.write_text("not audio")
    trainer = tools.build(settings, test_path=tmp_path / "wav")
    result = trainer.evaluator.run(trainer.network, 1)
    (bad,) = result["nan_files"]
    assert str(victim).endswith(bad["path"]) and bad["reason"] and bad["trials"] == result["nan_scores"] > 0


def test_an_evaluation_that_failed_ends_with_1(settings, tools, data, tmp_path, capsys):
    import shutil

    import trainSpeakerNet

    shutil.copytree(data / "wav", tmp_path / "wav")
    sorted((tmp_path / "wav").glob("trial*/**/*.flac"))[0].write_text("not audio")
    trainer = tools.build(settings)
    trainer.saver.last()
    keys = {**settings, "eval": True, "initial_model": trainer.files.model / "last.model", "save_path": tmp_path / "e"}
    words = [f"--{key}={value}" for key, value in keys.items()]
    assert trainSpeakerNet.main([*words, "--max_nan_score_pct=100"]) == 0
    assert trainSpeakerNet.main([*words, "--test_path", str(tmp_path / "wav")]) == 1
    assert "evaluation failed" in capsys.readouterr().out


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
def test_checkpoints_of_other_trainers(tmp_path, name, state):
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


def test_a_checkpoint_of_a_later_version_is_refused_in_one_line(tmp_path):
    torch.save({"model_state_dict": {}, "format_version": checkpoint.FORMAT_VERSION + 1}, tmp_path / "x.model")
    with pytest.raises(
        UsageError, match=r"x.model: a checkpoint of format 2, this version reads up to 1; use the newer"
    ):
        checkpoint.load(tmp_path / "x.model")


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.model"
    save_atomically({"a": 1}, path)
    monkeypatch.setattr(torch, "save", lambda state, f: (f.write(b"half"), (_ for _ in ()).throw(OSError("disk full"))))
    with pytest.raises(OSError, match="disk full"):
        save_atomically({"a": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_nothing_hides_warnings_and_yaml_files_are_tracked(tools):
    own = ("tests", ".venv", ".venv-lock", ".venv-newest", ".venv-oldest")
    sources = [p for p in tools.root.rglob("*.py") if not set(own) & set(p.parts)]
    assert sources and not any("simplefilter" in p.read_text() or "filterwarnings" in p.read_text() for p in sources)
    assert "yaml" not in (tools.root / ".gitignore").read_text()


def test_evaluation_and_embedding_compute_convolutions_in_fp32_on_a_gpu_too(settings, tools, monkeypatch):
    from speaker_model import load_model

    seen, cudnn = [], torch.backends.cudnn
    trainer = tools.build(settings)
    trainer.progress.step = 1
    trainer.network.register_forward_pre_hook(lambda *a: seen.append((cudnn.allow_tf32, cudnn.deterministic)))
    monkeypatch.setattr(cudnn, "deterministic", True)
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    trainer.evaluator.embed(trainer.network)
    assert set(seen) == {(False, True)} and cudnn.allow_tf32 and cudnn.deterministic
    trainer.saver.last()
    seen.clear()
    model = load_model(trainer.files.model / "last.model")
    model.network.register_forward_pre_hook(lambda *a: seen.append((cudnn.allow_tf32, cudnn.deterministic)))
    model.embed_batch(np.zeros((1, 16000), np.float32) + 0.1)
    assert seen == [(False, True)] and cudnn.allow_tf32


@pytest.mark.parametrize("vad", ["none", "energy"])
def test_a_test_file_that_changed_since_the_start_is_named_and_the_others_are_read(tmp_path, vad):
    voice = np.random.default_rng(0).normal(0, 0.1, 16000)
    for name in "ab":
        soundfile.write(tmp_path / f"{name}.wav", voice, 16000)
    dataset = TestDataset(["a.wav", "b.wav"], str(tmp_path), 0, 1, 4, vad=vad)
    soundfile.write(tmp_path / "a.wav", voice[:9000], 16000)
    read, audio, problems = dataset[0]
    assert read == [1] and audio.shape == (1, 1, 16000)
    assert problems == {0: "was changed since the run began: 9000 samples, 16000 before"}
