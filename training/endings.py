"""What a run says when it ends early because nothing can be learnt: what happened, what is saved, what to do."""

from corpus.loader import LoaderFailed
from errors import Finished
from storage import checkpoint

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


def patience_is_over(trainer, in_a_row: int) -> Finished:
    """The end after ``nan_patience`` steps in a row that were not finite."""
    fault = trainer.last_fault
    head = f"{in_a_row} non-finite steps in a row (nan_patience), the last: {fault['what']}"
    return Finished([head, where_to_go_on(trainer), what_to_do(trainer, fault)], NONFINITE)


def no_step_in_epoch(trainer, skipped: int) -> Finished:
    """The end after an epoch in which no step was taken."""
    fault = trainer.last_fault or {"what": "see above", "reason": ""}
    head = f"epoch {trainer.epoch} had no finite step: {skipped} batches were left out, the last: {fault['what']}"
    return Finished([head, where_to_go_on(trainer), what_to_do(trainer, fault)], NONFINITE)


def spoilt_by_an_update(trainer, fault) -> Finished:
    """The end after an update that could not be taken back: nothing is saved, for the weights are lost."""
    last = trainer.files.model / "last.model"
    saved = f"the state of step {trainer.saver.saved_step} is in {last}" if last.is_file() else "no state is saved yet"
    told = {"reason": fault.reason, "phase": fault.phase}
    head = f"{fault.what}; without memory for a copy it could not be taken back, so the weights are spoilt"
    return Finished([head, saved, what_to_do(trainer, told)], NONFINITE)


def no_batches(trainer, reason) -> Finished:
    """The end of a run whose state is saved and which can load no more."""
    last = trainer.files.model / "last.model"
    return Finished([f"{reason}; the state is in {last}, and the same command goes on from it"], LoaderFailed.status)


def where_to_go_on(trainer) -> str:
    """Which state the same command goes on from."""
    path = trainer.files.model / "last.model"
    weights = trainer.network.state_dict()
    if any(name not in trainer.buffers.masks for name in checkpoint.nonfinite_tensors(weights)):
        return f"the weights are not finite and were not saved; {path}, if it is there, is of an earlier step"
    return f"the state before them is in {path}"


def what_to_do(trainer, fault: dict) -> str:
    """How to find out why, what to try, and how to go on."""
    folder = trainer.incidents.writer.folder
    written = trainer.incidents.writer.written
    find = f"python analyze_nan_debug.py {folder}" if written else "raise nan_max_dumps, for no dump was written"
    advice = ADVICE.get(fault.get("phase")) or ADVICE.get(fault["reason"], "mend it")
    advice = advice.format(**trainer.config.values())
    return f"to find out why: {find}; {advice}, then run the same command again"


def without_a_best(trainer) -> list[str]:
    """What to say of a run that reached its end without a best model."""
    last = trainer.files.model / "last.model"
    return [
        f"no evaluation of this run gave an EER, so there is no {trainer.files.model / 'model_best.model'}",
        f"the trained weights are in {last}; mend what the evaluations above name, then --eval --initial_model {last}",
    ]
