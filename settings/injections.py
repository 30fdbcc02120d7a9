"""The key ``nan_inject``: which steps of a rehearsal are spoiled, and how."""

from errors import UsageError

INJECTIONS = ("data", "loss", "grad", "buffer", "label", "update")


def parse_injections(text: str, rank: int = 0, world: int | None = None) -> dict[int, str]:
    """Read '3:data,7:grad@1' -> {3: 'data', 7: 'grad'} on rank 1, {3: 'data'} elsewhere; steps count from 1.

    UsageError for another form, and for a rank that ``world`` processes do not have.
    """
    chosen = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        step, _, kind = part.partition(":")
        kind, at, only = kind.partition("@")
        if not step.isdigit() or not int(step) or kind not in INJECTIONS or (at and not only.isdigit()):
            form = f"'step:kind' or 'step:kind@rank' with a step from 1 on and kind {', '.join(INJECTIONS)}"
            raise UsageError(f"nan_inject: expected {form}; got '{part}'")
        if only and world is not None and int(only) >= world:
            there = "there is process 0 alone" if world == 1 else f"there are processes 0 to {world - 1}"
            raise UsageError(f"nan_inject: '{part}': {there}")
        if not only or int(only) == rank:
            chosen[int(step)] = kind
    return chosen
