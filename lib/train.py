"""Train one run from the command line, with one process or many:

    torchrun --nproc-per-node 8 -m lib.train CONFIG.json IMAGES.npy RUN_DIR [--restart] [--timeout
    SECONDS]

CONFIG.json holds the settings of ``lib.runs.TrainConfig`` by name (those left out keep their
defaults), IMAGES.npy the array that 01_preprocess wrote, or its folder. Without ``torchrun``
(``python -m lib.train ...``) one process trains. The same command goes on with a run that was
stopped. `launch` does all of this for a notebook."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed.elastic.multiprocessing.errors import record

from lib.deepcluster import Run, TrainConfig, fit, load_run
from lib.parallel import TIMEOUT
from lib.paths import ROOT, load_json, save_json, show


def read_config(path: Path | str) -> TrainConfig:
    """TrainConfig from a JSON file; ValueError that names the file, and the setting that is not
    one.
    """
    values = load_json(path)
    valid = [f.name for f in fields(TrainConfig)]
    if not isinstance(values, dict) or "backbone" not in values:
        raise ValueError(
            f"{show(path)} must hold an object with the settings of TrainConfig, of which backbone has no default"
        )
    for name in values:
        if name not in valid:
            close = get_close_matches(name, valid, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(
                f"{show(path)}: unknown setting {name!r}{hint}; valid: {', '.join(valid)}"
            )
    try:
        return TrainConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{show(path)}: {error}") from error


def launch(
    images: np.ndarray,
    config: TrainConfig,
    run_dir: Path | str,
    *,
    nproc: int = 1,
    restart: bool = False,
    timeout: float = TIMEOUT,
) -> Run:
    """``fit(images, config, run_dir)`` with `nproc` processes on this machine.

    With one, `fit` runs here. With more, they are started by PyTorch's launcher as a subprocess,
    whose progress goes to stderr.

    Parameters
    ----------
    images : memmap uint8, shape (N, 64, 64)
        An opened ``images.npy``: with several processes each opens the file anew.
    nproc : int
        On GPUs, one each; on a CPU they share the cores.

    Raises
    ------
    ValueError
        `nproc` below 1, or several processes and images that are no memory map of a file.
    RuntimeError
        A process failed; the message holds the last lines it wrote.
    """
    if nproc < 1:
        raise ValueError(f"nproc must be at least 1, got {nproc}")
    if nproc == 1:
        return fit(images, config, run_dir, restart=restart, timeout=timeout)
    file = getattr(images, "filename", None)
    if file is None or np.load(file, mmap_mode="r").shape != images.shape:
        raise ValueError(
            f"nproc = {nproc} processes each open the images' file: give the memory map that data.load_images returns"
        )
    with tempfile.TemporaryDirectory(prefix="cxr-train-") as folder:
        settings = Path(folder) / "config.json"
        save_json(settings, asdict(config))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(nproc),
            "-m",
            "lib.train",
        ]
        command += [
            str(settings),
            str(Path(file).absolute()),
            str(Path(run_dir).absolute()),
            "--timeout",
            str(timeout),
        ]
        status, tail = _run([*command, *["--restart"] * restart], _environment(nproc))
    if status:
        raise RuntimeError(
            f"training with {nproc} processes failed (status {status}); the same call goes on from the last epoch\n{tail}"
        )
    return load_run(run_dir)


def _environment(nproc: int) -> dict[str, str]:
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    )
    # torchrun would give each one thread
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))
    environment.setdefault(
        "PYTHONUTF8", "1"
    )  # what it says is read as UTF-8, whatever the system's own encoding is
    if sys.platform == "win32":
        environment.setdefault("USE_LIBUV", "0")  # PyTorch's builds for Windows may be without
    return environment


def _run(command: Sequence[str], environment: dict[str, str], lines: int = 60) -> tuple[int, str]:
    """Run `command` to its end, its output passed on to stderr; its status and what it wrote last.
    However we leave, it has ended.
    """
    tail: deque[str] = deque(maxlen=lines)
    text = {"encoding": "utf-8", "errors": "replace"}
    group = (
        {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if sys.platform == "win32" else {}
    )
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **text,
        **group,
    ) as process:
        try:
            for line in process.stdout:
                sys.stderr.write(line)
                tail.append(line)
            return process.wait(), "".join(tail)
        finally:
            if process.poll() is None:
                process.send_signal(_end_signal())
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()


def _end_signal() -> int:
    """What tells the launcher to end, and its workers with it: on Windows, where SIGTERM would end
    it alone, a break for all of them.
    """
    return signal.CTRL_BREAK_EVENT if sys.platform == "win32" else signal.SIGTERM


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m lib.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.json")
    parser.add_argument("images", type=Path, metavar="IMAGES.npy")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--restart", action="store_true", help="move a run that is there aside and start anew"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        help="seconds after which a waiting process gives up (default: %(default)s)",
    )
    return parser.parse_args(argv)


@record
def main(argv: Sequence[str] | None = None) -> Any:
    """Run the command line. Errors leave as tracebacks: the launcher shows that of the process that
    failed first.
    """
    options = parse_args(argv)
    file = options.images / "images.npy" if options.images.is_dir() else options.images
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is not there: run notebook 01_preprocess, or name the images.npy that it wrote"
        )
    images = np.load(file, mmap_mode="r", allow_pickle=False)
    fit(
        images,
        read_config(options.config),
        options.run_dir,
        restart=options.restart,
        timeout=options.timeout,
    )


if __name__ == "__main__":
    main()
