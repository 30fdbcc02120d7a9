"""Measure how many training crops a second the loader delivers, beside a loop as voxceleb_trainer has it and the limit.

python benchmarks/loader.py                                                  # makes its own voices, noise and rooms
python benchmarks/loader.py --train_list L --train_path wav --musan_path musan_split --rir_path rirs --json out.json
python benchmarks/loader.py --augment_on                                     # in the processes, and on the device

Loaders take turns in one run, for each number of worker processes: this project's with full augmentation, from files
and from a pack of pack_data.py; whole files read as float64, augmented as voxceleb_trainer does and collated by torch;
and bare slices of one memory-mapped int16 file, which is the limit. Ratios are of neighbours in time, with the smallest
and the largest.
"""

import argparse
import contextlib
import cProfile
import io
import json
import platform
import pstats
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import soundfile
import torch
from bench_training import machine
from scipy import signal
from torch.utils.data import DataLoader, Dataset

import make_demo_data
import pack_data
from corpus.audio import samples_of
from corpus.augmentation import find_noise, find_rirs
from corpus.lists import read_train_list
from corpus.loader import Loader
from DatasetLoader import SpeakerBatchSampler, TrainDataset, collate
from settings.reader import load_config
from training.allocator import keep_freed_memory
from training.batches import on_device

RATE = 16000
# voxceleb_trainer's ranges: signal-to-noise ratio in dB, and how many files are added.
SNR_DB = {"noise": (0, 15), "speech": (13, 20), "music": (5, 15)}
HOW_MANY = {"noise": (1, 1), "speech": (3, 7), "music": (1, 1)}
PREFETCH = 3  # batches that each process prepares ahead
NAMES = {
    "ours": "this project",
    "plain": "as voxceleb_trainer",
    "pack": "this project, pack",
    "limit": "bare int16 slices",
}


# ----------------------------------------------------------------------------------------------------------- data


def make_set(folder: Path, speakers: int, seconds: float, ending: str = "wav") -> dict[str, str]:
    """Make voices of ``seconds``, noise cut into 5 s and impulse responses below ``folder`` -> keys of a run."""
    size = ["--speakers", str(speakers), "--trial_speakers", "2", "--utterances", "8", "--seconds", str(seconds)]
    with contextlib.redirect_stdout(io.StringIO()):
        make_demo_data.main(["--out", str(folder / "voices"), *size])
    lines = []
    for line in (folder / "voices" / "train_list.txt").read_text(encoding="utf-8").splitlines():
        speaker, path = line.split()
        target = (folder / "wav" / path).with_suffix(f".{ending}")
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target, *soundfile.read(folder / "voices" / "wav" / path))
        lines.append(f"{speaker} {target.relative_to(folder / 'wav').as_posix()}\n")
    (folder / "train_list.txt").write_text("".join(lines), encoding="utf-8")
    make_surroundings(folder)
    keys = {"train_list": "train_list.txt", "train_path": "wav", "musan_path": "musan", "rir_path": "rir"}
    return {key: str(folder / name) for key, name in keys.items()}


def make_surroundings(folder: Path, noises: int = 200, rirs: int = 2000):
    """Write noise in the layout of MUSAN cut into pieces, and impulse responses of rooms with an RT60 of 0.2 to 1 s."""
    rng = np.random.default_rng(1)
    for category in SNR_DB:
        for number in range(noises):
            place = folder / "musan" / category / "source" / f"{number}"
            place.mkdir(parents=True)
            colour = signal.lfilter([1], [1, -rng.uniform(0, 0.95)], rng.normal(0, 1, 5 * RATE))
            soundfile.write(place / "00000.wav", 0.1 * colour / colour.std(), RATE)
    for number in range(rirs):  # more than a cache of single files would hold
        place = folder / "rir" / "room" / f"{number // 100}"
        place.mkdir(parents=True, exist_ok=True)
        decay = rng.uniform(0.2, 1.0)
        time_s = np.arange(int(decay * 0.75 * RATE)) / RATE  # cut at -45 dB
        rir = rng.normal(0, 0.05, len(time_s)) * 10 ** (-3 * time_s / decay)
        rir[0] = 1.0
        soundfile.write(place / f"{number}.wav", 0.9 * rir, RATE)


# -------------------------------------------------------------------------------------------------------- loaders


class PlainDataset(Dataset):
    """Crops as voxceleb_trainer makes them: whole files in float64, one of five treatments, each file read anew."""

    def __init__(self, keys: dict[str, str], frames: int):
        _, self.labels, paths, _ = read_train_list(keys["train_list"])
        self.paths = [str(Path(keys["train_path"], path)) for path in paths]
        self.samples = samples_of(frames)
        self.noise = find_noise(keys["musan_path"])
        self.rirs = find_rirs(keys["rir_path"])

    def __len__(self):
        return len(self.paths)

    def read(self, path) -> np.ndarray:
        """A crop (1, samples) float64 at random of a file that is read to its end."""
        x, _ = soundfile.read(path)
        if len(x) <= self.samples:
            x = np.pad(x, (0, self.samples - len(x) + 1), "wrap")
        start = int(random.random() * (len(x) - self.samples))
        return x[start : start + self.samples].astype(float)[None]

    def __getitem__(self, index):
        x = self.read(self.paths[index])
        kind = random.choice(["none", "reverb", *SNR_DB])
        if kind == "reverb":
            rir, _ = soundfile.read(random.choice(self.rirs))
            rir = rir.astype(float)[None]
            x = signal.convolve(x, rir / np.sqrt(np.sum(rir**2)), mode="full")[:, : self.samples]
        elif kind != "none":
            level, noises = decibels(x), []
            for path in random.sample(self.noise[kind], random.randint(*HOW_MANY[kind])):
                noise = self.read(path)
                snr = random.uniform(*SNR_DB[kind])
                noises.append(np.sqrt(10 ** ((level - decibels(noise) - snr) / 10)) * noise)
            x = np.sum(np.concatenate(noises), axis=0, keepdims=True) + x
        return torch.FloatTensor(x), self.labels[index]


def decibels(x: np.ndarray) -> float:
    """Level of a waveform as voxceleb_trainer computes it."""
    return 10 * np.log10(np.mean(x**2) + 1e-4)


class Slices(Dataset):
    """Crops of one memory-mapped int16 file, as they lie there."""

    def __init__(self, path: Path, samples: int):
        self.audio = np.memmap(path, np.int16, "r")
        self.samples = samples

    def __len__(self):
        return len(self.audio) // self.samples

    def __getitem__(self, index):
        start = int(np.random.default_rng(index).integers(len(self.audio) - self.samples))
        return np.array(self.audio[start : start + self.samples])


def collate_slices(rows):
    """Stack int16 crops."""
    return torch.from_numpy(np.stack(rows))


def pack_speech(keys: dict[str, str], path: Path):
    """Write all speech as int16, one file after another."""
    _, _, paths, _ = read_train_list(keys["train_list"])
    with open(path, "wb") as out:
        for name in paths:
            out.write(soundfile.read(Path(keys["train_path"], name), dtype="int16")[0].tobytes())


class Turn:
    """A loader that is measured for some seconds whenever its turn comes; its worker processes stay."""

    def __init__(self, loader, wait_for: int, between=lambda: None):
        self.loader, self.wait_for, self.between, self.epoch = loader, wait_for, between, 0

    def batches(self):
        """Batches, epoch after epoch."""
        while True:
            self.between()
            for batch in self.loader:
                yield batch["data"].shape[1] if isinstance(batch, dict) else len(batch[0] if len(batch) == 2 else batch)

    def measure(self, seconds: float) -> float:
        """Crops a second, once as many batches have come as can have waited."""
        stream, count = self.batches(), 0
        for _ in range(self.wait_for):
            next(stream)
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            count += next(stream)
        rate = count / (time.perf_counter() - begin)
        stream.close()
        return rate


def ours(keys: dict[str, str], args, workers: int, folder: Path) -> Turn:
    """This project's loader."""
    words = [f"--{name}={value}" for name, value in {**keys, **args.settings}.items()]
    words += ["--augment", f"--batch_size={args.batch_size}", f"--max_frames={args.frames}"]
    words += [f"--save_path={folder}/run", "--model=ECAPA_TDNN", "--trainfunc=aamsoftmax"]
    config = load_config(words)[0]
    dataset, epochs = TrainDataset(config), iter(range(1, 1 << 30))
    sampler = SpeakerBatchSampler(dataset, config, False)
    loader = Loader(dataset, sampler, collate, config, workers, keep=workers > 0)
    return Turn(loader, 1 + workers * PREFETCH, lambda: sampler.set_position(next(epochs)))


def build(keys: dict[str, str], args, workers: int, folder: Path) -> dict[str, Turn]:
    """The loaders to compare, by their short names."""
    plain, slices = PlainDataset(keys, args.frames), Slices(folder / "speech.int16", samples_of(args.frames))
    options = {"batch_size": args.batch_size, "num_workers": workers, "persistent_workers": workers > 0}
    options |= {"prefetch_factor": PREFETCH} if workers else {}
    wait_for = 1 + workers * PREFETCH
    return {
        "ours": ours(keys, args, workers, folder),
        "plain": Turn(DataLoader(plain, shuffle=True, drop_last=True, **options), wait_for),
        "pack": ours({**keys, "train_pack": str(folder / "pack")}, args, workers, folder),
        "limit": Turn(DataLoader(slices, shuffle=True, collate_fn=collate_slices, **options), wait_for),
    }


# ------------------------------------------------------------------------------------------------------- measuring


def compare(turns: dict[str, Turn], rounds: int, seconds: float) -> dict:
    """Let the loaders take turns: {name: median crops a second}, ratios and shares of the limit with their extremes."""
    rates = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            rates[name].append(turn.measure(seconds))

    def over(name, other):
        values = np.divide(rates[name], rates[other])
        return [float(value) for value in (np.median(values), values.min(), values.max())]

    return {
        **{name: float(np.median(values)) for name, values in rates.items()},
        "ratio": over("ours", "plain"),
        "ratio_pack": over("pack", "plain"),
        "share_of_limit": over("pack", "limit"),
        "rates": rates,
    }


def table(results: dict[int, dict]) -> list[str]:
    """The results as lines of a table."""
    heads = ["workers", *NAMES.values(), "ratio", "ratio of the pack", "pack of the limit"]
    lines = [f"| {' | '.join(heads)} |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for workers, found in results.items():
        cells = [str(workers), *(f"{found[name]:,.0f}" for name in NAMES)]
        cells += ["{:.2f} ({:.2f} to {:.2f})".format(*found[name]) for name in ("ratio", "ratio_pack")]
        lines.append(f"| {' | '.join(cells)} | {100 * found['share_of_limit'][0]:.1f} % |")
    return lines


def places(keys: dict[str, str], args, workers: int, folder: Path) -> str:
    """A row of a table: crops a second from a pack by where they are augmented, bytes of a batch, the device's part."""
    keys = {**keys, "train_pack": str(folder / "pack")}
    turns = {where: ours({**keys, "augment_on": where}, args, workers, folder) for where in ("worker", "device")}
    rates: dict[str, list] = {where: [] for where in turns}
    for _ in range(args.rounds):
        for where, turn in turns.items():
            rates[where].append(turn.measure(args.seconds))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    turns["device"].between()
    sizes, seconds = {"worker": [], "device": []}, []
    for batch in turns["device"].loader:
        sizes["worker"].append(batch["data"].nbytes)
        sizes["device"].append(batch["data"].nbytes + sum(t.nbytes for t in batch["waiting"].tensors.values()))
        begin = time.perf_counter()
        on_device(batch, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    cells = [str(workers), *(f"{np.median(rates[where]):,.0f}" for where in turns)]
    cells += [f"{np.mean(sizes[where]) / 1e6:.1f}" for where in turns]
    return f"| {' | '.join([*cells, f'{1e3 * statistics.median(seconds):.1f} on {device}'])} |"


PLACES = ["workers", "worker", "device", "MB a batch, worker", "MB a batch, device", "device's part, ms a batch"]


def profile(turn: Turn, seconds: float) -> str:
    """The functions of this project's loader in which most of the time goes."""
    profiler, text = cProfile.Profile(), io.StringIO()
    turn.measure(0.5)
    profiler.enable()
    turn.measure(seconds)
    profiler.disable()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(25)
    return text.getvalue()


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for key in ("train_list", "train_path", "musan_path", "rir_path"):
        parser.add_argument(f"--{key}", help="of a set of your own; all four or none")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="worker processes (default 0 1 2)")
    parser.add_argument("--frames", type=int, default=200, help="frames of a crop (default 200: 2 s)")
    parser.add_argument("--batch_size", type=int, default=32, help="crops in a batch (default 32)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loader (default 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn (default 2)")
    parser.add_argument("--speakers", type=int, default=40, help="speakers of the set that is made (default 40)")
    parser.add_argument("--utterance_seconds", type=float, default=8.0, help="length of its recordings (default 8)")
    parser.add_argument("--ending", default="wav", help="of its recordings, wav (default) or flac")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more keys for this project's loader")
    parser.add_argument("--profile", action="store_true", help="only show where the time of this project's loader goes")
    parser.add_argument("--augment_on", action="store_true", help="compare the values of augment_on, from a pack")
    parser.add_argument("--json", help="write the figures to this file")
    args = parser.parse_args()
    args.settings = dict(setting.split("=", 1) for setting in args.set)
    torch.set_num_threads(1)
    keep_freed_memory()  # as trainSpeakerNet.py does; every loader here gains by it
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = {key: getattr(args, key) for key in ("train_list", "train_path", "musan_path", "rir_path")}
        if not any(keys.values()):
            keys = make_set(folder, args.speakers, args.utterance_seconds, args.ending)
        elif not all(keys.values()):
            parser.error("give all of --train_list, --train_path, --musan_path and --rir_path, or none")
        pack_speech(keys, folder / "speech.int16")
        with contextlib.redirect_stdout(io.StringIO()):
            listed = ["--train_list", keys["train_list"], "--train_path", keys["train_path"]]
            pack_data.main([*listed, "--out", str(folder / "pack")])
        if args.profile:
            print(profile(ours(keys, args, 0, folder), 4 * args.seconds))
            return 0
        described = f"{machine(torch.device('cpu'))}, Python {platform.python_version()}"
        print(f"crops a second; {described}", flush=True)
        if args.augment_on:
            print(f"| {' | '.join(PLACES)} |\n| {' | '.join(['---'] * len(PLACES))} |")
            for workers in args.workers:
                print(places(keys, args, workers, folder), flush=True)
            return 0
        results = {}
        for workers in args.workers:
            results[workers] = compare(build(keys, args, workers, folder), args.rounds, args.seconds)
        print("\n".join(table(results)))
        if args.json:
            Path(args.json).write_text(json.dumps({"machine": described, "workers": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
