"""Batches on their way from loader processes: their tensors travel in shared memory that is used again and again.

torch makes new shared memory for each tensor, and the system fills it with zeros page by page in the loader process and
maps it page by page in the main one: for crops of 2 s that takes as long as making them. Here each loader process has
as many places as it may have batches on the way, and the main process copies a batch out when it comes.
"""

import io
import itertools
import pickle

import torch

ALIGNED = 64  # bytes at whose multiples a tensor begins
_tokens = itertools.count()
_places: dict[int, dict] = {}  # token -> {(process, place): its memory}, of batches that this process receives


class _Writer(pickle.Pickler):
    """Pickles all but the tensors in memory of the host, which are collected."""

    def __init__(self, stream):
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, value):
        if type(value) is not torch.Tensor or value.layout != torch.strided or value.device.type != "cpu":
            return None
        self.tensors.append(value.detach())
        return len(self.tensors) - 1


class _Reader(pickle.Unpickler):
    """Puts tensors into their places."""

    def __init__(self, stream, tensors: list[torch.Tensor]):
        super().__init__(stream)
        self.tensors = tensors

    def persistent_load(self, number):
        return self.tensors[number]


class Sender:
    """What a loader process wraps its batches in; ``places``: batches that may be on the way at the same time.

    A place is written to again only when the main process has asked for as many batches more, and it asks for one when
    it has received one.
    """

    def __init__(self, places: int):
        self.token, self.places = next(_tokens), places
        self.memory: dict[int, torch.Tensor] = {}
        self.count = 0

    def wrap(self, batch, process: int) -> "Parcel":
        """Write the tensors of a batch into shared memory; the rest goes with the parcel."""
        stream = io.BytesIO()
        writer = _Writer(stream)
        writer.dump(batch)
        layout, size = [], 0
        for tensor in writer.tensors:
            layout.append((tensor.dtype, tensor.shape, size))
            size += -(-tensor.nbytes // ALIGNED) * ALIGNED
        place, self.count = self.count % self.places, self.count + 1
        memory, new = self.memory.get(place), None
        if memory is None or len(memory) < size:
            # A batch may have a row more than another.
            new = memory = self.memory[place] = torch.empty(
                ALIGNED + size + size // 8, dtype=torch.uint8
            ).share_memory_()
        for tensor, part in zip(writer.tensors, _parts(memory, layout)):
            part.copy_(tensor)
        return Parcel(self.token, (process, place), new, layout, stream.getvalue())


class Parcel:
    """A batch on its way: when it is unpickled it is the batch itself, in memory of its own."""

    def __init__(self, *content):
        self.content = content

    def __reduce__(self):
        return _received, self.content


def _received(token: int, place, new: torch.Tensor | None, layout: list, content: bytes):
    """The batch of a parcel; memory that comes with it is kept for those that follow it in the same place."""
    places = _places.setdefault(token, {})
    if new is not None:
        places[place] = new
    tensors = [part.clone() for part in _parts(places[place], layout)]
    return _Reader(io.BytesIO(content), tensors).load()


def _parts(memory: torch.Tensor, layout: list):
    for dtype, shape, begin in layout:
        size = shape.numel() * dtype.itemsize
        yield memory[begin : begin + size].view(dtype).view(shape)


def forget(token: int):
    """Give back the memory of the batches of a sender that will send no more."""
    _places.pop(token, None)
