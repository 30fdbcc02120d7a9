"""Held-out trials to calibrate on: drawn from a train list, and held against the speakers of the evaluation."""

import numpy as np

from errors import UsageError
from scoring.intervals import speaker_of


def session_of(name: str) -> str:
    """Recording of an utterance in the VoxCeleb layout: its folder."""
    return name.rpartition("/")[0]


def make_trials(labels, paths, pairs: int, seed: int = 0, speakers=0, prefix=0, sessions=None, kinds=None):
    """Draw trials from a train list: ``pairs`` target and as many nontarget trials, fewer if there are no more.

    labels (N,) speaker numbers, paths (N,). ``speakers``: take so many at random (0: all). ``prefix``: nontarget
    trials are of paths that share so many first letters, if those say the corpus or the gender; or of speakers of the
    same ``kinds`` (by speaker number). ``sessions`` (N,): recordings of the utterances, by default their folders. Both
    sides of a target trial are of different recordings if the speaker has several (else of different utterances), and
    every speaker is as likely as any other. Returns (trial labels (T,) int64, first paths, second paths), targets
    first; a seed always gives the same trials; ValueError if there are none.
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels)
    chosen = np.unique(labels)
    if speakers and speakers < len(chosen):
        chosen = np.sort(rng.choice(chosen, speakers, replace=False))
    order = np.argsort(labels, kind="stable")
    edges = np.searchsorted(labels[order], [chosen, chosen + 1])
    utterances = [order[a:b] for a, b in edges.T]
    sessions = [session_of(path) for path in paths] if sessions is None else sessions
    recordings = [np.unique([sessions[i] for i in rows], return_inverse=True)[1] for rows in utterances]
    several = [s for s, rows in enumerate(utterances) if len(rows) > 1]
    if len(chosen) < 2 or not several:
        raise ValueError("trials need two speakers, and a speaker with two utterances")

    def target():
        s = several[rng.integers(len(several))]
        first = rng.integers(len(utterances[s]))
        others = recordings[s] != recordings[s][first]
        if not others.any():
            others = np.arange(len(others)) != first
        return utterances[s][first], utterances[s][rng.choice(np.flatnonzero(others))]

    kinds = [paths[rows[0]][:prefix] for rows in utterances] if kinds is None else [kinds[s] for s in chosen]
    kinds = np.unique(kinds, return_inverse=True)[1]
    alike = [np.flatnonzero((kinds == kind) & (np.arange(len(kinds)) != s)) for s, kind in enumerate(kinds)]
    with_alike = [s for s, others in enumerate(alike) if len(others)]
    if not with_alike:
        raise ValueError(f"no two speakers share the first {prefix} letters" if prefix else "no two speakers are alike")

    def nontarget():
        s = with_alike[rng.integers(len(with_alike))]
        return rng.choice(utterances[s]), rng.choice(utterances[rng.choice(alike[s])])

    found = []
    for draw in (target, nontarget):
        drawn = set()
        for _ in range(20 * pairs):  # a small list has fewer pairs than are wanted: then nearly all of them
            drawn.add(tuple(sorted(map(int, draw()))))
            if len(drawn) == pairs:
                break
        found.append(sorted(drawn))
    rows = np.array(found[0] + found[1])
    trial_labels = np.repeat(np.array([1, 0]), [len(found[0]), len(found[1])])
    return trial_labels, [paths[i] for i in rows[:, 0]], [paths[i] for i in rows[:, 1]]


def shared_speakers(one, other) -> tuple[list, str]:
    """Speakers that occur among both utterance names, and "speakers"; without folders the same of utterances."""
    speakers = [{speaker_of(name) for name in names} for names in (one, other)]
    if None in speakers[0] | speakers[1]:
        return sorted(set(one) & set(other)), "utterances"
    return sorted(speakers[0] & speakers[1]), "speakers"


def check_held_out(path, names, evaluation_path, evaluation_names, allow: bool) -> str:
    """Refuse a calibration list that shares speakers with the evaluation; with ``allow`` return a warning instead.

    Returns "" if all is well, or a line that says what cannot be known.
    """
    shared, kind = shared_speakers(names, evaluation_names)
    if shared:
        examples = ", ".join(shared[:3])
        message = f"{path}: shares {len(shared)} {kind} with {evaluation_path} ({examples} ..)"
        if not allow:
            raise UsageError(f"{message}: calibrating on them flatters actDCF and Cllr; --allow_overlap accepts that")
        return f"WARNING: {message}: the calibrated figures are too good"
    if kind == "utterances":
        return f"{path}: the names have no folder of the speaker, so only utterances were compared, not speakers"
    return ""
