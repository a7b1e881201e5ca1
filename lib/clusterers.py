"""Other clusterings behind the interface of `lib.kmeans.KMeans`: mini-batch and hierarchical
K-means, and communities of a graph.

K-means costs N x K x D an iteration and is the first limit of the method at scale;
``tests/bench/clusterers.py`` draws what each of these gives up in quality for its time."""

from __future__ import annotations

import inspect
import math
import random
import warnings
from collections.abc import Callable

import numpy as np
import sklearn
import sklearn.cluster
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import Tensor

from lib.features import as_kind
from lib.kmeans import (
    KMeans,
    assign,
    checked_rows,
    cluster_sums,
    fill_by_splitting,
    full_precision,
    squared_distances,
)


def make_clusterer(
    name: str, n_clusters: int, seed: int = 0, **options: object
) -> KMeans | Clusterer:
    """The clusterer called `name`, with ``fit``, ``fit_predict``, ``predict``,
    ``cluster_centers_``, ``labels_`` and ``inertia_``.

    Parameters
    ----------
    name : {"kmeans", "minibatch", "hierarchical", "graph"}
        `lib.kmeans.KMeans`, `MiniBatchKMeans`, `HierarchicalKMeans` or `GraphClusters`.
    n_clusters : int
        K; all of them give exactly K clusters, unless there are fewer distinct points.
    seed : int
    **options
        Further arguments of the class.

    Raises
    ------
    ValueError
        Unknown name, or an option out of range.
    TypeError
        An option the class does not have; the message lists those it has.
    """
    if name not in CLUSTERERS:
        raise ValueError(
            f"there is no clusterer {name!r}: choose one of {', '.join(map(repr, CLUSTERERS))}"
        )
    known = [
        option
        for option in inspect.signature(CLUSTERERS[name]).parameters
        if option not in ("n_clusters", "seed")
    ]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TypeError(
            f"clusterer {name!r} has no option {unknown[0]!r}: it takes {', '.join(known)}"
        )
    return CLUSTERERS[name](n_clusters, seed=seed, **options)


class Clusterer:
    """What the clusterers of this module share: checks, and labels by the nearest centre.

    Attributes
    ----------
    cluster_centers_ : (n_clusters, D)
        Means of the clusters' points.
    labels_ : (N,), int64, 0 to n_clusters - 1
        Both arrays after fitting an array, tensors on the data's device after fitting a tensor.
    inertia_ : float
        Sum of squared distances of the points to the centres of their clusters.
    n_iter_ : int
        Iterations run.
    """

    def __init__(self, n_clusters: int, seed: int, **counts: int) -> None:
        for name, value in {"n_clusters": n_clusters, **counts}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.n_clusters = n_clusters
        self.seed = seed

    def fit(self, points: np.ndarray | Tensor) -> Clusterer:
        """Cluster `points`, (N, D); parameters, errors and warning as `lib.kmeans.KMeans.fit`."""
        x = checked_rows(points)
        if self.n_clusters > len(x):
            raise ValueError(
                f"n_clusters={self.n_clusters} is larger than the number of points, {len(x)}: ask for fewer clusters"
            )
        centers, labels, self.n_iter_ = self._fit(x)
        if (torch.bincount(labels, minlength=self.n_clusters) == 0).any():
            centers, labels = fill_by_splitting(x, centers, labels)
        self.inertia_ = float(squared_distances(x, labels, centers).sum(dtype=torch.float64))
        self.cluster_centers_ = as_kind(centers, points)
        self.labels_ = as_kind(labels, points)
        used = len(labels.unique())
        if used < self.n_clusters:
            warnings.warn(
                f"only {used} of n_clusters={self.n_clusters} clusters hold points: "
                f"the {len(x)} points have {len(x.unique(dim=0))} distinct values",
                RuntimeWarning,
                stacklevel=2,
            )
        return self

    def _fit(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Centres (K, D), labels (N,) and number of iterations."""
        raise NotImplementedError

    def fit_predict(self, points: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """``fit(points).labels_``."""
        return self.fit(points).labels_

    def predict(self, points: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Cluster of each point; parameters and errors as `lib.kmeans.KMeans.predict`."""
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError(f"{type(self).__name__} is not fitted yet: call fit first")
        x = checked_rows(points)
        centers = torch.as_tensor(self.cluster_centers_, dtype=x.dtype, device=x.device)
        if x.shape[1] != centers.shape[1]:
            raise ValueError(
                f"points have {x.shape[1]} columns, but the centres have {centers.shape[1]}"
            )
        with full_precision():
            return as_kind(self._nearest(x, centers), points)

    def _nearest(self, x: Tensor, centers: Tensor) -> Tensor:
        return assign(x, centers)


class MiniBatchKMeans(Clusterer):
    """scikit-learn's mini-batch K-means (Sculley 2010, *Web-scale k-means clustering*): each
    iteration looks at `batch_size` points.

    Runs on the CPU, whatever the device of the points.

    Parameters
    ----------
    n_clusters, seed
        As `lib.kmeans.KMeans`.
    batch_size : int
    max_iter : int
        Most passes over the data; it stops earlier when ten batches bring no gain.
    threads : int or None
        As `lib.kmeans.KMeans`.
    """

    def __init__(
        self,
        n_clusters: int,
        seed: int = 0,
        *,
        batch_size: int = 4096,
        max_iter: int = 100,
        threads: int | None = 2,
    ) -> None:
        super().__init__(
            n_clusters,
            seed,
            batch_size=batch_size,
            max_iter=max_iter,
            **({} if threads is None else {"threads": threads}),
        )
        self.batch_size, self.max_iter, self.threads = batch_size, max_iter, threads

    def _fit(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        engine = sklearn.cluster.MiniBatchKMeans(
            self.n_clusters,
            batch_size=self.batch_size,
            max_iter=self.max_iter,
            random_state=self.seed,
            n_init=1,
        )
        with (
            warnings.catch_warnings(),
            threadpool_limits(self.threads),
            sklearn.config_context(assume_finite=True),
        ):
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # fewer distinct points than clusters: said in fit
            engine.fit(x.cpu().numpy())
        centers, labels = (
            torch.from_numpy(a).to(x.device)
            for a in (engine.cluster_centers_, engine.labels_.astype(np.int64))
        )
        return centers, labels, int(engine.n_iter_)


class HierarchicalKMeans(Clusterer):
    """Two levels of K-means: about sqrt(K) coarse clusters, each split by its own K-means, K
    clusters in all.

    An iteration costs N x sqrt(K) x D instead of N x K x D. A coarse cluster gets a share of the K
    in proportion to its points, at least one. `predict` walks down the tree: to the nearest coarse
    centre, then to the nearest centre below it, as Nister and Stewenius 2006, *Scalable recognition
    with a vocabulary tree*, do at every level.

    Parameters
    ----------
    n_clusters, seed
        As `lib.kmeans.KMeans`.
    n_coarse : int or None
        Coarse clusters; None takes sqrt(K), rounded.
    **options
        Of both levels' `lib.kmeans.KMeans`: max_iter, tol, n_init, engine, threads, budget_bytes.
    """

    def __init__(
        self,
        n_clusters: int,
        seed: int = 0,
        *,
        n_coarse: int | None = None,
        max_iter: int = 100,
        tol: float = 1e-4,
        n_init: int = 1,
        engine: str = "auto",
        threads: int | None = 2,
    ) -> None:
        super().__init__(n_clusters, seed)
        self.n_coarse = max(1, round(math.sqrt(n_clusters))) if n_coarse is None else n_coarse
        if not 1 <= self.n_coarse <= n_clusters:
            raise ValueError(f"n_coarse must be from 1 to n_clusters={n_clusters}, got {n_coarse}")
        self._options = {
            "max_iter": max_iter,
            "tol": tol,
            "n_init": n_init,
            "engine": engine,
            "threads": threads,
        }
        KMeans(1, **self._options)  # refuses what is out of range now

    def _fit(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="only .* clusters hold points", category=RuntimeWarning
            )  # said once, in fit
            self._coarse = KMeans(self.n_coarse, seed=self.seed, **self._options).fit(x)
            groups = self._coarse.labels_
            self._shares = proportional_shares(
                torch.bincount(groups, minlength=self.n_coarse).cpu().numpy(), self.n_clusters
            )
            centers = x.new_zeros(self.n_clusters, x.shape[1])
            labels = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            n_iter, first = self._coarse.n_iter_, 0
            for group, share in enumerate(self._shares.tolist()):
                if share == 0:
                    continue
                members = (groups == group).nonzero().flatten()
                # seeds apart by a stride: neighbouring epochs' seeds stay apart from the groups'
                fine = KMeans(
                    share, seed=(self.seed + 7919 * (group + 1)) % 2**32, **self._options
                ).fit(x[members])
                centers[first : first + share] = fine.cluster_centers_
                labels[members] = fine.labels_ + first
                n_iter, first = n_iter + fine.n_iter_, first + share
        return centers, labels, n_iter

    def _nearest(self, x: Tensor, centers: Tensor) -> Tensor:
        coarse = torch.as_tensor(self._coarse.cluster_centers_, dtype=x.dtype, device=x.device)
        groups = assign(x, coarse)
        labels = torch.zeros_like(groups)
        first = 0
        for group, share in enumerate(self._shares.tolist()):
            members = (groups == group).nonzero().flatten()
            if share and len(members):
                labels[members] = assign(x[members], centers[first : first + share]) + first
            first += share
        return labels


class GraphClusters(Clusterer):
    """Communities of the graph of nearest neighbours, found by the Leiden algorithm of igraph
    (Traag, Waltman and van Eck 2019).

    The resolution is searched until the number of communities is as near to K as it comes; then the
    smallest are joined to the community with the nearest mean, or the largest are cut
    (`lib.kmeans.fill_by_splitting`), until there are K. Clusters need not be round, but only
    `max_points` points enter the graph, whose cost grows with their square: the others, and those
    given to `predict`, go to the nearest mean.

    Needs igraph: ``pip install "igraph>=0.11"``. Its Leiden was 15 times faster than leidenalg's at
    the same agreement with planted clusters; HDBSCAN found 3 clusters of 200 in 64 dimensions, and
    takes no K.

    Parameters
    ----------
    n_clusters, seed
        As `lib.kmeans.KMeans`.
    n_neighbors : int
        Neighbours of a point in the graph.
    max_points : int
        Points in the graph; where there are more, as many are drawn.
    threads : int or None
        As `lib.kmeans.KMeans`.

    Raises
    ------
    ModuleNotFoundError
        igraph is not installed; the message says how to.
    """

    def __init__(
        self,
        n_clusters: int,
        seed: int = 0,
        *,
        n_neighbors: int = 15,
        max_points: int = 30_000,
        threads: int | None = 2,
    ) -> None:
        options = {} if threads is None else {"threads": threads}
        super().__init__(
            n_clusters, seed, n_neighbors=n_neighbors, max_points=max_points, **options
        )
        if max_points < n_clusters:
            raise ValueError(
                f"max_points={max_points} is smaller than n_clusters={n_clusters}: each cluster needs a point of the graph"
            )
        self.n_neighbors, self.max_points, self.threads = n_neighbors, max_points, threads
        _igraph()  # before hours of work, not after

    def _fit(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        rng = np.random.default_rng(self.seed)
        drawn = (
            np.sort(rng.choice(len(x), self.max_points, replace=False))
            if len(x) > self.max_points
            else np.arange(len(x))
        )
        drawn = torch.from_numpy(drawn).to(x.device)
        points = x[drawn]
        with threadpool_limits(self.threads):
            found, steps = self._communities(points.cpu().numpy())
        found = torch.from_numpy(found).to(x.device)
        centers = _means(points, found, int(found.max()) + 1)
        centers, found = _join_smallest(centers, found, self.n_clusters)
        if len(centers) < self.n_clusters:
            missing = centers.new_zeros(self.n_clusters - len(centers), x.shape[1])
            centers, found = fill_by_splitting(
                points, torch.cat([centers, missing]), found, reassign=False
            )
        if len(points) == len(x):
            return centers, found, steps
        with full_precision():
            used = torch.bincount(found, minlength=self.n_clusters) > 0
            labels = used.nonzero().flatten()[assign(x, centers[used])]
        labels[drawn] = found
        return _means(x, labels, self.n_clusters), labels, steps

    def _communities(self, points: np.ndarray, steps: int = 12) -> tuple[np.ndarray, int]:
        """Community (N,) of each point, as near to K of them as a search for the resolution comes,
        and runs of Leiden.
        """
        igraph = _igraph()
        n = len(points)
        neighbors = min(self.n_neighbors, n - 1)
        if neighbors == 0:
            return np.zeros(n, dtype=np.int64), 0
        with sklearn.config_context(assume_finite=True):
            nearest = (
                NearestNeighbors(n_neighbors=neighbors, algorithm="brute")
                .fit(points)
                .kneighbors(return_distance=False)
            )
        edges = np.sort(
            np.stack([np.repeat(np.arange(n), neighbors), nearest.ravel()], axis=1), axis=1
        )
        graph = igraph.Graph(n, np.unique(edges, axis=0))

        best: np.ndarray | None = None
        runs = 0
        low, high = math.log(1e-2), math.log(max(1e3, n))
        try:
            for _ in range(steps):
                # igraph draws from one generator for the whole process: set for each run, given
                # back at the end
                igraph.set_random_number_generator(random.Random(self.seed))
                middle = (low + high) / 2
                found = np.asarray(
                    graph.community_leiden(
                        "modularity", resolution=math.exp(middle), n_iterations=2
                    ).membership
                )
                runs += 1
                count = int(found.max()) + 1
                if best is None or abs(count - self.n_clusters) < abs(
                    int(best.max()) + 1 - self.n_clusters
                ):
                    best = found
                if count == self.n_clusters:
                    break
                low, high = (low, middle) if count > self.n_clusters else (middle, high)
        finally:
            igraph.set_random_number_generator(random)
        return best.astype(np.int64), runs


CLUSTERERS: dict[str, Callable[..., KMeans | Clusterer]] = {
    "kmeans": KMeans,
    "minibatch": MiniBatchKMeans,
    "hierarchical": HierarchicalKMeans,
    "graph": GraphClusters,
}


def proportional_shares(sizes: np.ndarray, total: int) -> np.ndarray:
    """`total` seats for groups of these `sizes`: in proportion, whole, at least one to a group that
    is not empty, at most its size.

    Parameters
    ----------
    sizes : (G,) int
        At most `total` of them above 0, and with a sum of at least `total`.
    total : int

    Returns
    -------
    (G,) int64, with sum `total`
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    quota = sizes / sizes.sum() * total
    shares = np.minimum(np.maximum(np.floor(quota), sizes > 0), sizes).astype(np.int64)
    while shares.sum() < total:
        shares[np.argmax(np.where(shares < sizes, quota - shares, -np.inf))] += 1
    while shares.sum() > total:
        shares[np.argmin(np.where(shares > 1, quota - shares, np.inf))] -= 1
    return shares


def _igraph():
    try:
        import igraph
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the clusterer "graph" needs igraph: pip install "igraph>=0.11"', name="igraph"
        ) from error
    return igraph


def _means(x: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    sums, counts = cluster_sums(x, labels, n_clusters)
    return (sums / counts.clamp(min=1).unsqueeze(1)).to(x.dtype)


def _join_smallest(centers: Tensor, labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Join the smallest cluster to the one with the nearest mean until there are at most
    `n_clusters`.
    """
    counts = torch.bincount(labels, minlength=len(centers)).double()
    means = centers.double()
    target = torch.arange(len(centers), device=labels.device)
    alive = counts > 0
    while int(alive.sum()) > n_clusters:
        smallest = int(torch.where(alive, counts, torch.inf).argmin())
        distances = (means - means[smallest]).square().sum(dim=1)
        distances[~alive], distances[smallest] = torch.inf, torch.inf
        nearest = int(distances.argmin())
        means[nearest] = (counts[nearest] * means[nearest] + counts[smallest] * means[smallest]) / (
            counts[nearest] + counts[smallest]
        )
        counts[nearest] += counts[smallest]
        alive[smallest] = False
        target[target == smallest] = nearest
    kept = alive.nonzero().flatten()
    renamed = torch.full_like(target, -1)
    renamed[kept] = torch.arange(len(kept), device=labels.device)
    return means[kept].to(centers.dtype), renamed[target[labels]]
