"""Measure how a train list of any size starts: the plan of an epoch, reading, memory, the first batch.

python benchmarks/data_scale.py plan     # an epoch dealt, at the sizes of known sets
python benchmarks/data_scale.py pack     # crops a second from files and from a pack of them
python benchmarks/data_scale.py lists    # from a list of 10 M lines to the first batch
python benchmarks/data_scale.py paths    # how paths are kept: their room, and the time of a look at one
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from config import Config
from corpus.front_coding import FrontCodedTexts
from corpus.sampling import SpeakerBatchSampler
from corpus.texts import Texts

# (utterances, speakers, rows of a batch, utterances of a row): VoxCeleb2 twice, VoxBlink2, and a set to come.
SIZES = [(1_092_009, 5_994, 200, 1), (1_092_009, 5_994, 200, 2), (9_904_382, 111_284, 512, 1)]
SIZES.append((10_000_000, 1_000_000, 512, 1))


class Speakers:
    """Stands for a data set: speakers with numbers of utterances that spread as those of real ones do."""

    def __init__(self, utterances: int, speakers: int):
        weights = np.random.default_rng(0).lognormal(0, 0.5, speakers)
        counts = np.maximum(1, np.rint(weights / weights.sum() * utterances)).astype(int)
        counts[np.argmax(counts)] += utterances - counts.sum()
        self.labels = np.repeat(np.arange(speakers, dtype=np.int32), counts)


def plan(_):
    """Print the seconds of CPU that dealing an epoch takes."""
    for utterances, speakers, batch_size, per_row in SIZES:
        dataset = Speakers(utterances, speakers)
        config = Config(batch_size=batch_size, nPerSpeaker=per_row)
        began = time.process_time()
        sampler = SpeakerBatchSampler(dataset, config, per_row > 1)
        ready = time.process_time()
        sampler.plan(1)
        dealt = time.process_time()
        print(
            f"{utterances:,} utterances of {speakers:,} speakers, {len(sampler):,} batches of {batch_size} x {per_row}:"
            f" sampler {ready - began:.2f} s, plan of an epoch {dealt - ready:.2f} s"
        )


# ------------------------------------------------------------------------------------------------ files and packs


def pack(arguments):
    """Print crops of 2 s a second that one process reads, from wav, flac and packs of them, in turns."""
    import soundfile

    from corpus.sources import TrainSource
    from corpus.train_list import read_train_lists
    from DatasetLoader import TrainDataset
    from storage.packing import write_pack

    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as name:
        folder, readers = Path(name), {}
        for kind in ("wav", "flac"):
            rng, lines = np.random.default_rng(0), []
            (folder / kind).mkdir()
            for number in range(arguments.files):
                tone = np.sin(np.arange(int(rng.uniform(4, 12) * 16000)) * rng.uniform(0.02, 0.2))
                x = 0.2 * tone + rng.normal(0, 0.02, len(tone))
                soundfile.write(folder / kind / f"{number}.{kind}", x, 16000)
                lines.append(f"s{number // 10} {number}.{kind}\n")
            (folder / f"{kind}.txt").write_text("".join(lines))
            listed = read_train_lists((TrainSource(str(folder / f"{kind}.txt"), str(folder / kind)),))
            began = time.perf_counter()
            done = write_pack(listed, folder / f"{kind}.pack", 1 << 28, os.cpu_count() or 1)
            rate = done["hours"] * 3600 / (time.perf_counter() - began)
            print(f"{kind}: {done['files']} files, {done['hours']:.1f} h, packed at {rate:,.0f} s of audio a second")
            keys = {"train_list": str(folder / f"{kind}.txt"), "train_path": str(folder / kind)}
            readers[kind] = TrainDataset(Config(**keys))
            readers[f"pack of {kind}"] = TrainDataset(Config(**keys, train_pack=str(folder / f"{kind}.pack")))
        for turn in range(3):
            for name, dataset in readers.items():
                began = time.perf_counter()
                for utterance in range(arguments.files):
                    dataset[turn, ((utterance, 0),)]
                print(f"  {name:<14} {arguments.files / (time.perf_counter() - began):8,.0f} crops a second")


# ---------------------------------------------------------------------------------------------- from list to batch

CLIPS, FOLDERS = 5, 20  # of which the files of all utterances are made; their paths are as long as VoxCeleb's


def make_list(folder: Path, utterances: int, speakers: int) -> dict[str, str]:
    """Write a train list of so many lines, and the few files behind it; returns the keys of a run."""
    import soundfile

    for number in range(FOLDERS):
        place = folder / "wav" / f"id{number:07}" / "21Uxsk56VDQ"
        place.mkdir(parents=True)
        for clip in range(CLIPS):
            noise = np.random.default_rng([number, clip]).normal(0, 0.1, 4 * 16000)
            soundfile.write(place / f"{clip:05}.wav", noise, 16000)
    each = utterances // speakers
    with open(folder / "train_list.txt", "w", encoding="utf-8") as file:
        for speaker in range(speakers):
            head = f"id{speaker:07} id{speaker % FOLDERS:07}/21Uxsk56VDQ/"
            file.writelines(f"{head}{clip % CLIPS:05}.wav\n" for clip in range(each))
    pairs = [
        f"{int(a == b)} id{a:07}/21Uxsk56VDQ/00000.wav id{b:07}/21Uxsk56VDQ/00001.wav\n" for a in (0, 1) for b in (0, 1)
    ]
    (folder / "trials.txt").write_text("".join(pairs))
    keys = {"train_list": "train_list.txt", "train_path": "wav", "test_list": "trials.txt", "test_path": "wav"}
    return {key: str(folder / name) for key, name in keys.items()}


def memory(process="self") -> dict[str, float]:
    """MB of a process: all that is resident, what it alone holds, and the most that was resident."""
    fields = {}
    for name in ("status", "smaps_rollup"):
        for line in Path(f"/proc/{process}/{name}").read_text().splitlines():
            head, _, rest = line.partition(":")
            fields[head] = rest.split()
    own = sum(float(fields[name][0]) for name in ("Private_Clean", "Private_Dirty"))
    sizes = {"resident": float(fields["Rss"][0]), "own": own, "peak": float(fields["VmHWM"][0])}
    return {name: round(kilobytes / 1024) for name, kilobytes in sizes.items()}


def start(keys: dict[str, str], workers: int) -> dict:
    """Start as a run does, up to the first batch: seconds and memory of each stage."""
    from corpus.loader import Loader
    from DatasetLoader import SpeakerBatchSampler, TrainDataset, collate
    from training.start import configure

    found, began = {"imported": {"seconds": 0.0, **memory()}}, time.perf_counter()

    def stage(name):
        found[name] = {"seconds": round(time.perf_counter() - began, 2), **memory()}

    words = ["--model=ECAPA_TDNN", "--trainfunc=aamsoftmax", "--batch_size=512", f"--nDataLoaderThread={workers}"]
    config, *_ = configure([*words, *(f"--{key}={value}" for key, value in keys.items())])
    stage("keys and lists checked")
    dataset = TrainDataset(config)
    sampler = SpeakerBatchSampler(dataset, config, False)
    stage("data set and sampler")
    os.sched_getaffinity = lambda _: range(workers)  # as many workers as were asked for
    loader = Loader(dataset, sampler, collate, config, workers)
    batches = iter(loader)
    next(batches)
    stage("first batch")
    for _ in range(9):
        next(batches)
    stage("ten batches")
    found["workers"] = [memory(process.pid) for process in loader.processes()]
    return found


def lists(arguments):
    """Print seconds and memory from the command line to the first batch, in a process of its own."""
    with tempfile.TemporaryDirectory(dir=arguments.folder or None) as folder:
        keys = make_list(Path(folder), arguments.utterances, arguments.speakers)
        words = [sys.executable, __file__, "start", json.dumps(keys), str(arguments.workers)]
        found = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        size = os.path.getsize(keys["train_list"])
    print(f"{arguments.utterances:,} lines of {arguments.speakers:,} speakers, {size / 1e6:.0f} MB")
    for name, value in found.items():
        for row in value if isinstance(value, list) else [value]:
            print(
                f"  {name:<24} "
                + "  ".join(f"{what} {number}{' s' if what == 'seconds' else ' MB'}" for what, number in row.items())
            )


# ------------------------------------------------------------------------------------------------ paths in memory


def paths(_):
    """Print room and times of paths like VoxCeleb's, kept plainly and front-coded, sorted and in random order."""
    rng = np.random.default_rng(0)
    videos = [rng.bytes(6).hex()[:11] for _ in range(25_000)]
    ordered = [f"id{n // 125:05}/{video}/{clip:05}.wav" for n, video in enumerate(videos) for clip in range(8)]
    shuffled = [ordered[number] for number in rng.permutation(len(ordered))]
    looks = rng.integers(0, len(ordered), len(ordered)).tolist()
    for name, texts in (("sorted", ordered), ("shuffled", shuffled)):
        for kind in (Texts, FrontCodedTexts):
            times = [time.perf_counter()]
            kept = kind.of(texts)
            times.append(time.perf_counter())
            for _ in kept:
                pass
            times.append(time.perf_counter())
            for number in looks:
                kept[number]
            times.append(time.perf_counter())
            places = kept.offsets if isinstance(kept, Texts) else kept.begins
            made, read, looked = np.diff(times) / len(texts)
            print(
                f"{name:<9} {kind.__name__:<16} {(len(kept.content) + places.nbytes) / len(texts):5.1f} bytes a path, "
                f"made in {1e9 * made:.0f} ns, one after the other {1e9 * read:.0f} ns, any one {1e6 * looked:.2f} us"
            )


def main():
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("plan", help="the plan of an epoch").set_defaults(run=plan)
    of_lists = commands.add_parser("lists", help="from the list to the first batch, in seconds and memory")
    of_lists.add_argument("--utterances", type=int, default=10_000_000, help="lines (default 10,000,000)")
    of_lists.add_argument("--speakers", type=int, default=1_000_000, help="speakers (default 1,000,000)")
    of_lists.add_argument("--workers", type=int, default=4, help="loader processes (default 4)")
    of_lists.add_argument("--folder", default="", help="where to write the list meanwhile (0.5 GB)")
    of_lists.set_defaults(run=lists)
    of_packs = commands.add_parser("pack", help="crops a second from files and packs")
    of_packs.add_argument("--files", type=int, default=2000, help="files of 4 to 12 s (default 2,000)")
    of_packs.add_argument("--folder", default="", help="where to write them meanwhile (1.5 GB)")
    of_packs.set_defaults(run=pack)
    of_paths = commands.add_parser("paths", help="room of paths in memory, and time of a look at one")
    of_paths.set_defaults(run=paths)
    inner = commands.add_parser("start")
    inner.add_argument("keys", type=json.loads)
    inner.add_argument("workers", type=int)
    inner.set_defaults(run=lambda a: print(json.dumps(start(a.keys, a.workers))))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
