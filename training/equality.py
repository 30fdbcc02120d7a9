"""What a run that goes on has in common with one that nothing disturbed: bit-equal, or only equivalent."""

from training.progress import Progress


def describe(
    kind: str, changes: list[str], progress: Progress, *, left_out: int, anew: bool, worlds: tuple, exact: bool
):
    """Say it in one line.

    ``kind`` of ``Progress.load_state_dict``; ``changes``: what decides over batches and was changed; ``left_out``: rows
    of the epoch that wait for another one; ``anew``: the schedule counts other steps than before; ``worlds``: processes
    before and now; ``exact``: whether this device gives the same bits in every run.
    """
    if kind == "equal":
        same = "weights, optimizer, schedule, random generators and batches are those of the state"
        if exact:
            return f"bit-equal to an uninterrupted run: {same}"
        return f"bit-equal: {same}; equivalent: what the device sums up in another order (deterministic: true keeps it)"
    changed, parts = "; ".join(changes), ["bit-equal: weights and optimizer"]
    open_epoch = progress.batch and not progress.trained
    if kind == "divided":
        parts.append(f"the rows of each batch are those of the run before, divided in another way ({changed})")
    else:
        parts.append(f"the batches are not those of the run before ({changed})")
    if kind == "dealt again" and (progress.dealt or left_out):
        waiting = f", but for {left_out} that wait for another epoch" if left_out else ""
        parts.append(f"the rows that are left of epoch {progress.epoch} are trained once each{waiting}")
    if kind == "share" and open_epoch:
        share = round(100 * progress.batch / progress.batches)
        parts.append(
            f"epoch {progress.epoch} goes on after {share} % of its batches, some rows come twice in it and some never"
        )
    if anew:
        parts.append("the schedule stands at the same share of the run")
    before, now = worlds
    if now > before:
        parts.append(f"random generators of processes from {before} on begin anew")
    return f"{'; '.join(parts)}; what follows is equivalent to an uninterrupted run, and not bit-equal"
