"""Say which enrolled speaker a recording is of, if any, or along a recording who speaks when.

python identify.py A.wav --store speakers.npz --initial_model exps/demo/model/model_best.model
python identify.py --along A.wav --picture A.png --store speakers.npz --initial_model exps/demo/model/model_best.model
"""

import functools
import json
import math
import sys
from pathlib import Path

from corpus.audio import MIN_SECONDS
from corpus.sliding import grid_fault
from errors import UsageError
from scoring.identification import identify, nameless
from scoring.timeline import TURN, follow
from scoring.verification import add_store_argument, add_verifier_arguments, embed_to_decide, verifier_from
from settings.command_line import Parser, check_not_read, existing_recording, need, run
from speaker_model import add_model_arguments, model_from
from storage.files import write_atomically

PRIOR = "share of recordings, or of the time along one, that are of somebody who is enrolled (default 0.5)"
ALONG = {"window": 3.0, "step": 1.0, "turn": TURN, "rttm": "", "picture": ""}  # flags that --along alone takes


def main(argv) -> int:
    """Run the command line."""
    args = parsed(argv)
    verifier = verifier_from(args, model_from, of_pairs=False)
    model = verifier.model
    from storage.speaker_store import SpeakerStore

    store = SpeakerStore.open(args.store, model.identity, model.dimension, vad=model.vad)
    if not len(store):
        raise UsageError(f"{args.store}: nobody is enrolled; enroll.py does that")
    if args.along:
        found = follow(verifier, store, args.file, args.window, args.step, args.turn, args.prior)
        write_files(args, found)
    else:
        if caution := nameless(verifier, len(store), args.prior):
            print(f"warning: {caution}", file=sys.stderr)
        found = identify(verifier, store, embed_to_decide(verifier, args.file), args.top, args.prior)
    print(json.dumps(found.values()) if args.json else "\n".join(found.lines()))
    return 0


def parsed(argv):
    """The arguments; UsageError for flags that do not go together."""
    parser = Parser("identify.py", __doc__.splitlines()[0])
    parser.add_argument("file", metavar="WAV", help="recording")
    add_model_arguments(parser)
    add_verifier_arguments(parser, PRIOR)
    add_store_argument(parser)
    parser.add_argument("--top", type=int, help="how many speakers to name (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--along", action="store_true", help="who speaks when: a table of segments")
    add = functools.partial(parser.add_argument, default=None)
    add("--window", type=float, metavar="SECONDS", help="with --along: of a window (default 3)")
    add("--step", type=float, metavar="SECONDS", help="with --along: from a window to the next (default 1)")
    add("--turn", type=float, metavar="SECONDS", help=f"with --along: somebody speaks on average (default {TURN:g})")
    add("--rttm", metavar="FILE", help="with --along: write the segments of speakers as RTTM")
    add("--picture", metavar="FILE", help="with --along: write a PNG of the probabilities over time and the decision")
    args = parser.parse_args(argv)
    for name, default in ALONG.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif not args.along:
            raise UsageError(f"--{name}: goes with --along")
    if args.along and args.top is not None:
        raise UsageError("--top: does not go with --along")
    args.top = 5 if args.top is None else args.top
    if args.top < 1:
        raise UsageError(f"--top: must be at least 1, got {args.top}")
    check_along(args)
    existing_recording(args.file, "identify.py")
    return args


def check_along(args):
    """UsageError for windows, turns and files to write that cannot be."""
    fault = grid_fault(args.window, args.step, MIN_SECONDS)
    if fault:
        raise UsageError(f"--{fault}")
    if not 0 < args.turn < math.inf:
        raise UsageError(f"--turn: must be above 0 s, got {args.turn:g}")
    if args.picture and not args.picture.lower().endswith(".png"):
        raise UsageError(f"--picture: is written as .png, got '{args.picture}'")
    if args.picture:
        need("--picture", "matplotlib")
    for flag in ("rttm", "picture"):
        check_not_read(f"--{flag}", getattr(args, flag), (args.file, args.store, args.initial_model, args.backend))
        folder = Path(getattr(args, flag)).resolve().parent
        if not folder.is_dir():
            raise UsageError(f"--{flag}: no such folder: '{folder}'")


def write_files(args, timeline):
    """Write what --rttm and --picture name."""
    name = Path(args.file).name
    if args.rttm:
        write_atomically(args.rttm, timeline.rttm(Path(name).stem).encode())
    if args.picture:
        from scoring.plots import draw_timeline

        lacking = draw_timeline(args.picture, timeline, f"Who speaks when in {name}")
        if lacking:
            print(lacking, file=sys.stderr)


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
