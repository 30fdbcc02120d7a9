"""Where the time of training steps goes: a Chrome trace and a text by module, both passes, with FLOPs."""

import functools
import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from training.recompute import is_recomputed
from utils import plain_names

PREFIX, BACKWARD = "module ", "autograd::engine::evaluate_function: "
DEPTH = 3  # of names, as model.layer2.0
ELSEWHERE = "outside of the modules"


class Products(TorchDispatchMode):
    """Context of a forward pass that counts the FLOPs of products and convolutions, with those of its backward pass.

    The gradient of each factor that wants one takes as many as the product itself. ``forward``: how often a product is
    computed before that, twice if the backward pass computes it again.
    """

    SUMMED = ("addmm", "baddbmm")  # the first argument is added

    def __init__(self):
        super().__init__()
        self.count, self.forward = 0.0, 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        operation = function._overloadpacket
        if operation in flop_registry:
            first = 1 if operation.__name__ in self.SUMMED else 0
            gradients = sum(factor.requires_grad for factor in args[first : first + 2]) * torch.is_grad_enabled()
            self.count += (self.forward + gradients) * flop_registry[operation](*args, **(kwargs or {}), out_val=out)
        return out


class ModuleRanges:
    """Context in which the profiler sees the modules of a network, down to ``DEPTH``, as ranges with their names.

    ``flops`` {module: FLOPs of its own products and convolutions in the ``passes`` of a step, forward and backward} is
    filled by the first forward pass. A compiled model is one range, and its FLOPs are not counted. Without a network it
    does nothing.
    """

    def __init__(self, network, passes: int = 1):
        self.network, self.passes = network, passes
        self.handles, self.enclosed, self.open, self.flops = [], [], [], defaultdict(float)
        self.counter = Products()

    def __enter__(self):
        if self.network is None:
            return self
        if not any(module._compiled_call_impl for module in self.network.modules()):
            self.counting = [self.network.register_forward_pre_hook(self.start_counting)]
            self.counting.append(self.network.register_forward_hook(self.stop_counting, always_call=True))
            self.handles += self.counting
            for block in filter(is_recomputed, self.network.modules()):
                again, once = (functools.partial(self.compute, times) for times in (2, 1))
                self.handles += [block.register_forward_pre_hook(again), block.register_forward_hook(once)]
        compiled = [module for module in self.network.modules() if module._compiled_call_impl is not None]
        inside = {id(part) for module in compiled for part in module.modules()}
        for name, module in self.network.named_modules():
            if module in compiled:
                self.enclose(plain_names(name), module)
            elif name and name.count(".") < DEPTH and id(module) not in inside:
                enter = functools.partial(self.enter, plain_names(name))
                leave = module.register_forward_hook(self.leave, always_call=True)  # of a pass that fails too
                self.handles += [module.register_forward_pre_hook(enter), leave]
        return self

    def __exit__(self, *raised):
        for handle in self.handles:
            handle.remove()
        for module, compiled in self.enclosed:
            module._compiled_call_impl = compiled

    def enclose(self, name: str, module):
        """Put a compiled module into one range: hooks in it would be compiled too, again in each step."""
        compiled = module._compiled_call_impl

        def ranged(*inputs, **named):
            self.enter(name, module, inputs)
            try:
                return compiled(*inputs, **named)
            finally:
                self.leave(module, inputs)

        module._compiled_call_impl = ranged
        self.enclosed.append((module, compiled))

    def start_counting(self, module, inputs):
        """Begin to count, as the first forward pass begins."""
        self.counter.__enter__()

    def stop_counting(self, module, inputs, output):
        """End it with that pass; of one that failed, which has no output, nothing is kept."""
        self.counter.__exit__(None, None, None)
        if output is None:
            self.flops.clear()
            return
        for handle in self.counting:
            handle.remove()

    def compute(self, times: int, *hooked):
        """Note how often the forward pass of what follows is computed."""
        self.counter.forward = times

    def enter(self, name: str, module, inputs):
        """Open the range of a module."""
        named = torch.profiler.record_function(PREFIX + name)
        named.__enter__()
        self.open.append([named, name, self.counter.count, 0])

    def leave(self, module, inputs, output=None):
        """Close it; its operations are those since it was opened, less those of modules in it."""
        named, name, before, inner = self.open.pop()
        named.__exit__(None, None, None)
        count = self.counter.count - before
        self.flops[name] += self.passes * (count - inner)
        if self.open:
            self.open[-1][3] += count


@dataclass
class Cost:
    """Seconds that a module takes in the profiled steps."""

    forward: float = 0.0
    backward: float = 0.0


def costs_of(events, on_gpu: bool = False) -> dict[str, Cost]:
    """{module: its cost} of a profile's events; a backward operation is that of the module of its forward one.

    ``on_gpu`` counts the time of kernels. Each is told with the operation that started it and, once more, alone.
    """
    found, module_of = defaultdict(Cost), {}
    host = [e for e in events if e.device_type == DeviceType.CPU and not e.name.startswith("ProfilerStep")]
    places = [(event, place_of(event)) for event in host if not (on_gpu and event.name.startswith(PREFIX))]
    for event, place in places:
        if isinstance(place, str) and place and event.sequence_nr >= 0 and not in_backward(event):
            module_of[event.sequence_nr] = place.removeprefix(PREFIX)
    for event, place in places:
        if isinstance(place, int):
            found[module_of.get(place, ELSEWHERE)].backward += seconds(event, on_gpu)
        else:
            found[place.removeprefix(PREFIX) or ELSEWHERE].forward += seconds(event, on_gpu)
    return dict(found)


def place_of(event) -> str | int:
    """The range of the innermost module around an event, the number of its forward operation, or '' outside."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name
        if event.name.startswith(BACKWARD):
            return event.sequence_nr
        event = event.cpu_parent
    return ""


def in_backward(event) -> bool:
    """Whether an operation is one of a backward pass, which numbers what it computes again in its own way."""
    while event is not None and not event.name.startswith(BACKWARD):
        event = event.cpu_parent
    return event is not None


def seconds(event, on_gpu: bool) -> float:
    """Time of an operation itself: of the kernels that it started on a GPU, else on the CPU."""
    return (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6


def limit_of(device) -> float:
    """FLOP/s that a product of two fp32 matrices of 2,048 rows reaches here, the best of five."""
    a, b = (torch.full((2048, 2048), 0.5, device=device) for _ in range(2))  # no random numbers: the run goes on
    taken = []
    for _ in range(5):
        begin = time.perf_counter()
        float((a @ b)[0, 0])
        taken.append(time.perf_counter() - begin)
    return 2 * 2048**3 / min(taken)


def table_of(events, steps: int, flops: dict[str, float]) -> str:
    """The text of ``profile.txt``: what one of ``steps`` steps costs by module, the most expensive first.

    ``flops`` {module: number} are those of a step.
    """
    on_gpu = any(event.device_type == DeviceType.CUDA for event in events)
    costs, limit = costs_of(events, on_gpu), limit_of("cuda" if on_gpu else "cpu")
    whole = sum(cost.forward + cost.backward for cost in costs.values())
    lines = [
        f"One step takes {1000 * whole / steps:.1f} ms, mean of {steps} profiled steps. The limit of this device is",
        f"{limit / 1e9:.0f} GFLOP/s, measured with a product of two fp32 matrices of 2,048 rows.",
        "",
        f"{'module':<44}{'forward ms':>12}{'backward ms':>13}{'share':>8}{'GFLOP':>9}{'GFLOP/s':>9}{'of limit':>10}",
    ]
    for name, cost in sorted(costs.items(), key=lambda item: -item[1].forward - item[1].backward):
        taken, count = (cost.forward + cost.backward) / steps, flops.get(name, 0.0)
        speed = count / taken if taken else 0.0
        row = f"{name:<44}{1000 * cost.forward / steps:>12.1f}{1000 * cost.backward / steps:>13.1f}"
        row += f"{taken * steps / whole:>8.1%}{count / 1e9:>9.2f}"
        lines.append(row + (f"{speed / 1e9:>9.0f}{speed / limit:>10.0%}" if speed else ""))
    return "\n".join(lines) + "\n"
