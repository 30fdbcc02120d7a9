"""Time from a command to its first result: trainSpeakerNet.py to its first step, verify.py to its answer.

python benchmarks/startup.py
python benchmarks/startup.py --config configs/x.yaml --rounds 5     # your own configuration and lists

The commands take turns with ``python -c "import torch"``, which nothing can be faster than. A cold start, with nothing
of Python, torch and the data in memory, is timed once if the system's page cache may be dropped (as root on Linux).
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def first_step(words: list[str], folder: Path) -> float:
    """Seconds from the start of trainSpeakerNet.py to its first step; it is then ended."""
    save = tempfile.mkdtemp(dir=folder)
    command = [sys.executable, "trainSpeakerNet.py", *words, "--save_path", save, "--log_interval", "1"]
    log, begin = Path(save, "result", "metrics.jsonl"), time.perf_counter()
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        while not (log.is_file() and '"event": "step"' in log.read_text()):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended:\n{(folder / 'output.txt').read_text()[-2000:]}")
            time.sleep(0.01)
        seconds = time.perf_counter() - begin
        process.kill()
        process.wait()
    return seconds


def whole(command: list[str]) -> float:
    """Seconds of a command from its start to its end."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def make_data(folder: Path) -> list[str]:
    """Make a small set of voices; returns the words of a run on it."""
    from bench_postmortem import make_voices, words_of

    with contextlib.redirect_stdout(io.StringIO()):
        make_voices(folder)
    return words_of("ResNetSE34L", 32, folder)


def drop_page_cache() -> bool:
    """Whether the system could be told to forget what it keeps of files."""
    subprocess.run(["sync"], check=False)
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        return False
    return True


def make_model(folder: Path, words: str = "ResNetSE34L") -> Path:
    """A checkpoint of a model with random weights."""
    from extract import model_of

    from storage.files import save_atomically

    model = model_of({"model": words})
    state = {"model_state_dict": model.network.state_dict(), "config": model.config.values(), "format_version": 1}
    save_atomically(state, folder / "random.model")
    return folder / "random.model"


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", help="a configuration to start (default: a small set of voices, ResNetSE34L)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--json", help="write all figures to this file")
    args = parser.parse_args()
    import torch
    from bench_training import machine

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        own = make_data(folder)
        words = ["--config", args.config] if args.config else own
        model, waves = make_model(folder), sorted(map(str, (folder / "wav").rglob("*.flac")))[:2]
        commands = {
            "python -c 'import torch'": lambda: whole(["-c", "import torch"]),
            "verify.py A B": lambda: whole(["verify.py", *waves, "--initial_model", str(model)]),
            "trainSpeakerNet.py, first step": lambda: first_step(words, folder),
            "trainSpeakerNet.py --print_config": lambda: whole(["trainSpeakerNet.py", *words, "--print_config"]),
        }
        print(machine(torch.device("cpu")))
        print("| command | cold s | warm s (least to most) |")
        print("| --- | --- | --- |")
        cold = {title: call() if drop_page_cache() else None for title, call in commands.items()}
        warm = {title: [] for title in commands}
        for _ in range(args.rounds):
            for title, call in commands.items():
                warm[title].append(call())
        for title, seconds in warm.items():
            first = "not measured" if cold[title] is None else f"{cold[title]:.1f}"
            print(
                f"| {title} | {first} | {statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}) |"
            )
    if args.json:
        Path(args.json).write_text(json.dumps({"command": sys.argv[1:], "cold": cold, "warm": warm}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
