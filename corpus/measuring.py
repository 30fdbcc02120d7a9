"""Read whole recordings and say what they hold: length, level, extremes, and what makes them unfit."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from corpus.audio import SAMPLE_RATE, SILENT_DB, AudioError, read_blocks
from corpus.progress import FileProgress
from corpus.quality import CLIPPED_SHARE, FULL_SCALE, HUGE, LOUD, flat_tops
from corpus.sounds import read_rir

CHUNK = 512  # files handed to the threads at a time

OFFSET, OFFSET_SHARE = 1e-3, 0.1  # |mean|, and the part of the power that it makes


@dataclass
class Source:
    """A file to look at: its path, where it is named (list:line, or the key of its folder), and what it is for."""

    path: str
    place: str
    roles: set = field(default_factory=set)


@dataclass(slots=True)
class Measure:
    """What a file holds; ``error`` if it cannot be read."""

    error: str = ""
    rate: int = SAMPLE_RATE
    channels: int = 1
    samples: int = 0
    first_bad: int = -1  # first non-finite sample
    bad: int = 0
    bad_value: float = 0.0
    peak: float = 0.0
    power: float = 0.0
    mean: float = 0.0  # of the channel where it is largest
    flat: float = 0.0  # share of neighbours that are equal at full scale
    notes: list = field(default_factory=list)  # (kind, text) of the reader

    @property
    def seconds(self) -> float:
        """Length."""
        return self.samples / self.rate


def measure(source: Source, watch=None) -> Measure:
    """Read a whole file as it is stored and measure it; ``watch(rate, block)`` is given each block (samples, channels).

    Blocks are given as they are read, and with zeros in the place of what is not finite.
    """
    m, sums, flat = Measure(), 0.0, 0
    try:
        for rate, block in read_blocks(source.path, notes=m.notes):
            m.rate, m.channels = rate, block.shape[1]
            wrong = ~np.isfinite(block)
            if wrong.any():
                row = int(wrong.any(axis=1).argmax())
                if m.first_bad < 0:
                    m.first_bad, m.bad_value = m.samples + row, float(block[row][wrong[row]][0])
                m.bad += int(wrong.any(axis=1).sum())
                block = np.where(wrong, np.float32(0), block)
            if watch is not None:
                watch(rate, block)
            magnitude = np.abs(block)
            m.peak = max(m.peak, float(magnitude.max()))
            m.power += float(np.square(block, dtype=np.float64).sum())
            sums = sums + block.sum(axis=0, dtype=np.float64)
            flat += flat_tops(block, magnitude) if m.peak >= FULL_SCALE else 0
            m.samples += len(block)
        if "rir" in source.roles and not m.bad:
            read_rir(source.path)  # as the loader does: first channel, unit energy
    except AudioError as error:
        m.error = str(error)
    values = max(m.samples * m.channels, 1)
    m.power, m.flat = m.power / values, flat / values
    m.mean = float(np.abs(sums).max()) / max(m.samples, 1)
    return m


def judge(m: Measure, roles: set) -> list[tuple[str, str]]:
    """Findings on a file: [(kind, detail)]."""
    if m.error:
        return [("energy" if "without energy" in m.error else "unreadable", m.error)]
    if m.bad:
        name = "NaN" if math.isnan(m.bad_value) else "Inf"
        return [("nonfinite", f"{name} at sample {m.first_bad} ({m.first_bad / m.rate:.3f} s), {m.bad} of {m.samples}")]
    found = [note for note in m.notes if note[0] != "channels cancel" or roles != {"rir"}]
    if m.peak > LOUD:
        found.append(("huge" if m.peak > HUGE else "loud", f"largest sample {m.peak:.6g}"))
    if roles == {"rir"}:  # short, at full scale, mostly silence: all normal here
        return found
    level = 10 * math.log10(m.power) if m.power else -math.inf
    if level < SILENT_DB:
        return [*found, ("silent", f"{level:.0f} dBFS" if m.power else "all zero")]
    if m.flat > CLIPPED_SHARE and m.peak <= LOUD:
        found.append(("clipped", f"{100 * m.flat:.2g} % of the samples"))
    if m.mean > OFFSET and m.mean**2 > OFFSET_SHARE * m.power:
        found.append(("offset", f"mean {m.mean:.3g}, RMS {math.sqrt(m.power):.3g}"))
    return found


def scan(sources: list, workers: int, work=measure, verb: str = "read", of: int = 0):
    """Yield (source, ``work(source)``) of each file, by ``workers`` threads, with a bar or a line a minute.

    ``of``: files in all, if some were done before.
    """
    before = max(of - len(sources), 0)
    total = before + len(sources)
    log = functools.partial(print, flush=True)
    with ThreadPoolExecutor(workers) as pool, FileProgress(total, verb, before, log) as progress:
        for begin in range(0, len(sources), CHUNK):  # a million futures at once would fill the memory
            chunk = sources[begin : begin + CHUNK]
            for source, m in zip(chunk, pool.map(work, chunk)):
                progress.update()
                yield source, m
