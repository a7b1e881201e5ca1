"""Clusterings of whitened features, by name: scikit-learn's estimators, and communities of a
nearest-neighbour graph.

K-means costs N x K x D per iteration; ``tests/bench/clusterers.py`` draws what the others give up
in quality for their time.
"""

from __future__ import annotations

import importlib
import math
import random

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.cluster import AgglomerativeClustering, BisectingKMeans, KMeans, MiniBatchKMeans
from sklearn.neighbors import NearestNeighbors


def make_clusterer(name: str, n_clusters: int, seed: int) -> ClusterMixin:
    """An estimator with ``fit_predict`` and, once fitted, ``cluster_centers_``.

    Parameters
    ----------
    name : {"kmeans", "minibatch", "hierarchical", "graph"}
        Lloyd's K-means from one greedy k-means++ start (Arthur and Vassilvitskii 2007); mini-batch
        K-means (Sculley 2010); bisecting K-means, which splits the cluster of largest inertia
        until there are K; `GraphClusters`.
    n_clusters : int
        K.
    seed : int

    Raises
    ------
    ValueError
        Unknown name.
    """
    if name not in CLUSTERERS:
        raise ValueError(f"unknown clusterer {name!r}; choose one of {', '.join(CLUSTERERS)}")
    return CLUSTERERS[name](n_clusters, random_state=seed, **OPTIONS.get(name, {}))


def nearest(embedding: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid (N,) of each row of `embedding` (N, D), centroids (K, D)."""
    # |x - c|^2 without |x|^2, which is the same for all centroids
    return np.argmin((centroids**2).sum(1) - 2 * embedding @ centroids.T, axis=1)


class GraphClusters(ClusterMixin, BaseEstimator):
    """Communities of the graph of nearest neighbours by the Leiden algorithm (Traag, Waltman and
    van Eck 2019), joined by Ward's method until there are K.

    The resolution is bisected down to the fewest communities that are at least K. Clusters need
    not be round. Only `max_points` points enter the graph, whose cost grows with their square; the
    other points go to the nearest mean. Needs igraph.

    Parameters
    ----------
    n_clusters : int
    random_state : int
    n_neighbors : int
        Neighbours per point in the graph.
    max_points : int
        Points in the graph, drawn if there are more.

    Attributes
    ----------
    labels_ : ndarray, shape (N,)
    cluster_centers_ : ndarray, shape (K, D)
        Means of the clusters.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        random_state: int = 0,
        n_neighbors: int = 15,
        max_points: int = 30_000,
    ) -> None:
        self.n_clusters = n_clusters
        self.random_state = random_state
        self.n_neighbors = n_neighbors
        self.max_points = max_points

    def fit(self, points: np.ndarray, y: None = None) -> GraphClusters:
        """Cluster `points`, (N, D); ModuleNotFoundError that says what to install without igraph."""
        points = np.asarray(points)
        rng = np.random.default_rng(self.random_state)
        n = min(len(points), self.max_points)
        drawn = np.sort(rng.choice(len(points), n, replace=False))
        found = self._communities(points[drawn])
        means = _means(points[drawn], found)
        if len(means) > self.n_clusters:
            found = AgglomerativeClustering(self.n_clusters).fit_predict(means)[found]
            means = _means(points[drawn], found)
        self.labels_ = nearest(points, means) if n < len(points) else found
        self.labels_[drawn] = found
        self.cluster_centers_ = _means(points, self.labels_)
        return self

    def _communities(self, points: np.ndarray) -> np.ndarray:
        try:
            igraph = importlib.import_module("igraph")
        except ModuleNotFoundError as error:
            message = 'the clusterer "graph" needs igraph: pip install "igraph>=0.11"'
            raise ModuleNotFoundError(message, name="igraph") from error
        n = len(points)
        search = NearestNeighbors(n_neighbors=min(self.n_neighbors, n - 1), algorithm="brute")
        neighbours = search.fit(points).kneighbors(return_distance=False)
        edges = np.stack([np.repeat(np.arange(n), neighbours.shape[1]), neighbours.ravel()], 1)
        graph = igraph.Graph(n, np.unique(np.sort(edges, axis=1), axis=0))
        low, high, best = math.log(1e-2), math.log(max(1e3, n)), np.arange(n)
        try:
            for _ in range(12):
                # igraph draws from one generator for the whole process
                igraph.set_random_number_generator(random.Random(self.random_state))
                middle = (low + high) / 2
                leiden = graph.community_leiden(
                    "modularity", resolution=math.exp(middle), n_iterations=2
                )
                enough = len(leiden) >= self.n_clusters
                low, high = (low, middle) if enough else (middle, high)
                best = np.array(leiden.membership) if enough else best
                if len(leiden) == self.n_clusters:
                    break
        finally:
            igraph.set_random_number_generator(random)
        return best


def _means(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean (K, D) of each label's points."""
    sums = np.zeros((labels.max() + 1, points.shape[1]))
    np.add.at(sums, labels, points)
    return sums / np.bincount(labels)[:, None]


CLUSTERERS = {
    "kmeans": KMeans,
    "minibatch": MiniBatchKMeans,
    "hierarchical": BisectingKMeans,
    "graph": GraphClusters,
}
OPTIONS = {
    "kmeans": {"n_init": 1, "max_iter": 100},
    "minibatch": {"n_init": 1, "batch_size": 4096},
}
