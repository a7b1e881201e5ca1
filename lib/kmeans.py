"""Clusterings of whitened features, by name: scikit-learn's estimators.

K-means costs N x K x D per iteration; ``tests/bench/clusterers.py`` draws what the others give up
in quality for their time."""

from typing import Self

import numpy as np
import scipy.sparse
from sklearn.base import ClusterMixin
from sklearn.cluster import AgglomerativeClustering, BisectingKMeans, KMeans, MiniBatchKMeans
from sklearn.neighbors import kneighbors_graph
from sklearn.utils import check_array

try:
    from lib.beyond.clusterers import CLUSTERERS as BEYOND
except ImportError:  # without lib/beyond there are four
    BEYOND = {}

N_NEIGHBORS = 15
CLUSTERERS = ("kmeans", "minibatch", "hierarchical", "graph", *BEYOND)


def make_clusterer(name: str, n_clusters: int, seed: int) -> ClusterMixin:
    """An estimator with ``fit_predict`` and, once fitted, ``cluster_centers_`` (K, D).

    "kmeans" is Lloyd's, from one greedy k-means++ start (Arthur and Vassilvitskii 2007);
    "minibatch" is mini-batch K-means (Sculley 2010); "hierarchical" bisects the cluster of largest
    inertia until there are K; "graph" is `GraphClusters`; "sinkhorn" and "consensus" are in
    `lib.beyond.clusterers`. ValueError for any other name."""
    if name == "kmeans":
        return KMeans(n_clusters, n_init=1, max_iter=100, random_state=seed)
    if name == "minibatch":
        return MiniBatchKMeans(n_clusters, n_init=1, batch_size=4096, random_state=seed)
    if name == "hierarchical":
        return BisectingKMeans(n_clusters, random_state=seed)
    if name == "graph":
        return GraphClusters(n_clusters)
    if name in BEYOND:
        return BEYOND[name](n_clusters, random_state=seed)
    raise ValueError(f"unknown clusterer {name!r}; choose one of {', '.join(CLUSTERERS)}")


class GraphClusters(AgglomerativeClustering):
    """Ward's method along the edges of the graph of 15 nearest neighbours: only neighbours are
    joined, so that time and memory grow almost linearly with N, and clusters need not be round."""

    def __init__(self, n_clusters: int = 2) -> None:
        super().__init__(n_clusters, connectivity=_neighbours)

    def fit(self, points: np.ndarray, y: None = None) -> Self:
        """Cluster `points` (N, D); ``cluster_centers_`` (K, D) are the means of the clusters."""
        super().fit(points)
        counts = np.bincount(self.labels_)
        columns = [np.bincount(self.labels_, c) / counts for c in check_array(points).T]
        self.cluster_centers_ = np.stack(columns, axis=1)
        return self


def _neighbours(points: np.ndarray) -> scipy.sparse.csr_matrix:
    """The graph (N, N) of nearest neighbours, in one piece for any K: consecutive points in the
    order of the first axis are joined, too."""
    n = len(points)
    graph = kneighbors_graph(points, min(N_NEIGHBORS, n - 1), include_self=False)
    order = np.argsort(points[:, 0], kind="stable")
    chain = scipy.sparse.csr_matrix((np.ones(n - 1), (order[:-1], order[1:])), (n, n))
    return graph + graph.T + chain + chain.T


def nearest(embedding: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid (N,) of each row of `embedding` (N, D), centroids (K, D)."""
    # |x - c|^2 without |x|^2, which is the same for all centroids
    return np.argmin((centroids**2).sum(1) - 2 * embedding @ centroids.T, axis=1)
