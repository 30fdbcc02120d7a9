"""From options and lists to a back-end, and from a back-end and a trial list to scores."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from corpus.lists import read_train_list
from errors import UsageError
from scoring.backend import Backend
from scoring.enrollment import enrollment_weights
from scoring.intervals import speaker_of
from scoring.plda import PLDA
from scoring.sources import is_embedding_file


@dataclass
class ScoredTrials:
    """A trial list with its scores; NaN if a side has no finite embedding."""

    labels: np.ndarray  # (N,) 0 or 1
    first: list
    second: list
    names: tuple  # columns of the features
    features: np.ndarray  # (N, K), the first column is the score
    problems: dict = field(default_factory=dict)  # {utterance or model: (reason, trials it spoils)}

    @property
    def scores(self):
        """Scores (N,) float64."""
        return self.features[:, 0]

    @classmethod
    def without_scores(cls, labels, first, second):
        """A list that ``add_system`` is to give scores."""
        return cls(labels, first, second, (), np.empty((len(labels), 0)))

    def add_system(self, name: str, scores: dict, path):
        """Add a column of another system's scores {(first, second): score}; a trial that is not in it gets NaN."""
        column = np.array([scores.get(pair, np.nan) for pair in zip(self.first, self.second)])
        missing = np.flatnonzero(np.isnan(column))
        if len(missing) == len(column):
            raise UsageError(f"{path}: has no score of the trials, such as {self.first[0]} {self.second[0]}")
        if len(missing):
            i = missing[0]
            self.problems[str(path)] = (f"no finite score of {self.first[i]} {self.second[i]} and others", len(missing))
        self.names, self.features = (*self.names, name), np.column_stack([self.features, column])

    @property
    def finite(self):
        """Trials (N,) with a score and every feature."""
        return np.isfinite(self.features).all(axis=1)


def read_cohort(source, cohort: str, speaker_list: str):
    """Names of the cohort's utterances, and their speakers (None if unknown)."""
    if not is_embedding_file(cohort):
        speakers, labels, paths, _ = read_train_list(cohort)
        return paths, [speakers[i] for i in labels]
    names = source.read(cohort)
    if not speaker_list:
        return names, None
    speakers, labels, paths, _ = read_train_list(speaker_list)
    of = {path: speakers[i] for path, i in zip(paths, labels)}
    missing = [name for name in names if name not in of]
    if missing:
        raise UsageError(
            f"{speaker_list}: no speaker for {len(missing)} of the cohort's embeddings, such as {missing[0]}"
        )
    return names, [of[name] for name in names]


def without_trial_speakers(names, speakers, trial_names, say):
    """Leave speakers of the trials out of a cohort: against itself a voice scores like no impostor.

    Those of the trials are known by their first folders. A list may call them otherwise: it says which utterances are
    of one person, and folders say who that is, unless one of them holds several people.
    """
    folders = [speaker_of(name) for name in names]
    own = folders if speakers is None else speakers
    if len(set(zip(folders, own))) > len(set(folders)):
        folders = [None] * len(names)
    used = set(trial_names)
    used_speakers = {speaker_of(name) for name in used} - {None}
    met = [name in used or folder in used_speakers for name, folder in zip(names, folders)]
    used_speakers |= {speaker for speaker, here in zip(own, met) if here} - {None}
    keep = [i for i, name in enumerate(names) if name not in used and own[i] not in used_speakers]
    if len(keep) < len(names):
        say(f"cohort: {len(names) - len(keep)} of {len(names)} utterances are of speakers of the trials: left out")
    if not keep:
        raise UsageError(
            "--cohort: every speaker of it occurs in --trials or --calibrate; draw the held-out trials from fewer "
            "speakers (--make_trials with --speakers)"
        )
    return [names[i] for i in keep], None if speakers is None else [speakers[i] for i in keep]


def build_backend(a, source, trial_names, say) -> Backend:
    """The chain that score.py's options ``a`` ask for, without its calibration; ``say`` prints a line."""
    identity = source.identity
    vad = source.vad or "none"
    if a.backend:
        backend = Backend.load(a.backend, identity)
        unlike = backend.unlike(vad)
        if unlike:
            say(f"WARNING: {unlike}")
        return backend
    backend = Backend(enrollment=a.enroll_by, prior=a.p_target, identity=identity, vad=vad)
    if a.plda:
        loaded = Backend.load(a.plda, identity)
        if loaded.plda is None:
            raise UsageError(f"{a.plda}: a back-end without PLDA")
        backend.plda, backend.mean = loaded.plda, loaded.mean
    if not a.cohort:
        return backend
    names, speakers = read_cohort(source, a.cohort, a.cohort_speakers)
    names, speakers = without_trial_speakers(names, speakers, trial_names, say)
    x, problems = source.embeddings(names)
    good = np.setdiff1d(np.arange(len(names)), list(problems))
    for i in list(problems)[:10]:
        say(f"cohort: {names[i]}: {problems[i]}: left out")
    if len(problems) > 10:
        say(f"cohort: ... and {len(problems) - 10} more without a finite embedding")
    if not len(good):
        raise UsageError(f"{a.cohort}: none of the cohort's {len(names)} utterances has a finite embedding")
    x = x[good]
    speakers = None if speakers is None else np.array(speakers)[good]
    if a.submean:
        backend.mean = x.mean(axis=0, dtype=np.float64)
    if a.train_plda:
        backend.plda = train_plda(x if backend.mean is None else x - backend.mean, speakers, a, say)
    if a.norm != "none":
        if a.cohort_by == "speaker" and speakers is None:
            raise UsageError("--cohort_by speaker: needs --cohort_speakers, or a train list as --cohort")
        backend.set_cohort(x, None if a.cohort_by == "utterance" else speakers, a.top_n if a.norm == "asnorm" else 0)
        if a.norm == "asnorm" and a.top_n >= len(backend.cohort):
            say(f"--top_n {a.top_n}: the cohort has {len(backend.cohort)} members, so AS-norm is S-norm")
    return backend


def train_plda(x, speakers, a, say) -> PLDA:
    """PLDA of the cohort, or a UsageError that says what is wrong with it."""
    if speakers is None:
        raise UsageError("--train_plda: needs the speakers: --cohort_speakers, or a train list as --cohort")
    try:
        plda, history = PLDA.fit(x, speakers, a.lda_dimension)
    except ValueError as error:
        raise UsageError(f"{a.cohort}: {error}") from error
    people = len(np.unique(speakers))
    say(f"PLDA of {len(x)} utterances of {people} speakers: dimension {len(plda.psi)}, {len(history)} iterations")
    return plda


def score_list(
    backend, source, labels, first, second, models=None, quality: bool = False, enroll_weights: str = "equal"
) -> ScoredTrials:
    """Score trials of two utterances, or with ``models`` {name: [utterances]} of a model and an utterance.

    With ``quality`` the features hold the quality measures, else the score alone. ``enroll_weights`` of a model's
    utterances: "equal", or "quality" for those of ``enrollment_weights``.
    """
    tests = list(dict.fromkeys(second if models else [*first, *second]))
    x, lost = source.embeddings(tests)
    problems = {tests[i]: reason for i, reason in lost.items()}
    seconds = source.seconds(tests) if quality else None
    if seconds is not None:
        problems.update({tests[i]: "unknown duration" for i in np.flatnonzero(np.isnan(seconds)) if i not in lost})
    number = {name: i for i, name in enumerate(tests)}
    if models is None:
        pairs = np.array([[number[a], number[b]] for a, b in zip(first, second)])
        _, names, features = backend.score_trials(x, x, pairs, None, seconds, seconds)
    else:
        trials = (first, [number[name] for name in second])
        weighs = enroll_weights == "quality"
        names, features = _score_models(backend, source, trials, models, x, seconds, problems, weighs)
    if not quality:
        names, features = names[:1], features[:, :1]
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    spoiled = Counter(name for i in bad for name in {first[i], second[i]})
    problems = {name: (reason, spoiled[name]) for name, reason in problems.items()}
    return ScoredTrials(labels, first, second, names, features, problems)


def _score_models(backend, source, trials, models, x, test_seconds, problems, weighs: bool = False):
    """Names and features of trials (model names, test rows of x); a model enrolls with its finite utterances."""
    first, rows = trials
    owners, utterances = [], []
    for name in dict.fromkeys(first):
        if name not in models:
            problems[name] = "no such model in --enroll"
        owners += [name] * len(models.get(name, ()))
        utterances += models.get(name, ())
    if not utterances:
        raise UsageError(
            f"--enroll: has none of the models of the trials, such as {first[0]}; the first name of each trial, of the "
            "held-out ones too, is a model of that list"
        )
    enrolled, lost = source.embeddings(utterances)
    for i, reason in lost.items():
        problems[f"{utterances[i]} of model {owners[i]}"] = f"{reason}; the model does without it"
    good = np.setdiff1d(np.arange(len(utterances)), list(lost))
    if not len(good):
        raise UsageError(f"--enroll: no utterance has a finite embedding; the first, {utterances[0]}: {lost[0]}")
    there = {name: i for i, name in enumerate(dict.fromkeys(owners[i] for i in good))}
    for name in set(owners) - set(there):
        problems[name] = "none of its utterances has a finite embedding"
    seconds = None if test_seconds is None else source.seconds([utterances[i] for i in good])
    scoreable = np.array([name in there for name in first])
    pairs = np.array([[there.get(a, 0), b] for a, b in zip(first, rows)])[scoreable]
    groups = np.array([there[owners[i]] for i in good])
    weights = None
    if weighs:
        sounds, weights = source.acoustics([utterances[i] for i in good]), np.empty(len(good))
        for group in set(groups.tolist()):
            own = np.flatnonzero(groups == group)
            weights[own] = enrollment_weights([sounds[row] for row in own])
    _, names, found = backend.score_trials(enrolled[good], x, pairs, groups, seconds, test_seconds, weights)
    features = np.full((len(first), found.shape[1]), np.nan)
    features[scoreable] = found
    return names, features
