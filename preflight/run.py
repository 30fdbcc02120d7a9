"""Look at everything before a long run: keys, plug-in sources, audio files, lists, and one step.

python trainSpeakerNet.py --config configs/demo.yaml --preflight
"""

import os
from pathlib import Path

from config import Config
from corpus.audio import samples_of
from corpus.augmentation import find_noise, find_rirs
from corpus.lists import read_trials, trial_lines
from corpus.loader import usable_cores
from corpus.measuring import Source, scan
from corpus.sources import trial_sources
from corpus.train_list import train_list_of
from errors import plural, shell_path
from preflight import dry_step, lint
from preflight.files import describe_files, report_files
from preflight.lists import check_train_list, check_trials
from preflight.report import Report
from scoring.cautions import known_in
from settings.reader import table_defaults


def run_checks(config: Config, written: dict, build) -> int:
    """Run every check; ``build(say)`` makes the trainer. Returns the exit status: 0 start, 2 do not."""
    report = Report()
    report.line(f"preflight of {config.config or 'the command line'}, for a run in {config.save_path}")
    if not config.eval:
        lint.check_keys(config, written, report)
        for line in table_defaults(config, written):
            report.finding("note", line)
        lint.check_plugins(config, report)
    check_data(config, report)
    if not config.eval:
        dry_step.check_step(config, build, report)
    report.line()
    folder = Path(config.save_path, "result")
    report.line(f"the whole report: {folder / 'preflight.txt'}")
    report.line(report.verdict())
    report.write(folder)
    return 2 if report.counts["error"] else 0


def check_data(config: Config, report):
    """Scan every audio file that the run would read, and check the lists against each other."""
    report.heading("audio files and lists")
    sources = {}

    def add(path, place, role):
        source = sources.setdefault(os.path.realpath(path), Source(str(path), place))
        source.roles.add(role)

    if not config.eval:
        listed = train_list_of(config)
        listed.open_packs()
        for i, (source, numbers) in enumerate(listed.by_source()):
            if source.pack:
                look = f"python pack_data.py --out {shell_path(source.pack)} --check reads it whole"
                report.finding("note", f"{listed.read_from(i)}; it is not looked at here, {look}")
                continue
            for path, number in zip(listed.paths.between(numbers.start, numbers.stop), numbers):
                add(os.path.join(source.root, path), listed.place(number), "train")
    trials = trial_sources(config)
    for source in trials:
        tested = {}
        for pair, line in zip(zip(*read_trials(source.path)[1:]), trial_lines(source.path)):
            for path in pair:
                tested.setdefault(path, line)
        for path, line in tested.items():
            add(os.path.join(source.root, path), f"{source.path}:{line}", "trial")
    if config.augment and not config.eval:
        for path in [p for found in find_noise(config.musan_path).values() for p in found] if config.musan_path else ():
            add(path, "musan_path", "noise")
        for path in find_rirs(config.rir_path) if config.rir_path else ():
            add(path, "rir_path", "rir")
    workers = min(max(config.nDataLoaderThread, 1), usable_cores())
    measured = list(scan(list(sources.values()), workers))
    rate = config.sample_rate
    describe_files(measured, report, rate)
    report_files(measured, samples_of(config.max_frames, rate) / rate, config.eval, report, config.channel)
    if not config.eval:
        check_train_list(config, report)
        shared = [(s.place, s.path) for s, _ in measured if {"train", "trial"} <= s.roles]
        if shared:
            title = f"in the train list and in the trials: {plural(len(shared), 'file')} - the EER will be too good"
            report.finding("warning", title, shared)
        pairs = [read_trials(source.path) for source in trials]
        people = known_in(listed.speakers, [], [("", dict.fromkeys([*first, *second])) for _, first, second in pairs])
        if people:
            report.finding("warning", people)
    for source in trials:
        check_trials(source.path, report)
