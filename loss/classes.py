"""Losses with weights for each class: against all classes, a drawn share of them, or a slice on each process.

Split over the processes (An et al. 2021, "Partial FC", section 3.1; An et al. 2022, section 3), each has the weights of
a slice of the classes and compares the rows of all processes with it. Three small collectives make the exact softmax.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from utils import accuracy

FAR = -2.0  # below every cosine


@dataclass(frozen=True)
class Share:
    """The classes that process ``rank`` of ``world`` has of ``classes``; shares differ by one class at most.

    ``rows``: the most of a batch of one process; the last batch of an epoch may have fewer, on some processes.
    """

    classes: int
    rank: int = 0
    world: int = 1
    rows: int = 0

    @property
    def first(self) -> int:
        """The first class."""
        return self.classes * self.rank // self.world

    @property
    def end(self) -> int:
        """The class after the last."""
        return self.classes * (self.rank + 1) // self.world

    @property
    def size(self) -> int:
        """How many classes."""
        return self.end - self.first


class Notes:
    """What a head notes of its forward passes since ``clear``, on its device.

    ``rate``: share of the classes that is drawn. ``touched`` (classes,): those that a row was compared with; the others
    are not to move. ``brought``: whether this process's classes made something non-finite of a row that is finite.
    """

    def __init__(self, rate: float = 1.0):
        self.rate = rate
        self.clear()

    def clear(self):
        """Forget the passes so far: the next gradients are of those to come."""
        self.touched: torch.Tensor | None = None
        self.brought: torch.Tensor | None = None

    def add(self, name: str, flags: torch.Tensor):
        """Add flags to those noted under a name."""
        before = getattr(self, name)
        setattr(self, name, flags if before is None else before | flags)


class ClassHead(nn.Module):
    """Base of a loss whose parameters ``class_weights`` have a row for each class, or several for each, in their order.

    A loss says ``loss(batch) -> (loss, accuracy in %)`` of a ``ClassBatch``, which hides whether the classes are split
    over processes and which of them were drawn. It is computed in fp32.
    """

    class_weights: tuple[str, ...] = ("weight",)

    def __init__(self, classes: int):
        super().__init__()
        self.test_normalize = True
        self.share, self.notes = Share(classes), Notes()

    def sample(self, rate: float, seed: int):
        """Compare each row with its own class and a share ``rate`` of the others, drawn anew for each batch.

        The generator is an attribute: what was drawn is the same on every process, and a step that is refused, resumed
        or replayed draws it again.
        """
        self.notes = Notes(rate)
        if rate < 1.0:
            self.draws = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def split(self, rank: int, world: int, rows: int):
        """Keep the weights of this process's share of the classes only; ValueError if there are too few of them.

        ``rows``: the most of a batch of one process.

        The gradient of a slice is that of the mean loss over the rows of all processes: what averaging gives the other
        parameters. Of a parameter that all share, each process has a part of a sum; it is multiplied by what averaging
        will divide it by.
        """
        whole, self.share = self.share.classes, Share(self.share.classes, rank, world, rows)
        if whole < world:
            raise ValueError(f"{whole} classes cannot be split over {world} processes")
        for name in self.class_weights:
            module, _, last = name.rpartition(".")
            owner, weight = self.get_submodule(module), self.get_parameter(name)
            each = len(weight) // whole
            own = weight[self.share.first * each : self.share.end * each].clone()
            setattr(owner, last, nn.Parameter(own, weight.requires_grad))
        for name, parameter in self.named_parameters():
            if name not in self.class_weights:
                parameter.register_hook(lambda gradient: gradient * world)

    def forward(self, x, label):
        with torch.autocast(x.device.type, enabled=False):
            return self.loss(ClassBatch(self, x, label))

    def loss(self, batch: "ClassBatch"):
        """(loss, accuracy in %) of a batch."""
        raise NotImplementedError

    def drawn(self) -> torch.Tensor | None:
        """Which of this process's classes were drawn (classes,) bool, on the host; None if all take part."""
        if self.notes.rate >= 1.0 or not self.training:
            return None
        drawn = torch.rand(self.share.classes, generator=self.draws) < self.notes.rate
        return drawn[self.share.first : self.share.end]

    def class_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters with a row for each class."""
        return {name: self.get_parameter(name) for name in self.class_weights}


class ClassBatch:
    """Rows and the classes that this process compares them with.

    ``x`` (B, D) are the rows of all processes if the classes are split, else those of this one. ``columns`` (B,) is the
    place of each row's own class among those compared, ``own`` (B,) whether it is there at all, None if always.
    """

    def __init__(self, head: ClassHead, x, label):
        self.notes, self.share, self.rows = head.notes, head.share, len(x)
        self.split = self.share.world > 1
        if self.split:
            more = self.share.rows - len(x)  # rows of zeros without a class, so that each process gives as many
            x, label = F.pad(x.float(), (0, 0, 0, more)), F.pad(label, (0, more), value=-1)
            x, label = GatherRows.apply(x, self.share), gather(label, self.share)
        self.x, self.columns, self.own = x, label - self.share.first, None
        if self.split:
            self.own = (self.columns >= 0) & (self.columns < self.share.size)
            self.columns = self.columns.clamp(0, self.share.size - 1)
        self.numbers = torch.arange(len(x), device=x.device)
        self.rate, self.chosen, self.hidden = 1.0, None, None
        drawn = head.drawn()
        if drawn is not None:
            self.rate = head.notes.rate
            self.choose(drawn)

    def choose(self, drawn):
        """Compare each row with the classes that were ``drawn`` and with its own.

        A class that is there as somebody's own, and was not drawn, is hidden from the other rows. How many of these
        there are only the device knows, and it is not waited for: there are places for as many as there can be, and
        those left over are hidden from all rows.
        """
        places = min(len(drawn), int(drawn.sum()) + len(self.columns))
        drawn = drawn.to(self.columns.device)
        mine = torch.ones_like(self.columns) if self.own is None else self.own.long()
        wanted = torch.zeros(len(drawn), dtype=torch.long, device=drawn.device).index_add(0, self.columns, mine) > 0
        wanted |= drawn
        self.notes.add("touched", wanted.clone())
        wanted[0] |= ~wanted.any()  # a process without any still takes part
        place = wanted.cumsum(0) - 1
        chosen = torch.zeros(places + 1, dtype=torch.long, device=drawn.device)  # the last: of those not wanted
        chosen.scatter_(0, torch.where(wanted, place, places), torch.arange(len(drawn), device=drawn.device))
        self.chosen = chosen[:places]
        left_over = torch.arange(places, device=drawn.device) > place[-1]
        self.hidden = ~drawn[self.chosen] | left_over
        self.columns = place[self.columns].clamp(min=0)

    def weight(self, parameter, each: int = 1):
        """The rows of a class parameter that the batch is compared with; ``each``: rows of a class."""
        if self.chosen is None:
            return parameter
        rows = self.chosen[:, None] * each + torch.arange(each, device=self.chosen.device)
        return parameter.index_select(0, rows.flatten())

    def target(self, values):
        """The values (B, classes) at the rows' own classes (B,); where ``own`` is False they mean nothing."""
        return values[self.numbers, self.columns]

    def with_target(self, values, new):
        """``values`` (B, classes) with ``new`` (B,), or a number, for the rows' own classes."""
        if not isinstance(new, torch.Tensor):
            new = values.new_full((len(self.numbers),), new)
        if self.own is not None:
            new = torch.where(self.own, new, self.target(values))
        return values.index_put((self.numbers, self.columns), new)

    def where_own(self, values):
        """The values (B,) of rows whose own class is on this process, 0 of others."""
        return values if self.own is None else torch.where(self.own, values, 0.0)

    def hide(self, values, fill: float):
        """``values`` with ``fill`` where a row is compared with a class that was not drawn and is not its own."""
        return (
            values
            if self.hidden is None
            else self.with_target(values.masked_fill(self.hidden, fill), self.target(values))
        )

    def cross_entropy(self, logits):
        """(mean loss, accuracy in %) of this process's rows, by the softmax over all classes."""
        logits = self.hide(logits, -torch.inf)
        if not self.split:
            return F.cross_entropy(logits, self.columns), self.accuracy(logits)
        highest = logits.detach().amax(dim=1)
        self.note_rows(highest.isnan() | (highest == torch.inf))
        self.maximum(highest)
        shifted = logits - highest[:, None]
        parts = [shifted.exp().sum(dim=1), self.where_own(self.target(shifted))]
        total, target = SumOverRanks.apply(torch.stack(parts), self.share)
        # At least 1, the highest logit's exp(0), where a clamp at 1 would drop the gradient; a NaN stays one.
        total = total.clamp(min=0.5)
        return self.mean(total.log() - target), self.accuracy(logits)

    def accuracy(self, scores):
        """Share in % of this process's rows whose own class has the highest of all scores (B, classes)."""
        scores = scores.detach()
        if not self.split:
            return accuracy(scores, self.columns)[0]
        best = scores.max(dim=1)
        hit = self.own & (best.indices == self.columns) & (best.values == self.maximum(best.values.clone()))
        return self.mean(SumOverRanks.apply(hit.float(), self.share)) * 100.0

    def sum(self, values):
        """The sum over the processes of what each has of the rows' values (B,)."""
        if not self.split:
            return values
        self.note_rows(~values.detach().isfinite())
        return SumOverRanks.apply(values, self.share)

    def note_rows(self, bad):
        """Note whether a row that is ``bad`` (B,) against this process's classes is finite itself."""
        self.notes.add("brought", (bad & self.x.detach().isfinite().all(dim=1)).any())

    def mean(self, values):
        """The mean of values (B,) over this process's own rows."""
        first = self.share.rank * self.share.rows
        return values[first : first + self.rows].mean() if self.split else values.mean()

    def maximum(self, values):
        """The maximum over the processes of values (B,), in place."""
        if self.split:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def nearest_others(self, cosine, count: int):
        """The places (B, count) of classes near a row that are not its own, and which of them are the nearest of all.

        The second is None if all are: ``count`` nearest, or all others if they are fewer.
        """
        count = min(count, self.share.classes - 1)
        others = self.with_target(cosine.detach(), FAR)
        if not self.split and self.hidden is None:
            return others.topk(count, dim=1).indices, None
        others = others if self.hidden is None else others.masked_fill(self.hidden, FAR)
        found = others.topk(min(count, others.shape[1]), dim=1)
        values = F.pad(found.values, (0, count - found.values.shape[1]), value=FAR)
        first = self.share.rank * count if self.split else 0
        everyone = gather(values, self.share).unflatten(0, (-1, len(values))) if self.split else values[None]
        everyone = everyone.transpose(0, 1).flatten(1)  # (B, processes x count)
        nearest = torch.zeros_like(everyone, dtype=torch.bool)
        nearest.scatter_(1, everyone.topk(count, dim=1).indices, True)
        nearest = nearest[:, first : first + found.values.shape[1]]
        return found.indices, nearest & (found.values > FAR)


def gather(tensor, share: Share) -> torch.Tensor:
    """The rows of all processes, in rank order."""
    parts = [torch.empty_like(tensor) for _ in range(share.world)]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


class GatherRows(torch.autograd.Function):
    """The rows (B, D) of all processes; backward each process gets the gradient of its own, summed over all slices.

    It is that of its own rows' mean loss, as a process has it that computes alone: averaging over the processes is left
    to whoever averages the model's gradients.
    """

    @staticmethod
    def forward(ctx, x, share: Share):
        ctx.share = share
        return gather(x, share)

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.unflatten(0, (ctx.share.world, -1))[ctx.share.rank] * ctx.share.world, None


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over the processes; its gradient is that of the mean of all processes' losses."""

    @staticmethod
    def forward(ctx, x, share: Share):
        ctx.share = share
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / ctx.share.world, None
