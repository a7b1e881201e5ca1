import ctypes
import itertools
import os
import subprocess
import sys
import time

import pytest

from lib import memory, paths

NOTHING = ["/nowhere"]


@pytest.mark.parametrize(
    ("hub", "container", "limit"),
    [
        ("", None, None),
        ("", "max\n", None),
        ("2147483648", None, 2 << 30),
        ("3221225472", "max\n", 3 << 30),
        ("", "3221225472\n", 3 << 30),
        ("1000000000000", "1073741824\n", 1 << 30),
        ("0", "64000000000\n", 64_000_000_000),
        ("2 GB", None, None),
    ],
)
def test_the_smallest_limit_counts(monkeypatch, tmp_path, hub, container, limit):
    monkeypatch.setenv("MEM_LIMIT", hub)
    if container is not None:
        (tmp_path / "memory.max").write_text(container, encoding="ascii")
    assert memory.memory_limit([str(tmp_path / "memory.max")]) == limit


class FakeLibrary:
    def __init__(self):
        self.calls = []

    def mallopt(self, option, value):
        self.calls.append((option, value))
        return 1

    def malloc_trim(self, pad):
        self.calls.append("trim")
        return 1


@pytest.fixture
def library(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    library = FakeLibrary()
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    return library


def be_scarce(monkeypatch, *answers):
    """Answer `answers` when asked whether memory is scarce, the last one from then on."""
    coming = itertools.chain(answers, itertools.repeat(answers[-1]))
    monkeypatch.setattr(memory, "_scarce", lambda limit: next(coming))


def test_memory_is_given_back_at_the_end_and_after_an_error(library, monkeypatch):
    be_scarce(monkeypatch, False)

    def fail():
        with memory.freed_memory_kept(NOTHING) as kept:
            assert kept
            assert library.calls == [*memory.KEEP]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert library.calls == [*memory.KEEP, *memory.GIVE_BACK, "trim"]


def test_memory_that_gets_scarce_is_given_back_once(library, monkeypatch):
    be_scarce(monkeypatch, False, False, False, True)
    with memory.freed_memory_kept(NOTHING) as kept:
        assert kept
        end = time.monotonic() + 10
        while "trim" not in library.calls and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(0.3)
        assert library.calls == [*memory.KEEP, *memory.GIVE_BACK, "trim"]


def test_scarce_memory_and_the_environment_leave_it_alone(library, monkeypatch):
    be_scarce(monkeypatch, True)
    with memory.freed_memory_kept(NOTHING) as kept:
        assert not kept
    be_scarce(monkeypatch, False)
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    with memory.freed_memory_kept(NOTHING) as kept:
        assert not kept
    assert library.calls == []


@pytest.mark.parametrize(
    ("available", "pages", "limit", "scarce"),
    [
        (5000, 10, None, False),
        (3999, 10, None, True),
        (5000, 1000, 5000, False),
        (5000, 1000, 3999, True),
        (5000, 10**9, None, False),
    ],
)
def test_memory_is_scarce_when_a_quarter_is_left_or_taken(
    tmp_path, available, pages, limit, scarce
):
    (tmp_path / "self").mkdir()
    (tmp_path / "meminfo").write_text(
        f"MemTotal:  16000 kB\nMemAvailable:  {available} kB\nHugePages_Total:  0\n",
        encoding="ascii",
    )
    (tmp_path / "self" / "statm").write_text(f"9999999 {pages} 3 4 0 5 0\n", encoding="ascii")
    assert memory._scarce(limit and limit * os.sysconf("SC_PAGE_SIZE"), tmp_path) is scarce
    assert memory._scarce(None, tmp_path / "nowhere")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with memory.freed_memory_kept(NOTHING) as kept:
        assert not kept


FAULTS = """
import resource
import numpy as np
from lib import memory

memory._scarce = lambda limit: False

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(1 << 23)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
with memory.freed_memory_kept(["/nowhere"]) as kept:
    during = faults()
print(kept, before, during, faults(), open("/proc/self/statm").read().split()[1])
"""


@pytest.mark.skipif(
    memory._glibc() is None or not os.path.exists("/proc/self/statm"), reason="wants glibc on Linux"
)
def test_the_next_array_gets_the_same_pages():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    # a system with huge pages takes fewer faults for the same array
    environment["NUMPY_MADVISE_HUGEPAGE"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        cwd=paths.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, before, during, after, resident = done.stdout.split()
    assert kept == "True"
    assert int(during) < int(before) / 10 < int(after)
    assert int(resident) * os.sysconf("SC_PAGE_SIZE") < 150e6  # the last array is not held
