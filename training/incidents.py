"""What the trainer does about a step that cannot be taken: find the fault, report it, dump it, count it."""

import collections
import hashlib
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from errors import UsageError
from settings import plugins
from settings.command_line import picture
from storage import checkpoint
from storage.dump import SCALAR, DumpWriter, tensor_stats
from storage.dump_statistics import SETTINGS, number, odd_rows
from training import precision
from training.run_files import versions
from utils import plain_names

BANNERS = {
    "loss_nonfinite": "NaN/Inf LOSS",
    "grad_nonfinite": "NaN/Inf GRADIENT",
    "grad_norm_overflow": "GRADIENT NORM OVERFLOW",
    "scale_collapse": "LOSS SCALE COLLAPSE",
    "batch_nonfinite": "NaN/Inf DATA",
    "label_out_of_range": "LABEL OUT OF RANGE",
    "state_nonfinite": "NaN/Inf STATE",
    "data_error": "UNUSABLE FILE",
}
INJECTIONS = ("data", "loss", "grad", "buffer", "label", "update")
HISTORY = 1000
ALARM, DISK = "\U0001f6a8", "\U0001f4be"


@dataclass
class Fault:
    """A step that was not taken: why, on which rank, which rows (numbers into the batch's ``files``), in one phrase."""

    reason: str
    what: str
    rows: list[int] = field(default_factory=list)
    loss: float = math.nan
    accuracy: float = 0.0
    norm: float = math.nan
    module: str = ""
    injected: str = ""  # the kind of ``nan_inject`` that made it
    phase: str = "step"  # or 'setting' or 'update', where the optimizer is at fault and not the batch
    update: dict = field(default_factory=dict)  # statistics of what the update made non-finite, by name
    undone: bool = True  # whether the state is as before


def parse_injections(text: str, rank: int = 0) -> dict[int, str]:
    """Read ``nan_inject``: '3:data,7:grad@1' -> {3: 'data', 7: 'grad'} on rank 1, {3: 'data'} elsewhere."""
    chosen = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        step, _, kind = part.partition(":")
        kind, at, only = kind.partition("@")
        if not step.isdigit() or kind not in INJECTIONS or (at and not only.isdigit()):
            kinds = ", ".join(INJECTIONS)
            raise UsageError(f"nan_inject: expected 'step:kind' or 'step:kind@rank' with kind {kinds}; got '{part}'")
        if not only or int(only) == rank:
            chosen[int(step)] = kind
    return chosen


def inject_batch(batch: dict, kind: str, classes: int) -> dict:
    """A copy of a batch with a NaN in its first row, or a label beyond the classes: the testing aid ``nan_inject``."""
    batch = dict(batch)
    if kind == "data":
        batch["data"] = batch["data"].clone()
        batch["data"][0, 0, batch["data"].shape[2] // 2] = math.nan
        batch["peak"] = batch["peak"].clone()
        batch["peak"][0] = math.nan
    if kind == "label":
        batch["label"] = batch["label"].clone()
        batch["label"][0] = classes + 3
    return batch


def check_batch(batch: dict, classes: int) -> Fault | None:
    """Host checks before the device sees a batch: every row finite, every label inside the classes."""
    peak, label = batch["peak"], batch["label"]
    rows = (~peak.isfinite()).nonzero().flatten().tolist()
    if rows:
        return Fault("batch_nonfinite", f"{len(rows)} row(s) with NaN or Inf samples", rows)
    wrong = ((label < 0) | (label >= classes)).nonzero().flatten().tolist()
    if wrong:
        return Fault("label_out_of_range", f"label {int(label[wrong[0]])} with {classes} classes", wrong)
    return None


def bad_setting(optimizer) -> str:
    """A setting of the optimizer that would spoil every weight, as a schedule may give one; '' if float32 holds all."""
    for group in optimizer.param_groups:
        for key in SETTINGS:
            if not abs(number(group, key)) <= torch.finfo(torch.float32).max:
                return f"the optimizer's {key} is {number(group, key)}"
    return ""


def update_fault(spoiled: dict, undone: bool, **told) -> Fault:
    """The fault of an update that made non-finite what ``spoiled`` {name: statistics} names."""
    name, stats = next(iter(spoiled.items()))
    more = f" and {len(spoiled) - 1} more" if len(spoiled) > 1 else ""
    count = f"{stats['nan']} NaN, {stats['inf']} Inf of {stats['numel']}"
    what = f"the optimizer's update made '{name}'{more} non-finite ({count}), from finite gradients"
    return Fault("state_nonfinite", what, module=name, phase="update", update=spoiled, undone=undone, **told)


def joined(window: list[dict]) -> dict:
    """The batches of a window as one: data (M, B, samples), label (B,), files in the order of (M, B)."""
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


class Incidents:
    """Counts, reports and dumps the faults of a run."""

    def __init__(self, trainer):
        c = trainer.config
        self.trainer, self.ranks = trainer, trainer.ranks
        self.writer = DumpWriter(Path(c.save_path, "debug_nan"), c.nan_max_dumps, c.nan_max_gb, self.print)
        self.history = collections.deque(maxlen=HISTORY)
        self.seen = {}  # signature -> [name of its dump, how often]
        self.file_dumps, self.last_name = 0, None
        self.injections = parse_injections(c.nan_inject, trainer.ranks.rank)
        self.classes = max(c.nClasses, trainer.dataset.classes)

    def print(self, text: str):
        """Print from any rank: the rank at fault speaks."""
        tqdm.write(plain_names(text))
        sys.stdout.flush()  # in a log, what stderr gets later stands behind it

    def remember(self, attempt, scale):
        """Add a step that was taken to the history that a dump carries."""
        values = {"step": self.trainer.step, "loss": attempt.loss, "accuracy": attempt.accuracy}
        lr = float(self.trainer.optimizer.param_groups[0]["lr"])
        self.history.append({**values, "grad_norm": attempt.norm, "lr": lr, "scale": scale})

    def classify(self, attempt) -> Fault:
        """Name what made a step non-finite, with the gradients of the last attempt still there."""
        t = self.trainer
        common = {"loss": attempt.loss, "accuracy": attempt.accuracy, "norm": attempt.norm}
        bad = self.bad_before()
        if bad:
            return Fault("state_nonfinite", f"'{bad[0]}' is not finite", module=bad[0], **common)
        if not attempt.loss_finite:
            return Fault("loss_nonfinite", f"loss is {attempt.loss}", **common)
        if not attempt.buffers_finite and math.isfinite(attempt.norm):
            return Fault("state_nonfinite", f"buffer '{attempt.buffer}' became non-finite", **common)
        grads = {n: p.grad for n, p in t.network.named_parameters() if p.grad is not None}
        first = next((n for n, g in grads.items() if not g.isfinite().all()), "")
        if not first:
            return Fault("grad_norm_overflow", "the gradient norm overflows, no gradient does", **common)
        if t.scaler.enabled and not any(g.isnan().any() for g in grads.values()):
            what = f"gradients overflow at every loss scale down to {t.scaler.lowest():g}"
            return Fault("scale_collapse", what, module=first, **common)
        return Fault("grad_nonfinite", f"gradient of '{first}' is not finite", module=first, **common)

    def bad_before(self) -> list[str]:
        """Weights and buffers that were not finite before a step which has been taken back."""
        t = self.trainer
        return [n for n in checkpoint.nonfinite_tensors(t.network.state_dict()) if n not in t.buffers.masks]

    def handle(self, window, fault: Fault | None, rng, at_fault: bool):
        """Report and dump on the rank at fault, tell all ranks, and write one event."""
        t = self.trainer
        summary = None
        if at_fault:
            batch = joined(window)
            paths = [batch["files"][row]["path"] for row in fault.rows]
            kind = "inf" if math.isinf(fault.loss) else "nan" if math.isnan(fault.loss) else ""
            signature = "|".join([fault.reason, kind, fault.module, *sorted(set(paths))])
            saved = self.dump(batch, fault, rng, signature)
            summary = {
                "rank": self.ranks.rank,
                "reason": fault.reason,
                "what": fault.what,
                "phase": fault.phase,
                "files": paths,
                "dump": saved,
            }
        found = [s for s in self.ranks.gather(summary) if s]
        for incident in found:
            t.files.event("incident", epoch=t.epoch, step=t.step, batch=t.batch, **incident)
        return found[0] if found else {"what": "unknown", "reason": "unknown"}

    def file_faults(self, batch, unusable: dict[str, str]) -> dict | None:
        """Dump a batch in which files ({path: reason}) that cannot be used gave way to others; it is trained on.

        Returns the incident, None for files beyond the half of ``nan_max_dumps`` that such dumps may take.
        """
        t = self.trainer
        if self.file_dumps >= (t.config.nan_max_dumps + 1) // 2:
            return None
        self.file_dumps += 1

        def concerned(info):
            return any(d["path"] in unusable for d in [*info.get("replaced", []), *info["augment"]])

        rows = [row for row, info in enumerate(batch["files"]) if concerned(info)]
        what = "; ".join(f"{path}: {reason}" for path, reason in unusable.items())
        fault = Fault("data_error", what, rows)
        saved = self.save(self.content(joined([batch]), fault, precision.draw_state(t.device), {}), None)
        return {
            "saved": saved,
            "epoch": t.epoch,
            "step": t.step,
            "batch": t.batch,
            "rank": self.ranks.rank,
            "reason": fault.reason,
            "what": what,
            "files": list(unusable),
            "dump": self.last_name,
        }

    def save(self, content: dict, state: dict | None) -> str:
        """Hand a dump to the writer unless a budget refuses it; returns the line to print."""
        t = self.trainer
        rank = f"_rank{self.ranks.rank}" if self.ranks.world > 1 else ""
        self.last_name = f"nan_batch_{t.batch}_epoch_{t.epoch}{rank}.pt"
        size = content["data"].numel() * 4 + (3 * sum(p.numel() for p in t.parameters) * 4 if state else 0)
        refusal = self.writer.refusal(size)
        if refusal:
            self.last_name = None
            return f"Not saved: {refusal}"
        self.writer.submit(self.last_name, content, state)
        return f"{picture(DISK)}Saved debug data to: {self.writer.folder / self.last_name}"

    def dump(self, batch, fault, rng, signature) -> str | None:
        """Write a new fault's dump and report; count one seen before. Returns the dump's name."""
        t = self.trainer
        if signature in self.seen and self.seen[signature][0] not in self.writer.lost:
            self.seen[signature][1] += 1
            name, count = self.seen[signature]
            self.print(
                f"skipped batch {t.batch} of epoch {t.epoch}: {fault.what} (seen {count} times, the first: {name});"
                " weights, buffers and optimizer are unchanged"
            )
            return None
        grads = {n: p.grad for n, p in t.network.named_parameters() if p.grad is not None}
        content = self.content(batch, fault, rng, tensor_stats(grads))
        lines = report(content, fault, t.network, self.classes)
        state = None
        if fault.undone:  # else what is there now is not what the step began with
            state = to_cpu(
                {"model_state_dict": t.network.state_dict(), "optimizer_state_dict": t.optimizer.state_dict()}
            )
        lines.append(self.save(content, state))
        self.seen[signature] = [self.last_name or "not saved", 1]
        if self.last_name:
            lines.append(f"To find out why: python analyze_nan_debug.py {self.writer.folder / self.last_name}")
        lines.append(
            "Training goes on; weights, buffers and optimizer are as before this batch."
            if fault.undone
            else "The update could not be taken back: the weights are spoilt, and the run ends."
        )
        self.print("\n".join(lines))
        return self.last_name

    def content(self, batch, fault, rng, grad_stats) -> dict:
        """Everything of format 1 but the state's name."""
        t = self.trainer
        data = batch["data"] if t.config.nan_dump_audio else batch["data"][..., :0]
        trained = {id(p) for p in t.parameters}  # in the optimizer's order; a frozen one is among them
        return {
            **{"format_version": 1, "reason": fault.reason, "batch_idx": t.batch, "epoch": t.epoch, "step": t.step},
            **{"rank": self.ranks.rank, "world": self.ranks.world, "injected": fault.injected},
            **{"window": batch["window"], "moment": t.moment()},
            **{"loss": fault.loss, "prec1": fault.accuracy, "grad_norm": fault.norm},
            **{"data": data.clone(), "label": batch["label"].clone(), "files": batch["files"]},
            **{"lr": float(t.optimizer.param_groups[0]["lr"]), "scaler_scale": float(t.scaler.scale)},
            "amp_dtype": "float32" if t.amp_dtype is None else str(t.amp_dtype).removeprefix("torch."),
            "grad_stats": grad_stats,
            "param_stats": tensor_stats(dict(t.network.named_parameters())),
            "trainable": [name for name, p in t.network.named_parameters() if id(p) in trained],
            "history": list(self.history),
            "rng_state": {
                **checkpoint.rng_state(t.device),
                "torch": rng[0],
                **({"cuda": rng[1]} if len(rng) > 1 else {}),
            },
            **{"threads": torch.get_num_threads(), "device": str(t.device), "config": t.config.values()},
            "versions": versions(),
            "source_hashes": self.sources(),
            **({"update_stats": fault.update} if fault.update else {}),
            "optimizer_attributes": {k: v for k, v in vars(t.optimizer).items() if type(v) in SCALAR},
            "state": "",
        }

    def state(self) -> dict:
        """What a resumed run must know."""
        counts = {"written": self.writer.written, "file_dumps": self.file_dumps}
        return {"history": list(self.history), "seen": self.seen, "sources": self.sources(), **counts}

    def sources(self) -> dict[str, str]:
        """Hashes of the plug-in files in use."""
        c = self.trainer.config
        chosen = {Path(folder, f"{getattr(c, key)}.py") for folder, key in plugins.CHOSEN_BY.items()}
        return source_hashes(chosen | imported_plug_ins())

    def load_state(self, state: dict):
        """Take over a saved state."""
        self.history.extend(state["history"])
        # A fault of code that has changed since is another fault.
        self.seen = state["seen"] if state.get("sources") == self.sources() else {}
        self.writer.written = state["written"]
        self.file_dumps = state.get("file_dumps", 0)


def imported_plug_ins() -> set[Path]:
    """Files of the plug-in folders that this process has imported: the chosen ones, and what they import."""
    root, files = f"{plugins.ROOT}{os.sep}", (getattr(m, "__file__", None) for m in list(sys.modules.values()))
    paths = {Path(file).relative_to(plugins.ROOT) for file in files if isinstance(file, str) and file.startswith(root)}
    return {p for p in paths if len(p.parts) == 2 and p.parts[0] in plugins.ENTRY and p.name != "__init__.py"}


def source_hashes(paths) -> dict[str, str]:
    """SHA-256 of plug-in files: 'loss/aamsoftmax.py' -> hash."""
    return {p.as_posix(): hashlib.sha256((plugins.ROOT / p).read_bytes()).hexdigest() for p in sorted(paths)}


def report(dump: dict, fault: Fault, network, classes: int) -> list[str]:
    """The report on the terminal, in the words of the NaN debugging guide."""
    data, label = dump["data"].float(), dump["label"]
    finite = data[data.isfinite()]
    values, counts = label.unique(return_counts=True)
    common = ", ".join(f"{v}: {c}" for v, c in list(zip(values.tolist(), counts.tolist()))[:10])
    common += ", ..." if len(values) > 10 else ""
    spread = f"range {int(values.min())} to {int(values.max())}"
    lines = [
        "=" * 80,
        f"{picture(ALARM)}{BANNERS[fault.reason]} DETECTED AT BATCH {dump['batch_idx']}",
        "=" * 80,
        f"Reason: {fault.reason}: {fault.what}",
        f"Loss value: {dump['loss']}",
        f"Precision: {dump['prec1']}",
        f"Epoch {dump['epoch']}, computed in {dump['amp_dtype']}, scale {dump['scaler_scale']:g}, lr {dump['lr']:g}",
        "",
        "--- DATA STATISTICS ---",
        f"Data shape: {data.shape}",
    ]
    if finite.numel():
        lines.append(f"Data min: {finite.min():.6f}, max: {finite.max():.6f}, mean: {finite.mean():.6f}")
    lines += [
        f"Data NaN: {int(data.isnan().sum())}, Inf: {int(data.isinf().sum())}",
        "",
        "--- LABEL STATISTICS ---",
        f"Unique labels: {len(values)} of {len(label)}, {spread}, {classes} classes",
        f"Label distribution: {common}",
        "",
        "--- GRADIENT STATISTICS ---",
        *gradient_lines(dump["grad_stats"]),
        "",
        "--- ROWS AND FILES ---",
        *row_lines(dump, fault),
        "",
    ]
    return lines


def gradient_lines(stats: dict) -> list[str]:
    """Which parameters have NaN or Inf gradients, and how many."""
    if not stats:
        return ["No gradients: the batch was refused before the forward pass"]
    bad = {name: s for name, s in stats.items() if s["nan"] or s["inf"]}
    if not bad:
        return [f"All gradients of {len(stats)} parameters are finite"]
    lines = [f"{len(bad)} of {len(stats)} parameters have NaN/Inf gradients:"]
    lines += [f"  {name}: NaN {s['nan']}, Inf {s['inf']} of {s['numel']}" for name, s in list(bad.items())[:10]]
    return lines + ([f"  ... and {len(bad) - 10} more"] if len(bad) > 10 else [])


def row_lines(dump: dict, fault: Fault) -> list[str]:
    """The rows at fault, or those that look odd, with their files; some files of the batch if no row stands out."""
    flat = dump["data"].flatten(0, 1)
    odd = {} if fault.rows else odd_rows(flat)
    rows, lines = fault.rows or list(odd) or range(len(dump["files"])), []
    if not fault.rows:
        lines.append("Rows that stand out:" if odd else "No row stands out before the model; the batch:")
    shown = list(rows)[: 10 if fault.rows or odd else 5]
    for row in shown:
        info = dump["files"][row]
        text = f"  row {row}: {info['path']} (list line {info['line']}), from sample {info.get('start', 0)}"
        text += f"; {odd[row]}" if row in odd else ""
        if flat.shape[1]:
            wrong = (~flat[row].isfinite()).nonzero().flatten()
            text += f"; {len(wrong)} non-finite, the first at sample {int(wrong[0])}" if len(wrong) else ""
        if fault.reason == "label_out_of_range":
            text += f"; label {int(dump['label'][row % len(dump['label'])])}"
        for draw in info.get("augment", []):
            text += f"; {draw['kind']} {draw['path']}"
        lines.append(text)
    rest = len(list(rows)) - len(shown)
    return lines + ([f"  ... and {rest} more rows"] if rest > 0 else [])
