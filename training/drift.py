"""Processes of a run hold the same weights and moments bit for bit; the first that differs is named."""

import hashlib

from errors import Finished, rank_prefix
from storage.dump import content_hash
from training.sync_norm import is_synchronised

DRIFTED = 7  # exit status of a run whose processes no longer train the same model


def refuse_drift(ranks, step, average, folder):
    """Raise Finished on all processes if one holds another weight, average, moment or rate than the first.

    A collective; each process sends one hash. ``step``: the run's Step, ``average`` its MovingAverage; ``folder`` has
    the checkpoint to go on from.
    """
    if ranks.world == 1:
        return
    own = digests(step, average)
    whole = hashlib.sha256("".join(own.values()).encode()).hexdigest()
    if len(set(ranks.gather(whole))) == 1:
        return
    everyone = ranks.gather((rank_prefix().removesuffix(": "), own))
    _, expected = everyone[0]
    for place, theirs in everyone[1:]:
        differing = [name for name in expected.keys() | theirs.keys() if theirs.get(name) != expected.get(name)]
        if differing:
            first = min(differing, key=list({**expected, **theirs}).index)
            more = f" and {len(differing) - 1} more" if differing[1:] else ""
            raise Finished(
                [
                    f"{place}: '{first}'{more} differs from that of rank 0: the processes train no longer one model",
                    f"not saved; {folder / 'last.model'} is from before, and the same command goes on from it",
                    "a fault of memory or of a GPU does this, and so does a plug-in that computes by its rank",
                ],
                DRIFTED,
            )


def digests(step, average) -> dict[str, str]:
    """{name: hash} of what all processes of a run have in common, in the order in which a step reaches it.

    Parameters, the averages and moments of them, settings of the groups; buffers where norms are over all processes,
    for others move by each one's own rows. What is split over the processes is left out.
    """
    split = getattr(step, "slices", ())
    names = {id(p): name for name, p in step.network.named_parameters()}
    common = {name: p for name, p in step.network.named_parameters() if name not in split}
    if is_synchronised(step.network):
        common |= dict(step.network.named_buffers())
    common |= {f"average of {name}": tensor for name, tensor in average.tensors.items() if name not in split}
    saved = step.optimizer.state_dict()
    order = [names.get(id(p), "a parameter") for group in step.optimizer.param_groups for p in group["params"]]
    moments = saved.get("state", {})
    for number, values in moments.items() if isinstance(moments, dict) else ():
        name = order[number] if isinstance(number, int) and number < len(order) else str(number)
        if name not in split:
            common |= {f"{key} of {name}": value for key, value in values.items()}
    common |= {f"optimizer.{key}": value for key, value in saved.items() if key != "state"}
    return {name: content_hash({"": value}) for name, value in common.items()}
