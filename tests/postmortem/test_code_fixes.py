"""Changes of code that cure a fault: written as source, tried, compared with the original, and applied."""

import math
import subprocess
from types import SimpleNamespace

import pytest
import torch
from programs import ROOT

from postmortem import code_fixes
from postmortem.analysis import analyse
from postmortem.case import Case
from postmortem.code_fixes import CodeSearch, Sound, Trial, UpdateSearch, survives
from postmortem.finding import detail_of, result_of
from postmortem.probe import Probe, Range
from postmortem.replay import Outcome
from postmortem.rewrites import BELOW_ONE, rewrites, rewrites_of_file
from postmortem.rules import Line
from postmortem.source_patch import SourcePatch
from postmortem.source_tree import Source, literal
from storage.dump import read_dump, read_state


def record(op: str, *operands, node: str = "", dtype: str = "float32", constant: bool = False):
    """What the probe says of an operation at fault."""
    ranges = [Range.of(torch.tensor(o, dtype=torch.float32)) for o in operands]
    found = SimpleNamespace(op=op, node=node, dtype=dtype, constant=constant, operands=ranges, parents=[])
    found.wraps = found.reduces_masks = False
    found.op_name = node.lower().removesuffix("backward0") or op.strip("_")
    return found


def function(body: str) -> str:
    """A file with one function of x, y."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return f"import math\nimport torch\nimport torch.nn.functional as F\n\n\ndef f(x, y=None):\n{lines}"


# The line at fault (the last but for a return), the operation, and the line that must be among the candidates.
CASES = [
    ("return torch.sqrt(x)", record("sqrt", [-1.0]), "return torch.sqrt(x.clamp(min=1e-6))"),
    ("return (x - 1).sqrt()", record("sqrt", [0.0]), "return (x - 1).clamp(min=1e-6).sqrt()"),
    ("return x.square().mean().rsqrt()", record("rsqrt", [0.0]), "return x.square().mean().clamp(min=1e-6).rsqrt()"),
    ("return (1 - x).clamp(0, 1).sqrt()", record("sqrt", [0.0]), "return (1 - x).clamp(1e-6, 1).sqrt()"),
    ("return x / y.sum()", record("div", [1.0], [0.0]), "return x / y.sum().clamp(min=1e-6)"),
    ("return x / (y + 1e-10)", record("div", [1.0], [0.0]), "return x / (y + 1e-6)"),
    ("return x / y", record("div", [1.0], [-1.0, 0.0]), "return x / torch.where(y.abs() < 1e-6, 1e-6, y)"),
    ("return x / len(y)", record("div", [1.0]), "return x / max(len(y), 1)"),
    ("return x.div_(y)", record("div_", [1.0], [0.0]), "return x.div_(y.clamp(min=1e-6))"),
    ("x /= y.norm()", record("div_", [1.0], [0.0]), "x /= y.norm().clamp(min=1e-6)"),
    ("x **= 0.5", record("pow_", [0.0]), "x = x.clamp(min=1e-6) ** 0.5"),
    ("return x ** 0.7", record("pow", [-1.0]), "return x.clamp(min=1e-6) ** 0.7"),
    ("return torch.acos(x.clamp(-1, 1))", record("acos", [1.0]), "return torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6))"),
    ("return torch.log(torch.softmax(x, dim=1))", record("log", [0.0]), "return F.log_softmax(x, dim=1)"),
    ("return -torch.sigmoid(x)[:, 0].log().mean()", record("log", [0.0]), "return -F.logsigmoid(x)[:, 0].mean()"),
    ("return torch.log(1 + torch.exp(x))", record("exp", [100.0]), "return F.softplus(x)"),
    ("return torch.exp(x).sum(dim=1).log()", record("exp", [100.0]), "return torch.logsumexp(x, dim=1)"),
    ("return torch.xlogy(x, y)", record("xlogy", [1.0], [-1.0]), "return torch.xlogy(x, y.clamp(min=1e-6))"),
    ("return x.xlogy(y + 1)", record("xlogy", [1.0], [-1.0]), "return x.xlogy((y + 1).clamp(min=1e-6))"),
    ("return x * torch.log(x)", record("mul", [0.0]), "return torch.xlogy(x, x)"),
    ("return x.std(dim=1)", record("div", node="StdBackward0"), "return x.var(dim=1).clamp(min=1e-6).sqrt()"),
    ("return x.var(dim=1)", record("var", [1.0]), "return x.var(dim=1, correction=0)"),
    (
        "return x.std(dim=1)",
        record("std", [1.0]),
        "return (x.std(dim=1) if x.shape[1] > 1 else x.sum(dim=1) * 0.0)",
    ),
    ("return x[y].mean()", record("mean"), "return x[y].sum() / max(x[y].numel(), 1)"),
    ("return F.normalize(x, eps=0.0)", record("div", [0.0], [0.0]), "return F.normalize(x, eps=1e-6)"),
    ("return torch.softmax(x.masked_fill(y, -math.inf), 1)", record("_softmax"), "x.masked_fill(y, -1e4), 1)"),
    ("return torch.acosh(x + 1)", record("acosh", [1.0]), "return torch.acosh((x + 1).clamp(min=1 + 1e-6))"),
    ("return x.half() * 2e4", record("mul", [9.0], dtype="float16"), "return x.float() * 2e4"),
    (
        "x = x.half(); return torch.exp(x)",
        record("exp", [12.0], dtype="float16"),
        "x = x.float(); return torch.exp(x)",
    ),
    (
        "return torch.linalg.qr(x)[1]",
        record("linalg_qr", [0.0], node="LinalgQrBackward0"),
        "return torch.linalg.qr(x + ",
    ),
    (
        "return torch.corrcoef(x)",
        record("div", [0.0], [0.0]),
        "torch.cov(x).diagonal().clamp(min=1e-12).sqrt())).clamp(-1, 1)",
    ),
    (
        "return x.masked_fill(y, -1e9)",
        record("masked_fill", [0.0], dtype="float16"),
        "return x.masked_fill(y, torch.finfo(x.dtype).min)",
    ),
    (
        "return (x + y) ** 0.5 - y**0.5",
        record("pow", [0.0], node="PowBackward1"),
        "return (x + y).clamp(min=1e-6) ** 0.5 - y.clamp(min=1e-6)**0.5",
    ),
    (
        "x = x + torch.zeros(3).masked_fill(y, torch.finfo(x.dtype).min); return x + x",
        record("add", [-3e38], [-3e38]),
        "masked_fill(y, -1e4)",
    ),
    (
        "g = torch.nn.GroupNorm(2, 4, eps=0.0); return g(x)",
        record("native_group_norm", [0.0]),
        "g = torch.nn.GroupNorm(2, 4, eps=1e-5)",
    ),
    ("return x * y", record("mul", [1e30], [1e30]), "return (x * y).clamp(-1e4, 1e4)"),
    ("return math.sqrt(x)", record("sqrt"), "return math.sqrt(max(x, 1e-6))"),
    ("return 1 - math.log(x) / 5", record("log"), "return 1 - math.log(max(x, 1)) / 5"),
    (
        "return torch.acos(x)",
        record("acos", [1.0], dtype="bfloat16"),
        "return torch.acos(x.clamp(-1 + 3e-3, 1 - 3e-3))",
    ),
    ("return torch.digamma(x)", record("digamma", [0.0]), "return torch.digamma(x.clamp(min=1e-6))"),
    ("return y * x.lgamma()", record("mul", [0.0]), "return y * x.clamp(min=1e-6).lgamma()"),
    ("return torch.polygamma(1, x)", record("polygamma", [0.0]), "return torch.polygamma(1, x.clamp(min=1e-6))"),
]


@pytest.mark.parametrize("body, found, wanted", CASES, ids=[body for body, *_ in CASES])
def test_a_line_is_rewritten_from_what_its_operation_read(body, found, wanted):
    text = function(body)
    candidates = rewrites(text, 7, found)
    assert any(wanted in after for _, after in candidates), [after.splitlines()[6] for _, after in candidates]
    assert all(words and after != text for words, after in candidates)


def test_an_exception_of_pythons_own_is_laid_to_its_line():
    probe = Probe(torch.nn.Linear(1, 1), torch.zeros(1))
    found = probe.refused_by_python("loss/own.py:7: ZeroDivisionError: float division by zero")
    assert (found.site.source, found.site.module, found.op) == ("loss/own.py:7", "__L__", "")
    assert result_of(found) == "ZeroDivisionError: float division by zero" and detail_of(found) == "refused"
    texts = [after for _, after in rewrites(function("return 1.0 / y + math.log(x) + torch.sqrt(x)"), 7, found)]
    assert rewrites(function("n = int(y.sum())\nreturn 1.0 / n"), 8, found)[0][1].endswith("1.0 / max(n, 1)\n")
    for wanted in ("1.0 / max(y, 1)", "math.log(max(x, 1e-6))", "torch.sqrt(x.clamp(min=1e-6))"):
        assert any(wanted in text for text in texts), wanted
    assert probe.refused_by_python("training/step.py:7: ZeroDivisionError: division by zero") is None
    assert probe.refused_by_python("loss/own.py:7: ValueError: cannot convert float NaN to integer") is None


def test_the_module_in_which_an_exception_arose_is_known():
    class Refuses(torch.nn.Module):
        def forward(self, x):
            return 1.0 / len(x[x > math.inf])

    network = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sequential(Refuses()))
    probe = Probe(network, torch.zeros(1))
    with pytest.raises(ZeroDivisionError), probe:
        network(torch.ones(1))
    found = probe.refused_by_python("models/own.py:7: ZeroDivisionError: division by zero")
    assert found.site.module == "1.0" and found.site.learned


def test_a_divisor_of_a_backward_pass_by_hand_is_raised_no_further_than_it_needs():
    """1 would change the gradient of every value below it, which no finite loss shows."""
    found = record("GateBackward", [0.1], [0.0, 0.3], node="GateBackward")
    lines = [after.splitlines()[6].strip() for _, after in rewrites(function("return x / (2 * y)"), 7, found)]
    assert lines.index("return x / (2 * y).clamp(min=1e-6)") < lines.index("return x / (2 * y).clamp(min=1)")
    whole = record("div", [0.0], node="DivBackward0")  # the divisor has no range, as whole numbers have none
    lines = [after.splitlines()[6].strip() for _, after in rewrites(function("return x / n"), 7, whole)]
    assert lines.index("return x / n.clamp(min=1)") < lines.index("return x / n.clamp(min=1e-6)")


@pytest.mark.parametrize(
    "body, x",
    [
        ("return torch.log(torch.softmax(x, dim=1))", torch.randn(3, 4)),
        ("p = torch.softmax(x, dim=1)\nreturn torch.log(p[:, :2])", torch.randn(3, 4)),
        ("return torch.log(1 + torch.exp(x))", torch.randn(3, 4)),
        ("e = torch.exp(x)\nreturn e / e.sum(dim=1, keepdim=True)", torch.randn(3, 4)),
        ("return torch.log(1 - torch.sigmoid(x))", torch.randn(3, 4)),
        ("return torch.exp(x).sum(1).log()", torch.randn(3, 4)),
        ("e = torch.exp(-x.square()) / 3\nreturn torch.log((torch.softmax(x, 1) * e).sum(1))", torch.randn(3, 4)),
        ("s = torch.exp(x)\nreturn (0.5 * s * torch.exp(x) / (s * s)).sum(dim=1).log()", torch.randn(3, 4)),
        ("p = x.softmax(1)\nq = (-x).softmax(1)\nreturn (p * (p.log() - q.log())).mean(1)", torch.randn(3, 4)),
        ("return torch.log(torch.cosh(x))", torch.randn(3, 4)),
        ("return torch.sinh(x).log()", torch.rand(3, 4) + 0.1),
    ],
)
def test_a_stable_form_computes_the_same(body, x):
    text = function(body)
    number = 6 + len(body.splitlines())
    original, changed = {}, {}
    exec(text, original)
    words, after = rewrites(text, number if "e /" not in body else 7, record("log" if "log" in body else "exp", [0.0]))[
        0
    ]
    exec(after, changed)
    assert words.startswith("use ") and torch.allclose(original["f"](x), changed["f"](x), atol=1e-6)
    assert bool(changed["f"](x * 1000).isfinite().all())


def test_a_bound_below_one_is_below_one_in_its_type():
    for dtype, distances in {"float32": Line.below_one, **BELOW_ONE}.items():
        for distance in distances:
            assert torch.tensor(1 - float(distance), dtype=getattr(torch, dtype)) < 1, (dtype, distance)


def test_the_base_of_a_power_of_plain_numbers_is_kept_above_zero():
    """A schedule that goes on past its last step: Python makes a complex number of a negative one to a power."""
    text = "def f(step):\n    return (1 - step / 5) ** 0.9\n"
    found = {}
    for _, after in rewrites_of_file(text):
        if "max(" in after:
            exec(after, found)
            break
    assert found["f"](9) == 0.0 and found["f"](1) == 0.8**0.9


def test_numbers_and_names_are_read_as_they_stand():
    source = Source(
        "def f(x):\n    a = x + 1\n    b = a\n    b = 2\n    return [float('-inf'), -torch.inf, 1e-3, a, b]\n"
    )
    values = source.statement(5).value.elts
    assert [literal(v) for v in values[:3]] == [-math.inf, -math.inf, 1e-3]
    assert source.code(source.resolved(values[3])) == "x + 1"
    assert source.resolved(values[4]) is values[4]  # assigned twice
    assert [value for _, value in source.infinities(source.tree)] == [-math.inf, -math.inf]


def test_a_patch_is_in_force_for_imports_and_only_under_it():
    import loss.softmax as before

    text = (ROOT / "loss" / "softmax.py").read_text(encoding="utf-8")
    patch = SourcePatch("loss/softmax.py", text, text + "\nADDED = 7\n")
    with patch.applied():
        import loss.softmax as inside

        assert inside.ADDED == 7 and inside is not before
    import loss.softmax as after

    assert after is before and not hasattr(after, "ADDED")
    assert (ROOT / "loss" / "softmax.py").read_text(encoding="utf-8") == text


@pytest.mark.parametrize("end", ["\n", ""])
def test_a_diff_is_what_git_applies(tmp_path, end):
    (tmp_path / "loss").mkdir()
    before, after = f"a = 1\nb = 2{end}", f"a = 1\nb = 3{end}"
    (tmp_path / "loss" / "x.py").write_text(before)
    diff = SourcePatch("loss/x.py", before, after).diff()
    done = subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "loss" / "x.py").read_text() == after


HEAD = "F.linear(batch.x.float(), batch.weight(self.fc.weight), batch.weight(self.fc.bias))"
RETURN = f"return batch.cross_entropy({HEAD})"


def returning(loss: str) -> str:
    """The last lines of loss/softmax.py with another loss."""
    return f"logits = {HEAD}\n        loss, accuracy = batch.cross_entropy(logits)\n        return {loss}, accuracy"


CHANGES = {
    "the same": (returning("loss"), ""),
    "another loss": (returning("1.01 * loss"), "changes the loss"),
    "another gradient": (returning("1.01 * loss - 0.01 * loss.detach()"), "changes the gradient of"),
    "a silenced row": (returning("F.cross_entropy(logits[1:], batch.columns[1:])"), "rows at fault get no gradient"),
    "a silenced loss": (returning("loss.detach() + 0.0 * loss"), "conv.weight' is 0"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_compared_with_the_unchanged_step(dump_of, kind):
    """A finite step is not enough: sound rows keep loss and gradient, and no gradient is merely taken away."""
    code, objection = CHANGES[kind]
    path = dump_of(nan_inject="1:loss", trainfunc="softmax")  # the recorded step itself is sound
    dump = read_dump(path)
    case = Case(path, dump, read_state(path, dump["state"]))
    search = CodeSearch(case, columns=[0])
    case.origin = SimpleNamespace(site=SimpleNamespace(source="loss/softmax.py:24"), op_name="log")
    text = (ROOT / "loss" / "softmax.py").read_text(encoding="utf-8")
    assert RETURN in text
    after = text.replace(RETURN, code)
    with case.replay.patched(SourcePatch("loss/softmax.py", text, after)):
        found = search.silenced() if "silenced" in kind else search.difference(search.trial())
    assert objection in found and bool(found) == bool(objection)


@pytest.mark.parametrize("loss, exact, objection", [(1.002, 1.0, ""), (1.002, 1.002, "1.002"), (1.5, 1.0, "1.5")])
def test_a_change_of_16_bit_code_is_compared_without_its_rounding(loss, exact, objection):
    """A cast that is left out moves a sound row by the rounding of float16, not in float64."""
    losses = {"float16": loss, "float64": exact}
    search = CodeSearch.__new__(CodeSearch)
    search.columns, search.case = [0], SimpleNamespace(base=Outcome())
    search.sound, search.exact_sound = (Sound("", {"dtype": dtype}, 1.0) for dtype in losses)
    search.measured = lambda words, how: Sound(words, how, losses[how["dtype"]])
    found = search.difference(Outcome(loss=loss, norm=1.0))
    assert objection in found and bool(found) == bool(objection)


def test_a_loss_scale_that_was_too_high_silences_no_row():
    """The step is computed at a lower scale then, and only those gradients are looked at."""
    network = torch.nn.Module()
    network.__S__ = torch.nn.Linear(3, 2)

    def run(after):
        for scale in (math.nan, 1.0):  # what is infinite in float16 ends as NaN
            network.zero_grad()
            (network.__S__(torch.ones(4, 3)).square().sum() * scale).backward()
        after(network)

    search = CodeSearch.__new__(CodeSearch)
    search.columns, search.sound = [], None
    search.replay = SimpleNamespace(network=lambda: network, run=run, columns=4)
    source = SimpleNamespace(site=SimpleNamespace(source="loss/softmax.py:24"), op_name="log")
    search.case = SimpleNamespace(base=Outcome(), origin=source)
    assert search.silenced() == ""


def test_an_update_that_dwarfs_the_weights_is_no_cure():
    search = UpdateSearch.__new__(UpdateSearch)
    assert search.judge(Outcome(stride=0.5)) == ("", "")
    assert "2e+04 times as large as the weights" in search.judge(Outcome(stride=2e4))[0]


@pytest.mark.parametrize("losses, chosen, said", [([1.2, 1.001], "change 1", ""), ([1.2, 1.3], "change 0", "is 1")])
def test_a_change_that_gives_what_float64_gives_goes_first(monkeypatch, losses, chosen, said):
    """A floor may keep a step finite and make another value of it: that is said, if no other change is better."""
    candidates = [(f"change {number}", str(number)) for number in range(len(losses))]
    monkeypatch.setattr(code_fixes, "rewrites", lambda *given: candidates)
    monkeypatch.setattr(
        CodeSearch, "attempt", lambda self, patch, **more: Trial(True, "with it", loss=losses[int(patch.after)])
    )
    monkeypatch.setattr(CodeSearch, "exact", 1.0)
    search = CodeSearch.__new__(CodeSearch)
    search.case, search.tried, search.objections = SimpleNamespace(time_left=lambda: 1.0), 0, []
    found = search.run("loss/softmax.py:24", record("div", [1.0], [0.0]))
    assert found.words == [chosen] and found.outcome.endswith(said)
    assert ("in float64" in found.outcome) == bool(said)


@pytest.mark.parametrize("least, expected", [(0.9, True), (0.975, False)])
def test_a_fix_must_last_for_the_next_steps_on_the_batch(least, expected):
    """Each goes on from the weights of the one before, down the gradient, by 0.01 of this weight."""
    seen = []

    def run(columns, settings, edit, after):
        network = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(network.weight)
        edit(network)
        network.weight.sum().backward()
        seen.append(network.weight.item())
        finite = seen[-1] > least
        if finite:
            after(network)
        return SimpleNamespace(finite=finite)

    case = SimpleNamespace(small=None, replay=SimpleNamespace(run=run))
    assert survives(case, {}) is expected
    assert seen == pytest.approx([1.0, 0.99, 0.98, 0.97, 0.96][: len(seen)]) and len(seen) == (5 if expected else 4)


def test_a_step_that_differs_from_run_to_run_verifies_nothing(dump_of, monkeypatch):
    """The second to fourth replay fail, whatever is tried: a fix would be verified by chance."""
    from loss.softmax import LossFunction

    path = dump_of(lambda trainer: trainer.network.loss.register_forward_hook(spoil), trainfunc="softmax")
    forward, calls = LossFunction.forward, []

    def flicker(self, *given):
        calls.append(1)
        loss, accuracy = forward(self, *given)
        return loss * (math.nan if 2 <= len(calls) <= 4 else 1.0), accuracy

    monkeypatch.setattr(LossFunction, "forward", flicker)
    verdict = analyse(path).verdict
    assert verdict["replay"]["reproduced"] == "nondeterministic" and len(calls) > 4
    advice = verdict["recommendations"]
    assert advice and not [fix for fix in advice if fix["verdict"] == "verified"]
    assert any("the step differs from run to run" in fix["outcome"] for fix in advice), advice


def spoil(module, inputs, output):
    """What a hook does that makes the loss NaN."""
    return output[0] * math.nan, output[1]


def test_a_replay_leaves_nothing_to_the_next_one(dump_of):
    """A memory that the first step makes is not there when the step is replayed again."""
    path = dump_of(nan_inject="1:loss", trainfunc="softmax")
    dump = read_dump(path)
    case = Case(path, dump, read_state(path, dump["state"]))
    sizes = []

    def remember(module, inputs, output):
        module.memory = [*getattr(module, "memory", []), inputs[0].detach()]
        sizes.append(len(module.memory))

    case.replay.network().loss.register_forward_hook(remember)
    case.replay.run()
    case.replay.run()
    assert sizes == [1, 1]
