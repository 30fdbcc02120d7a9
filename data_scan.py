"""Look at everything before a long run: the report, the audio files and the lists.

python trainSpeakerNet.py --config configs/demo.yaml --preflight

The checks of keys and plug-in sources are in numeric_lint.py, the dry step in dry_step.py.
"""

import collections
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

import dry_step
import numeric_lint
from augmentation import find_noise, find_rirs, read_rir
from config import table_defaults
from corpus.audio import SAMPLE_RATE, SILENT_DB, AudioError, read_blocks, samples_of
from corpus.loader import usable_cores
from corpus.quality import CLIPPED_SHARE, FULL_SCALE, HUGE, LOUD, flat_tops
from scoring.cautions import known_voices
from speaker_lists import UsageError, read_train_list, read_trials, trial_lines
from storage.files import write_atomically

MOST_LINES = 20  # of a kind on the terminal; result/preflight.txt has all
LOG_SECONDS = 60  # between progress lines where there is no terminal for a bar
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


class Report:
    """What a preflight finds: printed shortened as it comes, kept whole for result/preflight.txt."""

    def __init__(self):
        self.lines = []
        self.counts = {"error": 0, "warning": 0, "note": 0}

    def line(self, text: str = "", printed: bool = True):
        """Add a line."""
        self.lines.append(text.rstrip())
        if printed:
            print(text.rstrip(), flush=True)

    def heading(self, text: str):
        """Begin a section."""
        self.line()
        self.line(text)

    def finding(self, level: str, text: str, items=()):
        """Add a finding, or several of a kind: ``items`` are rows of columns and count one each."""
        self.counts[level] += len(items) or 1
        self.line(f"  {level.upper() if level == 'error' else level:<8} {text}")
        for index, row in enumerate(aligned(items)):
            self.line(f"             {row}", index < MOST_LINES)
        if len(items) > MOST_LINES:
            print(f"             and {len(items) - MOST_LINES} more, see result/preflight.txt")

    def table(self, rows):
        """Add rows of columns, the first of them the heads."""
        for row in aligned(rows):
            self.line(f"  {row}")

    def verdict(self) -> str:
        """The last line."""
        errors, warnings = self.counts["error"], self.counts["warning"]
        if errors:
            return f"preflight: do not start: {errors} errors, {warnings} warnings"
        return f"preflight: ready to start ({warnings} warnings)"

    def write(self, folder: Path):
        """Write all of it to ``folder``/preflight.txt."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"save_path: cannot make '{folder}': {error.strerror}") from error
        write_atomically(folder / "preflight.txt", "\n".join([*self.lines, ""]).encode(errors="backslashreplace"))


def aligned(rows) -> list[str]:
    """Join columns; each is as wide as its widest cell among the rows that a terminal shows."""
    shown = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown[:MOST_LINES])]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in shown]


def counted(items, noun: str) -> str:
    """'1 file', '2 files'."""
    return f"{len(items)} {noun}{'s' if len(items) != 1 else ''}"


def preflight(config, written: dict, build) -> int:
    """Run every check; ``build(say)`` makes the trainer. Returns the exit status: 0 start, 2 do not."""
    report = Report()
    report.line(f"preflight of {config.config or 'the command line'}, for a run in {config.save_path}")
    if not config.eval:
        numeric_lint.check_keys(config, written, report)
        for line in table_defaults(config, written):
            report.finding("note", line)
        numeric_lint.check_plugins(config, report)
    check_data(config, report)
    if not config.eval:
        dry_step.check_step(config, build, report)
    report.line()
    folder = Path(config.save_path, "result")
    report.line(f"the whole report: {folder / 'preflight.txt'}")
    report.line(report.verdict())
    report.write(folder)
    return 2 if report.counts["error"] else 0


# ----------------------------------------------------------------------------------------------------------- files


@dataclass
class Source:
    """A file to look at: its path, where it is named (list:line, or the key of its folder), and what it is for."""

    path: str
    place: str
    roles: set = field(default_factory=set)


@dataclass
class Measure:
    """What a file holds; ``error`` where it cannot be read."""

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


# ----------------------------------------------------------------------------------------------------------- lists


def check_data(config, report):
    """Scan every audio file that the run would read, and check the lists against each other."""
    report.heading("audio files and lists")
    sources = {}

    def add(path, place, role):
        source = sources.setdefault(os.path.realpath(path), Source(str(path), place))
        source.roles.add(role)

    if not config.eval:
        _, _, paths, lines = read_train_list(config.train_list)
        for path, line in zip(paths, lines):
            add(os.path.join(config.train_path, path), f"{config.train_list}:{line}", "train")
    _, first, second = read_trials(config.test_list)
    numbers = trial_lines(config.test_list)
    tested = {}
    for pair, line in zip(zip(first, second), numbers):
        for path in pair:
            tested.setdefault(path, line)
    for path, line in tested.items():
        add(os.path.join(config.test_path, path), f"{config.test_list}:{line}", "trial")
    if config.augment and not config.eval:
        for path in [p for found in find_noise(config.musan_path).values() for p in found] if config.musan_path else ():
            add(path, "musan_path", "noise")
        for path in find_rirs(config.rir_path) if config.rir_path else ():
            add(path, "rir_path", "rir")
    workers = min(max(config.nDataLoaderThread, 1), usable_cores())
    measured = list(scan(list(sources.values()), workers))
    describe_files(measured, report)
    report_files(measured, samples_of(config.max_frames) / SAMPLE_RATE, config.eval, report, config.channel)
    if not config.eval:
        check_train_list(config, report)
        shared = [(s.place, s.path) for s, _ in measured if {"train", "trial"} <= s.roles]
        if shared:
            title = f"in the train list and in the trials: {counted(shared, 'file')} - the EER will be too good"
            report.finding("warning", title, shared)
        train = read_train_list(config.train_list)[0]
        people = known_voices(train, (), dict.fromkeys([*first, *second]))
        if people:
            report.finding("warning", people)
    check_trials(config.test_list, first, second, numbers, report)


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
        changes = (["resampled to 16000 Hz"] if rate != SAMPLE_RATE else []) + (["mixed down"] if channels > 1 else [])
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
            report.finding(level, f"{title}: {counted(found[kind], 'file')} - {advice}", found[kind])
    short = [s for s, m in measured if "train" in s.roles and not m.error and m.seconds < wanted_seconds]
    if short and not evaluation:
        report.finding(
            "note",
            f"shorter than max_frames ({wanted_seconds:.2f} s): {counted(short, 'file')}, repeated to that length",
        )


def check_train_list(config, report):
    """Report repeated lines, speakers with one utterance, and the number of classes."""
    speakers, labels, paths, lines = read_train_list(config.train_list)
    first, repeated, contradicting = {}, [], []
    for index, path in enumerate(map(os.path.normpath, paths)):
        other = first.setdefault(path, index)
        if other != index:
            same = labels[other] == labels[index]
            row = (f"{config.train_list}:{lines[index]}", path, f"first at line {lines[other]}")
            (repeated if same else contradicting).append(row)
    if contradicting:
        title = f"listed under two speakers: {counted(contradicting, 'file')} - keep one of the lines"
        report.finding("error", title, contradicting)
    if repeated:
        report.finding(
            "warning", f"repeated in the train list: {counted(repeated, 'line')} - each counts again", repeated
        )
    single = np.flatnonzero(np.bincount(labels) == 1)
    if len(single):
        level, why = ("warning", " - a row repeats the file") if config.nPerSpeaker > 1 else ("note", "")
        lines_of = {label: lines[index] for index, label in enumerate(labels)}
        rows = [(f"{config.train_list}:{lines_of[label]}", speakers[label]) for label in single]
        report.finding(level, f"with one utterance: {counted(rows, 'speaker')}{why}", rows)
    classes = len(speakers) * (3 if config.speed_perturb else 1)
    report.line(f"  {len(speakers)} speakers, {classes} classes: 0 is '{speakers[0]}', ..., the last '{speakers[-1]}'")
    if config.nClasses > classes:
        report.finding("warning", f"nClasses: {config.nClasses}, but the list has {classes}: the rest is never trained")


def check_trials(path, first, second, numbers, report):
    """Report repeated trials, and pairs that are called target and nontarget."""
    labels, _, _ = read_trials(path)
    seen, repeated, contradicting = {}, [], []
    for index, (a, b) in enumerate(zip(first, second)):
        other = seen.setdefault((min(a, b), max(a, b)), index)
        if other != index:
            row = (f"{path}:{numbers[index]}", a, b, f"first at line {numbers[other]}")
            (repeated if labels[other] == labels[index] else contradicting).append(row)
    if contradicting:
        title = f"target and nontarget trial: {counted(contradicting, 'pair')} - keep one of the lines"
        report.finding("error", title, contradicting)
    if repeated:
        report.finding("warning", f"repeated: {counted(repeated, 'trial')} - each counts again", repeated)
    report.line(f"  {len(labels)} trials, {int(labels.sum())} of them target trials")
