"""The cases of benchmarks/chaos.py on one machine: what happens to a run, and what must become of it."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import torch
from chaos_world import ENVIRONMENT, Run

from storage import checkpoint

GOES_ON = "goes on"
BY_ITSELF = "starts again by itself"


class NotHere(Exception):
    """A case is not possible on this machine."""


def again(world, run: Run, became: str, ranks: int = 1, **more) -> str:
    """Run the same command to the end; returns what became of the case. AssertionError if the result is another."""
    status = run.start(ranks=ranks).end()
    assert status == 0, f"the same command again ended with status {status}: {run.text()[-1500:]}"
    return checked(world, run, f"{became}; the same command goes on", ranks, **more)


def checked(world, run: Run, became: str, ranks: int = 1, **more) -> str:
    """What became of a case, if the run has ended as an undisturbed one."""
    assert "Traceback" not in run.text().replace("torch/distributed", ""), run.text()[-3000:]
    differs = world.compare(run, ranks, **more)
    assert not differs, differs
    return f"{became}, bit-equal"


def one_rank(run: Run, number: int) -> int:
    """The process of a rank, once it has saved."""
    run.wait_for_save()
    return run.trainers()[number]


# ------------------------------------------------------------------------------------------------ kills and signals


def kill_in_saving(world):
    """kill -9 while a checkpoint is being written."""
    run = world.run("kill_in_saving")
    half = lambda: any(run.save_path.glob("model/.*.tmp"))  # noqa: E731
    for _ in range(3):
        run.start()
        run.wait_for(half)
        run.kill_all()
    return again(world, run, "3 kills")


def kill_in_evaluation(world):
    """kill -9 between the end of an epoch and its evaluation's checkpoint."""
    run = world.run("kill_in_evaluation").start()
    run.wait_for_text("Epoch 2/")
    run.kill_all()
    return again(world, run, "killed")


def kill_a_rank(world, number: int = 1):
    """kill -9 of one of two processes under torchrun --max-restarts."""
    run = world.run(f"kill_rank_{number}").start(ranks=2, restarts=2)
    run.kill(one_rank(run, number))
    status = run.end()
    assert status == 0, run.text()[-3000:]
    return checked(world, run, BY_ITSELF, ranks=2)


def kill_the_main_rank(world):
    """kill -9 of rank 0 under torchrun --max-restarts."""
    return kill_a_rank(world, 0)


def kill_a_rank_without_restarts(world):
    """kill -9 of one of two processes under torchrun."""
    run = world.run("kill_rank_alone").start(ranks=2)
    run.kill(one_rank(run, 1))
    began = time.monotonic()
    status = run.end(60)
    line = run.complaint()
    assert status == 1 and "processes are gone" in line, run.text()[-2000:]
    return again(world, run, f"status {status} and one line after {time.monotonic() - began:.0f} s", ranks=2)


def kill_the_launcher(world):
    """kill -9 of torchrun; the processes that it started live on."""
    run = world.run("kill_launcher").start(ranks=2)
    one_rank(run, 0)
    left = run.trainers()
    run.kill(run.process.pid)
    run.process.wait()
    until = time.monotonic() + 180
    while any(Path(f"/proc/{pid}").exists() for pid in left):
        assert time.monotonic() < until, "they did not end"
        time.sleep(0.1)
    return checked(world, run, "the processes end the run themselves", ranks=2)


def kill_all(world):
    """kill -9 of torchrun and all processes at once, as a power cut."""
    run = world.run("kill_all").start(ranks=2)
    one_rank(run, 0)
    run.kill_all()
    return again(world, run, "killed", ranks=2)


def sigterm_to_one_rank(world):
    """SIGTERM to one of two processes, as a scheduler sends it."""
    run = world.run("sigterm", save_interval_steps=0).start(ranks=2)
    run.wait_for_text("Epoch 1/")
    run.kill(run.trainers()[1], signal.SIGTERM)
    began = time.monotonic()
    run.wait_for_text("stopped by signal 15", 60)
    took = time.monotonic() - began
    run.end(60)
    assert "stopped by signal 15" in run.text() and took < 20, run.text()[-2000:]
    return again(world, run, f"saved by all after {took:.1f} s", ranks=2, save_interval_steps=0)


def other_numbers_of_processes(world):
    """SIGTERM in mid-epoch, and going on with 1, then 3 processes instead of 2."""
    run = world.run("elastic", max_epoch=1, save_interval_steps=0, batch_size=4)
    rows = run.folder / "rows.txt"
    for turn, ranks in enumerate((2, 1, 3)):
        stop = "" if turn == 2 else str(2 + turn)
        run.start(ranks=ranks, script="benchmarks/chaos_rows.py", env={"CHAOS_ROWS": str(rows), "CHAOS_STOP": stop})
        run.end(120)
        assert turn == 2 or "stopped by signal" in run.text(), run.text()[-2000:]
    trained = rows.read_text().split()
    listed = len(Path(world.settings["train_list"]).read_text().splitlines())
    assert len(trained) == len(set(trained)) == listed, (
        f"{len(trained)} rows, {len(set(trained))} different, of {listed}"
    )
    return f"each of {listed} rows trained once"


# ------------------------------------------------------------------------------------------------ disks and files


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    """A tmpfs of this size on a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", str(folder)], capture_output=True)
    if mounted.returncode:
        raise NotHere("no tmpfs can be mounted (root?)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(world):
    """The disk is full in the middle of the run, and stays so."""
    disk = world.out / "full_disk_mount"
    with small_disk(disk, "16m"):
        run = world.run("full_disk", save_path=str(disk / "run")).start()
        run.wait_for_save()
        filler = disk / "filler"
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass
        status = run.end()
        assert status == 4 and "not saved as the run ended" in run.text(), run.text()[-2000:]
        filler.unlink()
        return again(world, run, f"trains to the end, status {status} and one line")


def read_only_folder(world):
    """The folders of the run lose their write permission in the middle of it, and get it back after its end."""
    bound = ()
    if os.geteuid() == 0:  # the permission to write anywhere is taken from root
        bound = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
        if subprocess.run([*bound, "true"], capture_output=True).returncode:
            raise NotHere("root, and setpriv cannot take its capabilities")
    run = world.run("read_only").start(before=bound)
    run.wait_for_save()
    folders = [run.save_path, *(path for path in run.save_path.rglob("*") if path.is_dir())]
    try:
        for folder in folders:
            folder.chmod(0o555)
        status = run.end()
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert status == 4 and "not saved as the run ended" in run.text(), run.text()[-2000:]
    return again(world, run, f"trains to the end, status {status} and one line")


def corrupted_checkpoint(world):
    """A bit of last.model is flipped after kill -9."""
    run = world.run("corrupted").start()
    run.wait_for(lambda: (run.save_path / "model" / "last_previous.model").exists())
    run.kill_all()
    content = bytearray(run.last.read_bytes())
    content[len(content) // 3] ^= 16
    run.last.write_bytes(content)
    became = again(world, run, "a warning names both")
    log = run.text()
    assert "does not fit its SHA-256; the run goes on from" in log and "last_previous.model" in log, log[:2000]
    return became


def both_checkpoints_cut(world):
    """last.model and last_previous.model are cut after kill -9."""
    run = world.run("both_cut").start()
    run.wait_for(lambda: (run.save_path / "model" / "last_previous.model").exists())
    run.kill_all()
    for path in (run.last, run.last.with_name("last_previous.model")):
        os.truncate(path, path.stat().st_size // 2)
    status = run.start().end(60)
    assert status == 2 and "last.model: damaged" in run.complaint(), run.text()[-2000:]
    shutil.rmtree(run.save_path)
    return f"status {status} and one line"


# ------------------------------------------------------------------------------------------------ slow, hung and wrong


def hanging_loader(world):
    """A loader process hangs."""
    run = world.run("hanging_loader", loader_timeout=3).start()
    run.wait_for_save()
    from chaos_world import loaders

    for pid in loaders(run.process.pid):
        run.kill(pid, signal.SIGSTOP)
    status = run.end()
    assert status == 0 and "loading starts again" in run.text(), run.text()[-2000:]
    return checked(world, run, GOES_ON)


def slow_rank(world):
    """One of two processes stands still for 5 s."""
    run = world.run("slow_rank").start(ranks=2)
    pid = one_rank(run, 1)
    run.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    run.kill(pid, signal.SIGCONT)
    assert run.end() == 0, run.text()[-2000:]
    return checked(world, run, GOES_ON, ranks=2)


def hung_rank(world):
    """One of two processes hangs for ever (process_timeout: 6 s)."""
    run = world.run("hung_rank", process_timeout=0.1).start(ranks=2, restarts=1)
    run.kill(one_rank(run, 1), signal.SIGSTOP)
    began = time.monotonic()
    run.wait_for_text("processes are gone or do not answer", 60)
    said = time.monotonic() - began
    assert run.end() == 0, run.text()[-2000:]
    return checked(world, run, f"one line after {said:.0f} s, {BY_ITSELF}", ranks=2)


def rank_with_nan(world):
    """One of two processes gets a NaN."""
    run = world.run("rank_with_nan", nan_inject="5:loss@1").start(ranks=2)
    assert run.end() == 0 and "_rank1.pt" in run.text(), run.text()[-2000:]
    steps = checkpoint.load(run.last)["step"]
    weights = checkpoint.load(run.last)["model_state_dict"].values()
    assert all(torch.isfinite(w).all() for w in weights if w.is_floating_point())
    undisturbed = checkpoint.load(world.quiet(2) / "model" / "last.model")["step"]
    assert steps == undisturbed - 1, (steps, undisturbed)
    return f"{GOES_ON} without that step, on both"


def clock_jump(world):
    """The clock jumps by a day forth and back."""
    run = world.run("clock_jump", save_interval_minutes=0.02)
    assert run.start(script="benchmarks/chaos_clock.py").end() == 0, run.text()[-2000:]
    return checked(world, run, GOES_ON)


CASES = {
    case.__name__: case
    for case in (
        *(kill_in_saving, kill_in_evaluation, kill_a_rank, kill_the_main_rank, kill_a_rank_without_restarts),
        *(kill_the_launcher, kill_all, sigterm_to_one_rank, other_numbers_of_processes, full_disk, read_only_folder),
        *(corrupted_checkpoint, both_checkpoints_cut, hanging_loader, slow_rank, hung_rank, rank_with_nan, clock_jump),
    )
}
__all__ = ["CASES", "ENVIRONMENT", "NotHere"]
