"""How the C library keeps memory for the tensors of the next step."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # parameters of mallopt (malloc.h)
# Bytes of the largest block that is kept; a larger one is given back to the system when it is freed. The second is the
# most that older versions of glibc take.
KEPT_BLOCKS = (2**30, 2**25)
OTHER_ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


def keep_freed_memory() -> str:
    """Let glibc keep freed memory for the next tensor; returns how memory is allocated from now on.

    By itself glibc gives each large block back to the system when it is freed. The next tensor of that size gets it
    anew, page by page and filled with zeros: half a million page faults in a step of ECAPA-TDNN 512 on 32 rows of 2 s,
    a third of its time. An allocator that is preloaded, and what the environment says of glibc's, stay as they are.
    """
    preloaded = os.environ.get("LD_PRELOAD", "")
    for name in OTHER_ALLOCATORS:
        if name in preloaded:
            return name
    chosen = [name for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_") if name in os.environ]
    chosen += ["GLIBC_TUNABLES"] * ("glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""))
    if chosen:
        return f"glibc with {' and '.join(chosen)} of the environment"
    if platform.libc_ver()[0] != "glibc":
        return "the system's own"
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_ARENA_MAX, 1)  # those of other threads give back every block of more than 64 MB, whatever is said here
    kept = next((size for size in KEPT_BLOCKS if mallopt(M_MMAP_THRESHOLD, size)), 0)
    if not (kept and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)):
        return "glibc, which does not let itself be told to keep freed memory"
    return f"glibc, keeps freed blocks of up to {kept // 2**20} MB"
