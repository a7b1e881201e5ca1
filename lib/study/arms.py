"""The study: which arms and controls there are, what is missing, and the command that trains them
side by side.

    python -m lib.study.arms --preset quick --seeds 0,1,2,3,4 --jobs 2

Each run is one call of `lib.deepcluster.fit` in a process of its own, and not a notebook: there is
nothing in it to look at, a kernel would cost seconds and memory a run, and a process that dies
takes no other with it. Runs that are done are skipped, broken-off ones go on."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pandas as pd

from lib import paths
from lib.memory import CGROUP_LIMITS, memory_limit
from lib.run import RunError, UsageError
from lib.runs import TrainConfig, is_complete

WIDTH_OF = {"alexnet": "alexnet_width"}  # every other backbone takes P4M's
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Arm:
    """One arm of the study: what differs from the preset's settings.

    Attributes
    ----------
    title : str
    backbone : str
        A key of ``lib.models.BACKBONES``.
    rotation : bool
        Train on images turned by the preset's ``rotation_degrees``.
    pseudo_labels : str
        See ``TrainConfig``.
    untrained : bool
        No epoch of training.
    kind : {"arm", "control", "published"}
        ``"published"`` arms follow the published code instead of being matched to the others.
    changes : tuple of (str, value)
        Other fields of ``TrainConfig``.
    """

    title: str
    backbone: str
    rotation: bool = False
    pseudo_labels: str = "clusters"
    untrained: bool = False
    kind: str = "arm"
    changes: tuple[tuple[str, Any], ...] = ()


ARMS: dict[str, Arm] = {
    "alexnet": Arm("AlexNet, rotation augmentation", "alexnet", rotation=True),
    "p4m": Arm("P4M, no augmentation", "p4m"),
    "alexnet-plain": Arm("AlexNet, no augmentation", "alexnet"),
    "p4m-rotation": Arm("P4M, rotation augmentation", "p4m", rotation=True),
    "p4": Arm("P4, no augmentation", "p4"),
    "cnn_params": Arm("plain CNN, P4M's parameters, no augmentation", "cnn_params"),
    "cnn_params-rotation": Arm(
        "plain CNN, P4M's parameters, rotation augmentation", "cnn_params", rotation=True
    ),
    "cnn_flops": Arm("plain CNN, P4M's FLOPs, no augmentation", "cnn_flops"),
    "cnn_flops-rotation": Arm(
        "plain CNN, P4M's FLOPs, rotation augmentation", "cnn_flops", rotation=True
    ),
    "alexnet-untrained": Arm(
        "AlexNet, untrained", "alexnet", rotation=True, untrained=True, kind="control"
    ),
    "p4m-untrained": Arm("P4M, untrained", "p4m", untrained=True, kind="control"),
    "p4-untrained": Arm("P4, untrained", "p4", untrained=True, kind="control"),
    "cnn_params-untrained": Arm(
        "plain CNN, P4M's parameters, untrained", "cnn_params", untrained=True, kind="control"
    ),
    "cnn_flops-untrained": Arm(
        "plain CNN, P4M's FLOPs, untrained", "cnn_flops", untrained=True, kind="control"
    ),
    "alexnet-index": Arm(
        "AlexNet, labels index mod K",
        "alexnet",
        rotation=True,
        pseudo_labels="index",
        kind="control",
    ),
    "p4m-index": Arm("P4M, labels index mod K", "p4m", pseudo_labels="index", kind="control"),
    "alexnet-shuffled": Arm(
        "AlexNet, labels shuffled once",
        "alexnet",
        rotation=True,
        pseudo_labels="shuffled",
        kind="control",
    ),
    "p4m-shuffled": Arm(
        "P4M, labels shuffled once", "p4m", pseudo_labels="shuffled", kind="control"
    ),
    # DEVIATIONS.md says what of the published code these follow, and what not
    "alexnet-published": Arm(
        "AlexNet, after the published code",
        "alexnet",
        rotation=True,
        pseudo_labels="shuffled",
        kind="published",
        changes=(("pca_dim", 64), ("weight_decay", 1e-5)),
    ),
    "p4m-published": Arm(
        "P4M, after the published code",
        "p4m",
        pseudo_labels="index",
        kind="published",
        changes=(("pca_dim", 128), ("weight_decay", 1e-4)),
    ),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "all": tuple(name for name, arm in ARMS.items() if arm.kind != "published"),
    "arms": tuple(name for name, arm in ARMS.items() if arm.kind == "arm"),
    "controls": tuple(name for name, arm in ARMS.items() if arm.kind == "control"),
    "published": tuple(name for name, arm in ARMS.items() if arm.kind == "published"),
}
# settings in which runs must agree to be compared
MATCHED = (
    "n_clusters",
    "pca_dim",
    "batch_size",
    "lr",
    "weight_decay",
    "reset_top_layer",
    "uniform_sampling",
    "data",
)


def title(arm: str) -> str:
    """How figures and tables name an arm."""
    return {"pixels": "raw pixels, PCA", "random": "random assignments"}.get(arm) or (
        ARMS[arm].title if arm in ARMS else arm
    )


def train_config(
    arm: str, preset: Mapping[str, Any], seed: int, device: str | None = None
) -> TrainConfig:
    """Settings of an arm: the preset's, with what `ARMS` changes.

    Parameters
    ----------
    arm : str
        A key of `ARMS`.
    preset : mapping
        Contents of a file in ``notebooks/params/``.
    seed : int
    device : str, optional
        Instead of the preset's.

    Raises
    ------
    ValueError
        Unknown arm, or a value that ``TrainConfig`` refuses.
    """
    if arm not in ARMS:
        raise ValueError(
            f"arm {arm!r} is unknown; choose from {', '.join(ARMS)}, or {', '.join(GROUPS)}"
        )
    chosen = ARMS[arm]
    settings = {
        name: preset[name]
        for name in ("n_clusters", "pca_dim", "epochs", "batch_size", "lr", "weight_decay")
    }
    settings |= {
        "backbone": chosen.backbone,
        "width": tuple(preset[WIDTH_OF.get(chosen.backbone, "p4m_width")]),
        "rotation_degrees": float(preset["rotation_degrees"]) if chosen.rotation else 0.0,
        "pseudo_labels": chosen.pseudo_labels,
        "seed": seed,
        "device": device or preset.get("device", "auto"),
    }
    if chosen.untrained:
        settings["epochs"] = 0
    return TrainConfig(**{**settings, **dict(chosen.changes)})


def choose_arms(names: str) -> list[str]:
    """``"all"`` or ``"p4m,published"`` -> arms, in the order of `ARMS`; ValueError for an unknown
    one.
    """
    chosen: set[str] = set()
    for name in filter(None, names.split(",")):
        if name not in GROUPS and name not in ARMS:
            raise ValueError(
                f"arm {name!r} is unknown; choose from {', '.join(ARMS)}, or {', '.join(GROUPS)}"
            )
        chosen |= set(GROUPS.get(name, (name,)))
    if not chosen:
        raise ValueError(f"no arm is named; choose from {', '.join(ARMS)}, or {', '.join(GROUPS)}")
    return [name for name in ARMS if name in chosen]


# --- what is there --------------------------------------------------------------------------------


def log_path(dataset: str, arm: str, seed: int) -> Path:
    """What the process of a run said."""
    return paths.runs_dir(dataset) / "logs" / f"{arm}-seed{seed}.log"


def _same(stored: Mapping[str, Any], config: TrainConfig) -> bool:
    wanted = dataclasses.asdict(config) | {"width": list(config.width or ())}
    stored = {"pseudo_labels": "clusters", **stored}  # older runs had no such setting
    return all(
        stored.get(name) == value
        for name, value in wanted.items()
        if name not in ("device", "epochs")
    )


def state(dataset: str, arm: str, config: TrainConfig) -> str:
    """How far a run is: ``done``, ``epoch 3 of 10``, ``other settings``, ``failed: <why>`` or
    ``missing``.
    """
    folder = paths.run_dir(dataset, arm, config.seed)
    stored = paths.load_json(folder / "config.json") if (folder / "config.json").exists() else None
    if stored is not None:
        if not _same(stored, config):
            return "other settings"
        if is_complete(folder, config):
            return "done"
    log = log_path(dataset, arm, config.seed)
    if log.exists():
        last = [
            line
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ][-1:]
        if last and last[0].startswith("error: "):
            return f"failed: {last[0].removeprefix('error: ')}"
    if stored is not None and (folder / "metrics.csv").exists():
        return f"epoch {len(pd.read_csv(folder / 'metrics.csv'))} of {config.epochs}"
    return "missing"


def status(
    dataset: str, preset: Mapping[str, Any], arms: Iterable[str], seeds: Iterable[int]
) -> pd.DataFrame:
    """`state` of every run of a study: one row an arm, one column a seed."""
    return pd.DataFrame(
        {
            seed: {arm: state(dataset, arm, train_config(arm, preset, seed)) for arm in arms}
            for seed in seeds
        }
    )


def status_markdown(table: pd.DataFrame, longest: int = 40) -> str:
    """`status` as a Markdown table."""
    lines = [
        "| arm | " + " | ".join(f"seed {seed}" for seed in table) + " |",
        "|---|" + "---|" * table.shape[1],
    ]
    for arm, row in table.iterrows():
        cells = [text if len(text) <= longest else text[: longest - 3] + "..." for text in row]
        lines.append(f"| {arm} | " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def finished(dataset: str) -> tuple[dict[str, dict[int, Path]], list[str]]:
    """The finished runs of a dataset that can be compared, and what is left out.

    Runs are compared with the first finished one of P4M or AlexNet: they must agree in `MATCHED`,
    and in the number of epochs unless they are untrained. Arms of P4M's layout must agree in width.
    Published arms have settings of their own and are not held to this.

    Returns
    -------
    runs : dict of arm to dict of seed to Path
        In the order of `ARMS`.
    left_out : list of str
        One line for each run that is unfinished or not matched, with the reason.

    Raises
    ------
    FileNotFoundError
        No finished run of P4M or AlexNet.
    """
    root = paths.runs_dir(dataset)
    runs: dict[str, dict[int, Path]] = {}
    stored: dict[Path, dict[str, Any]] = {}
    left_out = []
    for arm in ARMS:
        folders = sorted(
            (f for f in (root / arm).glob("seed*") if f.name[4:].isdecimal()),
            key=lambda f: int(f.name[4:]),
        )
        for folder in folders:
            if not (folder / "config.json").exists():
                continue
            config = paths.load_json(folder / "config.json")
            with contextlib.suppress(
                OSError, ValueError, KeyError
            ):  # a broken file is an unfinished run
                if is_complete(folder, SimpleNamespace(epochs=config["epochs"])):
                    runs.setdefault(arm, {})[int(folder.name[4:])] = folder
                    stored[folder] = config
                    continue
            left_out.append(f"{arm} seed {folder.name[4:]}: not finished")
    first = next(
        (folder for arm in ("p4m", "alexnet") for folder in runs.get(arm, {}).values()), None
    )
    if first is None:
        raise FileNotFoundError(
            f"{paths.show(root)} holds no finished run of p4m or alexnet: run 02_train_alexnet and 03_train_p4m first"
        )
    widths = {
        ARMS[arm].backbone == "alexnet": stored[next(iter(by_seed.values()))]["width"]
        for arm, by_seed in reversed(runs.items())
    }
    for arm in list(runs):
        if ARMS[arm].kind == "published":
            continue
        for seed, folder in list(runs[arm].items()):
            ours, reference = stored[folder], stored[first]
            differ = [name for name in MATCHED if ours.get(name) != reference.get(name)]
            differ += (
                ["epochs"]
                if not ARMS[arm].untrained and ours["epochs"] != reference["epochs"]
                else []
            )
            differ += ["width"] if ours["width"] != widths[ARMS[arm].backbone == "alexnet"] else []
            if differ:
                left_out.append(
                    f"{arm} seed {seed}: other {', '.join(differ)} than {first.parent.name} {first.name}"
                )
                del runs[arm][seed]
        if not runs[arm]:
            del runs[arm]
    return runs, left_out


@dataclass(frozen=True)
class Gathered:
    """What is known of a study: everything `lib.study.claims.assemble` and the figures need.

    Attributes
    ----------
    runs : dict of arm to dict of seed to Path
        Finished, matched runs.
    values, details, scores : dict of arm to dict of seed to mapping
        See `lib.study.measure.of_run` and `lib.study.measure.scores_of`; with the arms ``pixels``
        and ``random``.
    arms : dict of arm to dict
        Title, kind, backbone, rotation, pseudo_labels, parameters, feature_dim, flops.
    missing : list of str
        Runs left out, and arms of the study of which there is none.
    """

    runs: dict[str, dict[int, Path]]
    values: dict[str, dict[int, dict[str, float | None]]]
    details: dict[str, dict[int, dict[str, Any]]]
    scores: dict[str, dict[int, dict[str, Any]]]
    arms: dict[str, dict[str, Any]]
    missing: list[str]


# of a process that measures, and of the one that started it: most of the 0.6 GB is PyTorch and
# scikit-learn, the rest is room for JupyterLab. So Binder, which gives 2 GB and about one core,
# measures in one process.
PROCESS_BYTES = 900e6


def affordable_jobs(jobs: int, files: Sequence[str] = CGROUP_LIMITS) -> int:
    """As many of `jobs` processes as fit beside this one into what `memory_limit`, which takes
    `files`, allows; 1 at least.
    """
    limit = memory_limit(files)
    return jobs if limit is None else max(1, min(jobs, int(limit // PROCESS_BYTES) - 1))


def gather(
    dataset: str, images: Any, metadata: pd.DataFrame, jobs: int = 1, effort: Any = None
) -> Gathered:
    """Collect the finished runs of a dataset, measuring those that were not measured yet.

    Parameters
    ----------
    dataset : str
    images : ndarray uint8, shape (N, 64, 64)
    metadata : DataFrame, N rows
    jobs : int
        Processes that measure, each on one thread if more than one; fewer where memory is limited
        (`affordable_jobs`).
    effort : lib.measures.Effort, optional

    Raises
    ------
    FileNotFoundError
        As `finished`.
    """
    from joblib import Parallel, delayed
    from joblib.externals.loky import get_reusable_executor

    from lib.models import cost
    from lib.runs import load_run
    from lib.study import measure as measures

    effort = effort or measures.Effort()
    runs, left_out = finished(dataset)
    turned = measures.turned_phantoms(dataset, images)
    reference = next(by_seed for arm, by_seed in runs.items() if arm in ("p4m", "alexnet"))
    tasks: dict[tuple[str, int], Any] = {}
    for arm, by_seed in runs.items():
        for seed, folder in by_seed.items():
            tasks[arm, seed] = delayed(_measure_run)(folder, images, metadata, turned, effort)
    for arm in (measures.PIXELS, measures.RANDOM):
        for seed, folder in reference.items():
            config = load_run(folder).config
            tasks[arm, seed] = delayed(_measure_baseline)(
                paths.run_dir(dataset, arm, seed),
                images,
                metadata,
                config,
                turned,
                effort,
                arm == measures.RANDOM,
            )
    jobs = affordable_jobs(min(jobs, len(tasks)))
    found = dict(zip(tasks, Parallel(n_jobs=jobs)(tasks.values()), strict=True))
    if jobs > 1:  # they would sit there for five minutes more, with their memory
        get_reusable_executor().shutdown(wait=True)
    values: dict[str, dict[int, Any]] = {}
    details: dict[str, dict[int, Any]] = {}
    scores: dict[str, dict[int, Any]] = {}
    for (arm, seed), numbers in found.items():
        values.setdefault(arm, {})[seed] = numbers["values"]
        details.setdefault(arm, {})[seed] = numbers["details"]
        scores.setdefault(arm, {})[seed] = measures.scores_of(paths.run_dir(dataset, arm, seed))
    arms = {}
    for arm in values:
        arms[arm] = {
            "title": title(arm),
            "kind": "control",
            "backbone": arm,
            "rotation": False,
            "pseudo_labels": "none",
        }
        arms[arm] |= {"parameters": 0, "feature_dim": int(images[0].size), "flops": 0}
        if arm in runs:
            config = load_run(next(iter(runs[arm].values()))).config
            spent = cost(config.backbone, config.n_clusters, config.width)
            trained = config.pseudo_labels if config.epochs else "nothing"
            arms[arm] |= {
                "kind": ARMS[arm].kind,
                "backbone": config.backbone,
                "rotation": config.rotation_degrees > 0 and config.epochs > 0,
            }
            arms[arm] |= {"pseudo_labels": trained} | {
                name: spent[name] for name in ("parameters", "feature_dim", "flops")
            }
    absent = [
        f"{arm}: no finished run ({ARMS[arm].title})" for arm in GROUPS["all"] if arm not in runs
    ]
    return Gathered(runs, values, details, scores, arms, [*left_out, *absent])


def _measure_run(
    folder: Path, images: Any, metadata: pd.DataFrame, turned: Any, effort: Any
) -> dict[str, Any]:
    from lib.runs import load_run
    from lib.study import measure as measures

    return measures.of_run(load_run(folder), images, metadata, turned, effort)


def _measure_baseline(
    folder: Path,
    images: Any,
    metadata: pd.DataFrame,
    config: TrainConfig,
    turned: Any,
    effort: Any,
    at_random: bool,
) -> dict[str, Any]:
    from lib.study import measure as measures

    return measures.of_pixels(folder, images, metadata, config, turned, effort, at_random=at_random)


def trained_on_turned(dataset: str) -> dict[str, dict[int, dict[str, float | None]]]:
    """Measured values of runs that were trained on phantoms hung in any orientation,
    ``<dataset>-any``; empty if there are none.
    """
    from lib.study.measure import NAME

    try:
        runs, _ = finished(f"{dataset}-any")
    except FileNotFoundError:
        return {}
    there = {
        arm: {seed: folder / NAME for seed, folder in by_seed.items() if (folder / NAME).exists()}
        for arm, by_seed in runs.items()
    }
    return {
        arm: {seed: paths.load_json(path)["values"] for seed, path in by_seed.items()}
        for arm, by_seed in there.items()
        if by_seed
    }


# --- running --------------------------------------------------------------------------------------


def prepare(
    dataset: str, source: str, n_phantoms: int, seed: int, orientation: str = "upright"
) -> None:
    """Put images and labels of `dataset` into place, as notebooks 00 and 01 do; what is there for
    the same source is kept.
    """
    from lib import data

    data.fetch(
        source, paths.raw_dir(dataset), n_phantoms=n_phantoms, seed=seed, orientation=orientation
    )
    data.preprocess(paths.raw_dir(dataset), paths.dataset_dir(dataset))


def do_run(dataset: str, arm: str, config: TrainConfig, restart: bool = False) -> None:
    """Train one run, or what is left of it, then measure it. Labels are opened only after training."""
    from lib import data
    from lib.deepcluster import fit
    from lib.study import measure as measures

    images = data.load_images(paths.dataset_dir(dataset))
    run = fit(
        images, config, paths.run_dir(dataset, arm, config.seed), restart=restart, progress=False
    )
    images, metadata = data.load(paths.dataset_dir(dataset))
    measures.of_run(run, images, metadata, turned=measures.turned_phantoms(dataset, images))


def fan_out(
    commands: Mapping[str, tuple[Sequence[str], Path]],
    jobs: int,
    environment: Mapping[str, str],
    on_end: Any = lambda name, status, seconds: None,
) -> list[str]:
    """Run commands, `jobs` at a time, each with its output in a log; one that fails stops no other.

    Parameters
    ----------
    commands : mapping of name to (command, log)
    jobs : int
    environment : mapping
    on_end : callable
        Called with name, exit status and seconds of each.

    Returns
    -------
    list of str
        Names of those that failed. However this is left, no command runs on.
    """
    waiting, running, failed = list(commands), {}, []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                command, log = commands[name]
                log.parent.mkdir(parents=True, exist_ok=True)
                with open(log, "w", encoding="utf-8") as handle:
                    process = subprocess.Popen(
                        command,
                        cwd=paths.ROOT,
                        env=dict(environment),
                        stdin=subprocess.DEVNULL,
                        stdout=handle,
                        stderr=subprocess.STDOUT,
                    )
                running[name] = (process, time.monotonic())
            time.sleep(0.05)
            for name, (process, begin) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    failed += [name] if process.returncode else []
                    on_end(name, process.returncode, time.monotonic() - begin)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return failed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    from lib.run import checked_source, dataset_name

    about = "Train and measure every arm and control, then compare them."
    parser = _Parser(prog="python -m lib.study.arms", description=about, allow_abbrev=False)
    parser.add_argument(
        "--preset", default="quick", help="settings, a file in notebooks/params/ (default: quick)"
    )
    parser.add_argument(
        "--data",
        default="phantom",
        help="phantom, or the path of a folder of X-rays (default: phantom)",
    )
    parser.add_argument(
        "--dataset", help="name under data/ and figures/ (default: from --data and --preset)"
    )
    parser.add_argument("--seeds", default="0,1,2,3,4", help="default: 0,1,2,3,4")
    parser.add_argument(
        "--arms",
        default="all",
        help=f"{', '.join(GROUPS)}, or names of arms, with commas (default: all)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        help="runs at a time, each on one thread if more than one (default: 1)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the preset's")
    parser.add_argument(
        "--orientation",
        choices=("upright", "any"),
        default="upright",
        help="any: phantoms mirrored and turned at random",
    )
    parser.add_argument(
        "--restart", action="store_true", help="move runs of other settings aside and train anew"
    )
    parser.add_argument("--status", action="store_true", help="only show what is missing")
    parser.add_argument("--no-claims", action="store_true", help="do not run 06_claims at the end")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    path = paths.ROOT / "notebooks" / "params" / f"{given.preset}.yaml"
    if not path.exists():
        raise UsageError(
            f"unknown --preset {given.preset!r}; valid: {', '.join(sorted(p.stem for p in path.parent.glob('*.yaml')))}"
        )
    if given.data != "phantom":
        given.data = checked_source(
            given.data, Path(os.environ.get("CXR_CALLED_FROM") or Path.cwd())
        )
        if given.orientation != "upright":
            raise UsageError("--orientation any is for phantoms: X-rays hang as they hang")
    if given.jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {given.jobs}")
    try:
        given.seeds = [int(seed) for seed in given.seeds.split(",")]
        if min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
            raise ValueError
    except ValueError:
        raise UsageError(
            f"--seeds {given.seeds!r} is not a list of different whole numbers, such as 0 or 0,1,2"
        ) from None
    try:
        given.arms = choose_arms(given.arms)
        name = dataset_name(given.data, given.preset)
        given.dataset = paths.check_name(
            given.dataset or (name if given.orientation == "upright" else f"{name}-any")
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    return given


def _claims_command(given: argparse.Namespace, preset: Path) -> tuple[list[str], Path]:
    """Run 06_claims on what there is; the executed copy lies where ./run_all.sh keeps its own."""
    notebook = paths.ROOT / "notebooks" / "06_claims.ipynb"
    copy = paths.runs_dir(given.dataset) / "notebooks" / notebook.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    # a folder goes by its name: its path is nobody else's business
    source = given.data if given.data == "phantom" else f"PATH/{Path(given.data).name}"
    told = f"./run_all.sh --study --preset {given.preset} --data {source} --seeds {','.join(map(str, given.seeds))}"
    told += "" if given.orientation == "upright" else f" --orientation {given.orientation}"
    overrides = json.dumps(
        {"dataset": given.dataset, "jobs": given.jobs, "command": told}, ensure_ascii=False
    )
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook),
        str(copy),
        "-k",
        "python3",
        "--cwd",
        str(notebook.parent),
    ]
    return [*command, "-f", str(preset), "-y", overrides, "--log-output"], copy.with_suffix(".log")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 if a run failed, 2 for a bad option."""
    argv = list(sys.argv[1:] if argv is None else argv)
    from lib.run import (
        _duration,
        _environment,
        check_kernel,
        find_notebooks,
        last_error,
        read_preset,
    )

    try:
        given = _arguments(argv)
        path = paths.ROOT / "notebooks" / "params" / f"{given.preset}.yaml"
        preset = read_preset(path, find_notebooks())
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if given.job:
        arm, _, seed = given.job.rpartition(":")
        try:
            do_run(
                given.dataset,
                arm,
                train_config(arm, preset, int(seed), given.device),
                given.restart,
            )
        except Exception as error:
            import traceback

            traceback.print_exc()
            print(f"error: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        return 0

    for name in ("CXR_DATA_DIR", "CXR_FIGURES_DIR"):
        if os.environ.get(name):
            os.environ[name] = os.path.abspath(os.environ[name])
    if given.status:
        print(status_markdown(status(given.dataset, preset, given.arms, given.seeds)))
        return 0
    try:
        prepare(
            given.dataset,
            given.data,
            int(preset["n_phantoms"]),
            int(preset["data_seed"]),
            given.orientation,
        )
        if not given.no_claims:
            check_kernel()
    except (RunError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    environment = _environment()
    if (
        given.jobs > 1
    ):  # several processes with several threads each would wait for each other's threads
        environment |= dict.fromkeys(THREADS, "1")
    options = ["--preset", given.preset, "--data", given.data, "--dataset", given.dataset]
    options += ["--device", given.device] if given.device else []
    options += ["--restart"] if given.restart else []
    commands = {}
    for seed in (
        given.seeds
    ):  # whole sets of arms first: a study that is stopped can be compared as far as it got
        for arm in given.arms:
            log = log_path(given.dataset, arm, seed)
            config = train_config(arm, preset, seed, given.device)
            if (
                given.restart
                or state(given.dataset, arm, config) != "done"
                or not _measured(given.dataset, arm, seed)
            ):
                commands[f"{arm} seed {seed}"] = (
                    [sys.executable, "-m", "lib.study.arms", *options, "--job", f"{arm}:{seed}"],
                    log,
                )
    total = len(given.seeds) * len(given.arms)
    print(
        f"{given.dataset}, preset {given.preset}: {total} runs, {total - len(commands)} done; {given.jobs} at a time",
        flush=True,
    )
    ended = 0

    def tell(name: str, status: int, seconds: float) -> None:
        nonlocal ended
        ended += 1
        how = f"failed, see {paths.show(commands[name][1])}" if status else "done"
        print(f"[{ended}/{len(commands)}] {name} {how} in {_duration(seconds)}", flush=True)

    try:
        failed = fan_out(commands, given.jobs, environment, tell)
        print(
            f"\n{status_markdown(status(given.dataset, preset, given.arms, given.seeds))}",
            flush=True,
        )
        if not given.no_claims:
            command, log = _claims_command(given, path)
            begin = time.monotonic()
            if fan_out({"06_claims": (command, log)}, 1, _environment()):
                print(
                    f"error: 06_claims: {last_error(log.with_suffix('.ipynb'), log)}",
                    file=sys.stderr,
                )
                return 1
            print(
                f"06_claims done in {_duration(time.monotonic() - begin)}; {paths.show(paths.figures_dir(given.dataset))}",
                flush=True,
            )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 1 if failed else 0


def _measured(dataset: str, arm: str, seed: int) -> bool:
    from lib.study.measure import NAME

    return (paths.run_dir(dataset, arm, seed) / NAME).exists()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that runs in hand are ended, too
    sys.exit(main())
