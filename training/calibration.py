"""The calibration that training leaves beside a model: learnt on whole files, of speakers that are not its own."""

import functools
import json
from pathlib import Path

import numpy as np

from config import Config
from corpus.lists import trials_hash
from errors import UsageError, shell_path
from scoring.backend import Backend
from scoring.calibration import LogisticCalibration, bayes_threshold
from scoring.cautions import few_errors
from scoring.error_rates import ErrorRates
from scoring.intervals import speaker_of
from scoring.mismatch import Heard
from storage.files import WriteError, write_atomically
from storage.identity import identity_of


class Calibrator:
    """Learns maps from score to log-likelihood ratio on the trials of an evaluator.

    ``trained_on``: names of the speakers of training; their trials are left out where there are enough others.
    ``caution`` tells what is to be said of the calibration that was made last.
    """

    def __init__(self, config: Config, evaluator, trained_on=()):
        self.config, self.evaluator, self.caution = config, evaluator, ""
        known = set(trained_on)
        sides = [np.array([speaker_of(path) in known for path in side], bool) for side in self._paths()]
        self.strangers = ~(sides[0] | sides[1])
        if not self._of_both_classes(self.strangers):
            self.strangers[:] = True

    def _paths(self):
        return self.evaluator.first, self.evaluator.second

    def _of_both_classes(self, chosen) -> bool:
        """Whether the chosen trials (N,) bool are of both classes, which a calibration needs."""
        return 0 < self.evaluator.labels[chosen].sum() < chosen.sum()

    @functools.cached_property
    def heard(self) -> Heard | None:
        """How the files of the trials sound."""
        c, numbers = self.config, np.unique(self.evaluator.pairs)
        paths = [str(Path(self.evaluator.root, self.evaluator.files[i])) for i in numbers]
        return Heard.in_files(paths, c.channel, c.sample_rate, c.vad)

    def learn(self, weights: dict, result: dict) -> dict:
        """A map learnt on the trials of a result, on the scores of whole files, as ``Backend.load`` reads it.

        ``weights`` {name: tensor} say of which model it is. Scores that do not rise with the probability of a target
        get no map; ``threshold`` is then that of the EER, else the Bayes threshold of the prior and costs applies.
        Where too few whole files give a score, as they may need more memory than crops, it is learnt on the crops.
        """
        c, all_scores, cautions = self.config, result.get("whole_scores"), []
        of_whole_files = all_scores is not None and self._of_both_classes(np.isfinite(all_scores))
        if not of_whole_files:
            cautions = [] if all_scores is None else ["learnt on crops, for too few whole files gave a score"]
            all_scores = result["scores"]
        good = np.isfinite(all_scores) & self.strangers
        if not self._of_both_classes(good):
            good = np.isfinite(all_scores)
        scores, labels = all_scores[good], self.evaluator.labels[good]
        backend = Backend(prior=c.dcf_p_target, vad=c.vad)
        if np.ptp(scores) > 1e-12 * np.abs(scores).max():
            backend.calibration = LogisticCalibration.fit(scores, labels, c.dcf_p_target)
        if backend.calibration is None or backend.calibration.weights[0] <= 0:
            backend.calibration, backend.threshold = None, float(ErrorRates.of(scores, labels).eer()[1])
        elif c.dcf_c_miss != c.dcf_c_fa:  # a back-end knows a prior only
            backend.threshold = bayes_threshold(c.dcf_p_target, c.dcf_c_miss, c.dcf_c_fa)
        speakers = self.evaluator.speakers
        backend.identity, backend.heard = identity_of(weights, c), self.heard
        cautions.append(few_errors(scores, labels, None if speakers is None else speakers[good]))
        backend.caution = "; ".join(filter(None, cautions))
        made = {k: result[k] for k in ("epoch", "eer", "trials", "targets")}
        made.update({k: getattr(c, k) for k in ("score_mode", "eval_frames", "num_eval")})
        if of_whole_files:
            made["eval_frames"] = 0
        made.update(test_list=self.evaluator.source.path, test_list_sha256=trials_hash(c))
        made.update(score_threshold=result["threshold"], learnt_on=int(good.sum()))
        return {**backend.header(), "score": c.score_mode, **made}

    def write(self, path, made: dict, write=write_atomically):
        """Write what ``learn`` made, by ``write(path, bytes)``; ``caution`` then says if it is a guess."""
        write(path, (json.dumps(made, indent=1) + "\n").encode())
        self.caution = f"{path}: {made['caution']}" if made["caution"] else ""

    def keep(self, path, weights: dict, result: dict, write):
        """Write the calibration of the best model."""
        self.write(path, self.learn(weights, result), write)
        if self.config.score_mode != "cosine":
            self.caution = f"{path}: not for verify.py: {other_scores(self.config)}"

    def leave(self, files, network, result: dict, carries: bool) -> list[str]:
        """Write the calibration of the evaluated checkpoint beside it, where verify.py looks; lines for the terminal.

        One that is there already and belongs to the same weights stays. A folder that cannot be written: below
        ``files``. ``carries``: whether the checkpoint carries its configuration, so that no command needs it.
        """
        config = self.config
        if config.score_mode != "cosine":
            return [f"no calibration for verify.py: {other_scores(config)}"]
        path = Path(config.initial_model).with_suffix(".calibration")
        made = self.learn(network.state_dict(), result)
        command = f"python verify.py A.wav B.wav --initial_model {shell_path(config.initial_model)}"
        command += "" if carries or not config.config else f" --config {shell_path(config.config)}"
        command = f"to compare recordings: {command}"
        if path.is_file() and _identity_in(path) == made["identity"]:
            return [f"calibration: {path} stays; remove it to have one of these trials", command]
        try:
            self.write(path, made)
            lines = [f"calibration: {path}", command]
        except WriteError as error:
            path = files.result / path.name
            self.write(path, made, files.writes.write_bytes)
            lines = [str(error), f"calibration: {path}", f"{command} --backend {shell_path(path)}"]
        return [f"WARNING: {self.caution}", *lines] if self.caution else lines


def other_scores(config: Config) -> str:
    """Why a calibration of scores other than the cosine is of no use to verify.py."""
    return f"it compares by the cosine, not by score_mode {config.score_mode}"


def _identity_in(path) -> str | None:
    """Of which model a calibration is; None if verify.py cannot use it, so that nothing is lost by writing it anew."""
    try:
        return Backend.load(path).identity
    except UsageError:
        return None
