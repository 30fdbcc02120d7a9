"""Whole runs through the real command line: files of a run, resuming, evaluation, several processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import programs
import pytest
import torch
import yaml

from errors import UsageError
from storage import checkpoint
from storage.seal import save_sealed


def load(path):
    return torch.load(path, weights_only=True)


def metrics(run):
    """metrics.jsonl without the two values that are times."""
    events = [json.loads(line) for line in (Path(run) / "result" / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in e.items() if k not in ("utt_per_s", "data_wait_pct")} for e in events]


def equal(a, b, where=""):
    """Compare nested states bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            equal(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), where


PARTS = (
    "model_state_dict",
    "optimizer_state_dict",
    "scheduler_state_dict",
    "scaler_state_dict",
    "rng_state",
    "epoch",
    "step",
    "best",
)


def assert_same_run(one, other):
    a, b = (load(Path(run) / "model" / "last.model") for run in (one, other))
    for part in PARTS:
        equal(a[part], b[part], part)
    assert metrics(one) == metrics(other)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory, request):
    """A run of 3 epochs that nothing disturbed: (settings, folder, its output)."""
    from trainers import command

    folder = tmp_path_factory.mktemp("finished")
    settings = {
        **{"train_list": str(data / "train_list.txt"), "train_path": str(data / "wav")},
        **{"test_list": str(data / "trials.txt"), "test_path": str(data / "wav"), "save_path": str(folder / "run")},
        **{"model": "ECAPA_TDNN", "channels": 8, "aggregate": 16, "n_mels": 24, "nOut": 12, "spec_augment": [4, 8]},
        **{"trainfunc": "aamsoftmax", "scheduler": "cosine", "lr": 0.01, "batch_size": 4, "max_frames": 40},
        **{"max_epoch": 3, "test_interval": 1, "eval_frames": 0, "nDataLoaderThread": 0, "threads": 1, "seed": 3},
        **{"save_interval_steps": 2, "picture_format": "none"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    done = command("--config", path)
    assert done.returncode == 0, done.stderr
    return settings, path, done.stdout


def test_files_of_a_run(finished):
    settings, _, output = finished
    run = Path(settings["save_path"])
    names = {p.name for p in (run / "model").iterdir()}
    assert {f"model{e:09d}.{end}" for e in (1, 2, 3) for end in ("model", "eer")} <= names
    assert {"model_best.model", "model_best.eer", "model_best.threshold", "last.model"} <= names
    assert {"model_best.safetensors", "model_best.calibration", "last_previous.model"} <= names
    best = load(run / "model" / "model_best.model")
    weights = checkpoint.load(run / "model" / "model_best.safetensors")
    equal(weights["model_state_dict"], best["model_state_dict"])
    assert (weights["config"], weights["epoch"]) == (best["config"], best["epoch"])
    state = load(run / "model" / "model000000003.model")
    assert {*PARTS, "sampler_state", "config", "format_version"} <= state.keys() and state["epoch"] == 3
    assert {name[:6] for name in state["model_state_dict"]} == {"__S__.", "__L__."}
    events = metrics(run)
    assert [e["event"] for e in events] == ["epoch", "eval"] * 3
    assert {"train_loss", "train_acc", "lr", "skipped_batches", "step"} <= events[0].keys()
    wanted = {"eer", "min_dcf_0.01", "min_dcf_0.05", "act_dcf_0.05", "cllr", "threshold", "trials", "nan_scores"}
    assert wanted <= events[1].keys()
    lines = (run / "result" / "scores.txt").read_text().splitlines()
    assert len(lines) == 6 and lines[0].startswith("Epoch 1, TEER/TAcc ") and lines[1].startswith("Epoch 1, VEER ")
    best = min((e for e in events if e["event"] == "eval"), key=lambda e: e["eer"])
    assert (run / "model" / "model_best.eer").read_text() == f"{best['eer']:.4f}"
    assert float((run / "model" / "model_best.threshold").read_text()) == pytest.approx(best["threshold"], abs=1e-5)
    assert not list((run / "result").glob("*.png")) and "pictures" not in output
    assert list((run / "logs").glob("events*")) and "best EER" in output
    again = yaml.safe_load((run / "result" / "config.yaml").read_text())
    assert again["channels"] == 8 and again["run_info"]["versions"]["torch"] == torch.__version__


def test_the_trials_file_gives_the_metrics_again(finished):
    from tuneThreshold import ComputeEER

    settings, _, _ = finished
    result = Path(settings["save_path"]) / "result"
    assert [p.name for p in result.glob("trials_*.txt")] == ["trials_epoch_3.txt"]
    rows = [line.split() for line in (result / "trials_epoch_3.txt").read_text().splitlines()]
    listed = [line.split() for line in Path(settings["test_list"]).read_text().splitlines()]
    assert [[r[1], r[2], r[3]] for r in rows] == listed
    eer = ComputeEER([float(r[0]) for r in rows], [int(r[1]) for r in rows])[0]
    assert eer == pytest.approx(metrics(settings["save_path"])[-1]["eer"], abs=1e-9)


def test_the_same_command_again_says_that_it_is_done(finished, tools):
    _, path, _ = finished
    again = tools.command("--config", path)
    assert again.returncode == 0 and "epoch 3 of 3 is already done" in again.stdout


def start(path, *words):
    return programs.Program(programs.ROOT / "trainSpeakerNet.py", "--config", path, *words)


def test_kill_9_at_random_moments_changes_nothing(finished, tmp_path):
    settings, path, _ = finished
    chance, state = random.Random(1), tmp_path / "run" / "model" / "last.model"
    for workers in (0, 1, 2):
        process = start(path, "--save_path", tmp_path / "run", "--nDataLoaderThread", workers)
        seen = state.stat().st_mtime_ns if state.exists() else 0
        while process.returncode is None and not (state.exists() and state.stat().st_mtime_ns > seen):
            time.sleep(0.02)
        time.sleep(chance.random() * 0.4)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = start(path, "--save_path", tmp_path / "run").wait()
    assert done.returncode == 0 and "resuming from" in done.stdout, done
    assert_same_run(settings["save_path"], tmp_path / "run")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_next_call_continues(finished, tmp_path, number, status):
    settings, path, _ = finished
    words = ("--save_path", tmp_path / "run", "--nDataLoaderThread", 1, "--save_interval_steps", 0)
    process = start(path, *words)
    process.wait_for("utterances of")  # signals are caught from before this line on
    process.send_signal(number)
    done = process.wait()
    assert done.returncode == status and "run the same command again" in done.stdout, done
    assert f"stopped by signal {int(number)} ({number.name}); the state is in" in done.stdout
    done = start(path, *words).wait()
    assert done.returncode == 0, done
    assert_same_run(settings["save_path"], tmp_path / "run")


def test_workers_and_precision_of_resume_do_not_matter(finished, tmp_path, tools):
    settings, path, _ = finished
    done = tools.command("--config", path, "--save_path", tmp_path / "run", "--nDataLoaderThread", 2)
    assert done.returncode == 0, done.stderr
    assert_same_run(settings["save_path"], tmp_path / "run")


def test_pictures_of_the_best_evaluation(settings, write, tools):
    path = write({**settings, "picture_format": "pdf", "max_epoch": 1, "test_interval": 1})
    done = tools.command("--config", path)
    result = Path(settings["save_path"], "result")
    names = {f"{name}.{ending}" for name in ("det", "roc", "scores", "calibration") for ending in ("png", "pdf")}
    assert {p.name for ending in ("png", "pdf") for p in result.glob(f"*.{ending}")} == names, done.stderr
    assert f"pictures: {result / 'det.png'}, " in done.stdout


def scores(folder):
    (path,) = Path(folder, "result").glob("trials_epoch_*.txt")
    return np.array([float(line.split()[0]) for line in path.read_text().splitlines()])


def test_evaluation_alone_gives_the_same_scores_in_any_batch(finished, tmp_path, tools):
    settings, path, _ = finished
    reference = scores(settings["save_path"])
    model = Path(settings["save_path"]) / "model" / "model000000003.model"
    for size in (1, 5):
        words = ("--eval", "--initial_model", model, "--eval_batch_size", size, "--save_path", tmp_path / str(size))
        done = tools.command("--config", path, *words)
        assert done.returncode == 0 and "EER" in done.stdout and "minDCF" in done.stdout, done.stderr
        assert np.abs(scores(tmp_path / str(size)) - reference).max() < 1e-6
        assert not (tmp_path / str(size) / "model").exists()


def test_evaluation_refuses_weights_that_do_not_fit(finished, tmp_path, tools):
    settings, path, _ = finished
    model = Path(settings["save_path"]) / "model" / "model_best.model"
    words = ("--config", path, "--eval", "--initial_model", model, "--save_path", tmp_path / "x")
    done = tools.command(*words, "--channels", 16)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "trained with 8" in done.stderr
    weights = load(model)["model_state_dict"]
    bare = {k.replace("__S__.", "module.__S__._orig_mod."): v for k, v in weights.items() if k.startswith("__S__.")}
    for name, state in (
        ("bare", bare),
        ("wrapped", {"model": {k.removeprefix("__S__."): v for k, v in weights.items() if "__S__" in k}}),
    ):
        torch.save(state, tmp_path / f"{name}.model")
        done = tools.command(
            *words[:3], "--initial_model", tmp_path / f"{name}.model", "--save_path", tmp_path / name, "--trainfunc", ""
        )
        assert done.returncode == 0, done.stderr
    missing = dict(list(bare.items())[1:])
    torch.save(missing, tmp_path / "missing.model")
    done = tools.command(*words[:3], "--initial_model", tmp_path / "missing.model", "--save_path", tmp_path / "y")
    assert done.returncode == 2 and "not in the file" in done.stderr


def test_two_processes_give_the_scores_of_one(finished, tmp_path, tools):
    settings, path, _ = finished
    model = Path(settings["save_path"]) / "model" / "model000000003.model"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [str(tools.root / "trainSpeakerNet.py"), "--config", str(path), "--device", "cpu"]
    more = ["--eval", "--initial_model", str(model), "--save_path", str(tmp_path / "eval")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words, *more], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert np.abs(scores(tmp_path / "eval") - scores(settings["save_path"])).max() < 1e-6
    assert done.stdout.count("Epoch 3  EER") == 1
    more = ["--save_path", tmp_path / "train", "--patience", 1, "--max_epoch", 4]
    done, other = programs.run_ranks(tools.root / "trainSpeakerNet.py", "--config", path, *more)
    assert done.returncode == other.returncode == 0, done.stderr
    evaluations = [e for e in metrics(tmp_path / "train") if e["event"] == "eval"]
    assert 1 <= len(evaluations) <= 4 and all(np.isfinite(e["eer"]) for e in evaluations)


def test_fine_tuning_lists_what_starts_fresh(finished, tmp_path, tools):
    settings, path, _ = finished
    model = Path(settings["save_path"]) / "model" / "model_best.model"
    words = ("--initial_model", model, "--save_path", tmp_path / "tuned", "--nClasses", 9, "--max_epoch", 1)
    done = tools.command("--config", path, *words)
    assert (
        done.returncode == 0 and "starts fresh: loss.weight: (6, 12) in the file, (9, 12) in the model" in done.stdout
    )


def test_options_changed_between_runs_are_used_or_refused(settings, tools):  # pyannote-audio#597
    trainer = tools.build(settings, optimizer="adamw", weight_decay=0.1)
    trainer.run()
    again = tools.build(settings, optimizer="adamw", weight_decay=0.3, lr=0.005, max_epoch=4)
    assert again.resume() and again.progress.epoch == 3
    assert again.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert again.scheduler.base_lrs == [pytest.approx(0.005)]
    with pytest.raises(UsageError, match="was trained with optimizer 'adamw', not 'sgd'"):
        tools.build(settings, optimizer="sgd").resume()
    with pytest.raises(UsageError, match="does not fit this configuration"):
        tools.build(settings, optimizer="adamw", channels=16).resume()


def test_a_run_that_is_computed_in_another_way_is_not_called_bit_equal(settings, tools, capsys, monkeypatch):
    trainer = tools.build(settings, optimizer="adamw", lr=0.01)
    trainer.saver.last()
    assert tools.build(settings, optimizer="adamw", lr=0.01, log_interval=7).resume()
    assert "bit-equal to an uninterrupted run: weights, " in capsys.readouterr().out
    assert tools.build(settings, optimizer="adamw", lr=0.02, channels=8).resume()
    assert "those of the state; what follows is not, for lr changed" in capsys.readouterr().out
    now = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: now + 7)
    assert tools.build(settings, optimizer="adamw", fused=False).resume()
    ways = f"threads {now} before, {now + 7} now; fused changed"
    assert f"equivalent: what is added up in another way ({ways})" in capsys.readouterr().out


def test_a_run_from_a_gpu_does_not_go_on_with_its_random_numbers_on_a_cpu(settings, tools, capsys):
    trainer = tools.build(settings, optimizer="adamw", lr=0.01)
    trainer.saver.last()
    trainer.close()
    path = trainer.files.model / "last.model"
    state = checkpoint.load(path)
    of_a_gpu = [{**state["rng_state"][0], "cuda": torch.zeros(16, dtype=torch.uint8)}]
    save_sealed({**state, "rng_state": of_a_gpu, "arithmetic": {"device": "NVIDIA A100"}}, path)
    assert tools.build(settings, optimizer="adamw", lr=0.01).resume()
    said = capsys.readouterr().out
    assert "bit-equal: weights, optimizer, schedule and batches are those of the state; equivalent: random" in said
    assert "of another kind of device, and what is added up in another way (device NVIDIA A100 before, cpu now)" in said


def test_other_speakers_are_no_continuation(settings, tools, data, tmp_path, capsys):
    from training.finetuning import load_initial

    trainer = tools.build(settings)
    trainer.saver.last()
    renamed = tmp_path / "renamed.txt"
    renamed.write_text((data / "train_list.txt").read_text().replace("train000 ", "zzz "))
    with pytest.raises(UsageError, match="was trained with other speakers"):
        tools.build(settings, train_list=renamed).resume()
    more = tmp_path / "more.txt"
    more.write_text(f"{(data / 'train_list.txt').read_text()}new trial000/session0/00000.flac\n")
    with pytest.raises(UsageError, match=r"trained with other speakers than those of .*more"):
        tools.build(settings, train_list=more).resume()
    first = trainer.files.model / "last.model"
    tuned = tools.build(settings, train_list=renamed, save_path=tmp_path / "tuned", initial_model=first, seed=8)
    load_initial(tuned.network, tuned.dataset, tuned.config, tuned.log)
    said = capsys.readouterr().out
    assert "the loss starts fresh" in said and "not in the file" not in said
    assert torch.equal(tuned.network.__S__.linear.weight, trainer.network.__S__.linear.weight)
    assert not torch.equal(tuned.network.loss.weight, trainer.network.loss.weight)


def test_an_old_folder_without_full_state_continues(settings, tools):
    trainer = tools.build(settings)
    torch.save(trainer.network.state_dict(), trainer.files.model / "model000000007.model")
    again = tools.build(settings, seed=99, max_epoch=9)
    assert again.resume() and again.progress.epoch == 8
    assert torch.equal(again.network.__S__.linear.weight, trainer.network.__S__.linear.weight)


def test_bad_files_are_counted_over_all_processes(finished, tmp_path, tools, data):
    shutil.copytree(data / "wav", tmp_path / "wav")
    victims = [sorted((tmp_path / "wav").glob(f"train00{speaker}/**/*.flac"))[0] for speaker in range(4)]
    for victim in victims:
        victim.write_bytes(b"")
    more = ["--train_path", tmp_path / "wav", "--save_path", tmp_path / "run"]
    done, other = programs.run_ranks(tools.root / "trainSpeakerNet.py", "--config", finished[1], *more)
    assert done.returncode == other.returncode == 2 and not other.stderr
    assert done.stderr.count("4 files (13.3 % of the list) cannot be used") == 1, done.stderr
    assert str(tools.root / "SpeakerNet.py") not in done.stderr
    listed = (tmp_path / "run" / "result" / "bad_files.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == [str(victim) for victim in victims]
    assert all(done.stdout.count(f"unreadable: {victim} (") == 1 for victim in victims), done.stdout
    incidents = [e for e in metrics(tmp_path / "run") if e["event"] == "incident"]
    assert {e["rank"] for e in incidents} == {0, 1}  # no process alone has met four


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["--encoder_type", "TAP", "--model", "ResNetSE34L", "--allow_unknown"],
            "models/ResNetSE34L.py: encoder_type: must be",
        ),
        (["--channels", "100"], "models/ECAPA_TDNN.py: channels: ECAPA_TDNN needs a multiple of 8, got 100"),
        (["--features", "mfcc"], "models/ECAPA_TDNN.py: features: must be one of voxceleb_trainer,"),
        (["--beta1", "1.5"], "optimizer/adam.py: Invalid beta parameter"),
        (["--batch_size", "1"], "batch_size: 1 leaves a process batches of one row"),
    ],
)
def test_what_a_plug_in_refuses_is_one_line_too(finished, tools, tmp_path, words, message):
    done = tools.command("--config", finished[1], "--save_path", tmp_path / "x", *words)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["--save_path", "LICENSE"], "--save_path: 'LICENSE' is not a folder"),
        (["--spec_augment", "10"], "--spec_augment: expected a list of 2, as [0, 0]; got '10'"),
        (["--config", "configs"], "configs: cannot read the configuration"),
        (["--train_path", "/no/such"], "command line: --train_path: no such folder"),
        (["--nClasses", "3"], "--nClasses: 3 is fewer than the 6 classes"),
        (
            ["--trainfunc", "angleproto"],
            "nPerSpeaker: loss 'angleproto' (trainfunc) takes at least 2",
        ),
        (
            ["--trainfunc", "angleproto", "--nPerSpeaker", "2", "--batch_size", "7"],
            "--batch_size: 7 rows of different speakers",
        ),
        (["--augment"], "--augment: needs musan_path or rir_path"),
        (["--eval"], "eval needs a checkpoint to evaluate; to evaluate the best of this run: --initial_model BEST"),
        (["--eval", "--save_path", "new"], "SAVE_PATH/model/model_best.model, and "),
        (["--initial_model", "/no/such.model"], "--initial_model: no such file"),
    ],
)
def test_mistakes_are_one_line_and_status_2(finished, tools, words, message):
    done = tools.command("--config", finished[1], "--print_config", *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert message.replace("BEST", str(Path(finished[0]["save_path"], "model", "model_best.model"))) in done.stderr


def test_print_config_is_yaml_and_trains_nothing(finished, tools, tmp_path):
    done = tools.command("--config", finished[1], "--print_config", "--lr", "0.5", "--save_path", tmp_path / "none")
    printed = yaml.safe_load(done.stdout)
    assert done.returncode == 0 and printed["lr"] == 0.5 and printed["nClasses"] == 6
    assert not (tmp_path / "none").exists() and "overrides" in done.stderr


def test_help_names_every_key_with_its_default(tools):
    from config import KEYS

    done = tools.command("--help")
    assert done.returncode == 0 and all(f"--{name} " in done.stdout for name in KEYS)
    assert "--max_frames INT" in done.stdout and "(default 200 frames of 10 ms)" in done.stdout
