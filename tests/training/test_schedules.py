"""Optimizers and schedules of plug-ins: what the loop cannot use is refused before it begins."""

import pytest
import torch
from torch.optim import lr_scheduler

from errors import UsageError
from training.optimizer_state import attributes_of, restore_attributes
from training.schedules import Kept, check_optimizer, checked_schedule, untrained


def adam():
    return torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))])


class Plain:
    """A schedule as people write them: without state_dict."""

    def __init__(self, optimizer):
        self.optimizer, self.calls, self.rates, self.rule = optimizer, 0, [0.1, 0.2], lambda step: step

    def step(self):
        self.calls += 1
        self.rates.append(0.1 * self.calls)


class WantsMetric(Plain):
    def step(self, metric):
        super().step()


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (None, "Optimizer must return a torch.optim.Optimizer; it returns None - is there a 'return'?"),
        ((1, 2), "it returns a tuple"),
        (torch.optim.SGD, "it returns the class SGD"),
        (torch.optim.LBFGS([torch.nn.Parameter(torch.zeros(2))]), "LBFGS.step wants a closure"),
    ],
)
def test_what_is_no_optimizer_is_named(made, words):
    with pytest.raises(UsageError, match=r"^optimizer/mine\.py: ") as caught:
        check_optimizer(made, "mine")
    assert words in str(caught.value)


def test_every_optimizer_of_torch_without_a_closure_is_taken():
    for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"):
        check_optimizer(getattr(torch.optim, name)([torch.nn.Parameter(torch.zeros(2))], lr=0.1), name)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: lr_scheduler.StepLR(adam(), 1), "it returns a StepLR alone"),
        (lambda: None, "it returns None"),
        (lambda: (lr_scheduler.StepLR(adam(), 1), "epoch", 3), "it returns 3 values"),
        (lambda: (lr_scheduler.StepLR(adam(), 1), "step"), "must say 'epoch' or 'iteration', not step"),
        (lambda: (lr_scheduler.ReduceLROnPlateau(adam()), "epoch"), "ReduceLROnPlateau.step wants 'metrics'"),
        (lambda: (WantsMetric(adam()), "epoch"), "WantsMetric.step wants 'metric'"),
        (lambda: (3, "epoch"), "has no step()"),
    ],
)
def test_what_is_no_schedule_is_named(made, words):
    with pytest.raises(UsageError, match=r"^scheduler/mine\.py: ") as caught:
        checked_schedule(made(), "mine")
    assert words in str(caught.value)


def test_a_schedule_without_state_dict_goes_on_where_it_was():
    kept, unit = checked_schedule((Plain(adam()), "iteration"), "mine")
    assert isinstance(kept, Kept) and unit == "iteration"
    kept.step()
    state = kept.state_dict()
    assert state == {"calls": 1, "rates": [0.1, 0.2, 0.1]}
    other = Kept(Plain(adam()))
    other.load_state_dict(state)
    kept.step()
    other.step()
    assert other.state_dict() == kept.state_dict() and other.schedule.optimizer is not None
    torchs = lr_scheduler.StepLR(adam(), 1)
    assert checked_schedule((torchs, "epoch"), "mine") == (torchs, "epoch")


def test_weights_in_no_group_are_named():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert untrained(torch.optim.SGD(network.parameters(), lr=1.0), network) == ""
    said = untrained(torch.optim.SGD(network[0].parameters(), lr=1.0), network)
    assert said == "the optimizer was given '1.weight' and 1 more and holds it in no group: it will not train"


class Slow(torch.optim.Optimizer):
    """Lookahead as people write it: what it remembers stands in attributes."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.steps, self.slow, self.norms, self.rule = 0, {}, [], lambda step: step

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(0.1 * parameter.grad)
            slow = self.slow.setdefault(parameter, parameter.clone())
            self.norms = [*self.norms[-2:], float(parameter.norm())]
            if self.steps % 2 == 0:
                slow.add_(parameter - slow, alpha=0.5)
                parameter.copy_(slow)


def test_what_an_optimizer_keeps_in_attributes_goes_on_too(tmp_path):
    def stepped(optimizer, parameter, times):
        for _ in range(times):
            optimizer.zero_grad()
            parameter.square().sum().backward()
            optimizer.step()

    first, second = (torch.nn.Parameter(torch.arange(3.0)) for _ in range(2))
    one, other = Slow([first]), Slow([second])
    stepped(one, first, 3)
    torch.save({"weights": first.data, "attributes": attributes_of(one)}, tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    assert saved["attributes"].keys() == {"steps", "slow", "norms"}
    second.data.copy_(saved["weights"])
    restore_attributes(other, {**saved["attributes"], "param_groups": [], "unknown": 1})
    stepped(one, first, 3)
    stepped(other, second, 3)
    assert torch.equal(first, second) and other.norms == one.norms and other.steps == 6 and callable(other.rule)
    assert attributes_of(adam()) == {}
