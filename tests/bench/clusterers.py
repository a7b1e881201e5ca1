"""What each clusterer gives up in quality for its time, from 10,000 to 1,000,000 points:
figures/bench/kmeans_quality.{csv,png,svg}.

    python tests/bench/clusterers.py [--points 10000 31623 100000 316228 1000000] [--dim 64]
    [--clusters 200] [--draw]

Synthetic embeddings with planted clusters that overlap. Quality is the inertia as a share of
K-means' at the same N, and NMI with the planted clusters. Time is of one fit, to its own rule of
stopping, of K-means (at either level) at most 30 iterations. --draw draws the figure from the table
that is there."""

from __future__ import annotations

import argparse
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import normalized_mutual_info_score

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.clusterers import CLUSTERERS, make_clusterer  # noqa: E402
from lib.paths import atomic_write, figures_root  # noqa: E402
from lib.plots import save  # noqa: E402
from lib.plots.bench import kmeans_quality  # noqa: E402

MAX_ITER = 30
OPTIONS = {"kmeans": {"max_iter": MAX_ITER}, "hierarchical": {"max_iter": MAX_ITER}}


def planted(n: int, d: int, clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, d), float32, and the planted cluster (n,) of each: of unequal size, Gaussian,
    with overlap.
    """
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, d), dtype=np.float32)
    truth = rng.choice(clusters, n, p=rng.dirichlet(np.full(clusters, 3.0)))
    x = rng.standard_normal((n, d), dtype=np.float32)
    x *= 1.5
    x += centres[truth]
    return x, truth


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--points", type=int, nargs="+", default=[10_000, 31_623, 100_000, 316_228, 1_000_000]
    )
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    target = figures_root() / "bench" / "kmeans_quality"
    if not options.draw:
        rows = []
        names = [name for name in CLUSTERERS if name != "graph" or find_spec("igraph")]
        if "graph" not in names:
            print('the graph method is left out: pip install "igraph>=0.11"')
        for name in names:  # imports and thread pools are paid for once
            make_clusterer(name, 5).fit(planted(500, 8, 5)[0])
        for n in options.points:
            x, truth = planted(n, options.dim, options.clusters)
            for name in names:
                start = time.perf_counter()
                model = make_clusterer(name, options.clusters, **OPTIONS.get(name, {})).fit(x)
                elapsed = time.perf_counter() - start
                nmi = normalized_mutual_info_score(truth, model.labels_)
                rows.append(
                    {
                        "method": name,
                        "points": n,
                        "seconds": round(elapsed, 3),
                        "inertia": model.inertia_,
                        "nmi": round(nmi, 4),
                    }
                )
                print(
                    f"  N = {n:<10,}{name:<14}{elapsed:8.2f} s   inertia {model.inertia_:.4g}   NMI {nmi:.3f}",
                    flush=True,
                )
            table = pd.DataFrame(rows)
            reference = table[table.method == "kmeans"].set_index("points").inertia
            table["inertia_ratio"] = (table.inertia / table.points.map(reference)).round(4)
            table["inertia"] = table.inertia.round(0)
            table["dim"], table["clusters"], table["cores"] = (
                options.dim,
                options.clusters,
                min(2, os.cpu_count()),
            )
            table["max_iter"] = MAX_ITER
            with atomic_write(target.with_suffix(".csv"), "w") as handle:
                table.to_csv(handle, index=False, lineterminator="\n")
    table = pd.read_csv(target.with_suffix(".csv"))
    label = f"synthetic embeddings, {table.dim[0]} dimensions, K = {table.clusters[0]}, {table.cores[0]} CPU cores"
    save(
        kmeans_quality(table, f"{label}, K-means of at most {table.max_iter[0]} iterations"), target
    )


if __name__ == "__main__":
    main()
