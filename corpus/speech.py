"""Where speech is: by the energy of frames, or by the network of silero-vad where it is installed."""

import itertools
import threading
import warnings

import numpy as np

from config import SAMPLE_RATE
from corpus.audio import resample

FRAME = 0.02  # seconds
RANGE_DB = (20.0, 40.0)  # the threshold lies between so far below the loud frames
SHARE = 0.35  # of the way from the quiet frames up to the loud ones
CONTRAST_DB = 10.0  # between speech and pauses, at least
SECOND = 50  # frames
GAP, MARGIN = 0.3, 0.1  # seconds: pauses in speech that are bridged; kept before and behind it
FLOOR_DB = -100.0


class Energy:
    """Levels in dB of full scale of frames of 20 ms of a recording that is given block by block."""

    def __init__(self):
        self.left, self.powers = np.empty(0, np.float32), []
        self.frame = FRAME  # seconds, in whole samples of the recording

    def add(self, rate: int, block: np.ndarray):
        """Take the next block (samples, channels) of a recording of ``rate`` Hz."""
        size = max(round(rate * FRAME), 1)
        self.frame = size / rate
        x = np.concatenate([self.left, block.mean(axis=1) if block.shape[1] > 1 else block[:, 0]])
        whole = len(x) // size * size
        self.left = x[whole:].copy()
        frames = x[:whole].reshape(-1, size)
        if len(frames):
            self.powers.append(np.einsum("ij,ij->i", frames, frames, dtype=np.float64) / size)

    def spans(self) -> list[tuple[float, float]]:
        """Where speech is, (begin, end) in seconds."""
        edges = np.flatnonzero(np.diff(speech_frames(self.levels()).astype(np.int8), prepend=0, append=0))
        return [(begin * self.frame, end * self.frame) for begin, end in (edges.reshape(-1, 2)).tolist()]

    def levels(self) -> np.ndarray:
        """(frames,) float64 in dB; what is left of less than a frame is dropped."""
        power = np.concatenate(self.powers) if self.powers else np.empty(0)
        return 10 * np.log10(np.maximum(power, 10 ** (FLOOR_DB / 10)))


def speech_frames(levels: np.ndarray) -> np.ndarray:
    """Mark the frames (frames,) bool that are speech by their levels in dB.

    The threshold lies ``SHARE`` of the way from the level of the quiet frames (10th percentile) to that of the loud
    ones (95th), and 20 to 40 dB below the latter: of a recording without pauses all is speech. Of a long recording with
    speech in less than one frame of twenty both are levels of the pauses: there the threshold lies as far of the way
    from the upper one to that of the loudest second. Pauses of up to ``GAP`` seconds between two frames of speech
    belong to it.
    """
    if not len(levels):
        return np.zeros(0, bool)
    quiet, loud = np.percentile(levels, (10, 95))
    loudest = np.partition(levels, -SECOND)[-SECOND] if len(levels) > 20 * SECOND else loud
    if loud - quiet < CONTRAST_DB < loudest - loud:
        threshold = max(loud + SHARE * (loudest - loud), loudest - RANGE_DB[1])
    else:
        threshold = np.clip(quiet + SHARE * (loud - quiet), loud - RANGE_DB[1], loud - RANGE_DB[0])
    speech = levels > max(threshold, FLOOR_DB)
    places = np.flatnonzero(speech)
    for a, b in itertools.pairwise(places):
        if 1 < b - a <= round(GAP / FRAME) + 1:
            speech[a:b] = True
    return speech


_models = threading.local()  # silero's keeps a state while it reads: one for each thread


class Silero:
    """Speech by silero-vad's network, in a recording that is given block by block and brought to 16 kHz."""

    def __init__(self):
        self.blocks, self.rate = [], SAMPLE_RATE

    def add(self, rate: int, block: np.ndarray):
        """Take the next block (samples, channels) of a recording of ``rate`` Hz."""
        self.blocks.append(block.mean(axis=1))
        self.rate = rate

    def spans(self) -> list[tuple[float, float]]:
        """Where speech is, (begin, end) in seconds."""
        import torch

        threads = torch.get_num_threads()
        import silero_vad

        torch.set_num_threads(threads)  # its import takes all but one
        if not hasattr(_models, "model"):
            with warnings.catch_warnings(record=True):  # of the form that its weights are kept in
                _models.model = silero_vad.load_silero_vad()
        x = np.concatenate([*self.blocks, np.zeros(0, np.float32)])
        x = torch.from_numpy(np.ascontiguousarray(resample(x, self.rate)))
        with torch.inference_mode():
            found = silero_vad.get_speech_timestamps(x, _models.model, sampling_rate=SAMPLE_RATE)
        return [(span["start"] / SAMPLE_RATE, span["end"] / SAMPLE_RATE) for span in found]


DETECTORS = {"energy": Energy, "silero": Silero}
VADS = ("none", *DETECTORS)  # values of the key ``vad``


def kept_spans(x: np.ndarray, sample_rate: int, vad: str) -> list[tuple[int, int]]:
    """What a detector keeps of a waveform (samples,): (begin, end) of its speech, with ``MARGIN`` on both sides.

    Of one with NaN or Inf it keeps all: that is what is wrong with it, not a lack of speech.
    """
    if vad == "none" or not np.isfinite(x).all():
        return [(0, len(x))]
    detector = DETECTORS[vad]()
    detector.add(sample_rate, x[:, None])
    kept: list[tuple[int, int]] = []
    for begin, end in detector.spans():
        first, last = max(round((begin - MARGIN) * sample_rate), 0), min(round((end + MARGIN) * sample_rate), len(x))
        if kept and first <= kept[-1][1]:
            kept[-1] = kept[-1][0], last
        else:
            kept.append((first, last))
    return kept


def joined(x: np.ndarray, spans: list[tuple[int, int]]) -> np.ndarray:
    """The spans of a waveform (samples,), one after the other."""
    return x if spans == [(0, len(x))] else np.concatenate([x[:0], *(x[begin:end] for begin, end in spans)])


def no_speech(vad: str) -> str:
    """What to say of a recording of which a detector keeps nothing."""
    return f"no speech in it (vad {vad})"


def extent(spans: list[tuple[float, float]]) -> tuple[float, float]:
    """Seconds from where to where a recording is kept if it is trimmed: its speech with ``MARGIN``; (0, 0) without."""
    return (max(spans[0][0] - MARGIN, 0.0), spans[-1][1] + MARGIN) if spans else (0.0, 0.0)
