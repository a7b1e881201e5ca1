"""How much memory each notebook takes at its peak, as it is saved (the smoke run), against what Binder gives.

    python tests/bench/notebook_memory.py [--bar 1.0] [--like-run-all] [NOTEBOOK ...]

Each notebook runs in a kernel of its own, in order, in a temporary folder. Every 20 ms the resident memory of the kernel and of all
processes that it has started is added up (``RSS``). Pages that several of them share are counted once for each, so the sum is an upper
bound; on Linux their proportional share (``PSS``) is read too, ten times less often. JupyterLab itself is not counted. Exit status 1 if a
peak of RSS is above the bar, in GB.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.report import markdown_table  # noqa: E402
from lib.run import _environment, find_notebooks  # noqa: E402


class Watch:
    """Peak memory in bytes of a process and all below it, from `start` to `stop`."""

    def __init__(self, pid: int, interval: float = 0.02) -> None:
        self.pid, self.interval, self.rss, self.pss, self.processes = pid, interval, 0, 0, 0
        self.cell, self.where = 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        root, round_ = psutil.Process(self.pid), 0
        while not self._ended.wait(self.interval):
            rss = pss = count = 0
            try:
                for process in [root, *root.children(recursive=True)]:
                    try:
                        rss += process.memory_info().rss
                        pss += getattr(process.memory_full_info(), "pss", 0) if round_ % 10 == 0 else 0
                        count += 1
                    except psutil.Error:  # it has ended meanwhile
                        continue
            except psutil.NoSuchProcess:
                return
            if rss > self.rss:
                self.rss, self.where, self.processes = rss, self.cell, count
            self.pss, round_ = max(self.pss, pss), round_ + 1

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


def measure(path: Path) -> tuple[Watch, float]:
    """Run a notebook and watch its kernel; nbclient.exceptions.CellExecutionError if a cell fails."""
    client = NotebookClient(
        nbformat.read(path, as_version=4), timeout=None, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="names such as 06_claims; what they build on must come before")
    parser.add_argument("--bar", type=float, default=1.0, help="GB (default: %(default)s)")
    parser.add_argument("--like-run-all", action="store_true", help="with run_all.sh's environment, which lets the C library keep memory")
    given = parser.parse_args()
    names = given.notebooks or [path.stem for path in find_notebooks()] + ["equivariance"]
    unknown = [name for name in names if not (ROOT / "notebooks" / f"{name}.ipynb").exists()]
    if unknown:
        parser.error(f"notebooks/{unknown[0]}.ipynb is not there")
    rows, above = [], False
    with tempfile.TemporaryDirectory(prefix="cxr-memory-", ignore_cleanup_errors=True) as folder:
        os.environ |= _environment() if given.like_run_all else {}
        os.environ |= {"CXR_DATA_DIR": str(Path(folder, "data")), "CXR_FIGURES_DIR": str(Path(folder, "figures"))}
        os.environ |= {"JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        for name in names:
            watch, seconds = measure(ROOT / "notebooks" / f"{name}.ipynb")
            above |= watch.rss > given.bar * 1e9
            pss = f"{watch.pss / 1e9:.2f}" if watch.pss else "–"
            rows.append([name, f"{watch.rss / 1e9:.2f}", pss, str(watch.processes), f"[{watch.where}]", f"{seconds:.0f}"])
            print(f"{name}: {rows[-1][1]} GB", file=sys.stderr, flush=True)
    print(markdown_table(["notebook", "peak RSS, GB", "peak PSS, GB", "processes then", "cell", "seconds"], rows))
    return int(above)


if __name__ == "__main__":
    sys.exit(main())
