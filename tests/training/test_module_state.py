"""What a plug-in keeps in plain attributes: a refused step leaves no trace in it, and a replay has it."""

import collections
import enum
import gc
import json
import math
import random
import sys
import types
import weakref

import numpy as np
import programs
import pytest
import torch
from torch import nn

from storage.dump import read_dump
from storage.files import save_atomically
from storage.restricted import load_plain
from training.generators import generator_state, restore_generators
from training.module_state import MOST_ELEMENTS, ModuleState, cpu_copy


class Level(enum.IntEnum):
    """A number with a name, of which restricted loading knows nothing."""

    LOW = 3


class Counter(nn.Module):
    """Keeps every kind of state that ``state_dict`` does not hold."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.bank = [torch.ones(2)]  # a memory of embeddings
        self.by_speaker = collections.defaultdict(list, {3: [torch.zeros(2)]})
        self.queue = torch.zeros(5000, 2)
        self.means, self.level = np.zeros(3), np.float32(0.5)
        self.met, self.kind = {1}, Level.LOW
        self.pairs, self.huge = {(1, 2): 0.5}, 2**70  # no file holds these
        self.python = random.Random(3)
        self.own = np.random.default_rng(4)
        self.older = np.random.RandomState(5)
        self.calls, self.rate, self.name = 0, 0.5, "counter"
        self.seen = collections.deque([1, 2], maxlen=4)
        self.sums = torch.zeros(3)
        self.table = torch.zeros(1).expand(MOST_ELEMENTS + 1)
        self.generator = torch.Generator().manual_seed(3)

    def advance(self):
        self.calls += 1
        self.seen.append(self.calls)
        self.sums += 1
        self.late = 7
        self.bank.append(torch.full((2,), math.nan))
        self.bank[0] += 1
        self.by_speaker[4].append(torch.ones(2))
        self.queue[4000] = math.nan
        self.means += 1
        self.level = self.level * 2
        self.met.add(self.calls + 1)
        self.pairs[1, 3] = 0.1
        drawn = [self.python.random(), self.python.gauss(0, 1), self.own.random(), self.older.normal()]
        return torch.cat([torch.rand(2, generator=self.generator), torch.tensor(drawn)])


def test_plain_attributes_are_put_back_as_they_were():
    module = Counter()
    state = ModuleState(module)
    state.take()
    drawn = module.advance()
    state.restore()
    assert module.calls == 0 and list(module.seen) == [1, 2] and module.seen.maxlen == 4
    assert module.sums.tolist() == [0, 0, 0] and not hasattr(module, "late")
    assert [t.tolist() for t in module.bank] == [[1, 1]] and bool((module.queue == 0).all())
    assert list(module.by_speaker) == [3] and module.by_speaker[9] == []  # still a defaultdict
    assert module.means.tolist() == [0, 0, 0] and module.level == 0.5 and type(module.level) is np.float32
    assert module.met == {1} and module.pairs == {(1, 2): 0.5}
    del module.by_speaker[9]
    assert torch.equal(module.advance(), drawn)


def test_a_saved_state_goes_on_in_another_process(tmp_path):
    module, other = Counter(), Counter()
    module.advance()
    save_atomically(ModuleState(module).state_dict(), tmp_path / "state.pt")
    other.by_speaker = None  # made by the first step, as a memory often is
    ModuleState(other).load_state_dict(load_plain(tmp_path / "state.pt"))
    assert torch.equal(other.queue.isnan(), module.queue.isnan()) and other.met == module.met
    assert repr([other.bank, other.means, other.level]) == repr([module.bank, module.means, module.level])
    assert repr(other.by_speaker) == repr(dict(module.by_speaker)) and other.kind == 3
    other.by_speaker = collections.defaultdict(list, other.by_speaker)
    assert torch.equal(module.advance(), other.advance())
    assert (other.calls, list(other.seen), other.seen.maxlen) == (2, list(module.seen), 4)


FILE = """
from collections import deque
from torch import nn
import torch

SIZES = [3, 4]
RUNNING, RECENT, calls = {}, deque(maxlen=2), 0

class Remembers(nn.Module):
    def __init__(self, recent=RECENT):
        super().__init__()
        self.recent = recent

    def forward(self, x):
        global calls
        calls += 1
        RUNNING["mean"] = 0.9 * RUNNING.get("mean", 0.0) + 0.1 * x.mean()
        self.recent.append(x)
        return x
"""


def module_of(text: str, name: str) -> types.ModuleType:
    """A file of a plug-in, imported."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(text, vars(module))
    return module


def test_names_of_a_file_are_put_back_in_the_same_objects():
    file = module_of(FILE, "remembers_put_back")
    network = file.Remembers()
    state, before = ModuleState(network), (file.RUNNING, file.RECENT)
    network(torch.ones(1))
    state.take()
    network(torch.full((1,), math.nan))
    state.restore()
    assert file.calls == 1 and file.RUNNING["mean"].item() == pytest.approx(0.1)
    assert before == (file.RUNNING, file.RECENT) and file.RUNNING is before[0]
    assert file.RECENT is before[1] is network.recent and [t.tolist() for t in file.RECENT] == [[1.0]]


def test_a_checkpoint_has_the_names_of_a_file_that_a_step_has_changed(tmp_path):
    first, second = (module_of(FILE, "remembers_saved") for _ in range(2))  # as of two processes
    sys.modules["remembers_saved"] = first
    network = first.Remembers()
    state = ModuleState(network)
    assert not any(name.startswith("file ") for name in state.state_dict())
    network(torch.ones(1))
    save_atomically(state.state_dict(), tmp_path / "state.pt")
    saved = load_plain(tmp_path / "state.pt")
    assert sorted(saved["file remembers_saved"]) == ["RECENT", "RUNNING", "calls"]  # SIZES is a constant
    sys.modules["remembers_saved"] = second
    ModuleState(second.Remembers()).load_state_dict(saved)
    assert second.calls == 1 and second.RUNNING == first.RUNNING and list(second.RECENT) == list(first.RECENT)
    assert second.RECENT.maxlen == 2


def test_a_file_that_is_imported_no_more_is_forgotten():
    file = module_of(FILE, "remembers_forgotten")
    state, gone = ModuleState(file.Remembers()), weakref.ref(file)
    state.take()
    del sys.modules["remembers_forgotten"], file, state
    gc.collect()
    assert gone() is None


def test_two_attributes_that_were_one_object_or_become_one_are_put_back():
    module = Counter()
    module.also, module.last = module.bank, [0]
    state = ModuleState(module)
    state.take()
    module.last = module.bank
    module.last.append(torch.zeros(1))
    state.restore()
    assert module.also is module.bank and len(module.bank) == 1 and module.last == [0]


def test_a_dump_sets_no_method_and_nothing_of_torch():
    module = Counter()
    hostile = {"": {"advance": 1, "_parameters": {}, "training": False, "generator": 5}, "layer": {"in_features": 9}}
    with pytest.raises(TypeError):  # a generator takes a state only
        ModuleState(module).load_state_dict(hostile)
    assert callable(module.advance) and module.training and module.layer.in_features == 2


def test_what_changes_the_loss_is_drawn_again_whatever_the_generator(settings, tools, capsys):
    """A plug-in that draws with numpy or Python's random is no transient fault, and its dump can be replayed."""
    trainer, quiet = (tools.build(settings) for _ in range(2))
    first, second = tools.batches(trainer)[:2]
    draws = []

    def draw(module, inputs, output):
        draws.append((np.random.rand(), random.random(), float(torch.rand(()))))
        return (output[0] * math.nan, output[1]) if draws[-1] == draws[0] else None

    handle = trainer.network.loss.register_forward_hook(draw)
    trainer.progress.batch = 1
    before = generator_state(trainer.device)
    assert trainer.train_step([first]) is None and draws[0] == draws[1]
    assert "Computed once more it gives the same values" in capsys.readouterr().out
    assert repr(generator_state(trainer.device)) == repr(before)
    trainer.close()
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert repr(read_dump(path)["rng_state"]) == repr(before)
    handle.remove()
    for run in (trainer, quiet):
        restore_generators(before, run.device)
        run.progress.batch = 2
        assert run.train_step([second]) is not None
    tools.assert_same(tools.snapshot(trainer), tools.snapshot(quiet))


class Failing(nn.Module):
    """A loss whose ``step_number``-th call is NaN; it draws from a generator of its own."""

    def __init__(self, inner, at):
        super().__init__()
        self.inner, self.at, self.calls = inner, at, 0
        self.test_normalize = True
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, x, label):
        self.calls += 1
        loss, accuracy = self.inner(x, label)
        noise = torch.rand((), generator=self.generator)
        return loss * (math.nan if self.calls == self.at else 1.0) + 0.01 * noise, accuracy


def with_failing_loss(trainer, at):
    trainer.network.__L__ = Failing(trainer.network.__L__, at)
    trainer.step.module_state = ModuleState(trainer.network)
    return trainer


def test_a_refused_step_leaves_no_trace_in_counters_and_generators(settings, tools):
    trainer, other = (with_failing_loss(tools.build(settings, nan_recheck="none"), at) for at in (2, 0))
    batches = tools.batches(trainer)[:3]
    for index, batch in enumerate(batches):
        trainer.progress.batch += 1
        taken = trainer.train_step([batch])
        assert (taken is None) == (index > 0)  # the counter stands at 1 after a refused step: it fails for ever
    other.train_step(batches[:1])
    loss, expected = trainer.network.loss, other.network.loss
    assert loss.calls == expected.calls == 1
    assert torch.equal(loss.generator.get_state(), expected.generator.get_state())
    trainer.close()
    dump = read_dump(trainer.incidents.writer.folder / "nan_batch_2_epoch_1.pt")
    assert dump["module_state"]["__L__"]["calls"] == 1 and "recheck" not in dump


def test_an_unlucky_draw_does_not_end_the_run(settings, tools):
    """Refused steps draw the same numbers again; from the third in a row on others are drawn."""
    trainer = tools.build(settings, nan_recheck="none")
    trainer.network.loss.generator = torch.Generator().manual_seed(5)
    trainer.step.module_state = ModuleState(trainer.network)
    draws = []

    def unlucky(module, inputs, output):
        draws.append(float(torch.rand(()) + torch.rand((), generator=module.generator)))
        return (output[0] * math.nan, output[1]) if draws[-1] == draws[0] else None

    trainer.network.loss.register_forward_hook(unlucky)
    (batch,) = tools.batches(trainer)[:1]
    taken = []
    for _ in range(4):
        trainer.progress.batch += 1
        taken.append(trainer.train_step([batch]) is not None)
    trainer.close()
    assert taken == [False, False, False, True]
    assert draws[0] == draws[1] == draws[2] != draws[3]


def test_weights_that_a_forward_pass_writes_are_put_back(settings, tools):
    trainer = tools.build(settings)
    (batch,) = tools.batches(trainer)[:1]

    def write(module, inputs, output):  # as losses do that begin their centres with the first batch
        next(module.parameters()).data.add_(1.0)
        return output[0] * math.nan, output[1]

    before = tools.snapshot(trainer)
    trainer.network.loss.register_forward_hook(write)
    trainer.progress.batch = 1
    assert trainer.train_step([batch]) is None
    tools.assert_same(before, tools.snapshot(trainer))


def test_a_transient_fault_is_told_from_a_lasting_one(settings, tools, capsys):
    trainer, quiet = (tools.build(settings, nan_patience=1000) for _ in range(2))
    batches = tools.batches(trainer)[:3]
    broken = [False, True]  # the second call of all is NaN, and that one only

    def flicker(module, inputs, output):
        return (output[0] * math.nan, output[1]) if broken and broken.pop(0) else None

    trainer.network.loss.register_forward_hook(flicker)
    for batch in batches:
        for run in (trainer, quiet):
            run.progress.batch += 1
            assert run.train_step([batch]) is not None  # the step is taken all the same
    trainer.close()
    tools.assert_same(tools.snapshot(trainer), tools.snapshot(quiet))
    out = capsys.readouterr().out
    assert "Computed once more it is finite" in out and trainer.progress.totals["skipped"] == 0
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert read_dump(path)["recheck"] == {"finite": True, "same": False}
    report = tools.root / "analyze_nan_debug.py"
    done = programs.run(report, path, "--json")
    found = json.loads(done.stdout)
    assert (found["cause"], found["detail"]) == ("environment", "transient"), done.stdout
    assert "computed once more in the run, the step was finite" in found["evidence"]


def test_a_lasting_fault_gives_the_same_values_again(settings, tools, capsys):
    trainer = tools.build(settings, nan_inject="1:grad")
    trainer.progress.batch = 1
    assert trainer.train_step(tools.batches(trainer)[:1]) is None
    trainer.close()
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert read_dump(path)["recheck"] == {"finite": False, "same": True}
    assert "Computed once more it gives the same values" in capsys.readouterr().out


def test_a_step_that_is_finite_on_the_cpu_alone_points_to_the_device(settings, tools, capsys):
    """The trainer's own network stands for one on a broken GPU: it fails, its copy does not."""
    trainer = tools.build(settings)
    trainer.step.rechecks = "cpu"
    network = trainer.network

    def broken(module, inputs, output):
        return (output[0] * math.nan, output[1]) if module is network.loss else None

    network.loss.register_forward_hook(broken)
    before = tools.snapshot(trainer)
    trainer.progress.batch = 1
    assert trainer.train_step(tools.batches(trainer)[:1]) is None
    trainer.close()
    tools.assert_same(before, tools.snapshot(trainer))
    assert "On the CPU it is finite: is the GPU broken?" in capsys.readouterr().out
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert read_dump(path)["recheck"] == {"finite": False, "same": True, "cpu_finite": True}
    found = json.loads(programs.run(tools.root / "analyze_nan_debug.py", path, "--json").stdout)
    assert (found["cause"], found["detail"]) == ("environment", "device"), found
    assert "computed on the CPU in the run, it was finite" in found["evidence"]
    dump = torch.load(path, weights_only=True)
    torch.save({**dump, "device": "cuda:0"}, path)  # what a GPU would have written, analysed without one
    found = json.loads(programs.run(tools.root / "analyze_nan_debug.py", path, "--json").stdout)
    assert (found["cause"], found["detail"]) == ("environment", "device"), found
    text = programs.run(tools.root / "analyze_nan_debug.py", path).stdout
    assert "On cuda:0 this step failed twice, on the CPU it was finite" in text


def test_a_step_that_fails_on_the_cpu_too_is_no_fault_of_the_device(settings, tools, capsys):
    trainer = tools.build(settings, nan_inject="1:loss,2:grad")
    trainer.step.rechecks = "cpu"
    first, second = tools.batches(trainer)[:2]
    trainer.progress.batch = 1
    assert trainer.train_step([first]) is None
    assert "On the CPU it is not finite either." in capsys.readouterr().out

    def refuse(module, inputs):
        if module is not trainer.network.loss:
            raise RuntimeError("knows one device only")

    trainer.network.loss.register_forward_pre_hook(refuse)
    trainer.progress.batch = 2
    assert trainer.train_step([second]) is None
    trainer.close()
    assert "On the CPU it cannot be computed: RuntimeError: knows one device only." in capsys.readouterr().out
    one, two = sorted(trainer.incidents.writer.folder.glob("nan_*.pt"))
    assert read_dump(one)["recheck"] == {"finite": False, "same": True, "cpu_finite": False}
    assert read_dump(two)["recheck"]["cpu_error"] == "RuntimeError: knows one device only"


def test_a_run_on_the_cpu_says_once_that_a_third_time_brings_nothing(settings, tools, capsys):
    trainer = tools.build(settings, nan_recheck="cpu", nan_inject="1:loss")
    trainer.progress.batch = 1
    assert trainer.train_step(tools.batches(trainer)[:1]) is None
    trainer.close()
    assert capsys.readouterr().out.count("nan_recheck: cpu does no more than same here") == 1
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    assert read_dump(path)["recheck"] == {"finite": False, "same": True}


def test_a_copy_on_the_cpu_shares_nothing_and_keeps_ties():
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.GRU(4, 4))
    network[0].bias.requires_grad_(False)
    network[0].generator, network[0].device = torch.Generator().manual_seed(3), torch.device("meta")
    network[0].centre = torch.arange(3.0, requires_grad=True) * 2  # no leaf: copy.deepcopy alone refuses it
    network[1].weight = network[0].bias
    copied = cpu_copy(network.eval())
    for (name, value), other in zip(network.state_dict().items(), copied.state_dict().values(), strict=True):
        assert torch.equal(value, other) and value.data_ptr() != other.data_ptr(), name
    assert copied[1].weight is copied[0].bias and not copied[0].bias.requires_grad and not copied.training
    assert torch.equal(copied[0].centre, network[0].centre) and copied[0].device.type == "cpu"
    assert torch.equal(copied[0].generator.get_state(), network[0].generator.get_state())
    assert copied[0].generator is not network[0].generator
    x = torch.rand(2, 5, 4)
    assert torch.equal(network[2](x)[0], copied[2](x)[0])
