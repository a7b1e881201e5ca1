"""Where things are, and writing files so that none is ever half-written."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
_PATIENCE = 3.0  # seconds that `alone` waits: somebody who only looks is gone by then


def data_root() -> Path:
    """Folder of all data and runs: ``CXR_DATA_DIR`` if set, else ``data/`` beside ``lib/``."""
    return Path(os.environ.get("CXR_DATA_DIR") or ROOT / "data")


def figures_root() -> Path:
    """Folder of all figures: ``CXR_FIGURES_DIR`` if set, else ``figures/`` beside ``lib/``."""
    return Path(os.environ.get("CXR_FIGURES_DIR") or ROOT / "figures")


def check_name(name: str) -> str:
    """Return `name` if it can be a folder name on every system, else raise ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError(f"{name!r} cannot name a dataset: use letters, digits, '.', '_' and '-'")
    return name


def raw_dir(dataset: str) -> Path:
    """``data/raw/<dataset>``: what 00_download obtained."""
    return data_root() / "raw" / check_name(dataset)


def dataset_dir(dataset: str) -> Path:
    """``data/<dataset>``: images.npy, metadata.csv and manifest.json."""
    return data_root() / check_name(dataset)


def runs_dir(dataset: str) -> Path:
    """``data/runs/<dataset>``: everything trained and evaluated on a dataset."""
    return data_root() / "runs" / check_name(dataset)


def run_dir(dataset: str, arm: str, seed: int) -> Path:
    """``data/runs/<dataset>/<arm>/seed<k>``: one training run."""
    return runs_dir(dataset) / check_name(arm) / f"seed{int(seed)}"


def figures_dir(dataset: str) -> Path:
    """``figures/<dataset>``: figures, tables and summary of a dataset."""
    return figures_root() / check_name(dataset)


def show(path: Path | str) -> str:
    """Path to print: relative to the project or its data, never a machine's own path."""
    path = Path(path).absolute()
    for base, name in ((data_root(), "data"), (figures_root(), "figures"), (ROOT, "")):
        if path.is_relative_to(base.absolute()):
            return (Path(name) / path.relative_to(base.absolute())).as_posix()
    return f"(outside the project)/{path.name}"


@contextmanager
def atomic_write(path: Path | str, mode: str = "wb") -> Iterator[IO]:
    """Open a temporary file next to `path`, and rename it to `path` once all of it is on the disk.

    `mode` is ``"wb"``, or ``"w"`` for UTF-8 with ``\\n`` line ends. OSError if the folder is not
    writable, the file in use, or the disk full: the message names `path`, the temporary file is
    removed, an older `path` is intact."""
    path = Path(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _named(error, path) from error
    finally:
        with suppress(OSError):  # it is gone after the rename
            temporary.unlink()


def _named(error: OSError, path: Path) -> OSError:
    """`error` with the path and what to do."""
    hint = "free some space, or choose another folder with CXR_DATA_DIR"
    if isinstance(error, PermissionError):  # Windows replaces no file that is open
        hint = "the folder is read-only, or a notebook has the file open: shut it down"
    reason = error.strerror or str(error)
    return OSError(error.errno, f"could not write {path}: {reason}; {hint}")


class BusyError(OSError):
    """Another process works in the folder."""


@contextmanager
def alone(folder: Path | str, lock: Path | None = None) -> Iterator[None]:
    """Keep other processes that ask the same out of a folder while the block runs: BusyError. The
    system's lock on `lock`, or on ``.lock`` in `folder`, ends with its process, also a killed one.
    """
    folder = Path(folder)
    file = lock or folder / ".lock"
    held = filelock.FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        held.acquire(timeout=_PATIENCE)
    except filelock.Timeout:
        busy = f"another process works in {show(folder)}: wait for it, then repeat the command"
        raise BusyError(busy) from None
    except NotImplementedError:  # some network file systems have no locks
        warnings.warn(f"{show(folder)} cannot be locked: start nothing else there", stacklevel=3)
    except OSError as error:
        raise _named(error, folder) from error
    try:
        yield
    finally:
        if os.name == "posix":  # before the release: a waiting process then makes a new file
            file.unlink(missing_ok=True)
        held.release()


def save_json(path: Path | str, value: Any) -> None:
    """Write `value`, which may hold NumPy's numbers and arrays, as indented JSON, atomically."""
    text = json.dumps(value, default=lambda item: item.tolist())
    value = json.loads(text, parse_constant=lambda _: None)  # NaN is no JSON: it becomes null
    with atomic_write(path, "w") as handle:
        handle.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def load_json(path: Path | str) -> Any:
    """Read a JSON file; ValueError naming it if it is not JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        why = f"is not a JSON file ({error}); delete it and repeat the step before"
        raise ValueError(f"{show(path)} {why}") from error


def save_npy(path: Path | str, array: np.ndarray) -> None:
    """Write `array` as ``.npy``, atomically."""
    with atomic_write(path) as handle:
        np.save(handle, np.ascontiguousarray(array), allow_pickle=False)
