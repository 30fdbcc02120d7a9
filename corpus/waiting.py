"""The part of a batch's augmentation that waits for the device: packed in the loader, done there for all rows at once.

Rows go through their plug-ins side by side: all first operations of all first plug-ins, then the second ones. What is
alike is done together: recordings are added in one product, responses of similar length are convolved by one Fourier
transform. Nothing is read from the device.
"""

from typing import NamedTuple

import numpy as np
import scipy
import torch

from augmentation.operations import ADD, CLIP, CONVOLVE, MULTIPLY, SILENCE, Operation
from augmentation.waveforms import SILENT_POWER
from corpus.parcels import empty

MEASURE = "measure"
LEAST_TAPS = 256
TOGETHER = 8  # rows: a GPU plans its transforms anew for each number of rows, so they are filled up to a multiple
LARGEST = 1e15  # sample that a row may grow to on a device: its energy and its spectrum stay finite in float32
HALF_SCALE = 1 / 32768


class Part(NamedTuple):
    """One operation on ``count`` rows, and the places in the tensors of ``Waiting`` where it finds what it needs.

    In "whole" are the ``rows``, the ``factors``, which are places in what was measured, and the ``spans``, first
    samples and then counts. In "numbers" are the ``numbers``, and in "long", or "short" if so, the ``samples``:
    recordings or taps. -1 is no place. A convolution has ``after`` taps from time 0 on, ``before`` earlier ones, and
    a transform of ``size``.
    """

    kind: str
    rows: int
    count: int
    numbers: int = -1
    factors: int = -1
    spans: int = -1
    samples: int = -1
    short: bool = False
    after: int = 0
    before: int = 0
    size: int = 0


class Waiting:
    """The operations on the ``rows`` of a batch, in tensors that travel with it.

    ``draws``: (row, number of the draw, what it is called) of each number that is found on the device.
    """

    def __init__(self, rows: list[int], parts: list[Part], tensors: dict[str, torch.Tensor], draws: list[tuple]):
        self.rows, self.parts, self.tensors, self.draws = rows, parts, tensors, draws
        self.found: list[torch.Tensor] = []

    def pin_memory(self, *device) -> "Waiting":
        """As torch calls it for what comes from loader processes."""
        tensors = {name: tensor.pin_memory() for name, tensor in self.tensors.items()}
        return Waiting(self.rows, self.parts, tensors, self.draws)

    def apply(self, x: torch.Tensor):
        """Do all to rows (rows, samples) float32, in place."""
        there = {name: tensor.to(x.device, non_blocking=x.is_cuda) for name, tensor in self.tensors.items()}
        whole, numbers = there["whole"], there["numbers"]
        measured, self.found = x.new_ones(1), []
        for part in self.parts:
            rows = whole[part.rows : part.rows + part.count]
            y = x.index_select(0, rows)
            if part.kind == MEASURE:
                measured = measures_of(y)
                continue
            factor = None
            if part.numbers >= 0:
                factor = numbers[part.numbers : part.numbers + part.count]
            if part.factors >= 0:
                factor = factor * measured[whole[part.factors : part.factors + part.count]]
                self.found.append(factor)
            x.index_copy_(0, rows, self.done(part, y, factor, there))
        self.tensors = {}

    def done(self, part: Part, y: torch.Tensor, factor, there: dict[str, torch.Tensor]) -> torch.Tensor:
        """One operation on rows (count, samples); ``factor``: the number of each."""
        if part.kind == ADD:
            size = part.count * y.shape[1]
            recordings = there["short" if part.short else "long"][part.samples : part.samples + size].view(y.shape)
            factor = factor * HALF_SCALE if part.short else factor
            return torch.addcmul(y, recordings.to(y.dtype), factor[:, None])
        if part.kind == CONVOLVE:
            width = part.after + part.before
            taps = there["long"][part.samples : part.samples + part.count * width].view(part.count, width)
            return convolved(y, taps, part)
        if part.kind == MULTIPLY:
            return y * factor[:, None]
        if part.kind == CLIP:
            return torch.minimum(torch.maximum(y, -factor[:, None]), factor[:, None])
        first, count = there["whole"][part.spans : part.spans + 2 * part.count].view(2, -1, 1)
        time = torch.arange(y.shape[1], device=y.device)
        return y.masked_fill((time >= first) & (time < first + count), 0)

    def tell(self, files):
        """Add to the draws of the rows' provenance what was found on the device, which is waited for."""
        values = torch.cat(self.found).tolist() if self.found else []
        for (row, number, name), value in zip(self.draws, values, strict=True):
            if name:
                draw = files[row]["augment"][number]
                draw[name] = value
                if name == "gain" and not value:
                    draw["reason"] = "silent"
        self.found, self.draws = [], []


def measures_of(y: torch.Tensor) -> torch.Tensor:
    """RMS of each row (rows, samples), 0 of silent ones; then the largest sample of each; then a 1."""
    power = y.square().mean(dim=1)
    rms = power.sqrt().masked_fill(power <= SILENT_POWER, 0)
    return torch.cat([rms, y.abs().amax(dim=1), y.new_ones(1)])


def convolved(y: torch.Tensor, taps: torch.Tensor, part: Part) -> torch.Tensor:
    """Convolve rows (rows, samples) with their taps, cut to their length."""
    rows = -(-part.count // TOGETHER) * TOGETHER if y.is_cuda else part.count
    both = y.new_zeros((2, rows, part.size))
    both[0, : part.count, : y.shape[1]] = y
    both[1, : part.count, : part.after] = taps[:, : part.after]
    if part.before:
        both[1, : part.count, part.size - part.before :] = taps[:, part.after :]
    spectra = torch.fft.rfft(both)
    return torch.fft.irfft(spectra[0] * spectra[1], part.size)[: part.count, : y.shape[1]]


# ---------------------------------------------------------------------------------------------------------- packing


def packed(rows: dict[int, list], samples: int) -> Waiting | None:
    """Pack what waits of rows {row: its stages, as of ``Augmented.operations``} of so many samples; None if nothing."""
    if not rows:
        return None
    packing = Packing(list(rows), samples)
    for number in range(max(map(len, rows.values()))):
        packing.stage({row: stages[number] for row, stages in rows.items() if number < len(stages)})
    return packing.finished()


class Packing:
    """Collects operations and what they need."""

    def __init__(self, rows: list[int], samples: int):
        self.rows, self.samples = rows, samples
        self.parts: list[Part] = []
        self.whole: list[int] = []
        self.numbers: list[float] = []
        self.arrays: dict[str, list[np.ndarray]] = {"short": [], "long": []}
        self.sizes = {"short": 0, "long": 0}
        self.draws: list[tuple] = []

    def stage(self, rows: dict[int, list[tuple[Operation, int]]]):
        """Pack what one plug-in does to each row: its operations act one after another."""
        relative = [row for row, stage in rows.items() if any(operation.relative for operation, _ in stage)]
        if relative:
            self.parts.append(Part(MEASURE, self.keep(relative), len(relative)))
        for number in range(max(map(len, rows.values()))):
            groups: dict[tuple, list] = {}
            for row, stage in rows.items():
                if number < len(stage):
                    groups.setdefault(alike(stage[number][0]), []).append((row, *stage[number]))
            for (kind, *_), members in sorted(groups.items()):
                self.parts.append(self.part(kind, members, relative))

    def part(self, kind: str, members: list[tuple[int, Operation, int]], relative: list[int]) -> Part:
        """Pack operations that are alike, each with its row and the number of its draw."""
        operations = [operation for _, operation, _ in members]
        found = Part(kind, self.keep([row for row, *_ in members]), len(members))
        if kind in (ADD, MULTIPLY, CLIP):
            self.numbers += [operation.number for operation in operations]
            found = found._replace(numbers=len(self.numbers) - len(members))
        if any(operation.relative for operation in operations):
            places = {row: place + (kind == CLIP) * len(relative) for place, row in enumerate(relative)}
            factors = [places[row] if operation.relative else 2 * len(relative) for row, operation, _ in members]
            found = found._replace(factors=self.keep(factors))
            self.draws += [(row, number, operation.found) for row, operation, number in members]
        if kind == ADD:
            short = operations[0].array.dtype == np.int16
            return found._replace(short=short, samples=self.store([operation.array for operation in operations]))
        if kind == CONVOLVE:
            return self.convolution(found, operations)
        if kind == SILENCE:
            spans = [operation.first for operation in operations] + [operation.count for operation in operations]
            return found._replace(spans=self.keep(spans))
        return found

    def convolution(self, found: Part, operations: list[Operation]) -> Part:
        """Pack taps, in the order in which a circular convolution takes them: from time 0 on, then those before it."""
        after = max(len(operation.array) - operation.first for operation in operations)
        before = max(operation.first for operation in operations)
        taps = np.zeros((len(operations), after + before), np.float32)
        for row, operation in zip(taps, operations):
            row[: len(operation.array) - operation.first] = operation.array[operation.first :]
            if operation.first:
                row[-operation.first :] = operation.array[: operation.first]
        size = scipy.fft.next_fast_len(self.samples + class_of(operations[0]), real=True)
        return found._replace(samples=self.store([taps]), after=after, before=before, size=size)

    def keep(self, whole: list[int]) -> int:
        """Keep whole numbers; returns the place of the first."""
        self.whole += whole
        return len(self.whole) - len(whole)

    def store(self, arrays: list[np.ndarray]) -> int:
        """Keep samples of one type; returns the place of the first."""
        name = "short" if arrays[0].dtype == np.int16 else "long"
        place = self.sizes[name]
        self.arrays[name] += arrays
        self.sizes[name] += sum(array.size for array in arrays)
        return place

    def finished(self) -> Waiting:
        """All of it; in a loader process the samples are written into the memory that the batch travels in."""
        tensors = {"whole": torch.tensor(self.whole), "numbers": torch.tensor(self.numbers, dtype=torch.float32)}
        for name, kind in (("short", torch.int16), ("long", torch.float32)):
            tensors[name] = empty((self.sizes[name],), kind)
            into, place = tensors[name].numpy(), 0
            for array in self.arrays[name]:
                into[place : place + array.size] = array.reshape(-1)
                place += array.size
        return Waiting(self.rows, self.parts, tensors, self.draws)


def class_of(operation: Operation) -> int:
    """Taps are convolved with others up to the next power of two."""
    return max(1 << (len(operation.array) - 1).bit_length(), LEAST_TAPS)


def alike(operation: Operation) -> tuple:
    """Operations with the same of this are done together."""
    if operation.kind == CONVOLVE:
        return operation.kind, class_of(operation)
    return operation.kind, int(operation.kind == ADD and operation.array.dtype == np.int16)
