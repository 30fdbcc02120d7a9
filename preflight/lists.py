"""Repeated and contradicting lines of the train list and of the trials."""

import os

import numpy as np

from config import Config
from corpus.audio import class_count
from corpus.lists import read_train_list, read_trials
from errors import plural


def check_train_list(config: Config, report):
    """Report repeated lines, speakers with one utterance, and the number of classes."""
    speakers, labels, paths, lines = read_train_list(config.train_list)
    first, repeated, contradicting = {}, [], []
    for index, path in enumerate(map(os.path.normpath, paths)):
        other = first.setdefault(path, index)
        if other != index:
            same = labels[other] == labels[index]
            row = (f"{config.train_list}:{lines[index]}", path, f"first at line {lines[other]}")
            (repeated if same else contradicting).append(row)
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
        lines_of = {label: lines[index] for index, label in enumerate(labels)}
        rows = [(f"{config.train_list}:{lines_of[label]}", speakers[label]) for label in single]
        report.finding(level, f"with one utterance: {plural(len(rows), 'speaker')}{why}", rows)
    classes = class_count(len(speakers), config.speed_perturb)
    report.line(f"  {len(speakers)} speakers, {classes} classes: 0 is '{speakers[0]}', ..., the last '{speakers[-1]}'")
    if config.nClasses > classes:
        report.finding("warning", f"nClasses: {config.nClasses}, but the list has {classes}: the rest is never trained")


def check_trials(path, first, second, numbers, report):
    """Report repeated trials, and pairs that are called target and nontarget."""
    labels, _, _ = read_trials(path)
    seen, repeated, contradicting = {}, [], []
    for index, (a, b) in enumerate(zip(first, second)):
        other = seen.setdefault((min(a, b), max(a, b)), index)
        if other != index:
            row = (f"{path}:{numbers[index]}", a, b, f"first at line {numbers[other]}")
            (repeated if labels[other] == labels[index] else contradicting).append(row)
    if contradicting:
        title = f"target and nontarget trial: {plural(len(contradicting), 'pair')} - keep one of the lines"
        report.finding("error", title, contradicting)
    if repeated:
        report.finding("warning", f"repeated: {plural(len(repeated), 'trial')} - each counts again", repeated)
    report.line(f"  {plural(len(labels), 'trial')}, {int(labels.sum())} of them target trials")
