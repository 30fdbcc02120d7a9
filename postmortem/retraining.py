"""Train on the dump's batch from an earlier, sound state: shows whether learning rate, decay or momentum diverge."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from errors import first_line
from postmortem.probe import Probe
from postmortem.replay import OutOfTime
from settings import plugins
from storage.dump import DumpError, read_checkpoint
from storage.dump_statistics import number
from training.generators import restore_generators
from training.progress import step_schedule
from training.ranks import SingleProcess
from training.step import Step
from utils import total_norm

STEPS = 100
COLUMNS = 8  # labelled rows of the batch that the steps use
SECONDS = 12.0
DIVERGENT_GROWTH = 10.0  # growth of the weights' norm that no sound run shows within STEPS steps
NOT_TRIED = "; the steps after it were not tried: no time left (--seconds)"
DIVERGED_GROWTH = 30.0  # over that of fresh weights, that no sound run shows at all


@dataclass
class Trajectory:
    """The result of training steps."""

    steps: int
    loss: float
    growth: float  # of the weights' norm, from the first step to the last
    failed: bool  # something became non-finite
    error: str = ""
    nonfinite_after_update: str = ""  # the first parameter that an update made non-finite
    record: object = None  # the probe's record of the operation that made it non-finite

    @property
    def finite(self) -> bool:
        """Whether it is sound: the name that a replayed step has for it."""
        return self.sound

    @property
    def sound(self) -> bool:
        """Whether everything stayed finite and the weights did not diverge."""
        return not self.failed and not self.error and self.growth < DIVERGENT_GROWTH

    def __str__(self):
        if self.error:
            return self.error
        if self.nonfinite_after_update:
            return f"the update of step {self.steps} makes '{self.nonfinite_after_update}' NaN or Inf"
        if self.failed:
            return f"step {self.steps} is not finite"
        norm = f"weight norm {self.growth:.3g} times that at the start"
        if self.growth >= DIVERGENT_GROWTH:
            return f"diverges ({norm} after {self.steps} steps)"
        return f"stays finite for {self.steps} steps (loss {self.loss:.4g}, {norm})"


def trained_with(case, fix: dict) -> dict:
    """Refute a verified change of precision with which the steps that follow fail.

    What no longer overflows in a wider type may do so a few steps later: in float32 too training goes on to fail then.
    """
    widens = isinstance(fix["change"], dict) and {"mixedprec", "amp_dtype"} & fix["change"].keys()
    if not widens or fix["verdict"] != "verified" or case.retraining is None:
        return fix
    try:
        path = case.retraining.train()
    except OutOfTime:
        return {**fix, "outcome": fix["outcome"] + NOT_TRIED}
    if not path.failed or path.error:
        return fix
    outcome = f"{fix['outcome']}; but trained on in float32 from {case.retraining.start}: {path}"
    return {**fix, "verdict": "refuted", "outcome": outcome}


class Retraining:
    """Training on the dump's batch, from the newest sound checkpoint of the run, else from the initial weights."""

    def __init__(self, case):
        self.case, self.replay = case, case.replay
        self.checkpoint, self.weights = self.sound_checkpoint()
        self.start = f"the weights of {self.checkpoint}" if self.checkpoint else "the initial weights"
        self.trajectories = {}

    def sound_checkpoint(self):
        """Find the newest checkpoint of the run that is older than the dump and has finite weights: (path, weights)."""
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
            finite = isinstance(weights, dict) and all(_finite(t) for t in weights.values())
            if older and finite and not self.had_diverged(weights):
                return path, weights
        return None, None

    def had_diverged(self, weights: dict) -> bool:
        """Whether the finite weights of a checkpoint are so large that the run was past saving when it was written."""
        fresh = {name: p.detach().float() for name, p in self.replay.new_network().named_parameters()}
        there = [weights[name].float() for name in fresh if name in weights]
        return float(total_norm(there)) > DIVERGED_GROWTH * float(total_norm(list(fresh.values())))

    def initial_network(self, settings: dict | None = None) -> nn.Module:
        """Build the network with the weights that the training steps start from."""
        torch.manual_seed(int(number(self.replay.config, "seed")))
        network = self.replay.new_network(settings).to(self.replay.device)
        if self.weights:
            self.replay.load(network, self.weights, strict=False)
        return network.train()

    def growth(self) -> float:
        """Norm of the dump's weights divided by that of the start; NaN if the dump's are not finite."""
        start = total_norm(
            [p.detach() if p.is_complex() else p.detach().float() for p in self.initial_network().parameters()]
        )
        names = dict(self.replay.network().named_parameters())
        now = total_norm([self.case.state["model_state_dict"][n].float() for n in names])
        return float(now / start)

    def growth_of_finite(self) -> float:
        """``growth`` over the parameters that are finite in the dump."""
        initial = dict(self.initial_network().named_parameters())
        state = self.case.state["model_state_dict"]
        names = [n for n in initial if _finite(state[n])]
        if not names:
            return math.inf
        start = total_norm([initial[n].detach().float() for n in names])
        return float(total_norm([state[n].float() for n in names]) / start)

    def train(self, **changes) -> Trajectory:
        """Train with configuration keys changed, at the last learning rate of the history unless ``lr`` is given.

        With ``scheduler`` the learning rate follows its schedule from step 1.
        """
        key = repr(sorted(changes.items()))
        if key not in self.trajectories:
            try:
                self.trajectories[key] = self.take(changes)
                if self.trajectories[key].nonfinite_after_update and not changes:
                    probed = self.take(changes, self.trajectories[key].steps)
                    self.trajectories[key].record = probed.record
            except OutOfTime:
                raise
            except Exception as error:  # a plug-in may raise anything
                self.trajectories[key] = Trajectory(0, math.nan, 1.0, True, first_line(error))
        return self.trajectories[key]

    def take(self, changes: dict, probed: int = 0) -> Trajectory:
        """``train`` without its cache; the probe watches the update of step ``probed``."""
        if self.case.time_left() < 0:
            raise OutOfTime("not tried: no time left (--seconds)")
        epochs = max(1, int(number(self.replay.config, "max_epoch", 1)))
        config = {**self.replay.config, "steps_per_epoch": max(1, STEPS // epochs), **changes}
        network = self.initial_network()
        parameters = [p for p in network.parameters() if p.requires_grad]
        optimizer = self.replay.new_optimizer(network, {"steps_per_epoch": config["steps_per_epoch"], **changes})
        schedule, unit = None, ""
        if "scheduler" in changes:
            schedule, unit = plugins.build("scheduler", config["scheduler"], config, optimizer)
        for group in optimizer.param_groups if schedule is None else ():
            group["lr"] = changes.get("lr", self.learning_rate())
        clip = number(config, "grad_clip")
        step = Step(network, SingleProcess(self.replay.device), optimizer=optimizer, grad_clip=clip)
        columns = list(range(min(COLUMNS, self.replay.columns)))
        window = self.replay.window(self.replay.data, self.replay.label, columns)
        first = norm = float(total_norm([p.detach() for p in parameters]))
        begin = time.perf_counter()
        loss, taken = math.nan, 0
        restore_generators(self.replay.dump["rng_state"], self.replay.device)
        for taken in range(1, STEPS + 1):
            step.begin()
            attempt = step.attempt(window)
            loss = attempt.loss
            if not attempt.finite:
                return Trajectory(taken, loss, norm / first, True)
            probe = Probe(network, window[0]["data"]) if taken == probed else None
            step.apply(attempt.norm, probe)
            if schedule is not None and (unit == "iteration" or taken % config["steps_per_epoch"] == 0):
                step_schedule(schedule, optimizer)
            norm = float(total_norm([p.detach() for p in parameters]))
            if not math.isfinite(norm):
                named = network.named_parameters()
                name = next((n for n, p in named if not bool(p.isfinite().all())), "")
                record = probe.first() if probe else None
                return Trajectory(taken, loss, norm / first, True, "", name, record)
            if norm / first > DIVERGENT_GROWTH**3 or time.perf_counter() - begin > SECONDS or self.case.time_left() < 0:
                break
        return Trajectory(taken, loss, norm / first, False)

    def learning_rate(self) -> float:
        """Largest finite learning rate of the last steps and the dump, else the configured one."""
        rates = [number(h, "lr") for h in self.case.dump["history"][-3:]] + [self.case.dump["lr"]]
        usable = [r for r in rates if math.isfinite(r) and r > 0]
        return max(usable, default=number(self.replay.config, "lr", 0.001))


def _finite(value) -> bool:
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(value.isfinite().all())
