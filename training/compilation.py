"""torch.compile for the model, tried before the first step so that a failure costs no run."""

import contextlib
import math
import time

import torch

from config import Config
from corpus.audio import samples_of
from errors import UsageError, first_line

FURTHER = 1.5  # times as far: a mean that moves by momentum 0.1 twice goes 1.9 times as far


def compile_model(step, config: Config, log=print, backbone=None):
    """Compile the model of a step's network as ``compile_model`` says, and pass noise through it both ways.

    ``backbone``: the FrozenBackbone, whose norms may keep their statistics; what is compiled is for epochs in which all
    of it trains.
    UsageError if that fails and the key is 'on'; with 'auto' the model then stays as it is, on all ranks. Nothing of
    the trial stays: buffers and generators are those from before.
    """
    if config.compile_model == "off":
        return
    model, begin = step.network.__S__, time.perf_counter()
    step.network.train()
    if backbone is not None:
        backbone.enter(math.inf)
    reason = try_compiled(step, model, config)
    if step.ranks.any(bool(reason)):
        model._compiled_call_impl = None
        reason = next(filter(None, step.ranks.gather(reason)))
        if config.compile_model == "on":
            raise UsageError(f"compile_model: torch.compile fails: {reason}; auto goes on without")
        log(f"compile_model: the model is not compiled: {reason}")
        return
    log(f"compile_model: compiled in {time.perf_counter() - begin:.0f} s")


def try_compiled(step, model, config: Config) -> str:
    """Compile, and pass a batch of noise forward and backward; returns why that fails, '' if it does not."""
    rows, samples = config.batch_size * config.nPerSpeaker, samples_of(config.max_frames, config.sample_rate)
    step.begin()
    try:
        noise = torch.randn(rows, samples, device=step.device) * 0.1
        usual = norms_moved(step, model, noise) if config.gradient_checkpointing else {}
        step.rewind()
        model.compile()
        moved = norms_moved(step, model, noise)
    except Exception as error:  # of a compiler, or of what it compiles, anything
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        step.network.zero_grad(set_to_none=True)
        step.rewind()
    twice = next((name for name, way in usual.items() if moved[name] > FURTHER * way), "")
    if twice:
        why = f"'{twice}' moves {moved[twice] / usual[twice]:.2g} times as far in a step as without"
        return f"torch {torch.__version__} does not compile what gradient_checkpointing computes again: {why}"
    return ""


def norms_moved(step, model, noise) -> dict[str, float]:
    """Pass noise forward and backward; returns how far the mean that each normalisation keeps has moved."""
    means = {n: b for n, b in model.named_buffers() if n.endswith("running_mean")}
    before = {name: mean.clone() for name, mean in means.items()}
    with torch.autocast(step.device.type, dtype=step.amp_dtype, enabled=step.amp_dtype is not None):
        output = model(noise).float().sum()
    if output.requires_grad:  # not of a frozen model
        output.backward()
    return {name: float((mean - before[name]).norm()) for name, mean in means.items()}


@contextlib.contextmanager
def as_it_is(model):
    """Context in which a compiled model computes as its source says, so that what is evaluated is exact."""
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = compiled
