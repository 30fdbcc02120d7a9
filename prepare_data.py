"""Make lists and a configuration from a folder of recordings that holds a folder for each person.

python prepare_data.py my/people --out data/mine
"""

import functools
import itertools
import re
import shlex
import sys
from pathlib import Path

import numpy as np

from corpus.folders import find_recordings
from corpus.lists import LIST_TEXT, separator_for
from errors import ROOT, UsageError
from settings.command_line import Parser, run
from storage.files import write_atomically

FEWEST_PEOPLE = 4  # two to train on, two for the trials
MOST_TARGETS = 100  # trials of one person
NONTARGETS = 5  # for each target trial
# Kinds of findings on a file that keep it out of the lists.
UNFIT = ("unreadable", "nonfinite", "huge", "silent", "channels cancel")


def people_of(folder: Path) -> dict[str, list[str]]:
    """Recordings of each person, as paths below ``folder``: the first folder of a path is the person."""
    people = {}
    for path in find_recordings(folder):
        inside = path.relative_to(folder)
        if len(inside.parts) < 2:
            raise UsageError(f"{path}: lies in no person's folder; wanted: {folder}/NAME/{inside.name}")
        people.setdefault(inside.parts[0], []).append(inside.as_posix())
    if not people:
        raise UsageError(f"prepare_data.py: no recording below '{folder}'")
    return people


def without_unfit(folder: Path, people: dict, workers: int) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Read every file; returns the people with the files that can be used, and (path, reason) of the others."""
    from corpus.measuring import Source, judge, scan

    sources = [Source(str(folder / path), path, {"train"}) for paths in people.values() for path in paths]
    unfit = {}
    for source, measure in scan(sources, workers):
        reasons = [f"{kind}: {detail}" for kind, detail in judge(measure, source.roles) if kind in UNFIT]
        if reasons:
            unfit[source.place] = reasons[0]
    left = {name: [path for path in paths if path not in unfit] for name, paths in people.items()}
    return {name: paths for name, paths in left.items() if paths}, sorted(unfit.items())


def held_out(people: dict[str, list[str]], share: float, rng) -> list[str]:
    """People for the trials: a ``share`` of all, at least two, from those with two recordings or more."""
    able = sorted(name for name, paths in people.items() if len(paths) > 1)
    count = max(2, round(share * len(people)))
    if len(people) < FEWEST_PEOPLE or len(able) < 2 or len(people) - count < 2:
        raise UsageError(
            f"prepare_data.py: {len(people)} people with usable recordings, {len(able)} of them with more than one; "
            f"wanted: at least {FEWEST_PEOPLE}, two of them with two recordings"
        )
    return sorted(rng.choice(able, min(count, len(able)), replace=False).tolist())


def trials_of(people: dict[str, list[str]], rng) -> list[tuple[int, str, str]]:
    """Pairs of one person, and for each of these up to ``NONTARGETS`` pairs of two."""
    targets = []
    for paths in people.values():
        pairs = list(itertools.combinations(paths, 2))
        chosen = rng.choice(len(pairs), min(len(pairs), MOST_TARGETS), replace=False)
        targets += [(1, *pairs[i]) for i in sorted(chosen)]
    names, nontargets = sorted(people), set()
    for _ in range(NONTARGETS * len(targets)):  # a pair that is drawn again counts once
        pair = [people[names[i]] for i in sorted(rng.choice(len(names), 2, replace=False))]
        nontargets.add((0, *(paths[rng.integers(len(paths))] for paths in pair)))
    return targets + sorted(nontargets)


def write_rows(path: Path, rows):
    """Write a list, with tabs between the columns if a name holds spaces."""
    between = separator_for([str(cell) for row in rows for cell in row])
    text = "".join(f"{between.join(map(str, row))}\n" for row in rows)
    write_atomically(path, text.encode(errors=LIST_TEXT["errors"]))


def write_config(path: Path, base: Path, keys: dict[str, str]):
    """Write ``base`` with other values for some of its keys."""
    import yaml

    text = base.read_text(encoding="utf-8")
    for key, value in keys.items():
        line = yaml.safe_dump({key: value}, allow_unicode=True, width=1 << 20).strip()
        text = re.sub(rf"^{key}: .*$", lambda found, line=line: line, text, count=1, flags=re.M)
    write_atomically(path, text.encode(errors=LIST_TEXT["errors"]))


def main(argv) -> int:
    """Run the command line: 0 done, 2 bad usage or too few people."""
    parser = Parser("prepare_data.py", __doc__.splitlines()[0])
    parser.add_argument("folder", help="folder with a folder of recordings for each person")
    parser.add_argument("--out", required=True, help="folder for the lists and the configuration")
    parser.add_argument("--share", type=float, default=0.2, help="share of the people for the trials (default 0.2)")
    parser.add_argument("--seed", type=int, default=1, help="seed of what is drawn (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="threads that read recordings (default 2)")
    args = parser.parse_args(argv)
    folder, out = Path(args.folder).absolute(), Path(args.out)
    if not folder.is_dir():
        raise UsageError(f"prepare_data.py: no such folder: '{folder}'")
    if not 0 < args.share < 1 or args.workers < 1:
        raise UsageError("prepare_data.py: --share must lie between 0 and 1, --workers be at least 1")
    people, unfit = without_unfit(folder, people_of(folder), args.workers)
    rng = np.random.default_rng(args.seed)
    tested = held_out(people, args.share, rng)
    train = [(name, path) for name, paths in people.items() if name not in tested for path in paths]
    trials = trials_of({name: people[name] for name in tested}, rng)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot make '{error.filename}': {error.strerror}") from error
    files = [out / name for name in ("train_list.txt", "trials.txt", "config.yaml", "bad_files.txt")]
    write_rows(files[0], train)
    write_rows(files[1], trials)
    lists = {"train_list": str(files[0]), "test_list": str(files[1])}
    lists |= {"train_path": str(folder), "test_path": str(folder), "save_path": f"exps/{out.resolve().name}"}
    write_config(files[2], ROOT / "configs" / "small_speech.yaml", lists)
    write_rows(files[3], unfit)
    tell(files, people, tested, train, trials, unfit, lists["save_path"])
    return 0


def tell(files, people, tested, train, trials, unfit, save_path: str):
    """Say what was made, and what to run next."""
    targets = sum(label for label, *_ in trials)
    print(f"{files[0]}: {len(train)} recordings of {len(people) - len(tested)} people to train on")
    print(f"{files[1]}: {len(trials)} trials of {len(tested)} other people, {targets} of them of one person")
    if unfit:
        print(f"{files[3]}: {len(unfit)} files left out, the first {unfit[0][0]}: {unfit[0][1]}")
    print("next:")
    print(f"  python trainSpeakerNet.py --config {shlex.quote(str(files[2]))}")
    print(f"  python verify.py A.wav B.wav --initial_model {shlex.quote(save_path)}/model/model_best.model")


command = functools.partial(run, main)

if __name__ == "__main__":
    sys.exit(command())
