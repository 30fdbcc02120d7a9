"""NumericGuard: the trainer's own step, without trace when something is not finite, for any PyTorch training loop."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from errors import ROOT, UsageError
from postmortem.built import Builder, BuiltNetwork, difference, optimizer_layout
from training.attempt import Attempt
from training.dumps import FaultDumps, StepRecord
from training.faults import Fault
from training.generators import generator_state, restore_generators
from training.ranks import SingleProcess
from training.step import Step
from utils import plain_names

AMP_DTYPES = (None, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StepResult:
    """What became of a batch: its loss, accuracy in % and gradient norm, whether the step was ``taken``, its ``dump``.

    ``accuracy`` is NaN unless model or loss return one. ``dump`` is None for a step that was taken, for a fault that
    was seen before, and when the budget is used. ``what`` says what was not finite.
    """

    loss: float
    accuracy: float
    norm: float
    taken: bool
    dump: Path | None = None
    what: str = ""


class NumericGuard:
    """Takes the steps of a training loop; one in which something is not finite is taken back, and dumped.

    ``guard.step(data, label)`` stands for zero_grad, forward, backward, clipping and optimizer.step. A refused step
    leaves weights, buffers, moments, plain attributes of modules and torch's generators bit for bit as they were.
    ``build``: 'module:function', an importable function without arguments that returns (model, optimizer) or
    (model, optimizer, loss) as the loop has them; ``analyze_nan_debug.py`` builds the network of a dump with it.
    ``loss``: a module or function, loss(model(data), label); without it model(data, label) gives the loss. Both may
    give (loss, accuracy in %). ``amp_dtype``: autocast's type, torch.float16 or torch.bfloat16; fp16 gradients are
    scaled. ``grad_clip``: the largest gradient norm, 0 for any. ``log(text)`` prints a report.

    Make it when the model is on its device, before the first step. UsageError if ``build`` cannot be imported or
    builds another network. One process only.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        folder,
        build: str,
        *,
        loss=None,
        amp_dtype: torch.dtype | None = None,
        grad_clip: float = 0.0,
        max_dumps: int = 10,
        max_gb: float = 1.0,
        log=None,
    ):
        if amp_dtype not in AMP_DTYPES:
            raise UsageError(f"amp_dtype: expected None, torch.float16 or torch.bfloat16, got {amp_dtype}")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise UsageError("NumericGuard guards one process; this one belongs to a group of several")
        self.network, self.optimizer = BuiltNetwork(model, loss), optimizer
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.builder = Builder(build)
        self.check_builder()
        ranks = SingleProcess(self.device)
        self.dumps = GuardDumps(self, folder, max_dumps, max_gb, ranks, log)
        self.guarded = Step(self.network, ranks, amp_dtype, optimizer, grad_clip, self.dumps.print)
        self.batches = self.steps = 0  # that were given, that were taken

    def check_builder(self):
        """Build the network once, to see that it is the loop's; UsageError if it is not."""
        generators = generator_state(self.device)
        try:
            made, optimizer = self.builder.make()
        finally:
            restore_generators(generators, self.device)
        wrong = difference(self.network, self.optimizer, made, optimizer)
        if wrong:
            raise UsageError(f"build: {self.builder.build} builds another network: {wrong}")
        self.builder.sources()  # their hashes as they are now, when what is in memory was read

    def step(self, data: torch.Tensor, label: torch.Tensor) -> StepResult:
        """Train on a batch, rows of ``data`` and ``label`` in dimension 0, or leave it out without a trace and dump it.

        Raises what model, loss and optimizer raise, with everything as before, and RuntimeError if an update that made
        something non-finite cannot be taken back.
        """
        self.check_batch(data, label)
        self.batches += 1
        window = [{"data": data, "label": label}]
        self.guarded.parameters = [p for p in self.network.parameters() if p.requires_grad]
        result = self.take(window)
        if isinstance(result, Fault) and result.transient:
            self.dumps.refuse(window, result)
            result = self.take(window)
        if isinstance(result, Attempt):
            self.dumps.remember(self.steps, self.lr, result)
            self.steps += 1
            return StepResult(result.loss, result.accuracy, result.norm, True)
        dump = self.dumps.refuse(window, result)
        self.optimizer.zero_grad(set_to_none=True)
        if not result.undone:
            raise RuntimeError(f"{plain_names(result.what)}; it could not be taken back: the weights are spoilt")
        return StepResult(result.loss, result.accuracy, result.norm, False, dump, plain_names(result.what))

    def take(self, window: list[dict]) -> Attempt | Fault:
        """Take the trainer's step; an exception leaves everything as before it."""
        try:
            return self.guarded.take(window)
        except Exception:
            self.guarded.undo()
            self.optimizer.zero_grad(set_to_none=True)
            raise

    @staticmethod
    def check_batch(data, label):
        """Refuse a batch that is no pair of tensors with the same number of rows."""
        for name, value in (("data", data), ("label", label)):
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                raise UsageError(f"{name}: expected a tensor with rows in dimension 0, got {type(value).__name__}")
        if len(data) != len(label):
            raise UsageError(f"label has {len(label)} rows, data {len(data)}")

    @property
    def lr(self) -> float:
        """The learning rate of the optimizer's first group."""
        return float(self.optimizer.param_groups[0].get("lr", math.nan))

    def close(self):
        """Wait until the dumps are written; the end of the program waits too."""
        self.dumps.writer.close()


class GuardDumps(FaultDumps):
    """The reports and dumps of a guard."""

    budget = ("max_dumps", "max_gb")

    def __init__(self, guard: NumericGuard, folder, max_dumps: int, max_gb: float, ranks, log):
        super().__init__(folder, max_dumps, max_gb, ranks, None, log)
        self.guard = guard
        if Path.cwd() != ROOT:
            self.analyser = str(ROOT / "analyze_nan_debug.py")

    def refuse(self, window: list[dict], fault: Fault) -> Path | None:
        """Report and dump a fault; returns the dump's path, None if it was not dumped."""
        data, label = (window[0][key].detach().cpu() for key in ("data", "label"))
        batch = {"data": data.reshape(len(data), -1), "label": label, "files": [], "window": [len(data)]}
        self.row_shape = list(data.shape[1:])
        name = self.dump(self.record(), batch, fault, [])
        return self.writer.folder / name if name else None

    def record(self) -> StepRecord:
        """What a dump tells of the step at hand."""
        guard = self.guard
        return StepRecord.of(
            guard.guarded, epoch=1, batch=guard.batches, number=guard.steps, fractional_epoch=0.0, lr=guard.lr
        )

    def sources(self) -> dict[str, str]:
        """Hashes of the module of ``build`` and of what it imports from its folder."""
        return self.guard.builder.sources()

    def more(self, record: StepRecord, batch: dict) -> dict:
        """How the network is built, and which parts of it are frozen."""
        network = self.guard.network
        return {
            "build": self.guard.builder.build,
            "row_shape": self.row_shape,
            "trainable": [name for group in optimizer_layout(network, self.guard.optimizer) for name in group],
            "evaluating": [name for name, module in network.named_modules() if name and not module.training],
            "frozen": [name for name, p in network.named_parameters() if not p.requires_grad],
            "config": {
                "optimizer": type(self.guard.optimizer).__name__,
                "grad_clip": float(self.guard.guarded.grad_clip),
            },
        }
