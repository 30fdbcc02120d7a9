"""Turns a fault into a report and a dump, within a budget: for the trainer and for loops of other people."""

import abc
import collections
import math
import sys
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from errors import shell_path
from settings.command_line import picture
from storage.dump import BEFORE_THE_STEP, SCALAR, DumpWriter, tensor_stats
from training.batches import as_dumped
from training.fault_report import report
from training.faults import Fault
from training.generators import generator_state
from training.run_files import versions
from training.slices import local
from utils import plain_names

HISTORY = 1000
SPIKES = 3  # dumps of a run
SPIKE_SHARE = 0.5  # of the folder's size: what dumps of spikes leave is for faults
DISK = "\U0001f4be"


@dataclass(frozen=True)
class StepRecord:
    """What a dump tells of a step beside its batch: its place in the run, its settings, the state it began with."""

    epoch: int
    batch: int
    step: int
    fractional_epoch: float
    lr: float
    scale: float
    amp_dtype: torch.dtype | None
    device: torch.device
    generators: dict  # the state of the generators before the forward pass
    network: nn.Module
    optimizer: torch.optim.Optimizer
    parameters: list  # those that are trained
    module_state: dict  # what modules keep in plain attributes: see ModuleState
    gradients: dict  # by name, as the step left them; of class weights that are split this process's rows
    whole: dict | None = None  # weights and optimizer with the rows of all processes, where weights are split

    @classmethod
    def of(cls, step, *, epoch: int, batch: int, number: int, fractional_epoch: float, lr: float) -> "StepRecord":
        """What ``step``, a training.step.Step, tells of itself, and its place in the run; ``number`` counts steps."""
        return cls(
            epoch=epoch,
            batch=batch,
            step=number,
            fractional_epoch=fractional_epoch,
            lr=lr,
            scale=float(step.scaler.scale),
            amp_dtype=step.amp_dtype,
            device=step.device,
            generators=generator_state(step.device),
            network=step.network,
            optimizer=step.optimizer,
            parameters=step.parameters,
            module_state=step.module_state.state_dict(),
            gradients=step.seen(),
        )

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that the optimizer holds, in its order; a frozen one is among them."""
        trained = {id(p) for p in self.parameters}
        return [name for name, p in self.network.named_parameters() if id(p) in trained]

    def state(self, moments: bool = True) -> dict:
        """Weights, buffers and, if wanted, the optimizer's ``moments``, copied to the CPU."""
        state = self.whole or self.own_state()
        optimizer = state["optimizer_state_dict"]
        if not moments:
            optimizer = {**optimizer, "state": {}}
        return to_cpu({**state, "optimizer_state_dict": optimizer})

    @property
    def weights(self) -> dict:
        """The parameters by name; where they are split and were not put together, this process's rows."""
        named = dict(self.network.named_parameters())
        held = (self.whole or {}).get("model_state_dict", {})
        return {name: held.get(name, local(parameter)) for name, parameter in named.items()}

    def own_state(self) -> dict:
        """Weights, buffers and the optimizer's state as this process has them."""
        return {"model_state_dict": self.network.state_dict(), "optimizer_state_dict": self.optimizer.state_dict()}


def concatenate_window(window: list[dict]) -> dict:
    """The batches of a window as one: data (M, B, samples), label (B,), files in the order of (M, B)."""
    window = [as_dumped(batch) for batch in window]
    rows = window[0]["data"].shape[0]
    files = []
    for utterance in range(rows):
        for batch in window:
            size = batch["data"].shape[1]
            files += batch["files"][utterance * size : (utterance + 1) * size]
    data = torch.cat([batch["data"] for batch in window], dim=1)
    sizes = [batch["data"].shape[1] for batch in window]
    return {"data": data, "label": torch.cat([batch["label"] for batch in window]), "files": files, "window": sizes}


def to_cpu(value):
    """Copy a nested state to the CPU, so that training may go on while it is written."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: to_cpu(v) for k, v in value.items() if not callable(v)}
    return [to_cpu(v) for v in value] if isinstance(value, (list, tuple)) else value


def signature_of(fault: Fault, paths: list[str]) -> str:
    """What two faults have in common that are the same one: reason, module, files."""
    kind = "inf" if math.isinf(fault.loss) else "nan" if math.isnan(fault.loss) else ""
    return "|".join([fault.reason, kind, fault.module, *sorted(set(paths))])


def outcome_of(fault: Fault) -> str:
    """What becomes of the run after a fault, in a line."""
    if not fault.undone:
        return "The update could not be taken back: the weights are spoilt, and the run ends."
    if fault.transient:
        return "Computed once more it is finite: a transient fault (device, race). The step is taken."
    again = ""
    if fault.recheck:
        again = f"Computed once more it gives {'the same' if fault.recheck['same'] else 'other'} values. "
    if "cpu_finite" in fault.recheck:
        told = "finite: is the GPU broken?" if fault.recheck["cpu_finite"] else "not finite either."
        again += f"On the CPU it is {told} "
    elif "cpu_error" in fault.recheck:
        again += f"On the CPU it cannot be computed: {fault.recheck['cpu_error']}. "
    return f"{again}Training goes on; weights, buffers and optimizer are as before this batch."


class FaultDumps(abc.ABC):
    """Reports faults and writes their dumps into ``folder``, ``max_dumps`` and ``max_gb`` at most.

    ``classes``: of the loss, None if they are not known. ``log(text)`` prints a line.
    """

    analyser = "analyze_nan_debug.py"  # as it is called from where the run was started
    budget = ("nan_max_dumps", "nan_max_gb")  # what the user calls the bounds

    def __init__(self, folder, max_dumps: int, max_gb: float, ranks, classes: int | None, log=None):
        self.ranks, self.classes, self.log = ranks, classes, log
        self.writer = DumpWriter(folder, max_dumps, max_gb, self.print, self.budget)
        self.history = collections.deque(maxlen=HISTORY)
        self.seen = {}  # signature -> [name of its dump, how often]
        self.spikes = 0  # that were dumped
        self.names: set[str] = set()  # of the dumps that this process has written
        self.last_name: str | None = None
        self.saved_state: tuple[int, bool] | None = None  # (step, with moments) of the newest state that was submitted

    @abc.abstractmethod
    def sources(self) -> dict[str, str]:
        """Hashes of the source files that the step depends on."""

    @abc.abstractmethod
    def more(self, record: StepRecord, batch: dict) -> dict:
        """What a dump holds of a run's own: its ``config`` at least."""

    def print(self, text: str):
        """Print from any rank: the rank at fault speaks."""
        if self.log is not None:
            self.log(plain_names(text))
            return
        tqdm.write(plain_names(text))
        sys.stdout.flush()  # in a log, what stderr gets later stands behind it

    def remember(self, step: int, lr: float, attempt):
        """Add a step that was taken to the history that a dump carries."""
        figures = {"step": step, "loss": attempt.mean_loss, "accuracy": attempt.mean_accuracy}
        self.history.append({**figures, "grad_norm": attempt.norm, "lr": lr, "scale": attempt.scale})

    def save(self, record: StepRecord, content: dict, fault: Fault | None = None) -> str:
        """Hand a dump to the writer unless a budget refuses it; returns the line to print.

        With a ``fault`` the state that the step began with goes along, once for all faults of the same state.
        """
        self.last_name = self.free_name(record)
        with_state, shared, suspect = self.needs(record, fault)
        moments = suspect or self.saved_state is None  # of other faults the weights tell enough
        size = content["data"].numel() * 4
        if with_state and not shared:
            size += sum(p.numel() for p in record.parameters) * 4 * (3 if moments else 1)
        refusal = self.writer.refusal(size)
        if refusal:
            self.last_name = None
            return f"Not saved: {refusal}"
        state = record.state(moments) if with_state and not shared else None
        if state:
            self.saved_state = (record.step, moments)
        self.writer.submit(self.last_name, content, state, size, shared)
        self.names.add(self.last_name)
        return f"{picture(DISK)}Saved debug data to: {self.writer.folder / self.last_name}"

    def free_name(self, record: StepRecord) -> str:
        """The name of a step's dump; the second of a batch, as of a NaN beside an unreadable file, has a number too."""
        step = f"nan_batch_{record.batch}_epoch_{record.epoch}"
        names = (f"{step}{more}{self.suffix}.pt" for more in ["", *(f"_{number}" for number in range(2, 100))])
        return next(name for name in names if name not in self.names)

    def needs(self, record: StepRecord, fault: Fault | None) -> tuple[bool, bool, bool]:
        """Whether a dump names the state that the step began with, whether that is written, whether moments matter."""
        # After an update that could not be taken back, what is there now is not what the step began with.
        with_state = fault is not None and fault.undone
        suspect = fault is not None and fault.reason == "state_nonfinite"
        shared = with_state and self.saved_state in ((record.step, True), (record.step, suspect))
        return with_state, shared, suspect

    def is_known(self, fault: Fault, paths: list[str]) -> bool:
        """Whether a fault has a dump from before, and its place is known."""
        first, count = self.seen.get(signature_of(fault, paths), ("", 0))
        return bool(count and (fault.module or paths) and first not in self.writer.lost)

    def dump(self, record: StepRecord, batch, fault: Fault, paths: list[str]) -> str | None:
        """Write a fault's dump and report; count one seen before. Returns the dump's name.

        A fault whose place is not known may be another one each time: it is dumped until the budget is used.
        """
        signature = signature_of(fault, paths)
        first, count = self.seen.get(signature, ("", 0))
        skipped = f"skipped batch {record.batch} of epoch {record.epoch}: {fault.what}"
        unchanged = "weights, buffers and optimizer are unchanged"
        if self.is_known(fault, paths):
            self.seen[signature] = [first, count + 1]
            self.print(f"{skipped} (seen {count + 1} times, the first: {first}); {unchanged}")
            return None
        refusal = self.writer.refusal(0)
        if refusal and self.seen and fault.undone:
            self.seen[signature] = [first or "not saved", count + 1]
            self.print(f"{skipped}. Not saved: {refusal}; {unchanged}")
            return None
        gradients = {} if fault.reason in BEFORE_THE_STEP else record.gradients  # those of the step before
        content = self.content(record, batch, fault, tensor_stats(gradients))
        lines = report(content, fault, self.classes)
        lines.append(self.save(record, content, fault))
        self.seen[signature] = [first or self.last_name or "not saved", count + 1]
        if self.last_name:
            lines.append(f"To find out why: {self.analysis_of(self.last_name)}")
        lines.append(outcome_of(fault))
        self.print("\n".join(lines))
        return self.last_name

    def save_spike(self, record: StepRecord, batch, spike: dict, weights: dict) -> str:
        """Hand the dump of a step that was finite and far out to the writer; returns what became of it, in a few words.

        ``record`` and ``weights`` {name: tensor} are as before the step. The weights are left out where there is no
        room; the moments are no part of it.
        """
        if self.spikes >= SPIKES:
            return f"not dumped: {SPIKES} spikes are"
        fault = Fault("spike", "", loss=spike["loss"], norm=spike["grad_norm"], accuracy=spike["accuracy"])
        content = self.content(record, batch, fault, {})
        content["spike"] = {key: value for key, value in spike.items() if key != "accuracy"}
        trained = {name for name, _ in record.network.named_parameters()}
        if weights:
            content["param_stats"] = tensor_stats({name: t for name, t in weights.items() if name in trained})
        size = content["data"].numel() * 4
        refusal = self.writer.refusal(size, SPIKE_SHARE, counted=False)
        if refusal:
            return f"not dumped: {refusal}, half of it for spikes"
        whole = size + sum(t.numel() * t.element_size() for t in weights.values())
        state = None
        if weights and not self.writer.refusal(whole, SPIKE_SHARE, counted=False):
            optimizer = {**to_cpu(record.optimizer.state_dict()), "state": {}}
            state, size = {"model_state_dict": weights, "optimizer_state_dict": optimizer}, whole
        self.spikes += 1
        name = f"spike_batch_{record.batch}_epoch_{record.epoch}{self.suffix}.pt"
        self.writer.submit(name, content, state, size, counted=False)
        if state is not None and self.saved_state is not None:
            self.saved_state = (record.step, False)
        return f"to find out why: {self.analysis_of(name)}"

    def analysis_of(self, name: str) -> str:
        """The command that analyses a dump."""
        return f"python {self.analyser} {shell_path(self.writer.folder / name)}"

    @property
    def suffix(self) -> str:
        """What the names of this process's dumps end in: '_rank1', '' of a single process."""
        return f"_rank{self.ranks.rank}" if self.ranks.world > 1 else ""

    def content(self, record: StepRecord, batch, fault: Fault, grad_stats: dict) -> dict:
        """Everything of format 1 but the state's name."""
        dump = {
            "format_version": 1,
            "reason": fault.reason,
            "batch_idx": record.batch,
            "epoch": record.epoch,
            "step": record.step,
            "rank": self.ranks.rank,
            "world": self.ranks.world,
            "injected": fault.injected,
            "window": batch["window"],
            "moment": record.fractional_epoch,
            "loss": fault.loss,
            "prec1": fault.accuracy,
            "grad_norm": fault.norm,
            "data": batch["data"].clone(),
            "label": batch["label"].clone(),
            "files": batch["files"],
            "lr": record.lr,
            "scaler_scale": record.scale,
            "amp_dtype": "float32" if record.amp_dtype is None else str(record.amp_dtype).removeprefix("torch."),
            "grad_stats": grad_stats,
            "param_stats": tensor_stats(record.weights),
            "trainable": record.trainable,
            "history": list(self.history),
            "rng_state": record.generators,
            "threads": torch.get_num_threads(),
            "device": str(record.device),
            "versions": versions(),
            "source_hashes": self.sources(),
            "module_state": record.module_state,
            "optimizer_attributes": {k: v for k, v in vars(record.optimizer).items() if type(v) in SCALAR},
            "state": "",
            **self.more(record, batch),
        }
        if fault.update:
            dump["update_stats"] = fault.update
        if fault.recheck:
            dump["recheck"] = fault.recheck
        return dump
