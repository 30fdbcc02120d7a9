"""Processes that a launcher starts again find each other and not those before; one that is left alone says so."""

import datetime
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from training.meeting import Alone, alone_in_one_line, of_this_start

SOON = datetime.timedelta(seconds=20)


def meet_all(store, world, late=0.0):
    """The views of all ranks of one start; the main process comes ``late``."""
    waits = threading.Event()

    def one(rank):
        waits.wait(late if rank == 0 else 0)
        return of_this_start(store, rank, world, SOON)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(one, range(world)))


def test_each_start_of_a_launcher_has_a_store_of_its_own():
    store = dist.HashStore()
    for start in range(3):
        views = meet_all(store, 3, late=0.05 * start)
        views[1].set("address", str(start))
        assert views[2].get("address").decode() == str(start) and not views[0].check(["elsewhere"])
        views[0].set("elsewhere", "")  # the next start must not see it


def test_a_process_that_asked_and_was_killed_is_forgotten():
    store = dist.HashStore()
    store.set("asks/1", "of a process that is gone")
    first, second = meet_all(store, 2)
    first.set("here", "yes")
    assert second.get("here") == b"yes"


def test_the_main_process_does_not_wait_for_ever():
    with pytest.raises(dist.DistStoreError, match="1 processes have not come"):
        of_this_start(dist.HashStore(), 0, 2, datetime.timedelta(seconds=0.2))


GLOO = (
    "[/build/gloo/transport/tcp/pair.cc:545] Read error [10.0.0.2]:3792: Connection reset by peer. This is typically "
    "caused by a remote worker hanging or bugs in the application."
)


def test_a_process_that_is_left_alone_says_it_in_one_line(tmp_path):
    with pytest.raises(Alone) as said, alone_in_one_line(SimpleNamespace(world=2), tmp_path):
        raise RuntimeError(GLOO)
    assert said.value.status == 6 and str(said.value) == (
        "the other processes are gone or do not answer (Read error [10.0.0.2]:3792: Connection reset by peer); "
        "the same command goes on from its start"
    )
    for world, text in ((1, GLOO), (2, "mat1 and mat2 shapes cannot be multiplied")):
        with (
            pytest.raises(RuntimeError, match=r"Connection|shapes"),
            alone_in_one_line(SimpleNamespace(world=world), tmp_path),
        ):
            raise RuntimeError(text)
