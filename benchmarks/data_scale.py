"""Measure how a train list of any size starts: the plan of an epoch, reading, memory, the first batch.

python benchmarks/data_scale.py plan     # an epoch dealt, at the sizes of known sets
python benchmarks/data_scale.py lists    # from a list of 10 M lines to the first batch
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
from corpus.sampling import SpeakerBatchSampler

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
    inner = commands.add_parser("start")
    inner.add_argument("keys", type=json.loads)
    inner.add_argument("workers", type=int)
    inner.set_defaults(run=lambda a: print(json.dumps(start(a.keys, a.workers))))
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
