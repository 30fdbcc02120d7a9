"""Noise, impulse responses, and what augments with them."""

import numpy as np
import scipy
import soundfile

from corpus.augmentation import AugmentWAV
from settings.policy import checked

RATE = 16000
SNR_DB = {"noise": (0, 15), "speech": (13, 20), "music": (5, 15)}  # voxceleb_trainer's


def make(folder):
    """Write noise of two seconds below a folder, and impulse responses with an RT60 of 0.3 s, their peak after 5 ms."""
    rng = np.random.default_rng(0)
    for category in SNR_DB:
        (folder / "musan" / category).mkdir(parents=True)
        for number in range(8):
            soundfile.write(folder / "musan" / category / f"{number}.wav", rng.normal(0, 0.1, 2 * RATE), RATE)
    (folder / "rir").mkdir()
    for number in range(4):
        rir = rng.normal(0, 0.05, 6000) * 10 ** (-3 * np.arange(6000) / (0.3 * RATE))
        rir[80] = 1.0
        soundfile.write(folder / "rir" / f"{number}.wav", 0.9 * rir, RATE)
    return folder


def augmenter(around, policy, **more):
    return AugmentWAV(str(around / "musan"), str(around / "rir"), policy=checked(policy, "augmentation"), **more)


def voice(seed=0, seconds=1.5):
    rng = np.random.default_rng(seed)
    x = scipy.signal.lfilter([1], [1, -0.9], rng.normal(0, 0.05, int(seconds * RATE)))
    return (x * (1 + np.sin(2 * np.pi * 3 * np.arange(len(x)) / RATE)) / 2).astype(np.float32)
