"""How the processes of a run find each other when a launcher starts them again, and what is said if they are lost."""

import contextlib
import datetime
import re
import time
import uuid
from pathlib import Path

import torch.distributed as dist

from errors import UsageError, first_line

POLL_SECONDS = 0.02
LOST = re.compile(
    r"gloo|NCCL|ProcessGroup|Socket|Connection (reset|closed|refused)|Broken pipe|Timed out waiting|store", re.I
)


class Alone(UsageError):
    """The other processes are gone or do not answer; nobody's mistake, so a status of its own."""

    status = 6


def of_this_start(store, rank: int, world: int, timeout: datetime.timedelta):
    """A view of the store of a launcher that only the processes of the same start have.

    A launcher that starts the processes again keeps its store, and with it what those before have left there, as the
    addresses of processes that are gone. How often it has started them does not tell two starts apart, for that number
    differs between machines. So the main process draws a name, and gives it to each process that asks anew.
    """
    own, until = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank:
        store.set(f"asks/{rank}", own)
        name = store.get(f"name/{own}").decode()
        store.set(f"{name}/joined/{rank}", "")
        return dist.PrefixStore(name, store)
    left = set(range(1, world))
    while left:
        for other in sorted(left):
            if store.check([f"asks/{other}"]):  # perhaps of a process that is gone: then another one asks soon
                store.set(f"name/{store.get(f'asks/{other}').decode()}", own)
            if store.check([f"{own}/joined/{other}"]):
                left.remove(other)
        if time.monotonic() > until:
            raise dist.DistStoreError(f"{len(left)} processes have not come")
        time.sleep(POLL_SECONDS if left else 0)
    return dist.PrefixStore(own, store)


@contextlib.contextmanager
def alone_in_one_line(ranks, folder):
    """Context of a run: that the others are gone or do not answer is said in one line, and what to do."""
    try:
        yield
    except RuntimeError as error:
        if ranks.world == 1 or not (isinstance(error, dist.DistError) or LOST.search(str(error))):
            raise
        reason = re.sub(r"^\[\S*:\d+\] |\. This is typically.*", "", first_line(error))
        last = Path(folder, "model", "last.model")
        where = f"from {last}" if last.is_file() else "from its start"
        raise Alone(
            f"the other processes are gone or do not answer ({reason}); the same command goes on {where}"
        ) from error
