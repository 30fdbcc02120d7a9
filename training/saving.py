"""When and where the checkpoints of a run are written."""

import time

import checkpoint
from utils import save_atomically


class Saver:
    """Writes the checkpoints of a run: all processes collect the state, the main one writes it.

    ``capture(evaluated=False)`` gives the state and is a collective; ``masks`` names the buffers that are meant to
    hold infinities.
    """

    def __init__(self, config, ranks, files, capture, masks, say):
        self.config, self.ranks, self.files = config, ranks, files
        self.capture, self.masks, self.say = capture, masks, say
        self.saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether ``save_interval_steps`` or ``save_interval_minutes`` asks for a save after a step of this process."""
        steps, minutes = self.config.save_interval_steps, self.config.save_interval_minutes
        by_time = bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes
        return by_time or (bool(steps) and step % steps == 0)

    def last(self):
        """Write model/last.model."""
        self.save(self.capture(), "last.model")
        self.saved_at = time.monotonic()

    def evaluated(self, epoch: int, result: dict, evaluator, improved: bool):
        """Write the checkpoint of an evaluated epoch and, if it is the best, model_best.*."""
        state = self.capture(evaluated=True)
        if not self.ranks.main:
            return
        for name in [f"model{epoch:09d}"] + (["model_best"] if improved else []):
            if not self.save(state, f"{name}.model"):
                return
            eer = "nan" if result["failed"] else f"{result['eer']:.4f}"
            (self.files.model / f"{name}.eer").write_text(eer)
        if improved:
            evaluator.keep_best(self.files, state["model_state_dict"], result)

    def save(self, state: dict, name: str) -> bool:
        """Write a checkpoint, but never one with non-finite weights; returns whether all are finite."""
        bad = [n for n in checkpoint.nonfinite_tensors(state["model_state_dict"]) if n not in self.masks]
        if bad:
            self.say(f"{name} is not written: {len(bad)} tensors are not finite, the first {bad[0]}")
        elif self.ranks.main:
            save_atomically(state, self.files.model / name)
        return not bad
