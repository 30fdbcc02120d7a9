"""A recording in windows at regular steps, read in blocks, so that memory does not grow with its length."""

import numpy as np

from config import SAMPLE_RATE
from corpus.audio import MIN_EMBED_SECONDS, Mixer, channel_of, resample
from corpus.decode import Recording

LEAST_STEP = 0.01  # seconds: that of the frames of features


def grid_fault(window: float, step: float, least: float = MIN_EMBED_SECONDS) -> str:
    """Why there are no windows of ``window`` s every ``step`` s, "" if there are; ``least``: seconds of a window."""
    if not least <= window < np.inf:
        return f"window: must be at least {least:g} s, got {window:g}"
    if not LEAST_STEP <= step < np.inf:
        return f"step: must be at least {LEAST_STEP:g} s, got {step:g}"
    if step > window:
        return f"step: {step:g} s is longer than the window of {window:g} s, so what lies between would not be heard"
    return ""


def put_together(blocks: list[tuple]) -> tuple:
    """(times (N, 2), rows (N, ..), {index: reason}) of consecutive blocks of windows, each given in the same way."""
    begins = np.cumsum([0, *(len(times) for times, _, _ in blocks)]).tolist()
    reasons = {begin + row: text for begin, (_, _, found) in zip(begins, blocks) for row, text in found.items()}
    return np.concatenate([block[0] for block in blocks]), np.concatenate([block[1] for block in blocks]), reasons


def sliding_windows(
    path, window: float, step: float, channel: str = "mix", sample_rate: int = SAMPLE_RATE, notes: list | None = None
):
    """Yield (start, end, x) of each window of a file: in s, and (samples,) float32 at ``sample_rate``.

    The windows begin every ``step`` s and are ``window`` s long. What is left at the end is heard in one more window,
    moved back to end with the file, unless it is shorter than ``LEAST_STEP``; a file that is shorter than a window is
    one window of its own length. A window is what ``read_crop`` reads there. AudioError as of ``read_crop``; ``notes``
    gets (kind, text) on the file at its end.
    """
    with Recording(path) as recording:
        rate = recording.rate
        mixer = Mixer(recording.channels, channel_of(recording, channel))
        length = max(1, round(window * rate))
        kept, first = np.empty(0, np.float32), 0  # samples of the file from ``first`` on
        start, number, heard = 0, 0, 0

        def cut(begin, end):
            piece = np.ascontiguousarray(kept[begin - first : end - first])
            return begin / rate, end / rate, resample(piece, rate, sample_rate=sample_rate)

        for block in recording.blocks():
            kept = np.concatenate([kept, mixer.mix(block)])
            while start + length <= first + len(kept):
                heard = start + length
                yield cut(start, heard)
                number += 1
                start = round(number * step * rate)
            past = min(start - first, len(kept) - length)  # the last window may begin before the next one
            if past > 0:
                kept, first = kept[past:], first + past
        total = first + len(kept)
        if total - heard >= round(LEAST_STEP * rate) or not heard:
            yield cut(max(0, total - length), total)
        if notes is not None:
            notes += recording.notes + mixer.notes()
