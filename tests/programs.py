"""Run the scripts as a user does, each in a process of its own, which a server makes that has torch imported already.

An import of torch takes three seconds, and the tests start some two hundred scripts. The script itself and all other
modules of the project are imported anew in each process.
"""

import contextlib
import multiprocessing
import os
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
BYTECODE = ROOT / ".pytest_cache" / "bytecode"  # kept, as Python does by default, in one place
HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
IMPORTED = ["torch", "torch._dynamo", "torch.utils.data", "scipy.signal", "scipy.stats", "sklearn.linear_model", "yaml"]
IMPORTED += ["matplotlib.figure", "matplotlib.backends.backend_agg", "tqdm"]


class Program:
    """A script that runs; ``returncode`` is that of subprocess.Popen, ``output`` and ``complaint`` are files."""

    def __init__(self, script, *words, cwd=ROOT, env=None):
        folder = Path(tempfile.mkdtemp(prefix="program"))
        self.output, self.complaint = folder / "stdout", folder / "stderr"
        self.words = [str(script), *map(str, words)]
        environment = {**os.environ, **QUIET, **(env or {})}
        context = multiprocessing.get_context("forkserver" if HAS_SERVER else "spawn")
        start_method = multiprocessing.get_start_method()
        arguments = (self.words, environment, str(cwd), str(self.output), str(self.complaint), start_method)
        self.process = context.Process(target=run_script, args=arguments)
        if HAS_SERVER:
            context.set_forkserver_preload(IMPORTED)
            with mock.patch.dict(os.environ, QUIET):
                forkserver.ensure_running()
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        """The exit status, -N for a signal, None while it runs."""
        return self.process.exitcode

    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, words: str, timeout=60):
        """Wait until it has printed ``words`` or has ended."""
        until = time.monotonic() + timeout
        while words not in self.text() and self.returncode is None:
            assert time.monotonic() < until, f"'{words}' was not printed: {self.text()}"
            time.sleep(0.02)

    def send_signal(self, number: int):
        """Send a signal, unless it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, timeout=240) -> subprocess.CompletedProcess:
        """Wait for its end."""
        self.process.join(timeout)
        if self.returncode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout, self.text())
        output, complaint = self.text(), self.complaint.read_text()
        shutil.rmtree(self.output.parent)
        return subprocess.CompletedProcess(self.words, self.returncode, output, complaint)


def run_anew(script, *words, **more) -> subprocess.CompletedProcess:
    """Run a script in an interpreter that is started for it, as its variables or limits of the system want."""
    command, environment = [sys.executable, str(script), *map(str, words)], {**os.environ, **QUIET}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240, **more)


def run(script, *words, timeout=240, **more) -> subprocess.CompletedProcess:
    """Run a script to its end."""
    return Program(script, *words, **more).wait(timeout)


def analyser(*words, **more) -> subprocess.CompletedProcess:
    """Run analyze_nan_debug.py to its end."""
    return run(ROOT / "analyze_nan_debug.py", *words, **more)


def run_ranks(script, *words, machines=1, world=2, env=None) -> list[subprocess.CompletedProcess]:
    """Run a script as torchrun starts processes, on one machine or as many; ``words`` of all, or a list for each.

    ``env``: variables of all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    each = words if words and isinstance(words[0], list) else [words] * world
    ranks = []
    for rank, own in enumerate(each):
        local = {"RANK": str(rank), "LOCAL_RANK": str(rank if machines == 1 else 0)}
        ranks.append(Program(script, "--device", "cpu", *own, env={**(env or {}), **meeting, **local}))
    return [rank.wait() for rank in ranks]


def run_script(words, environment, folder, output, complaint, start_method):
    """The process: what ``python SCRIPT WORDS`` does, with its output in two files."""
    for stream, path in ((1, output), (2, complaint)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), stream)
    multiprocessing.set_start_method(start_method, force=True)  # of its own processes: the platform's default
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(BYTECODE)
    script = Path(folder, words[0])
    mine = {str(ROOT), str(ROOT / "tests"), ""}
    sys.path[:] = [str(script.parent), *(path for path in sys.path if path not in mine)]
    sys.argv = words
    runpy.run_path(str(script), run_name="__main__")
