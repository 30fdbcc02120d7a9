"""What the probe sees: masks that leave nothing, what is infinite from the start, whole numbers that wrap around."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from postmortem.finding import detail_of, result_of
from postmortem.modes import WholeNumbers
from postmortem.probe import Probe
from postmortem.rewrites import rewrites


def probed(network, data) -> Probe:
    """The probe of a forward pass whose result is the loss."""
    probe = Probe(network, data)
    with probe:
        loss = network(data)
    probe.end_forward(network, math.isfinite(float(loss)))
    return probe


class Masked(nn.Module):
    """The mean over rows of logsumexp over what a mask leaves."""

    def __init__(self, mask):
        super().__init__()
        self.mask = torch.tensor(mask)

    def forward(self, x):
        return torch.logsumexp(x.masked_fill(self.mask, -math.inf), dim=1).mean()


def test_a_reduction_of_which_the_mask_leaves_nothing_makes_the_loss_infinite():
    network = Masked([[True, True], [True, False]])
    found = probed(network, torch.ones(2, 2)).origin()
    assert found.op == "logsumexp" and not found.backward and detail_of(found) == "all_masked"
    assert result_of(found) == "logsumexp gave Inf: the mask leaves no value of a row"
    line = "torch.logsumexp(x.masked_fill(mask, -math.inf), dim=1)"
    text = f"import math\nimport torch\n\ndef f(x, mask):\n    return {line}.mean()\n"
    changed = rewrites(text, 5, found)[0][1]
    assert changed == text.replace(line, f"torch.nan_to_num({line}, neginf=0.0)")
    names: dict = {}
    exec(changed, names)
    x = torch.ones(2, 2, requires_grad=True)
    names["f"](x, network.mask).backward()
    assert x.grad.tolist() == [[0.0, 0.0], [0.0, 0.5]]


def test_a_mask_that_leaves_something_is_not_blamed_for_another_infinity():
    network = Masked([[False, True]])
    masked = network.forward
    network.forward = lambda x: masked(x) + torch.exp(100.0 * x).mean()
    assert probed(network, torch.ones(1, 2)).origin().op == "exp"


class Rare(nn.Module):
    """Weights of classes of which one has no members, and a mask."""

    def __init__(self, counts):
        super().__init__()
        counts = torch.tensor(counts)
        self.register_buffer("rarity", (counts.mean() / counts).flip(0))
        self.register_buffer("mask", torch.full((3,), -math.inf))


@pytest.mark.parametrize("counts, op", [([2.0, 0.0], "div"), ([2.0, 1.0], None)])
def test_what_is_infinite_from_the_start_is_laid_to_the_line_that_made_it(counts, op, monkeypatch):
    monkeypatch.setattr("postmortem.probe.call_site", lambda skip: "loss/own.py:7")  # this file is no plug-in
    probe = Probe(nn.Module(), torch.zeros(1))
    with probe:
        network = Rare(counts)
    found = probe.maker_of("__L__.rarity", network.rarity)
    assert getattr(found, "op", None) == op and probe.maker_of("__L__.mask", network.mask) is None
    if op:
        assert (found.site.module, found.site.source) == ("__L__", "loss/own.py:7")
        assert result_of(found).endswith("divisor nearest to 0 was 0, which '__L__.rarity' holds from the start")


def test_whole_numbers_that_leave_their_type_are_computed_in_float64(monkeypatch):
    monkeypatch.setattr("postmortem.modes.call_site", lambda skip: "models/own.py:7")
    mode = WholeNumbers()
    with mode:
        few = torch.tensor([100, 181], dtype=torch.int16)
        assert (few * few).tolist() == [10000, 32761] and not mode.found
        many = torch.tensor([100, 182], dtype=torch.int16)
        assert (many * many).tolist() == [10000.0, 33124.0]
        assert torch.tensor([0.5, 1.2]).mul(32768).to(torch.int16).tolist() == [16384.0, 39321.0]
        assert (torch.tensor([2**31]) * 4).tolist() == [2**33]
    assert mode.found == [(op, "models/own.py:7", "int16") for op in ("mul", "_to_copy")]


def test_a_product_of_whole_numbers_is_computed_with_floating_point():
    probe = probed(Masked([[True, True], [True, False]]), torch.ones(2, 2))
    record = replace(probe.origin(), op="mul", dtype="int16", wraps=True, operands=[], parents=[])
    assert detail_of(record) == "integer_overflow" and "leaves the range of int16" in result_of(record)
    text = "def f(pcm):\n    return (pcm * pcm).float().mean()\n"
    assert rewrites(text, 2, record)[0][1] == text.replace("pcm * pcm", "pcm.float() * pcm")
