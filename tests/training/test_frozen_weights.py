"""Weights that no optimizer moves: a refused step leaves no trace in those that a forward pass writes."""

import math

import pytest
import torch
from torch import nn

from training.precision import BufferSnapshot


class Momentum(nn.Module):
    """An encoder and its running mean, written as ``write`` does; and a part that is frozen for good."""

    def __init__(self, write: str):
        super().__init__()
        self.query, self.key, self.frozen = (nn.Linear(3, 3) for _ in range(3))
        self.write = write
        for parameter in [*self.key.parameters(), *self.frozen.parameters()]:
            parameter.requires_grad = False

    def forward(self, x):
        for query, key in zip(self.query.parameters(), self.key.parameters()):
            with torch.no_grad():
                if self.write == "in place":
                    key.mul_(0.9).add_(query * x.mean(), alpha=0.1)
                else:  # as MoCo does
                    key.data = key.data * 0.9 + query.data * x.mean() * 0.1
        return self.frozen(self.key(x)) + self.query(x)


def weights(module) -> list:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("write", ["in place", "as data"])
@pytest.mark.parametrize("good_steps", [0, 1, 3])
def test_weights_that_a_forward_pass_writes_are_put_back(write, good_steps):
    module = Momentum(write)
    snapshot = BufferSnapshot(module)
    for _ in range(good_steps):
        snapshot.take()
        module(torch.ones(2, 3))
    before = weights(module)
    snapshot.take()
    for _ in range(2):  # a step that failed is computed once more
        module(torch.full((2, 3), math.nan))
        assert bool(module.key.weight.isnan().all())
        snapshot.restore()
        assert all(map(torch.equal, weights(module), before))
    assert {id(p) for p, _ in snapshot.frozen.kept} == {id(p) for p in module.key.parameters()}
    assert snapshot.frozen.first is None  # no copy of the part that nobody writes


def test_weights_that_are_written_late_are_put_back_from_then_on():
    module = Momentum("in place")
    snapshot = BufferSnapshot(module)
    for _ in range(2):
        snapshot.take()
    module(torch.ones(2, 3))
    snapshot.take()
    before = weights(module)
    module(torch.full((2, 3), math.nan))
    snapshot.restore()
    assert all(map(torch.equal, weights(module), before))
