"""Bootstrap intervals of error rates: the speakers are resampled, not the trials, which are not independent."""

import numpy as np

from errors import plural
from scoring.calibration import bayes_threshold
from scoring.error_rates import LN2, ErrorRates, checked_trials, softplus

MIN_SPEAKERS = 4  # below this, resampled speakers say nothing
ELEMENTS = 1 << 19  # weights at a time: bounds memory, not results


def speaker_of(path: str) -> str | None:
    """Speaker of a path in the VoxCeleb layout (its first folder, that in a tar file), or None if it has no folder."""
    head, slash, _ = path.rpartition(".tar/")[2].strip("/").partition("/")
    return head if slash else None


def trial_speakers(labels, first, second, mapping=None):
    """Number the speakers of trials (N,): (speakers (N, 2) int64, "") or (None, why there is no interval over them).

    ``mapping`` {path or first folder: speaker} replaces the first folder of a path as its speaker.
    """
    if len(labels) == 0:
        return None, "no trials"
    of_path = {}
    for path in dict.fromkeys([*first, *second]):
        speaker = speaker_of(path)
        if mapping is not None:
            speaker = mapping.get(path, mapping.get(speaker))
        if speaker is None:
            return None, f"the speaker of {path} is unknown"
        of_path[path] = speaker
    number = {speaker: i for i, speaker in enumerate(sorted(set(of_path.values())))}
    if len(number) == 1 and mapping is None and 0 in labels:
        return None, f"all paths begin with '{min(number)}', which is no speaker"
    if len(number) < MIN_SPEAKERS:
        return None, f"only {plural(len(number), 'speaker')}"
    of_path = {path: number[speaker] for path, speaker in of_path.items()}
    speakers = np.array([[of_path[path] for path in side] for side in (first, second)]).T
    labels = np.asarray(labels)
    odd = np.flatnonzero((speakers[:, 0] == speakers[:, 1]) != (labels == 1))
    if len(odd):
        i = odd[0]
        return None, f"first folders are no speakers: {first[i]} {second[i]} has label {labels[i]}"
    return speakers, ""


def enough_speakers(speakers):
    """The speakers (N, 2) of trials, or None if there are too few to resample."""
    return None if speakers is None or len(np.unique(speakers)) < MIN_SPEAKERS else speakers


def bootstrap_interval(
    scores,
    labels,
    speakers=None,
    llrs=None,
    priors=(0.01, 0.05),
    c_miss=1.0,
    c_fa=1.0,
    draws: int = 0,
    seed: int = 0,
    level: float = 0.95,
) -> dict:
    """Percentile intervals {figure: (low, high)} of ``eer`` (in %), ``min_dcf_P``, ``act_dcf_P`` and ``cllr``.

    ``speakers`` (N, 2): speaker of each side of a trial (``trial_speakers``). As many speakers as there are are drawn
    with replacement; a target trial counts as often as its speaker was drawn, a trial of two speakers as often as the
    product of theirs. This is the subsets bootstrap (Bolle, Ratha and Pankanti 2004; Poh and Bengio 2007) with the
    vertex bootstrap of networks for pairs (Snijders and Borgatti 1999; Owen 2007 shows it to err on the safe side).
    Without ``speakers`` the trials of each class are resampled, as if independent: the interval is then too narrow.
    Trials without an error have none in any draw: ``no_error_bound`` then gives the interval its upper end.

    ``llrs`` (N,), default the scores: natural-log LLRs for actDCF and Cllr; a calibration is not learnt anew in a
    draw. ``draws`` 0: 1,000, of more than 100,000 trials fewer, at least 200. A draw without a class is left out.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level must lie between 0 and 1, got {level}")
    costs = [(p, c_miss, c_fa) for p in priors]
    scores, labels, llrs, speakers = _finite(scores, labels, scores if llrs is None else llrs, speakers)
    found = draw_figures(scores, labels, speakers, llrs, costs, draws, seed)
    share = 50 * (1 - level)
    found = {name: percentiles(values, share) for name, values in found.items()}
    found.update(without_errors(scores, labels, speakers, llrs, costs, level))
    return found


def draw_figures(scores, labels, speakers, llrs, costs, draws: int = 0, seed: int = 0) -> dict:
    """Figures {name: (draws,)} of each draw of ``bootstrap_interval``; NaN if a draw lacks a class.

    The trials must be finite. ``costs``: (prior, cost of a miss, cost of a false accept) of each detection cost. A
    seed draws the same for all scores of the same trials, so that the figures of two systems can be subtracted.
    """
    classes = []
    for label in (1, 0):
        index = np.flatnonzero(labels == label)
        classes.append(index[np.argsort(scores[index], kind="stable")])
    draws = draws or _draws_for(len(scores))
    thresholds = [bayes_threshold(*cost) for cost in costs]
    losses = [_losses(llrs[index], thresholds, target) for target, index in zip((True, False), classes)]
    sorted_scores = [scores[index] for index in classes]
    below = None
    found = {}
    for weights in _weights(speakers, classes, draws, np.random.default_rng(seed)):
        with np.errstate(invalid="ignore", divide="ignore"):  # a draw without a class has no rates
            rates = ErrorRates(*sorted_scores, *[_running_sums(w) for w in weights])
            below = rates.__dict__.setdefault("below", below) if below is not None else rates.below
            means = [loss @ w.T / w.sum(axis=1) for w, loss in zip(weights, losses)]  # (P + 1, draws of the block)
            values = {"eer": 100 * rates.eer()[0]}
            for k, (p, c_miss, c_fa) in enumerate(costs):
                values[f"min_dcf_{p:g}"] = rates.min_dcf(p, c_miss, c_fa)[0]
                values[f"act_dcf_{p:g}"] = _cost(means[0][k], means[1][k], p, c_miss, c_fa)
            values["cllr"] = (means[0][-1] + means[1][-1]) / 2 / LN2
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: np.concatenate(values) for name, values in found.items()}


def draw_misses(scores, labels, speakers, alarms, draws: int = 0, seed: int = 0):
    """Miss rates (draws, G) at the false-accept rates ``alarms`` (G,), of each draw of ``bootstrap_interval``."""
    classes = [np.flatnonzero(labels == label) for label in (1, 0)]
    classes = [index[np.argsort(scores[index], kind="stable")] for index in classes]
    targets, nontargets = (scores[index] for index in classes)
    passed = np.append(0, np.searchsorted(targets, nontargets, "right"))  # targets rejected with so many nontargets
    draws, found = draws or _draws_for(len(scores)), []
    for weights in _weights(speakers, classes, draws, np.random.default_rng(seed)):
        for missed, rejected in zip(*map(_running_sums, weights)):
            with np.errstate(invalid="ignore", divide="ignore"):
                share = rejected / rejected[-1]
                index = np.searchsorted(share, 1 - np.asarray(alarms) - 1e-6)
                found.append(missed[passed[np.minimum(index, len(nontargets))]] / missed[-1])
    return np.array(found)


def _draws_for(trials: int) -> int:
    return int(np.clip(1e8 / trials, 200, 1000))


def _cost(miss, alarm, p: float, c_miss: float, c_fa: float):
    """Normalised detection cost of two error rates."""
    return (c_miss * p * miss + c_fa * (1 - p) * alarm) / min(c_miss * p, c_fa * (1 - p))


def no_error_bound(units: int, level: float = 0.95) -> float:
    """Largest error rate that ``units`` independent units without any error leave possible, as a share.

    The upper end of the two-sided interval of Clopper and Pearson (1934) for 0 of ``units``, 1 - (alpha / 2)^(1 / n);
    the "rule of three", 3 / n (Hanley and Lippman-Hand 1983), is its one-sided approximation. The units are speakers
    if they are known, since the errors of a speaker come together, else trials.
    """
    return 1 - ((1 - level) / 2) ** (1 / units)


def without_errors(scores, labels, speakers, llrs, costs, level: float) -> dict:
    """Intervals of the figures that no trial of the list adds an error to."""
    bounds = []
    for label in (1, 0):
        chosen = labels == label
        units = chosen.sum() if speakers is None else len(np.unique(speakers[chosen]))
        bounds.append(no_error_bound(int(units), level))
    found = {}
    targets, nontargets = scores[labels == 1], scores[labels == 0]
    if targets.min() > nontargets.max():
        found["eer"] = (0.0, min(100 * max(bounds), 50.0))
        found.update({f"min_dcf_{cost[0]:g}": (0.0, float(min(_cost(*bounds, *cost), 1))) for cost in costs})
    elif targets.max() < nontargets.min():  # every trial is on the wrong side
        found["eer"] = (max(100 - 100 * max(bounds), 50.0), 100.0)
    for cost in costs:
        if not ((llrs >= bayes_threshold(*cost)) != (labels == 1)).any():
            found[f"act_dcf_{cost[0]:g}"] = (0.0, float(_cost(*bounds, *cost)))
    return found


def _finite(scores, labels, llrs, speakers):
    """Checked trials without those of a non-finite score."""
    finite = np.isfinite(np.asarray(scores, np.float64).ravel())
    llrs = np.asarray(llrs, np.float64).ravel()
    scores, labels = checked_trials(scores, labels)
    if len(llrs) != len(finite):
        raise ValueError(f"{len(finite)} scores but {len(llrs)} log-likelihood ratios")
    if speakers is not None:
        speakers = np.asarray(speakers)
        if speakers.shape != (len(finite), 2):
            raise ValueError(f"speakers must be of shape ({len(finite)}, 2), got {speakers.shape}")
        speakers = np.unique(speakers[finite], return_inverse=True)[1].reshape(-1, 2)
        if speakers.max() + 1 < MIN_SPEAKERS:
            raise ValueError(f"{speakers.max() + 1} speakers; resampling them needs at least {MIN_SPEAKERS}")
    llrs = llrs[finite]
    if not np.isfinite(llrs).all():
        raise ValueError("log-likelihood ratios hold NaN or Inf where the scores are finite")
    return scores, labels, llrs, speakers


def _losses(llrs, thresholds, target: bool):
    """Losses of the trials of a class (P + 1, n): 1 for an error, at each threshold, and the logarithmic loss."""
    wrong = [llrs < t if target else llrs >= t for t in thresholds]
    return np.stack([*wrong, softplus(-llrs if target else llrs)]).astype(np.float32)


def _weights(speakers, classes, draws: int, rng):
    """Yield the weights ((block, T), (block, N)) of target and nontarget trials, block by block of draws."""
    block = max(1, ELEMENTS // max(len(index) for index in classes))
    places = [np.argsort(np.argsort(index)) for index in classes]  # in the list: draws do not depend on the scores
    if speakers is not None:
        total = int(speakers.max()) + 1
        sides = []
        for index in classes:
            one, other = speakers[index].T
            sides.append((np.ascontiguousarray(one), np.where(one == other, total, other)))
    for begin in range(0, draws, block):
        count = min(block, draws - begin)
        if speakers is None:
            yield [np.stack([_resampled(len(p), rng)[p] for _ in range(count)]) for p in places]
            continue
        drawn = np.ones((count, total + 1), np.float32)  # the last column stands for "the same speaker again"
        drawn[:, :total] = rng.multinomial(total, np.full(total, 1 / total), count)
        yield [np.take(drawn, one, axis=1) * np.take(drawn, other, axis=1) for one, other in sides]


def _resampled(count: int, rng):
    """How often each of ``count`` trials is drawn in as many draws with replacement, float32."""
    return np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float32)


def _running_sums(weights):
    """Sums (block, n + 1) of the first weights of each row; float64 if float32 might not hold the counts."""
    dtype = np.float32 if weights.shape[1] < 1 << 22 else np.float64
    sums = np.zeros((len(weights), weights.shape[1] + 1), dtype)
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def percentiles(values, share: float):
    """Both ends of a percentile interval that leaves out ``share`` % on each side; non-finite draws do not count."""
    values = values[np.isfinite(values)]
    if not len(values):
        raise ValueError("no draw has trials of both classes")
    low, high = np.percentile(values, (share, 100 - share))
    return float(low), float(high)
