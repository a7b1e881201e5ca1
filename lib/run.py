"""Run the notebooks in order, or all tests: ``python -m lib.run``, to which ``run_all.sh`` hands
over once it has an environment.

At the top only the standard library is imported: ``run_all.sh`` checks the arguments with this
module before there is an environment."""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent

USAGE = """\
usage: ./run_all.sh [options]     (the same, in an environment of your own: python -m lib.run [options])

Runs the notebooks in order and writes every figure and table to figures/<dataset>/.
A second call skips what is done with the same parameters.

  --preset smoke|quick|study|paper  how much to compute; each is a file in notebooks/params/ (default: quick)
  --data SOURCE               which X-rays (default: phantom):
      phantom                   synthetic ones, drawn on the spot
      chestmnist                NIH's 112,120 X-rays at 64x64, 0.4 GB from Zenodo; chestmnist:FILE.npz if you have the file
      kaggle                    the same in full, with patients and views, 45 GB from Kaggle; needs a free account
      kaggle-sample             5,606 of them, 2 GB
      nih:PATH                  a folder with what NIH hands out: images_001.tar.gz and so on, and Data_Entry_2017*.csv
      PATH                      a folder of your own X-rays (./kaggle, if it is called so)
  --csv FILE                  table of your folder, if it is not the only one
  --image-column NAME         its column with the images' file names or paths, if it is not named as NIH's
  --label-column NAME         its column with the labels, separated by "|", ";" or ","
  --fit pad|crop|stretch      what to do with images that are not square (default: pad)
  --drop-outliers             leave out images that are too dark, too bright or constant
  --seeds 0,1                 seeds to train with (default: the preset's)
  --device auto|cpu|cuda      where to train (default: the preset's)
  --nproc N                   train each run with N processes: on GPUs, one each (default: the preset's)
  --from NN                   run again from notebook NN on; the earlier ones must be done
  --restart                   compute anew what is already done, too
  --test [ARG ...]            run the checks, the tests and all notebooks; ARGs go to pytest, which then runs the tests alone
  --study [ARG ...]           train every arm and control with more seeds, and compare them (ARGs: python -m lib.study.arms --help)
  --reuse RUN                 with --data PATH: assign your X-rays to the clusters of a finished run, such as phantom/p4m/seed0, without
                              training (more options: python -m lib.explore.reuse --help)
  --help                      show this text

Environment variables:
  PYTHON           the Python to use, if it has the packages, or to make .venv with
  CXR_DATA_DIR     folder of data and runs (default: data/)
  CXR_FIGURES_DIR  folder of figures (default: figures/)
"""


SOURCES = (
    "phantom",
    "chestmnist",
    "kaggle",
    "kaggle-sample",
)  # words that --data knows; anything else holds a path


class UsageError(Exception):
    """What was asked for cannot be done: one line, exit status 2."""


class RunError(Exception):
    """Something failed on the way: a few lines, exit status 1."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for, checked."""

    preset: str = "quick"
    source: str = "phantom"
    dataset: str = "phantom"
    seeds: tuple[int, ...] | None = None
    device: str | None = None
    start: str | None = None
    restart: bool = False
    help: bool = False
    test: tuple[str, ...] | None = None
    csv: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    fit: str | None = None
    drop_outliers: bool = False
    study: tuple[str, ...] | None = None
    reuse: tuple[str, ...] | None = None
    nproc: int | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def find_notebooks(root: Path = ROOT) -> list[Path]:
    """Return the numbered notebooks in their order."""
    return sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def _path_of(source: str) -> str:
    """The path in a source, empty if it has none."""
    word, colon, place = source.partition(":")
    return place if colon and word in ("nih", "chestmnist") else "" if source in SOURCES else source


def dataset_name(source: str, preset: str) -> str:
    """Name under which the data, runs and figures of `source` are kept: ``phantom``,
    ``phantom-smoke``, ``nih-sample``, ...

    Parameters
    ----------
    source : str
        A word of `SOURCES`, or an absolute path, perhaps after ``nih:`` or ``chestmnist:``, whose
        last part gives the name.
    preset : str
        ``"quick"`` adds nothing; any other preset is a suffix, so that it leaves the default's
        results alone.
    """
    name = source
    if source not in SOURCES:
        path = Path(_path_of(source))
        name = path.stem if source.startswith("chestmnist:") else path.name
        name = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:48] or "images"
        # raw, runs and published are folders of data/ with another meaning; phantoms are not the
        # user's images
        if name in {"raw", "runs", "published", *SOURCES} or name.startswith("phantom"):
            name = f"my-{name}"
    return name if preset == "quick" else f"{name}-{preset}"


def parse_args(argv: Sequence[str], root: Path = ROOT, folder: Path | None = None) -> Options:
    """Check the command line.

    Parameters
    ----------
    argv : sequence of str
        Arguments without the program's name.
    root : Path
        Folder that holds ``notebooks/``.
    folder : Path, optional
        Folder to which a relative ``--data`` refers: the caller's.

    Raises
    ------
    UsageError
        Unknown option, preset, device or notebook number, malformed seeds, or a folder that does
        not exist.
    """
    argv, test = list(argv), None
    if argv[:1] == ["--study"]:
        return Options(study=tuple(argv[1:]))
    if "--reuse" in argv and "--test" not in argv:
        return Options(reuse=tuple(argv))
    if "--test" in argv:
        split = argv.index("--test")
        argv, test = argv[:split], tuple(argv[split + 1 :])
    names = [
        "--preset",
        "--data",
        "--seeds",
        "--device",
        "--nproc",
        "--from",
        "--csv",
        "--image-column",
        "--label-column",
        "--fit",
    ]
    switches = ["--drop-outliers", "--restart", "--help"]
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(name)
    for name in switches:
        parser.add_argument(name, action="store_true")
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UsageError(
            f"unknown option {unknown[0]}; valid: {', '.join([*names, *switches[:-1], '--test', '--study', '--help'])}"
        )
    if given.help:
        return Options(help=True)
    if test is not None:
        if argv:
            raise UsageError(
                f"--test takes no other option before it ({' '.join(argv)}); what follows it goes to pytest"
            )
        return Options(test=test)

    def one_of(option: str, value: str, valid: Sequence[str]) -> str:
        if value not in valid:
            raise UsageError(
                f"unknown {option} {value!r}; valid: {', '.join(valid) or 'none is there'}"
            )
        return value

    presets = sorted(path.stem for path in (root / "notebooks" / "params").glob("*.yaml"))
    preset = one_of("--preset", "quick" if given.preset is None else given.preset, presets)
    if given.device is not None:
        one_of("--device", given.device, ["auto", "cpu", "cuda"])
    start = getattr(given, "from")
    if start is not None:
        start = one_of(
            "--from",
            start.zfill(2) if start.isdigit() else start,
            [path.name[:2] for path in find_notebooks(root)],
        )
    seeds = given.seeds
    if seeds is not None:
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", seeds):
            raise UsageError(
                f"--seeds {seeds!r} is not a list of whole numbers, such as 0 or 0,1,2"
            )
        seeds = tuple(int(seed) for seed in seeds.split(","))
        if len(set(seeds)) < len(seeds):
            raise UsageError(f"--seeds {given.seeds} names a seed twice")
    nproc = given.nproc
    if nproc is not None:
        if not re.fullmatch(r"[1-9]\d{0,3}", nproc):
            raise UsageError(f"--nproc {nproc!r} is not a number of processes, 1 to 9999")
        nproc = int(nproc)
    source = "phantom" if given.data is None else checked_source(given.data, folder or Path.cwd())
    if given.fit is not None:
        one_of("--fit", given.fit, ["pad", "crop", "stretch"])
    for name in ("csv", "image_column", "label_column"):
        if getattr(given, name) is not None and not os.path.isabs(source):
            raise UsageError(
                f"--{name.replace('_', '-')} describes a folder of X-rays: name it with --data PATH"
            )
    csv = given.csv
    if csv is not None:
        places = [
            os.path.abspath(place / Path(csv).expanduser())
            for place in (folder or Path.cwd(), Path(source))
        ]
        csv = next(filter(os.path.isfile, places), None)
        if csv is None or not given.csv:
            raise UsageError(
                f"--csv {given.csv!r} is no file here, nor in the folder of --data; give the path of a CSV"
            )
    columns = {"csv": csv, "image_column": given.image_column, "label_column": given.label_column}
    reading = {**columns, "fit": given.fit, "drop_outliers": given.drop_outliers}
    return Options(
        preset,
        source,
        dataset_name(source, preset),
        seeds,
        given.device,
        start,
        given.restart,
        nproc=nproc,
        **reading,
    )


def checked_source(given: str, folder: Path) -> str:
    """`given` with its path made absolute; UsageError if there is nothing there."""
    if given in SOURCES:
        return given
    kind, colon, place = given.partition(":")
    if not colon or kind not in ("nih", "chestmnist"):
        kind, place = ("chestmnist" if given.lower().endswith(".npz") else ""), given
    path = os.path.abspath(folder / Path(place).expanduser())
    if not place or not (os.path.isfile(path) if kind == "chestmnist" else os.path.isdir(path)):
        reason = (
            "not there"
            if not place or not os.path.exists(path)
            else "not a file"
            if kind == "chestmnist"
            else "not a folder"
        )
        valid = f"{', '.join(SOURCES)}, chestmnist:FILE.npz, nih:PATH, or the path of a folder of X-rays"
        raise UsageError(f"--data {given!r} is {reason}; valid: {valid}")
    return f"{kind}:{path}" if kind else path


def missing_packages(test: bool = False, root: Path = ROOT) -> list[str]:
    """Return the requirements of pyproject.toml that this Python does not meet, with those of the
    tests if `test`.
    """
    import tomllib
    from importlib.metadata import PackageNotFoundError, version

    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + (project["optional-dependencies"]["test"] if test else [])
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return wanted
    missing = []
    for line in wanted:
        requirement = Requirement(line)
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                missing.append(line)
        except PackageNotFoundError:
            missing.append(line)
    return missing


# --- parameters -----------------------------------------------------------------------------------


def _cells(notebook: Path) -> list[dict]:
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{notebook.name} is not a notebook of format 4 ({error})") from error


def read_parameters(notebook: Path) -> dict[str, Any]:
    """Return names and default values of a notebook's parameters: the literals of its one cell
    tagged ``parameters``.
    """
    cells = [
        cell
        for cell in _cells(notebook)
        if "parameters" in cell.get("metadata", {}).get("tags", [])
    ]
    if len(cells) != 1:
        raise RunError(f"{notebook.name} has {len(cells)} cells tagged 'parameters', not one")
    values = {}
    for node in ast.parse("".join(cells[0]["source"])).body:
        try:
            (target,) = node.targets if isinstance(node, ast.Assign) else (node.target,)
            values[target.id] = ast.literal_eval(node.value)
        except (AttributeError, TypeError, ValueError) as error:
            raise RunError(
                f"{notebook.name}, parameters, line {node.lineno}: only `name = literal` may stand there"
            ) from error
    return values


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    for kind, name in ((int, "number"), (float, "number"), (str, "text"), (list, "list")):
        if isinstance(value, kind):
            return name
    return "nothing"


def read_preset(path: Path, notebooks: Sequence[Path]) -> dict[str, Any]:
    """Read a preset, and hold it against the parameters of the notebooks: papermill only warns of
    an unknown name.

    Raises
    ------
    UsageError
        Not a flat mapping, a name that no notebook has, or a value of another kind than the
        notebook's own.
    """
    import yaml

    where = f"notebooks/params/{path.name}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where} is not a list of `name: value` lines")
    valid = {
        name: value for notebook in notebooks for name, value in read_parameters(notebook).items()
    }
    for name, value in values.items():
        if name not in valid:
            close = get_close_matches(str(name), valid, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UsageError(
                f"{where}: unknown parameter {name!r}{hint}; valid: {', '.join(sorted(valid))}"
            )
        if valid[name] is not None and _kind(value) != _kind(valid[name]):
            hint = (
                "; YAML takes 1e-3 for text, write 1.0e-3"
                if isinstance(value, str) and re.fullmatch(r"[\d.]+e[-+]?\d+", value)
                else ""
            )
            raise UsageError(
                f"{where}: {name} is {value!r}, which is no {_kind(valid[name])} like {valid[name]!r}{hint}"
            )
    return values


# --- what is done ---------------------------------------------------------------------------------


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _source_state(source: str, csv: str | None = None) -> list[int] | None:
    """Number, size and newest change of the files of a folder and of its table: images that were
    added are noticed without reading any.
    """
    path = _path_of(source)
    if not path:
        return None  # drawn, or published once and for all
    files = (
        [path]
        if os.path.isfile(path)
        else [os.path.join(base, name) for base, _, names in os.walk(path) for name in names]
    )
    states = [os.lstat(file) for file in files] + ([os.stat(csv)] if csv else [])
    return [
        len(states),
        sum(state.st_size for state in states),
        max((state.st_mtime_ns for state in states), default=0),
    ]


def fingerprint(
    notebook: Path, parameters: dict[str, Any], source_state: Any, upstream: Any
) -> dict[str, Any]:
    """All that a notebook's results depend on: its code, its parameters, ``lib``, the source's
    files, and the notebook before it.

    Prose and saved outputs do not count, so that a notebook stepped through in JupyterLab is not
    run again."""
    lib = [
        path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "lib").rglob("*.[pch]*"))
        if path.suffix in {".py", ".c", ".html"} and path.name != "run.py"
    ]
    own = read_parameters(notebook)
    not_results = {
        "restart",
        "nproc",
    }  # a run is the same run, to rounding, with any number of processes
    return {
        "code": _digest(
            ["".join(cell["source"]) for cell in _cells(notebook) if cell["cell_type"] == "code"]
        ),
        "lib": _digest(lib),
        "parameters": {
            name: parameters.get(name, default)
            for name, default in own.items()
            if name not in not_results
        },
        "source_state": source_state,
        "upstream": _digest(upstream),
    }


def _products(dataset: str) -> dict[str, int]:
    """Time of change of every file the notebooks wrote, but for checkpoints: those may be deleted
    when training is done.
    """
    from lib import paths

    found = {}
    for base in (paths.dataset_dir(dataset), paths.runs_dir(dataset), paths.figures_dir(dataset)):
        for folder, folders, names in os.walk(base):
            folders[:] = [
                name
                for name in folders
                if Path(folder, name) != paths.runs_dir(dataset) / "notebooks"
            ]
            for name in names:
                path = Path(folder, name)
                if not name.startswith(".") and path.suffix not in {".pt", ".tmp"}:
                    found[str(path)] = path.stat().st_mtime_ns
    return found


def _read_stamp(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


# --- running --------------------------------------------------------------------------------------


def check_kernel() -> None:
    """Raise RunError unless the Jupyter kernel ``python3`` is there and starts this very Python."""
    repair = f"install it: {sys.executable} -m pip install ipykernel && {sys.executable} -m ipykernel install --sys-prefix"
    try:
        import ipykernel  # noqa: F401
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel
    except ImportError as error:
        raise RunError(
            f"the Jupyter kernel python3 is not installed ({error}); {repair}"
        ) from error
    try:
        program = KernelSpecManager().get_kernel_spec("python3").argv[0]
    except NoSuchKernel as error:
        raise RunError(f"the Jupyter kernel python3 is not installed; {repair}") from error
    # a bare `python` means the Python that asks; a full path may be another's, or gone
    if os.path.isabs(program) and os.path.normcase(Path(program).parent) != os.path.normcase(
        Path(sys.executable).parent
    ):
        raise RunError(f"the Jupyter kernel python3 starts {program}, not this Python; {repair}")


def _check_device(device: str | None, nproc: int = 1) -> None:
    if device == "cuda" or nproc > 1:
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device == "cuda" and not gpus:
            raise UsageError("--device cuda: no CUDA device can be used here; valid: auto, cpu")
        if device != "cpu" and 0 < gpus < nproc:
            raise UsageError(
                f"--nproc {nproc}: {gpus} GPU(s) are here, one is needed for each process; valid: 1 to {gpus}, or --device cpu"
            )


def _check_writable(folders: Sequence[Path]) -> None:
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            reason = error.strerror or error
            raise RunError(
                f"cannot write to {folder}: {reason}; choose other folders with CXR_DATA_DIR and CXR_FIGURES_DIR"
            ) from error


def _environment() -> dict[str, str]:
    """Environment of notebooks and tests: this project's ``lib``, this Python's kernel, no more
    threads than there are processors.
    """
    import joblib

    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment["JUPYTER_PREFER_ENV_PATH"] = (
        "1"  # a kernel python3 in the user's home may be another Python's
    )
    environment["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"
    environment.setdefault("PYTHONHASHSEED", "0")
    environment.setdefault(
        "PYTHONUTF8", "1"
    )  # logs are read as UTF-8; on Windows they would be written in the system's own encoding
    environment.pop("MPLBACKEND", None)  # the kernel draws inline
    # OpenMP knows the processors of the machine, not those a container may use
    usable = joblib.cpu_count()
    if usable < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(usable))
    return environment


def _obey() -> None:
    """Let the child heed SIGINT, which a background job ignores, and on Linux get it when we are
    gone, even by kill -9.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(
            1, signal.SIGINT
        )  # 1 is PR_SET_PDEATHSIG; otherwise training would go on unseen


def _call(command: Sequence[str], log: Path, environment: dict[str, str]) -> int:
    """Run `command` with its output in `log`; however we leave, it has ended."""
    options: dict[str, Any] = {}
    if os.name == "posix":
        # its own session: Ctrl-C reaches us alone, and we pass it on once
        options = {"start_new_session": True, "preexec_fn": _obey}
    with open(log, "w", encoding="utf-8") as handle:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=subprocess.STDOUT,
            **options,
        )
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT) if os.name == "posix" else process.terminate()
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def last_error(copy: Path, log: Path, lines: int = 3) -> str:
    """Return what went wrong, in a few lines: the error in an executed copy, else the end of
    papermill's log.
    """
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    if "DeadKernelError" in text:
        return "the kernel died; most often it was out of memory: try a smaller preset"
    try:
        for cell in _cells(copy):
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    message = re.sub(
                        r"\x1b\[[0-9;]*m", "", f"{output['ename']}: {output['evalue']}"
                    ).strip()
                    return f"In [{cell['execution_count']}]: " + "\n  ".join(
                        message.splitlines()[:lines]
                    )
    except (OSError, RunError):
        pass
    return (
        "\n  ".join([line for line in text.splitlines() if line.strip()][-lines:])
        or "it said nothing"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {seconds} s"
        if minutes
        else f"{seconds} s"
    )


def run(options: Options, root: Path = ROOT) -> None:
    """Run the notebooks of `root` that are not done, each through papermill in a process of its
    own, and print one line for each.

    Parameters
    ----------
    options : Options
        As `parse_args` returns it.
    root : Path
        Folder that holds ``notebooks/``.

    Raises
    ------
    UsageError
        A parameter that no notebook has, results of another folder under the same name, or
        ``--from`` before its time.
    RunError
        No kernel, a folder that cannot be written, or a notebook that failed.
    """
    from lib import paths

    notebooks, preset = (
        find_notebooks(root),
        root / "notebooks" / "params" / f"{options.preset}.yaml",
    )
    overrides: dict[str, Any] = {
        "dataset": options.dataset,
        "source": options.source,
        "restart": options.restart,
    }
    overrides |= {} if options.seeds is None else {"seeds": list(options.seeds)}
    overrides |= {} if options.device is None else {"device": options.device}
    for name in ("csv", "image_column", "label_column", "fit", "drop_outliers"):
        # papermill puts every parameter into every notebook, and `fit` is a function in some
        overrides |= (
            {{"fit": "not_square"}.get(name, name): getattr(options, name)}
            if getattr(options, name)
            else {}
        )
    overrides |= {} if options.nproc is None else {"nproc": options.nproc}
    overrides["command"] = _command(options)
    parameters = read_preset(preset, notebooks) | overrides
    _check_device(parameters.get("device"), parameters.get("nproc", 1))
    check_kernel()
    out = paths.runs_dir(options.dataset) / "notebooks"
    _check_writable([out, paths.figures_dir(options.dataset)])
    stamps = {notebook: _read_stamp(out / f"{notebook.stem}.json") for notebook in notebooks}
    for stamp in stamps.values():
        other = stamp.get("parameters", {}).get("source", options.source)
        if other != options.source and not options.restart:
            raise UsageError(
                f"{paths.show(out.parent)} holds the results of {other}; rename your folder, or replace these results with --restart"
            )
    environment, state = _environment(), _source_state(options.source, options.csv)
    _obtain(options)
    print(
        f"{options.dataset}, preset {options.preset}: {len(notebooks)} notebooks, logs in {_shown(out)}",
        flush=True,
    )
    upstream: Any = None
    running = False
    for number, notebook in enumerate(notebooks, 1):
        print(f"[{number}/{len(notebooks)}] {notebook.stem} ... ", end="", flush=True)
        stamp, stamp_path = stamps[notebook], out / f"{notebook.stem}.json"
        current = fingerprint(notebook, parameters, state, upstream)
        before = options.start is not None and notebook.name[:2] < options.start
        # --from trusts what came before, whatever its code was, if it had these parameters
        same = all(
            stamp.get(key) == current[key] for key in (("parameters",) if before else current)
        )
        same = same and all(os.path.exists(path) for path in stamp.get("products", []))
        if before and not same:
            print("not done")
            raise UsageError(
                f"--from {options.start}: {notebook.stem} is not done for {options.dataset} with these parameters; leave --from out"
            )
        again = (
            running
            or options.restart
            or (options.start is not None and notebook.name[:2] >= options.start)
        )
        if same and (before or not again):
            upstream = {key: stamp[key] for key in current}
            print("already done", flush=True)
            continue
        running, upstream = True, current
        copy, log = out / notebook.name, out / f"{notebook.stem}.log"
        copy.unlink(missing_ok=True)
        stamp_path.unlink(missing_ok=True)
        earlier, begin = _products(options.dataset), time.monotonic()
        command = [
            sys.executable,
            "-m",
            "papermill",
            str(notebook),
            str(copy),
            "-k",
            "python3",
            "--cwd",
            str(root / "notebooks"),
        ]
        command += [
            "-f",
            str(preset),
            "-y",
            json.dumps(overrides, ensure_ascii=False),
            "--log-output",
        ]
        status = _call(command, log, environment)
        seconds = time.monotonic() - begin
        if status:
            print(f"failed after {_duration(seconds)}", flush=True)
            raise RunError(f"{notebook.stem}: {last_error(copy, log)}\n  log: {_shown(log)}")
        products = sorted(
            path
            for path, changed in _products(options.dataset).items()
            if earlier.get(path) != changed
        )
        paths.save_json(stamp_path, current | {"products": products, "seconds": round(seconds, 1)})
        print(f"done in {_duration(seconds)}", flush=True)
    _print_results(paths.figures_dir(options.dataset))


def _obtain(options: Options) -> None:
    """Bring X-rays here before the first notebook does: in a terminal one sees how far it is, and
    Ctrl-C leaves what has arrived.
    """
    if options.source == "phantom" or _path_of(options.source) == options.source:
        return
    from lib import paths
    from lib.data import sources as download

    try:
        download.obtain(options.source, paths.raw_dir(options.dataset))
    except (download.DownloadError, ValueError) as error:
        raise RunError(str(error)) from None


def _command(options: Options) -> str:
    """The command for the reader of the results: a folder goes by its name, for its path is nobody
    else's business.
    """
    words = ["./run_all.sh", "--preset", options.preset, "--data"]
    path = _path_of(options.source)
    words.append(
        f"{options.source.removesuffix(path)}PATH/{Path(path).name}" if path else options.source
    )
    words += [] if options.csv is None else ["--csv", Path(options.csv).name]
    for name in ("image_column", "label_column", "fit"):
        value = getattr(options, name)
        words += (
            []
            if value is None
            else [
                f"--{name.replace('_', '-')}",
                value if re.fullmatch(r"[\w.-]+", value) else repr(value),
            ]
        )
    words += ["--drop-outliers"] if options.drop_outliers else []
    words += [] if options.seeds is None else ["--seeds", ",".join(map(str, options.seeds))]
    words += [] if options.device is None else ["--device", options.device]
    words += [] if options.nproc is None else ["--nproc", str(options.nproc)]
    return " ".join(words)


def _caller() -> Path:
    """The folder from which the command was given; run_all.sh, which goes to its own, hands it on."""
    return Path(os.environ.get("CXR_CALLED_FROM") or Path.cwd())


def _shown(path: Path) -> str:
    """`path` as the caller would type it."""
    try:
        return str(path.absolute().relative_to(_caller()))
    except ValueError:
        return str(path.absolute())


def _print_results(figures: Path) -> None:
    table = figures / "table1_linear_probe.md"
    if table.exists():
        print(f"\n{table.read_text(encoding='utf-8').strip()}")
    print(f"\nFigures and tables in {_shown(figures)}:")
    kinds: dict[str, list[str]] = {}
    for path in sorted(figures.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            kinds.setdefault(path.stem, []).append(path.suffix.lstrip("."))
    for name, suffixes in kinds.items():
        print(
            f"  {name}.{suffixes[0]}"
            if len(suffixes) == 1
            else f"  {name}.{{{','.join(suffixes)}}}"
        )


# --- tests ----------------------------------------------------------------------------------------


def run_tests(arguments: Sequence[str] = (), root: Path = ROOT) -> bool:
    """Run ruff, pytest and, unless `arguments` for pytest choose a part, every notebook from
    scratch; print one line with the total.

    Returns
    -------
    bool
        True if everything passed.
    """
    from xml.etree import ElementTree

    begin, failed, counts = time.monotonic(), [], {"tests": 0, "cells": 0, "skipped": 0}
    with tempfile.TemporaryDirectory(prefix="cxr-test-", ignore_cleanup_errors=True) as folder:
        environment = _environment()
        fresh = {
            "CXR_DATA_DIR": str(Path(folder, "data")),
            "CXR_FIGURES_DIR": str(Path(folder, "figures")),
        }
        pytest = [sys.executable, "-m", "pytest", f"--junitxml={Path(folder, 'report.xml')}"]
        # by number, as a reader goes; the rest of them after that. The kernel's warnings are the
        # notebook's affair, not pytest's
        notebooks = sorted(
            (root / "notebooks").glob("*.ipynb"),
            key=lambda path: (not path.name[:2].isdigit(), path.name),
        )
        nbval = [
            "-p",
            "no:cacheprovider",
            "-W",
            "default",
            "--nbval-lax",
            "--nbval-current-env",
            *map(str, notebooks),
        ]
        steps = [
            ("ruff check", [sys.executable, "-m", "ruff", "check", "."], {}),
            ("ruff format", [sys.executable, "-m", "ruff", "format", "--check", "."], {}),
            ("tests", [*pytest, "tests", *arguments], {"MPLBACKEND": "Agg"}),
            ("cells", [*pytest, *nbval], fresh),
        ]
        for name, command, extra in steps[: 3 if arguments else 4]:
            print(f"== {'notebooks' if name == 'cells' else name}", flush=True)
            report, bad = Path(folder, "report.xml"), 0
            report.unlink(missing_ok=True)
            status = subprocess.call(
                command, cwd=root, env=environment | extra, stdin=subprocess.DEVNULL
            )
            if report.exists():
                suite = next(ElementTree.parse(report).iter("testsuite"))
                counts[name] += int(suite.get("tests", 0)) - int(suite.get("skipped", 0))
                counts["skipped"] += int(suite.get("skipped", 0))
                bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
            if status:
                failed.append(f"{bad} {name}" if bad else f"{name} (status {status})")
    total = f"{counts['tests']} tests, " + (
        "notebooks left out" if arguments else f"{counts['cells']} notebook cells"
    )
    verdict = f"FAILED: {', '.join(failed)}; of" if failed else "All passed:"
    print(
        f"{verdict} {total}, {counts['skipped']} skipped, in {_duration(time.monotonic() - begin)}",
        flush=True,
    )
    return not failed


def main(argv: Sequence[str] | None = None, check_only: bool = False) -> int:
    """Run the command line and return its exit status; with `check_only` the arguments are only
    looked at.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a console that lacks a character shows another one
    try:
        options = parse_args(sys.argv[1:] if argv is None else argv, folder=_caller())
        if check_only:
            return 0
        if options.help:
            print(USAGE, end="")
            return 0
        missing = missing_packages(test=options.test is not None)
        if missing:
            repair = f"{sys.executable} -m pip install -r requirements.lock && {sys.executable} -m pip install -e . --no-deps"
            raise RunError(
                f"{sys.executable} lacks {', '.join(missing)}; use ./run_all.sh, or: {repair}"
            )
        for name in ("CXR_DATA_DIR", "CXR_FIGURES_DIR"):
            if os.environ.get(name):  # notebooks run in another folder than ours
                os.environ[name] = os.path.abspath(_caller() / Path(os.environ[name]).expanduser())
        os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
        if (
            hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        ):  # unless under nohup
            signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        if options.study is not None:
            from lib.study import arms as study

            return study.main(options.study)
        if options.reuse is not None:
            from lib.explore import reuse

            return reuse.main(options.reuse)
        if options.test is not None:
            return 0 if run_tests(options.test) else 1
        run(options)
        return 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # as in `./run_all.sh | head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RunError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
