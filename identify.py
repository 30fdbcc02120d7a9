"""Say which enrolled speaker a recording is of, if any.

python identify.py A.wav --store speakers.npz --initial_model exps/demo/model/model_best.model
"""

import functools
import json
import sys

from errors import UsageError
from scoring.verification import (
    NO_DECISION,
    add_store_argument,
    add_verifier_arguments,
    embed_recording,
    percent,
    verifier_from,
)
from settings.command_line import Parser, existing_file, run
from speaker_model import add_model_arguments, model_from


def main(argv) -> int:
    """Run the command line."""
    parser = Parser("identify.py", __doc__.splitlines()[0])
    parser.add_argument("file", metavar="WAV", help="recording")
    add_model_arguments(parser)
    add_verifier_arguments(parser)
    add_store_argument(parser)
    parser.add_argument("--top", type=int, default=5, help="how many speakers to name (default 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise UsageError(f"--top: must be at least 1, got {args.top}")
    existing_file(args.file, "identify.py")
    verifier = verifier_from(args, model_from)
    model = verifier.model
    from storage.speaker_store import SpeakerStore

    store = SpeakerStore.open(args.store, model.identity, model.dimension)
    if not len(store):
        raise UsageError(f"{args.store}: nobody is enrolled; enroll.py does that")
    found = verifier.identify(store, embed_recording(model, args.file), args.top)
    name, best = found[0]
    if args.json:
        who = name if best.same else None
        print(json.dumps({"speaker": who, "speakers": [{"name": n, **v.values()} for n, v in found]}))
        return 0
    width = max(len(other) for other, _ in found)
    for other, verdict in found:
        print(f"{other:{width}}  {row(verdict)}")
    if best.same is None:
        print(f"nearest: {name}; {NO_DECISION}")
    elif best.same:
        print("\n".join([f"speaker: {name}", *best.lines()]))
    else:
        print("\n".join([f"speaker: none of the {len(store)} who are enrolled; the nearest is {name}", *best.lines()]))
    return 0


def row(verdict) -> str:
    """The figures of an enrolled speaker."""
    if verdict.llr is None:
        return f"score {verdict.score:.4f}"
    likely = f"log-likelihood ratio {verdict.llr:+.3f}  probability {percent(verdict.probability)}"
    return f"score {verdict.score:.4f}  {likely}"


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
