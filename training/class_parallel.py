"""Class weights of which each process has a slice: made so, put together for files, taken apart again.

``loss/classes.py`` computes with them. To the step a slice is a parameter as any other, but that its gradient is no
other process's business; a checkpoint and a dump hold the whole weight, as a run of one process writes them.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

from config import Config
from errors import UsageError
from utils import total_norm

if TYPE_CHECKING:
    from loss.classes import ClassHead


@dataclass(frozen=True)
class Slice:
    """The rows of a parameter that process ``rank`` has: those from ``bounds[rank]`` to before ``bounds[rank + 1]``."""

    bounds: tuple[int, ...]
    rank: int

    @property
    def own(self) -> slice:
        """This process's rows."""
        return self.of(self.rank)

    @property
    def rows(self) -> int:
        """How many rows all processes have together."""
        return self.bounds[-1]

    def of(self, rank: int) -> slice:
        """The rows of a process."""
        return slice(self.bounds[rank], self.bounds[rank + 1])


def heads_of(network: nn.Module) -> "dict[str, ClassHead]":
    """The heads with weights for each class in a network, by name."""
    from loss.classes import ClassHead  # a plug-in's: an analysis that replays nothing imports none

    return {name: module for name, module in network.named_modules() if isinstance(module, ClassHead)}


def slices_of(network: nn.Module) -> dict[str, Slice]:
    """The slices among a network's parameters, by name; {} of a network that is whole."""
    found = {}
    for prefix, head in heads_of(network).items():
        share = head.share
        for name, weight in head.class_parameters().items() if share.world > 1 else ():
            each = len(weight) // share.size
            bounds = tuple(replace(share, rank=rank).first * each for rank in range(share.world))
            found[f"{prefix}.{name}" if prefix else name] = Slice((*bounds, share.classes * each), share.rank)
    return found


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


def norm_over_ranks(parameters: list, slices: set[int], ranks) -> torch.Tensor:
    """Norm over the gradients of parameters; those whose id is in ``slices`` are counted on each process that has one.

    It is the same on all processes.
    """
    trained = [p for p in parameters if p.grad is not None]
    whole = total_norm([p.grad for p in trained if id(p) not in slices]).to(ranks.device)
    own = total_norm([p.grad for p in trained if id(p) in slices]).to(ranks.device)
    return (whole.square() + ranks.sum(own.square())).sqrt()


def guilty(step, at_fault: bool) -> bool:
    """Whether this process is to report a step that is not finite; ``at_fault``: its own rows are bad.

    Where a slice of the class weights is bad, or its logits are of every process's rows, it is the process that has it.
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
    """Context of an update that leaves rows of classes bit for bit, moments too, which no batch was compared with.

    Their gradient is 0, but momentum, Adam's moments and weight decay would move them as if it had been computed. A
    moment that the update makes is 0 there. Processes that have all classes each move the rows that any has touched.
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


# --------------------------------------------------------------------------------------------- files of the whole

# What is to become of a tensor of a slice, by the name of its parameter.
Change = Callable[[str, torch.Tensor], torch.Tensor]


def changed(state: dict, network: nn.Module, optimizer, change: Change) -> dict:
    """A checkpoint's parts with every tensor changed that belongs to a slice: weights, averages and moments.

    The order is the same on every process.
    """
    slices, result = slices_of(network), dict(state)

    def named(tensors: dict) -> dict:
        return {n: change(n, t) if n in slices and isinstance(t, torch.Tensor) else t for n, t in tensors.items()}

    for key in ("model_state_dict", "raw_model_state_dict"):
        if isinstance(state.get(key), dict):
            result[key] = named(state[key])
    if (state.get("ema_state_dict") or {}).get("parameters"):
        average = state["ema_state_dict"]
        result["ema_state_dict"] = {**average, "parameters": named(average["parameters"])}
    if optimizer is not None and isinstance(state.get("optimizer_state_dict"), dict):
        saved, names = state["optimizer_state_dict"], numbered(network, optimizer)
        moments = {
            number: {key: change(names[number], value) if belongs(value) else value for key, value in values.items()}
            if names.get(number) in slices
            else values
            for number, values in saved["state"].items()
        }
        result["optimizer_state_dict"] = {**saved, "state": moments}
    return result


def belongs(value) -> bool:
    """Whether what an optimizer keeps of a parameter has rows: a step counter has none."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def numbered(network: nn.Module, optimizer) -> dict[int, str]:
    """The names of parameters by their numbers in the optimizer's state."""
    names = {id(p): name for name, p in network.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {number: names[id(p)] for number, p in enumerate(parameters) if id(p) in names}


def put_together(state: dict, network: nn.Module, optimizer, ranks, to: int) -> dict:
    """A checkpoint's parts with the whole class weights on process ``to``; a collective if they are split."""
    slices = slices_of(network)
    if not slices:
        return state
    own = dict(network.named_parameters())

    def collect(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) != len(own[name]):
            return tensor
        return rows_of_all(tensor, slices[name], ranks, to)

    return changed(state, network, optimizer, collect)


def rows_of_all(tensor: torch.Tensor, place: Slice, ranks, to: int) -> torch.Tensor:
    """The slices of all processes as one tensor in the memory of process ``to``; elsewhere the own slice."""
    host = tensor.detach().cpu().contiguous()
    if ranks.rank != to:
        dist.send(host, dst=to, group=ranks.host)
        return tensor
    whole = torch.empty((place.rows, *tensor.shape[1:]), dtype=tensor.dtype)
    for rank in range(ranks.world):
        if rank == to:
            whole[place.of(rank)] = host
        else:
            dist.recv(whole[place.of(rank)], src=rank, group=ranks.host)
    return whole


def taken_apart(state: dict, network: nn.Module, optimizer) -> dict:
    """A checkpoint's parts with this process's slices of the class weights."""
    slices = slices_of(network)
    return changed(state, network, optimizer, lambda name, tensor: own_rows(tensor, slices[name])) if slices else state


def cut(weights: dict[str, torch.Tensor], network: nn.Module) -> dict[str, torch.Tensor]:
    """Weights by name with this process's slices of the class weights."""
    slices = slices_of(network)
    return {name: own_rows(tensor, slices[name]) if name in slices else tensor for name, tensor in weights.items()}


def own_rows(tensor: torch.Tensor, place: Slice) -> torch.Tensor:
    """This process's rows of a whole tensor; one that has other rows is left as it is, and does not fit."""
    return tensor[place.own].clone() if tensor.dim() and len(tensor) == place.rows else tensor


def whole_shapes(network: nn.Module) -> dict[str, torch.Tensor]:
    """A network's state, with tensors without content in the place of slices, in the shape of the whole."""
    slices = slices_of(network)
    return {
        n: torch.empty((slices[n].rows, *t.shape[1:]), dtype=t.dtype, device="meta") if n in slices else t
        for n, t in network.state_dict().items()
    }
