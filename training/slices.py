"""Parameters of which each process has some rows: found, put together for files, taken apart again.

They are class weights that ``class_parallel`` split, or all weights where ``fsdp`` is on, whose parameters are torch's
DTensors. A checkpoint and a dump hold the whole tensors, as a run of one process writes them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from utils import total_norm

if TYPE_CHECKING:
    from loss.classes import ClassHead


@dataclass(frozen=True)
class Slice:
    """The rows of a parameter that process ``rank`` has: those from ``bounds[rank]`` to before ``bounds[rank + 1]``."""

    bounds: tuple[int, ...]
    rank: int
    mesh: Any = None  # of torch's DTensor, if the parameter is one

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
    named = network.named_parameters(remove_duplicate=False)
    found = {name: slice_of(parameter) for name, parameter in named if is_shard(parameter)}
    for prefix, head in heads_of(network).items():
        share = head.share
        for name, weight in head.class_parameters().items() if share.world > 1 else ():
            each = len(weight) // share.size
            bounds = tuple(replace(share, rank=rank).first * each for rank in range(share.world))
            found[f"{prefix}.{name}" if prefix else name] = Slice((*bounds, share.classes * each), share.rank)
    return found


def slice_of(shard) -> Slice:
    """The slice that a shard is of its parameter: ``Shard(0)`` of torch's DTensor cuts as torch.chunk does."""
    mesh, rows = shard.device_mesh, len(shard)
    each = -(-rows // mesh.size())
    return Slice(tuple(min(rank * each, rows) for rank in range(mesh.size() + 1)), mesh.get_local_rank(), mesh)


def is_shard(tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part; torch.distributed.tensor is not imported."""
    return hasattr(tensor, "to_local")


@torch.no_grad()
def local(tensor):
    """What this process holds of a tensor, in the same memory; a plain tensor itself."""
    return tensor.to_local() if is_shard(tensor) else tensor


def norm_over_ranks(parameters: list, slices: set[int], ranks) -> torch.Tensor:
    """Norm over the gradients of parameters; those whose id is in ``slices`` are counted on each process that has one.

    It is the same on all processes.
    """
    trained = [p for p in parameters if p.grad is not None]
    whole = total_norm([local(p.grad) for p in trained if id(p) not in slices]).to(ranks.device)
    own = total_norm([local(p.grad) for p in trained if id(p) in slices]).to(ranks.device)
    return (whole.square() + ranks.sum(own.square())).sqrt()


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
    own = dict(network.named_parameters(remove_duplicate=False))

    def collect(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) != len(own[name]):
            return tensor.full_tensor() if is_shard(tensor) else tensor
        return rows_of_all(tensor, slices[name], ranks, to)

    return changed(state, network, optimizer, collect)


def rows_of_all(tensor: torch.Tensor, place: Slice, ranks, to: int) -> torch.Tensor:
    """The slices of all processes as one tensor in the memory of process ``to``; elsewhere the own slice."""
    host = local(tensor).detach().cpu().contiguous()
    if ranks.rank != to:
        if len(host):
            dist.send(host, dst=to, group=ranks.host)
        return tensor
    whole = torch.empty((place.rows, *tensor.shape[1:]), dtype=tensor.dtype)
    for rank in range(ranks.world):
        rows = whole[place.of(rank)]
        if rank == to:
            rows.copy_(host)
        elif len(rows):
            dist.recv(rows, src=rank, group=ranks.host)
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
    if not tensor.dim() or len(tensor) != place.rows:
        return tensor
    rows = tensor[place.own].clone(memory_format=torch.contiguous_format)
    if place.mesh is None:
        return rows
    from torch.distributed.tensor import DTensor, Shard

    whole = {"shape": tensor.shape, "stride": tensor.contiguous().stride()}
    return DTensor.from_local(rows.to(place.mesh.device_type), place.mesh, [Shard(0)], run_check=False, **whole)


def whole_shapes(network: nn.Module) -> dict[str, torch.Tensor]:
    """A network's state, with tensors without content in the place of slices, in the shape of the whole."""
    slices = slices_of(network)
    return {
        n: torch.empty((slices[n].rows, *t.shape[1:]), dtype=t.dtype, device="meta") if n in slices else t
        for n, t in network.state_dict().items()
    }
