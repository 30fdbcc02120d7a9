"""Measure the size of dumps, and the time of their analysis in steps of the run.

python benchmarks/bench_postmortem.py                                       # ECAPA-TDNN 512, ResNet34
python benchmarks/bench_postmortem.py --models "ResNet depth=293" --rows 32,64

Two sound steps on rows of 2 s of synthetic voices, so that Adam has its moments; then the scale of the loss becomes
1e39, two steps fail and are dumped, and the first dump is analysed without a limit of time.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

from bench_training import build, machine

ROOT = Path(__file__).resolve().parent.parent
MODELS = "ECAPA_TDNN channels=512,ResNet34"


def make_voices(folder: Path):
    """Make recordings of 64 speakers, 3 s each."""
    from make_demo_data import main as make

    sizes = ("--speakers=64", "--trial_speakers=2", "--utterances=4", "--seconds=3", "--nontargets=2")
    with contextlib.redirect_stdout(io.StringIO()):
        make(["--out", str(folder), *sizes])


def words_of(model: str, rows: int, data: Path) -> list[str]:
    """The configuration of a run, as words of the command line."""
    name, *keys = model.split()
    words = ["--model", name, "--trainfunc", "aamsoftmax", "--optimizer", "adam", "--batch_size", str(rows)]
    words += [word for key in keys for word in (f"--{key.split('=')[0]}", key.split("=")[1])]
    lists = {"train_list": "train_list.txt", "train_path": "wav", "test_list": "trials.txt", "test_path": "wav"}
    words += [word for key, value in lists.items() for word in (f"--{key}", str(data / value))]
    return [*words, "--max_frames", "200", "--nDataLoaderThread", "0", "--nan_patience", "9", "--nan_max_gb", "8"]


def measure(model: str, rows: int, data: Path, folder: str) -> dict:
    """Train, fail and analyse once."""
    from DatasetLoader import collate

    trainer = build(words_of(model, rows, data), folder)
    trainer.sampler.set_position(1)
    batches = [collate([trainer.dataset[i] for i in indices]) for indices in list(trainer.sampler)[:4]]
    seconds = []
    for number, batch in enumerate(batches, 1):
        if number == 3:
            trainer.network.loss.scale = 1e39
        trainer.progress.batch += 1
        begin = time.perf_counter()
        trainer.train_step([batch])
        trainer.settle()
        seconds.append(time.perf_counter() - begin)
    trainer.close()
    debug = Path(folder) / "debug_nan"
    first, second = sorted(debug.glob("nan_batch_*.pt"))
    states = sorted(debug.glob("state_*.pt"), key=lambda p: p.stat().st_mtime)
    sizes = [first.stat().st_size + states[0].stat().st_size]
    sizes.append(second.stat().st_size + sum(p.stat().st_size for p in states[1:]))
    cause, whole, source = analyse(first)
    return {"step": seconds[1], "sizes": sizes, "cause": cause, "whole": whole, "source": source}


def analyse(dump: Path) -> tuple[float, float, str]:
    """(seconds to cause and line, seconds of everything, the line)."""
    from postmortem.case import Case
    from postmortem.diagnosis import diagnose
    from postmortem.fixes import recommendations
    from storage.dump import read_dump, read_state

    begin = time.perf_counter()
    content = read_dump(dump)
    case = Case(dump, content, read_state(dump, content["state"]), seconds=1e6)
    finding = diagnose(case)
    cause = time.perf_counter() - begin
    recommendations(case, finding)
    return cause, time.perf_counter() - begin, str(finding.source)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", default=MODELS, help=f"models with their keys, comma-separated (default {MODELS})")
    parser.add_argument("--rows", default="32,64", help="batch sizes (default 32,64)")
    args = parser.parse_args()
    import torch

    print(machine(torch.device("cpu")))
    print("| model | rows | step s | first dump MB | next MB | cause and line, steps | everything, steps | line |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        make_voices(Path(name) / "voices")
        for model in args.models.split(","):
            for rows in map(int, args.rows.split(",")):
                folder = str(Path(name) / f"{model.split()[0]}{rows}")
                with contextlib.redirect_stdout(io.StringIO()):
                    m = measure(model, rows, Path(name) / "voices", folder)
                sizes = " | ".join(f"{size / 1e6:.1f}" for size in m["sizes"])
                times = f"{m['cause'] / m['step']:.1f} | {m['whole'] / m['step']:.1f}"
                print(f"| {model} | {rows} | {m['step']:.2f} | {sizes} | {times} | {m['source']} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
