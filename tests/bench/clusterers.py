"""What each clusterer gives up in quality for its time, from 10,000 to 1,000,000 points:
figures/bench/kmeans_quality.{csv,png,svg}.

    python tests/bench/clusterers.py [--points 10000 31623 100000 316228 1000000] [--dim 64]
    [--clusters 200] [--draw] [--memory]

Synthetic embeddings with planted clusters that overlap. Quality is the inertia (sum of squared
distances to the centroids) as a share of K-means' at the same N, and NMI with the planted clusters.
Time is of one fit. --draw only draws the figure from the table that is there. --memory measures all
clusterers, those of lib.beyond too, each fit in a process of its own: seconds of CPU time and peak
memory, to figures/beyond/clusterers.csv. It goes on with what is missing there."""

import argparse
import multiprocessing
import os
import resource
import time

import numpy as np
import pandas as pd
import project  # noqa: F401
from matplotlib.figure import Figure
from sklearn.metrics import normalized_mutual_info_score

from lib.kmeans import CLUSTERERS, make_clusterer
from lib.paths import atomic_write, figures_root
from lib.plots import style

TITLES = {"kmeans": "K-means", "minibatch": "mini-batch K-means"}
TITLES |= {"hierarchical": "hierarchical K-means", "graph": "graph of neighbours"}
PANELS = {"inertia_ratio": "inertia / that of K-means\n(lower is better)"}
PANELS |= {"nmi": "NMI with the planted\nclusters"}


def planted(n: int, d: int, clusters: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, d), and the planted cluster of each: Gaussian, of unequal size."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((clusters, d), dtype=np.float32)
    truth = rng.choice(clusters, n, p=rng.dirichlet(np.full(clusters, 3.0)))
    return 1.5 * rng.standard_normal((n, d), dtype=np.float32) + centres[truth], truth


def measure(name: str, x: np.ndarray, truth: np.ndarray, clusters: int) -> dict:
    """Seconds, inertia and NMI of one fit."""
    start = time.perf_counter()
    model = make_clusterer(name, clusters, 0)
    labels = model.fit_predict(x)
    seconds = round(time.perf_counter() - start, 3)
    inertia = float(((x - model.cluster_centers_[labels]) ** 2).sum(dtype=np.float64))
    nmi = round(normalized_mutual_info_score(truth, labels), 4)
    return {"method": name, "points": len(x), "seconds": seconds, "inertia": inertia, "nmi": nmi}


def one_fit(name: str, points: int, dim: int, clusters: int) -> dict:
    """CPU seconds and peak memory of one fit, points included; for a process of its own."""
    x, truth = planted(points, dim, clusters)
    begin = time.process_time()
    labels = make_clusterer(name, clusters, 0).fit_predict(x)
    seconds = round(time.process_time() - begin, 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GB, on Linux
    nmi = round(normalized_mutual_info_score(truth, labels), 3)
    found = {"clusterer": name, "points": points, "dim": dim, "clusters": clusters}
    return found | {"cpu_seconds": seconds, "gigabytes": round(peak, 2), "nmi": nmi}


def memory(sizes: list[int], dim: int, clusters: int) -> None:
    """`one_fit` of each clusterer and size; graph, sinkhorn and consensus up to 100,000 points."""
    target = figures_root() / "beyond" / "clusterers.csv"
    rows = pd.read_csv(target).to_dict("records") if target.exists() else []
    done = {(row["clusterer"], row["points"]) for row in rows}
    jobs = [(c, n) for n in sizes for c in CLUSTERERS if n <= 100_000 or c in list(TITLES)[:3]]
    for job in [job for job in jobs if job not in done]:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(one_fit, (*job, dim, clusters)))
        print(rows[-1], flush=True)
        with atomic_write(target, "w") as handle:
            pd.DataFrame(rows).to_csv(handle, index=False, lineterminator="\n")


@style.context()
def quality(table: pd.DataFrame, dataset_label: str) -> Figure:
    """Quality of each clusterer against its time, a line over the numbers of points."""
    figure = style.new_figure(2.1, "What does a faster clusterer cost?")
    sizes = {n: 2 + i for i, n in enumerate(sorted(table["points"].unique()))}
    names = [name for name in TITLES if name in set(table["method"])]
    keys = {}
    for axes, (column, label) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
        for name, color, marker in zip(names, style.PALETTE, style.MARKERS, strict=False):
            rows = table[table["method"] == name].sort_values("points")
            axes.plot(rows["seconds"], rows[column], color=color, linewidth=0.9, alpha=0.7)
            areas = rows["points"].map(sizes) ** 2
            axes.scatter(rows["seconds"], rows[column], s=areas, color=color, marker=marker, lw=0)
            keys[TITLES[name]] = {"color": color, "marker": marker}
        axes.set(xscale="log", xlabel="seconds for one fit", title=label)
        axes.minorticks_off()
        axes.grid()
    figure.axes[1].set_ylim(top=1)
    style.legend_below(figure, keys)
    note = f"a marker per N, larger for more points: {', '.join(f'{n:,}' for n in sizes)}"
    return style.finish(figure, dataset_label, note)


def main() -> None:
    parser = argparse.ArgumentParser(description="What each clusterer gives up for its time.")
    points = [10_000, 31_623, 100_000, 316_228, 1_000_000]
    parser.add_argument("--points", type=int, nargs="+", default=points)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if options.memory:
        return memory(options.points, options.dim, options.clusters)
    target = figures_root() / "bench" / "kmeans_quality"
    if not options.draw:
        rows = []
        for name in TITLES:  # imports and thread pools are paid for once
            measure(name, *planted(500, 8, 5), 5)
        for n in options.points:
            x, truth = planted(n, options.dim, options.clusters)
            for name in TITLES:
                rows.append(measure(name, x, truth, options.clusters))
                print(rows[-1], flush=True)
        table = pd.DataFrame(rows)
        reference = table[table["method"] == "kmeans"].set_index("points")["inertia"]
        table["inertia_ratio"] = (table["inertia"] / table["points"].map(reference)).round(4)
        table["inertia"] = table["inertia"].round(0)
        settings = {"dim": options.dim, "clusters": options.clusters, "cores": os.cpu_count()}
        with atomic_write(target.with_suffix(".csv"), "w") as handle:
            table.assign(**settings).to_csv(handle, index=False, lineterminator="\n")
    table = pd.read_csv(target.with_suffix(".csv"))
    label = f"synthetic embeddings, {table['dim'][0]} dimensions, K = {table['clusters'][0]}"
    style.save(quality(table, f"{label}, {table['cores'][0]} CPU cores"), target)


if __name__ == "__main__":
    main()
