"""What becomes of a run to which the worst happens: every case of a table, through real processes.

python benchmarks/chaos.py                                    # all cases, on synthetic voices, about 15 minutes
python benchmarks/chaos.py --only kill_a_rank --only link_cut
python benchmarks/chaos.py --kills 50                         # one run, killed 50 times at random moments
python benchmarks/chaos.py --kills 50 --data SET --out FOLDER -- --channels 32 --max_epoch 10

A case passes if the run goes on, starts again by itself, or ends with a status and one line within a bound, and if in
the end its weights, moments, generators and metrics are those of an undisturbed run, bit for bit. SET holds
train_list.txt, trials.txt and wav/. What follows ``--`` goes to trainSpeakerNet.py. Linux only; cases that need root
(small disks, two hosts) are skipped without.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import chaos_cases
import chaos_network
from chaos_world import SMALL, Run, differing


@dataclass
class Outcome:
    """One line of the table."""

    name: str
    what: str
    became: str
    seconds: float
    passed: bool | None  # None: not possible here


class World:
    """Where the cases take place: the data, the folder, and the undisturbed runs that they are compared with."""

    def __init__(self, out: Path, data: Path, settings: dict, seed: int):
        lists = {"train_list": "train_list.txt", "train_path": "wav", "test_list": "trials.txt", "test_path": "wav"}
        self.out, self.settings = out, {**settings, **{key: str(data / name) for key, name in lists.items()}}
        self.chance, self.quiet_runs = random.Random(seed), {}

    def run(self, name: str, **more) -> Run:
        """A new run."""
        shutil.rmtree(self.out / name, ignore_errors=True)
        return Run(self.out / name, {**self.settings, **more})

    def quiet(self, ranks: int = 1, **more) -> Path:
        """save_path of a run that nothing disturbed."""
        key = (ranks, *sorted(more.items()))
        if key not in self.quiet_runs:
            run = self.run(f"quiet_{len(self.quiet_runs)}", **more).start(ranks=ranks)
            if run.end(3600):
                raise SystemExit(f"the undisturbed run ended with an error: {run.log}")
            self.quiet_runs[key] = run.save_path
        return self.quiet_runs[key]

    def compare(self, run: Run, ranks: int = 1, **more) -> str:
        """'' if a run has ended as an undisturbed one, else in what they differ."""
        found = differing(self.quiet(ranks, **more), run.save_path)
        return f"differs in {', '.join(found[:3])}" if found else ""


def killed_at_random(world: World, kills: int) -> tuple[str, bool]:
    """Kill a run so many times, each at a random moment after its start, and start it again each time."""
    began = time.monotonic()
    world.quiet()
    longest = time.monotonic() - began  # of a whole run
    run, done, finished = world.run("kills"), 0, 0
    while done < kills:
        run.start("--nDataLoaderThread", done % 3)
        # Most calls get to train, so far that the run ends after about that many kills; some are killed as they start.
        if world.chance.random() < 0.85:
            run.wait_for_text("batches of up to")
        until = time.monotonic() + world.chance.uniform(0.0, max(1.0, 1.7 * longest / kills))
        run.wait_for(lambda until=until: time.monotonic() > until, 3600)
        if run.process.poll() is None:
            run.kill_all()
            done += 1
            continue
        if run.end():
            return f"a call ended with status {run.process.returncode}: {run.log}", False
        finished += 1  # begin the run again, and go on with killing
        if differing(world.quiet(), run.save_path):
            break
        run = world.run("kills")
    status = run.start().end(3600)
    differs = world.compare(run)
    whole = f", through {finished + 1} runs" if finished else ""
    verdict = differs or "bit-equal to the undisturbed run"
    return f"{done} kills{whole}, status {status} in the end: {verdict}", not status and not differs


def main() -> int:
    """Print the table; exit status 1 if a case did not pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=0, help="kill one run so many times instead of the cases")
    parser.add_argument("--only", action="append", default=[], help="a case by its name, several times for several")
    parser.add_argument("--data", type=Path, help="folder with train_list.txt, trials.txt and wav/; else synthetic")
    parser.add_argument("--out", type=Path, help="folder for runs and logs; else one that is removed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("words", nargs="*", help="keys for trainSpeakerNet.py, behind --: --channels 32")
    args = parser.parse_args()
    settings = {**SMALL, **{k.removeprefix("--"): v for k, v in zip(args.words[::2], args.words[1::2])}}
    for key, value in settings.items():
        settings[key] = int(value) if isinstance(value, str) and value.isdigit() else value
    with tempfile.TemporaryDirectory(prefix="chaos") as temporary:
        out = args.out.resolve() if args.out else Path(temporary)
        data = args.data.resolve() if args.data else synthetic(out / "data")
        world = World(out, data, settings, args.seed)
        if args.kills:
            became, passed = killed_at_random(world, args.kills)
            print(became)
            return int(not passed)
        cases = {**chaos_cases.CASES, **chaos_network.CASES}
        unknown = [name for name in args.only if name not in cases]
        if unknown:
            parser.error(f"no case {unknown[0]}; there are {', '.join(cases)}")
        outcomes = [outcome_of(world, name, cases[name]) for name in args.only or cases]
    failed = [outcome for outcome in outcomes if outcome.passed is False]
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} cases passed or were skipped")
    return int(bool(failed))


def synthetic(folder: Path) -> Path:
    """A set of synthetic voices of a few seconds of training."""
    import make_demo_data

    words = ["--speakers", "12", "--trial_speakers", "4", "--utterances", "8", "--seconds", "0.9", "--nontargets", "40"]
    make_demo_data.main(["--out", str(folder), *words])
    return folder


def outcome_of(world: World, name: str, case) -> Outcome:
    """Let a case happen and print its line."""
    began, passed = time.monotonic(), True
    try:
        became = case(world)
    except chaos_cases.NotHere as reason:
        became, passed = f"not possible here: {reason}", None
    except (AssertionError, TimeoutError) as error:
        became, passed = f"FAILED: {str(error)[:1500]}", False
    outcome = Outcome(name, (case.__doc__ or "").rstrip("."), became, time.monotonic() - began, passed)
    print(f"| {outcome.name} | {outcome.what} | {outcome.became} | {outcome.seconds:.0f} s |", flush=True)
    return outcome


if __name__ == "__main__":
    sys.exit(main())
