"""Freed memory is kept for the next tensor, unless the environment has its own idea."""

import platform
import sys

import programs
import pytest

SCRIPT = """
import resource, sys
sys.path.insert(0, {root!r})
from training.allocator import keep_freed_memory

print(keep_freed_memory() if {keep} else "")
import numpy as np

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(10_000_000)  # 80 MB, 19,531 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults())
"""


def page_faults(tmp_path, keep):
    (tmp_path / "faults.py").write_text(SCRIPT.format(root=str(programs.ROOT), keep=keep))
    done = programs.run_anew(tmp_path / "faults.py")
    assert not done.returncode, done.stderr
    said, count = done.stdout.splitlines()
    return said, int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator only")
def test_a_tensor_takes_the_pages_of_the_one_before(tmp_path, monkeypatch):
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.delenv(name, raising=False)
    said, kept = page_faults(tmp_path, True)
    assert said == "glibc, keeps freed blocks of up to 1024 MB" and kept < page_faults(tmp_path, False)[1] / 10
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000")
    assert page_faults(tmp_path, True)[0] == "glibc with MALLOC_TRIM_THRESHOLD_ of the environment"


def test_another_allocator_is_left_alone(monkeypatch):
    from training import allocator

    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert allocator.keep_freed_memory() == "jemalloc"
    monkeypatch.delenv("LD_PRELOAD")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert sys.platform == "darwin" or allocator.keep_freed_memory().startswith(("the system's own", "glibc with"))
