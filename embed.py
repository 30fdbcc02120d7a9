"""Embed recordings with a trained model.

python embed.py --initial_model exps/demo/model/model_best.model --wav A.wav --out A.npy
python embed.py --initial_model exps/demo/model/model_best.model --dir data/demo/wav --out demo.npz
python embed.py --initial_model avg_model.pt --config configs/interop/wespeaker_resnet34.yaml --scp wav.scp --out x.ark
python embed.py --initial_model exps/demo/model/model_best.model --wav long.wav --window 3 --step 1 --out long.npz
"""

import functools
import sys
from pathlib import Path

import numpy as np

from corpus.folders import find_recordings
from corpus.lists import none_below, numbered_lines, wrong_columns
from corpus.sliding import grid_fault
from errors import UsageError, plural
from settings.command_line import Parser, check_not_read, existing_folder, existing_recording, run
from speaker_model import add_model_arguments, load_model, model_from
from storage.embedding_files import check_ending, window_name, write_embeddings

__all__ = ["load_model", "main"]
LONGEST_NAME = 1000  # letters: every name takes the room of the longest one in an .npz file


def main(argv) -> int:
    """Run the command line: 0 all embedded, 1 some files gave nothing (the others are written), 2 bad usage."""
    parser = Parser("embed.py", __doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--wav", nargs="+", default=[], metavar="FILE", help="recordings")
    parser.add_argument(
        "--dir", default="", metavar="FOLDER", help="all recordings below a folder, named by their paths"
    )
    parser.add_argument("--list", default="", metavar="FILE", help="lines 'path' or 'name path'; '#' begins no comment")
    parser.add_argument("--scp", default="", metavar="FILE", help="Kaldi's wav.scp, lines 'name path', without pipes")
    parser.add_argument(
        "--root", default="", metavar="FOLDER", help="folder that the paths of --list, --scp are relative to"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help=".npy for one recording, .npz or .ark for many")
    parser.add_argument(
        "--batch_size", type=int, default=32, help="files of equal length embedded together (default 32)"
    )
    parser.add_argument("--workers", type=int, default=0, help="processes that read audio (default 0: the main one)")
    parser.add_argument(
        "--window", type=float, metavar="SECONDS", help="embed windows of this, each for itself: NAME#START-END"
    )
    parser.add_argument(
        "--step", type=float, metavar="SECONDS", help="from a window to the next (default: --window, side by side)"
    )
    args = parser.parse_args(argv)
    for flag, least in (("batch_size", 1), ("workers", 0)):
        if getattr(args, flag) < least:
            raise UsageError(f"--{flag}: must be at least {least}, got {getattr(args, flag)}")
    check_grid(args)
    if args.window is not None and args.vad not in (None, "none"):
        raise UsageError(f"embed.py: --window embeds windows as they are, got --vad {args.vad} too")
    names, paths = recordings(args)
    check_ending(args.out, len(paths))
    written = [args.out, *([str(Path(args.out).with_suffix(".scp"))] if args.out.endswith(".ark") else [])]
    for path in written:
        check_not_read("--out", path, (args.list, args.scp, args.initial_model))
    if not Path(args.out).resolve().parent.is_dir():
        raise UsageError(f"--out: no such folder: '{Path(args.out).parent}'")
    if args.window is not None:
        return embed_in_windows(args, names, paths)
    if len(paths) == 1:
        model = model_from(args)
        write_embeddings(args.out, names, model.embed_file(paths[0])[None], model.identity, model.vad)
        print(f"{args.out}: 1 embedding of dimension {model.dimension}")
        return 0
    return embed_many(args, names, paths)


def embed_many(args, names, paths) -> int:
    """Embed and write; files that gave nothing are named and left out."""
    model = model_from(args)
    x, problems = model.embed_files(paths, args.batch_size, True, args.workers)
    for index, reason in sorted(problems.items()):
        print(f"{paths[index]}: {reason}", file=sys.stderr)
    kept = [i for i in range(len(paths)) if i not in problems]
    if not kept:
        raise UsageError(
            f"embed.py: none of the {len(paths)} recordings could be embedded; '{args.out}' is not written"
        )
    write_embeddings(args.out, [names[i] for i in kept], x[kept], model.identity, model.vad)
    left = f", {len(problems)} left out" if problems else ""
    print(f"{args.out}: {len(kept)} embeddings of dimension {model.dimension}{left}")
    return 1 if problems else 0


def check_grid(args):
    """UsageError unless --window and --step go together; --step becomes --window where it is not given."""
    if args.window is None:
        if args.step is not None:
            raise UsageError("--step: is from a window to the next; give --window too")
        return
    args.step = args.window if args.step is None else args.step
    fault = grid_fault(args.window, args.step)
    if fault:
        raise UsageError(f"--{fault}")
    if args.out.endswith(".npy"):
        raise UsageError("--out: a .npy file holds one embedding; those of windows are written as .npz or .ark")
    if args.workers:
        raise UsageError("--workers: reads whole recordings; leave it out with --window")


def embed_in_windows(args, names, paths) -> int:
    """Embed every window of each recording and write; what gave nothing is said and left out."""
    model = model_from(args)
    kept, rows, lost, silent = [], [], 0, 0
    for name, path in zip(names, paths):
        try:
            times, x, reasons = model.embed_windows(path, args.window, args.step, args.batch_size)
        except UsageError as error:
            print(error, file=sys.stderr)
            lost += 1
            continue
        sound = [row for row in range(len(times)) if row not in reasons]
        if reasons:
            first = min(reasons)
            left = f"{len(reasons)} of {plural(len(times), 'window')} left out, the first at {times[first][0]:.2f} s"
            print(f"{path}: {left}: {reasons[first]}", file=sys.stderr)
        silent, lost = silent + len(reasons), lost + (not sound)
        kept += [window_name(name, *times[row]) for row in sound]
        rows.append(x[sound])
    if not kept:
        raise UsageError(
            f"embed.py: no window of {plural(len(paths), 'recording')} could be embedded; nothing is written"
        )
    write_embeddings(args.out, kept, np.concatenate(rows), model.identity)
    left = f", {plural(silent, 'window')} left out" if silent else ""
    print(f"{args.out}: {plural(len(kept), 'embedding')} of dimension {model.dimension}{left}")
    return 1 if lost else 0


def recordings(args) -> tuple[list[str], list[str]]:
    """Names and paths of what to embed."""
    given = [flag for flag in ("wav", "dir", "list", "scp") if getattr(args, flag)]
    if len(given) != 1:
        raise UsageError("embed.py: give one of --wav, --dir, --list and --scp")
    if args.wav:
        names, paths = list(args.wav), [existing_recording(file, "--wav") for file in args.wav]
    elif args.dir:
        folder = Path(existing_folder(args.dir, "--dir"))
        paths = sorted(map(str, find_recordings(folder)))
        names = [str(Path(path).relative_to(folder)) for path in paths]
    else:
        names, paths = from_list(args.list or args.scp, args.root, bool(args.scp))
    if not paths:
        raise UsageError(f"--{given[0]}: no recording in '{getattr(args, given[0])}'")
    seen = set()
    for name in names:
        if len(name) > LONGEST_NAME:
            raise UsageError(f"--{given[0]}: a name of {len(name)} letters, '{name[:50]}...'; at most {LONGEST_NAME}")
        if name in seen:
            raise UsageError(f"--{given[0]}: '{name}' stands there twice; names must differ")
        seen.add(name)
    return names, paths


def from_list(path: str, root: str, scp: bool) -> tuple[list[str], list[str]]:
    """Read 'path' or 'name path' lines -> (names, paths). In a train list ('speaker path') the path is the name."""
    rows = []
    for number, columns in numbered_lines(path):
        if columns[-1] == "|" or columns[-1].endswith("|"):
            raise UsageError(f"{path}:{number}: a pipe; write the audio to files first, commands of a list are not run")
        if len(columns) > 2 or (scp and len(columns) != 2):
            expected = wrong_columns("'name path'" if scp else "'[name] path'", len(columns))
            raise UsageError(f"{path}:{number}: {expected}")
        rows.append(columns)
    if fault := none_below(root or ".", path, [row[-1] for row in rows]):
        raise UsageError(f"--root: {fault}")
    repeated = len({row[0] for row in rows}) < len(rows) and all(len(row) == 2 for row in rows) and not scp
    names = [row[-1] if repeated else row[0] for row in rows]
    return names, [str(Path(root, row[-1])) for row in rows]


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
