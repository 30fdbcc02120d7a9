"""Changes to a workspace's copied voices: bad samples, bad files, impulse responses, noise, lists."""

import os
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000
SAMPLE = 6000  # inside every crop of 60 frames of an utterance of 0.77 to 1.04 s
FIRST, SECOND = "train002/session1/00001", "train004/session2/00002"  # utterances that faults are put into


def rewrite(workspace, name: str, change, subtype="FLOAT") -> Path:
    """Replace a training utterance by a WAV file of changed samples; the lists name it then."""
    old, new = workspace.data / "wav" / f"{name}.flac", workspace.data / "wav" / f"{name}.wav"
    samples, _ = soundfile.read(old, dtype="float64")
    changed = change(samples)
    soundfile.write(new, samples if changed is None else changed, RATE, subtype=subtype)
    old.unlink()
    for name_of_list in ("train_list.txt", "trials.txt"):
        path = workspace.data / name_of_list
        path.write_text(path.read_text().replace(f"{name}.flac", f"{name}.wav"))
    return new


def spoil(name: str, change, subtype="FLOAT"):
    """A preparation that rewrites one utterance."""
    return lambda workspace: rewrite(workspace, name, change, subtype)


def together(*preparations):
    """A preparation of several."""

    def prepare(workspace):
        for each in preparations:
            each(workspace)

    return prepare


def at(index: int, value: float):
    """Set one sample."""

    def change(samples):
        samples[index] = value

    return change


def times(factor: float):
    """Scale the samples."""
    return lambda samples: samples * factor


def silence(samples):
    """All zero."""
    return samples * 0.0


def square_wave(samples):
    """As loud as a file can be."""
    return np.where(samples < 0, -1.0, 1.0)


def every_file(change):
    """A preparation that rewrites all utterances of the train list."""

    def prepare(workspace):
        for path in sorted((workspace.data / "wav").glob("train*/*/*.flac")):
            rewrite(workspace, str(path.relative_to(workspace.data / "wav").with_suffix("")), change)

    return prepare


def replace_bytes(name: str, content):
    """A preparation that overwrites a file below wav/; ``content`` makes the new bytes from the old."""

    def prepare(workspace):
        path = workspace.data / "wav" / name
        path.write_bytes(content(path.read_bytes()))

    return prepare


def impulse_responses(bad):
    """A preparation: three impulse responses in data/rir, of which ``bad`` (samples -> samples) changes 1.wav."""

    def prepare(workspace):
        folder = workspace.data / "rir"
        folder.mkdir()
        rng = np.random.default_rng(5)
        for number in range(3):
            samples = rng.normal(0, 1, 800) * np.exp(-np.arange(800) / 100)
            soundfile.write(folder / f"{number}.wav", bad(samples) if number == 1 else samples, RATE, subtype="FLOAT")

    return prepare


def noises(bad):
    """A preparation: noise, music and speech files in data/musan, of which ``bad`` changes noise/1.wav."""

    def prepare(workspace):
        rng = np.random.default_rng(6)
        for category in ("noise", "music", "speech"):
            (workspace.data / "musan" / category).mkdir(parents=True)
            for number in range(3):
                samples = rng.normal(0, 0.1, RATE)
                samples = bad(samples) if (category, number) == ("noise", 1) else samples
                path = workspace.data / "musan" / category / f"{number}.wav"
                soundfile.write(path, samples, RATE, subtype="FLOAT")

    return prepare


REVERB = {"augment": True, "augment_prob": 1.0, "rir_path": "@data/rir"}
NOISE = {"augment": True, "augment_prob": 1.0, "musan_path": "@data/musan"}


def leave_out(workspace, path: str):
    """Remove a file as an advised user would: from the lists, else from its noise or impulse response folder."""
    inside = os.path.relpath(path, workspace.data / "wav")
    for name in ("train_list.txt", "trials.txt"):
        file = workspace.data / name
        lines = file.read_text().splitlines()
        left = [line for line in lines if inside not in line.split()[1:]]
        if len(left) < len(lines):
            file.write_text("\n".join(left) + "\n")
            return
    Path(path).unlink(missing_ok=True)
