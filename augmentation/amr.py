"""AMR narrowband, the codec of calls over GSM and UMTS networks, at 8 kHz."""

import importlib.util
import io

import numpy as np

from augmentation.ranges import within
from augmentation.waveforms import resampled
from config import SAMPLE_RATE

RATE, DELAY = 8000, 40  # Hz; samples that encoder and decoder are late
MODES = (4750, 5150, 5900, 6700, 7400, 7950, 10200, 12200)  # bit/s of 3GPP TS 26.071


class Augmentation:
    """Encodes and decodes at one of the codec's bit rates within ``kbps``, by PyAV."""

    def __init__(self, kbps=(4.75, 12.2)):
        low, high = within("kbps", kbps, 4.75, 12.2)
        self.modes = [mode for mode in MODES if low <= mode / 1000 <= high]
        if not self.modes:
            known = ", ".join(f"{mode / 1000:g}" for mode in MODES)
            raise ValueError(f"kbps: {list(kbps)}, expected a range with one of {known}")
        check_codec()

    def draw(self, x, rng, sounds) -> dict:
        """Draw a bit rate."""
        return {"bit_rate": self.modes[int(rng.integers(len(self.modes)))]}

    @staticmethod
    def apply(x, draw: dict, sounds, sample_rate=SAMPLE_RATE):
        """Encode and decode; a crop that is not finite stays as it is."""
        if draw["bit_rate"] not in MODES:
            raise ValueError(f"a bit rate of {draw['bit_rate']}")
        peak = float(np.abs(x).max())
        if not np.isfinite(peak):
            return x
        scale = np.float32(max(peak, 1.0))
        given = np.clip(resampled(x / scale, RATE, sample_rate), -1, 1)
        decoded = through_amr(np.pad(given, (0, DELAY)), draw["bit_rate"])[DELAY:]
        back = resampled(decoded, sample_rate, RATE)[: len(x)]
        return scale * np.pad(back, (0, len(x) - len(back)))


def check_codec():
    """ValueError if PyAV is missing, or is one without the codec."""
    if importlib.util.find_spec("av") is None:
        raise ValueError("needs PyAV, which is not installed; pip install av brings it")
    import av

    if "libopencore_amrnb" not in av.codecs_available:
        raise ValueError(f"PyAV {av.__version__} has no encoder of AMR; pip install -U av brings one")


def through_amr(x: np.ndarray, bit_rate: int) -> np.ndarray:
    """Encode and decode samples (samples,) float32 in [-1, 1] at 8 kHz."""
    import av

    coded = io.BytesIO()
    with av.open(coded, "w", format="amr") as file:
        stream = file.add_stream("libopencore_amrnb", rate=RATE, layout="mono")
        stream.bit_rate = bit_rate
        short = np.round(x * np.float32(32767)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(short[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        for packet in (*stream.encode(frame), *stream.encode(None)):
            file.mux(packet)
    coded.seek(0)
    with av.open(coded, format="amr") as file:
        parts = [frame.to_ndarray().reshape(-1) for frame in file.decode(audio=0)]
    found = np.concatenate(parts)
    return found.astype(np.float32) / np.float32(32768) if found.dtype == np.int16 else found.astype(np.float32)
