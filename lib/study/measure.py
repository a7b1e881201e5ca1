"""Every number of the finished runs and of the baselines, measured once.

`gather` measures all finished runs of a data set; 04_evaluate writes what it returns to
``results.json``, which all else reads. The numbers of a run are kept beside it in measures.json,
the answers of its probes, image by image, in scores.npz. `lib.study.parts` says what is measured,
`lib.study.claims` compares arms.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from joblib.externals.loky import get_reusable_executor
from threadpoolctl import threadpool_limits

from lib import data, paths
from lib.data.phantom import make_phantoms
from lib.parallel import freed_memory_kept, memory_limit
from lib.runs import Run, TrainConfig, load_run
from lib.study import parts
from lib.study.arms import ARMS, GROUPS, PRESET, cost, finished
from lib.study.parts import EFFORT, Effort, Found, Material, Subject
from lib.study.report import dataset_label

FORMAT = 4  # raise it if a number would come out differently: all is then measured again
NAME, ANSWERS, RESULTS = "measures.json", "scores.npz", "results.json"
PROCESS_BYTES = 900e6  # per process that measures: 0.6 GB measured, and room

# --- one run --------------------------------------------------------------------------------------


def of_run(run: Run, material: Material) -> dict[str, Any]:
    """Measure a finished run, or read what was measured before.

    Returns
    -------
    dict
        ``values`` (per measure a number, or a text that says why there is none), ``details``
        (curves and tables), ``of`` (what was measured). Written to measures.json in the folder of
        the run, with the answers of the probes in scores.npz.
    """
    of = _identity(material, (run.path / "config.json").read_bytes(), run.features)
    if (found := _stored(run.path, of)) is not None:
        return found
    return _store(
        run.path,
        of,
        _measure(parts.Network(run), material, (*parts.PARTS, parts.training, parts.known)),
    )


def of_baseline(arm: str, folder: Path, config: TrainConfig, material: Material) -> dict[str, Any]:
    """The same for ``"pixels"`` or ``"random"``, with PCA size, K and seed of `config`."""
    settings = [arm, config.n_clusters, config.pca_dim, config.seed, config.epochs]
    of = _identity(material, repr(settings).encode(), material.images)
    if (found := _stored(folder, of)) is not None:
        return found
    if arm == "pixels":
        return _store(
            folder, of, _measure(parts.Pixels(material.images, config), material, parts.PARTS)
        )
    random = parts.Random(material.images, config)
    found = _measure(random, material, (*parts.BLIND, parts.agreement_by_chance))
    return _store(folder, of, {k: v for k, v in found.items() if not k.startswith(parts.OF_PIXELS)})


@freed_memory_kept()
def _measure(subject: Subject, material: Material, wanted: tuple[Callable, ...]) -> Found:
    found: Found = {}
    with threadpool_limits(limits=1, user_api="blas"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the linear probe did not converge", RuntimeWarning)
        for part in wanted:
            found |= part(subject, material)
    return found


def _identity(material: Material, *parts: bytes | np.ndarray) -> dict[str, Any]:
    """What was measured, and how: if it is the same, so are the numbers."""
    digests = [
        hashlib.sha256(part if isinstance(part, bytes) else np.ascontiguousarray(part)).hexdigest()
        for part in (*parts, material.metadata.to_csv(index=False).encode())
    ]
    return {
        "format": FORMAT,
        "effort": json.loads(json.dumps(asdict(material.effort))),
        "sha256": digests,
    }


def _stored(folder: Path, of: Mapping[str, Any]) -> dict[str, Any] | None:
    try:
        found = paths.load_json(folder / NAME)
    except (OSError, ValueError):
        return None
    return found if found.get("of") == of else None


def _store(folder: Path, of: Mapping[str, Any], found: Found) -> dict[str, Any]:
    answers = {name: some for name, some in found.items() if isinstance(some, np.ndarray)}
    details = {name: some for name, some in found.items() if isinstance(some, dict | list)}
    values = {name: v for name, v in found.items() if name not in answers | details}
    with paths.atomic_write(folder / ANSWERS) as handle:
        np.savez(handle, **answers)
    # last: it vouches for the answers
    paths.save_json(folder / NAME, {"of": of, "values": values, "details": details})
    return paths.load_json(folder / NAME)


# --- all runs -------------------------------------------------------------------------------------


def turned_phantoms(dataset: str, pictures: np.ndarray) -> np.ndarray | None:
    """The phantoms of `pictures`, each mirrored with probability 1/2 and turned by a random angle
    *before* it is drawn: no pixel is interpolated, no corner is black.

    None if `pictures` are not upright phantoms that can be drawn again.
    """
    source = paths.load_json(paths.dataset_dir(dataset) / "manifest.json")["source"]
    if source.get("kind") != "phantom" or "seed" not in source or "orientation" in source:
        return None
    again, table = make_phantoms(len(pictures), source["seed"])
    order = np.argsort(table["image_id"].to_numpy(), kind="stable")
    if not np.array_equal(again[order], pictures):
        return None
    return make_phantoms(len(pictures), source["seed"], "any")[0][order]


def _task(arm: str, folder: Path, config: TrainConfig, material: Material) -> dict[str, Any]:
    if ARMS[arm].kind == "baseline":
        return of_baseline(arm, folder, config, material)
    return of_run(load_run(folder), material)


def gather(dataset: str, jobs: int = 1, effort: Effort = EFFORT) -> dict[str, Any]:
    """Numbers of all finished runs of a data set and of the baselines; what was measured before is
    read.

    Parameters
    ----------
    dataset : str
    jobs : int
        Processes that measure; fewer if memory is limited.
    effort : Effort

    Returns
    -------
    dict
        ``format``; ``dataset`` (name, label, kind, n, patients, n_test, labels, attribution);
        ``settings``; ``code`` (versions that trained the runs); ``arms``: arm -> title, kind,
        backbone, rotation, pseudo_labels, parameters, feature_dim, flops, and ``seeds``: seed (as
        text) -> ``values``, ``details`` as `of_run` returns them; ``missing`` (one line per run
        left out and per arm without a run).

    Raises
    ------
    FileNotFoundError
        As `lib.study.arms.finished`.
    """
    pictures, metadata = data.load(paths.dataset_dir(dataset))
    material = Material(pictures, metadata, effort=effort)
    runs, missing = finished(dataset)
    first = next(arm for arm in ("p4m", "alexnet", *runs) if arm in runs)
    configs = {seed: load_run(folder).config for seed, folder in runs[first].items()}
    reference = next(iter(configs.values()))
    tasks = {
        (arm, seed): (folder, None) for arm, some in runs.items() for seed, folder in some.items()
    }
    for arm in ("pixels", "random"):
        tasks |= {(arm, s): (paths.run_dir(dataset, arm, s), c) for s, c in configs.items()}
    if any(not (folder / NAME).exists() for folder, _ in tasks.values()):
        material = replace(material, turned=turned_phantoms(dataset, pictures))
    limit = memory_limit() or math.inf
    jobs = int(max(1, min(jobs, len(tasks), limit // PROCESS_BYTES - 1)))
    waiting = (joblib.delayed(_task)(arm, *task, material) for (arm, _), task in tasks.items())
    found = dict(zip(tasks, joblib.Parallel(n_jobs=jobs)(waiting), strict=True))
    if jobs > 1:  # idle processes would keep their memory for five minutes
        get_reusable_executor().shutdown(wait=True)
    entries: dict[str, Any] = {}
    for (arm, seed), numbers in found.items():
        if arm not in entries:
            config = load_run(runs[arm][seed]).config if arm in runs else None
            entries[arm] = _entry(arm, config) | {"seeds": {}}
        entries[arm]["seeds"][str(seed)] = {name: numbers[name] for name in ("values", "details")}
    missing += [f"{a}: no finished run ({ARMS[a].title})" for a in GROUPS["all"] if a not in runs]
    stored = [paths.load_json(f / "config.json") for some in runs.values() for f in some.values()]
    settings = {name: getattr(reference, name) for name in PRESET} | {"effort": asdict(effort)}
    return {
        "format": FORMAT,
        "dataset": _dataset(dataset, material),
        "settings": settings,
        "code": sorted({str(config.get("code")) for config in stored}),
        "arms": entries,
        "missing": missing,
    }


def _dataset(dataset: str, material: Material) -> dict[str, Any]:
    manifest = paths.load_json(paths.dataset_dir(dataset) / "manifest.json")
    kind, n = manifest["source"]["kind"], len(material.images)
    return {
        "name": dataset,
        "label": dataset_label(kind, n),
        "kind": kind,
        "n": n,
        "patients": data.count_patients(material.metadata),
        "n_test": len(material.rows(stated=False)[1]),
        "labels": list(material.labels),
        "attribution": manifest["attribution"],
    }


def _entry(arm: str, config: TrainConfig | None) -> dict[str, Any]:
    """What an arm is, for the table of arms."""
    entry = {"title": ARMS[arm].title, "kind": ARMS[arm].kind, "backbone": "", "rotation": False}
    if config is None:
        return entry | {"pseudo_labels": "none", "parameters": 0, "feature_dim": 4096, "flops": 0}
    entry["pseudo_labels"] = config.pseudo_labels if config.epochs else "nothing"
    entry["rotation"] = config.rotation_degrees > 0 and config.epochs > 0
    spent = cost(config.backbone, config.n_clusters, config.width)
    return entry | {"backbone": config.backbone, "width": config.width} | spent


# --- the file of results --------------------------------------------------------------------------


def answers(results: Mapping[str, Any]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Answers of the probes by arm and seed: ``test`` (n,), rows of the images tested, ``clusters``
    (n,), right or not; ``labelled_test`` (m,), ``combinations`` (m,), right or not, ``findings``
    (m, F), log-odds, ``truth`` (m, F) bool; ``test_patients`` and ``labelled_test_patients``.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm, entry in results["arms"].items():
        for seed in entry["seeds"]:
            with np.load(
                paths.run_dir(results["dataset"]["name"], arm, int(seed)) / ANSWERS
            ) as file:
                found.setdefault(arm, {})[seed] = dict(file)
    return found


def save(path: Path | str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Write results.json, numbers with six digits and lists on one line; returns what it holds."""
    paths.save_json(path, results)
    text = Path(path).read_text(encoding="utf-8")
    found = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    text = json.dumps(found, indent=1, ensure_ascii=False)
    with paths.atomic_write(path, "w") as handle:
        handle.write(re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), text) + "\n")
    return found
