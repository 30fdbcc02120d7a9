"""Take steps again from a sound state with the dump's own batch: what learning rate, decay and momentum make of it."""

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from errors import first_line
from postmortem.probe import Probe
from postmortem.replay import gradients_of
from settings import plugins
from SpeakerNet import SpeakerNet
from storage.dump import DumpError, read_checkpoint
from storage.dump_statistics import number
from utils import total_norm

STEPS, COLUMNS, SECONDS = 100, 8, 12.0
RUNAWAY = 10.0  # growth of the weights' norm that no sound run shows within so few steps


@dataclass
class Course:
    """What a number of steps made of the weights."""

    steps: int
    loss: float
    growth: float  # of the weights' norm, from the first step to the last
    failed: bool  # something became non-finite
    error: str = ""
    spoiled: str = ""  # the first parameter that an update made non-finite
    site: object = None  # the probe's record of the operation that did

    @property
    def sound(self) -> bool:
        """Neither non-finite nor running away."""
        return not self.failed and not self.error and self.growth < RUNAWAY

    def __str__(self):
        if self.error:
            return self.error
        how = "not finite" if self.failed else f"loss {self.loss:.4g}"
        how = f"the update makes '{self.spoiled}' non-finite" if self.spoiled else how
        return f"after {self.steps} steps {how}, weights' norm times {self.growth:.3g}"


class Rewind:
    """Steps with the dump's batch from the newest sound checkpoint of the run, else from the seed's first weights."""

    def __init__(self, case):
        self.case, self.replay = case, case.replay
        self.checkpoint, self.weights = self.sound_checkpoint()
        self.start = f"the weights of {self.checkpoint}" if self.checkpoint else "the seed's first weights"
        self.courses = {}

    def sound_checkpoint(self):
        """The newest checkpoint beside the dumps, older than the dump, whose weights are finite."""
        folder = Path(self.case.path).resolve().parent.parent / "model"
        candidates = [p for p in folder.glob("*.model") if p.is_file()] if folder.is_dir() else []
        written = Path(self.case.path).stat().st_mtime
        candidates = [p for p in candidates if p.stat().st_mtime <= written + 1.0]
        for path in sorted(candidates, key=lambda p: p.stat().st_mtime, reverse=True)[:3]:
            try:
                state = read_checkpoint(path)
            except DumpError:
                continue
            weights = state.get("model_state_dict")
            older = isinstance(state.get("step"), int) and 0 < state["step"] < self.case.dump["step"]
            if older and isinstance(weights, dict) and all(_finite(t) for t in weights.values()):
                return path, weights
        return None, None

    def fresh(self, settings: dict | None = None) -> nn.Module:
        """The network as it started."""
        torch.manual_seed(int(number(self.replay.config, "seed")))
        network = SpeakerNet({**self.replay.config, **(settings or {})}).to(self.replay.device)
        if self.weights:
            self.replay.load(network, self.weights, strict=False)
        return network.train()

    def growth(self) -> float:
        """How many times the norm of the dump's weights is that of the start; NaN where they are not finite."""
        start = total_norm([p.detach().float() for p in self.fresh().parameters()])
        names = dict(self.replay.network().named_parameters())
        now = total_norm([self.case.state["model_state_dict"][n].float() for n in names])
        return float(now / start)

    def growth_of_finite(self) -> float:
        """``growth`` of the parameters that are finite."""
        fresh = dict(self.fresh().named_parameters())
        state = self.case.state["model_state_dict"]
        names = [n for n in fresh if _finite(state[n])]
        if not names:
            return math.inf
        start = total_norm([fresh[n].detach().float() for n in names])
        return float(total_norm([state[n].float() for n in names]) / start)

    def course(self, guard=None, **changes) -> Course:
        """Take steps with configuration keys changed, at the last learning rate of the history unless ``lr`` is given.

        With ``scheduler`` its schedule is followed from the start. ``guard`` is a mode around the optimizer's steps.
        """
        key = repr(sorted(changes.items())) + (guard.source if guard else "")
        if key not in self.courses:
            try:
                self.courses[key] = self.take(changes, guard)
                if self.courses[key].spoiled and not changes and not guard:
                    probed = self.take(changes, None, self.courses[key].steps)
                    self.courses[key].site = probed.site
            except Exception as error:  # a plug-in may raise anything
                self.courses[key] = Course(0, math.nan, 1.0, True, first_line(error))
        return self.courses[key]

    def take(self, changes: dict, guard=None, probed: int = 0) -> Course:
        """``course``; the update of step ``probed`` is watched."""
        epochs = max(1, int(number(self.replay.config, "max_epoch", 1)))
        config = {**self.replay.config, "steps_per_epoch": max(1, STEPS // epochs), **changes}
        network = self.fresh()
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = plugins.build("optimizer", config["optimizer"], config, parameters)
        schedule, unit = None, ""
        if "scheduler" in changes:
            schedule, unit = plugins.build("scheduler", config["scheduler"], config, optimizer)
        for group in optimizer.param_groups if schedule is None else ():
            group["lr"] = changes.get("lr", self.rate())
        step = range(min(COLUMNS, self.replay.columns))
        data, label = self.replay.data[:, list(step)].to(self.replay.device), self.replay.label[list(step)]
        first = norm = float(total_norm([p.detach() for p in parameters]))
        begin = time.perf_counter()
        loss, taken, clip = math.nan, 0, number(config, "grad_clip")
        self.replay.restore_generators()
        for taken in range(1, STEPS + 1):
            optimizer.zero_grad(set_to_none=True)
            value, _ = network(data, label.to(self.replay.device))
            value.float().backward()
            gradients = list(gradients_of(network).values())
            size = float(total_norm(gradients))
            loss = float(value.detach())
            if not math.isfinite(loss) or not math.isfinite(size):
                return Course(taken, loss, norm / first, True)
            if clip and size > clip:
                torch._foreach_mul_(gradients, clip / size)
            probe = Probe(network, data) if taken == probed else None
            with probe or guard or contextlib.nullcontext():
                optimizer.step()
            if schedule is not None and (unit == "iteration" or taken % config["steps_per_epoch"] == 0):
                schedule.step()
            norm = float(total_norm([p.detach() for p in parameters]))
            if not math.isfinite(norm):
                named = network.named_parameters()
                spoiled = next((n for n, p in named if not bool(p.isfinite().all())), "")
                return Course(taken, loss, norm / first, True, "", spoiled, probe.first() if probe else None)
            if norm / first > RUNAWAY**3 or time.perf_counter() - begin > SECONDS or self.case.time_left() < 0:
                break
        return Course(taken, loss, norm / first, False)

    def rate(self) -> float:
        """The last finite learning rate of the history, else the dump's, else the configured one."""
        rates = [number(h, "lr") for h in self.case.dump["history"][-3:]] + [self.case.dump["lr"]]
        usable = [r for r in rates if math.isfinite(r) and r > 0]
        return max(usable, default=number(self.replay.config, "lr", 0.001))


def _finite(value) -> bool:
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(value.isfinite().all())
