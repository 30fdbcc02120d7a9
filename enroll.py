"""Enroll a speaker with recordings, or each of a folder of people; add recordings to one, remove one, or list them.

python enroll.py ann a1.wav a2.wav --store speakers.npz --initial_model exps/demo/model/model_best.model
python enroll.py --dir my/people --store speakers.npz --initial_model exps/demo/model/model_best.model
python enroll.py ann --remove --store speakers.npz
python enroll.py --list --store speakers.npz
"""

import functools
import os
import sys
from pathlib import Path

from tqdm import tqdm

from corpus.folders import find_recordings
from errors import UsageError, plural
from scoring.verification import add_store_argument, embed_recording
from settings.command_line import Parser, existing_folder, existing_recording, run


def main(argv) -> int:
    """Run the command line."""
    from speaker_model import add_model_arguments

    parser = Parser("enroll.py", __doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="name of the speaker")
    parser.add_argument("files", nargs="*", metavar="WAV", help="recordings of the speaker, or folders of them")
    parser.add_argument("--dir", default="", metavar="PEOPLE", help="enroll everyone: a folder that holds one for each")
    add_model_arguments(parser, required=False)
    add_store_argument(parser)
    parser.add_argument("--replace", action="store_true", help="forget earlier recordings of this speaker")
    parser.add_argument("--remove", action="store_true", help="forget this speaker")
    parser.add_argument("--list", action="store_true", help="list the enrolled speakers")
    args = parser.parse_args(argv)
    if args.list and (args.name or args.remove):
        raise UsageError("enroll.py: --list takes no name")
    if args.dir and (args.name or args.list or args.remove):
        raise UsageError("enroll.py: --dir takes no name, and neither --list nor --remove")
    if not args.list and not args.name and not args.dir:
        raise UsageError("enroll.py: needs the name of a speaker, and recordings")
    if args.remove and args.files:
        raise UsageError(f"enroll.py: --remove takes a name alone, got '{args.files[0]}' too")
    if not args.list and not args.remove and not args.files and not args.dir:
        raise UsageError(f"enroll.py: needs recordings of '{args.name}'")
    if (args.files or args.dir) and not args.initial_model:
        raise UsageError("enroll.py: --initial_model CKPT is needed to enroll")
    if args.dir:
        return enroll_folder(args)
    args.files = [file for given in args.files for file in recordings_of(given)]
    return change(args)


def recordings_of(given: str) -> list[str]:
    """A recording, or those of a folder."""
    if not Path(given).is_dir():
        return [existing_recording(given, "enroll.py")]
    found = [str(path) for path in find_recordings(given)]
    if not found:
        raise UsageError(f"enroll.py: no recording in the folder '{given}'")
    return found


def people_of(folder: str) -> dict[str, list[str]]:
    """{name: recordings} of a folder with a folder for each person."""
    people = {}
    for path in find_recordings(existing_folder(folder, "--dir")):
        inside = path.relative_to(folder).parts
        if len(inside) < 2:
            raise UsageError(f"{path}: lies in no person's folder; wanted: {Path(folder) / 'NAME' / path.name}")
        people.setdefault(inside[0], []).append(str(path))
    if not people:
        raise UsageError(f"--dir: no recording below '{folder}'")
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")]
    if empty := sorted(set(folders) - people.keys()):
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        named = ", ".join(repr(name) for name in empty[:3])
        print(f"--dir: left out: {plural(len(empty), 'folder')} without a recording: {named}{more}", file=sys.stderr)
    if len(people) == 1:
        name = next(iter(people))
        print(
            f"--dir: '{folder}' holds one person, '{name}'; if that is a folder of people, give {Path(folder) / name}"
        )
    return people


def enroll_folder(args) -> int:
    """Enroll everyone of a folder; 1 if a recording could not be used.

    Recordings that are enrolled already are left as they are, so that a folder may grow.
    """
    from speaker_model import model_from
    from storage.speaker_store import SpeakerStore, check_name, locked

    people, model = people_of(args.dir), model_from(args)
    store = SpeakerStore.open(args.store, model.identity, model.dimension, True, model.vad)
    known = {} if args.replace else {name: store.sources(name) for name in people}
    found, problems = {}, 0
    for name in list(people):
        try:
            check_name(name)
        except UsageError as error:
            problems += len(people.pop(name))
            print(f"--dir: left out: {error}", file=sys.stderr)
    new = [(n, file) for n in people for file in people[n] if os.path.abspath(file) not in known.get(n, ())]
    for name, file in tqdm(new, unit="file", leave=False, disable=not sys.stderr.isatty()):
        try:
            utterance = embed_recording(model, file)
            found.setdefault(name, []).append(utterance)
        except UsageError as error:
            problems += 1
            tqdm.write(str(error), file=sys.stderr)
    with locked(args.store):
        store = SpeakerStore.open(args.store, model.identity, model.dimension, True, model.vad)
        for name in () if args.replace else found:  # another command may have been faster
            there = store.sources(name)
            found[name] = [utterance for utterance in found[name] if utterance.source not in there]
        found = {name: utterances for name, utterances in found.items() if utterances}
        for name, utterances in found.items():
            store.add(name, utterances, args.replace)
        if found:
            store.save()
    count = sum(map(len, found.values()))
    nobody = [name for name in people if name not in store.speakers]
    left = f", {plural(problems, 'recording')} left out" if problems else ""
    enrolled = f"{plural(count, 'recording')} of {plural(len(found), 'person')}"
    print(f"{args.store}: {enrolled} enrolled{left}, {len(store)} in all")
    if nobody:
        print(f"without a usable recording: {', '.join(nobody)}", file=sys.stderr)
    return 1 if problems else 0


def change(args) -> int:
    """List, remove or enroll, with the store locked while it is changed."""
    from speaker_model import model_from
    from storage.speaker_store import SpeakerStore, locked

    model = model_from(args) if args.initial_model else None
    of_model = (model.identity, model.dimension) if model else ("", 0)
    vad = model.vad if model else ""
    if args.list:
        for name, rows in SpeakerStore.open(args.store, *of_model, vad=vad).speakers.items():
            print(f"{name}  {plural(len(rows), 'recording')}")
        return 0
    utterances = [embed_recording(model, file) for file in args.files]  # before the lock: it may take a while
    with locked(args.store):
        store = SpeakerStore.open(args.store, *of_model, not args.remove, vad)
        if args.remove:
            store.remove(args.name)
        else:
            store.add(args.name, utterances, args.replace)
        store.save()
    if args.remove:
        print(f"{args.store}: '{args.name}' removed, {plural(len(store), 'speaker')} left")
    else:
        rows = len(store.speakers[args.name])
        print(f"{args.store}: '{args.name}' with {plural(rows, 'recording')}, {plural(len(store), 'speaker')} in all")
    return 0


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
