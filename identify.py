"""Say which enrolled speaker a recording is of, if any.

python identify.py A.wav --store speakers.npz --initial_model exps/demo/model/model_best.model
"""

import functools
import json
import sys

from errors import UsageError
from scoring.identification import identify
from scoring.verification import add_store_argument, add_verifier_arguments, embed_recording, verifier_from
from settings.command_line import Parser, existing_file, run
from speaker_model import add_model_arguments, model_from

PRIOR = "share of recordings that are of somebody who is enrolled (default 0.5)"


def main(argv) -> int:
    """Run the command line."""
    parser = Parser("identify.py", __doc__.splitlines()[0])
    parser.add_argument("file", metavar="WAV", help="recording")
    add_model_arguments(parser)
    add_verifier_arguments(parser, PRIOR)
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
    found = identify(verifier, store, embed_recording(model, args.file), args.top, args.prior)
    print(json.dumps(found.values()) if args.json else "\n".join(found.lines()))
    return 0


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
