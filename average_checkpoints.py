"""Write the mean of checkpoints of one run as a checkpoint that evaluates, embeds and fine-tunes like any other.

python average_checkpoints.py exps/demo/model --last 3 --out exps/demo/model/avg.model
python average_checkpoints.py exps/demo/model/model000000016.model exps/demo/model/model000000024.model --out avg.model
python trainSpeakerNet.py --config configs/demo.yaml --eval --initial_model exps/demo/model/avg.model
"""

import functools
import os
import sys
from pathlib import Path

from errors import UsageError
from settings.command_line import Parser, check_not_read, existing_file, existing_folder, run


def main(argv) -> int:
    """Run the command line."""
    parser = Parser("average_checkpoints.py", "Write the mean of checkpoints of one run.")
    parser.add_argument("paths", nargs="+", help="a run's model/ folder, or checkpoints in any order")
    parser.add_argument(
        "--last", type=int, default=0, help="of a folder the newest so many model0*.model (default all)"
    )
    parser.add_argument("--out", required=True, help="file to write")
    args = parser.parse_args(argv)
    paths = chosen(args.paths, args.last)
    check_not_read("--out", args.out, paths)
    folder = os.path.dirname(args.out) or "."
    existing_folder(folder, "--out")
    if not os.access(folder, os.W_OK) or Path(args.out).is_dir():
        why = "a folder" if Path(args.out).is_dir() else "no permission"
        raise UsageError(f"--out: cannot write '{args.out}': {why}")

    from storage.files import save_atomically
    from training.averaging import mean_of_checkpoints

    state = mean_of_checkpoints(paths)
    save_atomically(state, args.out)
    print(f"mean of {len(paths)} checkpoints, {paths[0].name} to {paths[-1].name}: {args.out}")
    return 0


def chosen(given: list[str], last: int) -> list[Path]:
    """The checkpoints that the command line names, oldest first by the number in the name."""
    folders = [path for path in given if os.path.isdir(path)]
    if folders and len(given) > 1:
        raise UsageError(f"average_checkpoints.py: give one folder, or checkpoints: '{folders[0]}' is a folder")
    if last and not folders:
        raise UsageError("--last: chooses from a folder; for single checkpoints leave it out")
    if last < 0 or last == 1:
        raise UsageError(f"--last: a mean needs at least 2 checkpoints, not {last}")
    if not folders:
        paths = [Path(existing_file(path, "average_checkpoints.py")) for path in dict.fromkeys(given)]
    else:
        paths = sorted(Path(given[0]).glob("model0*.model"))
        if len(paths) < max(last, 2):
            inside = Path(given[0], "model")
            hint = f"; a run keeps them in its folder {inside}" if not paths and inside.is_dir() else ""
            raise UsageError(f"{given[0]}: has {len(paths)} checkpoints model0*.model, {max(last, 2)} are needed{hint}")
    if len(paths) < 2:
        raise UsageError("average_checkpoints.py: a mean needs at least 2 checkpoints")
    return sorted(paths, key=epoch_of)[-last:]


def epoch_of(path: Path) -> tuple[int, str]:
    """Sort key of a checkpoint: the number its name ends in, then the name."""
    digits = path.stem[len(path.stem.rstrip("0123456789")) :]
    return int(digits or -1), path.name


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
