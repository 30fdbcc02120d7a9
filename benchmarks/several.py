"""Starts the processes of a benchmark of several, as torchrun would."""

import os
import socket
import subprocess


def outputs_of(command: list[str], world: int, together: bool = True) -> list[str]:
    """What ``world`` processes of one thread printed, which are one group, or ``together`` False apart.

    SystemExit if one of them failed; what it complained of has been seen.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}
    started = []
    for rank in range(world):
        own = {**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)} if together and world > 1 else {}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed, see above")
    return outputs
