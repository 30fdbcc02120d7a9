"""The audio files that a run would read: what they hold, and what is wrong with them."""

import collections
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from corpus.audio import SAMPLE_RATE, SILENT_DB, AudioError, read_blocks
from corpus.augmentation import read_rir
from corpus.quality import CLIPPED_SHARE, FULL_SCALE, HUGE, LOUD, flat_tops
from errors import plural

LOG_SECONDS = 60  # between progress lines if there is no terminal for a bar
CHUNK = 512  # files handed to the threads at a time

OFFSET, OFFSET_SHARE = 1e-3, 0.1  # |mean|, and the part of the power that it makes

# Kinds of findings on a file: (level, title, what to do).
KINDS = {
    "unreadable": ("error", "cannot be read", "copy again, or take out of the list"),
    "nonfinite": ("error", "NaN or Inf samples", "repair, or take out of the list"),
    "huge": ("error", f"samples beyond {HUGE:g}", "full scale is 1: scale down, or take out of the list"),
    "energy": ("error", "impulse response without energy", "take out of rir_path"),
    "loud": ("warning", f"samples beyond {LOUD:g}", "full scale is 1: probably integers stored as float"),
    "silent": ("warning", f"silent, below {SILENT_DB:g} dBFS", "nothing to learn or to score"),
    "clipped": ("warning", "clipped", f"flat tops at full scale in more than {100 * CLIPPED_SHARE:g} % of the samples"),
    "offset": (
        "warning",
        "DC offset",
        "the level is not that of the sound; a high-pass filter helps",
    ),
    "channels cancel": ("warning", "channels in opposite phase", "their mean is nearly silent: set channel"),
    "repaired": ("note", "read in spite of its header", "written anew, it would need no repair"),
    "converted": ("note", "read through another program", "as wav or flac it is read faster"),
    "decoder warnings": ("note", "the decoder complains", "listen to it"),
}


@dataclass
class Source:
    """A file to look at: its path, where it is named (list:line, or the key of its folder), and what it is for."""

    path: str
    place: str
    roles: set = field(default_factory=set)


@dataclass
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


def measure(source: Source) -> Measure:
    """Read a whole file as it is stored and measure it."""
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


def scan(sources: list[Source], workers: int):
    """Yield (source, measure) of each file, read by ``workers`` threads, with a bar or a line a minute."""
    began = last = time.monotonic()
    hidden = not sys.stderr.isatty()
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(sources), desc="reading", unit="file", leave=False, ascii=True, disable=hidden) as bar,
    ):
        for begin in range(0, len(sources), CHUNK):  # a million futures at once would fill the memory
            chunk = sources[begin : begin + CHUNK]
            for done, (source, m) in enumerate(zip(chunk, pool.map(measure, chunk)), begin + 1):
                bar.update()
                if hidden and time.monotonic() - last > LOG_SECONDS:
                    last = time.monotonic()
                    left = (last - began) / done * (len(sources) - done)
                    print(f"  read {done} of {len(sources)} files, about {left / 60:.0f} min left", flush=True)
                yield source, m


def describe_files(measured, report):
    """Print tables of lengths and of formats."""
    names = {"train": "train list", "trial": "trial list", "noise": "noise", "rir": "impulse responses"}
    rows = [("", "files", "hours", "shortest", "median", "longest")]
    formats = collections.Counter((m.rate, m.channels) for _, m in measured if not m.error)
    for role, name in names.items():
        seconds = [m.seconds for source, m in measured if role in source.roles and not m.error]
        if seconds:
            low, middle, high = (f"{v:.2f} s" for v in (min(seconds), np.median(seconds), max(seconds)))
            rows.append((name, len(seconds), f"{sum(seconds) / 3600:.2f}", low, middle, high))
    report.table(rows)
    for (rate, channels), count in sorted(formats.items()):
        changes = [f"resampled to {SAMPLE_RATE} Hz"] if rate != SAMPLE_RATE else []
        changes += ["mixed down"] if channels > 1 else []
        what = f"{rate} Hz, {channels} channel{'s' if channels > 1 else ''}: {count} file{'s' if count > 1 else ''}"
        report.line(f"  {what}{', ' if changes else ''}{', '.join(changes)}")


def report_files(measured, wanted_seconds: float, evaluation: bool, report, channel: str = "mix"):
    """Report the findings on files, kind by kind."""
    found = collections.defaultdict(list)
    for source, m in measured:
        for kind, detail in judge(m, source.roles):
            if kind == "channels cancel" and channel != "mix":
                continue
            found[kind].append((source.place, source.path, detail))
    for kind, (level, title, advice) in KINDS.items():
        if found[kind]:
            report.finding(level, f"{title}: {plural(len(found[kind]), 'file')} - {advice}", found[kind])
    short = [s for s, m in measured if "train" in s.roles and not m.error and m.seconds < wanted_seconds]
    if short and not evaluation:
        report.finding(
            "note",
            f"shorter than max_frames ({wanted_seconds:.2f} s): {plural(len(short), 'file')}, repeated to that length",
        )
