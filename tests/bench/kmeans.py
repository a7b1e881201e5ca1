"""How fast K-means is against scikit-learn and faiss, what a warm start saves and does to NMI, and
how time and memory grow with N.

    python tests/bench/kmeans.py [--device cpu|cuda] [--points 112120] [--clusters 200] [--dims 64
    256] [--repeats 5] [--skip growth ...]

Times are of whole fits of 20 iterations from one start, which all engines get, interleaved in one
process: medians over the rounds. The embeddings are synthetic: correlated, in overlapping clusters,
without clear borders. On a GPU the same code runs on tensors there, and scikit-learn and faiss stay
on the CPU for the inertia alone."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import sklearn.cluster
import torch
from sklearn.metrics import normalized_mutual_info_score
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.kmeans import KMeans  # noqa: E402

ITERATIONS = 20


def embeddings(n: int, d: int, seed: int = 0, clusters: int = 300) -> np.ndarray:
    """Synthetic embeddings (n, d), float32, rows of unit length: clusters of unequal size and width
    that overlap.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, d)).astype(np.float32)
    widths = rng.uniform(0.8, 2.0, clusters).astype(np.float32)
    owner = rng.choice(clusters, n, p=rng.dirichlet(np.full(clusters, 2.0)))
    x = rng.standard_normal((n, d), dtype=np.float32)
    for start in range(0, n, 2**16):  # no second array of this size
        block = slice(start, start + 2**16)
        x[block] *= widths[owner[block], None]
        x[block] += centres[owner[block]]
        x[block] /= np.linalg.norm(x[block], axis=1, keepdims=True)
    return x


def seconds(job: Callable[[], object], device: str) -> tuple[float, object]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = job()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def peak_growth(job: Callable[[], object], device: str) -> int:
    """Largest memory during `job` above that before it, in bytes."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job()
        return torch.cuda.max_memory_allocated() - before

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = peak = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        job()
    finally:
        done.set()
        watcher.join()
    return peak - before


def speed(x: np.ndarray, k: int, device: str, repeats: int) -> None:
    n, d = x.shape
    start = x[np.random.default_rng(1).choice(n, k, replace=False)]
    points = torch.from_numpy(x).to(device) if device == "cuda" else x

    def ours() -> float:
        return KMeans(k, max_iter=ITERATIONS, tol=0.0, init=start).fit(points).inertia_

    def scikit() -> float:
        with threadpool_limits(2 if device == "cpu" else None):
            return (
                sklearn.cluster.KMeans(k, init=start, n_init=1, max_iter=ITERATIONS, tol=0.0)
                .fit(x)
                .inertia_
            )

    def with_faiss() -> float:
        import faiss

        if device == "cpu":
            faiss.omp_set_num_threads(2)
        engine = faiss.Kmeans(
            d, k, niter=ITERATIONS, min_points_per_centroid=1, max_points_per_centroid=n
        )
        engine.train(x, init_centroids=start)
        return engine

    jobs = {"this project": ours, "scikit-learn": scikit}
    if find_spec("faiss"):
        jobs["faiss"] = with_faiss
    else:
        print("    faiss is left out: not installed (pip install faiss-cpu)")
    times = {name: [] for name in jobs}
    inertia = {}
    for turn in range(repeats + 1):
        # in turn forwards and backwards: the threads of one engine may still spin while the next
        # one starts
        for name, job in list(jobs.items())[:: -1 if turn % 2 else 1]:
            elapsed, result = seconds(job, device)
            if turn:  # the first round warms up
                times[name].append(elapsed)
            if name == "faiss":  # it reports the inertia before its last move
                result = (
                    float(result.index.search(x, 1)[0].sum(dtype=np.float64))
                    if not turn
                    else inertia.get(name)
                )
            inertia[name] = result
    for name, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(times["scikit-learn"], values, strict=True))
        print(
            f"    d = {d:<4}{name:<14}{statistics.median(values):8.3f} s {1000 * statistics.median(values) / ITERATIONS:8.2f} ms each"
            f"  speed {ratio:5.2f} of scikit-learn's  inertia {inertia[name] / inertia['scikit-learn']:.5f} of its"
        )


def warm_start(n: int, d: int, k: int, device: str, epochs: int) -> None:
    """Cold and warm fits, to the tolerance, of embeddings that drift from epoch to epoch as a
    network's do, axes turned at random.
    """
    rng = np.random.default_rng(2)
    base = embeddings(n, d)
    lines: dict[str, list] = {"cold": [], "warm": []}
    last: dict[str, object] = {}
    for epoch in range(epochs + 1):
        base = base + 0.02 * rng.standard_normal(base.shape, dtype=np.float32)
        base /= np.linalg.norm(base, axis=1, keepdims=True)
        turn = np.linalg.qr(rng.normal(size=(d, d)))[0].astype(np.float32)  # a new PCA has new axes
        points = torch.from_numpy(base @ turn).to(device) if device == "cuda" else base @ turn
        for name in lines:
            init = last.get("warm") if name == "warm" else None
            elapsed, model = seconds(
                lambda init=init, epoch=epoch: KMeans(k, seed=epoch, init=init).fit(points), device
            )  # noqa: B023
            labels = model.labels_
            if epoch:
                before, now = (np.asarray(torch.as_tensor(a).cpu()) for a in (last[name], labels))
                lines[name].append(
                    (
                        elapsed,
                        model.n_iter_,
                        model.inertia_,
                        normalized_mutual_info_score(before, now),
                    )
                )
            last[name] = labels
    cold, warm = (np.median(np.array(lines[name]), axis=0) for name in ("cold", "warm"))
    ratio = np.median([a[0] / b[0] for a, b in zip(lines["cold"], lines["warm"], strict=True)])
    print(
        f"    d = {d}, {epochs} epochs, cold: {cold[0]:.2f} s, {cold[1]:.0f} iterations, NMI(t, t-1) {cold[3]:.3f}"
    )
    print(
        f"    d = {d}, {epochs} epochs, warm: {warm[0]:.2f} s, {warm[1]:.0f} iterations, NMI(t, t-1) {warm[3]:.3f}"
    )
    print(
        f"    warm is {ratio:.1f} times as fast, inertia {warm[2] / cold[2]:.4f} of cold, NMI(t, t-1) inflated by {warm[3] - cold[3]:+.3f}"
    )


def growth(n: int, d: int, k: int, device: str, repeats: int) -> None:
    large = embeddings(10 * n, d)
    points = torch.from_numpy(large).to(device) if device == "cuda" else large
    start = large[np.random.default_rng(1).choice(10 * n, k, replace=False)]

    def job(rows):
        return KMeans(k, max_iter=ITERATIONS, tol=0.0, init=start).fit(rows)

    extra = peak_growth(lambda: job(points), device)
    ratios = []
    for _ in range(repeats):
        small, big = (
            seconds(lambda: job(points[:n]), device)[0],
            seconds(lambda: job(points), device)[0],
        )
        ratios.append(big / small)
    print(
        f"    d = {d:<4}{10 * n:,} points take {statistics.median(ratios):5.2f} times as long as {n:,}, {extra / 1e9:.2f} GB extra"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--points", type=int, default=112_120)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--skip", nargs="*", choices=["speed", "warm", "growth"], default=[])
    options = parser.parse_args()
    processor = (
        torch.cuda.get_device_name()
        if options.device == "cuda"
        else f"{platform.machine()}, 2 of {os.cpu_count()} cores"
    )
    print(
        f"K-means, N = {options.points:,}, K = {options.clusters}, float32, synthetic embeddings; {processor}"
    )
    if "speed" not in options.skip:
        print(f"  {ITERATIONS} iterations from one start, medians of {options.repeats}")
        for d in options.dims:
            speed(embeddings(options.points, d), options.clusters, options.device, options.repeats)
    if "warm" not in options.skip:
        print("  warm start from the last epoch's labels, drifting embeddings, to the tolerance")
        warm_start(
            options.points, options.dims[0], options.clusters, options.device, options.epochs
        )
    if "growth" not in options.skip:
        print(f"  growth, {ITERATIONS} iterations")
        for d in options.dims:
            growth(options.points, d, options.clusters, options.device, 3)


if __name__ == "__main__":
    main()
