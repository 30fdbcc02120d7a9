"""Class weights that are split over the processes, and steps in which only a share of the classes was drawn.

``loss/classes.py`` computes with them. A step treats a slice as any other parameter, except that its gradient is not
averaged: no other process has these classes.
"""

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import nn

from config import Config
from errors import UsageError
from training.slices import heads_of, slices_of

if TYPE_CHECKING:
    from loss.classes import ClassHead


def split_classes(network: nn.Module, config: Config, ranks, log):
    """Split the class weights of a network over the processes, if ``class_parallel`` says so."""
    if not config.class_parallel:
        return
    heads = heads_of(network)
    if not heads:
        raise UsageError(f"class_parallel: loss '{config.trainfunc}' (trainfunc) has no class weights to split")
    if ranks.world == 1:
        log("class_parallel: does nothing in one process, which has all classes")
        return
    for head in heads.values():
        try:
            head.split(ranks.rank, ranks.world, config.batch_size * config.nPerSpeaker)
        except ValueError as error:
            raise UsageError(f"class_parallel: {error}") from error
    slices = slices_of(network)
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, list(slices))
    name, place = next(iter(slices.items()))
    sizes = sorted({place.of(rank).stop - place.of(rank).start for rank in range(ranks.world)})
    log(f"class_parallel: each process has {' or '.join(map(str, sizes))} of the {place.rows} rows of '{name}'")


def draw_classes(network: nn.Module, values: dict):
    """Let the heads of a network compare with a share of the classes, if ``class_sample_rate`` is below 1."""
    rate = values.get("class_sample_rate", 1.0)
    for head in heads_of(network).values() if rate < 1.0 else ():
        head.sample(rate, values["seed"])


def check_optimizer(optimizer, config: Config):
    """UsageError if classes are drawn and nobody can tell what the optimizer keeps for each of their rows."""
    if config.class_sample_rate < 1.0 and not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"class_sample_rate: optimizer/{config.optimizer}.py gives no torch.optim.Optimizer, so the rows that were "
            "not drawn cannot be told apart; set it to 1"
        )


def guilty(step, at_fault: bool) -> bool:
    """Whether this process is to report a step that is not finite; ``at_fault``: its own rows are bad.

    A process whose slice of the class weights is bad reports before all others. A bad logit spoils the loss of every
    process; then it is the one whose classes made it of a row that is finite.
    """
    sliced = [p for name, p in step.network.named_parameters() if name in step.slices]
    bad = not all(bool(p.isfinite().all()) for p in sliced)
    noted = [head.notes.brought for head in step.heads]
    brought = any(bool(flag) for flag in noted if flag is not None)
    everyone = step.ranks.gather((bad, at_fault, brought))
    if any(other for other, _, _ in everyone):
        return bad
    if all(other for _, other, _ in everyone) and any(other for _, _, other in everyone):
        return brought
    return at_fault


# ------------------------------------------------------------------------------------------------ drawn classes


@contextlib.contextmanager
def drawn_rows_only(heads: "list[ClassHead]", optimizer, ranks):
    """Context of an update in which the classes that no batch was compared with stay bit for bit, moments too.

    Their gradient is 0, but momentum, Adam's moments and weight decay would move them all the same. A moment that the
    update makes anew is 0 there. Where every process has all classes, each moves those that any process has touched.
    """
    kept = []
    for head in heads:
        touched = head.notes.touched
        if touched is not None and ranks.world > 1 and head.share.world == 1:
            touched = ranks.maximum(touched.to(torch.uint8)).bool()
        for weight in head.class_parameters().values() if touched is not None else ():
            if weight.grad is not None:
                each = len(weight) // len(touched)
                moved = touched[:, None].expand(-1, each).reshape(len(weight), *[1] * (weight.dim() - 1))
                kept.append((weight, moved, {key: t.clone() for key, t in kept_of(weight, optimizer).items()}))
    yield
    with torch.no_grad():
        for weight, moved, before in kept:
            for key, tensor in kept_of(weight, optimizer).items():
                if key in before:  # by a mask: the numbers of the rows would have to be read from the device
                    torch.where(moved, tensor, before[key], out=tensor)
                else:
                    tensor.masked_fill_(~moved, 0.0)


def kept_of(weight: nn.Parameter, optimizer) -> dict[str, torch.Tensor]:
    """A parameter under the name '', and what an optimizer keeps for each of its elements, by its names."""
    moments = optimizer.state.get(weight, {}).items()
    alike = {key: m for key, m in moments if isinstance(m, torch.Tensor) and m.shape == weight.shape}
    return {"": weight.detach(), **alike}
