"""Batches from loader processes that may die or hang: they are started again, and the same batches follow."""

import ctypes
import functools
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

import corpus.decode
from config import Config
from corpus.parcels import Sender, forget
from errors import UsageError, rank_prefix, with_place, write_any_text

RESTART_INTERVAL = 100  # batches that a restart must bring before another is tried
PATIENCE = 5.0  # seconds for killed processes to be gone
ENDED = object()  # in place of a batch: there are no more

LIKELY = {  # signal -> what to look at
    "SIGKILL": "out of memory? a smaller nDataLoaderThread or prefetch_factor needs less",
    "SIGBUS": "no room in /dev/shm? a container gets more by --shm-size, and a smaller nDataLoaderThread needs less",
}


class LoaderFailed(UsageError):
    """No batch can be had: which process or file it is about, in one line; nobody's mistake, so a status of its own."""

    status = 5


class OpenFiles:
    """Which file each loader process has open, and since when, in memory that the main process sees too."""

    LENGTH = 4096

    def __init__(self, workers: int):
        self.paths = [multiprocessing.RawArray(ctypes.c_char, self.LENGTH) for _ in range(max(workers, 1))]
        self.since = multiprocessing.RawArray(ctypes.c_double, max(workers, 1))

    def note(self, path):
        """Take note of the file that this process opens; '' when it is done with its batch."""
        info = get_worker_info()
        number = info.id if info else 0
        self.since[number] = time.monotonic()  # all processes of a machine have the same
        self.paths[number].value = os.fsencode(path)[: self.LENGTH - 1]

    def path(self, number: int) -> str:
        """The file that a process reads, '' if it reads none."""
        return os.fsdecode(self.paths[number].value)

    def while_it_read(self, number: int) -> str:
        """The file that a process reads as the end of a phrase."""
        return f" while it read {self.path(number)}" if self.path(number) else ""


class Rows:
    """The rows of a batch, each made when its turn comes: its samples are copied while they are in the cache."""

    def __init__(self, dataset, items):
        self.dataset, self.items = dataset, items

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return map(self.dataset.__getitem__, self.items)


class Batches(Dataset):
    """A dataset and its collation, so that an exception in a loader process comes back as a LoaderFailed item."""

    def __init__(self, dataset, collate, open_files: OpenFiles, ahead: int = 1):
        self.dataset = dataset
        self.collate = collate
        self.open_files = open_files
        self.sender = Sender(ahead)

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, items):
        corpus.decode.on_open = self.open_files.note
        info = get_worker_info()
        number = info.id if info else 0
        try:
            if not info:
                return self.collate(Rows(self.dataset, items))
            with self.sender.batch(number):
                return self.sender.wrap(self.collate(Rows(self.dataset, items)))
        except Exception as error:  # a bug, or no memory for a file: any kind, and the main process says it in one line
            said = str(error) if isinstance(error, UsageError) else with_place(error)
            return LoaderFailed(f"{said}{self.open_files.while_it_read(number)}")
        finally:
            self.open_files.note("")
            corpus.decode.on_open = None


class Remainder:
    """Batches of a batch sampler from ``skip`` on."""

    def __init__(self, batches):
        self.batches = batches
        self.skip = 0

    def __iter__(self):
        return itertools.islice(self.batches, self.skip, None)

    def __len__(self):
        return len(self.batches)


class Watch:
    """Calls a method, ``act``, if what was begun has not ended after ``seconds``; 0 for never.

    One thread looks now and then: to start one for each batch takes 0.1 ms, and the step waits for it.
    """

    def __init__(self, seconds: float, act):
        self.seconds, self.act, self.began = seconds, weakref.WeakMethod(act), 0.0
        self.thread: threading.Thread | None = None

    def begin(self):
        """Count from now on."""
        self.began = time.monotonic()
        if self.seconds and self.thread is None:
            self.thread = threading.Thread(target=_look, args=[weakref.ref(self)], daemon=True)
            self.thread.start()

    def end(self):
        """Count no more."""
        self.began = 0.0

    def look(self) -> float:
        """Act if it is time; returns the seconds until the next look."""
        began, act = self.began, self.act()
        if began and act is not None and time.monotonic() - began > self.seconds:
            self.began = 0.0
            act()
        return min(self.seconds / 10, 1.0)


def _look(watch: weakref.ref):
    """Look until the watch is gone."""
    while (there := watch()) is not None:
        pause = there.look()
        del there
        time.sleep(pause)


class Loader:
    """Iterates over the batches of a dataset, each once and in order, whatever becomes of the processes that load them.

    If a process is killed, crashes, raises an exception or brings nothing for ``loader_timeout`` seconds, a line says
    so, all are started again, and ``restarted`` is set. If that happens again before RESTART_INTERVAL batches, a
    LoaderFailed stands in place of every further batch: the caller ends the run, together with the other ranks.
    """

    def __init__(self, dataset, batches, collate, config: Config, workers: int, pin=False, keep=False):
        self.remainder, self.keep = Remainder(batches), keep
        self.workers, self.timeout = min(workers, usable_cores()), config.loader_timeout
        self.open_files = OpenFiles(self.workers)
        content = Batches(dataset, collate, self.open_files, config.prefetch_factor)
        weakref.finalize(self, forget, content.sender.token)
        self.token = content.sender.token
        self.build = functools.partial(make_loader, content, self.remainder, as_it_is, config, workers, pin, keep)
        self.loader = self.iterator = None
        self.restarted = False
        self.since_restart = RESTART_INTERVAL
        self.waiting = False
        self.watch = Watch(self.timeout if self.workers else 0, self._end_hanging)
        self.hung = ""

    def __len__(self):
        return len(self.remainder)

    def __iter__(self):
        self.remainder.skip = 0
        while True:
            try:
                yield from self._batches()
                return
            except LoaderFailed as failure:
                self._abandon()
                reason = str(failure)
            if self.since_restart < RESTART_INTERVAL:
                yield from itertools.repeat(LoaderFailed(reason))
            text = f"{rank_prefix()}loader: {reason}; loading starts again at the batch that is missing"
            tqdm.write(text, file=sys.stderr)
            self.restarted = True
            self.since_restart = 0

    def _batches(self):
        self._wait_for(self._start)
        while True:
            batch = self._wait_for(self._next)
            if batch is ENDED:
                return
            if isinstance(batch, LoaderFailed):
                raise batch
            self.remainder.skip += 1
            self.since_restart += 1
            yield batch

    def _start(self):
        if self.loader is None:
            self.loader = self.build()
        self.iterator = iter(self.loader)
        # torch's handler raises wherever the main thread is, even in the middle of a step.
        if self.workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, self._on_child)

    def _next(self):
        try:
            return next(self.iterator)
        except StopIteration:
            if not self.keep:
                self.iterator = None
                forget(self.token)
            return ENDED

    def _wait_for(self, function):
        """Call a function that may wait for loader processes; raises LoaderFailed if they can no longer answer."""
        try:
            self.waiting = True
            self.watch.begin()
            self._refuse_dead()
            return function()
        except LoaderFailed:
            raise
        except Exception as error:  # what torch and its queues raise depends on what a process was about when it died
            time.sleep(0.1)  # until the system knows that it is dead
            self._refuse_dead()
            raise LoaderFailed(with_place(error)) from error
        finally:
            self.waiting = False
            self.watch.end()

    def processes(self) -> list:
        """The loader processes."""
        return getattr(self.iterator, "_workers", [])

    def _on_child(self, number, frame):
        if self.waiting:
            self._refuse_dead()

    def _refuse_dead(self):
        """Raise LoaderFailed with what is known of a process that has died; after the last batch all end with 0."""
        for number, process in enumerate(self.processes()):
            if process.exitcode:
                raise LoaderFailed(self.hung or self._exit_reason(number, process))

    def _exit_reason(self, number, process) -> str:
        text = f"process {process.pid} ended with status {process.exitcode}"
        advice = ""
        if process.exitcode < 0:
            names = {each.value: each.name for each in signal.Signals}
            name = names.get(-process.exitcode, f"signal {-process.exitcode}")
            text = f"process {process.pid} was ended by {name}"
            advice = LIKELY.get(name, "")
        return f"{text}{self.open_files.while_it_read(number)}" + (f" ({advice})" if advice else "")

    def _end_hanging(self):
        """Kill processes that bring nothing for ``loader_timeout`` seconds; the main thread then finds them dead."""
        workers = list(enumerate(self.processes()))
        reading = [(self.open_files.since[n], n, process) for n, process in workers if self.open_files.path(n)]
        text = f"no batch for {self.timeout:g} s (loader_timeout)"
        if reading:
            since, number, process = min(reading)
            text += f": process {process.pid} has been reading {self.open_files.path(number)} "
            text += f"for {time.monotonic() - since:.0f} s; does its disk answer?"
        self.hung = text
        for _, process in workers:
            process.kill()

    def _abandon(self):
        """Kill all processes and forget what they have prepared."""
        for process in self.processes():
            process.kill()
        if self.processes():
            # In a thread of its own, for torch waits for its pin-memory thread, and that for ever if a process died
            # while it sent a batch.
            end = threading.Thread(target=self.iterator._shutdown_workers, daemon=True)
            end.start()
            end.join(PATIENCE)
        forget(self.token)
        self.loader = self.iterator = None
        self.hung = ""


def as_it_is(batch):
    """A collation that does nothing."""
    return batch


def _start_worker(number):
    """Leave Ctrl-C and SIGTERM to the main process, which saves its state and then ends its workers.

    A signal to the whole process group must not take the workers away under a step; ten seconds are enough for one.
    """
    write_any_text()  # if processes are spawned it has streams of its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # Windows has none, and ends processes without a signal
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(10))


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def make_loader(
    dataset, batch_sampler, collate_fn, config: Config, workers: int, pin: bool = False, keep: bool = False
):
    """Build a DataLoader whose results do not depend on the number of workers; ``keep`` them between epochs."""
    options = {}
    workers = min(workers, usable_cores())  # more only wait for each other
    if workers:
        options = {"prefetch_factor": config.prefetch_factor, "persistent_workers": keep}
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its own, so that starting workers draws nothing from the model's generator
        **options,
    )
