"""What optimizer and schedule plug-ins return, held against what the loop asks of them."""

import inspect

from errors import UsageError
from training.module_state import copied, is_state, put_back, storables

UNITS = ("epoch", "iteration")


def check_optimizer(optimizer, name: str):
    """UsageError if what the Optimizer of a file returned is none."""
    wanted = ("param_groups", "step", "zero_grad", "state_dict", "load_state_dict")
    if isinstance(optimizer, type) or not all(hasattr(optimizer, attribute) for attribute in wanted):
        hint = " - is there a 'return'?" if optimizer is None else ""
        kind = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else f"a {type(optimizer).__name__}"
        found = "None" if optimizer is None else kind
        raise UsageError(
            f"optimizer/{name}.py: Optimizer must return a torch.optim.Optimizer; it returns {found}{hint}"
        )
    taken = inspect.signature(optimizer.step).parameters.values()
    if any(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in taken):
        raise UsageError(
            f"optimizer/{name}.py: {type(optimizer).__name__}.step wants a closure, which computes the step again; one "
            "pass forward and backward is made for each step here - take an optimizer without"
        )


def untrained(optimizer, network) -> str:
    """What to say of weights that no group of an optimizer holds; '' if there are none."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left = [name for name, p in network.named_parameters() if p.requires_grad and id(p) not in held]
    if not left:
        return ""
    more = f" and {len(left) - 1} more" if left[1:] else ""
    return f"the optimizer was given '{left[0]}'{more} and holds it in no group: it will not train"


def checked_schedule(made, name: str, epochs: int = 1, steps_per_epoch: int = 1) -> tuple:
    """(schedule, unit) of what the Scheduler of a file returned; UsageError if it is anything else.

    A schedule that says its ``total_steps``, as torch's OneCycleLR, must have those of a run.
    """
    plugin = f"scheduler/{name}.py"
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        count = f"{len(made)} values" if isinstance(made, (tuple, list)) else f"a {type(made).__name__} alone"
        raise UsageError(
            f"{plugin}: Scheduler must return (scheduler, 'epoch' or 'iteration'); it returns "
            f"{'None' if made is None else count}"
        )
    schedule, unit = made
    if unit not in UNITS:
        raise UsageError(f"{plugin}: must say 'epoch' or 'iteration', not {unit}")
    if isinstance(schedule, type) or not callable(getattr(schedule, "step", None)):
        raise UsageError(f"{plugin}: the first of what Scheduler returns has no step(): a {type(schedule).__name__}")
    taken = inspect.signature(schedule.step).parameters.values()
    needed = [p.name for p in taken if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if needed:
        raise UsageError(
            f"{plugin}: {type(schedule).__name__}.step wants '{needed[0]}', but a schedule here goes by epochs or "
            "iterations alone; patience ends a run that gets no better"
        )
    total, steps = getattr(schedule, "total_steps", None), epochs * (steps_per_epoch if unit == "iteration" else 1)
    if isinstance(total, int) and total < steps:
        formula = "max_epoch x steps_per_epoch" if unit == "iteration" else "max_epoch"
        raise UsageError(f"{plugin}: its total_steps, {total}, are fewer than the {steps} of this run: take {formula}")
    return (schedule if hasattr(schedule, "state_dict") else Kept(schedule)), unit


class Kept:
    """A schedule without ``state_dict``: its numbers and lists are its state, as those of torch's are."""

    def __init__(self, schedule):
        self.schedule = schedule

    def step(self):
        """Move it on."""
        self.schedule.step()

    def state_dict(self) -> dict:
        """Its attributes, but for those that no file holds, as the optimizer."""
        states = {key: value for key, value in vars(self.schedule).items() if is_state(value)}
        return storables(("", key, value) for key, value in states.items()).get("", {})

    def load_state_dict(self, state: dict):
        """Put saved attributes back."""
        for key, value in state.items():
            if key in vars(self.schedule):
                put_back(vars(self.schedule), key, copied(value))
