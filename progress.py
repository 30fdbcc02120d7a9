"""What a run says while it trains: the progress bar, and the line of an epoch on the terminal and in its files."""

import time

from tqdm import tqdm

LOG_SECONDS = 60  # between progress lines where there is no terminal for a bar


def new_totals() -> dict:
    """Sums of an epoch."""
    return {"loss": 0.0, "accuracy": 0.0, "utterances": 0, "skipped": 0, "seconds": 0.0, "waited": 0.0}


def progress_bar(trainer, hidden: bool):
    """A bar over the batches of the trainer's epoch; where it is ``hidden``, ``show`` prints lines."""
    return tqdm(
        total=len(trainer.sampler),
        initial=trainer.batch,
        desc=f"epoch {trainer.epoch}",
        leave=False,
        disable=hidden,
        unit="batch",
    )


def show(trainer, bar):
    """Advance the bar; in a log file, print a line a minute."""
    if bar.disable and time.monotonic() - trainer.last_line < LOG_SECONDS:
        return
    loss, accuracy, speed, wait = trainer.means()
    skipped = f" skipped {trainer.totals['skipped']}" if trainer.totals["skipped"] else ""
    text = f"loss {loss:.3f} acc {accuracy:.1f}% {speed:.0f} utt/s wait {wait:.0f}%{skipped}"
    if bar.disable:
        trainer.last_line = time.monotonic()
        trainer.say(f"  epoch {trainer.epoch} batch {trainer.batch}/{len(trainer.sampler)}  {text}")
    else:
        bar.set_postfix_str(text, refresh=False)
        bar.update()


def report_epoch(trainer, rates: dict[str, float]):
    """Write the epoch's line to the terminal, metrics.jsonl, scores.txt and TensorBoard.

    ``rates``: the learning rate of each parameter group by its name; where groups have names, all are written.
    """
    files, skipped = trainer.files, trainer.totals["skipped"]
    loss, accuracy, speed, wait = trainer.means()
    lr = next(iter(rates.values()))
    named = {f"lr_{name}": rate for name, rate in rates.items() if len(rates) > 1}
    said = f"  lr {lr:.3g}" if not named else "".join(f"  {name} {rate:.3g}" for name, rate in named.items())
    trainer.say(
        f"Epoch {trainer.epoch}/{trainer.config.max_epoch}  loss {loss:.4f}  train_acc {accuracy:.2f} %{said}"
        f"  {speed:.0f} utt/s  data wait {wait:.0f} %" + (f"  skipped batches {skipped}" if skipped else "")
    )
    files.event(
        "epoch",
        epoch=trainer.epoch,
        step=trainer.step,
        train_loss=loss,
        train_acc=accuracy,
        lr=lr,
        **named,
        utt_per_s=speed,
        data_wait_pct=wait,
        skipped_batches=skipped,
    )
    files.score_line(
        f"Epoch {trainer.epoch}, TEER/TAcc {accuracy:.2f}, TLOSS {loss:f}, LR {lr:f}"
        + (f", skipped {skipped}" if skipped else "")
    )
    scalars = {"Loss": loss, "Accuracy": accuracy, "LR": lr, "UttPerS": speed, "SkippedBatches": skipped}
    for tag, value in {**scalars, **named}.items():
        files.scalar(f"Train/{tag}", value, trainer.epoch)
