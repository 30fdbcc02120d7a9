"""What modules and optimizers keep in plain attributes is on its device again after a checkpoint or a dump."""

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from training.module_state import ModuleState
from training.optimizer_state import attributes_of, restore_attributes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Remembers(nn.Module):
    """Keeps what it has met, some of it on the host, made in its first step."""

    def __init__(self, device):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, device=device))
        self.mean, self.recent, self.by_class, self.counts = None, [], {}, None
        self.first, self.table = torch.zeros(3), torch.zeros(3)

    def meet(self):
        x = self.weight.detach()
        self.mean, self.recent, self.by_class = x.clone(), [x.clone(), x.clone()], {4: x.clone()}
        self.counts, self.first = torch.zeros(2), x.clone()
        return self


def devices(module) -> dict:
    """The devices of what it keeps, by name."""
    lists = module.recent, list(module.by_class.values())
    found = {"recent": {t.device for t in lists[0]}, "by_class": {t.device for t in lists[1]}}
    return found | {name: {getattr(module, name).device} for name in ("mean", "counts", "first", "table")}


def test_what_was_on_a_gpu_is_there_again_and_what_was_on_the_host_too():
    with FakeTensorMode():
        state = ModuleState(Remembers(GPU).meet()).state_dict()
        for device in (GPU, CPU):  # resumed there, or replayed without a GPU
            module = Remembers(device)
            ModuleState(module).load_state_dict(state)
            there, host = {device}, {CPU}
            expected = dict.fromkeys(("mean", "recent", "by_class", "first"), there)
            assert devices(module) == {**expected, "counts": host, "table": host}


def test_a_run_from_the_cpu_goes_on_on_a_gpu_with_its_memory():
    with FakeTensorMode():
        state = ModuleState(Remembers(CPU).meet()).state_dict()
        module = Remembers(GPU)
        ModuleState(module).load_state_dict(state)
        found = devices(module)
        assert found["mean"] == found["recent"] == found["by_class"] == {GPU}
        assert found["first"] == found["table"] == {CPU}  # where a new run has them


class Draws(nn.Module):
    """Makes its generator in its first step, when it knows the device."""

    def __init__(self):
        super().__init__()
        self.generator = None

    def forward(self, x):
        if self.generator is None:
            self.generator = torch.Generator(x.device).manual_seed(3)
        return x + torch.rand(len(x), generator=self.generator)


def test_a_generator_that_is_made_in_the_first_step_goes_on():
    module, other, x = Draws(), Draws(), torch.zeros(4)
    module(x)
    ModuleState(other).load_state_dict(ModuleState(module).state_dict())
    assert torch.equal(module(x), other(x)) and isinstance(other.generator, torch.Generator)


def test_a_generator_of_another_device_is_left_as_it_is():
    module = Draws()
    expected = module(torch.zeros(4))
    module.generator.manual_seed(3)
    of_a_gpu = {"": {"generator": torch.zeros(16, dtype=torch.uint8)}, "(places)": {"": {"generator": "generator"}}}
    ModuleState(module).load_state_dict(of_a_gpu)
    assert torch.equal(module(torch.zeros(4)), expected)


class Slow(torch.optim.SGD):
    """Keeps a list of slow weights, made in its first step."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.slow, self.mean = [], None


def test_slow_weights_of_an_optimizer_are_where_its_parameters_are():
    with FakeTensorMode():
        optimizer, other = Slow([Remembers(GPU).weight]), Slow([Remembers(GPU).weight])
        optimizer.slow, optimizer.mean = [torch.empty(3, device=GPU)], torch.empty(3, device=GPU)
        saved = attributes_of(optimizer)
        of_a_file = {"slow": [saved["slow"][0].cpu()], "mean": saved["mean"].cpu()}
        restore_attributes(other, of_a_file)
        assert other.slow[0].device == other.mean.device == GPU
