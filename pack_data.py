"""Pack the recordings of a train list into a few large files, which are read faster, with the same results.

python pack_data.py --train_list data/mine/train_list.txt --train_path my/people --out data/pack
python trainSpeakerNet.py --config data/mine/config.yaml --train_pack data/pack
"""

import functools
import os
import sys
from pathlib import Path

from errors import UsageError, hours_text, plural, size_text
from settings.command_line import Parser, existing_folder, run

MB = 1 << 20
FORMATS = (
    "samples: decoded (default); flac: encoded, in half of the room; webdataset: tar files of the files as they are"
)


def main(argv) -> int:
    """Run the command line: 0 done, 1 damaged, 2 bad usage."""
    parser = Parser("pack_data.py", __doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default="", metavar="YAML", help="configuration with train_list and train_path")
    add("--train_list", default="", metavar="LIST", help="train list, a Kaldi folder or JSON lines")
    add("--train_path", default="", metavar="FOLDER", help="folder that its paths are relative to")
    add("--out", required=True, metavar="FOLDER", help="folder of the pack; one that is there goes on")
    add("--format", default="samples", choices=("samples", "flac", "webdataset"), help=FORMATS)
    add("--shard_mb", type=int, default=1024, help="size of a shard in MB (default 1024)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads that decode (default: the cores)")
    add("--check", action="store_true", help="hold a pack against its checksums, and stop")
    args = parser.parse_args(argv)
    for flag in ("shard_mb", "workers"):
        if getattr(args, flag) < 1:
            raise UsageError(f"--{flag}: must be at least 1, got {getattr(args, flag)}")
    if args.check:
        return check(args.out)
    from corpus.lists import none_below
    from corpus.tars import shards_of
    from corpus.train_list import read_train_lists

    source = source_of(args)
    listed, out, size = read_train_lists((source,)), Path(args.out), args.shard_mb * MB
    if not shards_of(source.path) and (fault := none_below(source.root, source.path, listed.paths)):
        raise UsageError(f"train_path: {fault}")
    if args.format == "webdataset":
        from storage.shards import write_shards

        done = write_shards(listed, out, size)
    else:
        from storage.packing import write_pack

        done = write_pack(listed, out, size, args.workers, args.format == "flac")
    for path, place, reason in done["bad"]:
        print(f"unreadable: {path} ({place}): {reason}", file=sys.stderr)
    new = f", {done['new']} of them new" if done["new"] < done["files"] else ""
    hours, size = done.get("hours"), done["bytes"]
    long = "" if hours is None else f", {hours_text(hours)}"
    print(f"{args.out}: {plural(done['files'], 'file')}{new}{long}, {size_text(size)}")
    if done["bad"]:
        print(f"{plural(len(done['bad']), 'file')} that cannot be read: named in a run too, as without the pack")
    print(f"to train from it: --{'train_list' if args.format == 'webdataset' else 'train_pack'} {args.out}")
    return 0


def source_of(args):
    """The train list to pack, of the configuration or the command line."""
    from corpus.list_forms import why_no_list
    from corpus.sources import TrainSource, entries_of
    from settings.reader import read_yaml

    settings = read_yaml(args.config) if args.config else {}
    values = {name: settings[name].value for name in ("train_list", "train_path") if name in settings}
    values = {name: value for name, value in values.items() if value is not None}  # a key without a value
    values.update({name: getattr(args, name) for name in ("train_list", "train_path") if getattr(args, name)})
    for name in ("train_list", "train_path"):
        if name not in values:
            raise UsageError(f"pack_data.py: needs --{name}, or a --config that has it")
    if not isinstance(values["train_list"], str) or entries_of(values["train_list"]):
        raise UsageError(
            "train_list: several lists; pack each, by --train_list and --train_path, into a folder of its own"
        )
    if why := why_no_list(values["train_list"]):
        raise UsageError(f"train_list: {why}")
    existing_folder(str(values["train_path"]), "train_path")
    return TrainSource(values["train_list"], str(values["train_path"]))


def check(folder: str) -> int:
    """Say which files of a pack are damaged; returns the exit status."""
    from corpus.pack import Pack
    from corpus.tars import shards_of
    from storage.packing import damaged

    if shards_of(folder):
        return check_shards(folder)
    pack = Pack(folder)
    found = list(damaged(pack))
    for path in found:
        print(f"damaged: {path}", file=sys.stderr)
    print(f"{folder}: {plural(len(pack), 'file')}, {len(found)} of them damaged")
    if found:
        print(f"remove {folder} and pack again, or copy it again", file=sys.stderr)
    return 1 if found else 0


def check_shards(folder: str) -> int:
    """Say which recordings of tar files do not decode; returns the exit status."""
    from corpus.tars import recordings_of
    from storage.shards import damaged_members

    count, files = 0, sum(len(names) for _, names, *_ in recordings_of(folder))
    for path, reason in damaged_members(folder):
        print(f"damaged: {path}: {reason}", file=sys.stderr)
        count += 1
    print(f"{folder}: {plural(files, 'file')}, {count} of them damaged")
    return 1 if count else 0


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
