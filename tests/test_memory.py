import ctypes
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
    for name in ("MALLOC_MMAP_MAX_", "MEM_LIMIT"):
        monkeypatch.delenv(name, raising=False)
    library = FakeLibrary()
    monkeypatch.setattr(memory, "_glibc", lambda: library)
    return library


def test_memory_is_given_back_at_the_end_and_after_an_error(library):
    def fail():
        with memory.freed_memory_kept(NOTHING) as kept:
            assert kept
            assert library.calls == [*memory.KEEP]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert library.calls == [*memory.KEEP, *memory.GIVE_BACK, "trim"]


def test_a_process_that_takes_much_keeps_nothing_any_longer(library, monkeypatch):
    taken = iter([0.4, 0.4, 0.6])
    monkeypatch.setattr(memory, "_physical", lambda: 100)
    monkeypatch.setattr(memory, "_resident", lambda: 100 * next(taken))
    with memory.freed_memory_kept(NOTHING) as kept:
        assert kept
        for _ in range(100):
            if "trim" in library.calls:
                break
            time.sleep(0.1)
        assert library.calls == [*memory.KEEP, *memory.GIVE_BACK, "trim"]
        time.sleep(0.3)  # no fourth look, which would be an error in the thread
    assert next(taken, None) is None


@pytest.mark.parametrize(("name", "value"), [("MALLOC_MMAP_MAX_", "65536"), ("MEM_LIMIT", str(2 << 30))])
def test_what_the_environment_says_is_respected(library, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with memory.freed_memory_kept(NOTHING) as kept:
        assert not kept
    assert library.calls == []


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with memory.freed_memory_kept(NOTHING) as kept:
        assert not kept


FAULTS = """
import resource
import numpy as np
from lib.memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(1 << 23)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
with freed_memory_kept(["/nowhere"]) as kept:
    during = faults()
print(kept, before, during, faults(), open("/proc/self/statm").read().split()[1])
"""


@pytest.mark.skipif(memory._glibc() is None or not os.path.exists("/proc/self/statm"), reason="wants glibc on Linux")
def test_the_next_array_gets_the_same_pages():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "MEM_LIMIT"}
    # a system with huge pages takes fewer faults for the same array
    environment["NUMPY_MADVISE_HUGEPAGE"] = "0"
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=paths.ROOT, env=environment, capture_output=True, text=True, check=True)
    kept, before, during, after, resident = done.stdout.split()
    assert kept == "True"
    assert int(during) < int(before) / 10 < int(after)
    assert int(resident) * os.sysconf("SC_PAGE_SIZE") < 150e6  # the last array is not held
