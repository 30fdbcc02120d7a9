"""Make all that a run needs from recordings: lists, trials of other people, a configuration, a page of the set.

python prepare_data.py my/people --out data/mine
python prepare_data.py VoxCeleb1 VoxCeleb2 musan RIRS_NOISES --out data/voxceleb
"""

import functools
import os
import sys
from pathlib import Path

from errors import UsageError, no_folder
from settings.command_line import Parser, existing_file, need, run


def main(argv) -> int:
    """Run the command line: 0 done, 2 bad usage or too few people."""
    from preparation.corpora import Reading
    from preparation.findings import Limits
    from preparation.run import Order, prepare

    args = parse(argv)
    out = Path(args.out)
    reading = Reading(args.corpus, args.speaker_level, args.speaker_pattern, args.only, str(out.absolute() / "wav"))
    limits = Limits(args.min_seconds, args.max_seconds, args.min_speech, args.trim)
    names = ("share", "seed", "workers", "config", "initial_model", "trim", "vad", "sample_rate")
    more = {name: getattr(args, name) for name in names}
    more |= {name: os.path.abspath(given) for name in ("musan", "rirs") if (given := getattr(args, name))}
    return prepare(Order([Path(given).absolute() for given in args.inputs], out, reading, limits, **more))


def parse(argv):
    """Read the command line; UsageError for a flag or a place that cannot be used."""
    from corpus.speech import DETECTORS
    from preparation.layouts import NAMES

    parser = Parser("prepare_data.py", __doc__.splitlines()[0])
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FOLDER", help="a corpus, or a folder with a folder for each person")
    add("--out", required=True, help="folder for the lists and the configuration")
    add("--corpus", default="", metavar="NAME", help=f"layout: {', '.join(NAMES)} (default: recognised)")
    add("--speaker_level", type=int, default=0, metavar="N", help="folder level that is the person (default: found)")
    add("--speaker_pattern", default="", metavar="REGEX", help="whose group is the person, in the path of each file")
    add("--only", default="", metavar="LIST", help="take the utterances of a list, as VoxBlink's utt_clean")
    add("--share", type=float, default=0, help="share of the people for the trials (default 0.2, at most 100 people)")
    add("--min_seconds", type=float, default=0.5, help="shorter recordings are left out (default 0.5)")
    add("--max_seconds", type=float, default=0, help="longer recordings are left out (default 0: none)")
    add("--min_speech", type=float, default=0, help="recordings with fewer seconds of speech are left out (default 0)")
    add("--trim", action="store_true", help="cut the silence before and behind the speech off")
    add(
        "--vad",
        default="energy",
        choices=list(DETECTORS),
        help="what finds the speech (silero: pip install silero-vad)",
    )
    add("--musan", default="", metavar="FOLDER", help="noise as it is, in folders noise, music and speech")
    add("--rirs", default="", metavar="FOLDER", help="room impulse responses")
    add("--config", default="", metavar="YAML", help="configuration to start from (default: by the size of the set)")
    add("--initial_model", default="", metavar="CKPT", help="write a configuration that fine-tunes it")
    add("--sample_rate", type=int, default=0, metavar="HZ", help="that the model is to work at, as 8000 for telephony")
    add("--seed", type=int, default=1, help="seed of what is drawn (default 1)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="threads that read recordings (default: the cores)")
    args = parser.parse_args(argv)
    places = [("prepare_data.py", given) for given in args.inputs]
    for flag, given in [*places, ("--musan", args.musan), ("--rirs", args.rirs)]:
        if given and not os.path.exists(given):
            raise UsageError(f"{flag}: {no_folder(given)}")
        if given and not os.path.isdir(given) and not os.path.isfile(given):
            raise UsageError(f"{flag}: neither a folder nor a file: '{given}'")
    check_numbers(args)
    if not args.out.strip():
        raise UsageError("--out: is empty; wanted: a folder for the lists and the configuration")
    real = [os.path.realpath(given) for given in args.inputs]
    for i, given in enumerate(args.inputs):
        if real[i] in real[:i]:
            raise UsageError(f"prepare_data.py: '{given}' is given twice")
    if args.corpus and args.corpus not in NAMES:
        raise UsageError(f"--corpus '{args.corpus}': is none of {', '.join(NAMES)}")
    if args.vad == "silero":
        need("--vad silero", "silero_vad")
    for flag in ("config", "initial_model"):
        if getattr(args, flag):
            existing_file(getattr(args, flag), f"--{flag}")
    check_bases(args.config, args.initial_model, args.sample_rate)
    check_noise({"--musan": args.musan, "--rirs": args.rirs}, args.config)
    return args


def check_numbers(args):
    """UsageError that names the first flag whose number cannot be used, and the number."""
    from config import KEYS
    from settings.reader import Setting, coerce

    flags = ("seed", "speaker_level", "min_seconds", "max_seconds", "min_speech")
    wrong = {"--share must lie between 0 and 1": args.share} if not 0 <= args.share < 1 else {}
    wrong |= {"--workers must be at least 1": args.workers} if args.workers < 1 else {}
    wrong |= {f"--{flag} must not be negative": getattr(args, flag) for flag in flags if not getattr(args, flag) >= 0}
    if args.sample_rate:
        coerce(KEYS["sample_rate"], Setting(args.sample_rate, "command line"))
    for words, value in wrong.items():
        raise UsageError(f"prepare_data.py: {words}, got {value:g}")


def check_bases(config: str, model: str, rate: int):
    """UsageError if what the new configuration starts from is no configuration or no checkpoint, or of another rate."""
    if config:
        from settings.reader import read_yaml

        read_yaml(config)
    if model:
        from preparation.outputs import trained_at

        trained = trained_at(model)
    if model and rate and trained and rate != trained:
        raise UsageError(f"--sample_rate: {rate}, but {model} was trained with {trained}; leave --sample_rate out")


def check_noise(given: dict[str, str], config: str):
    """UsageError that names the flag if its folder lacks what the usual policy needs; one of ``config`` may differ."""
    from corpus.augmentation import AugmentWAV
    from settings.reader import read_yaml

    if config and "augmentation" in read_yaml(config):
        return
    for flag, folder in given.items():
        try:
            if folder:
                AugmentWAV(*((folder, "") if flag == "--musan" else ("", folder)))
        except UsageError as error:
            raise UsageError(f"{flag}: {str(error).partition(': ')[2]}") from error


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
