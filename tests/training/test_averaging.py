"""The moving average of a run against a short version, and the mean of checkpoints through the command line."""

import math

import numpy as np
import programs
import pytest
import torch

from errors import UsageError
from training.averaging import MovingAverage, mean_of_checkpoints


def load(path):
    return torch.load(path, weights_only=True)


def reference(history, decay):
    """Moving average of a list of weights: TensorFlow's warm-up, begun at the first."""
    average = history[0].double()
    for t, weights in enumerate(history[1:], 1):
        kept = min(decay, (1 + t) / (10 + t))
        average = kept * average + (1 - kept) * weights.double()
    return average


def poisoned(batch):
    bad = {**batch, "data": batch["data"].clone()}
    bad["data"][0, 0, 50] = math.nan
    return bad


@pytest.mark.parametrize("decay", [0.3, 0.99])
def test_the_average_over_a_skipped_step_and_a_resumed_run(settings, tools, decay):
    trainer = tools.build(settings, ema_decay=decay)
    batches, name = tools.batches(trainer), "__S__.linear.weight"
    history = []
    for index, batch in enumerate([batches[0], poisoned(batches[1]), *batches[1:4], *batches[4:6]]):
        if index == 4:
            trainer.saver.last()
            trainer = tools.build(settings, ema_decay=decay, seed=9)
            assert trainer.resume()
            trainer.network.train()
        before = {n: t.clone() for n, t in trainer.average.tensors.items()}
        if trainer.train_step([batch]) is not None:
            history.append(trainer.network.state_dict()[name].clone())
        else:
            assert all(torch.equal(t, before[n]) for n, t in trainer.average.tensors.items())
    assert len(history) == trainer.average.updates == 6
    assert torch.allclose(trainer.average.tensors[name].double(), reference(history, decay), atol=1e-6)
    assert not torch.allclose(trainer.average.tensors[name], history[-1], atol=1e-4)


def test_half_precision_weights_are_averaged_in_fp32():
    network = torch.nn.Linear(3, 1).half()
    average = MovingAverage(network, 0.999)
    for _ in range(2000):
        average.update()
    history = [network.weight.detach().clone()]
    for _ in range(50):  # steps too small for fp16 to hold their share of the average
        network.weight.data += 2.0**-10
        average.update()
        history.append(network.weight.detach().clone())
    moved = average.tensors["weight"] - history[0].float()
    assert average.tensors["weight"].dtype is torch.float32 and (moved > 1e-4).all()
    kept = network.weight.detach().clone()
    with average.applied():
        assert torch.equal(network.weight, average.tensors["weight"].half())
    assert torch.equal(network.weight, kept)


def test_without_ema_decay_nothing_is_kept(settings, tools):
    trainer = tools.build(settings)
    trainer.train_step(tools.batches(trainer)[:1])
    state = trainer.state.capture(evaluated=True)
    assert trainer.average.tensors == {} and state["ema_state_dict"] == {} and "raw_model_state_dict" not in state


@pytest.fixture(scope="module")
def averaged(data, tmp_path_factory):
    """A run of 3 epochs with a moving average: (settings, folder, trainer)."""
    from trainers import build_trainer

    folder = tmp_path_factory.mktemp("averaged")
    keys = {
        **{"train_list": str(data / "train_list.txt"), "train_path": str(data / "wav")},
        **{"test_list": str(data / "trials.txt"), "test_path": str(data / "wav"), "save_path": str(folder / "run")},
        **{"model": "ECAPA_TDNN", "channels": 8, "aggregate": 16, "n_mels": 24, "nOut": 12, "trainfunc": "aamsoftmax"},
        **{"scheduler": "cosine", "lr": 0.01, "batch_size": 4, "max_frames": 40, "max_epoch": 3, "test_interval": 1},
        **{"eval_frames": 0, "nDataLoaderThread": 0, "threads": 1, "seed": 3, "ema_decay": 0.9},
    }
    trainer = build_trainer(keys)
    trainer.run()
    trainer.close()
    return keys, folder / "run" / "model", trainer


def test_checkpoints_hold_what_was_evaluated_and_last_model_what_trains_on(averaged):
    _, folder, trainer = averaged
    last, third = load(folder / "last.model"), load(folder / "model000000003.model")
    name = "__S__.linear.weight"
    assert torch.equal(last["model_state_dict"][name], trainer.network.state_dict()[name])
    assert torch.equal(third["raw_model_state_dict"][name], last["model_state_dict"][name])
    assert torch.equal(third["model_state_dict"][name], last["ema_state_dict"]["parameters"][name])
    assert not torch.equal(third["model_state_dict"][name], last["model_state_dict"][name])
    statistics = "__S__.bn.running_mean"
    assert torch.equal(third["model_state_dict"][statistics], last["model_state_dict"][statistics])


def test_an_evaluated_checkpoint_in_the_place_of_last_model_trains_on_as_it_did(averaged, tools, tmp_path):
    keys, folder, trainer = averaged
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / "last.model").write_bytes((folder / "model000000002.model").read_bytes())
    again = tools.build({**keys, "save_path": tmp_path / "run"})
    assert again.resume()
    again.evaluator.run = lambda *rest: (
        pytest.fail("epoch 2 was evaluated") if again.progress.epoch == 2 else {"stopped": True}
    )
    again.progress.begin_epoch(3)  # the evaluation of epoch 2 is done
    again.train_epoch()
    for name, tensor in trainer.network.state_dict().items():
        assert torch.equal(tensor, again.network.state_dict()[name]), name
    assert all(torch.equal(t, again.average.tensors[n]) for n, t in trainer.average.tensors.items())


def run_script(tools, *words):
    return programs.run(tools.root / "average_checkpoints.py", *words)


def test_the_mean_of_checkpoints_through_the_command_line(averaged, tools, tmp_path, write):
    keys, folder, _ = averaged
    out = tmp_path / "avg.model"
    done = run_script(tools, folder, "--last", 2, "--out", out)
    assert done.returncode == 0 and done.stdout.startswith("mean of 2 checkpoints, model000000002.model to"), (
        done.stderr
    )
    mean = load(out)
    states = [load(folder / f"model00000000{n}.model") for n in (2, 3)]
    assert mean["model_state_dict"].keys() == states[0]["model_state_dict"].keys()
    for name, tensor in mean["model_state_dict"].items():
        a, b = (s["model_state_dict"][name] for s in states)
        if tensor.is_floating_point():
            assert tensor.dtype == a.dtype
            expected = (a.numpy().astype(np.float64) + b.numpy().astype(np.float64)) / 2
            assert np.array_equal(tensor.numpy(), expected.astype(np.float32)), name
        else:
            assert torch.equal(tensor, b), name
    assert mean["epoch"] == 3 and mean["config"] == states[1]["config"] and mean["speakers"] == states[1]["speakers"]
    words = ("--config", write(keys), "--eval", "--initial_model", out, "--save_path", tmp_path / "eval")
    done = tools.command(*words)
    assert done.returncode == 0 and "Epoch 3  EER" in done.stdout, done.stderr


def test_the_moving_average_evaluates_again_to_the_eer_of_the_run(averaged, tmp_path, write):
    import trainSpeakerNet

    keys, folder, _ = averaged
    words = ["--config", write(keys), "--eval", "--initial_model", str(folder / "model000000003.model")]
    assert trainSpeakerNet.main([*words, "--save_path", str(tmp_path / "eval")]) == 0
    eer = (folder / "model000000003.eer").read_text()
    assert f"VEER {eer}" in (tmp_path / "eval" / "result" / "scores.txt").read_text()


def test_the_mean_starts_a_run_and_embeds_like_any_other(averaged, tools, tmp_path, capsys):
    from speaker_model import load_model
    from training.finetuning import load_initial

    keys, folder, _ = averaged
    path = tmp_path / "avg.model"
    torch.save(mean_of_checkpoints(sorted(folder.glob("model0*.model"))), path)
    tuned = tools.build({**keys, "save_path": tmp_path / "tuned", "initial_model": path})
    load_initial(tuned.network, tuned.dataset, tuned.config, tuned.log)
    assert "starts fresh" not in capsys.readouterr().out
    assert torch.equal(tuned.network.loss.weight, load(path)["model_state_dict"]["__L__.weight"])
    last = tuned.files.model / "last.model"
    last.write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="holds no state to go on from; move it away and start from it with initial_"):
        tuned.resume()
    last.unlink()
    wave = torch.randn(12000).numpy() * 0.1
    with torch.inference_mode():
        expected = tuned.network.eval()(torch.from_numpy(wave)[None])[0]
    assert np.allclose(load_model(path, device="cpu").embed(wave), expected, atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda s: s["model_state_dict"].pop("__S__.linear.bias"),
            "1 tensors differ in name, shape or type,",
        ),
        (
            lambda s: s["model_state_dict"].update({"__L__.weight": torch.zeros(9, 12)}),
            "(9, 12) float32 here",
        ),
        (
            lambda s: s["model_state_dict"]["__S__.linear.bias"].fill_(math.nan),
            "1 tensors are not finite (__S__",
        ),
        (lambda s: s["config"].update(model="ResNet34"), "model ResNet34, but "),
        (lambda s: s.update(speakers="others"), "trained with other speakers"),
        (lambda s: s["config"].update(seed=77), "begun from seed 77, but "),
    ],
)
def test_what_does_not_belong_together_is_refused_in_one_line(averaged, tmp_path, change, message):
    good = averaged[1] / "model000000002.model"
    state = load(good)
    change(state)
    torch.save(state, tmp_path / "other.model")
    with pytest.raises(UsageError) as caught:
        mean_of_checkpoints([good, tmp_path / "other.model"])
    assert message in str(caught.value) and "\n" not in str(caught.value) and "other.model" in str(caught.value)


def test_usage_errors_of_the_script(averaged, tmp_path, capsys):
    import average_checkpoints
    from settings.command_line import run

    folder, out = str(averaged[1]), str(tmp_path / "avg.model")
    one = str(averaged[1] / "model000000001.model")
    for words, message in (
        ([folder, "--last", "9", "--out", out], "has 3 checkpoints model0*.model, 9 are needed"),
        ([folder, "--last", "1", "--out", out], "--last: a mean needs at least 2 checkpoints"),
        ([one, "--out", out], "a mean needs at least 2 checkpoints"),
        ([one, one.replace("1.model", "2.model"), "--last", "2", "--out", out], "--last: chooses from a folder"),
        ([folder, "--out", one], "is read by this command and would be lost"),
        ([folder, "--out", str(tmp_path / "missing" / "avg.model")], "--out: no such folder: '"),
        ([folder, "--out", folder], "--out: cannot write"),
        ([folder + "x", "--out", out], "no such file"),
        ([str(averaged[1].parent), "--out", out], f"2 are needed; a run keeps them in its folder {folder}"),
    ):
        assert run(average_checkpoints.main, words) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
