"""What a process knows of the others: rank, world size, and the few collectives the trainer needs."""

import contextlib
import datetime
import os
import sys

import torch
import torch.distributed as dist

from config import Config
from errors import SharedError, UsageError, first_line, rank_prefix
from training.meeting import of_this_start

FAREWELL = datetime.timedelta(seconds=20)  # that a process which fails early waits for the others, to tell them why
SEPARATOR = "\0"


_left: list = []  # process groups that were left


class Ranks:
    """This process among all; a single process needs no process group and every collective is the identity."""

    def __init__(self, config: Config):
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        use_gpu = config.device != "cpu" and torch.cuda.is_available()
        count = torch.cuda.device_count() if use_gpu else 0
        index = place_of_gpu(count) if self.world > 1 else config.gpu_id
        self.device = torch.device("cuda", index) if use_gpu else torch.device("cpu")
        failure = ""
        if config.device == "cuda" and not use_gpu:
            failure = "device: cuda is not available on this machine"
        if use_gpu and index >= count:
            failure = f"gpu_id: there is no GPU {index} here, only {count}"
            if self.world > 1:
                failure = f"--nproc_per_node: there is no GPU for local process {index}, only {count} here"
        timeout = datetime.timedelta(minutes=config.process_timeout)
        if self.world > 1:
            meeting = {"store": meet(timeout, failure), "rank": self.rank, "world_size": self.world}
        elif failure:
            raise UsageError(failure)
        if use_gpu:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            device = {"device_id": self.device} if use_gpu else {}
            dist.init_process_group("nccl" if use_gpu else "gloo", timeout=timeout, **meeting, **device)
            # What only the host knows is agreed on without waiting for the device.
            self.host = host_group(timeout) if use_gpu else dist.group.WORLD

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def each(self, numbers: list[int]) -> list[list[int]]:
        """Whole numbers below 2^24 of each rank, in rank order; the device is not asked."""
        if self.world == 1:
            return [numbers]
        everyone = torch.zeros(self.world, len(numbers), dtype=torch.float32)
        everyone[self.rank] = torch.tensor(numbers, dtype=torch.float32)
        dist.all_reduce(everyone, group=self.host)
        return [[int(number) for number in own] for own in everyone.tolist()]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.highest(flag))

    def highest(self, number: int) -> int:
        """The highest of the ranks' whole numbers, each below 2^24."""
        return self.highest_of([number])[0]

    def highest_of(self, numbers: list[int]) -> list[int]:
        """The highest of the ranks' numbers at each place of a list; the device is not asked."""
        if self.world == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float32)
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.host)
        return [int(value) for value in values.tolist()]

    def maximum(self, tensor):
        """Reduce a tensor in place to its maximum over the ranks."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def everyone(self, tensor):
        """Stack the tensors of all ranks, (ranks, ...), without waiting for the device."""
        if self.world == 1:
            return tensor[None]
        stacked = tensor.new_zeros(self.world, *tensor.shape)
        stacked[self.rank] = tensor
        dist.all_reduce(stacked)
        return stacked

    def sum(self, tensor):
        """Reduce a tensor in place to its sum over the ranks."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def from_main(self, value):
        """Give every rank the main process's object."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.host)
        return box[0]

    def gather(self, value) -> list:
        """Collect an object of each rank, in rank order."""
        if self.world == 1:
            return [value]
        boxes = [None] * self.world
        dist.all_gather_object(boxes, value, group=self.host)
        return boxes

    @torch.no_grad()
    def share_buffers(self, module):
        """Give every rank the main process's buffers, so that all evaluate the same model: one message a type."""
        by_type: dict[torch.dtype, list] = {}
        for buffer in module.buffers() if self.world > 1 else ():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        for buffers in by_type.values():
            together = torch.cat([buffer.reshape(-1) for buffer in buffers])
            dist.broadcast(together, src=0)
            for buffer, part in zip(buffers, together.split([buffer.numel() for buffer in buffers])):
                buffer.copy_(part.view_as(buffer))

    def close(self):
        """Leave the process group.

        Its objects live as long as Python does. Where one is given up at once, torch 2.4 waits in its destructor, with
        Python's lock held, for a thread of its own that may want this lock to give up the last message: for ever.
        """
        if self.world > 1:
            _left.extend((dist.group.WORLD, self.host))
            dist.destroy_process_group()


def place_of_gpu(count: int) -> int:
    """The number, among the ``count`` GPUs that this process sees, of the one it is to use.

    The processes that torchrun starts on a machine see the same ones. A scheduler, as `srun --gpus-per-task 1`, may
    give each process its own, which is then number 0 for each of them.
    """
    alone = count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return 0 if alone else int(os.environ.get("LOCAL_RANK", "0"))


class SingleProcess(Ranks):
    """A process that has no others, on a device that is given: for steps outside of a run."""

    def __init__(self, device: torch.device):
        self.world, self.rank, self.device = 1, 0, device


def host_group(timeout: datetime.timedelta):
    """A group of all processes that talks over the network and not over the GPUs."""
    try:
        return dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:
        hint = "set GLOO_SOCKET_IFNAME to the network interface that NCCL_SOCKET_IFNAME names"
        raise UsageError(f"the processes cannot reach each other over gloo ({first_line(error)}): {hint}") from error


def meet(timeout: datetime.timedelta, failure: str = ""):
    """Wait for all processes and hear from each whether it could be set up so far; returns their common store.

    SharedError with what failed where; UsageError if they do not meet.
    """
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            store = of_this_start(store, rank, world, timeout)
        store.set(f"setup/{rank}", f"{failure}{SEPARATOR}{rank_prefix()}" if failure else "")
        texts = [store.get(f"setup/{other}").decode() for other in range(world)]
    except dist.DistStoreError as error:
        within = f"{timeout.total_seconds() / 60:.3g} min (process_timeout)"
        raise UsageError(f"not all {os.environ['WORLD_SIZE']} processes have started within {within}") from error
    except (RuntimeError, ValueError) as error:  # of the network, and of a variable that is not set
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} (MASTER_ADDR, MASTER_PORT)"
        raise UsageError(f"the processes cannot meet at {place}: {first_line(error)}") from error
    if any(texts):
        store.set(f"heard/{rank}", "")
        if rank == 0:  # it may hold the store, which must last until the others have read it
            for other in range(world):
                store.get(f"heard/{other}")
        raise SharedError(in_one_text([(text, prefix) for text, _, prefix in (t.partition(SEPARATOR) for t in texts)]))
    return store


def in_one_text(failures: list[tuple[str, str]]) -> str:
    """What failed on which rank, from (failure or '', prefix) of all: a line each, or one if all have the same."""
    if len({text for text, _ in failures}) == 1:
        return failures[0][0]
    return "\n".join(f"{prefix}{text}" for text, prefix in failures if text)


def tell_the_others(failure: str):
    """Let the other processes of a run know why this one ends before it could join them, if they can be reached."""
    if "MASTER_ADDR" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        # Told, or nobody answers: the reason has been printed here.
        with contextlib.suppress(UsageError, RuntimeError, OSError):
            meet(FAREWELL, failure)


def launch_all_gpus(config: Config, argv):
    """Replace this process by torchrun with one process for each GPU, if `distributed` asks for it."""
    if not config.distributed or "WORLD_SIZE" in os.environ:
        return
    if config.device == "cpu" or torch.cuda.device_count() < 2:
        print("distributed: fewer than two GPUs here, running one process (torchrun starts several on CPUs too)")
        return
    count = str(torch.cuda.device_count())
    command = ["-m", "torch.distributed.run", "--nproc_per_node", count, *meeting_place(config.port)]
    os.execv(sys.executable, [sys.executable, *command, *argv])


def meeting_place(port: str) -> list[str]:
    """torchrun's arguments for the port where the processes of this machine meet; ``auto`` takes a free one."""
    if port in ("auto", "0", ""):
        return ["--standalone"]
    if not (port.isdigit() and int(port) < 65536):
        raise UsageError(f"port: expected auto, or a number up to 65535, got '{port}'")
    return ["--master_port", port]
