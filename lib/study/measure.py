"""Every number of the finished runs and of the baselines, measured once.

`gather` measures all finished runs of a data set; 04_evaluate writes what it returns to
``results.json``, which all else reads. `lib.study.parts` says what is measured."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
from joblib.externals.loky import get_reusable_executor
from threadpoolctl import threadpool_limits

from lib import data, paths
from lib.data.phantom import make_phantoms
from lib.metrics import ami
from lib.parallel import freed_memory_kept, memory
from lib.runs import TrainConfig, load_run
from lib.study import parts, subjects
from lib.study.arms import ARMS, GROUPS, PRESET, config_of, cost, finished, is_kept, kept_dir
from lib.study.claims import mean_curves
from lib.study.parts import Found, Subject
from lib.study.report import dataset_label
from lib.study.subjects import EFFORT, Effort, Given, Material, Network

FORMAT = 5  # raise it if a number would come out differently: all is then measured again
NAME, ANSWERS = "measures.json", "scores.npz"
BASELINES = {"pixels": subjects.Pixels, "random": subjects.Random}
BASELINES |= {"metadata": subjects.Metadata, "gaussian": subjects.Gaussian}
MADE = BASELINES | {"given": Given}  # without a run
ANSWERED = ("alexnet", "p4m", "cnn_params", "pixels")
BASELINE_SEEDS = 3  # they differ little
PROCESS_BYTES = 900e6  # per process that measures: 0.6 GB measured, and room


def of_run(arm: str, folder: Path, config: TrainConfig, material: Material) -> dict:
    """Measure a finished run, or a baseline with the PCA size, K and seed of `config`; or read what
    was measured before: in `folder`, that of the run, ``measures.json`` keeps the numbers and
    ``scores.npz`` the answers of the probes, image by image.

    Returns ``values`` (per measure a number, or a text that says why there is none), ``details``
    (curves and tables) and ``of`` (what was measured)."""
    of = None if is_kept(folder) else _identity(arm, folder, config, material)
    if (found := _stored(folder, of)) is not None:
        return found
    about = material.metadata if arm == "metadata" else material.images
    made = MADE[arm](about, config) if arm in MADE else Network(load_run(folder))
    wanted = parts.OF_BASELINE.get(arm, (*parts.PARTS, parts.training, parts.known))
    found = _measure(made, material, wanted)
    if arm == "random":
        found = {k: v for k, v in found.items() if not k.startswith(parts.OF_PIXELS)}
    return _store(folder, of, found)


@freed_memory_kept()
def _measure(subject: Subject, material: Material, wanted: tuple[Callable, ...]) -> Found:
    final = getattr(subject, "assignments", None)  # as small as they can be
    found: Found = {} if final is None else {"final": final.astype(np.min_scalar_type(final.max()))}
    with threadpool_limits(limits=1, user_api="blas"):
        for part in wanted:
            found |= part(subject, material)
    return found


def _identity(arm: str, folder: Path, config: TrainConfig, material: Material) -> dict:
    """What is measured, and how: if it is the same, so are the numbers."""
    if ARMS[arm].kind == "baseline":
        settings = [arm, config.n_clusters, config.pca_dim, config.seed, config.epochs]
        settings += [config.clusterer] * (config.clusterer != "kmeans")
        about = repr(settings).encode(), np.ascontiguousarray(material.images)
    else:
        features = np.load(folder / "features.npy", mmap_mode="r")
        about = (folder / "config.json").read_bytes(), np.ascontiguousarray(features)
    known = material.metadata.to_csv(index=False).encode()
    effort = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(material.effort).items()}
    digests = [hashlib.sha256(part).hexdigest() for part in (*about, known)]
    return {"format": FORMAT, "effort": effort, "sha256": digests}


def _stored(folder: Path, of: Mapping | None) -> dict | None:
    """What was measured before, if it is the same; of a kept run, whatever was measured."""
    try:
        found = paths.load_json(folder / NAME)
    except (OSError, ValueError):
        return None
    return found if of in (None, found.get("of")) else None


def _place(dataset: str, arm: str, seed: int | str) -> Path:
    """Where the numbers of a run are, or will be."""
    own = paths.run_dir(dataset, arm, int(seed))
    kept = kept_dir(dataset) / arm / own.name
    return kept if is_kept(kept) and not (own / NAME).exists() else own


def keep(results: Mapping) -> None:
    """Copy settings and numbers of all measured runs to `lib.study.arms.kept_dir`. The answers to
    the probes are nine tenths of all, so of arms that figures do not show (`ANSWERED`) only the
    clusters are kept."""
    dataset = results["dataset"]["name"]
    for arm, entry in results["arms"].items():
        for seed in entry["seeds"]:
            source = paths.run_dir(dataset, arm, int(seed))
            target = kept_dir(dataset) / arm / source.name
            target.mkdir(parents=True, exist_ok=True)
            if (source / "config.json").exists():
                shutil.copyfile(source / "config.json", target / "config.json")
            if (source / NAME).exists():
                save(target / NAME, paths.load_json(source / NAME))
                with np.load(source / ANSWERS) as file:
                    some = {k: file[k] for k in file if arm in ANSWERED or k == "final"}
                with paths.atomic_write(target / ANSWERS) as handle:
                    np.savez_compressed(handle, **some)


def _store(folder: Path, of: Mapping, found: Found) -> dict:
    answers = {name: some for name, some in found.items() if isinstance(some, np.ndarray)}
    details = {name: some for name, some in found.items() if isinstance(some, dict)}
    values = {name: some for name, some in found.items() if name not in answers | details}
    if "findings" in answers:  # of the bootstrap: three digits are enough
        answers["findings"] = answers["findings"].astype(np.float16)
    with paths.atomic_write(folder / ANSWERS) as handle:
        np.savez_compressed(handle, **answers)
    # last: it vouches for the answers
    paths.save_json(folder / NAME, {"of": of, "values": values, "details": details})
    return paths.load_json(folder / NAME)


def turned_phantoms(dataset: str, pictures: np.ndarray) -> np.ndarray | None:
    """The phantoms of `pictures`, each turned, and mirrored or not, *before* it is drawn: no pixel
    is interpolated. None if they are not upright phantoms that can be drawn again."""
    source = paths.load_json(paths.dataset_dir(dataset) / "manifest.json")["source"]
    if source.get("kind") != "phantom" or "seed" not in source or "orientation" in source:
        return None
    again, table = make_phantoms(len(pictures), source["seed"])
    order = np.argsort(table["image_id"].to_numpy(), kind="stable")
    if not np.array_equal(again[order], pictures):
        return None
    return make_phantoms(len(pictures), source["seed"], "any")[0][order]


def gather(dataset: str, jobs: int = 1, effort: Effort = EFFORT) -> dict:
    """Numbers of all finished runs of a data set and of the baselines; what was measured before is
    read. At most `jobs` processes measure; fewer if memory is limited.

    Returns ``format``; ``dataset`` (name, label, kind, n, patients, n_test, labels, attribution);
    ``settings``; ``code`` (versions that trained the runs); ``arms``: arm -> title, kind, backbone,
    rotation, pseudo_labels, parameters, feature_dim, flops and ``seeds``: seed (as text) ->
    ``values``, ``details`` of `of_run`; ``missing`` (one line per run that is left out and per arm
    without a run). FileNotFoundError if no run is finished."""
    pictures, metadata = data.load(paths.dataset_dir(dataset))
    material = Material(pictures, metadata, effort=effort)
    runs, missing = finished(dataset)
    configs = {(a, s): config_of(f) for a, some in runs.items() for s, f in some.items()}
    first = next(arm for arm in ("p4m", "alexnet", *runs) if arm in runs)
    tasks = [(arm, runs[arm][seed], config) for (arm, seed), config in configs.items()]
    for arm in BASELINES:
        some = list(runs[first])[:BASELINE_SEEDS]
        tasks += [(arm, _place(dataset, arm, s), configs[first, s]) for s in some]
    anew = [task for task in tasks if not is_kept(task[1])]
    if any(_stored(task[1], _identity(*task, material)) is None for task in anew):
        material = replace(material, turned=turned_phantoms(dataset, pictures))
    affordable = memory() // PROCESS_BYTES - 1
    jobs = int(max(1, min(jobs, len(tasks), affordable)))
    found = joblib.Parallel(n_jobs=jobs)(joblib.delayed(of_run)(*task, material) for task in tasks)
    if jobs > 1:  # idle processes would keep their memory for five minutes
        get_reusable_executor().shutdown(wait=True)
    arms: dict[str, dict] = {}
    for (arm, folder, config), numbers in zip(tasks, found, strict=True):
        if arm not in arms:
            arms[arm] = about_arm(arm, config) | {"seeds": {}}
        numbers.pop("of")
        if arm in runs:
            numbers["values"]["ami_seeds"] = with_other_seeds(runs[arm], folder)
        arms[arm]["seeds"][folder.name.removeprefix("seed")] = numbers
    reference = configs[first, next(iter(runs[first]))]
    codes = {paths.load_json(tasks[k][1] / "config.json").get("code") for k in range(len(configs))}
    absent = [f"{a}: no finished run ({ARMS[a].title})" for a in GROUPS["all"] if a not in runs]
    settings = {n: getattr(reference, n) for n in PRESET} | {"effort": asdict(effort)}
    about = {"format": FORMAT, "dataset": dataset_facts(dataset, material), "settings": settings}
    return about | {"code": sorted(map(str, codes)), "arms": arms, "missing": missing + absent}


def with_other_seeds(seeds: Mapping[int, Path], folder: Path) -> float | str:
    """Mean AMI of the final clusters of a run with those of the arm's other seeds."""
    final = {f: np.load(f / ANSWERS)["final"] for f in seeds.values()}
    others = [ami(final[folder], theirs) for other, theirs in final.items() if other != folder]
    return float(np.mean(others)) if others else "one seed"


def dataset_facts(dataset: str, material: Material) -> dict:
    """What a data set is, for tables and figures."""
    manifest = paths.load_json(paths.dataset_dir(dataset) / "manifest.json")
    source, n = manifest["source"], len(material.images)
    turned = ", in any orientation" * (source.get("orientation") == "any")
    about = {"name": dataset, "label": dataset_label(source["kind"], n) + turned}
    about |= {"kind": source["kind"], "n": n, "patients": data.count_patients(material.metadata)}
    about |= {"n_test": len(material.rows(stated=False)[1]), "labels": list(material.labels)}
    return about | {"attribution": manifest["attribution"]}


def about_arm(arm: str, config: TrainConfig) -> dict:
    """What an arm is, for the table of arms."""
    about = {"title": ARMS[arm].title, "kind": ARMS[arm].kind}
    if not ARMS[arm].backbone:
        about |= {"backbone": "", "rotation": False, "pseudo_labels": "none"}
        return about | {"parameters": 0, "feature_dim": 4096 * (arm == "pixels"), "flops": 0}
    about["rotation"] = config.rotation_degrees > 0 and config.epochs > 0
    about["pseudo_labels"] = config.pseudo_labels if config.epochs else "nothing"
    about |= {"backbone": config.backbone, "width": config.width}
    return about | cost(config.backbone, config.n_clusters, config.width)


def save(path: Path | str, results: Mapping) -> dict:
    """Write results.json, numbers with six digits and lists on one line; returns what it holds."""
    paths.save_json(path, results)
    text = Path(path).read_text(encoding="utf-8")
    found = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    text = json.dumps(found, indent=1, ensure_ascii=False)
    with paths.atomic_write(path, "w") as handle:
        handle.write(re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), text) + "\n")
    return found


def load(dataset: str) -> dict:
    """Results of 04_evaluate, or those published in ``figures/<dataset>``; or FileNotFoundError."""
    places = [folder(dataset) / "results.json" for folder in (paths.runs_dir, paths.figures_dir)]
    found = next(filter(Path.exists, places), None)
    if found is None:
        raise FileNotFoundError(f"{paths.show(places[0])} is not there: run 04_evaluate first")
    return paths.load_json(found)


def answers(results: Mapping) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Answers of the probes by arm and seed: ``test`` (n,), rows of the images tested, ``clusters``
    (n,), right or not; ``labelled_test`` (m,), ``combinations`` (m,), right or not, ``findings``
    (m, F), log-odds, ``truth`` (m, F) bool; ``test_patients`` and ``labelled_test_patients``."""
    found: dict[str, dict] = {arm: {} for arm in results["arms"]}
    for arm, entry in results["arms"].items():
        for seed in entry["seeds"]:
            with np.load(_place(results["dataset"]["name"], arm, seed) / ANSWERS) as file:
                found[arm][seed] = dict(file)
    return found


def curves(results: Mapping) -> dict[str, pd.DataFrame]:
    """Table of each trained arm, seeds below each other: ``seed, epoch, nmi_prev, loss``, ..."""
    found = {}
    for arm, entry in results["arms"].items():
        tables = {seed: run["details"].get("curves") for seed, run in entry["seeds"].items()}
        there = {seed: pd.DataFrame(t) for seed, t in tables.items() if t and t["epoch"]}
        if there:
            frames = [table.assign(seed=int(seed)) for seed, table in there.items()]
            found[arm] = pd.concat(frames, ignore_index=True)
    return found


def known(results: Mapping) -> dict[str, dict[str, pd.DataFrame]]:
    """Factor (see `lib.study.parts.factors`) -> trained arm -> ``seed, epoch, ami``; ``epoch`` is
    how long the network behind the clusters was trained, 0 for the untrained one."""
    found: dict[str, dict] = {}
    for arm in curves(results):
        for seed, run in results["arms"][arm]["seeds"].items():
            for factor, amis in run["details"]["known"].items():
                table = pd.DataFrame({"seed": int(seed), "epoch": range(len(amis)), "ami": amis})
                tables = found.setdefault(factor, {})
                tables[arm] = pd.concat([tables.get(arm), table], ignore_index=True)
    return found


def roc_curves(results: Mapping) -> dict[str, dict[str, list[float]]]:
    """ROC curves of the probes of labels, means over seeds: arm -> ``macro, micro``, true positive
    rates at `lib.study.parts.RATES`; last ``guess``, which looks at no image."""
    found = {}
    for name in ("roc", "roc_guess"):
        averages = {part: mean_curves(results, name, part) for part in ("macro", "micro")}
        for arm in averages["macro"]:
            found[arm if name == "roc" else "guess"] = {p: c[arm] for p, c in averages.items()}
    return found
