"""Say whether two recordings are of one speaker, or a recording of an enrolled one.

python verify.py A.wav B.wav --initial_model exps/demo/model/model_best.model
python verify.py A.wav --speaker ann --store speakers.npz --initial_model exps/demo/model/model_best.model
"""

import functools
import json
import sys

from errors import UsageError, plural
from scoring.verification import add_store_argument, add_verifier_arguments, embed_to_decide, verifier_from
from settings.command_line import Parser, existing_recording, run
from speaker_model import add_model_arguments, model_from


def main(argv) -> int:
    """Run the command line; the decision is in the output, the exit status is 0 either way."""
    parser = Parser("verify.py", __doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="WAV", help="two recordings, or one with --speaker")
    parser.add_argument("--speaker", default="", metavar="NAME", help="compare with this enrolled speaker")
    add_model_arguments(parser)
    add_verifier_arguments(parser)
    add_store_argument(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    wanted = 1 if args.speaker else 2
    if len(args.files) != wanted:
        raise UsageError(
            f"verify.py: takes {plural(wanted, 'recording')}{' with --speaker' * (wanted == 1)}, got {len(args.files)}"
        )
    for file in args.files:
        existing_recording(file, "verify.py")
    verifier = verifier_from(args, model_from)
    model = verifier.model
    if args.speaker:
        from storage.speaker_store import SpeakerStore

        enrolled = SpeakerStore.open(args.store, model.identity, model.dimension, vad=model.vad).utterances(
            args.speaker
        )
    else:
        enrolled = [embed_to_decide(verifier, args.files[0])]
    verdict = verifier.compare(enrolled, embed_to_decide(verifier, args.files[-1]))
    print(json.dumps(verdict.values()) if args.json else "\n".join(verdict.lines()))
    return 0


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
