"""What the page leaves for later, tried (docs/beyond.md): trains and measures.

    python tests/bench/beyond.py --train digits phantom-beyond --seeds 0 1 2 3 4
    python tests/bench/beyond.py --train nih-9k --arms p4m p4m-vote --seeds 0 1 2
    python tests/bench/beyond.py --again nih-9k p4m --seeds 0 1
    python tests/bench/beyond.py    collects: figures/beyond/runs.csv, tables of docs/beyond.md

A call that was stopped goes on with what is missing. Runs are made seed by seed, data sets in turn.
Digits and phantoms are drawn; data/nih-9k must be there. --again clusters the features of finished
runs with every clusterer, and trains nothing: figures/beyond/again.csv.
"""

import argparse
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import project  # noqa: F401

from lib import data, metrics, notebooks, paths
from lib.data import preprocess, sources
from lib.deepcluster import cluster, fit
from lib.kmeans import CLUSTERERS
from lib.runs import load_run
from lib.study.arms import ARMS, train_config
from lib.study.subjects import Material, Network, Pixels
from tests import beyond_measures as measures

PRESETS = {name: {"epochs": 6} for name in ("digits", "phantom-beyond")}  # beside `quick`
PRESETS["nih-9k"] = {"epochs": 8, "batch_size": 128, "n_clusters": 100}
DRAWN, IMAGES = {"digits": "digits", "phantom-beyond": "phantom"}, 1000
LAST = (*measures.QUESTIONS[4][0], "pixels")
NAMES = [n for n, a in ARMS.items() if a.kind in ("beyond", "grouped") or n in LAST]
FOLDER, OWN = paths.ROOT / "figures" / "beyond", "beyond-"  # its runs are in data/runs/beyond-*


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
    material, file = prepare(dataset), paths.run_dir(OWN + dataset, arm, seed) / "beyond.json"
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
    found = measures.measure(subject, material, arm in LAST[:-1])
    paths.save_json(file, found | {"final": subject.assignments})
    print(dataset, arm, seed, found["perplexity"], flush=True)


def again(dataset: str, arm: str, seed: int) -> None:
    """Measure the clusters that each clusterer finds in the features of a finished run."""
    material, run = prepare(dataset), load_run(paths.run_dir(dataset, arm, seed))
    features = np.asarray(run.features)
    for name in CLUSTERERS:
        file = run.path / f"beyond-{name}.json"
        if file.exists():
            continue
        config = replace(run.config, clusterer=name)
        labels, whiten, clusterer = cluster(features, config, config.epochs + 1)
        found = {"assignments": labels, "clusterer": clusterer, "config": config, "seed": seed}
        found |= {"features": features, "embedding": whiten.transform(features)}
        subject = SimpleNamespace(**found, n_clusters=config.n_clusters)
        numbers = measures.measure(subject, material, False)
        about = {"dataset": dataset, "arm": arm, "clusterer": name, "seed": seed}
        paths.save_json(file, about | numbers)


def collect() -> None:
    """figures/beyond/runs.csv, one row per run, and the tables of docs/beyond.md."""
    rows = []
    for dataset in PRESETS:
        for arm in NAMES:
            files = sorted(paths.runs_dir(OWN + dataset).glob(f"{arm}/seed*/beyond.json"))
            runs = {int(file.parent.name[4:]): paths.load_json(file) for file in files}
            final = {seed: run.pop("final") for seed, run in runs.items()}
            for seed, run in runs.items():
                others = [metrics.ami(final[seed], f) for s, f in final.items() if s != seed]
                agree = {"seeds": float(np.mean(others))} if others else {}
                rows.append({"dataset": dataset, "arm": arm, "seed": seed, **run, **agree})
    files = [f for d in PRESETS for f in sorted(paths.runs_dir(d).glob("*/*/beyond-*.json"))]
    found = sorted(map(paths.load_json, files), key=lambda r: CLUSTERERS.index(r["clusterer"]))
    for name, some in {"runs": rows, "again": found}.items():
        with paths.atomic_write(FOLDER / f"{name}.csv", "w") as handle:
            pd.DataFrame(some).to_csv(handle, index=False, float_format="%.5g", lineterminator="\n")
    if rows and found:
        measures.write_page(*(pd.read_csv(FOLDER / f"{name}.csv") for name in ("runs", "again")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", nargs="+", choices=PRESETS, default=[])
    parser.add_argument("--arms", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--again", nargs=2, metavar=("DATASET", "ARM"))
    options = parser.parse_args()
    warnings.simplefilter("ignore", RuntimeWarning)
    for seed in options.seeds:
        if options.again:
            again(*options.again, seed)
        for dataset in options.train:
            for arm in options.arms:
                train(dataset, arm, seed)
    collect()


if __name__ == "__main__":
    main()
