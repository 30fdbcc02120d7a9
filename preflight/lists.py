"""Repeated and contradicting lines of the train list and of the trials."""

import os

import numpy as np

from config import Config
from corpus.audio import class_count
from corpus.lists import read_trials, trial_lines
from corpus.train_list import train_list_of
from errors import plural


def check_train_list(config: Config, report):
    """Report repeated lines, speakers with one utterance, and the number of classes."""
    listed = train_list_of(config)
    speakers, labels = listed.speakers, listed.labels
    first, repeated, contradicting = {}, [], []
    for source, numbers in listed.by_source():
        root = source.root if listed.parts is not None else ""
        for index, name in zip(numbers, listed.paths.between(numbers.start, numbers.stop)):
            path = os.path.normpath(os.path.join(root, name))
            other = first.setdefault(path, index)
            if other != index:
                same = labels[other] == labels[index]
                where = f"first at line {listed.lines[other]}" if not root else f"first at {listed.place(other)}"
                (repeated if same else contradicting).append((listed.place(index), path, where))
    if contradicting:
        title = f"listed under two speakers: {plural(len(contradicting), 'file')} - keep one of the lines"
        report.finding("error", title, contradicting)
    if repeated:
        report.finding(
            "warning", f"repeated in the train list: {plural(len(repeated), 'line')} - each counts again", repeated
        )
    single = np.flatnonzero(np.bincount(labels) == 1)
    if len(single):
        level, why = ("warning", " - a row repeats the file") if config.nPerSpeaker > 1 else ("note", "")
        rows = [(listed.place(index), speakers[labels[index]]) for index in np.flatnonzero(np.isin(labels, single))]
        rows.sort(key=lambda row: row[1])
        report.finding(level, f"with one utterance: {plural(len(rows), 'speaker')}{why}", rows)
    classes = class_count(len(speakers), config.speed_perturb)
    report.line(f"  {len(speakers)} speakers, {classes} classes: 0 is '{speakers[0]}', ..., the last '{speakers[-1]}'")
    if config.nClasses > classes:
        report.finding("warning", f"nClasses: {config.nClasses}, but the list has {classes}: the rest is never trained")


def check_trials(path, report):
    """Report repeated trials, pairs that are called target and nontarget, and files against themselves."""
    (labels, first, second), numbers = read_trials(path), trial_lines(path)
    seen, repeated, contradicting = {}, [], []
    for index, (a, b) in enumerate(zip(first, second)):
        other = seen.setdefault((min(a, b), max(a, b)), index)
        if other != index:
            row = (f"{path}:{numbers[index]}", a, b, f"first at line {numbers[other]}")
            (repeated if labels[other] == labels[index] else contradicting).append(row)
    alone = [(f"{path}:{numbers[i]}", a) for i, (a, b) in enumerate(zip(first, second)) if a == b]
    if alone:
        title = (
            f"a file against itself: {plural(len(alone), 'trial')} - the score is 1 whatever the model: take them out"
        )
        report.finding("warning", title, alone)
    if contradicting:
        title = f"target and nontarget trial: {plural(len(contradicting), 'pair')} - keep one of the lines"
        report.finding("error", title, contradicting)
    if repeated:
        report.finding("warning", f"repeated: {plural(len(repeated), 'trial')} - each counts again", repeated)
    report.line(f"  {plural(len(labels), 'trial')}, {int(labels.sum())} of them target trials")
