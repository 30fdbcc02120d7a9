"""Say what happened in a NaN dump, why, and which fix was tried on it and worked.

python analyze_nan_debug.py                                                  # every dump below exps/*/debug_nan/
python analyze_nan_debug.py exps/run/debug_nan/nan_batch_1234_epoch_18.pt    # one dump
python analyze_nan_debug.py exps/run --html report.html                      # a folder, and a page to look at
"""

import argparse
import contextlib
import json
import signal
import sys
import traceback
from pathlib import Path

from errors import UsageError, with_place, write_any_text
from settings.command_line import Parser, complain, existing_folder, need
from storage.files import write_atomically


def arguments(argv) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser("analyze_nan_debug.py", __doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", metavar="FILE|DIR", help="dumps, or folders that hold some")
    parser.add_argument("--json", action="store_true", help="one JSON object a dump, a line each")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page")
    parser.add_argument("--patch", metavar="FILE", help="write the first verified change of code as a diff")
    parser.add_argument("--no-replay", action="store_true", help="statistics only: no plug-in is imported")
    parser.add_argument(
        "--trust-changed-code", action="store_true", help="replay with plug-ins that have changed since"
    )
    parser.add_argument(
        "--root", metavar="OLD=NEW", action="append", default=[], help="read files of the folder OLD in the folder NEW"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="time for the trials of one dump (default 60)")
    args = parser.parse_args(argv)
    if not args.seconds >= 0:
        raise UsageError(f"--seconds: must be at least 0, got {args.seconds:g}")
    pairs = [text.split("=", 1) for text in args.root]
    wrong = next((text for text, pair in zip(args.root, pairs) if len(pair) < 2 or not all(pair)), None)
    if wrong:
        raise UsageError(f"--root {wrong}: write OLD=NEW, the folder in the dump and the folder where it is now")
    args.root = pairs
    return args


def find_dumps(paths) -> list[Path]:
    """Dumps and lists of lost trials, oldest first; without paths those below exps/*/debug_nan/ and exps/*/result/."""
    found = []
    for path in map(Path, paths or ["exps"]):
        if path.is_dir():
            names = {"nan_*.pt": "debug_nan", "spike_*.pt": "debug_nan", "nan_trials*_epoch_*.txt": "result"}
            patterns = [f"{'**' if paths else f'*/{folder}'}/{name}" for name, folder in names.items()]
            inside = [file for pattern in patterns for file in path.glob(pattern)]
            found += sorted(inside, key=lambda p: p.stat().st_mtime)
        elif path.exists():
            found.append(path)
        elif paths:
            raise UsageError(f"{path}: no such file or folder")
    return list(dict.fromkeys(found))


def main(argv=None) -> int:
    """Run the command line: 0 analysed, 1 nothing found, 2 unreadable input or bad usage."""
    write_any_text()
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = arguments(argv)
        paths = find_dumps(args.paths)
        for flag in ("html", "patch"):
            if getattr(args, flag):
                existing_folder(Path(getattr(args, flag)).absolute().parent, f"--{flag}")
        if args.html:
            need("analyze_nan_debug.py --html", "matplotlib")
    except UsageError as error:
        return complain(error, argv)
    if args.html and (Path(args.html).suffix in (".pt", ".model", ".wav", ".flac") or Path(args.html).is_dir()):
        print(f"--html: {args.html} is no name for a page", file=sys.stderr)
        return 2
    if not paths:
        where = ", ".join(args.paths) or "exps/*/debug_nan/"
        print(f"no dump found in {where}", file=sys.stderr)
        return 1
    return analyse_all(paths, args)


def analyse_all(paths, args) -> int:
    """Analyse dumps one after the other; an unreadable one is named and the others are analysed all the same."""
    from postmortem.analysis import analyse
    from postmortem.evaluation_faults import analyse_trials
    from postmortem.report import summary_lines, text_report
    from storage.dump import DumpError
    from training.allocator import keep_freed_memory

    keep_freed_memory()
    analyses, pages, status = [], [], 0
    for path in paths:
        try:
            if path.suffix == ".txt":
                lost = analyse_trials(path, args.root)
                print(json.dumps(lost.verdict) if args.json else "\n".join([*lost.lines(), ""]), flush=True)
                pages.append(lost)
                continue
            with contextlib.redirect_stdout(sys.stderr):  # what plug-ins print is no part of the report
                analysis = analyse(path, not args.no_replay, args.trust_changed_code, args.seconds, args.root)
        except DumpError as error:
            print(error, file=sys.stderr)
            status = 2
            continue
        except Exception as error:  # one dump that breaks the analysis must not take the others with it
            hint = "" if "traceback" in args else "; --traceback shows all of it"
            print(f"{path}: the analysis failed, please report it: {with_place(error)}{hint}", file=sys.stderr)
            if "traceback" in args:
                traceback.print_exc()
            status = 2
            continue
        analyses.append(analysis)
        pages.append(analysis)
        print(json.dumps(analysis.verdict) if args.json else "\n".join([*text_report(analysis), ""]), flush=True)
    if len(analyses) > 1 and not args.json:
        print("\n".join(summary_lines(analyses)))
    if args.patch:
        status = max(status, write_patch(analyses, args.patch))
    if args.html and pages:
        from postmortem.page import render

        try:
            write_atomically(args.html, render(pages).encode(), 0o600)  # waveforms of voices
        except UsageError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"page: {args.html}", file=sys.stderr if args.json else sys.stdout)
    return status


def write_patch(analyses: list, path: str) -> int:
    """Write the first verified diff of the analyses; returns 2 if the file cannot be written."""
    advice = [fix for a in analyses for fix in a.verdict["recommendations"] if fix["action"] == "fix_code"]
    diff = next((fix["change"]["diff"] for fix in advice if fix["verdict"] == "verified"), None)
    if diff is None:
        print("--patch: no change of code was verified; nothing was written", file=sys.stderr)
        return 0
    try:
        write_atomically(path, diff.encode(), 0o644)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"patch: {path} (git apply {path})", file=sys.stderr)
    return 0


def command() -> int:
    """Run the command line of this process."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    return main()


if __name__ == "__main__":
    sys.exit(command())
