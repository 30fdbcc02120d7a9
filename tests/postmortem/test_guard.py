"""NumericGuard: a loop that is not the trainer's gets its step without trace, its dumps, and the analysis of them."""

import hashlib
import importlib
import json
import math
import re
import sys
import textwrap
from pathlib import Path

import house
import programs
import pytest
import torch
from torch import nn

from errors import UsageError
from postmortem import load_dump
from postmortem.analysis import analyse
from postmortem.guard import NumericGuard
from postmortem.page import render
from postmortem.report import text_report
from settings.user_code import COMMANDS, PLUG_INS, ROOMS
from storage.dump import DumpError, read_dump
from storage.files import save_atomically

CLASSIFIER = '''
"""A classifier of images."""

import torch
from torch import nn


class Classifier(nn.Module):
    """Images (B, 3, 8, 8) -> scores (B, 4)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.conv(x)
        level = torch.sqrt(x.pow(2).mean(dim=(1, 2, 3), keepdim=True))
        x = self.norm(x / (level + 1e-3)).relu()
        return self.head(self.drop(x.mean(dim=(2, 3))))


def make():
    model = Classifier()
    return model, torch.optim.Adam(model.parameters(), lr=0.01), nn.CrossEntropyLoss()
'''
BAD_LINE = next(i for i, line in enumerate(CLASSIFIER.lstrip().splitlines(), 1) if "torch.sqrt" in line)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of somebody's own, in which their program runs, and their modules forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def classifier(folder, text=CLASSIFIER, name="classifier"):
    """Write a module; returns what its ``make`` gives, the same each time."""
    (folder / f"{name}.py").write_text(textwrap.dedent(text).lstrip())
    importlib.invalidate_caches()
    torch.manual_seed(1)
    return importlib.import_module(name).make()


def batches(count=6, black=3):
    """Batches of images; row 2 of number ``black`` is black."""
    generator = torch.Generator().manual_seed(4)
    made = [(torch.rand(8, 3, 8, 8, generator=generator), torch.arange(8) % 4) for _ in range(count)]
    if black is not None:
        made[black][0][2] = 0
    return made


def everything(model, optimizer):
    """All that a step may change, as bytes."""
    moments = {(i, k): v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    tensors = {**model.state_dict(), **moments, "generator": torch.get_rng_state()}
    return {name: torch.as_tensor(value).clone() for name, value in tensors.items()}


def train(guard, chosen):
    """Run the three lines of a user's loop."""
    torch.manual_seed(7)
    return [guard.step(data, label) for data, label in chosen]


def test_a_refused_step_leaves_no_trace(folder):
    model, optimizer, loss = classifier(folder)
    guard = NumericGuard(model, optimizer, "debug_nan", build="classifier:make", loss=loss)
    results = train(guard, batches())
    assert [r.taken for r in results] == [True, True, True, False, True, True]
    assert math.isfinite(results[3].loss) and not math.isfinite(results[3].norm) and math.isnan(results[3].accuracy)
    other, other_optimizer, loss = classifier(folder)
    spared = NumericGuard(other, other_optimizer, "other", build="classifier:make", loss=loss)
    train(spared, [b for i, b in enumerate(batches()) if i != 3])
    a, b = everything(model, optimizer), everything(other, other_optimizer)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    guard.close()
    assert results[3].dump == Path("debug_nan", "nan_batch_4_epoch_1.pt") and results[3].dump.is_file()
    assert results[3].what == "gradient of 'model.conv.weight' is not finite"
    assert not (folder / "other").exists()


def test_a_sound_step_is_that_of_a_plain_loop(folder):
    model, optimizer, loss = classifier(folder)
    guard = NumericGuard(model, optimizer, "debug_nan", build="classifier:make", loss=loss, grad_clip=0.1)
    taken = train(guard, batches(black=None))
    plain, plain_optimizer, loss = classifier(folder)
    torch.manual_seed(7)
    for (data, label), result in zip(batches(black=None), taken):
        plain_optimizer.zero_grad()
        value = loss(plain(data), label)
        value.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        plain_optimizer.step()
        assert (result.loss, result.norm) == pytest.approx((value.item(), norm.item()), rel=1e-4)
    both = zip(model.state_dict().values(), plain.state_dict().values())
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in both)


@pytest.fixture
def dumped(folder):
    """The dump of the black image."""
    model, optimizer, loss = classifier(folder)
    lines = []
    guard = NumericGuard(model, optimizer, "debug_nan", build="classifier:make", loss=loss, log=lines.append)
    path = train(guard, batches())[3].dump
    guard.close()
    return path, "\n".join(lines)


def test_the_command_line_names_the_line(folder, dumped):
    path, said = dumped
    assert f"analyze_nan_debug.py {path}" in said and "wav" not in said and "ROWS AND FILES" not in said
    script = programs.ROOT / "analyze_nan_debug.py"
    done = programs.run(script, "--json", path, cwd=folder)
    verdict = json.loads(done.stdout)
    place = verdict["location"]
    assert (done.returncode, verdict["cause"], verdict["detail"]) == (0, "model_backward", "sqrt_at_zero"), verdict
    assert (place["source"], place["module"], place["rows"]) == (f"classifier.py:{BAD_LINE}", "__S__", [2])
    assert verdict["replay"]["reproduced"] == "bit_equal"
    verified = [fix["text"] for fix in verdict["recommendations"] if fix["verdict"] == "verified"]
    assert any("row 2" in text for text in verified)
    diffs = [(fix["change"] or {}).get("diff") for fix in verdict["recommendations"] if fix["verdict"] == "verified"]
    assert any(diff and "+++ b/classifier.py" in diff for diff in diffs)
    keys = {key for fix in verdict["recommendations"] for key in (fix["change"] or {})}
    assert keys <= {"rows", "source", "diff"}, keys
    text = programs.run(script, path, cwd=folder).stdout
    assert f"classifier.py:{BAD_LINE}" in text and "Shape: (8, 3, 8, 8)" in text
    assert "Code:      level = torch.sqrt(" in text
    assert not re.search("silent|audio|speaker|utterance|YAML|sample [0-9]|mixedprec|scheduler", text), text


def test_the_page_of_such_a_dump_draws_no_waveform(dumped):
    page = render([analyse(dumped[0])])
    assert f"classifier.py:{BAD_LINE}" in page and "Waveform" not in page and "Audio" not in page


def test_a_dump_runs_no_code_that_has_changed(folder, dumped, monkeypatch):
    path, _ = dumped
    source = folder / "classifier.py"
    source.write_text(source.read_text() + "\nopen('ran', 'w')\n")
    analysis = analyse(path)
    assert "classifier.py" in analysis.refusal and "--trust-changed-code" in analysis.refusal
    monkeypatch.chdir(folder / "debug_nan")
    assert "there is no classifier.py in" in analyse(folder / path).refusal
    assert not list(folder.rglob("ran"))
    assert "not replayed" in "\n".join(text_report(analysis))


@pytest.mark.parametrize(
    "build, said",
    [
        ("classifier:train", "has no 'def train()'"),
        ("classifier:system", "has no 'def system()'"),  # imported there, not written there
        ("make_demo_data:main", "is no code of yours"),
        ("os:getcwd", "no os.py in"),
    ],
)
def test_a_dump_cannot_choose_what_is_run(folder, dumped, build, said):
    path, _ = dumped
    dump = read_dump(path)
    hashes = dict(dump["source_hashes"])
    if "demo" in build:
        content = (programs.ROOT / "make_demo_data.py").read_bytes()
        hashes = {"make_demo_data.py": hashlib.sha256(content).hexdigest()}
    save_atomically({**dump, "build": build, "source_hashes": hashes}, path)
    assert said in analyse(path).refusal


@pytest.mark.parametrize(
    "values, said",
    [
        ({"build": "classifier"}, "'build' is 'classifier', which is not allowed"),
        ({"build": "__import__('os'):x"}, "'build' is"),
        ({"row_shape": [3, 8, 9]}, "'row_shape' is [3, 8, 9], 'data' has 192 values a row"),
        ({"label": torch.zeros(7)}, "'label' has 7 rows, 'data' 8"),
        ({"data": torch.zeros(8, 3, 64)}, "'data' is a float32 tensor of shape (8, 3, 64)"),
        ({"files": [{"path": "x", "line": 1}]}, "'files' has 1 values, not 0"),
    ],
)
def test_a_dump_of_another_loop_is_validated(dumped, values, said):
    path, _ = dumped
    save_atomically({**read_dump(path), **values}, path)
    with pytest.raises(DumpError, match=re.escape(said)):
        load_dump(path)


def test_what_a_module_imports_from_its_folder_is_hashed(folder):
    helper = CLASSIFIER.split("def make", maxsplit=1)[0]
    (folder / "parts").mkdir()
    (folder / "parts" / "__init__.py").write_text("")
    (folder / "parts" / "net.py").write_text(helper.lstrip())
    text = """
        import torch

        from parts.net import Classifier


        def make():
            model = Classifier()
            return model, torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.functional.cross_entropy
        """
    model, optimizer, loss = classifier(folder, text, "built")
    guard = NumericGuard(model, optimizer, "d", build="built:make", loss=loss, log=lambda text: None)
    path = train(guard, batches())[3].dump
    guard.close()
    assert read_dump(path)["source_hashes"].keys() == {"built.py", "parts/__init__.py", "parts/net.py"}
    assert analyse(path).verdict["location"]["source"] == f"parts/net.py:{BAD_LINE}"
    (folder / "parts" / "net.py").write_text("# changed\n" + helper)
    assert "parts/net.py" in analyse(path).refusal


TOKENS = """
    import torch
    from torch import nn


    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 5)
            self.calls = 0

        def forward(self, x, label):
            self.calls += 1
            x = self.head(self.embed(x))
            loss = nn.functional.cross_entropy(x.transpose(1, 2), label)
            return loss / torch.log(torch.tensor(float(label.amax()))), 100.0 * (x.argmax(-1) == label).float().mean()


    def make():
        model = Tagger()
        return model, torch.optim.AdamW([*model.head.parameters(), *model.embed.parameters()], lr=0.01)
    """


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_token_numbers_and_labels_of_any_shape(folder, dtype):
    model, optimizer = classifier(folder, TOKENS, "tagger")
    guard = NumericGuard(model, optimizer, "d", build="tagger:make", amp_dtype=dtype, log=lambda text: None)
    data, label = torch.randint(0, 50, (4, 7)), torch.randint(2, 5, (4, 7))
    good = guard.step(data, label)
    assert good.taken and 0 <= good.accuracy <= 100
    bad = guard.step(data, torch.ones_like(label))  # divides by log(1)
    assert not bad.taken and model.calls == 1 + (guard.steps - 1)
    guard.close()
    dump = load_dump(bad.dump)
    assert torch.equal(dump.rows[1].values, data[1]) and dump.rows[1].label.tolist() == [1] * 7
    with pytest.raises(ValueError, match="no waveform"):
        dump.rows[1].audio()
    step = dump.replay()
    assert step.reproduced == "bit_equal" and step.first_bad.source.startswith("tagger.py:")
    assert not dump.try_fix(data=data.flip(0)).finite
    text = "\n".join(text_report(analyse(bad.dump)))
    assert "tagger.py" in text and "(4, 7)" in text


def test_an_update_that_spoils_a_weight_is_taken_back_and_replayed(folder):
    text = CLASSIFIER.replace("self.drop =", "self.idle = nn.Parameter(torch.ones(3))\n        self.drop =")
    text = text.replace("mean(dim=(2, 3))))", "mean(dim=(2, 3)))) + (self.idle * 0).sum()")
    text = text.replace("lr=0.01", "lr=0.01, eps=0.0")  # 0 / 0 where a gradient has always been 0
    model, optimizer, loss = classifier(folder, text)
    guard = NumericGuard(model, optimizer, "d", build="classifier:make", loss=loss, log=lambda text: None)
    before = everything(model, optimizer)
    (result,) = train(guard, batches(1, black=None))
    assert not result.taken and "update made 'model.idle'" in result.what
    torch.manual_seed(7)
    torch.set_rng_state(before["generator"])
    after = everything(model, optimizer)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    guard.close()
    analysis = analyse(result.dump)
    assert (analysis.verdict["cause"], analysis.verdict["location"]["parameter"]) == ("optimizer", "__S__.idle")
    assert load_dump(result.dump).replay().first_bad.phase == "update"
    assert load_dump(result.dump).try_fix(settings={"eps": 1e-8}).finite
    verified = [fix["text"] for fix in analysis.verdict["recommendations"] if fix["verdict"] == "verified"]
    assert verified == ["eps 1e-08 in the optimizer"]
    assert not re.search("YAML|optimizer/|scheduler", "\n".join(text_report(analysis)))


def test_frozen_parts_and_groups_of_parameters_are_replayed_as_they_were(folder):
    groups = "[{'params': model.head.parameters(), 'lr': 0.1}, {'params': [*model.conv.parameters()]}]"
    text = CLASSIFIER.replace("Adam(model.parameters()", f"Adam({groups}")
    model, optimizer, loss = classifier(folder, text)
    guard = NumericGuard(model, optimizer, "d", build="classifier:make", loss=loss, log=lambda text: None)
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    results = train(guard, batches())
    guard.close()
    step = load_dump(results[3].dump).replay()
    assert step.reproduced == "bit_equal" and "__S__.head.bias" not in step.gradients
    assert read_dump(results[3].dump)["evaluating"] == ["__S__.norm"]


def test_a_bad_image_is_named_and_left_out(folder):
    model, optimizer, loss = classifier(folder)
    guard = NumericGuard(model, optimizer, "d", build="classifier:make", loss=loss, log=lambda text: None)
    data, label = batches(1, black=None)[0]
    data[5, 1, 2, 3] = math.inf
    path = guard.step(data, label).dump
    guard.close()
    analysis = analyse(path)
    place, fixes = analysis.verdict["location"], analysis.verdict["recommendations"]
    assert (analysis.verdict["cause"], place["rows"], fixes[0]["change"]) == ("input", [5], {"rows": [5]})
    assert fixes[0]["verdict"] == "verified" and load_dump(path).try_fix(without_rows=[5]).finite
    text = "\n".join(text_report(analysis))
    assert "row 5: 1 of 192, the first at value 83" in text
    assert not re.search("audio|speaker|file|YAML|waveform", text.replace("File:", "")), text
    assert "a row of the batch" in render([analysis]) and "an audio file" not in render([analysis])


def test_a_weight_that_was_bad_before_is_named(folder):
    model, optimizer, loss = classifier(folder)
    guard = NumericGuard(model, optimizer, "d", build="classifier:make", loss=loss, log=lambda text: None)
    with torch.no_grad():
        model.head.bias[1] = math.nan
    (result,) = train(guard, batches(1, black=None))
    guard.close()
    verdict = analyse(result.dump).verdict
    assert (verdict["cause"], verdict["location"]["parameter"]) == ("state", "__S__.head.bias")
    assert [r["action"] for r in verdict["recommendations"] if r["verdict"] == "verified"] == ["restore"]


def test_a_fault_seen_before_is_counted_and_the_budget_is_kept(folder):
    model, optimizer, loss = classifier(folder)
    lines = []
    guard = NumericGuard(model, optimizer, "d", "classifier:make", loss=loss, max_dumps=1, log=lines.append)
    black = batches(1, black=0)[0]
    assert guard.step(*black).dump is not None and guard.step(*black).dump is None
    guard.close()
    assert len(list((folder / "d").glob("nan_*.pt"))) == 1 and "seen 2 times" in lines[-1]
    nan = torch.full_like(black[0], math.nan)
    assert guard.step(nan, black[1]).dump is None and "(max_dumps)" in lines[-1]


def test_an_exception_leaves_everything_as_it_was(folder):
    model, optimizer, loss = classifier(folder)
    guard = NumericGuard(model, optimizer, "d", build="classifier:make", loss=loss)
    guard.step(*batches(1, black=None)[0])
    before = everything(model, optimizer)
    with pytest.raises(IndexError):
        guard.step(torch.rand(8, 3, 8, 8), torch.full((8,), 9))
    after = everything(model, optimizer)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "generator")


@pytest.mark.parametrize(
    "text, build, said",
    [
        (CLASSIFIER, "classifier", "expected 'module:function'"),
        (CLASSIFIER, "clasifier:make", "'clasifier' cannot be imported"),
        (CLASSIFIER, "classifier:build", "has no 'def build()'"),
        (CLASSIFIER.replace("def make()", "def make(width)"), "classifier:make", "callable without arguments"),
        (CLASSIFIER.replace("return model,", "return [model],"), "classifier:make", "must return (model, optimizer)"),
        (CLASSIFIER.replace(", nn.CrossEntropyLoss()", ""), "classifier:make", "it returns no loss"),
        (
            CLASSIFIER.replace("Conv2d(3, 6, 3", "Conv2d(3, 6, 1"),
            "classifier:make",
            "'model.conv.weight' is (6, 3, 1",
        ),
        (CLASSIFIER.replace("optim.Adam(", "optim.SGD("), "classifier:make", "its optimizer is SGD, the loop's Adam"),
        (CLASSIFIER.replace("model = C", "1 / 0\n    model = C"), "classifier:make", "fails: ZeroDivisionError"),
    ],
)
def test_what_does_not_build_the_network_is_told_at_once(folder, text, build, said):
    model, optimizer, loss = classifier(folder, CLASSIFIER, "right")
    (folder / "classifier.py").write_text(text.lstrip())
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    with pytest.raises(UsageError, match=re.escape(said)):
        NumericGuard(model, optimizer, "d", build=build, loss=loss)
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_program_that_trains_on_import_is_refused(folder):
    text = CLASSIFIER + textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(programs.ROOT)!r})
        from postmortem.guard import NumericGuard
        model, optimizer, loss = make()
        NumericGuard(model, optimizer, "d", build="whole:make", loss=loss)
        """)
    (folder / "whole.py").write_text(text.lstrip())
    done = programs.run_anew(folder / "whole.py")
    assert done.returncode == 1 and "importing" in done.stderr and "__name__ == '__main__'" in done.stderr


def test_the_products_own_modules_are_known():
    names = {name for level in house.LEVELS.values() for name in level}
    assert names == {*ROOMS, *COMMANDS, *PLUG_INS}


def test_the_example_of_the_guide_trains(folder):
    text = house.ROOT.joinpath("docs", "nan_debugging.md").read_text(encoding="utf-8")
    section = text.split("## Your own loop")[1].split("\n## ")[0]
    module, loop = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (folder / "classifier.py").write_text(module)
    loader = [(torch.rand(8, 3, 8, 8), torch.arange(8) % 10) for _ in range(3)]
    names = {"loader": loader, "epochs": 1}
    exec(loop, names)
    assert names["result"].taken and names["guard"].steps == 3
