"""Time an evaluation as trainSpeakerNet.py --eval makes it, with what its parts take.

python benchmarks/evaluate.py                                   # 4,708 files, 37,720 trials, as VoxCeleb1-O has
python benchmarks/evaluate.py --files 400 --model "ECAPA_TDNN channels=512" --set eval_frames=400 num_eval=10
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]


def make_trials(paths: list[str], trials: int, path: Path):
    """Write so many trials, half of them of one speaker; forty speakers own the files in turn."""
    rng, lines = np.random.default_rng(1), []
    for number in range(trials):
        a = int(rng.integers(len(paths)))
        same = number % 2 == 0
        step = 40 * int(rng.integers(1, max(2, len(paths) // 40))) + (0 if same else int(rng.integers(1, 40)))
        lines.append(f"{int(same)} {Path(paths[a]).name} {Path(paths[(a + step) % len(paths)]).name}\n")
    path.write_text("".join(lines))


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", default="ResNetSE34L", help="a model with its keys (default ResNetSE34L)")
    parser.add_argument("--files", type=int, default=4708, help="recordings (default 4708)")
    parser.add_argument("--trials", type=int, default=37720, help="trials (default 37720)")
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=(4.0, 12.0), help="shortest and longest (default 4 12)"
    )
    parser.add_argument("--set", nargs="*", default=["eval_frames=0"], help="more keys (default eval_frames=0)")
    parser.add_argument("--json", help="write all figures to this file")
    args = parser.parse_args()
    import torch
    from bench_training import machine
    from extract import make_recordings
    from startup import make_model

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "wav").mkdir()
        paths = make_recordings(folder / "wav", args.files, *args.seconds)
        make_trials(paths, args.trials, folder / "trials.txt")
        command = [
            sys.executable,
            "trainSpeakerNet.py",
            "--eval",
            "--initial_model",
            str(make_model(folder, args.model)),
        ]
        keys = {"test_list": folder / "trials.txt", "test_path": folder / "wav", "save_path": folder / "run"}
        command += [f"--{key}={value}" for key, value in keys.items()] + [f"--{setting}" for setting in args.set]
        begin = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})
        seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    audio = args.files * sum(args.seconds) / 2
    print(f"{machine(torch.device('cpu'))}: {args.model}, {' '.join(args.set)}")
    rate = f"{args.files / seconds:.1f} files/s"
    print(f"{args.files} files, {audio / 3600:.1f} h, {args.trials} trials: {seconds:.0f} s, {rate}")
    print(re.sub(re.escape(str(folder)), "FOLDER", done.stdout))
    if args.json:
        found = {"command": sys.argv[1:], "seconds": seconds, "files": args.files, "audio_seconds": audio}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
