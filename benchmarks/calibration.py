"""What a calibration is worth on other speakers and other lengths, and what several recordings of a speaker bring.

python benchmarks/calibration.py --initial_model MODEL --held_out PEOPLE.txt --trials trials.txt --root WAV --noise DIR

MODEL was trained without the speakers of the train list PEOPLE.txt, on whose trials the calibrations are learnt;
trials.txt are trials of others again. Recordings are whole, or cut to 1 and 2 s, or have a noise of 0 dB. --cache FILE
keeps the embeddings.
"""

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np
import scipy.signal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from corpus.acoustics import Acoustics
from corpus.audio import decibels, least_samples, read_crop, resample, samples_of, wrap_pad
from corpus.folders import find_recordings
from corpus.lists import read_train_list, read_trials
from scoring.calibration import LogisticCalibration
from scoring.cosine import length_normalize
from scoring.enrollment import enrollment_weights
from scoring.error_rates import ErrorRates
from scoring.held_out import make_trials
from scoring.mismatch import Heard

CROP, CROPS = 300, 4  # frames, and how many of a file: an evaluation by crops
LENGTHS, NOISY = {"2 s": 2, "1 s": 1}, "noise 0 dB"
ENROLLED, TRIES = 5, 20
PRIOR = 0.05
MEASURES = {
    "duration": lambda heard, x: np.log(heard.seconds),
    "magnitude": lambda heard, x: np.linalg.norm(x),
    "SNR": lambda heard, x: min(heard.snr, 40.0),
}


def with_noise(x, noise) -> np.ndarray:
    """A waveform with a noise of the same level, repeated to its length."""
    noise = np.resize(noise, len(x))
    return x + np.float32(10 ** ((decibels(x) - decibels(noise)) / 20)) * noise


def embed_all(model, root, held_out, others, noises) -> tuple[dict, dict]:
    """{(kind, file): embedding} and {(kind, file): Acoustics} of each file whole, cut and with noise, and in crops."""
    found, heard = {}, {}
    for number, file in enumerate([*held_out, *others]):
        rng, x = np.random.default_rng(number), read_crop(Path(root, file)).x
        kinds = {"whole": x}
        for kind, seconds in LENGTHS.items():
            begin = rng.integers(max(len(x) - seconds * 16000, 0) + 1)
            kinds[kind] = x[begin : begin + seconds * 16000]
        kinds[NOISY] = with_noise(x, noises[rng.integers(len(noises))])
        for kind, y in kinds.items():
            found[kind, file] = model.embed_batch(wrap_pad(y, least_samples())[None])[0]
            heard[kind, file] = Acoustics.of(y)
        if number < len(held_out):
            y = wrap_pad(x, samples_of(CROP) + 1)
            begins = np.linspace(0, len(y) - samples_of(CROP), CROPS).astype(int)
            found["crops", file] = model.embed_batch(np.stack([y[b : b + samples_of(CROP)] for b in begins]))
    return found, heard


class Condition:
    """Trials whose sides are of some kinds: scores, and both sides' measures."""

    def __init__(self, trials, found, heard, first: str, second):
        self.labels, names, others = trials
        kinds = [second] * len(others) if isinstance(second, str) else second
        left, right = [(first, file) for file in names], list(zip(kinds, others))
        a, b = (length_normalize(np.stack([found[key] for key in side])) for side in (left, right))
        many = a.ndim == 3  # crops: the mean of their scores
        self.scores = np.einsum("ncd,nkd->n", a, b) / a.shape[1] / b.shape[1] if many else np.einsum("nd,nd->n", a, b)
        self.columns = {}
        for name, measure in MEASURES.items() if not many else ():
            sides = [[measure(heard[key], found[key]) for key in side] for side in (left, right)]
            self.columns[name] = np.column_stack([np.minimum(*sides), np.maximum(*sides)])

    def features(self, measures) -> np.ndarray:
        """The score and the measures beside it (N, K)."""
        return np.column_stack([self.scores, *(self.columns[name] for name in measures)])


def learn(condition: Condition, measures=()):
    """A calibration of a condition's trials."""
    x = condition.features(measures)
    return LogisticCalibration.fit(x, condition.labels, PRIOR, tuple(map(str, range(x.shape[1]))))


def figures(llrs, labels) -> str:
    """EER, minDCF, actDCF, Cllr and minCllr."""
    rates = ErrorRates.of(llrs, labels)
    costs = float(rates.min_dcf(PRIOR)[0]), float(rates.act_dcf(PRIOR)), float(rates.cllr()), float(rates.min_cllr())
    return f"{100 * float(rates.eer()[0]):6.2f}  " + "  ".join(f"{cost:7.3f}" for cost in costs)


def calibrations(held_out, trials, found, heard):
    """Print what calibrations learnt on the held-out trials cost on the others, by length."""
    whole = Condition(held_out, found, heard, "whole", "whole")
    kinds = np.array(["whole", *LENGTHS])[np.random.default_rng(0).integers(0, 1 + len(LENGTHS), len(held_out[0]))]
    mixed = Condition(held_out, found, heard, "whole", kinds.tolist())
    ways = [("crops", Condition(held_out, found, heard, "crops", "crops"), ()), ("whole files", whole, ())]
    several = (("duration",), ("duration", "magnitude"), ("duration", "SNR"))
    ways += [(f"whole files, {' '.join(names)}", whole, names) for names in several]
    ways += [("mixed lengths", mixed, ())]
    ways += [(f"mixed lengths, {' '.join(names)}", mixed, names) for names in several]
    tests = {kind: Condition(trials, found, heard, "whole", kind) for kind in ("whole", *LENGTHS, NOISY)}
    tests["1 s both"] = Condition(trials, found, heard, "1 s", "1 s")
    print(f"{'test':<11} {'learnt on':<34} EER %   minDCF   actDCF     Cllr  minCllr")
    for kind, test in tests.items():
        for name, condition, measures in ways:
            llrs = learn(condition, measures).llrs(test.features(measures))
            print(f"{kind:<11} {name:<34} {figures(llrs, test.labels)}")
    for name, condition, measures in ways:
        chosen = [tests[kind] for kind in ("whole", *LENGTHS)]
        llrs = np.concatenate([learn(condition, measures).llrs(test.features(measures)) for test in chosen])
        print(f"{'all three':<11} {name:<34} {figures(llrs, np.tile(trials[0], len(chosen)))}")


def warnings(held_out, trials, root, noises):
    """Print how many recordings are said to be unlike those of the calibration."""
    known = Heard.in_files([str(Path(root, file)) for file in sorted({*held_out[1], *held_out[2]})])
    band = scipy.signal.butter(4, (300, 3400), "bandpass", fs=8000, output="sos")
    changes = {
        "as they are": lambda x, rng: x,
        "telephone band": lambda x, rng: resample(
            scipy.signal.sosfilt(band, resample(x, 16000, sample_rate=8000)).astype(np.float32), 8000
        ),
        "1 s": lambda x, rng: x[len(x) // 2 - 8000 : len(x) // 2 + 8000],
        "40 dB fainter": lambda x, rng: x / 100,
        "noise at 0 dB": lambda x, rng: with_noise(x, noises[rng.integers(len(noises))]),
        "white noise at 0 dB": lambda x, rng: with_noise(x, rng.standard_normal(len(x)).astype(np.float32)),
    }
    files = sorted({*trials[1], *trials[2]})
    for name, change in changes.items():
        sounds = []
        for number, file in enumerate(files):
            x = change(read_crop(Path(root, file)).x, np.random.default_rng(number))
            sounds.append(Acoustics.of(x.astype(np.float32)))
        share = np.mean([bool(known.unlike(sound)) for sound in sounds])
        print(f"{name:<20} {100 * share:5.1f} % of {len(files)} recordings are unlike those of the calibration")


def enrollments(trials, found, heard):
    """Print the EER of models of several recordings, by equal weights and by quality."""
    people = {}
    for file in sorted({*trials[1], *trials[2]}):
        people.setdefault(file.partition("/")[0], []).append(file)
    people = {name: files for name, files in people.items() if len(files) > ENROLLED}
    spoilt = {
        "all clean": (0, NOISY),
        "one with noise": (1, NOISY),
        "two with noise": (2, NOISY),
        "one of 1 s": (1, "1 s"),
    }
    for title, (count, kind) in spoilt.items():
        rows = {"equal": [], "by quality": []}
        for attempt in range(TRIES):
            rng, models, tests = np.random.default_rng(attempt), [], []
            for name, files in people.items():
                order = [files[i] for i in rng.permutation(len(files))]
                keys = [(kind if i < count else "whole", file) for i, file in enumerate(order[:ENROLLED])]
                models.append((name, keys))
                tests += [(name, ("whole", file)) for file in order[ENROLLED:]]
            labels = np.array([a[:2] == b[:2] and a == b for a, _ in models for b, _ in tests])
            alike = np.array([a[:2] == b[:2] for a, _ in models for b, _ in tests])  # one corpus
            right = length_normalize(np.stack([found[key] for _, key in tests]))
            for way, of_way in rows.items():
                means = []
                for _, keys in models:
                    x = length_normalize(np.stack([found[key] for key in keys]))
                    weights = enrollment_weights([heard[key] for key in keys])
                    means.append(np.average(x, axis=0, weights=weights if way != "equal" else None))
                scores = (length_normalize(np.stack(means)) @ right.T).ravel()[alike]
                of_way.append(100 * float(ErrorRates.of(scores, labels[alike].astype(int)).eer()[0]))
        better = np.mean(np.array(rows["by quality"]) <= rows["equal"])
        shown = ", ".join(f"{way} {np.mean(values):.2f} %" for way, values in rows.items())
        print(f"{ENROLLED} enrolled, {title:<15} EER {shown}; by quality no worse in {100 * better:.0f} % of draws")


def main():
    """Embed, or read the cache, and print all."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for flag in ("initial_model", "held_out", "trials", "root", "noise"):
        p.add_argument(f"--{flag}", required=True)
    p.add_argument("--cache", default="")
    a = p.parse_args()
    _, numbers, paths, _ = read_train_list(a.held_out)
    trials, held_out = read_trials(a.trials), make_trials(numbers, paths, 1500, 1, 0, 2)
    noises = [read_crop(path).x for path in find_recordings(a.noise)]
    warnings(held_out, trials, a.root, noises)
    if a.cache and Path(a.cache).is_file():
        found, heard = pickle.loads(Path(a.cache).read_bytes())
    else:
        from speaker_model import load_model

        found, heard = embed_all(load_model(a.initial_model), a.root, paths, sorted({*trials[1], *trials[2]}), noises)
        if a.cache:
            Path(a.cache).write_bytes(pickle.dumps((found, heard)))
    calibrations(held_out, trials, found, heard)
    enrollments(trials, found, heard)


if __name__ == "__main__":
    main()
