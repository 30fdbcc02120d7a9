"""MUSAN noise, music and babble, and room impulse responses, added to training crops."""

from pathlib import Path

import numpy as np

from corpus.audio import AudioError
from corpus.folders import find_recordings
from corpus.sound_pack import UNCACHED, packed
from corpus.sounds import SILENT_POWER, Sounds, read_noise, read_rir
from corpus.waveforms import convolve, energy
from errors import UsageError

# voxceleb_trainer's ranges: signal-to-noise ratio in dB, and how many files are added.
SNR_DB = {"noise": (0, 15), "speech": (13, 20), "music": (5, 15)}
HOW_MANY = {"noise": (1, 1), "speech": (3, 7), "music": (1, 1)}


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
    """Apply one random augmentation to a crop: reverberation, music, babble (3 to 7 voices) or noise.

    ``cache``: the folder for packs of the files, UNCACHED to read the files themselves.
    """

    def __init__(self, musan_path: str, rir_path: str, probability: float = 0.8, cache: str = UNCACHED):
        self.probability = probability
        noise = find_noise(musan_path) if musan_path else {}
        rirs = find_rirs(rir_path) if rir_path else []
        for category, files in noise.items():
            if not files:
                raise UsageError(f"musan_path: no recording in a folder '{category}' below '{musan_path}'")
        if rir_path and not rirs:
            raise UsageError(f"rir_path: no recording below '{rir_path}'")
        self.kinds = (["reverb"] if rirs else []) + list(noise)
        if not self.kinds:
            raise UsageError("augment: needs musan_path or rir_path")
        files = [path for found in noise.values() for path in found]
        self.noise = Sounds(files, "mix", packed(musan_path, files, "mix", cache) if files else None)
        self.rirs = Sounds(rirs, "1", packed(rir_path, rirs, "1", cache) if rirs else None)
        ends = np.cumsum([0, *map(len, noise.values())]).tolist()
        self.ranges = {category: (ends[i], ends[i + 1]) for i, category in enumerate(noise)}

    def augment(self, x: np.ndarray, rng: np.random.Generator):
        """Return (x augmented (samples,) float32, list of draws, list of (event kind, file, reason) of unusable files).

        A draw that could not be used has a ``reason``.
        """
        if rng.random() >= self.probability:
            return x, [], []
        kind = self.kinds[rng.integers(len(self.kinds))]
        return self._reverberate(x, rng) if kind == "reverb" else self._add_noise(x, kind, rng)

    def _reverberate(self, x, rng):
        number = int(rng.integers(len(self.rirs)))
        path = self.rirs.path(number)
        try:
            rir = self.rirs.response(number)
        except AudioError as error:
            reason = str(error)
            return x, [{"kind": "reverb", "path": path, "reason": reason}], [("augmentation", path, reason)]
        return convolve(x, rir), [{"kind": "reverb", "path": path}], []

    def _add_noise(self, x, kind, rng):
        low, high = HOW_MANY[kind]
        first, end = self.ranges[kind]
        count = min(int(rng.integers(low, high + 1)), end - first)
        signal_power = energy(x) / len(x)
        mixed = x
        draws = []
        unusable = []
        for number in rng.choice(end - first, count, replace=False).tolist():
            path, snr, position = self.noise.path(first + number), rng.uniform(*SNR_DB[kind]), rng.random()
            try:
                noise, start = self.noise.crop(first + number, len(x), position)
            except AudioError as error:
                draws.append({"kind": kind, "path": path, "reason": str(error)})
                unusable.append(("augmentation", path, str(error)))
                continue
            noise_power = energy(noise) / len(x)
            draw = {"kind": kind, "path": path, "start": start, "snr_db": float(snr)}
            if noise_power < SILENT_POWER or not SILENT_POWER < signal_power < np.inf:
                draws.append({**draw, "gain": 0.0, "reason": "silent"})
                if noise_power < SILENT_POWER:
                    unusable.append(("silent noise", path, "a silent crop, adds nothing"))
                continue
            gain = float(np.sqrt(signal_power / noise_power / 10 ** (snr / 10)))
            mixed = mix(mixed, noise, gain)
            draws.append({**draw, "gain": gain})
        return mixed, draws, unusable


def mix(x: np.ndarray, noise: np.ndarray, gain: float) -> np.ndarray:
    """Add noise times ``gain`` to a crop, both (samples,) float32."""
    scaled = np.float32(gain) * noise
    scaled += x
    return scaled


def apply_draws(x: np.ndarray, draws: list[dict]) -> np.ndarray:
    """Augment a clean crop (samples,) again as its recorded draws say; AudioError if a file cannot be read."""
    for draw in draws:
        if "reason" in draw:  # could not be used then either
            continue
        if draw["kind"] == "reverb":
            x = convolve(x, read_rir(draw["path"]))
        else:
            x = mix(x, read_noise(draw["path"], len(x), start=draw["start"])[0], draw["gain"])
    return x
