"""The table of a profile gives each module its own operations, of both passes."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from training.profiling import ELSEWHERE, ModuleRanges, costs_of, table_of


@pytest.fixture
def profiled():
    """Events and FLOPs of two steps of a network with two convolutions, one in a block."""
    network = nn.Sequential()
    network.add_module("__S__", nn.Sequential(nn.Conv1d(64, 32, 3, padding=1), nn.Sequential(nn.ReLU())))
    network.add_module("__L__", nn.Conv1d(32, 16, 1))
    optimizer = torch.optim.Adam(network.parameters())
    with torch.profiler.profile() as profile, ModuleRanges(network, passes=3) as ranges:
        for _ in range(2):
            network(torch.randn(8, 64, 400)).square().sum().backward()
            optimizer.step()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    return profile.events(), ranges.flops


def test_operations_belong_to_the_innermost_module(profiled):
    events, flops = profiled
    costs = costs_of(events)
    assert costs.keys() >= {"model.0", "model.1.0", "loss", ELSEWHERE}
    assert flops["model.0"] == 3 * 2 * (2 * 8 * 400 * 64 * 32 * 3)  # nobody wants the gradient of its input
    assert flops["loss"] == 3 * 3 * (2 * 8 * 400 * 32 * 16)
    assert all(costs[name].forward > 0 and costs[name].backward > 0 for name in ("model.0", "model.1.0", "loss"))
    whole = sum(event.self_cpu_time_total for event in events) / 1e6
    assert sum(cost.forward + cost.backward for cost in costs.values()) == pytest.approx(whole, rel=1e-3)


def test_the_table_counts_both_passes_of_one_step(profiled):
    lines = table_of(profiled[0], 2, profiled[1]).splitlines()
    assert "mean of 2 profiled steps" in lines[0] and lines[3].startswith("module ")
    rows = {line[:44].strip(): line[44:].split() for line in lines[4:]}
    assert float(rows["model.0"][3]) == pytest.approx(3 * 2 * 2 * 8 * 400 * 64 * 32 * 3 / 1e9, abs=0.005)
    assert sum(float(row[2].rstrip("%")) for row in rows.values()) == pytest.approx(100, abs=0.5)


@pytest.mark.parametrize("keys", [{}, {"freeze_epochs": 1}, {"gradient_checkpointing": True, "model": "ECAPA_TDNN"}])
def test_the_operations_of_a_step_are_those_that_torch_counts_in_both_passes(settings, tools, keys):
    sizes = {"channels": 16, "nOut": 8} if "model" in keys else {}
    trainer = tools.build(settings, **keys, **sizes)
    trainer.enter_epoch()
    batch = tools.batches(trainer)[0]
    with ModuleRanges(trainer.network) as ranges:
        trainer.network(batch["data"], batch["label"])
    with FlopCounterMode(display=False) as counter:
        trainer.network(batch["data"], batch["label"])[0].backward()
    assert sum(ranges.flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_compiled_model_is_one_range_and_is_not_compiled_again(settings, tools, monkeypatch):
    trainer = tools.build(settings)
    torch._dynamo.reset()
    trainer.network.__S__.compile(backend="eager")
    compiled = trainer.network.__S__._compiled_call_impl
    batch = tools.batches(trainer)[0]
    trainer.train_step([batch])
    before = counters["frames"]["total"]
    with torch.profiler.profile() as profile, ModuleRanges(trainer.network) as ranges:
        for _ in range(3):
            trainer.train_step([batch])
    assert counters["frames"]["total"] == before and trainer.network.__S__._compiled_call_impl is compiled
    names = {name for name in costs_of(profile.events()) if name.startswith("model")}
    assert names == {"model"} and not any(name.startswith("model") and ranges.flops[name] for name in ranges.flops)


def test_a_pass_that_fails_leaves_no_range_open_and_is_not_counted():
    class Refusing(nn.Module):
        refuses = True

        def forward(self, x):
            if self.refuses:
                raise torch.linalg.LinAlgError("no factors")
            return x

    network = nn.Sequential(nn.Linear(4, 3), Refusing())
    with ModuleRanges(network) as ranges:
        with pytest.raises(torch.linalg.LinAlgError):
            network(torch.ones(2, 4))
        assert _get_current_dispatch_mode() is None and not ranges.open
        network[1].refuses = False
        network(torch.ones(2, 4))
    assert _get_current_dispatch_mode() is None and ranges.flops["0"] == 2 * 2 * (2 * 4 * 3)
