"""analyze_nan_debug.py: the step of a dump is replayed, the fault placed, fixes tried; nothing is taken on trust."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import programs
import pytest
import soundfile
import torch
from programs import analyser
from recordings import read_audio

from postmortem.analysis import analyse
from postmortem.case import Case
from postmortem.diagnosis import diagnose
from postmortem.finding import result_of
from postmortem.fixes import FAILS_LATER, attempt, excluded, recommendation, recommendations
from postmortem.modes import CudaCasts
from postmortem.probe import Probe
from postmortem.provenance import origin_of
from postmortem.replay import Outcome, Replay
from postmortem.report import recommendation_lines, text_report
from storage.dump import read_dump, read_state
from storage.files import save_atomically
from training.precision import BufferSnapshot

KEYS = {"file", "reason", "cause", "detail", "location", "evidence", "replay", "recommendations"}
PLACE = {"module", "op", "phase", "source", "parameter", "rows", "files", "rank"}
OLD = {"batch_idx": 3, "epoch": 2, "label": torch.tensor([0, 1, 2, 3]), "loss": math.nan, "prec1": 0.0}


def poison_weight(name, value):
    """A fault put into the state: an element of a weight or buffer."""

    def spoil(trainer):
        with torch.no_grad():
            trainer.network.state_dict()[name].view(-1)[0] = value

    return spoil


def test_a_setting_that_a_module_keeps_as_a_number_is_tried(dump_of):
    """What modules keep in plain attributes is replayed, but for what a changed setting has set itself."""
    path = dump_of(scale=1e39)
    verdict = analyse(path).verdict
    verified = [fix["change"] for fix in verdict["recommendations"] if fix["verdict"] == "verified"]
    assert verdict["location"]["parameter"] == "scale" and any("scale" in change for change in verified)
    replay = Replay(read_dump(path), read_state(path, read_dump(path)["state"]))
    assert replay.run(settings={"scale": 10}).finite and not replay.run().finite


def test_without_time_the_line_is_found_and_nothing_more_is_tried(dump_of, capsys):
    path = dump_of(scale=1e39)
    dump = read_dump(path)
    case = Case(path, dump, read_state(path, dump["state"]), seconds=0.0)
    finding = diagnose(case)
    advice = recommendations(case, finding)
    assert case.replay.runs == 2 and finding.source.startswith("loss/aamsoftmax.py:")  # as it was, and under the probe
    tried = [fix for fix in advice if fix["verdict"] != "refuted"]
    assert tried and all("no time left" in fix["outcome"] for fix in tried)
    capsys.readouterr()
    case.base.seconds, case.shown = 5.0, 0.0
    case.show_life(3)
    assert "replay 3 of at most 3, 5.0 s each, 0 s left" in capsys.readouterr().err


def test_a_few_rows_stand_for_a_large_batch(dump_of):
    """Changes are tried on few rows that fail; one that passes there is tried on the whole batch."""
    path = dump_of(scale=1e39)
    dump = read_dump(path)
    case = Case(path, dump, read_state(path, dump["state"]))
    sizes = []
    run_once = case.replay.run_once
    case.replay.run_once = lambda columns, *more, **kw: (sizes.append(columns), run_once(columns, *more, **kw))[1]
    case.small = [0, 2]
    assert attempt(case, "", "set", {}, settings={"scale": 20})["verdict"] == "verified"
    assert attempt(case, "", "set", {}, settings={"margin": 0.1})["verdict"] == "refuted"
    assert sizes == [[0, 2], None, [0, 2]]


def test_an_injection_is_called_a_rehearsal(dump_of):
    verdict = analyse(dump_of(nan_inject="1:grad")).verdict
    assert (verdict["cause"], verdict["detail"]) == ("environment", "injected")
    assert verdict["replay"]["reproduced"] == "vanished"
    fixes = verdict["recommendations"]
    assert [r["change"] for r in fixes if r["verdict"] == "verified"] == [{"nan_inject": ""}]
    assert all(
        r["verdict"] == "untested"
        for r in fixes
        if "nan_inject" not in (r["change"] or {}) and r["action"] == "set" and "mixedprec" not in r["change"]
    )


def test_a_rehearsal_that_cannot_be_replayed_is_one_all_the_same(dump_of):
    verdict = analyse(dump_of(nan_inject="1:loss"), replay=False).verdict
    assert (verdict["cause"], verdict["detail"]) == ("environment", "injected")
    (fix,) = [fix for fix in verdict["recommendations"] if fix["change"] == {"nan_inject": ""}]
    assert fix["verdict"] == "untested"


@pytest.mark.parametrize(
    "listing, path, said",
    [
        ("a.txt", "wav/p/1.flac", "remove line 7 of a.txt"),
        ("s-{0..1}.tar", "d/s-0.tar/p/1.flac", "leave 'p/1.flac' out of d/s-0.tar"),
        ("a.txt", "d/s-0.tar/p/1.flac", "remove line 7 of a.txt"),
        (
            '[{"list": "a.txt"}, {"list": "b.txt"}]',
            "1.flac",
            "remove line 7 of the one of 'a.txt', 'b.txt' that names it",
        ),
    ],
)
def test_what_to_take_out_of_which_list_is_said(listing, path, said):
    case = SimpleNamespace(config={"train_list": listing}, files=[{"path": path, "line": 7}])
    assert excluded(case, path) == said


def test_a_bad_file_is_named_to_the_sample_and_taking_it_out_is_verified(data, settings, tools, tmp_path):
    lines = (data / "train_list.txt").read_text().splitlines()
    speaker, name = lines[4].split()
    audio, rate = soundfile.read(data / "wav" / name)
    audio[len(audio) // 2 - 40 :] = math.nan
    bad = tmp_path / "bad.wav"
    soundfile.write(bad, audio, rate, subtype="FLOAT")
    lines[4] = f"{speaker} {os.path.relpath(bad, data / 'wav')}"
    (tmp_path / "list.txt").write_text("\n".join(lines) + "\n")
    trainer = tools.build(settings, train_list=str(tmp_path / "list.txt"), max_frames=80)
    for batch in tools.batches(trainer):
        trainer.progress.batch += 1
        if trainer.accept(batch):
            trainer.train_step([batch])
    trainer.close()
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    analysis = analyse(path)
    verdict = analysis.verdict
    assert (verdict["cause"], verdict["location"]["phase"]) == ("input", "data")
    (file,) = verdict["location"]["files"]
    assert os.path.samefile(file["path"], bad)
    first = read_dump(path)["files"][verdict["location"]["rows"][0]]["start"]
    assert file["sample"] == max(len(audio) // 2 - 40, first)
    best = verdict["recommendations"][0]
    assert best["action"] == "exclude_file" and best["verdict"] == "verified" and "remove line 5" in best["text"]
    seed = [r for r in verdict["recommendations"] if r["action"] == "set"]
    assert len(seed) >= 4 and all(r["verdict"] == "refuted" for r in seed)
    assert f"{file['path']} has NaN or Inf at sample {file['sample']}." in analysis.summary
    (folded,) = [line for line in text_report(analysis) if line.startswith("tried, no effect: ")]
    assert folded == "tried, no effect: lr 0.005, lr 0.001, scale 20, scale 10, clip 1"


def test_a_label_out_of_range(dump_of):
    path = dump_of(nan_inject="1:label")
    (best, *_) = analyse(path).verdict["recommendations"]
    assert best["change"] == {"nan_inject": ""} and best["verdict"] == "verified"
    edit(path, injected="")
    verdict = analyse(path).verdict
    assert (verdict["cause"], verdict["location"]["rows"]) == ("label", [0])
    assert {"nClasses": 10} in [r["change"] for r in verdict["recommendations"] if r["verdict"] == "verified"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_bad_weight_is_named(dump_of, value):
    name = "__S__.layer1.conv1.weight"

    def spoil(trainer):
        nonlocal name
        name = next(n for n, p in trainer.network.named_parameters() if p.ndim == 3)
        poison_weight(name, value)(trainer)

    verdict = analyse(dump_of(spoil)).verdict
    assert verdict["cause"] == "state" and verdict["location"]["parameter"] == name
    best = verdict["recommendations"][0]
    assert best["action"] == "restore" and best["verdict"] == "verified"


def test_the_command_line(dump_of, tmp_path):
    path = dump_of(nan_inject="1:data,2:label")
    done = analyser(path.parent, "--json")
    assert done.returncode == 0, done.stderr
    objects = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(objects) == 2
    for found in objects:
        assert found.keys() == KEYS and found["location"].keys() == PLACE
        assert {r["verdict"] for r in found["recommendations"]} <= {"verified", "refuted", "untested"}
    text = analyser(path.parent)
    assert "2 dumps, 2 causes" in text.stdout and "VERIFIED" in text.stdout
    assert analyser(tmp_path / "none").returncode == 2
    (tmp_path / "empty").mkdir()
    assert analyser(tmp_path / "empty").returncode == 1
    assert analyser("--jso").returncode == 2 and len(analyser("--jso").stderr.splitlines()) == 1
    (tmp_path / "broken.pt").write_bytes(b"not a dump")
    broken = analyser(tmp_path / "broken.pt", path)
    assert broken.returncode == 2 and "broken.pt" in broken.stderr and "Cause: " in broken.stdout
    assert len(broken.stderr.splitlines()) == 1


def test_changed_code_is_not_replayed_unless_trusted(dump_of):
    path = dump_of(nan_inject="1:loss")
    dump = torch.load(path, weights_only=True)
    dump["source_hashes"]["loss/aamsoftmax.py"] = "0" * 64
    save_atomically(dump, path)
    refused = analyse(path).verdict
    assert refused["replay"]["reproduced"] is None and "loss/aamsoftmax.py" in " ".join(refused["evidence"])
    assert analyse(path, trust=True).verdict["replay"]["reproduced"] == "vanished"


def test_without_replay_no_plug_in_is_imported(dump_of):
    path = dump_of(nan_inject="1:data")
    code = (
        "import sys, analyze_nan_debug\n"
        f"status = analyze_nan_debug.main([{str(path)!r}, '--no-replay'])\n"
        "print([m for m in sys.modules if m.startswith(('models.', 'loss.', 'torchaudio'))], status)"
    )
    root = programs.ROOT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert done.stdout.splitlines()[-1] == "[] 0", done.stdout[-300:] + done.stderr


class Net(torch.nn.Module):
    """A network with one operation at fault, chosen by ``kind``."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.fc = kind, torch.nn.Linear(4, 4)

    def forward(self, x):
        y = self.fc(x)
        if self.kind == "forward":
            y = (y - y.detach() - 1.0).sqrt()
        elif self.kind == "backward":
            y = (y - y.detach()).sqrt()
        elif self.kind == "masked":
            y = y.masked_fill(y > 1e9, -math.inf).softmax(dim=1)
        elif self.kind == "fully masked":
            y = y.masked_fill(y < 1e9, -math.inf).softmax(dim=1)
        elif self.kind == "cubed":
            y = torch.tanh((1e20 * y) ** 3)
        elif self.kind == "no factor":
            y = torch.linalg.cholesky(-torch.eye(4)) @ y.t()
        elif self.kind == "no sample":
            torch.multinomial((y - y.detach()) / (y - y.detach()), 2)
        elif self.kind == "conjugated":
            z = torch.complex(y - y.detach(), y - y.detach())
            y = (z * z.conj() / z.abs()).real
        elif self.kind in ("counted none", "none of none"):  # a divisor of whole numbers, which has no range
            y = (y - y.detach() + (self.kind == "counted none")) / (y > 1e9).sum(1, keepdim=True)
        return y.sum()


@pytest.mark.parametrize(
    "kind, op, sentence",
    [
        ("forward", "sqrt", "sqrt gave NaN; its smallest input was -1"),
        (
            "backward",
            "SqrtBackward0",
            "the gradient of sqrt is Inf (the slope of sqrt at 0 is infinite); the forward pass is finite",
        ),
        ("masked", None, None),
        ("fully masked", "_softmax", "softmax gave NaN: every value of a row is -inf"),
        ("cubed", "PowBackward0", "the gradient of pow is Inf; the forward pass is finite"),
        ("no factor", "linalg_cholesky", "linalg_cholesky refuses what it reads: linalg.cholesky: The factorization"),
        ("no sample", "div", "div gave NaN; 0 is divided by 0"),
        ("conjugated", "div", "div gave NaN; 0 is divided by 0"),
        ("counted none", "div", "div gave Inf; the divisor is 0 or close to it"),
        ("none of none", "div", "div gave NaN; 0 is divided by 0"),
    ],
)
def test_the_probe_names_the_first_bad_operation(kind, op, sentence):
    network, x = Net(kind), torch.randn(3, 4)
    probe = Probe(network, x)
    loss = math.nan
    with probe, contextlib.suppress(RuntimeError):  # what refuses its numbers
        loss = network(x)
        loss.backward()
    probe.end_forward(network, math.isfinite(float(loss)))
    origin = probe.origin()
    assert (origin and (origin.node or origin.op)) == op
    assert (origin and result_of(origin)[: len(sentence)]) == sentence


def test_refuted_fixes_share_a_line_and_verified_ones_keep_theirs():
    advice = [
        recommendation("lower the scale", "set", {"scale": 20}, True, "with it: loss 1.5"),
        recommendation("a.py:3: clamp the operand of sqrt", "fix_code", None, False, "loss nan"),
        recommendation("lower lr", "set", {"lr": 0.0005}, False, "no effect"),
        recommendation("another margin", "set", {"margin": 0.1}, False, FAILS_LATER),
        recommendation("no mixed precision", "set", {"mixedprec": False}, False, "not applicable"),
        recommendation("clip harder", "set", {"grad_clip": 1.0}, None, "no time"),
        recommendation("other", "set", {"optimizer": "sgd"}, None, "no time"),
    ]
    assert recommendation_lines(advice) == [
        "1. VERIFIED  lower the scale",
        "             with it: loss 1.5",
        "             YAML: scale: 20",
        "tried, no effect: clamp the operand of sqrt (a.py:3), lr 0.0005, margin 0.1 (this step only)",
        "not applicable: fp32 (the step ran in float32)",
        "untested: clip 1, optimizer sgd (no time)",
    ]
    assert recommendation_lines([]) == ["Nothing to recommend."]


def test_guilty_rows_by_halving(dump_of):
    path = dump_of(nan_inject="1:loss")
    dump = read_dump(path)
    case = Case(path, dump, read_state(path, dump["state"]))
    case.origin = None
    guilty = {2}
    case.fails = lambda columns: bool(guilty & set(columns))
    assert case.guilty_columns() == [2]
    guilty = set(range(4))
    assert case.guilty_columns() == []


def test_moved_data_is_found_again_or_both_candidates_are_named(dump_of, settings):
    """A speech file that cannot be read here is accused of nothing that was not seen."""
    wav, path = settings["train_path"], dump_of(nan_inject="1:data")
    dump = edit(path, injected="")
    files = [dict(entry) for entry in dump["files"]]
    for entry in files:
        entry["path"] = entry["path"].replace(str(wav), "/moved")
        entry["augment"] = [{"kind": "noise", "path": "/moved/noise.wav", "offset": 0, "snr": 5.0}]
    edit(path, files=files)
    verdict = analyse(path, replay=False).verdict
    assert (verdict["cause"], verdict["detail"]) == ("unknown", "unattributed")
    assert "/moved/noise.wav" in [file["path"] for file in verdict["location"]["files"]]
    for entry in files:
        entry["augment"] = []
    edit(path, files=files)
    there = analyse(path, replay=False, roots=[("/moved", str(wav))]).verdict
    assert there["cause"] == "environment" and there["location"]["files"][0]["path"].startswith(str(wav))


def edit(path, **values):
    """Change keys of a dump on the disk."""
    dump = {**torch.load(path, weights_only=True), **values}
    save_atomically(dump, path)
    return dump


@pytest.mark.parametrize(
    "values, said",
    [
        ({"source_hashes": {}}, "no hash in the dump"),
        ({"threads": 4000}, ""),
        ({"state": ""}, "the weights are missing"),
        ({"data": torch.zeros(1, 4, 0)}, "no audio"),
    ],
)
def test_a_dump_is_not_taken_on_trust(dump_of, values, said):
    path = dump_of(nan_inject="1:loss")
    edit(path, **values)
    before = torch.get_num_threads()
    verdict = analyse(path, trust=True).verdict
    assert said in " ".join(verdict["evidence"]) and torch.get_num_threads() == before
    assert (verdict["replay"]["reproduced"] is None) == bool(said)


def test_an_absurd_configuration_is_not_built(dump_of):
    path = dump_of(nan_inject="1:loss")
    dump = torch.load(path, weights_only=True)
    edit(path, config={**dump["config"], "channels": 10**9})
    assert "channels: 1000000000" in " ".join(analyse(path).verdict["evidence"])


def test_a_dump_of_a_gpu_is_replayed_with_its_casts(dump_of):
    path = dump_of(nan_inject="1:data", mixedprec="true", amp_dtype="float16")
    edit(path, device="cuda:0")
    verdict = analyse(path).verdict
    assert verdict["cause"] == "input" and "emulated" in " ".join(verdict["evidence"])
    with torch.autocast("cpu", dtype=torch.float16), CudaCasts(torch.float16):
        x = torch.full((2, 3), 300.0, dtype=torch.float16)
        assert x.pow(2).dtype is torch.float32 and x.softmax(dim=1).dtype is torch.float32
        assert (x @ x.T).dtype is torch.float16


def test_a_step_that_is_finite_with_changed_code_is_not_called_transient(dump_of):
    path = dump_of(nan_inject="1:loss")
    dump = torch.load(path, weights_only=True)
    edit(path, injected="", source_hashes={**dump["source_hashes"], "loss/aamsoftmax.py": "0" * 64})
    verdict = analyse(path, trust=True).verdict
    assert (verdict["cause"], verdict["detail"]) == ("unknown", "code_changed")
    edit(path, source_hashes=dump["source_hashes"], device="cuda:0")
    assert analyse(path).verdict["detail"] == "other_device"
    edit(path, device="cpu")
    assert analyse(path).verdict["cause"] == "environment"


def test_a_value_that_is_too_large_for_float16_is_given_with_its_own_type(dump_of):
    def spoil(trainer):
        trainer.network.__S__.bn.weight.data[:] = 3e5  # the layer behind it casts to float16

    summary = analyse(dump_of(spoil, mixedprec="true", amp_dtype="float16")).summary
    told = r"in float16, the cast to float16 gave Inf; its input was -\S+e\+05 to \S+e\+05 in float32\. In float32 the"
    assert re.search(told, summary), summary


@pytest.mark.parametrize(
    "lr, rate, said",
    [
        (0.01, 1e8, "scheduler/steplr.py gave a learning rate of 1e+08 at step 0; the weights"),
        (0.01, math.nan, "scheduler/steplr.py gave a learning rate of nan at step 0."),
        (1e6, 1e8, "learning rate (1e+08, which scheduler/steplr.py gave at step 0; lr is 1e+06) makes"),
    ],
)
def test_a_learning_rate_of_a_schedule_is_laid_to_the_schedule_and_its_step(dump_of, lr, rate, said):
    def spoil(trainer):
        trainer.optimizer.param_groups[0]["lr"] = rate

    analysis = analyse(dump_of(spoil, optimizer="sgd", scheduler="steplr", lr=lr))
    assert (analysis.verdict["cause"], analysis.verdict["detail"]) == ("optimizer", "lr")
    assert said in analysis.summary


def test_a_bad_buffer_is_named_with_what_is_wrong():
    module = torch.nn.BatchNorm1d(2)
    snapshot = BufferSnapshot(module)
    module.running_var[1] = -3e30
    said = "'running_var' became so large (3e+30) that its square overflows"
    assert snapshot.first_bad() == said
    outcome = Outcome(1.5, 0.0, 2.0, bad_buffers=True, bad_buffer=said)
    assert str(outcome) == f"loss 1.5, gradient norm 2, buffer {said}"
    for value in (math.nan, -math.inf):
        module.running_mean[0] = value
        assert snapshot.first_bad() == "'running_mean' became non-finite"


def test_an_infinite_mask_is_no_fault():
    module = torch.nn.BatchNorm1d(2)
    module.register_buffer("mask", torch.full((2, 2), -math.inf))
    snapshot = BufferSnapshot(module)
    assert snapshot.nonfinite_by_design == {"mask"} and len(snapshot.floating) == 2


@pytest.mark.parametrize("rate, sample", [(8000, 3000), (44100, 20000)])
def test_a_sample_is_counted_at_the_rate_of_its_file(tmp_path, rate, sample):
    audio = np.random.default_rng(0).normal(0, 0.1, rate)
    audio[sample] = math.nan
    soundfile.write(tmp_path / "a.wav", audio, rate, subtype="FLOAT")
    row, start, *_ = read_audio(tmp_path / "a.wav", 12000, 0.0)
    info = {"path": str(tmp_path / "a.wav"), "line": 1, "start": start, "rate": rate, "speed": 1.0, "augment": []}
    found = origin_of(row, info)
    assert (found.cause, found.sample) == ("input", sample)


def test_two_bad_files_are_taken_out_together(dump_of):
    path = dump_of(nan_inject="1:loss")
    dump = torch.load(path, weights_only=True)
    data = dump["data"].clone()
    data[0, 1, 50], data[0, 3, 70] = math.nan, math.inf
    files = [{**info, "path": f"gone/{row}.wav"} for row, info in enumerate(dump["files"])]
    edit(path, data=data, files=files, injected="", reason="batch_nonfinite")
    verdict = analyse(path).verdict
    best = verdict["recommendations"][0]
    assert verdict["location"]["rows"] == [1, 3] and best["verdict"] == "verified"
    assert best["change"] == {"files": ["gone/1.wav", "gone/3.wav"]}


def test_an_update_that_makes_nan_is_the_optimizers(dump_of):
    def spoil(trainer):
        trainer.optimizer.param_groups[0]["weight_decay"] = math.nan

    verdict = analyse(dump_of(spoil)).verdict
    assert (verdict["cause"], verdict["detail"]) == ("optimizer", "weight_decay")


def test_an_update_that_makes_nan_is_replayed_and_its_fixes_are_tried(dump_of):
    path = dump_of(nan_inject="1:loss", optimizer="sgd", lr=100, weight_decay=3e38)  # together beyond fp32
    edit(path, reason="state_nonfinite", injected="")  # the injected step was sound; its own update is not
    verdict = analyse(path).verdict
    assert (verdict["cause"], verdict["location"]["phase"]) == ("optimizer", "update")
    assert verdict["location"]["op"], "a fused update is not looked into"
    assert (
        verdict["location"]["parameter"].startswith("__S__.") and "replayed with its update" in verdict["evidence"][0]
    )
    assert verdict["replay"]["reproduced"] == "same_fault"
    fixes = {tuple(fix["change"] or ()): fix["verdict"] for fix in verdict["recommendations"] if fix["action"] == "set"}
    assert fixes[("weight_decay",)] == "verified"
    assert fixes[("mixedprec",)] == fixes[("grad_clip",)] == fixes[("scale",)] == "refuted"
