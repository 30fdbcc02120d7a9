"""Channels last in memory: steps as exact as others, the same evaluations, and replayed as they were."""

import pytest
import torch
from torch import nn
from trainers import train

from config import Config
from postmortem.case import Case
from storage.dump import read_dump, read_state
from training.memory_format import lay_out

SMALL = {
    "model": "ResNetSE34L",
    "num_filters": [8, 8, 16, 16],
    "nOut": 16,
    "n_mels": 40,
    "optimizer": "sgd",
    "lr": 0.001,
}


def small(settings, tools, memory_format, **more):
    """A trainer of a small ResNetSE34L."""
    keys = {key: value for key, value in settings.items() if key not in ("channels", "aggregate")}
    keys |= {**SMALL, "memory_format": memory_format, "save_path": f"{settings['save_path']}_{memory_format}", **more}
    return tools.build(keys)


def formats_of(model) -> list[bool]:
    """Watch a model: for each pass of a 2-D convolution of many channels, whether these lie last in its output."""
    found = []

    def look(module, inputs, output):
        if module.out_channels > 1:
            found.append(not output.is_contiguous() and output.is_contiguous(memory_format=torch.channels_last))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    return found


def test_a_step_is_no_less_exact_and_an_evaluation_is_the_same(settings, tools):
    plain, ours = (small(settings, tools, chosen) for chosen in ("contiguous", "channels_last"))
    found = formats_of(ours.network.__S__)
    batch = tools.batches(plain)[0]
    with torch.no_grad():
        exact = plain.network.train()(batch["data"][0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            passes = [trainer.network.train()(batch["data"][0]) for trainer in (plain, ours)]
    errors = [float((x - exact).norm() / exact.norm()) for x in passes]
    assert 0 < errors[1] < 1.2 * errors[0] < 0.2 and sum(found) > 0.9 * len(found)
    found.clear()
    ours.network.load_state_dict(plain.network.state_dict())
    with torch.no_grad():
        wanted, got = (trainer.network.eval()(batch["data"][0]) for trainer in (plain, ours))
    assert torch.equal(got, wanted) and found and not any(found)


def test_a_step_is_replayed_in_the_order_in_which_it_was_taken(settings, tools):
    trainer = small(settings, tools, "channels_last", scale=1e39, mixedprec=True, amp_dtype="bfloat16")
    found = formats_of(trainer.network.__S__)
    train(trainer, tools.batches(trainer)[:1])
    trainer.close()
    (path,) = trainer.incidents.writer.folder.glob("nan_*.pt")
    case = Case(path, read_dump(path), read_state(path, read_dump(path)["state"]))
    case.run_as_it_was()
    assert case.reproduced == "bit_equal" and sum(found) > 0.9 * len(found)
    replayed = formats_of(case.replay.network().__S__)
    case.replay.run()
    assert sum(replayed) > 0.9 * len(replayed)


@pytest.mark.parametrize(
    "memory_format, model, dtype, device, capability, last",
    [
        ("auto", True, torch.bfloat16, "cpu", "AVX512", True),
        ("auto", True, None, "cpu", "AVX512", False),
        ("auto", False, torch.bfloat16, "cpu", "AVX512", False),  # a model that does not say that it may
        ("auto", True, torch.bfloat16, "cpu", "AVX2", False),
        ("auto", True, torch.bfloat16, "cuda", "AVX512", False),
        ("channels_last", False, None, "cuda", "AVX2", True),
        ("contiguous", True, torch.bfloat16, "cpu", "AVX512", False),
    ],
)
def test_auto_takes_it_where_it_was_measured(monkeypatch, memory_format, model, dtype, device, capability, last):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    network = nn.Module()
    network.__S__ = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    network.__S__.channels_last = model
    found = formats_of(network.__S__)
    lay_out(network, memory_format, dtype, torch.device(device))
    network.__S__(torch.zeros(2, 3, 5, 5))
    assert found == [last]
    network.__S__.eval()(torch.zeros(2, 3, 5, 5))
    assert found == [last, False]
    assert Config().memory_format == "auto"
