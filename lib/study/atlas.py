"""The clusters of a run one by one: whom they hold, who stands for them, and what is more frequent
in them than elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from lib.study.enrichment import CLINICAL, enrichment


@dataclass(frozen=True)
class Cluster:
    """One cluster.

    Attributes
    ----------
    number : int
    size : int
        Images in it.
    medoid : int
        Row of the image whose summed distance to the others is least.
    nearest : ndarray of int
        Rows of the images nearest to the centroid, the nearest first, without the medoid.
    mean : ndarray, shape (H, W), float
        Of all its images, gray levels 0 to 255.
    enriched : list of (property, share, elsewhere, q)
        Findings that are more frequent in it than elsewhere at the false-discovery rate asked for,
        the largest odds first.
    """

    number: int
    size: int
    medoid: int
    nearest: np.ndarray
    mean: np.ndarray
    enriched: list[tuple[str, float, float, float]]


def medoid(points: np.ndarray) -> int:
    """Row of the point whose summed Euclidean distance to all points (M, d) is least; the first of
    several.
    """
    total = np.concatenate(
        [
            cdist(points[start : start + 1024], points).sum(axis=1)
            for start in range(0, len(points), 1024)
        ]
    )
    return int(np.argmin(total))


def atlas(
    images: np.ndarray,
    embedding: np.ndarray,
    assignments: np.ndarray,
    properties: Mapping[str, tuple[str, np.ndarray, np.ndarray]],
    n_nearest: int = 7,
    level: float = 0.05,
) -> list[Cluster]:
    """Describe every cluster of a run.

    Parameters
    ----------
    images : uint8, shape (N, H, W)
    embedding : ndarray, shape (N, d)
        What was clustered.
    assignments : int, shape (N,)
    properties : mapping
        As `lib.study.enrichment.attributes` gives them; only findings are named.
    n_nearest : int
        Images nearest to the centroid, at most.
    level : float
        False-discovery rate (over all properties and clusters).

    Returns
    -------
    list of Cluster
        The largest first; empty clusters are not there.

    Raises
    ------
    ValueError
        Lengths that differ, or `n_nearest` < 0.
    """
    if not len(images) == len(embedding) == len(assignments):
        raise ValueError(
            f"{len(images)} images, {len(embedding)} rows of the embedding and {len(assignments)} assignments are not as many"
        )
    if n_nearest < 0:
        raise ValueError(f"n_nearest must be at least 0, got {n_nearest}")
    embedding, assignments = np.asarray(embedding, dtype=np.float64), np.asarray(assignments)
    table = enrichment(assignments, properties)
    more = table[(table["kind"] == CLINICAL) & (table["q"] <= level) & (table["log2_odds"] > 0)]
    more = more.sort_values(["log2_odds", "property"], ascending=[False, True], kind="stable")
    numbers, sizes = np.unique(assignments, return_counts=True)
    found = []
    for place in np.argsort(-sizes, kind="stable"):
        number = int(numbers[place])
        members = np.flatnonzero(assignments == number)
        points = embedding[members]
        middle = members[medoid(points)]
        order = members[
            np.argsort(np.linalg.norm(points - points.mean(axis=0), axis=1), kind="stable")
        ]
        rows = more[more["cluster"] == number]
        enriched = list(
            zip(rows["property"], rows["share"], rows["elsewhere"], rows["q"], strict=True)
        )
        mean = _mean(images, members)
        found.append(
            Cluster(
                number,
                int(sizes[place]),
                int(middle),
                order[order != middle][:n_nearest],
                mean,
                enriched,
            )
        )
    return found


def _mean(images: np.ndarray, members: np.ndarray) -> np.ndarray:
    total = sum(
        np.asarray(images[members[start : start + 4096]]).sum(axis=0, dtype=np.float64)
        for start in range(0, len(members), 4096)
    )
    return np.asarray(total) / len(members)


def follow(assignments: np.ndarray) -> np.ndarray:
    """Number clusters through time: K-means numbers them anew at each epoch, here each keeps the
    number of the one it becomes.

    From the last epoch backwards, the clusters of an epoch are paired with those of the next so
    that the most images keep their number (Kuhn 1955, *The Hungarian method for the assignment
    problem*).

    Parameters
    ----------
    assignments : int, shape (epochs, N)
        Each row 0 to K - 1; the last keeps its numbers.

    Returns
    -------
    ndarray, shape (epochs, N), int64
    """
    assignments = np.asarray(assignments, dtype=np.int64)
    k = int(assignments.max()) + 1
    followed = assignments.copy()
    for epoch in range(len(assignments) - 2, -1, -1):
        shared = np.zeros((k, k), dtype=np.int64)
        np.add.at(shared, (assignments[epoch], followed[epoch + 1]), 1)
        followed[epoch] = linear_sum_assignment(-shared)[1][assignments[epoch]]
    return followed


def stability(assignments: np.ndarray) -> np.ndarray:
    """How well each final cluster was there at each epoch: the largest Jaccard index with any
    cluster of that epoch.

    Hennig 2007, *Cluster-wise assessment of cluster stability*, section 2, with epochs in the place
    of resamples.

    Parameters
    ----------
    assignments : int, shape (epochs, N)
        Each row 0 to K - 1.

    Returns
    -------
    ndarray, shape (epochs, K)
        0 to 1; NaN for a cluster that is empty at the last epoch.
    """
    assignments = np.asarray(assignments, dtype=np.int64)
    k = int(assignments.max()) + 1
    final = np.bincount(assignments[-1], minlength=k)
    found = np.full((len(assignments), k), np.nan)
    for epoch, labels in enumerate(assignments):
        shared = np.zeros((k, k))
        np.add.at(shared, (labels, assignments[-1]), 1)
        union = np.bincount(labels, minlength=k)[:, None] + final - shared
        found[epoch, final > 0] = (shared / np.maximum(union, 1)).max(axis=0)[final > 0]
    return found


def contents(clusters: list[Cluster]) -> pd.DataFrame:
    """The atlas as a table: ``cluster, size, medoid, enriched``; medoid is a row of the images."""
    text = [
        "; ".join(
            f"{name} {share:.0%} (elsewhere {base:.0%})" for name, share, base, _ in c.enriched
        )
        for c in clusters
    ]
    columns = {
        "cluster": [c.number for c in clusters],
        "size": [c.size for c in clusters],
        "medoid": [c.medoid for c in clusters],
    }
    return pd.DataFrame(columns | {"enriched": text})
