"""What a run says when it ends early because nothing can be learnt: what happened, what is saved, what to do."""

from config import Config
from corpus.loader import LoaderFailed
from corpus.sources import shown
from errors import Finished, plural, shell_path

NONFINITE = 3  # exit status of a run that stopped because its steps are not finite
NO_EER = 1  # exit status of a run that went to its end without an evaluation that gave an EER

ADVICE = {  # by phase or reason
    "setting": "set another value, or another scheduler than {scheduler}, which gives it to the optimizer",
    "update": "try another lr, weight_decay or eps, or another optimizer than {optimizer}",
    "batch_nonfinite": "repair the files named above, or remove their lines from {train_list}",
    "label_out_of_range": "correct the labels in {train_list}, or set nClasses: 0 to count them",
    "scale_collapse": "try --amp_dtype bfloat16, or --no-mixedprec",
    "grad_norm_overflow": "try a lower lr",
}


class Endings:
    """How a run ends that can learn no more: what happened, what is saved, how to find out why, what to try.

    ``step``: the run's Step. ``writer``: of its dumps.
    """

    def __init__(self, config: Config, files, step, writer):
        self.config, self.step, self.writer = config, step, writer
        self.folder = files.model
        self.last = files.model / "last.model"

    def patience_is_over(self, in_a_row: int, fault: dict) -> Finished:
        """The end after ``nan_patience`` steps in a row that were not finite."""
        head = f"{in_a_row} non-finite steps in a row (nan_patience), the last: {fault['what']}"
        return Finished([head, self.where_to_go_on(), self.what_to_do(fault)], NONFINITE)

    def no_step_in_epoch(self, epoch: int, skipped: int, fault: dict | None) -> Finished:
        """The end after an epoch in which no step was taken."""
        fault = fault or {"what": "see above", "reason": ""}
        head = f"epoch {epoch} had no finite step: {plural(skipped, 'batch')} left out, the last: {fault['what']}"
        return Finished([head, self.where_to_go_on(), self.what_to_do(fault)], NONFINITE)

    def spoilt_by_an_update(self, fault, saved_step: int) -> Finished:
        """The end after an update that could not be taken back: nothing is saved, for the weights are lost."""
        saved = f"the state of step {saved_step} is in {self.last}" if self.last.is_file() else "no state is saved yet"
        head = f"{fault.what}; without memory for a copy it could not be taken back, so the weights are spoilt"
        advice = self.what_to_do({"reason": fault.reason, "phase": fault.phase})
        return Finished([head, saved, advice], NONFINITE)

    def no_batches(self, reason) -> Finished:
        """The end of a run whose state is saved and which can load no more."""
        line = f"{reason}; the state is in {self.last}, and the same command goes on from it"
        return Finished([line], LoaderFailed.status)

    def where_to_go_on(self) -> str:
        """Which state the same command goes on from."""
        if self.step.bad_state():
            return f"the weights are not finite and were not saved; {self.last}, if it is there, is of an earlier step"
        return f"the state before them is in {self.last}"

    def what_to_do(self, fault: dict) -> str:
        """How to find out why, what to try, and how to go on."""
        find = f"python analyze_nan_debug.py {shell_path(self.writer.folder)}"
        if not self.writer.written:
            find = "raise nan_max_dumps, for no dump was written"
        advice = ADVICE.get(fault.get("phase") or "") or ADVICE.get(fault["reason"], "mend the cause")
        advice = advice.format(**{**self.config.values(), "train_list": shown(self.config.train_list)})
        return f"to find out why: {find}; {advice}, then run the same command again"

    def without_a_best(self) -> list[str]:
        """What to say of a run that reached its end without a best model."""
        return [
            f"no evaluation of this run gave an EER, so there is no {self.folder / 'model_best.model'}",
            f"the trained weights are in {self.last}; mend what the evaluations above name, then --eval "
            f"--initial_model {shell_path(self.last)}",
        ]
