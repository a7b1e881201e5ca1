"""How much memory this process may take, and keeping what it frees while it trains or measures."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

# glibc's <malloc.h>: what is set while memory is kept, and afterwards the most that glibc's own
# adjustment reaches
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
KEEP = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
GIVE_BACK = ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20))


def memory_limit(files: Sequence[str] = CGROUP_LIMITS) -> int | None:
    """Bytes of memory that JupyterHub (so Binder, in ``MEM_LIMIT``) or the container allows, or
    None where neither sets a limit.

    Parameters
    ----------
    files : sequence of path
        Files in which Linux keeps a container's limit in bytes, or ``max``. A missing one limits
        nothing.
    """
    said = [os.environ.get("MEM_LIMIT", "")]
    for path in map(Path, files):
        with contextlib.suppress(OSError):
            said.append(path.read_text(encoding="ascii").strip())
    return min((int(text) for text in said if text.isdecimal() and int(text) > 0), default=None)


@contextlib.contextmanager
def freed_memory_kept(files: Sequence[str] = CGROUP_LIMITS) -> Iterator[bool]:
    """Context in which the C library keeps the memory of freed arrays for the next ones; at its end
    it gives back what is free.

    glibc gives large arrays back to the system at once and gets them again page by page, each
    zeroed anew. Training on a CPU frees and makes the same arrays at every step:
    ``tests/bench/gconv.py --give-back`` shows what that costs. No result changes.

    What is kept is in pieces, which do not all fit again, so a large network takes up to twice the
    memory. As soon as memory is scarce (a quarter of the machine's is left, or the process takes a
    quarter of what `memory_limit`, which takes `files`, allows) it is given back, and none is kept
    from then on. Nothing is done where that is so from the start, where the C library is not glibc,
    and where ``MALLOC_MMAP_MAX_`` in the environment says what to do.

    Yields
    ------
    bool
        Whether memory is kept because of this context.
    """
    limit, libc = memory_limit(files), _glibc()
    if libc is None or "MALLOC_MMAP_MAX_" in os.environ or _scarce(limit):
        yield False
        return
    ended = threading.Event()

    def choose(options: Sequence[tuple[int, int]]) -> None:
        for option, value in options:
            libc.mallopt(option, value)
        if options is GIVE_BACK:
            libc.malloc_trim(0)

    def watch() -> None:
        while not ended.wait(0.1):
            if _scarce(limit):
                choose(GIVE_BACK)
                return

    choose(KEEP)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield True
    finally:
        ended.set()
        watcher.join()
        choose(GIVE_BACK)


def _scarce(limit: int | None, proc: Path = Path("/proc")) -> bool:
    """Whether a quarter of this machine's memory at most is left, or this process takes more than a
    quarter of `limit`.
    """
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        pages = int((proc / "self" / "statm").read_text(encoding="ascii").split()[1])
    except OSError:  # no Linux, so nobody would notice in time
        return True
    kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
    taken = pages * os.sysconf("SC_PAGE_SIZE")
    return kilobytes["MemAvailable"] < kilobytes["MemTotal"] / 4 or (
        limit is not None and taken > limit / 4
    )


def _glibc() -> ctypes.CDLL | None:
    """This process's C library, if it has glibc's two functions."""
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows has no library None
        return None
