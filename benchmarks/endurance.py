"""A long run in a hostile world: does it end with the weights of a run that nothing disturbed?

python benchmarks/endurance.py --data SET --out FOLDER
python benchmarks/endurance.py --data SET --out FOLDER --disk SMALL_DISK --epochs 50 -- --channels 32

SET holds train_list.txt, trials.txt and wav/. Three runs of the same configuration are made:

quiet      nothing disturbs it
disturbed  its disk is filled up and freed, its loader processes are killed, it is stopped by SIGTERM and started again
damaged    all of this, and training files are cut in half and restored while it reads them

The disk is a tmpfs that this script mounts (as root), or a small file system of your own (--disk). It passes if no run
shows a traceback, every run ends with status 0, and disturbed ends with the weights, moments and generators of quiet
bit for bit. Linux only: it reads /proc. What follows ``--`` goes to trainSpeakerNet.py.
"""

import argparse
import collections
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SMALL_MODEL = """
model: ECAPA_TDNN
channels: 16
aggregate: 32
n_mels: 24
nOut: 32
input_norm: mean
trainfunc: aamsoftmax
optimizer: adam
scheduler: cosine
lr: 0.005
batch_size: 32
max_frames: 100
eval_frames: 0
test_interval: 5
patience: 0
nDataLoaderThread: 2
threads: 1
save_interval_steps: 10
max_bad_files_pct: 30
device: cpu
"""
EQUAL = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "rng_state", "epoch", "step")
GOES_ON = (143, 4, 5, 2)  # statuses after which the same command goes on: a signal, a full disk, no loader, bad files
COUNTED = re.compile(
    r"cannot be written|not written|not saved|No space|loader process|resuming from|stopped by signal|unreadable"
)


def start(config: Path, save_path: Path, wav: Path, log, words) -> subprocess.Popen:
    """Start the trainer with its output in ``log``."""
    command = [sys.executable, "-u", str(ROOT / "trainSpeakerNet.py"), "--config", str(config)]
    command += ["--save_path", str(save_path), "--train_path", str(wav), *words]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)


def children_of(process: int) -> list[int]:
    """Process numbers of the direct children of a process."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if int(status.read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(status.parent.name))
    return found


def loader_processes(process: int) -> list[int]:
    """The trainer's loader processes: those of its children that run the same program."""
    name = Path(f"/proc/{process}/cmdline").read_bytes()
    return [child for child in children_of(process) if Path(f"/proc/{child}/cmdline").read_bytes() == name]


def fill(disk: Path, filler: Path):
    """Write until the file system is full."""
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as f:
        while True:
            f.write(b"\0" * (1 << 16))
    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as f:  # the last bytes too
        while f.write(b"\0" * 512):
            pass


class Disturber:
    """Troubles a running trainer, chosen at random from those of its kind of run."""

    def __init__(self, process, disk: Path, files: list[Path], seed: int):
        self.process, self.disk, self.files = process, disk, files
        self.chance, self.done = random.Random(seed), collections.Counter()
        self.troubles = [self.full_disk, self.killed_loader] + ([self.cut_file] if files else [])

    def trouble(self):
        """Make one trouble and clear it away."""
        self.chance.choice(self.troubles)()

    def full_disk(self):
        """Fill the disk for a moment."""
        filler = self.disk / "filler"
        fill(self.disk, filler)
        try:
            time.sleep(self.chance.uniform(0.5, 4.0))
        finally:
            filler.unlink(missing_ok=True)
        self.done["disk filled and freed"] += 1

    def killed_loader(self):
        """Kill a loader process, as the kernel does where memory is short."""
        with contextlib.suppress(OSError, IndexError):  # the trainer has just ended, or has no loaders at the moment
            os.kill(self.chance.choice(loader_processes(self.process.pid)), signal.SIGKILL)
            self.done["loader process killed"] += 1

    def cut_file(self):
        """Cut a training file in half for a moment."""
        path = self.chance.choice(self.files)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        try:
            time.sleep(self.chance.uniform(0.5, 3.0))
        finally:
            path.write_bytes(content)
        self.done["file cut and restored"] += 1


def disturbed_run(config, save_path, wav, disk, files, args) -> tuple[list[int], collections.Counter]:
    """Run to the end with troubles and SIGTERMs; returns the exit statuses and the troubles made."""
    statuses, done, chance, stops = [], collections.Counter(), random.Random(args.seed), 0
    log_path = args.out / f"{save_path.name}.log"
    while True:
        with open(log_path, "a") as log:
            process = start(config, save_path, wav, log, args.words)
            disturber = Disturber(process, disk, files, args.seed + len(statuses))
            after = chance.uniform(10, 40) if stops < args.stops else float("inf")  # seconds of training to a SIGTERM
            while process.poll() is None:
                time.sleep(chance.uniform(0.5, 1.5) * args.pause)
                if time.monotonic() > disturber_from(process) + after and process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.wait(120)
                    stops += 1
                    done["SIGTERM"] += 1
                elif process.poll() is None and time.monotonic() > disturber_from(process):
                    disturber.trouble()
            statuses.append(process.returncode)
            done += disturber.done
        if process.returncode not in GOES_ON or len(statuses) > 100:
            return statuses, done


def disturber_from(process) -> float:
    """Troubles begin when the trainer has started: one second after its first loader process."""
    if not hasattr(process, "ready") and loader_processes(process.pid):
        process.ready = time.monotonic() + 1.0
    return getattr(process, "ready", float("inf"))


def differing(one: Path, other: Path) -> list[str]:
    """Names of the tensors and numbers that differ between two last.model files."""
    a, b = (torch.load(path / "model" / "last.model", weights_only=True) for path in (one, other))

    def walk(x, y, name):
        if isinstance(x, torch.Tensor):
            return [] if torch.equal(x, y) else [name]
        if isinstance(x, dict):
            pairs = [(x[k], y.get(k), f"{name}.{k}") for k in x]
        elif isinstance(x, (list, tuple)):
            pairs = [(v, y[i], f"{name}.{i}") for i, v in enumerate(x)]
        else:
            return [] if x == y else [name]
        return [found for pair in pairs for found in walk(*pair)]

    return [found for part in EQUAL for found in walk(a[part], b[part], part)]


def report(name: str, statuses, done, log: Path) -> bool:
    """Print what a run met and how it ended; returns whether it ended well."""
    text = log.read_text(errors="replace")
    tracebacks = text.count("Traceback (most recent call last)")
    met = ", ".join(f"{count} x {what}" for what, count in sorted(done.items())) or "nothing"
    said = collections.Counter(COUNTED.findall(text))
    print(f"{name}: met {met}; exit statuses {statuses}; {tracebacks} tracebacks; said {dict(said)}")
    return not tracebacks and statuses[-1] == 0


def arguments():
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="folder with train_list.txt, trials.txt and wav/")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for the runs and logs; a quiet run there is kept"
    )
    parser.add_argument("--disk", type=Path, help="a small file system to fill; without it a tmpfs is mounted")
    parser.add_argument("--megabytes", type=int, default=64, help="size of that tmpfs (default 64)")
    parser.add_argument("--epochs", type=int, default=50, help="epochs of each run (default 50)")
    parser.add_argument("--pause", type=float, default=15.0, help="mean seconds between troubles (default 15)")
    parser.add_argument("--stops", type=int, default=4, help="SIGTERMs of a run (default 4)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the troubles (default 1)")
    parser.add_argument("words", nargs="*", help="further words for trainSpeakerNet.py, after --")
    args = parser.parse_args()
    args.data, args.out = args.data.resolve(), args.out.resolve()
    return args


@contextlib.contextmanager
def small_disk(args):
    """The folder of a small file system that may be filled."""
    if args.disk:
        yield args.disk.resolve()
        return
    folder = args.out / "disk"
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={args.megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> int:
    """Make the three runs and compare them; exit status 0 if all held."""
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    config = args.out / "endurance.yaml"
    lists = f"train_list: {args.data}/train_list.txt\ntest_list: {args.data}/trials.txt\ntest_path: {args.data}/wav\n"
    config.write_text(f"{SMALL_MODEL}{lists}max_epoch: {args.epochs}\n")
    wav = args.out / "wav"
    shutil.copytree(args.data / "wav", wav, dirs_exist_ok=True)
    files = [wav / line.split()[1] for line in (args.data / "train_list.txt").read_text().splitlines()]
    for path in (wav, *wav.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, {args.epochs} epochs of {len(files)} utterances",
        flush=True,
    )
    with small_disk(args) as disk:
        with open(args.out / "quiet.log", "w") as log:
            status = start(config, args.out / "quiet", wav, log, args.words).wait()
        good = report("quiet", [status], {}, args.out / "quiet.log")
        for name, cut in (("disturbed", []), ("damaged", files)):
            began = time.monotonic()
            statuses, done = disturbed_run(config, disk / name, wav, disk, cut, args)
            good &= report(f"{name} ({time.monotonic() - began:.0f} s)", statuses, done, args.out / f"{name}.log")
            if not cut:
                names = differing(args.out / "quiet", disk / name)
                print("  equal to quiet bit for bit" if not names else f"  differs from quiet: {', '.join(names[:5])}")
                good &= not names
            shutil.rmtree(disk / name)
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
