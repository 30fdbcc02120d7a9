"""--preflight: bad files, bad keys, bad sources and bad numbers are named before a run, and sound ones are not."""

import ast
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import programs
import pytest
import soundfile
import torch
import yaml

import trainSpeakerNet
from corpus.measuring import Source, judge, measure
from preflight import dry_step, lint
from preflight.hazards import hazards
from preflight.report import Report
from preflight.run import check_data, run_checks
from settings import plugins
from settings.reader import load_config
from training import precision

RATE = 16000


def spoiled(data, folder):
    """A copy of the voices with one fault of each kind; returns {phrase of the report: file it must name}."""
    shutil.copytree(data, folder, dirs_exist_ok=True)
    lines = (folder / "train_list.txt").read_text().splitlines()
    lines[:7] = [line.replace(".flac", ".wav") for line in lines[:7]]
    paths = [folder / "wav" / line.split()[1] for line in lines[:7]]
    x = np.random.default_rng(0).normal(0, 0.1, RATE).astype(np.float32)
    bad = x.copy()
    bad[4000:4003] = np.nan
    soundfile.write(paths[0], bad, RATE, subtype="FLOAT")
    cut = paths[1].with_suffix(".flac")
    soundfile.write(cut, x, RATE)
    cut.write_bytes(cut.read_bytes()[:9000])
    lines[1] = lines[1].replace(".wav", ".flac")
    soundfile.write(paths[2], x[:0], RATE)
    soundfile.write(paths[3], x, RATE)
    paths[3].write_bytes(paths[3].read_bytes()[:9000])
    soundfile.write(paths[4], 0 * x, RATE)
    soundfile.write(paths[5], 1e9 * x, RATE, subtype="FLOAT")
    soundfile.write(paths[6], 32768 * x, RATE, subtype="FLOAT")
    (folder / "train_list.txt").write_text("\n".join([*lines, lines[9], f"stranger {lines[9].split()[1]}"]) + "\n")
    for category in ("noise", "speech", "music"):
        (folder / "musan" / category).mkdir(parents=True)
        soundfile.write(folder / "musan" / category / "n.wav", x, RATE)
    soundfile.write(folder / "musan" / "noise" / "nan.wav", bad, RATE, subtype="FLOAT")
    (folder / "rir").mkdir()
    soundfile.write(folder / "rir" / "zero.wav", np.zeros(800), RATE, subtype="FLOAT")
    where = folder / "train_list.txt"
    return [
        (f"{where}:1", paths[0], "NaN at sample 4000 (0.250 s), 3 of 16000"),
        (f"{where}:2", cut, ""),
        (f"{where}:3", paths[2], "no samples"),
        (f"{where}:4", paths[3], "truncated: the header promises"),
        (f"{where}:5", paths[4], "all zero"),
        (f"{where}:6", paths[5], "largest sample"),
        (f"{where}:7", paths[6], "largest sample"),
        (f"{where}:{len(lines) + 1}", lines[9].split()[1], "first at line 10"),
        (f"{where}:{len(lines) + 2}", lines[9].split()[1], "first at line 10"),
        ("musan_path", folder / "musan" / "noise" / "nan.wav", "NaN at sample 4000"),
        ("rir_path", folder / "rir" / "zero.wav", "impulse response without energy"),
    ]


def test_sound_data_is_ready_and_only_the_report_is_written(settings, write, tools, tmp_path):
    done = tools.command("--config", write(settings), "--preflight")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"preflight: ready to start \(\d+ warnings\)", lines[-1])
    assert done.stdout.isascii() and done.stderr == "" and "ERROR" not in done.stdout
    assert all(f"    {name}  " in done.stdout for name in ("float64", "float32", "float16"))
    run = tmp_path / "run"
    assert [p for p in run.rglob("*") if p.is_file()] == [run / "result" / "preflight.txt"]
    assert lines[-1] in (run / "result" / "preflight.txt").read_text()


def test_each_bad_file_is_named_with_its_list_line(data, settings, write, tools, tmp_path):
    folder = tmp_path / "spoiled"
    faults = spoiled(data, folder)
    keys = {"train_list": str(folder / "train_list.txt"), "train_path": str(folder / "wav"), "augment": True}
    keys |= {"musan_path": str(folder / "musan"), "rir_path": str(folder / "rir"), "nDataLoaderThread": 2}
    done = tools.command("--config", write({**settings, **keys}), "--preflight")
    assert done.returncode == 2, done.stderr
    for place, path, detail in faults:
        pattern = rf"^ +{re.escape(place)} +{re.escape(str(path))} +.*{re.escape(detail)}"
        assert re.search(pattern, done.stdout, re.MULTILINE), (place, path, detail, done.stdout)
    # 3 unreadable, 2 non-finite, 1 huge, 1 without energy, 1 of two speakers; 1 silent, 1 integer, 1 repeated
    last = done.stdout.splitlines()[-1]
    assert last == "preflight: do not start: 8 errors, 3 warnings", done.stdout


def test_impossible_numbers_are_named_with_their_yaml_line(settings, write, capsys):
    keys = {**settings, "optimizer": "sgd", "momentum": 1.2, "scale": 1.0e39}
    path = write(keys)
    assert trainSpeakerNet.main(["--config", path, "--preflight"]) == 2
    printed = capsys.readouterr().out
    for name, value in (("momentum", "1.2"), ("scale", "1e+39")):
        line = list(keys).index(name) + 1
        assert f"  ERROR    {path}:{line}: {name}: {value} - " in printed
    assert re.search(r"ERROR +float32: the output of loss is not finite", printed), printed


LOSS = """
import torch
import torch.nn as nn
import torch.nn.functional as F
from utils import accuracy

class LossFunction(nn.Module):
    def __init__(self, nOut, nClasses, margin=0.2, scale=30.0, **kwargs):
        super().__init__()
        self.test_normalize = True
        self.margin, self.scale = margin, scale
        self.weight = nn.Parameter(torch.randn(nClasses, nOut))

    def forward(self, x, label=None):
        cosine = F.linear(F.normalize(x), F.normalize(self.weight))
        sine = torch.sqrt((1.0 - torch.mul(cosine, cosine)).clamp(0, 1))
        output = self.scale * torch.where(F.one_hot(label, cosine.shape[1]) > 0, cosine - self.margin * sine, cosine)
        return F.cross_entropy(output, label), accuracy(output.detach(), label)[0]
"""
MODEL = """
import torch.nn as nn

class Gain(nn.Module):
    def forward(self, x):
        return 1e6 * x.sigmoid()

class Loud(nn.Module):
    def __init__(self, nOut):
        super().__init__()
        self.first, self.gain, self.last = nn.Linear(400, 8), Gain(), nn.Linear(8, nOut)

    def forward(self, x):
        return self.last(self.gain(self.first(x.unfold(1, 400, 160)))).mean(dim=1)

def MainModel(nOut=12, **kwargs):
    return Loud(nOut)
"""


def test_a_drop_in_root_is_noted_and_a_float16_overflow_names_its_module(settings, tools, tmp_path):
    checkout = tmp_path / "checkout"
    shutil.copytree(tools.root, checkout, ignore=shutil.ignore_patterns(".*", "data", "exps", "tests", "__pycache__"))
    (checkout / "loss" / "theirs.py").write_text(LOSS)
    (checkout / "models" / "theirs.py").write_text(MODEL)
    keys = {k: v for k, v in settings.items() if k not in ("channels", "aggregate")}
    keys |= {"trainfunc": "theirs", "model": "theirs"}
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(keys))
    words = ["--config", tmp_path / "theirs.yaml", "--preflight", "--mixedprec", "--amp_dtype", "float16"]
    done = programs.run(checkout / "trainSpeakerNet.py", *words, cwd=checkout)
    line = LOSS.splitlines().index("        sine = torch.sqrt((1.0 - torch.mul(cosine, cosine)).clamp(0, 1))") + 1
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(rf"^  note .*\n +loss/theirs.py:{line} .*slope of a root at 0", done.stdout, re.MULTILINE)
    assert "  ERROR    float16: the output of model.gain is not finite" in done.stdout, done.stdout
    assert done.stdout.splitlines()[-1].startswith("preflight: do not start: 1 error, ")


def test_several_processes_are_refused_in_one_line(settings, write, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert trainSpeakerNet.main(["--config", write(settings), "--preflight"]) == 2
    assert capsys.readouterr().err == "preflight: runs in one process, without torchrun\n"


# -------------------------------------------------------------------------------------------------------- in parts


@pytest.mark.parametrize(
    "keys, level, phrase",
    [
        ({"optimizer": "sgd", "momentum": 1.0}, "error", "momentum: 1 - "),
        ({"optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "weight_decay": 14}, "error", "above 1.36"),
        ({"optimizer": "sgd", "momentum": 0.9, "lr": 0.1, "weight_decay": 13}, "warning", "times lr is 1.3"),
        ({"optimizer": "adamw", "lr": 0.01, "weight_decay": 210}, "error", "above 2 the weights grow"),
        ({"optimizer": "adam", "lr": 0.3}, "warning", "lr: 0.3 - very high"),
        ({"optimizer": "adam", "lr": 1e3}, "error", "lr: 1000 - "),
        ({"optimizer": "adam", "eps": 0.0}, "error", "eps: 0 - "),
        ({"mixedprec": True, "amp_dtype": "float16", "eps": 1e-10}, "warning", "eps: 1e-10 - rounds to 0 in float16"),
        ({"mixedprec": True, "amp_dtype": "float16", "scale": 7e4}, "error", "scale: 70000 - float16 ends at 65504"),
        ({"mixedprec": True, "amp_dtype": "float16", "grad_clip": 0}, "warning", "grad_clip"),
        ({"scale": 2000}, "warning", "scale: 2000 - very high"),
        (
            {"margin_warmup": "[20, 40, linear]", "max_epoch": 30},
            "warning",
            "max_epoch is 30: the margin never reaches",
        ),
        ({"margin_warmup": "[20, 40, linear]", "max_epoch": 39}, None, "no hazard found"),
        ({"nan_inject": "3:data"}, "warning", "nan_inject: 3:data - a rehearsal"),
        ({"scheduler": "cosine", "warmup_epochs": 5, "max_epoch": 5}, "warning", "warmup_epochs: 5 - max_epoch is 5"),
        ({"scheduler": "onecycle", "warmup_share": 1.0}, "warning", "warmup_share: 1 - outside"),
        ({"scheduler": "cosine", "lr_min": 0.02}, "warning", "lr_min: 0.02 - not below lr"),
        ({"mixedprec": True, "amp_dtype": "float16"}, None, "no hazard found"),
        ({"trainfunc": "triplet", "margin": 2.0, "nPerSpeaker": 2}, None, "no hazard found"),
    ],
)
def test_keys(settings, keys, level, phrase, capsys, monkeypatch):
    monkeypatch.setattr(precision, "cpu_features", lambda: {"avx512_bf16", "avx512_fp16"})
    config, written, _, _ = load_config([f"--{k}={v}" for k, v in {**settings, **keys}.items()])
    report = Report()
    lint.check_keys(config, written, report)
    assert phrase in capsys.readouterr().out
    assert report.counts == {"error": 0, "warning": 0, "note": 0, **({level: 1} if level else {})}


def test_nesterov_diverges_beyond_the_product_that_is_called_an_error():
    for product, grows in ((1.34, False), (1.38, True)):
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([weight], lr=0.1, weight_decay=10 * product, momentum=0.9, nesterov=True)
        for _ in range(200):
            weight.grad = torch.zeros(1)
            optimizer.step()
        assert bool(weight.abs() < 1) is not grows


UNGUARDED = [
    "self.layer(x) ** 0.7",
    "self.layer(x) ** 1.5",
    "self.layer(x) ** (1 / 3)",
    "x.pow(self.power)",
    "torch.pow(x, exponent=power)",
    "torch.sqrt(x.square().mean(2) - x.clamp(min=1e-6).mean(2).square())",
    "torch.sqrt(self.layer(x + 1e-6))",
    "x / (x > 0).sum()",
    "x.sum() / mask.sum().item()",
    "x / x.std(dim=1, correction=0, keepdim=True)",
    "raised / raised.sum(dim=1, keepdim=True)",
    "F.softmax(scores.masked_fill(silent, float('-inf')), dim=1)",
    "F.softmax(torch.where(silent, -math.inf, scores), dim=1)",
    "x.var(dim=2)",
    "torch.std_mean(x.clamp(min=1e-6), dim=2)",
    "torch.asin(x)",
    "torch.logit(x)",
    "torch.exp(x).sum(dim=1)",
    "(20.0 * self.layer(x)).exp()",
    "torch.sqrt(1.0 - cosine**2)",
    "(1 - cosine * cosine).clamp(0, 1).sqrt()",
    "torch.sqrt(torch.clamp(1 - cosine.pow(2), min=0))",
    "torch.acos(cosine)",
    "torch.acos(cosine.clamp(-1, 1))",
    "torch.log(cosine.softmax(1))",
    "x / x.norm(dim=1, keepdim=True)",
    "torch.div(x, length)",
    "x.exp() / x.exp().sum(1, keepdim=True)",
    "(x - y).pow(2).sum(1) ** 0.5",
    "(x - y).pow(2).sum(1).pow(0.5)",
    "x.std(dim=2)",
    "torch.rsqrt(x.var(dim=1))",
    "torch.sqrt(x, out=y)",
]
GUARDED = [
    "torch.sqrt((1.0 - cosine**2).clamp(min=1e-6))",
    "(1 - bounded.square()).sqrt()",
    "torch.acos(cosine.clamp(-1 + 1e-7, 1 - 1e-7))",
    "torch.acos(torch.clamp(cosine, -LIMIT, LIMIT))",
    "torch.log(x.abs() + EPS)",
    "F.log_softmax(x, 1) + x.abs().log1p()",
    "x / (length + self.eps)",
    "x / length.clamp_min(1e-6)",
    "(x - y).pow(2).sum(1).add(1e-6).sqrt()",
    "x.std(dim=2, unbiased=False)",
    "x * x.shape[1] ** -0.5 / math.sqrt(x.shape[1]) / len(x) / label.numel() / self.temperature",
    "x * self.width ** -0.5",
    "torch.exp(-x.abs())",
    "torch.exp(x - x.amax(dim=1, keepdim=True))",
    "(x.clamp(max=10.0)).exp()",
    "self.layer(x).clamp(min=1e-6) ** 0.7",
    "self.layer(x) ** 2 + x.pow(3) + x ** 2.0",
    "x.abs() ** 1.5 + x.square().mean(1) ** power",
    "2 ** x.shape[1] + 0.95 ** power",
    "x / (x > 0).sum().clamp(min=1)",
    "x.sum() / max(mask.sum().item(), 1)",
    "torch.where(length > 0, x / torch.where(length > 0, length, 1.0), x)",
    "floored.log()",
    "exp_of_rest / exp_of_rest.sum(dim=1, keepdim=True)",
    "F.softmax(scores.masked_fill(silent, -1e4), dim=1)",
    "F.softmax(scores.masked_fill(torch.eye(9, dtype=torch.bool), float('-inf')), dim=1)",
    "scores.masked_fill(silent, float('-inf')).amax(dim=1)",
    "torch.logit(x, eps=1e-6) + x.logit(1e-6)",
    "preset.log(x) + journal.log(x, step=1)",
]
FUNCTION = """
EPS = 1e-6
LIMIT = 1.0 - EPS
def forward(self, x, label):
    bounded = cosine.clamp(-LIMIT, LIMIT)
    length = torch.norm(x, 2, 1, True)
    raised = x.clamp(max=9).exp()
    exp_of_rest = torch.exp(x - x.amax(dim=1, keepdim=True))
    floored = x.abs()
    floored += 1e-6
    return {}
"""


@pytest.mark.parametrize("text", UNGUARDED)
def test_unguarded_operations_are_found(text):
    found = hazards(ast.parse(FUNCTION.format(text)))
    assert {hazard.line for hazard in found} == {11}, found


@pytest.mark.parametrize("text", GUARDED)
def test_guarded_operations_are_not_blamed(text):
    assert hazards(ast.parse(FUNCTION.format(text))) == []


ADVICE = [
    ("self.layer(x) ** 0.7", "NaN of a negative base", "self.layer(x).clamp(min=1e-6) ** 0.7"),
    ("x.pow(self.power)", "unless self.power is a whole number", "x.clamp(min=1e-6) ** self.power"),
    ("torch.exp(x)", "Inf above 88", "torch.exp(x.clamp(max=10))"),
    ("x / x.norm(dim=1)", "can be 0", "F.normalize, or / x.norm(dim=1).clamp(min=1e-6)"),
    ("x / mask.sum().item()", "can be 0", "/ max(mask.sum().item(), 1)"),
    ("torch.log(x.softmax(1))", "-Inf", "F.log_softmax"),
    ("torch.sqrt(1 - cosine**2)", "slope", "torch.sqrt((1 - cosine ** 2).clamp(min=1e-6))"),
    ("raised / raised.sum(1, True)", "softmax by hand", "torch.softmax(x.clamp(max=9), dim=..)"),
    ("scores.masked_fill(m, -torch.inf).softmax(1)", "whole row", "torch.finfo(x.dtype).min in the place of -inf"),
    ("x.std(dim=2)", "n - 1", "x.std(dim=2, correction=0)"),
    ("torch.acos(x)", "slope at -1 and 1", "torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6))"),
]


@pytest.mark.parametrize("text, why, instead", ADVICE)
def test_a_hazard_says_why_and_what_to_write_instead(text, why, instead):
    found = hazards(ast.parse(FUNCTION.format(text)))
    assert len(found) == 1, found
    assert why in found[0].why and instead in found[0].instead, found


def test_numbers_that_a_class_keeps_are_read():
    source = """
class MainModel:
    def __init__(self, power=2.0, steep=0.5):
        self.power, self.steep = power, steep
        self.gain = torch.nn.Parameter(torch.zeros(1))

    def pool(self, x):
        x = self.layer(x) ** self.power
        scores[silent] = -math.inf
        scores /= torch.softmax(scores, 1).sum()
        return self.layer(x) ** self.steep + torch.exp(self.gain)
"""
    found = [(hazard.line, hazard.code) for hazard in hazards(ast.parse(source))]
    assert found == [
        (9, "scores[silent] = -math.inf"),
        (10, "scores /= torch.softmax(scores, 1).sum()"),
        (11, "self.layer(x) ** self.steep"),
        (11, "torch.exp(self.gain)"),
    ]


def test_each_hazard_is_a_line_with_its_place_and_advice(monkeypatch, tmp_path, capsys):
    (tmp_path / "x.py").write_text("def forward(self, x):\n    return torch.sqrt(\n        x\n    )\n")
    monkeypatch.setattr(plugins, "ROOT", tmp_path)
    monkeypatch.setattr(lint, "plugin_files", lambda config: [tmp_path / "x.py"])
    lint.check_plugins(None, Report())
    line = "x.py:2  torch.sqrt(x)  the slope of a root at 0 is infinite  write torch.sqrt(x.clamp(min=1e-6))"
    assert line in capsys.readouterr().out


def test_nothing_is_said_of_the_plugins_of_the_repository():
    files = [p for folder in plugins.ENTRY for p in (plugins.ROOT / folder).glob("*.py")]
    assert len(files) > 20
    assert {p.name: hazards(plugins.parse(p)) for p in files} == {p.name: [] for p in files}


def kinds_of(path, x, role="train", **options):
    soundfile.write(path, x, RATE, subtype="FLOAT", **options)
    source = Source(str(path), "list:1", {role})
    return [kind for kind, _ in judge(measure(source), source.roles)]


def test_what_is_called_clipped_offset_and_silent(tmp_path):
    t = np.arange(RATE) / RATE
    tone, path = np.sin(2 * np.pi * 220 * t), tmp_path / "x.wav"
    assert kinds_of(path, tone) == []  # a full-scale tone is not clipped
    assert kinds_of(path, np.clip(1.5 * tone, -1, 1)) == ["clipped"]
    assert kinds_of(path, 0.1 * tone + 0.05) == ["offset"]
    assert kinds_of(path, 0.1 * tone + 0.01) == []
    assert kinds_of(path, 1e-5 * tone) == ["silent"]
    assert kinds_of(path, 1e-3 * tone) == []
    assert kinds_of(path, np.r_[1.0, np.zeros(8000)], role="rir") == []
    assert kinds_of(path, np.r_[tone, math.inf, tone]) == ["nonfinite"]


def test_a_fault_beyond_the_first_block_is_found_at_its_sample(tmp_path):
    x = np.random.default_rng(0).normal(0, 0.1, (600000, 2))
    x[500001, 1] = np.nan
    soundfile.write(tmp_path / "x.wav", x, 44100, subtype="FLOAT")
    m = measure(Source(str(tmp_path / "x.wav"), "list:1", {"train"}))
    assert (m.first_bad, m.bad, m.samples, m.channels, m.rate) == (500001, 1, 600000, 2, 44100)
    assert math.isnan(m.bad_value) and math.sqrt(m.power) == pytest.approx(0.1, rel=0.01)


def test_the_terminal_shows_twenty_lines_of_a_kind_and_the_file_all(capsys, tmp_path):
    report = Report()
    report.finding("error", "files", [(f"list:{i}", "path") for i in range(50)])
    printed = capsys.readouterr().out
    assert "list:19 " in printed and "list:20 " not in printed and "and 30 more" in printed
    report.write(tmp_path)
    assert "list:49 " in (tmp_path / "preflight.txt").read_text()
    assert report.verdict() == "preflight: do not start: 50 errors, 0 warnings"


def test_trials_against_each_other_and_against_the_train_list(data, settings, tmp_path, capsys):
    paths = [line.split()[1] for line in (data / "train_list.txt").read_text().splitlines()]
    trials = tmp_path / "trials.txt"
    a, b, c = paths[0], paths[1], paths[9]
    trials.write_text(f"1 {a} {b}\n\n0 {a} {c}\n0 {b} {a}\n1 {a} {b}\n1 {c} {c}\n")
    config = load_config([f"--{k}={v}" for k, v in {**settings, "test_list": trials, "nClasses": 9}.items()])[0]
    report = Report()
    check_data(config, report)
    printed = capsys.readouterr().out
    assert f"{trials}:4" in printed and f"{trials}:5" in printed and "target and nontarget trial: 1 pair" in printed
    assert "a file against itself: 1 trial" in printed and f"{trials}:6" in printed
    assert "in the train list and in the trials: 3 files" in printed and "nClasses: 9, but the list has 6" in printed
    assert "the trials share 2 of the 2 speakers, the first 'train000' with the train list" in printed
    assert report.counts == {"error": 1, "warning": 7, "note": report.counts["note"]}


def test_a_run_that_would_resume_is_tried_with_its_weights_and_left_alone(
    data, settings, write, tools, capsys, tmp_path
):
    tools.build(settings).saver.last()
    path = tmp_path / "run" / "model" / "last.model"
    before = path.read_bytes()
    assert trainSpeakerNet.main(["--config", write(settings), "--preflight"]) == 0
    assert f"resuming from {path}: the start of epoch 1" in capsys.readouterr().out
    others = tmp_path / "others.txt"
    others.write_text((data / "train_list.txt").read_text().replace("train000 ", "somebody "))
    assert trainSpeakerNet.main(["--config", write({**settings, "train_list": str(others)}), "--preflight"]) == 2
    assert f"  ERROR    {path}: was trained with other speakers" in capsys.readouterr().out
    assert path.read_bytes() == before
    found = sorted(p.name for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert found == ["last.model", "preflight.txt"]


def test_before_an_evaluation_only_the_trials_are_read(settings, capsys):
    keys = {**settings, "eval": True, "train_list": "/no/such/list"}
    assert run_checks(load_config([f"--{k}={v}" for k, v in keys.items()])[0], {}, None) == 0
    printed = capsys.readouterr().out
    assert "trial list" in printed and "train list" not in printed and "dry step" not in printed


def test_what_is_said_of_a_precision_depends_on_whether_the_run_uses_it(capsys):
    def trial(loss, norm, peaks, **more):
        finite = math.isfinite(loss) and math.isfinite(norm)
        result = SimpleNamespace(loss=loss, norm=norm, finite=finite, loss_finite=math.isfinite(loss))
        types = dict.fromkeys(peaks, torch.float16)
        return result, SimpleNamespace(peaks=peaks, types=types, **{"bad_output": "", "bad_gradient": "", **more}), 1.0

    wide = trial(2.0, 1.0, {"model.conv": 3e4, "model.fc": 10.0})
    narrow = trial(3.0, math.inf, wide[1].peaks, bad_gradient="model.fc")
    trials = {torch.float32: wide, torch.float64: wide, torch.float16: narrow}
    for chosen, levels in ((torch.float32, {"note": 1}), (torch.float16, {"error": 1, "warning": 1})):
        report = Report()
        dry_step.check_finite(trials, chosen, report)
        dry_step.check_headroom(trials, chosen, report)
        assert report.counts == {"error": 0, "warning": 0, "note": 0, **levels}
    assert "model.conv: 1.1 bits below the largest float16" in capsys.readouterr().out
    report = Report()
    dry_step.check_finite({**trials, torch.float16: trial(1.0, 0.5, {})}, torch.float16, report)
    assert report.counts["warning"] == 1 and "the loss is off by 50 %" in capsys.readouterr().out
