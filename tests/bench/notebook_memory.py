"""How much memory each notebook takes at its peak, as it is saved (the smoke run), against what
Binder gives: figures/bench/notebook_memory.md.

    python tests/bench/notebook_memory.py [--bar 1.0] [NOTEBOOK ...]

Each notebook runs in a kernel of its own, in order, in a temporary folder, and is told the limit as
JupyterHub tells it (``MEM_LIMIT``). Every 50 ms the memory of the kernel and of all processes that
it has started is added up: on Linux the proportional share (``PSS``), in which a page that several
of them share counts once, and the resident memory (``RSS``), in which it counts for each of them.
JupyterLab itself is not counted. Exit status 1 if a peak of PSS (of RSS where there is no PSS) is
above the bar, in GB."""

import argparse
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import project  # noqa: F401
import psutil
from nbclient import NotebookClient

from lib.notebooks import find_notebooks
from lib.paths import ROOT

COLUMNS = ("peak PSS, GB", "peak RSS, GB", "processes then", "cell", "seconds")


def look(pid: int) -> tuple[int, int, int]:
    """PSS, RSS (both in bytes) and number of a process and all below it."""
    pss = rss = count = 0
    with suppress(psutil.NoSuchProcess):  # each may have ended meanwhile
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                memory = process.memory_full_info()
                rss, pss = rss + memory.rss, pss + getattr(memory, "pss", memory.rss)
                count += 1
    return pss, rss, count


def measure(path: Path) -> tuple[int, int, int, int, float]:
    """Run a notebook and watch its kernel: the numbers of `COLUMNS`, memory in bytes."""
    resources = {"metadata": {"path": str(path.parent)}}
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources)
    begin, ended, seen, number = time.perf_counter(), threading.Event(), [], 0
    with client.setup_kernel():

        def watch() -> None:
            while not ended.wait(0.05):
                seen.append((*look(client.km.provisioner.pid), number))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            for index, cell in enumerate(client.nb.cells):
                number += cell.cell_type == "code"
                client.execute_cell(cell, index)
        finally:
            ended.set()
            watcher.join()
    pss, _, processes, cell = max(seen)
    return pss, max(rss for _, rss, *_ in seen), processes, cell, time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about = "names such as 06_claims; what they build on must come before"
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help=about)
    parser.add_argument("--bar", type=float, default=1.0, help="GB (default: %(default)s)")
    given = parser.parse_args()
    names = given.notebooks or [path.stem for path in find_notebooks()] + ["equivariance"]
    print(f"| notebook | {' | '.join(COLUMNS)} |\n|---{'|---:' * len(COLUMNS)}|")
    above = False
    with tempfile.TemporaryDirectory(prefix="cxr-memory-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"CXR_DATA_DIR": f"{folder}/data", "CXR_FIGURES_DIR": f"{folder}/figures"}
        os.environ |= {"MEM_LIMIT": str(int(given.bar * 1e9))}
        os.environ |= {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        for name in names:
            pss, rss, processes, cell, seconds = measure(ROOT / "notebooks" / f"{name}.ipynb")
            above |= pss > given.bar * 1e9
            row = f"{pss / 1e9:.2f} | {rss / 1e9:.2f} | {processes} | [{cell}] | {seconds:.0f}"
            print(f"| {name} | {row} |", flush=True)
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
