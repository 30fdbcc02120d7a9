"""One step of training on real rows in several precisions, without taking it: is it finite, and by what margin?"""

import contextlib
import math
import sys

import torch
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from DatasetLoader import collate
from errors import UsageError
from preflight.lint import FP16_MAX
from settings import plugins
from training.distillation import modules_of
from training.faults import check_batch
from training.generators import seed_everything
from training.step import Step
from utils import plain_names

ROWS, ROWS_ON_CPU = 8, 4  # enough for the magnitudes; a CPU takes minutes for float16 convolutions of many rows
LOW_SCALE = 256.0  # loss scale of float16 if it is not the run's own and no time is spent on the search for one
TRIED_ROWS = 256  # rows looked at for eight without a fault of the data
LITTLE_HEADROOM = 2.0  # bits
FAR_OFF = 0.05  # of the loss in float64: finite, but another loss
WORST = 5
SCHEDULE_POINTS = 2000


class DoubleFloats(TorchFunctionMode):
    """Let ``x.float()`` and ``float32`` mean float64, so that a model's float32 islands do not round the reference."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def wider(value):
            return torch.float64 if value is torch.float32 else value

        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


class OutputRecorder:
    """What the modules of a network put out in a step: largest value and type, and the first that is not finite."""

    def __init__(self, network):
        self.peaks, self.types = {}, {}
        self.bad_output = self.bad_gradient = ""
        self._last, self._handles = None, []
        for name, module in modules_of(network):
            if name:
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, raw):
        name = plain_names(raw)

        def look(module, inputs, output):
            tensors = [t for t in (output if isinstance(output, (tuple, list)) else [output]) if torch.is_tensor(t)]
            for tensor in tensors:
                if not tensor.is_floating_point() or not tensor.numel() or tensor is self._last:
                    continue  # the last one: a container hands on what its last module put out
                self._last = tensor
                peak = float(tensor.detach().abs().amax())
                self.peaks[name] = max(peak, self.peaks.get(name, 0.0)) if math.isfinite(peak) else math.inf
                self.types[name] = tensor.dtype
                if not math.isfinite(peak):
                    self.bad_output = self.bad_output or name
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: self._look_back(name, gradient))

        return look

    def _look_back(self, name, gradient):
        if not self.bad_gradient and not gradient.isfinite().all():
            self.bad_gradient = name

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._last = None
        for handle in self._handles:
            handle.remove()


def check_step(config, build, report):
    """Build the trainer as the run would, and try one step in each precision."""
    report.heading("dry step")
    lines = []
    try:
        trainer = build(lines.append)
        rows = ROWS if trainer.device.type == "cuda" else ROWS_ON_CPU
        batch = first_rows(trainer.dataset, trainer.sampler, trainer.incidents.classes, config, rows)
    except UsageError as error:
        report.finding("error", str(error))
        return
    for text in lines:
        report.line(f"  {text}")
    trainer.network.__S__._compiled_call_impl = None  # compiling takes minutes and changes no magnitude
    rates = learning_rates(trainer.optimizer, trainer.scheduler, trainer.scheduler_unit, trainer.progress, config)
    check_learning_rate(rates, config.scheduler, report)
    if batch is None:
        report.finding("error", f"too few rows without NaN or Inf among the first {TRIED_ROWS}")
        return
    chosen = trainer.step.amp_dtype or torch.float32
    trials = try_precisions(trainer.network, trainer.ranks, batch, chosen, config.seed, report)
    if trials:
        describe(trials, chosen, batch, trainer.device, report)
        check_finite(trials, chosen, report)
        check_headroom(trials, chosen, report)


def first_rows(dataset, sampler, classes: int, config, rows: int):
    """The first ``rows`` of the first epoch that have no NaN or Inf, as one batch; None if there are too few."""
    wanted = min(max(rows // config.nPerSpeaker, 2), config.batch_size)
    chosen = []
    items = (item for items in sampler for item in items)
    for _, item in zip(range(TRIED_ROWS), items):
        row = dataset[item]
        unread = any(event[0] == "speaker" for event in row[3])
        if not unread and check_batch(collate([row]), classes) is None:
            chosen.append(row)
        if len(chosen) == wanted:
            return collate(chosen)
    return None


def try_precisions(network, ranks, batch, chosen, seed: int, report) -> dict:
    """{type: (Attempt, OutputRecorder, loss scale)} of a step in each precision.

    {} if it fails in fp32 or in the precision of the run.
    """
    trials = {}
    order = list(dict.fromkeys((torch.float32, torch.float16, chosen, torch.float64)))  # float64 last: it converts
    hidden = not sys.stderr.isatty()
    for dtype in tqdm(order, desc="dry step", unit="pass", leave=False, ascii=True, disable=hidden):
        try:
            trials[dtype] = attempt(network, ranks, batch, dtype, dtype is chosen, seed)
        except Exception as error:  # a plug-in may raise anything; the other precisions still tell something
            level = "error" if dtype in (chosen, torch.float32) else "note"
            report.finding(level, f"{name_of(dtype)}: the step fails: {plugins.in_one_line(error)}")
            if level == "error":
                return {}
    return trials


def attempt(network, ranks, batch, dtype, own: bool, seed: int):
    """Forward and backward pass in one precision; returns (Attempt, OutputRecorder, loss scale). Nothing of it stays.

    ``own``: it is the run's precision, whose search for a loss scale is followed from its begin.
    """
    seed_everything(seed)  # the same dropout and masks in each precision
    network.train()
    mode = contextlib.nullcontext()
    if dtype is torch.float64:
        network.double()
        batch, mode = {**batch, "data": batch["data"].double()}, DoubleFloats()
    step = Step(network, ranks, dtype if dtype in (torch.float16, torch.bfloat16) else None)
    scales = [step.scaler.scale, *step.scaler.retries()]
    step.begin()
    for scale in scales if own else [s for s in scales if s <= LOW_SCALE]:
        step.rewind()
        try:
            with mode, OutputRecorder(network) as recorder:
                result = step.attempt([batch], scale)
        finally:
            step.buffers.restore()
        if result.finite or not result.loss_finite:
            break
    if not result.finite and not recorder.bad_output and not recorder.bad_gradient:
        recorder.bad_gradient = plain_names(step.named(result).module)
    return result, recorder, scale


def name_of(dtype) -> str:
    """'float16' of torch.float16."""
    return str(dtype).removeprefix("torch.")


def check_learning_rate(rates: list[tuple[int, float]], scheduler: str, report):
    """Report a learning rate of a schedule that is negative or not finite, else where the schedule goes."""
    bad = next(((epoch, lr) for epoch, lr in rates if not 0 <= lr < math.inf), None)
    if bad:
        report.finding("error", f"scheduler/{scheduler}.py: learning rate {bad[1]:g} in epoch {bad[0]}")
        return
    epoch, highest = max(rates, key=lambda pair: pair[1])
    first, last = rates[0][1], rates[-1][1]
    report.line(f"  learning rate {first:.3g} at first, at most {highest:.3g} (epoch {epoch}), {last:.3g} at last")


def learning_rates(optimizer, scheduler, unit: str, progress, config) -> list[tuple[int, float]]:
    """Points (epoch, rate) of the schedule from here to ``max_epoch``, of the group with the highest rate."""
    groups = optimizer.param_groups
    index = max(range(len(groups)), key=lambda i: groups[i].get("initial_lr", groups[i]["lr"]))
    group = groups[index]
    steps, last = progress.steps_per_epoch, config.max_epoch
    if hasattr(scheduler, "lr_lambdas") and unit == "iteration":
        total = last * steps
        points = sorted({total * i // SCHEDULE_POINTS for i in range(SCHEDULE_POINTS)} | {total - 1})
        return [(p // steps + 1, scheduler.base_lrs[index] * scheduler.lr_lambdas[index](p)) for p in points]
    per_epoch = 1 if unit == "epoch" else steps
    rates = [(progress.epoch, float(group["lr"]))]
    optimizer.zero_grad(set_to_none=True)
    optimizer.step()  # moves nothing without gradients; torch wants one before the schedule's first
    for step in range(1, min((last - progress.epoch + 1) * per_epoch, 10 * SCHEDULE_POINTS)):
        scheduler.step()
        rates.append((progress.epoch + step // per_epoch, float(group["lr"])))
    return rates


# ----------------------------------------------------------------------------------------------------- the results


def describe(trials, chosen, batch, device, report):
    """Print the table of precisions."""
    reference = trials.get(torch.float64, trials[torch.float32])[0].loss
    against = "float64" if torch.float64 in trials else "float32"
    rows = [("", "loss", "gradient norm", f"loss differs from {against} by", "")]
    for dtype in sorted(trials, key=lambda d: (-torch.finfo(d).bits, str(d))):
        result, _, scale = trials[dtype]
        off = abs(result.loss - reference) / max(abs(reference), 1e-30)
        remark = "<- this run" if dtype is chosen else ""
        remark += f"{', ' if remark else ''}loss scale {scale:g}" if dtype is torch.float16 else ""
        off = "" if name_of(dtype) == against else f"{off:.1e}"
        rows.append((name_of(dtype), f"{result.loss:.6g}", f"{result.norm:.4g}", off, remark))
    report.line(f"  {batch['data'].shape[1]} rows of the first batch on {device}, forward and backward:")
    report.table([("  " + row[0], *row[1:]) for row in rows])


def check_finite(trials, chosen, report):
    """Report precisions in which the step is not finite or far off; for those not the run's own it is a note."""
    reference = trials.get(torch.float64, trials[torch.float32])[0].loss
    for dtype, (result, recorder, _) in trials.items():
        off = abs(result.loss - reference) / max(abs(reference), 1e-30)
        if result.finite and (off > FAR_OFF or not result.norm):
            what = f"the loss is off by {100 * off:.0f} %" if off > FAR_OFF else "no gradient comes back"
            report.finding("warning" if dtype is chosen else "note", f"{name_of(dtype)}: finite, but {what}")
        if result.finite:
            continue
        where = f"the output of {recorder.bad_output}" if recorder.bad_output else "a BatchNorm statistic"
        if result.loss_finite and not math.isfinite(result.norm):
            where = f"the gradient that comes back to the output of {recorder.bad_gradient}"
        if dtype is chosen:
            report.finding("error", f"{name_of(dtype)}: {where} is not finite")
        else:
            report.finding("note", f"this run computes in {name_of(chosen)}; in {name_of(dtype)} {where} is not finite")


def check_headroom(trials, chosen, report):
    """Print the modules whose float16 output comes nearest to float16's end, by their values in float32."""
    if torch.float16 not in trials:
        return
    peaks, types = trials[torch.float32][1].peaks, trials[torch.float16][1].types
    bits = {
        name: math.log2(FP16_MAX / max(peak, 1e-30)) if math.isfinite(peak) else -math.inf
        for name, peak in peaks.items()
        if types.get(name) is torch.float16
    }
    worst = sorted(bits, key=bits.get)[:WORST]
    report.line(f"  largest outputs of the {len(bits)} modules that compute in float16, which ends at {FP16_MAX:g}:")
    report.table([(f"  {name}", f"{peaks[name]:.3g}", f"{bits[name]:.1f} bits left") for name in worst])
    for name in worst if chosen is torch.float16 else ():
        if bits[name] < LITTLE_HEADROOM:
            text = f"{name}: {bits[name]:.1f} bits below the largest float16; amp_dtype: bfloat16 has room"
            report.finding("warning", text)
