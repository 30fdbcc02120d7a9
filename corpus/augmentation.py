"""MUSAN noise, music and babble, and room impulse responses, added to training crops."""

import functools
from pathlib import Path

import numpy as np
import scipy

from corpus.audio import AudioError, read_audio
from corpus.folders import find_recordings
from errors import UsageError

# voxceleb_trainer's ranges: signal-to-noise ratio in dB, and how many files are added.
SNR_DB = {"noise": (0, 15), "speech": (13, 20), "music": (5, 15)}
HOW_MANY = {"noise": (1, 1), "speech": (3, 7), "music": (1, 1)}
SILENT_POWER = 1e-10  # -100 dB of full scale: no signal-to-noise ratio can be set with such a file


def find_noise(musan_path) -> dict[str, list[str]]:
    """Find recordings below ``musan_path`` by the folder noise, speech or music they lie in, at any depth."""
    found = {category: [] for category in SNR_DB}
    root = Path(musan_path)
    for path in find_recordings(root):
        for part in path.relative_to(root).parts[:-1]:
            if part in found:
                found[part].append(str(path))
                break
    return found


def find_rirs(rir_path) -> list[str]:
    """Find impulse responses: the recordings below ``rir_path`` at any depth."""
    return [str(path) for path in find_recordings(rir_path)]


class AugmentWAV:
    """Apply one random augmentation to a crop: reverberation, music, babble (3 to 7 voices) or noise."""

    def __init__(self, musan_path: str, rir_path: str, probability: float = 0.8):
        self.probability = probability
        self.noise = find_noise(musan_path) if musan_path else {}
        self.rirs = find_rirs(rir_path) if rir_path else []
        for category, files in self.noise.items():
            if not files:
                raise UsageError(f"musan_path: no recording in a folder '{category}' below '{musan_path}'")
        if rir_path and not self.rirs:
            raise UsageError(f"rir_path: no recording below '{rir_path}'")
        if self.rirs:
            _ = scipy.signal  # takes a second to import: once, before the loader processes are made of this one
        self.kinds = (["reverb"] if self.rirs else []) + list(self.noise)
        if not self.kinds:
            raise UsageError("augment: needs musan_path or rir_path")

    def augment(self, x: np.ndarray, rng: np.random.Generator):
        """Return (x augmented (samples,) float32, list of draws, list of (event kind, file, reason) of unusable files).

        A draw that could not be used has a ``reason``.
        """
        if rng.random() >= self.probability:
            return x, [], []
        kind = self.kinds[rng.integers(len(self.kinds))]
        return self._reverberate(x, rng) if kind == "reverb" else self._add_noise(x, kind, rng)

    def _reverberate(self, x, rng):
        path = self.rirs[rng.integers(len(self.rirs))]
        try:
            rir = read_rir(path)
        except AudioError as error:
            reason = str(error)
            return x, [{"kind": "reverb", "path": path, "reason": reason}], [("augmentation", path, reason)]
        return reverberate(x, rir), [{"kind": "reverb", "path": path}], []

    def _add_noise(self, x, kind, rng):
        low, high = HOW_MANY[kind]
        files = self.noise[kind]
        count = min(int(rng.integers(low, high + 1)), len(files))
        signal_power = float(np.mean(np.square(x, dtype=np.float64)))
        mixed = x
        draws = []
        unusable = []
        for index in rng.choice(len(files), count, replace=False):
            path, snr, position = files[index], rng.uniform(*SNR_DB[kind]), rng.random()
            try:
                noise, start, *_ = read_audio(path, len(x), position)
                if not np.isfinite(noise).all():
                    raise AudioError("non-finite samples")
            except AudioError as error:
                draws.append({"kind": kind, "path": path, "reason": str(error)})
                unusable.append(("augmentation", path, str(error)))
                continue
            noise_power = float(np.mean(np.square(noise, dtype=np.float64)))
            draw = {"kind": kind, "path": path, "start": start, "snr_db": float(snr)}
            if noise_power < SILENT_POWER or not SILENT_POWER < signal_power < np.inf:
                draws.append({**draw, "gain": 0.0, "reason": "silent"})
                if noise_power < SILENT_POWER:
                    unusable.append(("silent noise", path, "a silent crop, adds nothing"))
                continue
            gain = float(np.sqrt(signal_power / noise_power / 10 ** (snr / 10)))
            mixed = mixed + np.float32(gain) * noise
            draws.append({**draw, "gain": gain})
        return mixed, draws, unusable


def reverberate(x: np.ndarray, rir: np.ndarray) -> np.ndarray:
    """Convolve a crop (samples,) with an impulse response, cut to its length."""
    return scipy.signal.fftconvolve(x, rir)[: len(x)].astype(np.float32)


def apply_draws(x: np.ndarray, draws: list[dict]) -> np.ndarray:
    """Augment a clean crop (samples,) again as its recorded draws say; AudioError if a file cannot be read."""
    for draw in draws:
        if "reason" in draw:  # could not be used then either
            continue
        if draw["kind"] == "reverb":
            x = reverberate(x, read_rir(draw["path"]))
        else:
            noise, *_ = read_audio(draw["path"], len(x), start=draw["start"])
            x = x + np.float32(draw["gain"]) * noise
    return x


@functools.lru_cache(maxsize=1024)
def read_rir(path: str) -> np.ndarray:
    """Read an impulse response, scaled to unit energy; of several channels the first."""
    rir, *_ = read_audio(path, first_channel=True)
    energy = float(np.sum(np.square(rir, dtype=np.float64)))
    if not np.isfinite(energy) or energy < SILENT_POWER:
        raise AudioError("impulse response without energy" if np.isfinite(energy) else "non-finite samples")
    return (rir / np.sqrt(energy)).astype(np.float32)
