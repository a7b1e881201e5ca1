"""What the page leaves for later, tried (docs/beyond.md): trains, measures, times.

    python tests/bench/beyond.py --train digits phantom-beyond --seeds 0 1 2 3 4
    python tests/bench/beyond.py --train nih-9k --arms p4m p4m-vote --seeds 0 1 2
    python tests/bench/beyond.py --time    each clusterer, to figures/beyond/clusterers.csv
    python tests/bench/beyond.py           collects what was trained in figures/beyond/runs.csv

A call that was stopped goes on with what is missing. Runs are made seed by seed, data sets in turn.
Digits and phantoms are drawn; data/nih-9k must be there.
"""

import argparse
import math
import multiprocessing
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import softmax

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib import data, metrics, notebooks, paths  # noqa: E402
from lib.data import preprocess, sources  # noqa: E402
from lib.deepcluster import fit  # noqa: E402
from lib.kmeans import CLUSTERERS, make_clusterer  # noqa: E402
from lib.study import clusters, curves, parts, scores  # noqa: E402
from lib.study.arms import ARMS, train_config  # noqa: E402
from lib.study.subjects import Material, Network, Pixels  # noqa: E402
from tests.bench.clusterers import planted  # noqa: E402

SMALL = {"epochs": 6}  # beside those of the preset `quick`
PRESETS = {"digits": SMALL, "phantom-beyond": SMALL}
PRESETS["nih-9k"] = {"epochs": 8, "batch_size": 128, "n_clusters": 100}
DRAWN, IMAGES = {"digits": "digits", "phantom-beyond": "phantom"}, 1000
SYMMETRIES = ("p4m", "p4_params", "mirror", "cnn_params")
NAMES = [*SYMMETRIES, *(name for name, arm in ARMS.items() if arm.kind in ("beyond", "grouped"))]
NAMES = [*dict.fromkeys(NAMES), "pixels"]
FOLDER = paths.ROOT / "figures" / "beyond"


def prepare(dataset: str) -> Material:
    """Images and what is known of them; digits and phantoms are drawn if they are not there."""
    folder = paths.dataset_dir(dataset)
    if dataset in DRAWN and not (folder / "images.npy").exists():
        sources.fetch(DRAWN[dataset], paths.raw_dir(dataset), IMAGES)
        preprocess.preprocess(paths.raw_dir(dataset), folder)
    images, table = data.load(folder)
    n = IMAGES if dataset in DRAWN else len(images)
    return Material(np.array(images[:n]), table[:n])


def train(dataset: str, arm: str, seed: int) -> None:
    """Train a run and measure it, unless that was done."""
    material, file = prepare(dataset), paths.run_dir(dataset, arm, seed) / "beyond.json"
    preset = notebooks.read_preset("quick") | PRESETS[dataset]
    config = train_config("p4m" if arm == "pixels" else arm, preset, seed, "cpu")
    if file.exists() or (dataset == "digits" and config.pseudo_labels == "patients"):
        return
    subject, groups = Pixels(material.images, config) if arm == "pixels" else None, None
    if config.pseudo_labels == "patients":
        groups = material.patients
    elif config.pseudo_labels in ("given", "refined"):
        groups = Pixels(material.images, config).assignments
    subject = subject or Network(fit(material.images, config, file.parent, groups=groups))
    found = measure(subject, material, arm in (*SYMMETRIES, "pixels"))
    paths.save_json(file, found | {"final": subject.assignments})
    print(dataset, arm, seed, found, flush=True)


def of_clusters(labels: np.ndarray, material: Material, seed: int) -> dict[str, float]:
    """What clusters (N,) say of the classes, or of findings, view and patient."""
    patients, rows = material.patients, material.own_rows(seed)
    if not material.metadata["view_position"].ne("").any():
        return {
            "nmi": metrics.nmi(labels, material.codes),
            "ami": metrics.ami(labels, material.codes),
        }
    one_hot = np.eye(labels.max() + 1)[labels]
    options = {"groups": patients, "seed": seed}
    hard = scores.findings_auroc(one_hot, material.targets, *rows, **options)
    follows = clusters.drivers(labels, material.images, material.metadata)
    pairs = sum((n * (n - 1)).sum() for n in [np.bincount(patients)])
    same = pd.DataFrame({"p": patients, "c": labels}).value_counts().to_numpy()
    alike = (same * (same - 1)).sum() / pairs - ((np.bincount(labels) / len(labels)) ** 2).sum()
    found = {"hard": np.nanmean(hard), "view": follows["view_position"], "pairs": alike}
    return found | {"findings": follows["findings"], "patient": follows["patient"]}


def measure(subject: Network | Pixels, material: Material, sides: bool) -> dict[str, float]:
    """All measures of docs/beyond.md but the agreement of seeds."""
    labels, seed, k = subject.assignments, subject.seed, subject.n_clusters
    found = of_clusters(labels, material, seed) | metrics.occupancy(labels, k)
    found |= parts.halves(subject, material)
    if isinstance(subject, Network):
        table, first = subject.run.metrics, subject.run.assignments[0]
        ami = table["ami_prev"].dropna().to_numpy()
        found |= {"settled": 2 + curves.settling_time(ami), "ami_prev": ami[-1]}
        found |= {"loss": table["loss"].iloc[-1] / math.log(k)}
        start = of_clusters(first, material, seed)
        found |= {f"{name}_untrained": value for name, value in start.items()}
        with np.load(subject.run.path / "clustering.npz") as stored:
            centres = stored["centroids"]
    else:
        centres = subject.clusterer.cluster_centers_
    if "hard" in found:
        away = ((subject.embedding[:, None] - centres) ** 2).sum(2)  # (N, K)
        rows, options = material.own_rows(seed), {"groups": material.patients, "seed": seed}
        soft = scores.findings_auroc(softmax(-away / 0.1, 1), material.targets, *rows, **options)
        found["soft"] = np.nanmean(soft)
        found |= parts.laterality(subject, material) if sides else {}
        found |= parts.effusion_side(subject, material) if sides else {}
    return {name: value for name, value in found.items() if not isinstance(value, str)}


def one_fit(name: str, points: int) -> tuple[str, int, float, float, float]:
    """Seconds, GB at the peak (of this process, points included) and NMI of one fit."""
    x, truth = planted(points, 64, 200)
    start = time.perf_counter()
    found = make_clusterer(name, 200, 0).fit_predict(x)
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return name, points, round(seconds, 2), round(peak / 2**20, 3), metrics.nmi(truth, found)


def collect() -> None:
    """figures/beyond/runs.csv: one row per run, with the agreement of seeds."""
    rows = []
    for dataset in PRESETS:
        for arm in NAMES:
            files = sorted(paths.runs_dir(dataset).glob(f"{arm}/seed*/beyond.json"))
            runs = {int(file.parent.name[4:]): paths.load_json(file) for file in files}
            final = {seed: run.pop("final") for seed, run in runs.items()}
            for seed, run in runs.items():
                others = [metrics.ami(final[seed], f) for s, f in final.items() if s != seed]
                agree = {"seeds": float(np.mean(others))} if others else {}
                rows.append({"dataset": dataset, "arm": arm, "seed": seed, **run, **agree})
    with paths.atomic_write(FOLDER / "runs.csv", "w") as handle:
        pd.DataFrame(rows).to_csv(handle, index=False, float_format="%.5g", lineterminator="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", nargs="+", choices=PRESETS, default=[])
    parser.add_argument("--arms", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--time", type=int, nargs="*", help="points: 10000 100000 1000000")
    options = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    for seed in options.seeds:
        for dataset in options.train:
            for arm in options.arms:
                train(dataset, arm, seed)
    if options.time is not None:
        sizes = options.time or [10_000, 100_000, 1_000_000]
        jobs = [(c, n) for n in sizes for c in CLUSTERERS if c != "graph" or n <= 100_000]
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            rows = [print(r, flush=True) or r for r in pool.starmap(one_fit, jobs, chunksize=1)]
        names = ["clusterer", "points", "seconds", "gigabytes", "nmi"]
        table = pd.DataFrame(rows, columns=names)
        with paths.atomic_write(FOLDER / "clusterers.csv", "w") as handle:
            table.to_csv(handle, index=False, float_format="%.4g", lineterminator="\n")
    collect()


if __name__ == "__main__":
    main()
