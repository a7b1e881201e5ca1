"""How fast PCA-whitening is against scikit-learn's solvers, how well it agrees with them, and its
memory at the paper's full size.

    python tests/bench/pca.py [--rows 20000] [--features 2048] [--full-rows 112120] [--full-features
    4096] [--components 256] [--repeats 1]

Fit and transform of float32 features with a falling spectrum, all in one process. scikit-learn's
full SVD is run at the smaller size only; the full size is a memory map in a temporary folder (1.8
GB, removed afterwards), fitted in a process of its own whose peak memory is read from the system
(the pages of the memory map that are in memory count)."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lib.features import PCAWhiten  # noqa: E402


def fill(x: np.ndarray, seed: int = 0, inner: int = 512) -> np.ndarray:
    """Write features into `x` (N, D): `inner` directions of falling variance, away from the origin,
    and a little noise in all others.
    """
    rng = np.random.default_rng(seed)
    axes = (
        rng.standard_normal((inner, x.shape[1]), dtype=np.float32)
        * (np.arange(1, inner + 1, dtype=np.float32) ** -0.75)[:, None]
    )
    for start in range(0, len(x), 4096):
        rows = len(x[start : start + 4096])
        x[start : start + rows] = rng.standard_normal((rows, inner), dtype=np.float32) @ axes + 3.0
        x[start : start + rows] += 0.01 * rng.standard_normal((rows, x.shape[1]), dtype=np.float32)
    return x


def of_full_size(path: str, components: int) -> None:
    x = np.load(path, mmap_mode="r")
    start = time.perf_counter()
    z = PCAWhiten(components).fit_transform(x)
    elapsed = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    features = x.nbytes / 1e9
    print(
        f"  {x.shape[0]:,} x {x.shape[1]:,} to {z.shape[1]}: {elapsed:.1f} s, peak {peak / 1e9:.2f} GB in all (features {features:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=2_048)
    parser.add_argument("--full-rows", type=int, default=112_120)
    parser.add_argument("--full-features", type=int, default=4_096)
    parser.add_argument("--components", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--full-size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.full_size:
        of_full_size(options.full_size, options.components)
        return
    print(
        f"PCA-whitening of float32 features; {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    )
    x = fill(np.empty((options.rows, options.features), dtype=np.float32))
    engines = {
        "this project": lambda: PCAWhiten(options.components, l2=False),
        "scikit-learn, full SVD": lambda: PCA(options.components, whiten=True, svd_solver="full"),
        "scikit-learn, covariance": lambda: PCA(
            options.components, whiten=True, svd_solver="covariance_eigh"
        ),
    }
    times, fitted, whitened = {name: [] for name in engines}, {}, {}
    for _ in range(options.repeats):
        for name, make in engines.items():
            fitted[name] = make()
            start = time.perf_counter()
            whitened[name] = fitted[name].fit_transform(x)
            times[name].append(time.perf_counter() - start)
    ours = fitted["this project"]
    for name, values in times.items():
        signs = np.sign((ours.components_ * fitted[name].components_).sum(axis=1))
        apart = np.abs(whitened["this project"] - signs * whitened[name]).max()
        variance = np.abs(fitted[name].explained_variance_ / ours.explained_variance_ - 1).max()
        ratio = statistics.median(a / b for a, b in zip(values, times["this project"], strict=True))
        print(
            f"  {len(x):,} x {x.shape[1]:,} to {options.components}, {name:<26}{statistics.median(values):7.2f} s, {ratio:5.1f} times ours;"
            f" apart from ours: variances {variance:.0e}, whitened values {apart:.0e}"
        )
    exact = PCAWhiten(options.components, l2=False).fit(x.astype(np.float64))
    same = np.sign((ours.components_ * exact.components_).sum(axis=1))
    print(
        f"  against float64 features: variances {np.abs(ours.explained_variance_ / exact.explained_variance_ - 1).max():.0e}, "
        f"axes {np.abs(ours.components_ - same[:, None] * exact.components_).max():.0e}"
    )
    centred = x - x.mean(axis=0)
    single = np.linalg.eigvalsh((centred.T @ centred / (len(x) - 1)).astype(np.float64))
    double = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64)))
    print(
        f"  products of float32 instead: the smallest variance is wrong by {abs(single[0] / double[0] - 1):.0e}, "
        f"and the error is {np.abs(single - double).max() / double[-1]:.0e} of the largest one"
    )
    del x, whitened, centred
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        shape = (options.full_rows, options.full_features)
        full = fill(np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape))
        full.flush()
        del full
        command = [
            sys.executable,
            __file__,
            "--full-size",
            str(path),
            "--components",
            str(options.components),
        ]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


if __name__ == "__main__":
    main()
