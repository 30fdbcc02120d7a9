"""A NaN never costs a run: every kind of fault is caught, reported, dumped, and leaves no trace."""

import json
import math
import re
import shlex
import stat
import threading
from types import SimpleNamespace

import numpy as np
import programs
import pytest
import soundfile
import torch
import yaml
from trainers import train

import trainSpeakerNet
from errors import UsageError
from settings.checks import check_paths
from settings.injections import parse_injections
from settings.reader import load_config
from storage import checkpoint
from storage.dump import KEYS, DumpError, read_dump, read_state, validate
from storage.dump_statistics import issues
from storage.files import save_atomically
from training.faults import check_batch, inject_batch

PRECISIONS = [("false", "auto"), ("true", "bfloat16"), ("true", "float16")]
REASON = {
    **{"data": "batch_nonfinite", "label": "label_out_of_range", "loss": "loss_nonfinite"},
    **{"grad": "grad_nonfinite", "buffer": "state_nonfinite"},
}


@pytest.mark.parametrize("kind", REASON)
@pytest.mark.parametrize("mixed, dtype", PRECISIONS, ids=["fp32", "bf16", "fp16"])
def test_each_fault_is_dumped_and_leaves_no_trace(settings, tools, mixed, dtype, kind, capsys):
    keys = {"mixedprec": mixed, "amp_dtype": dtype}
    trainer = tools.build(settings, **keys, nan_inject=f"2:{kind}")
    batches = tools.batches(trainer)
    train(trainer, batches[:3])
    trainer.close()
    with_fault = tools.snapshot(trainer)
    other = tools.build(settings, **keys)  # the run in which that batch was never drawn
    train(other, [batches[0]])
    other.progress.batch += 1
    train(other, [batches[2]])
    tools.assert_same(with_fault, tools.snapshot(other))
    assert trainer.progress.totals["skipped"] == 1 and trainer.progress.step == 2
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert path.name == "nan_batch_2_epoch_1.pt" and stat.S_IMODE(path.stat().st_mode) == 0o600
    dump = read_dump(path)
    assert dump["reason"] == REASON[kind] and set(KEYS) <= dump.keys()
    assert dump["label"].shape == batches[1]["label"].shape and len(dump["files"]) == len(dump["label"])
    if kind not in ("data", "label"):
        assert torch.equal(dump["data"], batches[1]["data"])
    state = torch.load(path.parent / dump["state"], weights_only=True)
    assert all(t.isfinite().all() for t in state["model_state_dict"].values())
    assert len(dump["history"]) == 1 and dump["grad_stats"].keys() <= dump["param_stats"].keys()
    out = capsys.readouterr().out
    assert out.count("=" * 80) == 2 and "DETECTED AT BATCH 2" in out and f"Saved debug data to: {path}" in out
    assert out.count("rehearsal: this fault was injected by nan_inject") == 1
    for section in ("DATA", "LABEL", "GRADIENT"):
        assert f"--- {section} STATISTICS ---" in out


ODD = {
    "all zero": lambda x: x * 0,
    "0.25 all along": lambda x: x * 0 + 0.25,
    "clipped: ": lambda x: (100 * x).clamp(-1, 1),
    "far too loud: largest sample": lambda x: x * 32768,
    "silent: ": lambda x: x * 1e-6,
}


@pytest.mark.parametrize("words", ODD)
def test_a_row_that_is_finite_and_odd_stands_out(settings, tools, capsys, words):
    trainer = tools.build(settings, nan_inject="1:grad")
    (batch,) = tools.batches(trainer)[:1]
    batch["data"][0, 1] = ODD[words](batch["data"][0, 1])
    train(trainer, [batch])
    trainer.close()
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("  row ")]
    assert "Rows that stand out:" in out and len(rows) == 1
    assert rows[0].startswith(f"  row 1: {batch['files'][1]['path']} ") and words in rows[0]
    assert "model.layer1.conv.weight: NaN 1" in out and "__S__" not in out
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    (line,) = [issue for issue in issues(read_dump(path), 6, None) if "stand out" in issue]
    assert line.startswith(f"Rows that stand out: 1 ({words}")


def test_the_report_names_row_file_and_sample(settings, tools, capsys):
    trainer = tools.build(settings, nan_inject="1:data")
    (batch,) = tools.batches(trainer)[:1]
    train(trainer, [batch])
    trainer.close()
    out = capsys.readouterr().out
    assert f"row 0: {batch['files'][0]['path']} (list line {batch['files'][0]['line']})" in out
    assert f"1 non-finite, the first at sample {batch['data'].shape[2] // 2}" in out and "Loss value: nan" in out
    event = json.loads(trainer.files.metrics.read_text().splitlines()[-1])
    assert event["event"] == "incident" and event["files"] == [batch["files"][0]["path"]]


def test_the_command_of_the_report_is_quoted(settings, tools, tmp_path, capsys):
    trainer = tools.build(settings, save_path=str(tmp_path / "my run"), nan_inject="1:loss", max_epoch=1)
    trainer.train_epoch()
    trainer.close()
    (command,) = re.findall(r"^To find out why: python (.*)$", capsys.readouterr().out, re.MULTILINE)
    _, dump = shlex.split(command)
    assert (tmp_path / "my run" / "debug_nan" / "nan_batch_1_epoch_1.pt").samefile(dump)
    end = trainer.endings.patience_is_over(1, {"what": "x", "reason": "loss_nonfinite"})
    assert f"analyze_nan_debug.py '{tmp_path / 'my run' / 'debug_nan'}'; " in end.lines[-1]


def test_a_fault_seen_before_is_counted_not_dumped(settings, tools, capsys):
    trainer = tools.build(settings, nan_patience=1000)
    weight = next(trainer.network.__L__.parameters())
    weight.register_hook(lambda gradient: gradient * math.nan)
    train(trainer, tools.batches(trainer)[:6])
    trainer.close()
    assert len(list(trainer.incidents.writer.folder.glob("nan_*.pt"))) == 1
    out = capsys.readouterr().out
    assert "seen 6 times, the first: nan_batch_1_epoch_1.pt" in out and "rehearsal" not in out
    assert trainer.progress.totals["skipped"] == 6


def test_a_loss_that_fails_in_two_places_is_dumped_each_time(settings, tools, capsys):
    trainer = tools.build(settings, nan_patience=1000, nan_max_dumps=4)
    trainer.network.loss.register_forward_hook(lambda m, i, o: (o[0] * math.nan, o[1]))
    train(trainer, tools.batches(trainer)[:6])
    trainer.close()
    folder = trainer.incidents.writer.folder
    assert len(list(folder.glob("nan_*.pt"))) == 4 and len(list(folder.glob("state_*.pt"))) == 1  # weights once
    assert len({read_dump(path)["state"] for path in folder.glob("nan_*.pt")}) == 1
    out = capsys.readouterr().out
    assert out.count("Not saved: 4 dumps are written (nan_max_dumps); weights") == 2 and out.count("DETECTED") == 4


def test_a_later_state_holds_moments_only_if_they_are_suspect(settings, tools):
    trainer = tools.build(settings, nan_inject="2:loss,4:loss,6:buffer", nan_patience=1000)
    train(trainer, tools.batches(trainer)[:6])
    trainer.close()
    folder = trainer.incidents.writer.folder
    moments = [
        bool(read_state(path, read_dump(path)["state"])["optimizer_state_dict"]["state"])
        for path in sorted(folder.glob("nan_*.pt"))
    ]
    assert moments == [True, False, True]


def test_dumps_that_are_being_written_count_for_the_budget(settings, tools, monkeypatch):
    trainer = tools.build(settings, nan_max_gb=0.0009, nan_inject="1:loss,2:loss", nan_patience=1000)
    release = threading.Event()
    monkeypatch.setattr("storage.dump.save_atomically", lambda *arguments: release.wait(20))
    train(trainer, tools.batches(trainer)[:1])
    size = sum(trainer.incidents.writer.pending.values())
    trainer.incidents.writer.max_bytes = 1.5 * size
    assert size > 0 and "nan_max_gb" in trainer.incidents.writer.refusal(size)
    release.set()
    trainer.close()
    assert not trainer.incidents.writer.pending


def test_budgets(settings, tools, capsys):
    trainer = tools.build(settings, nan_max_dumps=1, nan_inject="1:data,2:data,3:loss")
    train(trainer, tools.batches(trainer)[:3])
    trainer.close()
    assert len(list(trainer.incidents.writer.folder.glob("nan_*.pt"))) == 1
    assert capsys.readouterr().out.count("Not saved: 1 dump is written (nan_max_dumps)") == 2
    small = tools.build(settings, nan_max_gb=1e-6, nan_inject="1:loss", save_path=settings["save_path"] + "2")
    train(small, tools.batches(small)[:1])
    assert "Not saved: debug_nan/ would pass 1e-06 GB (nan_max_gb)" in capsys.readouterr().out


def test_dumps_share_one_state_while_no_step_is_taken(settings, tools):
    trainer = tools.build(settings, nan_inject="1:data,2:label,3:loss")
    train(trainer, tools.batches(trainer)[:3])
    trainer.close()
    folder = trainer.incidents.writer.folder
    assert len(list(folder.glob("nan_*.pt"))) == 3 and len(list(folder.glob("state_*.pt"))) == 1


def test_a_disk_that_refuses_does_not_stop_training(settings, tools, capsys):
    trainer = tools.build(settings, nan_inject="1:loss")
    trainer.incidents.writer.folder.parent.mkdir(exist_ok=True)
    trainer.incidents.writer.folder.write_text("a file where the folder should be")
    train(trainer, tools.batches(trainer)[:2])
    trainer.close()
    assert "could not be written" in capsys.readouterr().out and trainer.progress.step == 1


def test_audio_can_be_left_out(settings, tools):
    trainer = tools.build(settings, nan_inject="1:loss", nan_dump_audio="false")
    train(trainer, tools.batches(trainer)[:1])
    trainer.close()
    dump = read_dump(trainer.incidents.writer.folder / "nan_batch_1_epoch_1.pt")
    assert dump["data"].numel() == 0 and dump["files"][0]["path"]


@pytest.mark.parametrize(
    "mixed, dtype, value, reason",
    [
        ("false", "auto", 3e38, "grad_norm_overflow"),
        ("true", "bfloat16", 3e38, "grad_norm_overflow"),
        ("true", "float16", 3e32, "grad_norm_overflow"),
        ("true", "float16", math.inf, "scale_collapse"),
        ("true", "bfloat16", math.inf, "grad_nonfinite"),
    ],
)
def test_overflows_are_told_apart_and_leave_no_trace(settings, tools, mixed, dtype, value, reason):
    trainer = tools.build(settings, mixedprec=mixed, amp_dtype=dtype)
    batches = tools.batches(trainer)
    train(trainer, batches[:1])
    before = tools.snapshot(trainer)
    # Finite entries whose squares do not add up in fp32; an Inf overflows at every scale.
    handle = trainer.network.__S__.linear.weight.register_hook(lambda g: torch.full_like(g, value))
    train(trainer, batches[1:2])
    handle.remove()
    trainer.close()
    tools.assert_same(before, tools.snapshot(trainer))
    dump = read_dump(trainer.incidents.writer.folder / "nan_batch_2_epoch_1.pt")
    assert dump["reason"] == reason
    assert any(s["inf"] for s in dump["grad_stats"].values()) == (value == math.inf)


def test_bad_weights_are_named_as_state(settings, tools, capsys):
    trainer = tools.build(settings, nan_patience=2)
    trainer.network.__S__.linear.bias.data[0] = math.nan
    assert trainSpeakerNet.run_to_the_end(trainer) == 3
    said = capsys.readouterr()
    assert "'model.linear.bias' is not finite" in said.err.splitlines()[0] and "__S__" not in said.out + said.err


def test_a_start_from_bad_tensors_is_refused(settings, tools):

    trainer = tools.build(settings)
    train(trainer, tools.batches(trainer)[:1])
    trainer.saver.last()
    path = trainer.files.model / "last.model"
    good = checkpoint.load(path)
    for part, name in (("model", "__S__.linear.bias"), ("optimizer", "optimizer.0.exp_avg")):
        state = checkpoint.load(path)
        tensor = state["model_state_dict"]["__S__.linear.bias"]
        if part == "optimizer":
            tensor = state["optimizer_state_dict"]["state"][0]["exp_avg"]
        tensor.view(-1)[0] = math.nan
        save_atomically(state, path)
        with pytest.raises(UsageError, match="1 tensors are not finite") as caught:
            tools.build(settings).resume()
        assert name in str(caught.value)
        save_atomically(good, path)
    fp16 = {"mixedprec": "true", "amp_dtype": "float16"}
    good["scaler_state_dict"] = {"scale": 0.0, "_growth_tracker": 0}
    save_atomically(good, path)
    with pytest.raises(UsageError, match=r"loss scale is 0\.0"):
        tools.build(settings, **fp16).resume()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_buffer_that_is_nan_from_the_start_is_named(settings, tools, capsys, value):
    trainer = tools.build(settings)
    trainer.network.loss.register_buffer("centre", torch.tensor([0.0, value]))
    trainer.begin()
    said = "WARNING: 1 buffer with NaN from the start, which no step checks: 'loss.centre'"
    assert (said in capsys.readouterr().out) == math.isnan(value)  # infinities may be a mask


def test_a_storm_under_fp16_leaves_everything_finite(settings, tools):
    keys = {"mixedprec": "true", "amp_dtype": "float16", "nan_patience": 1000}
    trainer = tools.build(settings, **keys)
    batches = tools.batches(trainer)
    train(trainer, batches[:1])
    scale = trainer.step.scaler.scale
    bad = inject_batch(batches[1], "data", trainer.incidents.classes)
    train(trainer, [bad] * 300)
    train(trainer, batches[2:3])
    assert trainer.step.scaler.scale >= min(scale, trainer.step.scaler.scale) > 0 and trainer.progress.step == 2
    assert all(t.isfinite().all() for t in trainer.network.state_dict().values())


def test_harmless_batches_make_no_incident(settings, tools):
    trainer = tools.build(settings)
    batches = tools.batches(trainer)
    for batch in batches[:4]:
        batch["data"][0, 0] = 0
    batches[1]["data"] *= 32768
    batches[2]["data"] += 0.5
    batches[3]["data"] *= 1e-38
    train(trainer, batches[:4])
    assert trainer.progress.step == 4 and not trainer.incidents.writer.folder.exists()


def test_host_checks():
    batch = {"data": torch.zeros(1, 3, 8), "label": torch.tensor([0, 1, 2]), "peak": torch.zeros(3)}
    assert check_batch(batch, 3) is None
    assert check_batch(batch, 2).rows == [2]
    assert check_batch({**batch, "label": torch.tensor([0, -1, 2])}, 3).what == "label -1 with 3 classes"
    assert check_batch({**batch, "peak": torch.tensor([0.0, math.inf, math.nan])}, 3).rows == [1, 2]


def test_nan_inject_is_parsed_and_refused(settings, tools):
    assert parse_injections("3:data, 7:grad@1", 1) == {3: "data", 7: "grad"}
    assert parse_injections("3:data,7:grad@1", 0) == {3: "data"}
    for wrong in ("data", "3:weights", "x:data", "0:data", "3:data@x"):
        with pytest.raises(UsageError, match="nan_inject"):
            parse_injections(wrong)
    assert parse_injections("7:grad@1", 1, world=2) == {7: "grad"}
    for wrong, said in {
        "3:weights": r"expected 'step:kind'.*; got '3:weights'",
        "3:loss@1": "'3:loss@1': there is process 0 alone",
    }.items():
        with pytest.raises(UsageError, match=f"command line: --nan_inject: {said}"):
            words = [f"--{key}={value}" for key, value in settings.items()] + [f"--nan_inject={wrong}"]
            config, written, *_ = load_config(words)
            check_paths(config, written)


def test_old_dumps_are_valid_and_others_are_not(tmp_path):
    old = {"batch_idx": 1, "epoch": 2, "data": torch.zeros(1), "label": torch.tensor([0]), "loss": math.nan, "prec1": 0}
    torch.save(old, tmp_path / "old.pt")
    assert read_dump(tmp_path / "old.pt")["epoch"] == 2
    for broken in ([], {**old, "format_version": 9}, {**old, "data": 3}, {k: v for k, v in old.items() if k != "loss"}):
        with pytest.raises(DumpError):
            validate(broken, "x")
    for content in (b"", b"not a dump", (tmp_path / "old.pt").read_bytes()[:300]):
        (tmp_path / "broken.pt").write_bytes(content)
        with pytest.raises(DumpError, match=r"broken\.pt"):
            read_dump(tmp_path / "broken.pt")


def test_bad_files_of_every_kind_do_not_stop_a_run(settings, tools, data, tmp_path, write):
    import shutil

    wav = tmp_path / "wav"
    shutil.copytree(data / "wav", wav)
    files = sorted(wav.glob("train*/**/*.flac"))
    x, rate = soundfile.read(files[0])
    x[len(x) // 2] = math.nan
    nan = files[0].with_suffix(".wav")
    soundfile.write(nan, x, rate, subtype="FLOAT")
    text = (data / "train_list.txt").read_text().replace(str(files[0].relative_to(wav)), str(nan.relative_to(wav)))
    (tmp_path / "list.txt").write_text(text)
    files[7].write_bytes(files[7].read_bytes()[:3000])
    for kind in ("noise", "speech", "music"):
        (tmp_path / "musan" / kind / "a").mkdir(parents=True)
        for i in range(3):
            soundfile.write(tmp_path / "musan" / kind / "a" / f"{i}.wav", np.zeros(16000), 16000)
    (tmp_path / "rir").mkdir()
    soundfile.write(tmp_path / "rir" / "dead.wav", np.zeros(400), 16000)
    keys = {"train_path": str(wav), "train_list": str(tmp_path / "list.txt"), "augment": True, "max_bad_files_pct": 50}
    keys |= {"musan_path": str(tmp_path / "musan"), "rir_path": str(tmp_path / "rir"), "max_epoch": 3, "max_frames": 80}
    done = tools.command("--config", write({**settings, **keys}))
    assert done.returncode == 0, done.stderr
    for named in (str(nan), str(files[7]), "dead.wav: impulse response without energy", "a silent crop, adds nothing"):
        assert named in done.stdout, named
    assert "best EER" in done.stdout
    dumps = [read_dump(path) for path in (tmp_path / "run" / "debug_nan").glob("nan_*.pt")]
    errors = [dump for dump in dumps if dump["reason"] == "data_error"]
    rows = [info for dump in dumps for info in dump["files"]]
    assert done.stdout.count("Saved debug data to: ") == len(dumps)
    assert str(files[7]) in {r["path"] for info in rows for r in info.get("replaced", [])}
    assert str(tmp_path / "rir" / "dead.wav") in {d["path"] for i in rows for d in i["augment"] if "reason" in d}
    assert not any(dump["state"] for dump in errors) and [d["reason"] for d in dumps].count("batch_nonfinite") == 1


def test_a_second_dump_of_a_batch_leaves_the_first(settings, tools):
    dumps, record = tools.build(settings).incidents, SimpleNamespace(batch=3, epoch=12)
    for name in ("nan_batch_3_epoch_12.pt", "nan_batch_3_epoch_12_2.pt", "nan_batch_3_epoch_12_3.pt"):
        assert dumps.free_name(record) == name
        dumps.names.add(name)


def test_two_processes_agree_and_the_one_at_fault_speaks(settings, tools, tmp_path, write):
    keys = {**settings, "device": "cpu", "batch_size": 3, "max_epoch": 1, "test_interval": 1, "max_frames": 30}
    keys["nan_inject"] = "2:data@1,3:loss@1,4:grad@1"
    script = tmp_path / "train.py"  # the command, with a line on each rank's weights at the end
    script.write_text(
        f"import sys; sys.path.insert(0, {str(tools.root)!r})\n"
        "import SpeakerNet, trainSpeakerNet\n"
        "from storage.dump import content_hash\n"
        "close = SpeakerNet.ModelTrainer.close\n"
        "def noting(self):\n"
        "    close(self)\n"
        "    print('WEIGHTS', content_hash(dict(self.network.named_parameters())), flush=True)\n"
        "SpeakerNet.ModelTrainer.close = noting\n"
        "sys.exit(trainSpeakerNet.main())\n"
    )
    done = programs.run_ranks(script, "--config", write(keys))
    assert [process.returncode for process in done] == [0, 0], done[0].stderr
    hashes = [re.search(r"WEIGHTS (\w{16})", process.stdout)[1] for process in done]
    assert hashes[0] == hashes[1]
    assert "left out: 3 steps; to find out why: " in done[0].stdout  # which was at fault in none of them
    run = tmp_path / "run"
    names = sorted(p.name for p in (run / "debug_nan").glob("nan_*.pt"))
    assert names == [f"nan_batch_{b}_epoch_1_rank{r}.pt" for b, r in ((2, 1), (3, 1), (4, 1))]
    events = [json.loads(line) for line in (run / "result" / "metrics.jsonl").read_text().splitlines()]
    incidents = [(e["rank"], e["reason"]) for e in events if e["event"] == "incident"]
    assert incidents == [(1, "batch_nonfinite"), (1, "loss_nonfinite"), (1, "grad_nonfinite")]
    assert next(e for e in events if e["event"] == "epoch")["skipped_batches"] == 3
    assert yaml.safe_load((run / "result" / "config.yaml").read_text())["nan_inject"] == keys["nan_inject"]


def test_a_rate_that_is_not_finite_reaches_no_weight(settings, tools):
    trainer = tools.build(settings)
    batches = tools.batches(trainer)
    train(trainer, batches[:1])
    before = tools.snapshot(trainer)
    trainer.optimizer.param_groups[0]["lr"] = math.nan
    train(trainer, batches[1:2])
    trainer.close()
    trainer.optimizer.param_groups[0]["lr"] = before["lr"][0]
    tools.assert_same(before, tools.snapshot(trainer))
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert read_dump(path)["reason"] == "state_nonfinite" and math.isnan(read_dump(path)["lr"])


def test_a_dump_of_a_run_that_recomputes_is_replayed_bit_for_bit(settings, tools):
    from postmortem.replay import Replay

    trainer = tools.build(settings, gradient_checkpointing=True)
    batches = tools.batches(trainer)
    train(trainer, batches[:1])
    batches[1]["data"][0, 0, 50] = 1e30  # whose power overflows
    train(trainer, batches[1:2])
    trainer.close()
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    dump = read_dump(path)
    replay = Replay(dump, read_state(path, dump["state"]))
    assert replay.reproduction(replay.run(stats=True)) == "bit_equal"
