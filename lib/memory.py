"""How much memory this process may take, and keeping what it frees while it trains."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
ROOM = 4e9  # bytes that must be allowed for memory to be kept: Binder gives 1 to 2 GB
MOST = 0.5  # of the memory; a process that takes more keeps nothing any longer, for what is kept is in pieces that do not all fit again

# glibc's <malloc.h>: what is set while memory is kept, and afterwards the most that glibc's own adjustment reaches
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
KEEP = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1))
GIVE_BACK = ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, 32 << 20), (M_TRIM_THRESHOLD, 64 << 20))


def memory_limit(files: Sequence[str] = CGROUP_LIMITS) -> int | None:
    """Bytes of memory that JupyterHub (so Binder, in ``MEM_LIMIT``) or the container allows, or None where neither sets a limit.

    Parameters
    ----------
    files : sequence of path
        Files in which Linux keeps a container's limit in bytes, or ``max``. A missing one limits nothing.
    """
    said = [os.environ.get("MEM_LIMIT", "")]
    for path in map(Path, files):
        with contextlib.suppress(OSError):
            said.append(path.read_text(encoding="ascii").strip())
    return min((int(text) for text in said if text.isdecimal() and int(text) > 0), default=None)


@contextlib.contextmanager
def freed_memory_kept(files: Sequence[str] = CGROUP_LIMITS) -> Iterator[bool]:
    """Context in which the C library keeps the memory of freed arrays for the next ones; at its end it gives back what is free.

    glibc gives large arrays back to the system at once and gets them again page by page, each zeroed anew. Training on a CPU frees and
    makes the same arrays at every step: ``tests/bench/gconv.py --give-back`` shows what that costs. No result changes.

    A process that comes to take more than half of the memory gives back what is free, and keeps nothing from then on.

    Nothing is done where less than 4 GB are allowed (`memory_limit`, which takes `files`), where the C library is not glibc, and where
    the environment says what to do (``MALLOC_MMAP_MAX_``, which ``./run_all.sh`` sets).

    Yields
    ------
    bool
        Whether memory is kept because of this context.
    """
    limit, libc = memory_limit(files), _glibc()
    if libc is None or (limit is not None and limit < ROOM) or "MALLOC_MMAP_MAX_" in os.environ:
        yield False
        return
    ended = threading.Event()

    def give_back() -> None:
        _set(libc.mallopt, GIVE_BACK)
        libc.malloc_trim(0)

    def watch(most: float) -> None:
        while not ended.wait(0.1):
            if _resident() > most:
                give_back()
                return

    _set(libc.mallopt, KEEP)
    watcher = threading.Thread(target=watch, args=(MOST * min(limit or math.inf, _physical()),), daemon=True)
    watcher.start()
    try:
        yield True
    finally:
        ended.set()
        watcher.join()
        give_back()


def _set(mallopt: Callable[[int, int], int], options: Sequence[tuple[int, int]]) -> None:
    for option, value in options:
        mallopt(option, value)


def _resident() -> int:
    """Bytes of memory that this process takes; 0 where the system does not tell as Linux does."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def _physical() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _glibc() -> ctypes.CDLL | None:
    """This process's C library, if it has glibc's two functions."""
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (AttributeError, OSError, TypeError):  # musl, macOS; Windows has no library None
        return None
