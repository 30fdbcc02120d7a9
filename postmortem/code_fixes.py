"""Look for a change of the code that removes a fault: written as source, tried on the step, compared with the original.

A change is verified if the step is finite with it, rows that were sound keep loss and gradient, no gradient is merely
silenced, and the next steps on the batch are finite too.
"""

import functools
import math
import statistics
from dataclasses import dataclass, field, replace

import torch

from postmortem.finding import ranges_of
from postmortem.places import path_of
from postmortem.probe import Record
from postmortem.replay import OutOfTime, ReplayError
from postmortem.rewrites import BELOW_ONE, rewrites
from postmortem.source_patch import SourcePatch
from training.attempt import gradients_of
from utils import total_norm

TRIALS = 24  # changes of the code that are tried for one fault
MOST_SOUND = 16  # sound rows that are compared
MORE_TRIALS = 6  # after a change that float64 does not bear out
OF_LINE = 8  # of one line, if after one of them another operation fails
LINES = 4  # changes that are combined, if the step fails at another line after the first
TOLERANCE = 1e-4  # relative difference of loss and gradient that a change may make for sound rows
MINOR = (
    0.1  # share of the whole gradient's norm below which that of a weight is judged by the whole: it may be rounding
)
WHOLE = 1e-3  # that of a whole batch's loss: of its rows at fault the change may move the value, to bound the slope
EXACT = 1e-2  # that of the loss with a change from the loss in float64 without it
LONGEST_STRIDE = 10.0  # norm of an update over that of the weights: beyond it nothing is left of what was learned
FAR = 20.0  # a loss so many times the usual one is worth a word
STEEP = 1e4  # a gradient norm so many times the usual one is worth a word
FOLLOWING_STEPS = 5  # more steps on the same batch that must stay finite with a change
FAILS_LATER = f"this step is finite with it, one of the next {FOLLOWING_STEPS} on the same batch is not"
# What to do about operations that no change of their line alone mends.
ADVICE = {
    "linalg_svd": "split equal singular values with a small diagonal before svd, or take no gradient of its vectors",
    "linalg_eigh": "split equal eigenvalues with a small diagonal before eigh, or take no gradient of its vectors",
    "linalg_qr": "add a small diagonal before qr: two columns depend on each other",
    "pow": "normalise or bound what is raised to a power",
    "mul": "normalise or bound the factors before they are multiplied",
    "mm": "normalise or bound the factors before they are multiplied",
    "bmm": "normalise or bound the factors before they are multiplied",
    "addmm": "normalise or bound what the layer reads",
    "ctc_loss": "give each row at least as many frames as it has labels, or skip the rows that are too short",
    "sum": "take the mean, or divide before the sum",
    "cumprod": "add logarithms in the place of a product of many factors",
    "prod": "add logarithms in the place of a product of many factors",
}

REFUSED = "keep what this line reads inside the bounds that the exception names"


@dataclass
class Sound:
    """What the unchanged step gives where it is finite: on the sound rows, or on noise. ``words`` names it."""

    words: str
    how: dict  # what of the replay gives it
    loss: float
    gradients: dict = field(default_factory=dict)


@dataclass
class Trial:
    """One change, tried: whether the step is finite with it, and then what speaks against it, else what fails now."""

    finite: bool
    outcome: str
    objection: str = ""
    record: Record | None = None
    loss: float = math.nan


@dataclass
class CodeFix:
    """A verified change, what it does in words, and what came of it."""

    patch: SourcePatch
    words: list
    outcome: str


class CodeSearch:
    """Tries changes of one line, and of the lines that fail after it, on the step of a case."""

    def __init__(self, case, columns=()):
        self.case, self.replay = case, case.replay
        self.columns = list(columns)  # rows at fault
        self.tried, self.objections = 0, []
        self.sound = self.exact_sound = None
        try:
            self.sound = self.sound_part()
            if self.sound and case.origin is not None and case.origin.dtype in BELOW_ONE:
                self.exact_sound = self.measured("", {**self.sound.how, "dtype": "float64"})
        except OutOfTime:
            pass

    # ------------------------------------------------------------------------------------------ the unchanged step

    def sound_part(self) -> Sound | None:
        """Find a part of the batch, else noise at its level, on which the unchanged step is finite."""
        left = [c for c in range(self.replay.columns) if c not in self.columns]
        if self.columns and len(left) > 1:
            found = self.measured("the sound rows keep", {"columns": left[:MOST_SOUND]})
            if found:
                return found
        return self.measured("a batch of noise keeps", {"data": self.case.noise()})

    def measured(self, words: str, how: dict) -> Sound | None:
        """Loss and gradients of a finite step; None if it is not finite."""
        gradients: dict = {}
        outcome = self.replay.run(**how, after=lambda network: gradients.update(gradients_of(network)))
        return Sound(words, how, outcome.loss, gradients) if outcome.finite else None

    # --------------------------------------------------------------------------------------------------- the search

    def run(self, source: str, record) -> CodeFix | None:
        """Return the first change, or chain of changes, that is verified; None if there is none.

        Where the unchanged step is finite in float64, a change that gives the loss of float64 goes before others.
        """
        path, _, number = source.rpartition(":")
        file = path_of(path)
        if not number.isdigit() or file is None:
            return None
        before = file.read_text(encoding="utf-8")
        text, words, line = before, [], int(number)
        found, most = None, TRIALS
        for _ in range(LINES):
            following = None  # the first change after which another operation of the file fails
            for place, (change, after) in enumerate(rewrites(text, line, record)):
                if self.tried >= most or self.case.time_left() < 0:
                    return found
                if following is not None and place >= OF_LINE:
                    break
                patch = SourcePatch(path, before, after)
                trial = self.attempt(patch, look_further=following is None)
                if trial.finite and not trial.objection:
                    fix, inexact = CodeFix(patch, [*words, change], trial.outcome), self.inexact(trial.loss)
                    if not inexact:
                        return fix
                    if found is None:
                        found, most = replace(fix, outcome=fix.outcome + inexact), min(most, self.tried + MORE_TRIALS)
                if trial.objection:
                    self.objections.append(f"{change}: {trial.objection}")
                if following is None and trial.record is not None and self.moved(trial.record, path, line, record):
                    following = after, change, trial.record
            if following is None or found is not None:
                return found
            text, change, record = following
            words, line = [*words, change], int(record.site.source.rpartition(":")[2])
        return found

    def inexact(self, loss: float) -> str:
        """How the loss with a change differs from that of float64 without it; '' if it does not, or is not known."""
        if math.isnan(self.exact) or close(loss, self.exact, EXACT):
            return ""
        return f"; but in float64, where the unchanged step is finite, the loss is {self.exact:.4g}"

    @functools.cached_property
    def exact(self) -> float:
        """The loss of the unchanged step in float64 if it is finite there, else NaN."""
        outcome = self.replay.run(dtype="float64")
        return outcome.loss if outcome.finite else math.nan

    def attempt(self, patch: SourcePatch, look_further: bool) -> Trial:
        """Try a change; ``look_further`` finds the operation that fails then."""
        self.tried += 1
        try:
            with self.replay.patched(patch):
                outcome = self.trial()
                if not outcome.finite:
                    record = self.next_record() if look_further and not outcome.error else None
                    return Trial(False, str(outcome), record=record)
                objection, compared = self.judge(outcome)
                return Trial(True, f"with it: {outcome}{compared}", objection, loss=outcome.loss)
        except ReplayError as error:
            return Trial(False, str(error))

    @staticmethod
    def moved(record, path: str, line: int, before) -> bool:
        """Whether another operation of the same file fails now."""
        place, _, number = record.site.source.rpartition(":")
        return place == path and number.isdigit() and (int(number) != line or record.op_name != before.op_name)

    def trial(self):
        """Replay the step with the changed code, of a large batch a few rows that fail first."""
        outcome = self.replay.run(columns=self.case.small) if self.case.small else None
        return self.replay.run() if outcome is None or outcome.finite else outcome

    def next_record(self):
        """The first bad operation of the changed step."""
        probe, _ = self.case.probed(columns=self.case.small)
        return probe.origin()

    # -------------------------------------------------------------------------------------------------- the verdict

    def judge(self, outcome) -> tuple[str, str]:
        """(objection, what was compared) of a change with which the step is finite; '' if there is no objection."""
        changed = self.difference(outcome)
        if changed:
            return changed, ""
        silenced = self.silenced()
        if silenced:
            return silenced, ""
        if not survives(self.case, {}):
            return FAILS_LATER, ""
        parts = [f"{self.sound.words} loss and gradient" if self.sound else "no sound row to compare with"]
        if not self.columns and math.isfinite(self.case.base.loss):
            parts.append(f"the loss, which was finite, is the same to {100 * WHOLE:g} %")
        norms = [h["grad_norm"] for h in self.case.dump["history"] if math.isfinite(h.get("grad_norm", math.nan))]
        usual = statistics.median(norms) if norms else math.inf
        if outcome.norm > STEEP * usual:
            parts.append(f"the gradient is {outcome.norm / usual:.0e} times the usual one: clip it (grad_clip)")
        losses = [abs(h["loss"]) for h in self.case.dump["history"] if math.isfinite(h.get("loss", math.nan))]
        if losses and abs(outcome.loss) > FAR * statistics.median(losses):
            parts.append(f"the usual loss is {statistics.median(losses):.3g}: look at what the change writes there")
        parts.append(f"the next {FOLLOWING_STEPS} steps on this batch are finite")
        return "", "".join(f"; {part}" for part in parts)

    def difference(self, outcome) -> str:
        """What the change does to loss or gradient where the unchanged step was finite; '' if nothing.

        ``outcome``: of the whole batch with the change.
        """
        base = self.case.base
        only_gradients_fail = not self.columns and math.isfinite(base.loss) and not base.bad_buffers
        if only_gradients_fail and not close(outcome.loss, base.loss, WHOLE):  # the rows at fault are in it
            return f"it changes the loss, which was finite, from {base.loss:.4g} to {outcome.loss:.4g}"
        if self.sound is None:
            return ""
        now = self.measured("", self.sound.how)
        objection = moved_from(self.sound, now)
        if not objection or not self.exact_sound or now is None or not close(now.loss, self.sound.loss, EXACT):
            return objection
        # The rounding of 16 bit is larger than the tolerance: the change is held to it without that rounding.
        return objection if moved_from(self.exact_sound, self.measured("", self.exact_sound.how)) else ""

    def silenced(self) -> str:
        """Whether the change only takes a gradient away: that of a weight, or that of the rows at fault."""
        gradients, embeddings = {}, []

        def keep(module, inputs, output):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.retain_grad()
                embeddings.append(output)

        if self.case.base.norm == 0:  # nor is there one without the change: the batch has nothing to learn from
            return ""
        model = getattr(self.replay.network(), "__S__", None)
        hook = model.register_forward_hook(keep) if model is not None else None
        self.replay.run(after=lambda network: gradients.update(gradients_of(network)))
        if hook is not None:
            hook.remove()
        usual = self.sound.gradients if self.sound else {}
        gone = [n for n, g in gradients.items() if not bool(g.any()) and n in usual and bool(usual[n].any())]
        if gone or (not self.nothing_to_learn and not any(bool(g.any()) for g in gradients.values())):
            return f"finite, but the gradient of {repr(gone[0]) if gone else 'every weight'} is 0"
        # Those of a loss scale that was too high, and left for a lower one, say nothing.
        kept = [e.grad for e in embeddings if e.grad is not None and bool(e.grad.isfinite().all())]
        rows = [gradient.flatten(1).abs().amax(dim=1) for gradient in kept]
        if not rows or not self.in_loss or self.nothing_to_learn:
            return ""
        width = self.replay.columns
        moved = torch.cat(rows).view(-1, width).amax(dim=0) > 0  # (columns,)
        guilty = self.columns or list(range(width))
        others = [c for c in range(width) if c not in guilty]
        if not bool(moved[guilty].any()) and bool(moved[others].all()):
            return "finite, but the rows at fault get no gradient"
        return ""

    @property
    def nothing_to_learn(self) -> bool:
        """Whether the batch has no gradient to give: 0 is divided by 0."""
        record = self.case.origin
        read = record.operands[:1] if record is not None and record.op_name == "div" else []
        return bool(read) and read[0].smallest == read[0].largest == 0

    @property
    def in_loss(self) -> bool:
        """Whether the operation at fault is the loss's."""
        record = self.case.origin
        return record is not None and record.site.source.startswith("loss/")


def moved_from(sound: Sound, now: Sound | None) -> str:
    """What of the loss and gradients of sound rows is another now; '' if nothing."""
    if now is None or not close(now.loss, sound.loss):
        loss = "not finite" if now is None else f"{now.loss:.4g}"
        return f"it changes the loss of sound rows from {sound.loss:.4g} to {loss}"
    usual = float(total_norm(list(sound.gradients.values())))
    for name, gradient in sound.gradients.items():
        other = now.gradients.get(name)
        gap = math.inf if other is None else float((other.double() - gradient.double()).norm())
        if gap > TOLERANCE * max(float(gradient.norm()), MINOR * usual):
            return f"it changes the gradient of '{name}' for sound rows"
    return ""


def close(a: float, b: float, tolerance: float = TOLERANCE) -> bool:
    """Whether two losses agree to a relative tolerance."""
    return math.isfinite(a) and abs(a - b) <= tolerance * max(abs(b), 1e-3)


def survives(case, change: dict) -> bool:
    """Whether gradient steps on the same batch, from the dump's weights, stay finite with a changed setting."""
    weights = {}

    def start(network):
        if weights:
            network.load_state_dict(weights)

    def descend(network):
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        factor = 0.01 / max(1.0, float(total_norm(gradients)))
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter -= factor * parameter.grad
        weights.update({name: tensor.clone() for name, tensor in network.state_dict().items()})

    how = {"columns": case.small, "settings": change, "edit": start, "after": descend}
    return all(case.replay.run(**how).finite for _ in range(FOLLOWING_STEPS))


def advice_for(record) -> str:
    """Words that a person can act on, for an operation that no change of its line mends."""
    if record.nonfinite_inputs:
        names = ", ".join(f"'{name}'" for name in record.nonfinite_inputs[:3])
        return f"{names} is NaN or Inf from the start: fill every element of it where it is made"
    if record is None or not record.op:
        return REFUSED
    words = next((ADVICE[name] for name in (record.op_name, record.op) if name in ADVICE), "")
    if words:
        return words
    read = f" ({ranges_of(record)})" if record.operands else ""
    return f"bound or normalise what {record.op_name} reads{read}"


class UpdateSearch(CodeSearch):
    """Tries changes of the optimizer's code on the update of the dump."""

    exact = math.nan  # the loss does not change

    def sound_part(self):
        """No gradient is compared: the step before the update does not change."""
        return None

    def next_record(self):
        """The first bad operation of the changed update."""
        return self.case.first_of_update()

    def judge(self, outcome):
        """A finite update of this step is asked, which is not out of all proportion to the weights."""
        if outcome.stride > LONGEST_STRIDE:
            return f"finite, but the update is {outcome.stride:.0e} times as large as the weights", ""
        return "", ""


class RetrainingSearch(CodeSearch):
    """Tries changes of the optimizer's code on training steps from an earlier state."""

    exact = math.nan

    def __init__(self, case, columns=()):
        self.retraining = case.retraining
        super().__init__(case, columns)

    def sound_part(self):
        """Training steps are compared by their course alone."""
        return None

    def trial(self):
        """Train with the changed code."""
        self.trajectory = self.retraining.take({})
        return self.trajectory

    def next_record(self):
        """The operation that made a weight bad."""
        return self.retraining.take({}, probed=self.trajectory.steps).record

    def judge(self, outcome):
        """Sound steps are all that is asked."""
        return "", ""
