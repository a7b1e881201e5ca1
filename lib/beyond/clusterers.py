"""Two more clusterers: cells of equal size, and the consensus of several K-means."""

from typing import Self

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import KMeans
from sklearn.utils.validation import validate_data

from lib.beyond.labels import vote

SHARPNESS = 0.05  # the temperature of the assignment, in units of the mean squared distance
VOTERS = 5  # K-means in a consensus


def balanced(cost: np.ndarray, tolerance: float = 1e-3, rounds: int = 1000) -> np.ndarray:
    """The plan (N, K) that assigns N images to K clusters of equal size at the least cost (N, K),
    blurred by an entropy of weight 1: rows sum to 1 / N, columns to 1 / K.

    Sinkhorn and Knopp (1967); Cuturi (2013). Rows are exact, columns to a relative `tolerance`, or
    what `rounds` of scaling give. SeLa (Asano et al. 2020) and SwAV (Caron et al. 2020) make their
    pseudo-labels so. Costs are finite."""
    n, k = cost.shape
    plan = np.exp(cost.min(axis=1, keepdims=True) - cost)  # (N, K), the largest of a row is 1
    columns = np.ones(k)
    for _ in range(rounds):
        rows = 1 / (n * (plan @ columns))  # (N,)
        sums = columns * (rows @ plan)  # (K,), of the plan whose rows are exact
        if np.abs(k * sums - 1).max() < tolerance:
            break
        columns /= k * np.maximum(sums, 1e-300)
    rows = 1 / (n * (plan @ columns))
    return rows[:, None] * plan * columns


class _OnKMeans(ClusterMixin, BaseEstimator):
    """Base of the two: labels that start from K-means; centroids are the means of the clusters."""

    def __init__(self, n_clusters: int = 2, random_state: int = 0) -> None:
        self.n_clusters = n_clusters
        self.random_state = random_state

    def _kmeans(self, points: np.ndarray, number: int = 0) -> KMeans:
        seed = self.random_state + number
        return KMeans(self.n_clusters, n_init=1, max_iter=100, random_state=seed).fit(points)

    def _labels(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels (N,), and centroids (K, D) for clusters that stay empty."""
        raise NotImplementedError

    def fit(self, points: np.ndarray, y: None = None) -> Self:
        """Cluster `points` (N, D): ``labels_`` (N,), ``cluster_centers_`` (K, D)."""
        points = validate_data(self, points, dtype=[np.float64, np.float32], ensure_min_samples=2)
        self.labels_, centres = self._labels(points)
        counts = np.bincount(self.labels_, minlength=len(centres))
        sums = np.stack([np.bincount(self.labels_, c, len(centres)) for c in points.T], axis=1)
        means = sums / np.maximum(counts, 1)[:, None]
        self.cluster_centers_ = np.where(counts[:, None] > 0, means, centres)
        return self


class SinkhornClusters(_OnKMeans):
    """K-means' centroids, but clusters of about equal size: each image goes where the `balanced`
    plan of the squared distances sends most of it. Not always to its nearest centroid."""

    def _labels(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = self._kmeans(points)
        cost = found.transform(points).astype(np.float64) ** 2  # (N, K)
        plan = balanced(cost / max(SHARPNESS * cost.mean(), 1e-300))
        return plan.argmax(axis=1), found.cluster_centers_


class ConsensusClusters(_OnKMeans):
    """The `lib.beyond.labels.vote` of five K-means from different starts; of these the one of least
    inertia names the clusters."""

    def _labels(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [self._kmeans(points, number) for number in range(VOTERS)]
        found.sort(key=lambda one: -one.inertia_)
        return vote([one.labels_ for one in found]), found[-1].cluster_centers_


CLUSTERERS = {"sinkhorn": SinkhornClusters, "consensus": ConsensusClusters}
