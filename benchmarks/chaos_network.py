"""Two hosts of benchmarks/chaos.py: network namespaces, and a wire between them that can be cut and be slow.

The wire is a pair of TUN devices, one in each namespace, between which a thread carries the packets. Root only.
"""

import contextlib
import fcntl
import heapq
import itertools
import os
import select
import struct
import subprocess
import sys
import threading
import time

from chaos_cases import GOES_ON, NotHere, again, checked
from chaos_world import ROOT, Run

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
NUMBERS = itertools.count(1)
PORT = "29511"


class Wire(threading.Thread):
    """Carries packets between two devices after ``delay`` seconds; while ``cut`` is set they are lost."""

    def __init__(self, ends: list[int]):
        super().__init__(daemon=True)
        self.ends, self.delay, self.cut, self.closed = ends, 0.0, False, False

    def run(self):
        """Carry packets until ``closed``."""
        under_way, number = [], itertools.count()
        while not self.closed:
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 0.2
            readable, *_ = select.select(self.ends, [], [], min(wait, 0.2))
            for end in readable:
                packet, other = os.read(end, 65536), self.ends[1 - self.ends.index(end)]
                if not self.cut:
                    heapq.heappush(under_way, (time.monotonic() + self.delay, next(number), other, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(under_way)
                with contextlib.suppress(OSError):  # the device is going down
                    os.write(end, packet)


def ip(*words):
    """Call ip; NotHere if it may not do that."""
    done = subprocess.run(["ip", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise NotHere(f"ip {' '.join(map(str, words))}: {done.stderr.strip()}")


@contextlib.contextmanager
def two_hosts():
    """Two network namespaces with a wire between them: (names, wire)."""
    number, names, ends = next(NUMBERS), [], []
    wire = None
    try:
        for side in (0, 1):
            name, device = f"chaos{os.getpid()}{'ab'[side]}{number}", f"wire{side}"
            ip("netns", "add", name)
            names.append(name)
            try:
                end = os.open("/dev/net/tun", os.O_RDWR)
            except OSError as error:
                raise NotHere(f"/dev/net/tun: {error.strerror}") from error
            ends.append(end)
            own = f"w{os.getpid()}{side}"[:15]  # unlike all others, until it is in its namespace
            fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH", own.encode(), IFF_TUN | IFF_NO_PI))
            ip("link", "set", own, "netns", name)
            ip("-n", name, "link", "set", own, "name", device)
            ip("-n", name, "addr", "add", f"10.77.0.{side + 1}/24", "dev", device)
            ip("-n", name, "link", "set", device, "mtu", 60000, "up")
            ip("-n", name, "link", "set", "lo", "up")
        wire = Wire(ends)
        wire.start()
        yield names, wire
    finally:
        if wire is not None:
            wire.closed = True
            wire.join()
        for end in ends:
            os.close(end)
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def start_on_both(run: Run, names: list[str], restarts: int = 0) -> list[Run]:
    """Start torchrun on both hosts; returns a Run for each, which share the folder of the first."""
    runs = []
    for side, name in enumerate(names):
        own = Run.__new__(Run)
        vars(own).update(vars(run), log=run.folder / f"host{side}.txt")
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--node_rank", str(side), "--master_addr", "10.77.0.1", "--master_port", PORT]
        command += ["--nproc_per_node", "1", "--max-restarts", str(restarts)]
        command += [str(ROOT / "trainSpeakerNet.py"), "--config", str(run.config)]
        runs.append(own.call(command, {"GLOO_SOCKET_IFNAME": f"wire{side}"}))
    return runs


def ended(runs: list[Run], seconds: float = 300) -> list[int]:
    """Exit statuses of both hosts."""
    try:
        return [run.end(seconds) for run in runs]
    finally:
        for run in runs:
            run.kill_all()


def two_hosts_undisturbed(world):
    """Two hosts, one process on each."""
    run = world.run("two_hosts")
    with two_hosts() as (names, _):
        statuses = ended(start_on_both(run, names))
    assert statuses == [0, 0], (statuses, (run.folder / "host0.txt").read_text()[-2000:])
    return checked(world, run.start_of("host0.txt"), "as two processes on one host", ranks=2)


def slow_link(world):
    """The link between two hosts takes 200 ms, there and back."""
    run = world.run("slow_link", max_epoch=2)
    with two_hosts() as (names, wire):
        runs = start_on_both(run, names)
        runs[0].wait_for_text("batches of up to")
        wire.delay = 0.1
        statuses = ended(runs, 600)
    assert statuses == [0, 0], (statuses, (run.folder / "host0.txt").read_text()[-2000:])
    return checked(world, run.start_of("host0.txt"), GOES_ON, ranks=2, max_epoch=2)


def link_restored(world):
    """The link between two hosts is cut for 10 s."""
    run = world.run("link_restored")
    with two_hosts() as (names, wire):
        runs = start_on_both(run, names)
        runs[0].wait_for_save()
        wire.cut = True
        time.sleep(10)
        wire.cut = False
        statuses = ended(runs)
    assert statuses == [0, 0], (statuses, (run.folder / "host0.txt").read_text()[-2000:])
    return checked(world, run.start_of("host0.txt"), GOES_ON, ranks=2)


def link_cut(world):
    """The link between two hosts is cut for good (process_timeout: 12 s)."""
    run = world.run("link_cut", process_timeout=0.2)
    with two_hosts() as (names, wire):
        runs = start_on_both(run, names)
        runs[0].wait_for_save()
        wire.cut, began = True, time.monotonic()
        for own in runs:
            own.wait_for_text("processes are gone or do not answer", 60)
        took = time.monotonic() - began
        for own in runs:  # the launchers too lose each other, and give up after their own time
            own.wait_for(lambda own=own: not own.trainers(), 60)
            own.kill_all()
    return again(world, run, f"both end with one line after {took:.0f} s", ranks=2)


CASES = {case.__name__: case for case in (two_hosts_undisturbed, slow_link, link_restored, link_cut)}
