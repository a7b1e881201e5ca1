"""How much memory each notebook takes at its peak, as it is saved (the smoke run), against what
Binder gives.

    python tests/bench/notebook_memory.py [--bar 1.0] [NOTEBOOK ...]

Each notebook runs in a kernel of its own, in order, in a temporary folder, and is told the limit as
JupyterHub tells it (``MEM_LIMIT``). Every 50 ms the memory of the kernel and of all processes that
it has started is added up: on Linux the proportional share (``PSS``), in which a page that several
of them share counts once, and the resident memory (``RSS``), in which it counts for each of them,
so that a process that is being started counts twice for a moment. JupyterLab itself is not counted.
Exit status 1 if a peak of PSS (of RSS where there is no PSS) is above the bar, in GB."""

import argparse
import os
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.notebooks import find_notebooks  # noqa: E402


class Watch:
    """Peak memory in bytes of a process and all below it, from `start` to `stop`."""

    def __init__(self, pid: int, interval: float = 0.05) -> None:
        self.pid, self.interval = pid, interval
        self.rss = self.peak = self.processes = self.cell = self.where = 0
        self.proportional = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        root = psutil.Process(self.pid)
        while not self._ended.wait(self.interval):
            rss = pss = count = 0
            try:
                for process in [root, *root.children(recursive=True)]:
                    # it may have ended meanwhile
                    with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                        memory = process.memory_full_info()
                        rss, pss = rss + memory.rss, pss + getattr(memory, "pss", 0)
                        count += 1
            except psutil.NoSuchProcess:
                return
            self.rss = max(self.rss, rss)
            if (pss or rss) > self.peak:
                self.peak, self.where = pss or rss, self.cell
                self.processes, self.proportional = count, bool(pss)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


def measure(path: Path) -> tuple[Watch, float]:
    """Run a notebook and watch its kernel."""
    options = {"timeout": None, "kernel_name": "python3"}
    options["resources"] = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(nbformat.read(path, as_version=4), **options)
    begin = time.perf_counter()
    with client.setup_kernel():
        watch = Watch(client.km.provisioner.pid)
        watch.start()
        try:
            for index, cell in enumerate(client.nb.cells):
                watch.cell += cell.cell_type == "code"
                client.execute_cell(cell, index)
        finally:
            watch.stop()
    return watch, time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    about = "names such as 06_claims; what they build on must come before"
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help=about)
    parser.add_argument("--bar", type=float, default=1.0, help="GB (default: %(default)s)")
    given = parser.parse_args()
    names = given.notebooks or [path.stem for path in find_notebooks()] + ["equivariance"]
    unknown = [name for name in names if not (ROOT / "notebooks" / f"{name}.ipynb").exists()]
    if unknown:
        parser.error(f"notebooks/{unknown[0]}.ipynb is not there")
    header = ["notebook", "peak PSS, GB", "peak RSS, GB", "processes then", "cell", "seconds"]
    lines, above = [f"| {' | '.join(header)} |", "|---|---:|---:|---:|---:|---:|"], False
    with tempfile.TemporaryDirectory(prefix="cxr-memory-", ignore_cleanup_errors=True) as folder:
        os.environ |= {"CXR_DATA_DIR": f"{folder}/data", "CXR_FIGURES_DIR": f"{folder}/figures"}
        os.environ |= {"MEM_LIMIT": str(int(given.bar * 1e9))}
        os.environ |= {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        for name in names:
            watch, seconds = measure(ROOT / "notebooks" / f"{name}.ipynb")
            above |= watch.peak > given.bar * 1e9
            pss = f"{watch.peak / 1e9:.2f}" if watch.proportional else "–"
            row = [name, pss, f"{watch.rss / 1e9:.2f}", watch.processes, f"[{watch.where}]"]
            lines.append(f"| {' | '.join(map(str, [*row, round(seconds)]))} |")
            print(f"{name}: {pss} GB", file=sys.stderr, flush=True)
    print(*lines, sep="\n")
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
