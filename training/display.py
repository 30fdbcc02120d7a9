"""What a run says while it trains: the progress bar, the line of an epoch, and points of single steps."""

import math
import shutil
import sys
import textwrap
import time
import warnings

import torch
from tqdm import tqdm

from config import Config
from corpus.loader import usable_cores
from corpus.progress import LOG_SECONDS
from errors import plural

WAITING, LEAST_WAITED = 20.0, 5.0  # % of an epoch and seconds of waiting for data from which on something is said
WIDE = 100  # columns of a terminal that has room for a bar beside the figures


def columns() -> int:
    """Width of the terminal that stdout writes to, 0 if it is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 0


def folded(text: str, width: int) -> str:
    """Break each line of a text that reaches ``width``, at double spaces if it has some; 0 leaves it as it is.

    Further lines are indented by two spaces more. A word that is too wide stays whole.
    """
    return "\n".join(_folded_line(line, width) for line in text.splitlines()) if width else text


def _folded_line(line: str, width: int) -> str:
    if len(line) < width:
        return line
    indent = " " * (len(line) - len(line.lstrip()))
    lines = []
    for part in filter(None, line.strip().split("  ")):
        if lines and len(lines[-1]) + 2 + len(part.strip()) < width:
            lines[-1] += f"  {part.strip()}"
        else:
            ahead = f"{indent}  " if lines else indent
            lines += textwrap.wrap(
                part.strip(),
                width - 1,
                initial_indent=ahead,
                subsequent_indent=f"{indent}  ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines)


def short(value: float, digits: int) -> str:
    """A figure with so many digits after the point; with as few as tell its size where a run has diverged."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """'0:07', '12:40', '3:05:09', '2 d 04:10'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


class Bar(tqdm):
    """A bar on the terminal. While it stands, warnings, those of plug-ins too, are printed above it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.showwarning = warnings.showwarning
        if not self.disable:
            warnings.showwarning = self.print_above

    @staticmethod
    def print_above(message, category, filename, lineno, file=None, line=None):
        """Print a warning in the place of ``warnings.showwarning``."""
        tqdm.write(warnings.formatwarning(message, category, filename, lineno, line).rstrip(), file=file or sys.stderr)

    def close(self):
        """Remove the bar; warnings are printed as before."""
        if warnings.showwarning is self.print_above:
            warnings.showwarning = self.showwarning
        super().close()


class Display:
    """Says how a run goes: a bar or lines while an epoch runs, points of single steps, the line of an epoch.

    ``log(text)`` prints a line.
    """

    def __init__(self, config: Config, progress, files, log, device: torch.device):
        self.config, self.progress, self.files, self.log, self.device = config, progress, files, log, device
        self.bar: Bar | None = None
        self.last_line = time.monotonic()
        self.last_point = 0  # the step of the last point
        self.advised = False  # whether it was said what to do about waiting for data
        self.warm: tuple[int, dict] | None = None  # batches and sums of the epoch up to its first step
        self.pointed: dict = {}  # sums of the epoch at the last point
        self.pace: float | None = None  # seconds that a batch takes

    def begin(self, hidden: bool):
        """Put up the bar of an epoch; if it is ``hidden``, ``show`` prints lines."""
        self.warm, self.pointed = None, dict(self.progress.totals)
        wide = columns() >= WIDE
        figures = "{n_fmt}/{total_fmt} |{bar}|{postfix}" if wide else "{n_fmt}/{total_fmt}{postfix}"
        self.bar = Bar(
            total=self.progress.batches,
            initial=self.progress.batch,
            desc=f"epoch {self.progress.epoch}/{self.config.max_epoch}",
            leave=False,
            disable=hidden,
            dynamic_ncols=True,
            bar_format="{desc}  " + figures,
        )

    def show(self):
        """Advance the bar; in a log file, print a line a minute."""
        bar, progress = self.bar, self.progress
        self.measure_pace()
        warm = self.warm is not None and progress.totals["utterances"] > self.warm[1]["utterances"]
        if bar.disable and time.monotonic() - self.last_line < LOG_SECONDS:
            return
        loss, accuracy, speed, wait = progress.means(self.warm[1] if warm else {})
        left = [self.time_left()] if self.pace is not None else []
        figures = [f"loss {short(loss, 3)}", f"acc {accuracy:.1f} %", *left, f"{speed:.0f} utt/s"]
        if progress.totals["skipped"]:
            figures.append(f"skipped {progress.totals['skipped']}")
        figures.append(f"wait {wait:.0f} %")
        if bar.disable:
            self.last_line = time.monotonic()
            place = f"epoch {progress.epoch} batch {progress.batch}/{progress.batches}"
            self.log(f"  {place}  {'  '.join(figures)}")
            return
        before, width = f"{bar.desc}  {bar.total}/{bar.total}, ", columns()
        while width and len(figures) > 1 and len(before + ", ".join(figures)) >= width:
            figures.pop()  # the least important is the last
        bar.set_postfix_str(", ".join(figures), refresh=False)
        bar.update()

    def end(self):
        """Remove the bar."""
        self.bar.close()

    def measure_pace(self):
        """Note how long a batch takes. The epoch's first step of this process is not counted, nor what came before it.

        Its kernels are tried or compiled in it, which comes but once; what another process has done took another time.
        """
        progress = self.progress
        if self.warm is None:
            self.warm = None if progress.window.accepted else (progress.batch, dict(progress.totals))
        elif progress.batch > self.warm[0]:
            batch, sums = self.warm
            self.pace = (progress.totals["seconds"] - sums["seconds"]) / (progress.batch - batch)

    def time_left(self) -> str:
        """'left 0:20, run 12:40': of the epoch and of the whole run, its evaluations not counted."""
        progress = self.progress
        epoch = self.pace * (progress.batches - progress.batch)
        run = epoch + self.pace * progress.batches * (self.config.max_epoch - progress.epoch)
        return f"left {duration(epoch)}, run {duration(run)}"

    def write_point(self, history, optimizer, device):
        """Write the newest step of the history to TensorBoard (Step/..) and metrics.jsonl, by ``log_interval``."""
        interval, step = self.config.log_interval, self.progress.step
        if not interval or not history or step == self.last_point or step % interval:
            return
        self.last_point = step
        _, _, speed, wait = self.progress.means(self.pointed)
        self.pointed = dict(self.progress.totals)
        values = {key: history[-1][key] for key in ("loss", "accuracy", "grad_norm", "scale")}
        rates = learning_rates(optimizer)
        values |= {"utt_per_s": speed, "data_wait_pct": wait, **(by_group(rates) or {"lr": next(iter(rates.values()))})}
        if device.type == "cuda":
            values["memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        for name, value in values.items():
            self.files.scalar(f"Step/{name}", value, step)
        self.files.event("step", epoch=self.progress.epoch, step=step, **values)

    def report_epoch(self, rates: dict[str, float]):
        """Write the epoch's line to the terminal, metrics.jsonl, scores.txt and TensorBoard.

        ``rates``: the learning rate of each parameter group by its name; if groups have names, all are written.
        """
        epoch, skipped = self.progress.epoch, self.progress.totals["skipped"]
        loss, accuracy, speed, wait = self.progress.means()
        lr = next(iter(rates.values()))
        named = by_group(rates)
        shown = "".join(f"  {name} {rate:.3g}" for name, rate in (named or {"lr": lr}).items())
        self.log(
            f"Epoch {epoch}/{self.config.max_epoch}  loss {short(loss, 4)}  train_acc {accuracy:.2f} %{shown}"
            f"  {speed:.0f} utt/s  data wait {wait:.0f} %" + (f"  skipped batches {skipped}" if skipped else "")
        )
        on_gpu = self.device.type == "cuda"
        advice = waiting_advice(self.config, wait, speed, self.progress.totals["waited"], on_gpu)
        if advice and not self.advised:
            self.log(advice)
            self.advised = True
        if self.progress.diverges(loss):
            self.log(
                f"WARNING: the run diverges: mean loss {loss:.3g}, in its first step {self.progress.first_loss:.3g}; "
                f"try a lower lr than {self.config.lr:g}, a scheduler with warm-up, or grad_clip"
            )
        if not math.isfinite(accuracy) and math.isfinite(loss):
            where = f"loss/{self.config.trainfunc}.py gives accuracies that are not finite"
            self.log(f"WARNING: {where}; they are shown alone, and no step depends on them")
        figures = {"train_loss": loss, "train_acc": accuracy, "lr": lr, **named}
        figures |= {"utt_per_s": speed, "data_wait_pct": wait, "skipped_batches": skipped}
        self.files.event("epoch", epoch=epoch, step=self.progress.step, **figures)
        self.files.score_line(
            f"Epoch {epoch}, TEER/TAcc {accuracy:.2f}, TLOSS {short(loss, 6)}, LR {lr:f}"
            + (f", skipped {skipped}" if skipped else "")
        )
        scalars = {"Loss": loss, "Accuracy": accuracy, "LR": lr, "UttPerS": speed, "SkippedBatches": skipped}
        for tag, value in {**scalars, **named}.items():
            self.files.scalar(f"Train/{tag}", value, epoch)


def waiting_advice(config: Config, wait: float, speed: float, seconds: float, on_gpu: bool = False) -> str:
    """Say what to change if steps wait for data in more than WAITING % of an epoch; '' if they do not.

    ``wait`` in %, ``speed`` in utterances a second, ``seconds`` that were waited: one batch alone tells nothing.
    ``on_gpu``: whether the model trains on one, which then has time to augment.
    """
    if not WAITING < wait < 100 or seconds < LEAST_WAITED:
        return ""
    cores, workers = usable_cores(), min(config.nDataLoaderThread, usable_cores())
    loads = f"{plural(workers, 'loader process')} of nDataLoaderThread" if workers else "no loader process"
    if workers < cores - 1 or (not workers and cores > 1):
        change = f"nDataLoaderThread: {max(cores - 1, 1)} ({plural(cores, 'core')} here)"
    else:
        packed = "a pack of the speech on a local disk (pack_data.py)"
        there = ["augment_on: device"] * (on_gpu and config.augment and config.augment_on == "worker")
        changes = there + ([] if config.train_pack else [packed])
        changes += ["a smaller share of augmented crops"] * config.augment
        change = ", or ".join(changes) or "a faster disk"
    without = speed / (1 - wait / 100)
    return (
        f"steps wait for data {wait:.0f} % of the time: {speed:.0f} utt/s, without waiting {without:.0f}, with {loads}"
        f"; try {change}; docs/performance.md"
    )


def learning_rates(optimizer) -> dict[str, float]:
    """The rate of each parameter group, by its name or else its number."""
    return {group.get("name", str(number)): float(group["lr"]) for number, group in enumerate(optimizer.param_groups)}


def by_group(rates: dict[str, float]) -> dict[str, float]:
    """Rates as metrics.jsonl and TensorBoard name them, 'lr_head'; none for those of a single group."""
    return {f"lr_{name}": rate for name, rate in rates.items() if len(rates) > 1}
