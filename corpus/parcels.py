"""Batches on their way from loader processes: their tensors travel in shared memory that is used again and again.

torch makes new shared memory for each tensor, and the system fills it with zeros page by page in the loader process and
maps it page by page in the main one: for crops of 2 s that takes as long as making them. Here each loader process has
as many places as it may have batches on the way, and the main process copies a batch out when it comes.
"""

import contextlib
import io
import itertools
import math
import pickle

import torch

ALIGNED = 64  # bytes at whose multiples a tensor begins
SPARE = 1 << 16  # bytes for the small tensors of a batch
_tokens = itertools.count()
_places: dict[int, dict] = {}  # token -> {(process, place): its memory}, of batches that this process receives
_sender: "Sender | None" = None  # of the batch that this loader process makes


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
        self.count = self.used = self.most = 0  # most: bytes of the tensors of a batch so far
        self.new: torch.Tensor | None = None
        self.key = (0, 0)

    @contextlib.contextmanager
    def batch(self, process: int):
        """Take the next place; meanwhile ``empty`` gives memory of it."""
        global _sender
        self.key, self.used, self.new = (process, self.count % self.places), 0, None
        self.count += 1
        _sender = self
        try:
            yield
        finally:
            _sender = None

    def empty(self, shape, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in the place of the batch; one for which there is no room beside others is anywhere."""
        size = math.prod(shape) * dtype.itemsize
        if not self.used:
            self._make_room(size)
        return self._part(torch.Size(shape), dtype) if self._holds(size) else torch.empty(shape, dtype=dtype)

    def wrap(self, batch) -> "Parcel":
        """Write the tensors of a batch that are not there yet into its place; the rest goes with the parcel."""
        stream = io.BytesIO()
        writer = _Writer(stream)
        writer.dump(batch)
        total = sum(_aligned(tensor.nbytes) for tensor in writer.tensors)
        self.most = max(self.most, total)
        if not self.used:
            self._make_room(total)
        parts = [self._placed(tensor) for tensor in writer.tensors]
        return Parcel(self.token, self.key, self.new, parts, stream.getvalue())

    def _placed(self, tensor: torch.Tensor):
        """Where a tensor is, as ``_view`` takes it, or the tensor itself if it goes by torch's own way."""
        memory = self.memory[self.key[1]]
        there = tensor.untyped_storage().data_ptr() == memory.data_ptr() and tensor.is_contiguous()
        if not there and not self._holds(tensor.nbytes):
            return tensor.clone()
        if not there:
            tensor = self._part(tensor.shape, tensor.dtype).copy_(tensor)
        return tensor.dtype, tensor.shape, tensor.data_ptr() - memory.data_ptr()

    def _part(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        found = _view(self.memory[self.key[1]], dtype, shape, self.used)
        self.used += _aligned(found.nbytes)
        return found

    def _holds(self, size: int) -> bool:
        return self.used + size <= len(self.memory[self.key[1]])

    def _make_room(self, size: int):
        """Have memory of that size and more, for a batch may have a row more than another, or more beside its rows."""
        least = max(size + SPARE, self.most)
        if len(self.memory.get(self.key[1], ())) < least:
            room = least + least // 8
            self.new = self.memory[self.key[1]] = torch.empty(room, dtype=torch.uint8).share_memory_()


def empty(shape, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An empty tensor of a batch; in a loader process in the memory that the batch travels in."""
    return torch.empty(shape, dtype=dtype) if _sender is None else _sender.empty(shape, dtype)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class Parcel:
    """A batch on its way: when it is unpickled it is the batch itself, in memory of its own."""

    def __init__(self, *content):
        self.content = content

    def __reduce__(self):
        return _received, self.content


def _received(token: int, key, new: torch.Tensor | None, parts: list, content: bytes):
    """The batch of a parcel; memory that comes with it is kept for those that follow it in the same place."""
    places = _places.setdefault(token, {})
    if new is not None:
        places[key] = new
    tensors = [part if torch.is_tensor(part) else _view(places[key], *part).clone() for part in parts]
    return _Reader(io.BytesIO(content), tensors).load()


def _view(memory: torch.Tensor, dtype: torch.dtype, shape: torch.Size, begin: int) -> torch.Tensor:
    return memory[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)


def forget(token: int):
    """Give back the memory of the batches of a sender that will send no more."""
    _places.pop(token, None)
