"""How much memory each notebook takes at its peak, as it is saved (the smoke run), against what
Binder gives: figures/bench/notebook_memory.md.

    python tests/bench/notebook_memory.py [NOTEBOOK ...]

Each notebook runs in a kernel of its own, in order, in a temporary folder, and is told the limit as
JupyterHub tells it (``MEM_LIMIT``). Every 50 ms the memory of the kernel and of all processes that
it has started is added up: on Linux the proportional share (``PSS``), in which a page that several
of them share counts once, elsewhere the resident memory. JupyterLab itself is not counted. Exit
status 1 if a peak is above `BAR`, in GB."""

import argparse
import os
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import nbformat
import project  # noqa: F401
import psutil
from nbclient import NotebookClient

from lib.notebooks import find_notebooks
from lib.paths import ROOT

BAR, COLUMNS = 1.0, ("peak, GB", "processes then", "cell")


def look(pid: int) -> tuple[int, int]:
    """Bytes and number of a process and all below it."""
    total = count = 0
    with suppress(psutil.NoSuchProcess):  # each may have ended meanwhile
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                memory = process.memory_full_info()
                total, count = total + getattr(memory, "pss", memory.rss), count + 1
    return total, count


def measure(path: Path) -> tuple[int, int, int]:
    """Run a notebook and watch its kernel: the numbers of `COLUMNS`, memory in bytes."""
    resources = {"metadata": {"path": str(path.parent)}}
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources)
    ended, seen, number = threading.Event(), [], 0
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
    return max(seen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="such as 06_claims")
    given = parser.parse_args()
    names = given.notebooks or [path.stem for path in find_notebooks()] + ["equivariance"]
    print(f"| notebook | {' | '.join(COLUMNS)} |\n|---{'|---:' * len(COLUMNS)}|")
    above = False
    with tempfile.TemporaryDirectory(prefix="cxr-memory-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"CXR_DATA_DIR": f"{folder}/data", "CXR_FIGURES_DIR": f"{folder}/figures"}
        os.environ |= {"MEM_LIMIT": str(int(BAR * 1e9))}
        os.environ |= {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        for name in names:
            peak, processes, cell = measure(ROOT / "notebooks" / f"{name}.ipynb")
            above |= peak > BAR * 1e9
            print(f"| {name} | {peak / 1e9:.2f} | {processes} | [{cell}] |", flush=True)
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
