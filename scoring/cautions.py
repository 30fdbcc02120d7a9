"""One line each about figures and calibrations that say less than they seem to."""

import os

import numpy as np

from errors import plural
from scoring.error_rates import ErrorRates
from scoring.intervals import speaker_of

FEW_BEYOND = 0.05  # share of trials beyond what was learnt on that is not worth a word
FEW_ERRORS = 30  # that a rate needs to be worth its name (Doddington et al. 2000)


def few_errors(scores, labels, speakers=None) -> str:
    """Why a calibration learnt on these trials (N,) is a guess, or "" if it is none.

    ``speakers`` (N, 2) of ``trial_speakers``, if known. Trials without errors do not tell how a score is to be mapped.
    """
    rates = ErrorRates.of(scores, labels)
    rate, targets, nontargets = float(rates.eer()[0]), len(rates.targets), len(rates.nontargets)
    errors = rate * min(targets, nontargets)
    if errors >= FEW_ERRORS:
        return ""
    people = "" if speakers is None else f" of {len(np.unique(speakers))} speakers"
    return (
        f"learnt on {targets} target and {nontargets} nontarget trials{people}, EER {100 * rate:.2f} %, about "
        f"{plural(round(errors), 'error')} of a kind; with fewer than {FEW_ERRORS} errors its probabilities are a guess"
    )


def beyond(names, learnt, trials) -> list[str]:
    """What to say of quality measures of trials (N, K) that lie beyond those that QMF was ``learnt`` on (M, K).

    ``names`` (K,) of the columns, of which the first is the score.
    """
    found = []
    for name, known, at_hand in list(zip(names, learnt.T, trials.T))[1:]:
        if name.startswith("system"):
            continue
        low, high = known.min(), known.max()
        share = np.mean((at_hand < low) | (at_hand > high)) if len(at_hand) else 0.0
        if share > FEW_BEYOND:
            found.append(
                f"{100 * share:.0f} % of the trials have a {name} beyond its {low:.3g} to {high:.3g} of the held-out "
                "trials, where QMF is a guess: take held-out trials of all lengths that are to be decided on"
            )
    return found


def known_voices(speakers, train_paths, trial_paths, train_root="", test_root="") -> str:
    """What to say of trials with people or files of the train list, "" if there are none.

    ``speakers`` and ``train_paths`` of the train list, ``trial_paths`` each once; the speaker of a trial's path is its
    first folder. Paths are relative to the two roots.
    """
    return known_in(speakers, [(train_root, train_paths)], [(test_root, trial_paths)])


def known_in(speakers, train, trials) -> str:
    """``known_voices`` of several lists each: ``train`` and ``trials`` are [(root, paths)]."""
    people = {speaker_of(path) for _, paths in trials for path in paths} - {None}
    known = sorted(name for name in speakers if name in people)
    places = {os.path.abspath(os.path.join(root, path)) for root, paths in trials for path in paths}
    same = 0
    for root, paths in train:
        inside = os.path.join(os.path.abspath(root), "")
        # As the list gives them, so that millions of its paths need not be joined.
        wanted = places | {place.removeprefix(inside) for place in places}
        same += sum(map(wanted.__contains__, paths)) if wanted else 0
    parts = [f"{len(known)} of the {len(people)} speakers, the first '{known[0]}'"] if known else []
    parts += [plural(same, "file")] if same else []
    if not parts:
        return ""
    return (
        f"the trials share {' and '.join(parts)} with the train list: EER and calibration are of known voices, "
        "those of others will be worse"
    )


def wrong_way_round(eer: float, low: float | None) -> str:
    """What to say of an EER in % that is above 50 not only by chance (``low`` end of its interval), else ""."""
    if eer <= 50 or (low is not None and low < 50):
        return ""
    return (
        f"WARNING: EER {eer:.2f} %: the scores are the wrong way round (higher must mean more alike), or the labels "
        f"are swapped; with the scores negated it is {100 - eer:.2f} %"
    )
