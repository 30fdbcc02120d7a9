"""The audio files that a run would read: what they hold, and what is wrong with them."""

import collections

import numpy as np

from corpus.audio import SILENT_DB
from corpus.measuring import judge
from corpus.quality import CLIPPED_SHARE, HUGE, LOUD
from errors import plural

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


def describe_files(measured, report, sample_rate: int):
    """Print tables of lengths and of formats; what is not at ``sample_rate`` is resampled."""
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
        changes = [f"resampled to {sample_rate} Hz"] if rate != sample_rate else []
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
