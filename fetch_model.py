"""Fetch a published checkpoint, with the configuration that reads it.

python fetch_model.py --list
python fetch_model.py speechbrain-ecapa
python fetch_model.py wespeaker-resnet34 --from Downloads/voxceleb_resnet34.zip
"""

import functools
import os
import sys
from pathlib import Path

from corpus.locks import folder_lock
from errors import UsageError, shell_path, suggested
from preparation.outputs import FINETUNE, write_config
from settings.command_line import Parser, existing_file, run
from settings.reader import read_yaml
from storage.download import DownloadError, download
from storage.files import WriteError, write_atomically
from storage.published import TABLE, Published, is_web_page, read_table, sums_of, take

PATHS = ("initial_model", "train_list", "train_path", "test_list", "test_path", "save_path")


def main(argv) -> int:
    """Run the command line."""
    parser = Parser("fetch_model.py", __doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", metavar="NAME", help="a checkpoint of --list")
    parser.add_argument("--list", action="store_true", help="list what is published, with licences and error rates")
    parser.add_argument(
        "--dir", default="pretrained", metavar="FOLDER", help="where a folder NAME is made (default pretrained)"
    )
    parser.add_argument(
        "--from", dest="file", default="", metavar="FILE", help="take this file or archive, downloaded otherwise"
    )
    parser.add_argument("--max_mb", type=float, default=2000, help="refuse larger files (default 2000)")
    parser.add_argument(
        "--table", default=str(TABLE), metavar="YAML", help="another table of checkpoints, of this form"
    )
    args = parser.parse_args(argv)
    if not 0 < args.max_mb < 1e9:
        raise UsageError(f"--max_mb: must be above 0, got {args.max_mb:g}")
    rows = read_table(existing_file(args.table, "--table"))
    if args.list:
        print("\n".join(listing(rows)))
        return 0
    if not args.name:
        raise UsageError("fetch_model.py: give the name of a checkpoint, or --list")
    row = named(rows, args.name)
    folder = Path(args.dir, row.name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteError(folder, error.strerror or str(error)) from error
    print(f"{row.project}'s {row.file}, licence: {licence_of(row)}; {row.page}", flush=True)
    with folder_lock(folder / ".fetch.lock", f"{folder}: another process fetches this checkpoint"):
        checkpoint, said = fetched(row, folder, args.file, round(args.max_mb * 1e6))
        config = folder / "config.yaml"
        if not config.is_file():
            write_pair(row, config)
        print(said)
        check(row, checkpoint, config)
        if not row.sha256 and not row.git_blob and not kept_sum(checkpoint).is_file():
            write_atomically(kept_sum(checkpoint), f"{sums_of(checkpoint)[0]}  {checkpoint.name}\n".encode())
    print("\n".join(next_steps(row, checkpoint, config)))
    return 0


def listing(rows: dict[str, Published]) -> list[str]:
    """A line for each checkpoint: name, what it was trained on, error rates, licence."""
    width, data = (max(len(getattr(row, key)) for row in rows.values()) for key in ("name", "data"))
    lines = [f"{'NAME':{width}}  {'TRAINED ON':{data}}  {'EER ON O / E / H (%)':21}  LICENCE"]
    lines += [f"{row.name:{width}}  {row.data:{data}}  {row.eer:21}  {row.licence}" for row in rows.values()]
    return lines


def named(rows: dict[str, Published], name: str) -> Published:
    """The checkpoint of a name; UsageError with the nearest one for an unknown name."""
    if name not in rows:
        meant = suggested(name, rows, listed=False)
        raise UsageError(f"fetch_model.py: unknown checkpoint '{name}'{meant} (--list shows all)")
    return rows[name]


def licence_of(row: Published) -> str:
    """The licence, and where it stands."""
    return row.licence + (f", {row.licence_from}" if row.licence_from else "")


def fetched(row: Published, folder: Path, file: str, limit: int) -> tuple[Path, str]:
    """The checkpoint in ``folder``, verified, and a line on that; it is downloaded, or taken from ``file``, if need be.

    UsageError if it does not come, or is not the one that the table or the first download names.
    """
    checkpoint, part = folder / row.file, folder / f".{row.file}.part"
    if checkpoint.is_file() and not file:
        return checkpoint, verified(row, checkpoint, checkpoint)
    new = folder / f".{row.file}.new"
    try:
        source = Path(existing_file(file, "--from")) if file else download(row.url, part, limit)
    except DownloadError as error:
        elsewhere = f"get the file another way ({row.page}) and give it: {command_of(row, folder)} --from FILE"
        raise UsageError(f"{error}; {elsewhere}") from error
    try:
        if is_web_page(source):
            raise UsageError(
                f"{file or row.url}: a web page, not a checkpoint; see {row.page}, get '{row.file}' there and give it: "
                f"{command_of(row, folder)} --from FILE"
            )
        take(source, row.file, new, limit)
        said = verified(row, new, checkpoint)
        os.replace(new, checkpoint)
    except OSError as error:
        raise WriteError(checkpoint, error.strerror or str(error)) from error
    finally:
        new.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    return checkpoint, said


def command_of(row: Published, folder: Path) -> str:
    """This command again."""
    return f"python fetch_model.py {row.name}" + (
        "" if folder.parent == Path("pretrained") else f" --dir {shell_path(folder.parent)}"
    )


def verified(row: Published, path: Path, checkpoint: Path) -> str:
    """A line on the sum of the file ``path``, which is or becomes ``checkpoint``; UsageError if it is another one.

    Where no sum is published, that of the first file, which is kept beside it, counts.
    """
    sha256, blob = sums_of(path)
    kept = kept_sum(checkpoint)
    if row.sha256 or row.git_blob:
        kind, wanted, found = ("SHA-256", row.sha256, sha256) if row.sha256 else ("git blob", row.git_blob, blob)
        if found != wanted:
            raise UsageError(
                f"{checkpoint}: not the published file: its {kind} is {found}, not {wanted}; {advice(path)}"
            )
        return f"{checkpoint}: {kind} {found}, as published"
    if not kept.is_file():
        return f"{checkpoint}: SHA-256 {sha256}; none is published, so {kept.name} keeps this one"
    wanted = kept.read_text(encoding="utf-8", errors="replace").split()[:1]
    if wanted != [sha256]:
        was = wanted[0] if wanted else "nothing"
        raise UsageError(
            f"{checkpoint}: not the file that came first: its SHA-256 is {sha256}, {kept.name} says {was}; "
            f"{advice(path)}, or remove {kept} if the project has put another file there"
        )
    return f"{checkpoint}: SHA-256 {sha256}, that of the first download"


def kept_sum(checkpoint: Path) -> Path:
    """The file, in the form of sha256sum, of the sum that came first."""
    return checkpoint.with_name(f"{checkpoint.name}.sha256")


def advice(path: Path) -> str:
    """What to do about a wrong sum of a new file, which is not kept, or of one that was there."""
    return "it is not kept" if path.name.endswith(".new") else "remove it and run the command again"


def write_pair(row: Published, config: Path):
    """Write the configuration of a checkpoint: what makes its embeddings, then keys to fine-tune it with."""
    written = {name: setting.value for name, setting in read_yaml(str(row.base)).items()} | row.keys
    tuning = {name: setting.value for name, setting in read_yaml(str(FINETUNE)).items()}
    own_loss = written.get("trainfunc") != tuning["trainfunc"]
    left = PATHS + (("margin", "scale") if own_loss else ())  # of a loss that is not this one's
    write_config(config, row.base, row.keys | {k: v for k, v in tuning.items() if k not in written and k not in left})
    lines = [line for line in config.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    head = (
        f"# {row.name}, {row.project}'s {row.file}: configs/interop/{row.config}.yaml, and keys to fine-tune it with."
    )
    write_atomically(config, ("\n".join([head, *lines]) + "\n").encode())


def check(row: Published, checkpoint: Path, config: Path):
    """UsageError unless every tensor of the checkpoint has its place in the model of the configuration."""
    from speaker_model import load_model

    try:
        model = load_model(checkpoint, str(config), "cpu")
    except UsageError as error:
        raise UsageError(f"{error}; if that is not what {row.page} offers, remove it and fetch it again") from error
    count = sum(p.numel() for name, p in model.network.named_parameters() if name.startswith("__S__."))
    print(f"{config}: {model.config.model}, {count:,} parameters, all of them in the file; {model.dimension} values")


def next_steps(row: Published, checkpoint: Path, config: Path) -> list[str]:
    """The commands to run next."""
    pair = f"--initial_model {shell_path(checkpoint)} --config {shell_path(config)}"
    trials = "--test_list my/trials.txt --test_path my/wav"
    train = "--train_list my/train.txt --train_path my/wav"
    figure = f" (its authors': {row.eer} % on VoxCeleb1-O / E / H{f', {row.how}' if row.how else ''})"
    return [
        f"evaluate it{figure if row.eer != '-' else ''}, embed with it, fine-tune it:",
        f"python trainSpeakerNet.py --eval {pair} {trials} --save_path exps/{row.name}_eval",
        f"python embed.py {pair} --wav A.wav --out A.npy",
        f"python trainSpeakerNet.py {pair} {train} {trials} --save_path exps/{row.name}_tuned",
    ]


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
