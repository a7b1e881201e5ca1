"""The command line: ``python -m lib run | study | train | reuse | test``.

``./run_all.sh [options]`` finds a Python that has the packages, then does ``run`` with the same
options; ``--study``, ``--reuse RUN`` and ``--test`` are the other commands. The top imports the
standard library alone: run_all.sh checks the options before it installs anything."""

import argparse
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import traceback
import zipfile
from argparse import ArgumentTypeError, Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from lib import notebooks as nb
from lib.notebooks import ROOT, Notebooks, RunError, UsageError

COMMANDS = ("run", "study", "train", "reuse", "test")
DRAWN = ("phantom", "digits", "digits-turned")  # sources that need no file and no network
SOURCES = (*DRAWN, "chestmnist", "kaggle", "kaggle-sample")
CLUSTERERS = ("kmeans", "minibatch", "hierarchical", "graph", "sinkhorn", "consensus")
DEVICES = ("auto", "cpu", "cuda")
READING = ("csv", "image_column", "label_column", "fit", "drop_outliers", "max_broken")
MORE = """\
sources of X-rays, for --data:
  phantom          drawn X-rays with known findings (the default)
  digits           1,797 handwritten digits, whose classes are known; digits-turned: each turned
  chestmnist       NIH's 112,120 X-rays at 64x64, 0.4 GB from Zenodo; or chestmnist:FILE.npz
  kaggle           the same at full size, with patients and views, 45 GB; needs a free account
  kaggle-sample    5,606 of them, 2 GB
  nih:PATH         a folder of NIH's own files: images_001.tar.gz and so on, Data_Entry_2017*.csv
  PATH             a folder of your own X-rays; or a file of embeddings, .npz or .parquet

other commands, each with --help:
  ./run_all.sh --study [options]      train every arm and control, then compare them
  ./run_all.sh --reuse RUN [options]  assign X-rays to the clusters of a finished run
  ./run_all.sh --test [ARG ...]       run checks, tests and notebooks; ARGs go to pytest

environment variables: PYTHON (to use, or to make .venv with), CXR_DATA_DIR, CXR_FIGURES_DIR"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def __init__(self, **options) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=raw, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def caller() -> Path:
    """The folder from which the command was given, which run_all.sh leaves."""
    return Path(os.environ.get("CXR_CALLED_FROM") or Path.cwd())


def seed_list(text: str) -> list[int]:
    """``"0,1,2"`` -> [0, 1, 2]."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text) or len({*text.split(",")}) <= text.count(","):
        raise ArgumentTypeError(f"{text!r} is no list of different whole numbers, such as 0,1,2")
    return [int(seed) for seed in text.split(",")]


def source_of(given: str) -> str:
    """`given` with its path made absolute."""
    if given in SOURCES:
        return given
    kind, colon, place = given.partition(":")
    if not colon or kind not in ("nih", "chestmnist", "embeddings"):
        kind, place = "", given
    path = os.path.abspath(caller() / Path(place).expanduser())
    if not kind and (end := Path(path).suffix.lower()) in (".npz", ".parquet"):
        arrays = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else ()
        kind = "embeddings" if end != ".npz" or "embeddings.npy" in arrays else "chestmnist"
    wanted = "folder" if kind in ("nih", "") else "file"
    if not place or not (os.path.isfile if wanted == "file" else os.path.isdir)(path):
        reason = f"no {wanted}" if place and os.path.exists(path) else "not there"
        valid = f"{', '.join(SOURCES)}, chestmnist:FILE.npz, nih:PATH, or a folder of X-rays"
        raise ArgumentTypeError(f"{given!r} is {reason}; valid: {valid}")
    return f"{kind}:{path}" if kind else path


def path_in(source: str) -> str:
    """The path in a source, empty if it has none."""
    return "" if source in SOURCES else re.sub("^(nih|chestmnist|embeddings):", "", source)


def dataset_name(source: str, preset: str = "quick") -> str:
    """Name of a source's folders under data/ and figures/: ``phantom``, ``nih-sample-smoke``, ...
    The quick preset adds nothing. Any other is a suffix, which keeps its results apart."""
    name = source
    if source not in SOURCES:
        name = re.sub(r"(?i)\.(npz|parquet)$", "", Path(path_in(source)).name)
        name = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._")[:48] or "images"
        taken = name in {"raw", "runs", "published", "manifests", *SOURCES}  # other folders' names
        name = f"my-{name}" if taken or name.startswith(DRAWN) else name
    return name if preset == "quick" else f"{name}-{preset}"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    folder, common = Parser(add_help=False), Parser(add_help=False)
    add = folder.add_argument  # how to read a folder of X-rays: run, study and reuse
    add("--csv", metavar="FILE", help="table of your folder, if it has several")
    add("--image-column", metavar="NAME", help="its column of file names or paths")
    add("--label-column", metavar="NAME", help="its column of labels, separated by | ; or ,")
    add("--fit", choices=("pad", "crop", "stretch"), help="for images that are not square: pad")
    add("--drop-outliers", action="store_const", const=True, help="no dark, bright, empty images")
    add("--max-broken", type=float, metavar="SHARE", help="go on if so many are broken: 0.01")
    add = common.add_argument  # what to compute: run and study
    presets = sorted(path.stem for path in (ROOT / "notebooks" / "params").glob("*.yaml"))
    add("--preset", choices=presets, default="quick", help="how much to compute: quick")
    add("--data", type=source_of, default="phantom", metavar="SOURCE", help="X-rays: phantom")
    add("--seeds", type=seed_list, metavar="0,1", help="seeds to train with")
    add("--clusterer", choices=CLUSTERERS, help="instead of K-means")
    add("--device", choices=DEVICES, help="where to train")
    add("--restart", action="store_true", help="compute anew; other runs are moved aside")

    parser = Parser(prog="python -m lib")
    commands = parser.add_subparsers(dest="command", required=True)
    about = "Run all notebooks, unless all is done; figures and tables go to figures/DATASET."
    run = commands.add_parser("run", parents=[common, folder], description=about, epilog=MORE)
    run.add_argument("--nproc", type=int, metavar="N", help="processes that train each run")
    start = {"dest": "start", "metavar": "NN", "help": "run from this notebook on"}
    start |= {"choices": [path.name[:2] for path in nb.find_notebooks()]}
    run.add_argument("--from", type=lambda text: text.zfill(2), **start)

    about = "Train every arm and control, then compare them (notebooks 04 to 06)."
    add = commands.add_parser("study", parents=[common, folder], description=about).add_argument
    add("--arms", default="all", help="all, arms, controls, published, or names, with commas")
    add("--jobs", type=int, metavar="N", default=1, help="runs at a time: 1")
    add("--dataset", help="name under data/ and figures/, if not that of --data and --preset")
    add("--status", action="store_true", help="only show what is missing")
    add("--no-claims", action="store_true", help="train only")
    add("--redraw", action="store_true", help="only figures and claims, of published numbers, too")

    add = commands.add_parser("train", description="Train one run, also in torchrun.").add_argument
    add("--images", required=True, metavar="FILE", help="images.npy that 01_preprocess wrote")
    add("--run-dir", required=True, metavar="DIR", help="folder of the run")
    add("--config", required=True, metavar="JSON", help="file with the settings of TrainConfig")
    add("--labels", metavar="FILE", help=".npy, .npz or .csv of a cluster per image, to train on")
    add("--restart", action="store_true", help="move a run that is there aside")

    about = "Use a finished run again, without training."
    reuse = commands.add_parser("reuse", parents=[folder], description=about)
    reuse.add_argument("run", metavar="RUN", help="its folder, DATASET/ARM/seed0, or an export")
    reuse.add_argument("--device", choices=DEVICES[1:], default="cpu", help="where to embed: cpu")
    add = reuse.add_mutually_exclusive_group(required=True).add_argument
    add("--data", type=source_of, metavar="PATH", help="assign this folder of X-rays to clusters")
    add("--export", metavar="DIR", help="write weights, settings and assignments here")
    commands.add_parser("test", description="Run ruff, pytest and all notebooks.")
    return parser


def parse(argv: Sequence[str]) -> Namespace:
    """What a command line asks for, checked: a command of `COMMANDS` and its options, or what
    ./run_all.sh is given. SystemExit with one line on stderr if something is wrong."""
    argv = list(argv)
    if argv[:1] in (["test"], ["--test"]):
        return Namespace(command="test", arguments=argv[1:])
    if not argv or argv[0] not in COMMANDS:
        command = next((name for name in ("reuse", "study") if f"--{name}" in argv), "run")
        argv = [command, *(word for word in argv if word != f"--{command}")]
    parser = build_parser()
    options = parser.parse_args(argv)
    for name in ("nproc", "jobs"):
        if getattr(options, name, None) not in (None, *range(1, 10_000)):
            parser.error(f"--{name} {getattr(options, name)} is not from 1 to 9999")
    if getattr(options, "data", None) is None:
        return options
    own = os.path.isabs(options.data)
    if not own and options.command in ("reuse", "study" * options.data.startswith("embeddings:")):
        parser.error(f"{options.command} reads a folder of X-rays, not --data {options.data}")
    for name in READING[:3]:
        if getattr(options, name) is not None and not own:
            parser.error(f"--{name.replace('_', '-')} is for a folder of X-rays: give --data PATH")
    if options.csv is not None:
        places = [base / Path(options.csv).expanduser() for base in (caller(), Path(options.data))]
        files = [os.path.abspath(place) for place in places if place.is_file()]
        if not files:
            parser.error(f"--csv {options.csv!r} is no file here, nor in {options.data}")
        options.csv = files[0]
    if options.command != "reuse":
        name = dataset_name(options.data, options.preset)
        options.dataset = getattr(options, "dataset", None) or name
    return options


def command_line(options: Namespace) -> str:
    """The command as results show it: a folder goes by its name, since its path is private."""
    if getattr(options, "redraw", False):
        return f"./run_all.sh --study --redraw --dataset {options.dataset}"
    path = path_in(options.data)
    source = f"{options.data.removesuffix(path)}PATH/{Path(path).name}" if path else options.data
    table = options.csv and Path(options.csv).name
    words = ["./run_all.sh"] + ["--study"] * (options.command == "study")
    for name, value in (vars(options) | {"data": source, "csv": table}).items():
        if value in (None, False) or name in ("command", "dataset", "restart", "start", "jobs"):
            continue
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        quoted = text if name == "data" else shlex.quote(text)
        words += [f"--{name.replace('_', '-')}", *[quoted] * (value is not True)]
    return " ".join(words)


def notebooks_of(options: Namespace) -> Notebooks:
    """The notebooks with the preset's parameters, or what the command line gives in their place."""
    given = vars(options) | {"source": options.data, "not_square": options.fit}
    given |= {"command": command_line(options)}
    given = {name: value for name, value in given.items() if value is not None}
    inputs = [Path(place) for place in (path_in(options.data), options.csv) if place]
    return Notebooks(nb.read_preset(options.preset) | given, inputs)


def get_ready(options: Namespace, parameters: Mapping) -> None:
    """Look for the device, and download here: a terminal shows how far that is."""
    try:
        if options.device not in (None, "auto", "cpu"):
            from lib.parallel import resolve_device

            resolve_device(options.device)
        if options.data.startswith("embeddings:"):
            from lib.explore import explorer

            print(explorer.of_file(path_in(options.data), options.dataset, parameters))
        elif options.data not in DRAWN and not os.path.isabs(options.data):
            from lib import paths
            from lib.data.sources import fetch

            raw, what = paths.raw_dir(options.dataset), ("n_phantoms", "data_seed")
            fetch(options.data, raw, *(parameters[name] for name in what), options.csv)
    except (ValueError, RuntimeError) as error:
        raise RunError(str(error)) from error


def run(options: Namespace) -> None:
    """Run the notebooks, unless all is done, and say where the figures are."""
    notebooks, start = notebooks_of(options), options.start or "00"
    if options.data.startswith("embeddings:"):  # nothing to train
        return get_ready(options, notebooks.parameters)
    print(f"{options.dataset}, preset {options.preset}; logs: {notebooks.copies}", flush=True)
    if not (options.restart or options.start) and notebooks.are_done():
        print("already done")
    else:
        for earlier in nb.find_notebooks()[: int(start)]:
            notebooks.check_done(earlier)
        get_ready(options, notebooks.parameters)
        notebooks.run(nb.find_notebooks(start))
        notebooks.remember()
    figures = notebooks.folders[2]
    for table in figures.glob("table1_linear_probe.md"):
        print(f"\n{table.read_text(encoding='utf-8').strip()}")
    print(f"\nFigures and tables: {figures}")


def study(options: Namespace) -> None:
    """Train the runs that are missing, `jobs` at a time, then run notebooks 04 to 06."""
    from lib import paths
    from lib.parallel import run_processes
    from lib.study import arms

    notebooks, seeds = notebooks_of(options), options.seeds or [0, 1, 2, 3, 4]
    dataset, preset, failed = options.dataset, notebooks.parameters, []
    try:
        chosen = arms.choose_arms(options.arms)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.status:
        return print(arms.status(dataset, preset, chosen, seeds).to_string())
    if options.redraw:
        return notebooks.run(nb.find_notebooks("05", "06"))
    get_ready(options, preset)
    notebooks.run(nb.find_notebooks("00", "01"))
    runs = arms.missing_runs(dataset, preset, chosen, seeds)
    if options.restart:
        runs = [(arm, seed) for seed in seeds for arm in chosen]
    commands, logs = {}, {}
    for arm, seed in runs:
        log = logs[f"{arm} seed {seed}"] = arms.log_path(dataset, arm, seed)
        settings = log.with_suffix(".json")
        paths.save_json(settings, dataclasses.asdict(arms.train_config(arm, preset, seed)))
        words = ["--config", settings, "--run-dir", paths.run_dir(dataset, arm, seed)]
        words += ["--images", paths.dataset_dir(dataset) / "images.npy"]
        words += ["--restart"] * options.restart
        commands[f"{arm} seed {seed}"] = [sys.executable, "-m", "lib", "train", *map(str, words)]

    def on_end(name: str, error: Exception | None) -> None:
        failed.extend([name] if error else [])
        print(f"{name}: {f'failed, see {logs[name]}' if error else 'done'}", flush=True)

    print(f"{dataset}: {len(runs)} runs to train, {options.jobs} at a time", flush=True)
    run_processes(commands, options.jobs, logs.get, on_end)
    print(arms.status(dataset, preset, chosen, seeds).to_string(), flush=True)
    if not options.no_claims:
        notebooks.run(nb.find_notebooks("04", "06"))
        print(f"Figures and tables: {notebooks.folders[2]}")
    if failed:
        raise RunError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")


def train(options: Namespace) -> None:
    """Train one run in this process, which may be one of several that torchrun started."""
    import numpy as np
    from torch.distributed.elastic.multiprocessing.errors import record

    from lib import paths
    from lib.data.embeddings import read_clusters
    from lib.deepcluster import TrainConfig, fit

    try:
        config = TrainConfig(**paths.load_json(options.config))
        images = np.load(options.images, mmap_mode="r", allow_pickle=False)
        groups = options.labels and read_clusters(options.labels, options.images, config)
        # record shows torchrun the traceback of the process that failed first
        record(fit)(images, config, options.run_dir, groups=groups, restart=options.restart)
    except Exception as error:
        if not (options.labels and isinstance(error, ValueError)):  # which a person reads
            traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RunError(f"{what} ({options.config})") from error


def reuse(options: Namespace) -> None:
    """Assign a folder of X-rays to the clusters of a finished run, or export the run."""
    from lib import paths
    from lib.explore import reuse as finished

    runs = paths.data_root() / "runs"
    places = [caller() / Path(options.run).expanduser(), runs / options.run]
    folder = next(filter(Path.is_dir, places), None)
    if folder is None:
        there = [p.parent.relative_to(runs) for p in runs.glob("*/*/seed*/clustering.npz")]
        known = ", ".join(sorted(path.as_posix() for path in there)[:12]) or "none is there"
        raise UsageError(f"{options.run!r} is no run; finished runs: {known}")
    try:
        if options.export is not None:
            out = caller() / Path(options.export).expanduser()
            return print(*finished.export(folder, out), sep="\n")
        model = finished.load(folder, options.device)
        out = paths.runs_dir(dataset_name(options.data)) / "reuse" / model.name.replace("/", "-")
        reading = {name: vars(options)[name] for name in READING if vars(options)[name] is not None}
        command = f"./run_all.sh --data PATH/{Path(options.data).name} --reuse {model.name}"
        print(finished.assign_folder(options.data, model, out, command, **reading)[2])
        print(f"Written: {', '.join(str(path) for path in sorted(out.glob('*.*')))}")
    except (ValueError, RuntimeError) as error:
        raise RunError(str(error)) from error


def test(options: Namespace) -> None:
    """Run ruff, pytest and, unless ARGs choose some tests, all notebooks in a fresh folder."""
    from xml.etree import ElementTree

    counts = Counter(passed=0, failed=0, skipped=0)
    with tempfile.TemporaryDirectory(prefix="cxr-test-", ignore_cleanup_errors=True) as folder:
        report, notebooks = Path(folder, "report.xml"), (ROOT / "notebooks").glob("*.ipynb")
        pytest = ["pytest", "-rs", f"--junitxml={report}"]
        nbval = ["-p", "no:cacheprovider", "-W", "default", "--nbval-lax", "--nbval-current-env"]
        fresh = {"CXR_DATA_DIR": f"{folder}/data", "CXR_FIGURES_DIR": f"{folder}/figures"}
        steps = [(["ruff", "check", "."], {}), (["ruff", "format", "--check", "."], {})]
        steps += [([*pytest, "-m", "", *options.arguments], {"MPLBACKEND": "Agg"})]
        steps += [([*pytest, *nbval, *sorted(map(str, notebooks))], fresh)]
        for command, extra in steps[: 3 if options.arguments else 4]:
            report.unlink(missing_ok=True)
            command = [sys.executable, "-m", *command]
            status = subprocess.call(command, cwd=ROOT, env=os.environ | extra)
            found = ElementTree.parse(report).iter("testsuite") if report.exists() else ()
            suite = next((one.attrib for one in found), {"tests": "1"})
            names = ("tests", "skipped", "failures", "errors")
            total, skipped, failures, errors = (int(suite.get(name, 0)) for name in names)
            bad = max(failures + errors, int(status != 0))
            counts.update(passed=max(total - skipped - bad, 0), failed=bad, skipped=skipped)
    print(", ".join(f"{count} {name}" for name, count in counts.items()), flush=True)
    if counts["failed"]:
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 1 if something failed, 2 for a bad option. After
    ``--check`` a command is only looked at, for run_all.sh: 3 if packages are missing."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for consoles that lack a character
    only_check = argv[:1] == ["--check"]
    options = parse(argv[only_check:])
    try:
        if missing := nb.missing_packages(options.command == "test"):
            lacks = f"{sys.executable} lacks {', '.join(missing)}: use ./run_all.sh"
            print(lacks, file=sys.stdout if only_check else sys.stderr)
            return 3
        if only_check:
            return 0
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
                signal.signal(number, lambda number, _: sys.exit(128 + number))
        if options.command != "train":
            nb.prepare_environment(caller())
        globals()[options.command](options)
        return 0
    except BrokenPipeError:  # as in `./run_all.sh | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, RunError, OSError) as error:
        hint = "; choose other folders with CXR_DATA_DIR and CXR_FIGURES_DIR"
        hint *= isinstance(error, PermissionError) and "CXR_" not in str(error)
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
