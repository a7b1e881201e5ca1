"""Embeddings that a network elsewhere has made, clustered and measured as a run is: nothing is
trained. Beside them stand what is known of the images without seeing them, and chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lib import paths
from lib.data import embeddings
from lib.study import arms, clusters, measure, report
from lib.study.subjects import Effort, Material

MEASURED = ("given", "metadata", "gaussian")
SHOWN = ("structure", "stability", "transfer", "averages", "meaning", "retrieval")


def gather(dataset: str, preset: Mapping) -> dict:
    """Numbers of the embeddings in ``data/<dataset>``, which `lib.data.embeddings.preprocess`
    filled, for each seed; the dict is that of `lib.study.measure.gather`. What was measured before
    is read. `preset` has ``n_clusters, pca_dim, clusterer, seeds, n_map`` and what else a preset
    has. ValueError if there are fewer rows than clusters."""
    points, metadata = embeddings.load(paths.dataset_dir(dataset))
    if len(points) < preset["n_clusters"]:
        raise ValueError(f"{len(points)} rows are fewer than n_clusters={preset['n_clusters']}")
    effort = Effort(n_map=preset["n_map"])
    material, found = Material(points, metadata, effort=effort), {}
    for arm in MEASURED:
        runs, seeds = {s: paths.run_dir(dataset, arm, s) for s in preset["seeds"]}, {}
        for seed, folder in runs.items():
            config = replace(arms.train_config("alexnet", preset, seed, "cpu"), epochs=0)
            seeds[str(seed)] = measure.of_run(arm, folder, config, material)
        for seed, folder in runs.items() if arm == "given" else ():
            seeds[str(seed)]["values"]["ami_seeds"] = measure.with_other_seeds(runs, folder)
        about = measure.about_arm(arm, config)
        found[arm] = about | {"feature_dim": points.shape[1], "seeds": seeds}
    facts = {"format": measure.FORMAT, "dataset": measure.dataset_facts(dataset, material)}
    settings = {n: getattr(config, n) for n in arms.PRESET} | {"effort": asdict(effort)}
    return facts | {"settings": settings, "code": [], "arms": found, "missing": []}


def clusters_of(dataset: str, results: Mapping) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cluster of each row per seed (``image_id, seed0``, ...); and which findings, and which
    properties that should not matter, the first seed's clusters follow
    (`lib.study.clusters.enrichment`)."""
    points, metadata = embeddings.load(paths.dataset_dir(dataset))
    runs = [paths.run_dir(dataset, "given", int(s)) for s in results["arms"]["given"]["seeds"]]
    found = {run.name: np.load(run / measure.ANSWERS)["final"] for run in runs}
    properties = clusters.attributes(points, metadata)
    table = clusters.enrichment(found[next(iter(found))], properties)
    return pd.DataFrame({"image_id": metadata["image_id"], **found}), table


def page(results: Mapping, enriched: pd.DataFrame, command: str) -> str:
    """All tables as Markdown."""
    blocks = ["# Given embeddings", report.head(results, command)]
    blocks += ["## Are the images spread over the clusters?"]
    blocks += [report.occupancy_table(results, ["given"])]
    for heading, columns in (report.TABLES[name] for name in SHOWN):
        blocks += [f"## {heading}", report.measure_table(results, columns)]
    said = clusters.reading({"given": enriched}, {"given": arms.ARMS["given"].title})
    blocks += ["## Who is in which cluster?", *(said if len(enriched) else [])]
    return "\n\n".join(blocks) + "\n"


def measure_file(path: Path | str, dataset: str, preset: Mapping) -> str:
    """Measure a file of embeddings (see `lib.data.embeddings`) and write ``given.md``,
    ``results.json``, ``clusters.csv`` and ``enrichment.csv`` into ``figures/<dataset>``.

    Returns the page ``given.md``, and below it where the files are.
    ValueError if the file is none of embeddings, or holds fewer rows than clusters."""
    manifest = embeddings.preprocess(path, paths.dataset_dir(dataset), preset["data_seed"])
    n, size = manifest["images"], manifest["size"]
    print(f"{n:,} embeddings of {size} numbers; nothing is trained", flush=True)
    results = gather(dataset, preset)
    assigned, enriched = clusters_of(dataset, results)
    folder = paths.figures_dir(dataset)
    names = ("given.md", "results.json", "clusters.csv", "enrichment.csv")
    files = [folder / name for name in names]
    text = page(results, enriched, preset["command"])
    with paths.atomic_write(files[0], "w") as handle:
        handle.write(text)
    for place in (paths.runs_dir(dataset) / files[1].name, files[1]):
        measure.save(place, results)
    for file, table in zip(files[2:], (assigned, enriched), strict=True):
        with paths.atomic_write(file, "w") as handle:
            table.to_csv(handle, index=False, float_format="%.6g", lineterminator="\n")
    return f"{text}\nWritten: {', '.join(map(str, files))}"
