"""Score the trainer and the analyser on faults whose truth is known.

python benchmarks/faults/run.py --jobs 2
python benchmarks/faults/run.py --only F03,F19,C2 --keep /tmp/faults
python benchmarks/faults/run.py --json faults.json

Each fault is put into a copy of the checkout and of a few synthetic voices; the real command lines run there. Where
analyze_nan_debug.py is missing only the trainer is scored. The exit status is 0 where every goal is met.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from catalog import FAULTS
from judge import Score, detection_problems, judge, table, totals
from voices import leave_out
from workspace import ROOT, SETTINGS, Workspace, preload, start, wait

MOST_DUMPS = 4  # of one run that are analysed
ANALYSIS_SECONDS = 180
VOICES = {"speakers": 6, "trial_speakers": 4, "utterances": 5, "seconds": 0.9, "nontargets": 40}


def make_voices(folder: Path) -> Path:
    """Make the voices that every fault copies."""
    words = [f"--{name}={value}" for name, value in VOICES.items()]
    (status,) = wait(
        [start(ROOT / "make_demo_data.py", ["--out", folder / "voices", *words], folder / "make", {})], 120
    )
    if status:
        raise SystemExit(f"make_demo_data.py failed: {(folder / 'make.err').read_text()}")
    return folder / "voices"


def train_stages(fault, workspace, settings: dict) -> list[int]:
    """Run all stages of a fault, ``settings`` above its own; returns the exit statuses."""
    if fault.prepare is not None:
        fault.prepare(workspace)
    statuses = [workspace.train({**fault.settings, **settings}, fault.seconds, fault.processes)]
    for stage in fault.more:
        if stage.prepare is not None:
            stage.prepare(workspace)
        values = {**fault.settings, **stage.settings, **settings}
        statuses.append(workspace.train(values, fault.seconds, fault.processes))
    return statuses


def same_fault(before: list[dict], after: list[dict], data: Path, other: Path) -> list[dict]:
    """Incidents of a second run that are those of the first: of the same file, or of no file as well."""

    def key(incident, root):
        return {os.path.relpath(path, root) for path in incident.get("files") or []}

    found = []
    for new in after:
        files = key(new, other)
        if any(files & key(old, data) or not (files or old.get("files")) for old in before):
            found.append(new)
    return found


def mentioned_files(recommendation: dict, workspace) -> list[str]:
    """The files that a recommendation to leave out names."""
    files = sorted(str(path) for path in workspace.data.rglob("*.*") if path.suffix in (".wav", ".flac"))
    parts = [json.dumps(recommendation.get(key)) for key in ("change", "text")]
    return next((found for part in parts if (found := [path for path in files if path in part])), [])


def rerun(fault, workspace, voices, recommendation, number: int, incident) -> str | None:
    """Train anew with a verified fix alone; returns what is wrong with it, or None."""
    again = Workspace.make(workspace.folder / f"rerun{number}", voices, fault.plugins)
    change, text = recommendation.get("change") or {}, f"{recommendation['action']} {recommendation.get('change')}"
    if recommendation["action"] == "fix_code":
        change, text = {}, recommendation["text"]
        words = ["patch", "-p1", "--no-backup-if-mismatch"]
        diff = (recommendation.get("change") or {}).get("diff", "")
        done = subprocess.run(words, cwd=again.code, input=diff, text=True, capture_output=True)
        if done.returncode or not diff:
            return f"{text}: the diff does not apply: {(done.stdout + done.stderr).strip()}"
    if recommendation["action"] == "exclude_file":
        inside = [os.path.relpath(path, workspace.data) for path in mentioned_files(recommendation, workspace)]
        prepare = fault.prepare
        if not inside:
            return f"{text}: no file of the run is named"

        def without(target):
            if prepare is not None:
                prepare(target)
            for name in inside:
                leave_out(target, str(target.data / name))

        fault, change, text = dataclasses.replace(fault, prepare=without), {}, f"exclude_file {', '.join(inside)}"
    statuses = train_stages(fault, again, change)
    if any(status not in (0, 3) for status in statuses):
        return f"{text}: exit status {statuses} when trained again"
    left = same_fault([incident], again.incidents(), workspace.data, again.data)
    return f"{text}: {left[0]['reason']} again when trained with it" if left else None


def check_fixes(fault, workspace, voices, reports) -> list[tuple[dict, str]]:
    """Train again with each verified setting, exclusion and diff: (recommendation, what is wrong with it)."""
    found = {}
    by_dump = {incident.get("dump"): incident for incident in workspace.incidents()}
    for dump, report in reports:
        for recommendation in report.get("recommendations") or []:
            key = json.dumps([recommendation.get("action"), recommendation.get("change"), recommendation.get("text")])
            actions = ("set", "exclude_file", "fix_code")
            if recommendation.get("verdict") != "verified" or recommendation.get("action") not in actions:
                continue
            if key not in found:
                incident = by_dump.get(dump.name, {"files": []})
                found[key] = recommendation, rerun(fault, workspace, voices, recommendation, len(found), incident)
    return [(recommendation, wrong) for recommendation, wrong in found.values() if wrong]


def read_reports(fault, workspace, score) -> list:
    """Analyse the dumps; returns (dump, report) pairs."""
    reports = []
    for dump in workspace.dumps()[: MOST_DUMPS if len(fault.truths) > 1 else 1]:
        status, report, error = workspace.analyse(dump, ANALYSIS_SECONDS)
        if status or report is None:
            last = (error.strip().splitlines() or ["no JSON"])[-1]
            score.problems.append(f"analysis of {dump.name}: status {status}, {last[:200]}")
        else:
            reports.append((dump, report))
    return reports


def judge_reports(fault, workspace, score, reports, failed):
    """Score each truth by the dump whose report agrees best."""
    verdicts = []
    for truth in fault.truths:
        judged = [judge(truth, report, workspace, fault.plugins, failed) for _, report in reports]
        best = max(judged, key=lambda v: [v["cause"], v["place"] or False, v["fix"] or False], default=None)
        none = {"cause": False, "place": False if truth.places else None, "fix": False if truth.fixes else None}
        verdicts.append(best or {**none, "said": []})
    for name in ("cause", "place", "fix"):
        values = [v[name] for v in verdicts if v[name] is not None]
        setattr(score, name, all(values) if values else None)
    score.problems += [text for verdict in verdicts for text in verdict["said"]]


def reason_of(dump: Path) -> str:
    """The reason that a dump gives."""
    import torch

    return torch.load(dump, weights_only=True)["reason"]


def run_fault(job) -> Score:
    """Score a fault by its name, for preparations cannot be pickled; an error of the bench is the fault's problem."""
    name, folder, voices = job
    fault = next(f for f in FAULTS if f.id == name)
    begin, score = time.monotonic(), Score(fault.id, fault.title)
    try:
        train_and_analyse(fault, folder, voices, score)
    except Exception as error:  # whatever a broken dump or report leads to, the other faults are still of interest
        score.detected = False
        score.problems.append(f"the bench failed: {type(error).__name__}: {error}")
    score.seconds = time.monotonic() - begin
    return score


def train_and_analyse(fault, folder, voices, score):
    """Train with a fault, analyse its dumps, train again with the verified fixes."""
    workspace = Workspace.make(folder / fault.id, voices, fault.plugins)
    statuses = train_stages(fault, workspace, {})
    score.reasons = [reason_of(dump) for dump in workspace.dumps()]
    if fault.after is not None:
        fault.after(workspace)
    score.problems = detection_problems(fault, workspace, statuses, score.reasons)
    score.detected = not score.problems
    if (ROOT / "analyze_nan_debug.py").is_file() and fault.truths:
        analyse(fault, workspace, voices, score)


def analyse(fault, workspace, voices, score):
    """Analyse the dumps, train again with the verified fixes, and score."""
    reports = read_reports(fault, workspace, score)
    wrong = check_fixes(fault, workspace, voices, reports)
    score.wrong_fixes = len(wrong)
    judge_reports(fault, workspace, score, reports, [recommendation for recommendation, _ in wrong])
    score.problems += [f"verified but wrong: {text}" for _, text in wrong]


def chosen_faults(only: str):
    """The faults of --only, all without; a name that is none ends the program."""
    wanted = [name for name in only.split(",") if name]
    unknown = set(wanted) - {fault.id for fault in FAULTS}
    if unknown:
        raise SystemExit(f"--only: no such fault: {', '.join(sorted(unknown))}")
    return [fault for fault in FAULTS if not wanted or fault.id in wanted]


def main(argv=None) -> int:
    """Run the bench; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", default="", help="comma-separated ids (default all)")
    parser.add_argument("--jobs", type=int, default=1, help="faults at a time (default 1)")
    parser.add_argument("--keep", metavar="FOLDER", help="work here and leave everything for inspection")
    parser.add_argument("--json", metavar="FILE", help="write the scores to a file")
    args = parser.parse_args(argv)
    faults, begin = chosen_faults(args.only), time.monotonic()
    os.environ.update({"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""})
    os.environ["MPLBACKEND"] = "Agg"
    preload()
    temporary = contextlib.nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory()
    with temporary as name:
        folder = Path(name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        voices, scores = make_voices(folder), []
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            for score in pool.imap(run_fault, [(fault.id, folder, voices) for fault in faults], chunksize=1):
                scores.append(score)
                print(f"{score.id}: {'ok' if not score.problems else score.problems[0]}", file=sys.stderr, flush=True)
    print(table(scores))
    print(
        f"{len(scores)} faults and controls in {time.monotonic() - begin:.0f} s, model {SETTINGS['model']} or as named"
    )
    if args.json:
        content = {"faults": [dataclasses.asdict(score) for score in scores], "totals": totals(scores)}
        Path(args.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(reached >= goal for _, reached, goal, _ in totals(scores)) else 1


if __name__ == "__main__":
    sys.exit(main())
