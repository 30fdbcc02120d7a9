"""A dump under analysis: its state, its replay, the first bad operation, the rows at fault."""

import functools
import math
import sys
import time

import torch

from postmortem.built_replay import BuiltReplay
from postmortem.probe import Probe, Record
from postmortem.provenance import rows_with_known_code
from postmortem.replay import Outcome, OutOfTime, Replay, ReplayError
from postmortem.retraining import Retraining
from storage.dump import rows_of
from storage.dump_statistics import bad_state, wrong_labels

DIFFERENT = (
    "the step gives different results each time. Likely: a generator that is no attribute of a module, memory that is"
    " not filled (torch.empty), state of Python outside of the modules, or atomic additions on a GPU"
)
FEW = 8  # rows of the smaller batch
SENT_IN = {"fp16": torch.float16, "bf16": torch.bfloat16}  # types of ddp_compress
SLOW = 2.0  # seconds of a replay from which on signs of life are given, and between them
SEARCH_RUNS = 28  # replays that the search for the rows at fault may take


def parted_from_others(config: dict, world: int) -> list[str]:
    """What a replay in one process leaves out of a step of ``world`` processes that reached into each other."""
    lines = []
    if config.get("class_parallel"):
        split = f"the classes were split over {world} processes (class_parallel); replayed whole, in one"
        lines.append(f"{split}, so bits may differ")
    if config.get("sync_batchnorm"):
        norms = f"BatchNorm took the statistics of the rows of {world} processes (sync_batchnorm); in the replay"
        lines.append(f"{norms} those of the dump's rows, by which its process was found at fault")
    sent = str(config.get("ddp_compress", "none"))
    if sent in SENT_IN:
        most = f"{torch.finfo(SENT_IN[sent]).max:.3g}"
        lines.append(f"gradients were sent in {sent} (ddp_compress), up to {most}; the replay computes them in float32")
    return lines


class Case:
    """One dump under analysis. ``replay`` is None if the step cannot be replayed; ``refusal`` then says why."""

    def __init__(self, path, dump: dict, state: dict | None, replay: bool = True, trust=False, seconds: float = 60.0):
        self.path, self.dump, self.state = path, dump, state
        self.config = dump.get("config", {})
        self.files = rows_with_known_code(dump, trust)
        self.built = "build" in dump  # of a loop that is not the trainer's
        self.begin, self.seconds = time.perf_counter(), seconds
        self.replay, self.refusal = None, ""
        self.evidence, self.activations = [], []
        self.base: Outcome | None = None
        self.reproduced: str | None = None
        self.probe: Probe | None = None
        self.origin: Record | None = None
        self.small: list[int] | None = None  # a few labelled rows with which the step fails too
        self.shown = 0.0  # when a sign of life was last given
        self.update_site: Record | None = None  # the first operation of the optimizer's update with a non-finite result
        if not replay:
            self.refusal = "not replayed: --no-replay"
        elif not dump.get("format_version"):
            self.refusal = "not replayed: an old dump has no weights and no configuration"
        elif dump["reason"] == "data_error":
            self.refusal = "not replayed: the step was taken; only a file was left out"
        else:
            try:
                self.replay = (BuiltReplay if self.built else Replay)(dump, state, trust)
            except ReplayError as error:
                self.refusal = str(error)
        if self.replay is not None and dump.get("world", 1) > 1:
            self.evidence += parted_from_others(self.config, dump["world"])
        if self.replay is not None:
            self.replay.before_run = self.show_life
            self.run_as_it_was()
        if self.replay is not None:
            self.replay.deadline = self.begin + seconds

    @property
    def classes(self) -> int | None:
        """Number of classes: the configuration's, else the rows of the loss's weight; None if neither is known."""
        if self.built:
            return None
        weights = (self.state or {}).get("model_state_dict", {})
        configured = self.config.get("nClasses") or None
        heads = {t.shape[0] for name, t in weights.items() if name.startswith("__L__") and t.ndim == 2}
        return configured if configured or len(heads) != 1 else heads.pop()

    @property
    def bad_state(self) -> list[str]:
        """Names of state tensors that were not finite before the step, without buffers that are infinite by design."""
        by_design = self.replay.nonfinite_by_design if self.replay is not None else ()
        return [name for name in bad_state(self.state) if name not in by_design] if self.state else []

    @functools.cached_property
    def retraining(self) -> Retraining | None:
        """Training steps on the dump's batch from an earlier state; None if the step cannot be replayed."""
        return None if self.replay is None else Retraining(self)

    @functools.cached_property
    def repeated(self) -> Outcome:
        """Replay the unchanged step once more."""
        return self.replay.run()

    def wrong_labels(self) -> list[int]:
        """Columns whose label is outside the classes."""
        return [] if self.built else wrong_labels(self.dump["label"].flatten(), self.classes)

    def bad_rows(self) -> list[int]:
        """Rows with a sample that is not finite."""
        data = self.dump["data"]
        if not data.numel() or data.ndim == 0:
            return []
        return (~rows_of(data, len(self.label())).isfinite()).any(dim=1).nonzero().flatten().tolist()

    def time_left(self) -> float:
        """Seconds of the budget that are left."""
        return self.seconds - (time.perf_counter() - self.begin)

    def show_life(self, number: int):
        """Say on stderr which replay begins, if they are slow."""
        now, each = time.perf_counter(), self.base.seconds if self.base is not None else 0.0
        if each >= SLOW and now - self.shown > SLOW:
            self.shown = now
            left = max(0.0, self.time_left())
            most = number + int(left / each)
            print(
                f"replay {number} of at most {most}, {each:.1f} s each, {left:.0f} s left (--seconds)", file=sys.stderr
            )

    # ------------------------------------------------------------------------------------------------- experiments

    def run_as_it_was(self):
        """Replay the step, and if it fails, again under the probe."""
        self.base = self.replay.run(stats=True)
        if self.base.error and self.dump["reason"] != "label_out_of_range":
            self.refusal, self.replay = f"not replayed: the step raises an error: {self.base.error}", None
            return
        self.reproduced = self.replay.reproduction(self.base)
        if self.reproduced == "vanished":
            again = self.replay.run(stats=True)
            if not again.finite:
                self.base = again
                self.call_nondeterministic("one of two replays was finite")
        if self.base.by_update:
            self.update_site = self.first_of_update()
        elif not self.base.finite:
            self.probe_step()

    def probe_step(self, **changes) -> None:
        """Run the step under the probe; sets ``origin`` and the activations of every module."""
        self.probe, outcome = self.probed(**changes)
        if not changes and outcome.finite:
            again, second = self.probed()  # the fault was not seen: once more
            if not second.finite:
                self.probe, outcome = again, second
                self.call_nondeterministic("of two replays that were watched one was finite")
        if not changes and str(outcome) != str(self.base) and str(self.repeated) != str(self.base):
            self.call_nondeterministic(f"first {self.base}, then {self.repeated}")
        self.origin = self.probe.refused_by_python(self.base.refused) or self.probe.origin()
        if self.origin is not None and not changes:
            self.origin = self.made_from_the_start(self.origin) or self.origin
        self.activations = self.probe.activations
        if self.origin is None and not outcome.finite and math.isfinite(outcome.loss):
            probe, _ = self.probed(find_largest_gain=True, **changes)
            self.origin = probe.largest_gain_record

    def call_nondeterministic(self, seen: str):
        """Call the step one that differs from run to run, for what was ``seen`` first."""
        if self.reproduced != "nondeterministic":
            self.reproduced = "nondeterministic"
            self.evidence.append(f"{seen}: {DIFFERENT}")

    def probed(self, find_largest_gain: bool = False, **changes) -> tuple[Probe, Outcome]:
        """Run the step under a probe of its own, at the loss scale of the first replay."""
        network = self.replay.network(changes.get("settings"))
        probe = Probe(network, self.replay.data, find_largest_gain)
        outcome = self.replay.run(modes=[probe], scale=self.base.scale, **changes)
        probe.end_forward(network, math.isfinite(outcome.loss) and not outcome.error)
        return probe, outcome

    def made_from_the_start(self, record: Record) -> Record | None:
        """The operation that made a buffer infinite when the network was built, if ``record`` reads it first."""
        name = next((n for n in record.nonfinite_inputs if n in self.replay.nonfinite_by_design), None)
        if name is None:
            return None
        probe = Probe(self.replay.network(), self.replay.data)
        with probe:
            buffers = dict(self.replay.new_network().named_buffers())
        found = probe.maker_of(name, buffers[name])
        if found is not None:
            self.evidence.append(f"read first by {record.node or record.op} at {record.site.source}")
        return found

    def first_of_update(self) -> Record | None:
        """Run the step, and its update under a probe: the first operation of it with a non-finite result."""
        probe = Probe(self.replay.network(), self.replay.data)
        self.replay.run(around=probe)
        return probe.refused_by_python(self.base.refused) or probe.first()

    def noise(self) -> torch.Tensor:
        """A batch of noise at the level of the dump's."""
        data = self.replay.data
        level = float(data[data.isfinite()].std()) if bool(data.isfinite().any()) else 0.1
        return torch.randn(data.shape, generator=torch.Generator().manual_seed(0)) * level

    def fails(self, columns) -> bool:
        """Whether the step fails with these labelled rows alone; an error that the step did not raise is no answer."""
        outcome = self.replay.run(columns=sorted(columns))
        return not outcome.finite and bool(outcome.error) == bool(self.base.error)

    def to_rows(self, columns) -> list[int]:
        """Numbers into ``files`` of labelled rows: with nPerSpeaker above 1 each has several crops."""
        width, crops = self.replay.columns if self.replay else len(self.dump["label"]), 1
        if self.dump["data"].ndim == 3 and self.dump.get("format_version"):
            crops = self.dump["data"].shape[0]
        return sorted(crop * width + column for crop in range(crops) for column in columns)

    def guilty_columns(self) -> list[int]:
        """Find the labelled rows without which the step is finite; empty if no part of the batch is to blame.

        So it is too if the step differs from run to run: what is seen without some rows is chance then. Sets ``small``
        too, on which later trials are made first.
        """
        if self.reproduced == "nondeterministic":
            return []
        try:
            guilty = self.search_rows()
            if guilty and not self.is_no_chance(guilty):
                return []
            self.small = self.few_that_fail(guilty)
        except OutOfTime:
            return []
        return guilty

    def is_no_chance(self, guilty: list[int]) -> bool:
        """Whether the step is finite without these rows and fails with them, twice more if half of the time is left.

        If not, it is one that differs from run to run, and is called so.
        """
        everything = range(self.replay.columns)
        for _ in range(2):
            if self.time_left() < 0.5 * self.seconds:
                break
            if self.fails([c for c in everything if c not in guilty]) or not self.fails(everything):
                self.call_nondeterministic("with the same rows it failed once and was finite the next time")
                return False
        return True

    def few_that_fail(self, guilty: list[int]) -> list[int] | None:
        """A few rows with which the step fails, with those at fault; None if it is finite, or the batch small."""
        width = self.replay.columns
        if width < 2 * FEW:
            return None
        others = [c for c in range(width) if c not in guilty]
        few = sorted([*guilty[: FEW // 2], *others[: FEW - len(guilty[: FEW // 2])]])
        return few if self.fails(few) else None

    def search_rows(self) -> list[int]:
        """Try the rows that the first bad operation names; if the step fails without them too, halve the batch."""
        everything = list(range(self.replay.columns))
        if len(everything) < 3:
            return []
        named = self.columns_of_origin()
        if named and self.finite_without(named):
            return named
        self.searches = 0
        width = len(everything)
        pairs = [everything[i : i + 2] for i in (0, width // 3, 2 * width // 3)]
        if width > 7 and all(self.search(pair) for pair in pairs):
            return []  # the step fails with any rows: none of them is to blame
        guilty, left = [], everything
        while (
            len(guilty) <= len(everything) // 2
            and self.searches < SEARCH_RUNS
            and self.time_left() > 0.5 * self.seconds
        ):
            found = self.smallest_failing(left)
            if not found or len(found) > len(everything) // 2:
                return []
            guilty += found
            left = [c for c in left if c not in found]
            if 2 * len(guilty) > len(everything) or len(left) < 2:
                return []
            if not self.search(left):
                return sorted(guilty)
        return []

    def finite_without(self, columns) -> bool:
        """Whether the step is finite when these labelled rows are left out."""
        left = [c for c in range(self.replay.columns) if c not in columns]
        return len(left) > 1 and self.replay.run(columns=left).finite

    def columns_of_origin(self) -> list[int]:
        """Columns that the first bad operation names, if its first dimension is that of the batch."""
        record, width = self.origin, self.replay.columns
        rows = self.replay.data.shape[0] * width
        if record is None or record.size not in (width, rows) or not 0 < len(record.rows) < record.size:
            return []
        return sorted({row % width for row in record.rows})

    def search(self, columns) -> bool:
        """``fails``, counted against SEARCH_RUNS."""
        self.searches += 1
        return self.fails(columns)

    def smallest_failing(self, columns: list[int]) -> list[int]:
        """Halve a failing set of rows until neither half fails without the other (delta debugging, Zeller 2002)."""
        parts = 2
        while len(columns) > 2 and self.searches < SEARCH_RUNS and self.time_left() > 0.5 * self.seconds:
            size = -(-len(columns) // parts)
            chunks = [columns[i : i + size] for i in range(0, len(columns), size)]
            failing = next((c for c in chunks if len(c) > 1 and self.search(c)), None)
            if failing is not None:
                columns, parts = failing, 2
                continue
            rests = [[c for c in columns if c not in chunk] for chunk in chunks] if parts > 2 else []
            rest = next((r for r in rests if len(r) > 1 and self.search(r)), None)
            if rest is not None:
                columns, parts = rest, max(parts - 1, 2)
            elif parts >= len(columns):
                break
            else:
                parts = min(parts * 2, len(columns))
        if len(columns) != 2:
            return columns
        others = [c for c in range(self.replay.columns) if c not in columns]
        for column in columns:  # which of the two, beside an innocent row
            if (
                others
                and self.search([column, others[0]])
                and not self.search([c for c in columns if c != column] + others[:1])
            ):
                return [column]
        return columns

    def label(self) -> torch.Tensor:
        """Labels of the batch (B,); of a loop whose targets are of another shape the first of each row."""
        label = self.dump["label"]
        return label.flatten(1)[:, 0] if self.built and label.ndim > 1 else label.flatten()

    def source_of(self, kind: str) -> str:
        """The file of the run's 'optimizer' or 'scheduler'; of another loop its name in words."""
        name = self.config.get(kind, "?")
        return f"the {kind}{f' ({name})' if name != '?' else ''}" if self.built else f"{kind}/{name}.py"

    def outcome(self, **changes) -> Outcome:
        """Run the step with something changed."""
        return self.replay.run(**changes)
