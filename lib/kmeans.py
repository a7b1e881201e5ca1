"""K-means by Lloyd's algorithm: scikit-learn's engine on a CPU, a torch engine with the same rules on a GPU."""

from __future__ import annotations

import math
import warnings

import numpy as np
import sklearn.cluster
import torch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from lib.features import as_kind, as_rows


class KMeans:
    """K-means with scikit-learn's attributes, on arrays and tensors.

    Both engines start by greedy k-means++, stop when no label changes or the centres move by less than `tol`, and give an empty
    cluster the point farthest from its own centre (DeepCluster takes a perturbed copy of another centre instead). They draw different
    random numbers, so their solutions differ as two seeds do.

    Parameters
    ----------
    n_clusters : int
        K, from 1 to the number of points.
    max_iter : int
        Largest number of Lloyd iterations.
    seed : int
        Seed of the k-means++ start; equal seeds give equal bits on one machine (see `threads`).
    tol : float
        Converged when the squared movement of all centres together is at most `tol` times the mean variance of a feature.
    n_init : int
        Starts; the one of least inertia is kept.
    engine : {"auto", "sklearn", "torch"}
        ``auto``: torch for tensors on a GPU, else scikit-learn.
    threads : int or None
        Threads of scikit-learn's engine; None takes all cores. scikit-learn adds the threads' partial sums in the order in which they
        finish. Two sums are the same in either order, more are not: up to 2 threads give the same bits each time, more do not. On a
        machine with one core it runs one thread, whose sums are rounded otherwise, unless the variable OMP_NUM_THREADS is set.

    Attributes
    ----------
    cluster_centers_ : (n_clusters, D)
    labels_ : (N,), int64, 0 to n_clusters - 1
        Both arrays after fitting an array, tensors on the data's device after fitting a tensor.
    inertia_ : float
        Sum of squared distances of the points to their centres.
    n_iter_ : int
        Iterations run; `max_iter` if it did not converge.

    References
    ----------
    Lloyd 1982, *Least squares quantization in PCM*; Arthur and Vassilvitskii 2007, *k-means++: the advantages of careful seeding*.
    """

    def __init__(
        self,
        n_clusters: int,
        max_iter: int = 100,
        seed: int = 0,
        tol: float = 1e-4,
        n_init: int = 1,
        *,
        engine: str = "auto",
        threads: int | None = 2,
    ) -> None:
        for name, value in (("n_clusters", n_clusters), ("max_iter", max_iter), ("n_init", n_init)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1 or None, got {threads}")
        if engine not in ("auto", "sklearn", "torch"):
            raise ValueError(f"engine must be 'auto', 'sklearn' or 'torch', got {engine!r}")
        self.n_clusters = n_clusters
        self.max_iter = max_iter
        self.seed = seed
        self.tol = tol
        self.n_init = n_init
        self.engine = engine
        self.threads = threads

    def fit(self, points: np.ndarray | Tensor) -> KMeans:
        """Cluster `points`.

        Parameters
        ----------
        points : ndarray or Tensor, shape (N, D)
            float64 is kept, all else becomes float32.

        Raises
        ------
        ValueError
            Not two axes, more clusters than points, or NaN or infinite values.

        Warns
        -----
        RuntimeWarning
            Fewer clusters hold points than asked for, which happens when there are fewer than `n_clusters` distinct points.
        """
        x = self._checked(points)
        if self.n_clusters > len(x):
            raise ValueError(f"n_clusters={self.n_clusters} is larger than the number of points, {len(x)}: ask for fewer clusters")
        on_torch = self.engine == "torch" or (self.engine == "auto" and x.is_cuda)
        self._sklearn = None if on_torch else self._fit_sklearn(x.cpu().numpy())
        if on_torch:
            generator = torch.Generator().manual_seed(self.seed)
            mean = x.mean(dim=0)
            centred = x - mean  # distances from products lose fewer digits near the origin
            starts = (_plus_plus(centred, self.n_clusters, generator) for _ in range(self.n_init))
            runs = [_lloyd(centred, start, self.max_iter, self.tol) for start in starts]
            centers, labels, self.inertia_, self.n_iter_ = min(runs, key=lambda run: run[2])
            centers = centers + mean
        else:
            centers = torch.from_numpy(self._sklearn.cluster_centers_)
            labels = torch.from_numpy(self._sklearn.labels_.astype(np.int64))
            self.inertia_, self.n_iter_ = float(self._sklearn.inertia_), int(self._sklearn.n_iter_)
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

    def predict(self, points: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """Nearest centre of each point.

        Parameters
        ----------
        points : ndarray or Tensor, shape (N, D)

        Returns
        -------
        ndarray or Tensor, shape (N,), int64
            Same kind and device as `points`.

        Raises
        ------
        RuntimeError
            Called before `fit`.
        ValueError
            Another number of columns than fitted, or NaN or infinite values.
        """
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("KMeans is not fitted yet: call fit first")
        x = self._checked(points)
        centers = torch.as_tensor(self.cluster_centers_, dtype=x.dtype, device=x.device)
        if x.shape[1] != centers.shape[1]:
            raise ValueError(f"points have {x.shape[1]} columns, but the centres have {centers.shape[1]}")
        if self._sklearn is None:
            return as_kind(_assign(x, centers), points)
        with threadpool_limits(self.threads):
            labels = self._sklearn.predict(x.cpu().numpy().astype(self._sklearn.cluster_centers_.dtype, copy=False))
        return as_kind(torch.from_numpy(labels.astype(np.int64)), points)

    def fit_predict(self, points: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """``fit(points).labels_``."""
        return self.fit(points).labels_

    def _checked(self, points: np.ndarray | Tensor) -> Tensor:
        x = as_rows(points, "points")
        finite = torch.isfinite(x).all(dim=1)
        if not finite.all():
            raise ValueError(f"points hold NaN or infinite values, first in row {int((~finite).nonzero()[0])}")
        return x

    def _fit_sklearn(self, x: np.ndarray) -> sklearn.cluster.KMeans:
        engine = sklearn.cluster.KMeans(
            self.n_clusters, n_init=self.n_init, max_iter=self.max_iter, tol=self.tol, random_state=self.seed, algorithm="lloyd"
        )
        with warnings.catch_warnings(), threadpool_limits(self.threads):
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: said in fit, for both engines
            return engine.fit(x)


def _blocks(x: Tensor, n_clusters: int, budget: int = 2**24) -> tuple[Tensor, ...]:
    """Rows of `x` in blocks for which a (rows, n_clusters) matrix has at most `budget` elements."""
    return x.split(max(1, budget // n_clusters))


def _assign(x: Tensor, centers: Tensor) -> Tensor:
    """Index (N,) of the nearest centre: argmin_k ||c_k||^2 - 2 x.c_k, block by block; the first of equal ones."""
    norms = (centers**2).sum(dim=1)
    return torch.cat([torch.addmm(norms, block, centers.T, alpha=-2).argmin(dim=1) for block in _blocks(x, len(centers))])


def _sums(x: Tensor, labels: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
    """Sum (K, D) and number (K,) of the points of each cluster, float64.

    By products with one-hot labels, added block after block: an index_add on a GPU adds in the order in which threads arrive.
    """
    sums = torch.zeros(n_clusters, x.shape[1], dtype=torch.float64, device=x.device)
    counts = torch.zeros(n_clusters, dtype=torch.float64, device=x.device)
    for block, label in zip(_blocks(x, n_clusters), _blocks(labels, n_clusters), strict=True):
        one_hot = torch.nn.functional.one_hot(label, n_clusters).to(x.dtype)
        sums += one_hot.T @ block
        counts += one_hot.sum(dim=0)
    return sums, counts


def _squared_distances(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Squared distance (N,) of each point to its own centre."""
    blocks = zip(_blocks(x, x.shape[1]), _blocks(labels, x.shape[1]), strict=True)
    return torch.cat([((block - centers[label]) ** 2).sum(dim=1) for block, label in blocks])


def _plus_plus(x: Tensor, n_clusters: int, generator: torch.Generator, rows: int = 1024) -> Tensor:
    """Greedy k-means++ start (K, D): of a few points drawn in proportion to their squared distance, the one that lowers the inertia most.

    The draw inverts the cumulated distances in two steps, over blocks of `rows` points and then within one, on the CPU: few numbers
    leave a GPU, and its own cumulative sum need not give the same bits twice.
    """
    trials = 2 + int(math.log(n_clusters))  # as scikit-learn
    norms = (x**2).sum(dim=1)
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    distances = (x - x[chosen[0]]).square().sum(dim=1)  # (N,)
    for _ in range(1, n_clusters):
        padded = torch.nn.functional.pad(distances.double(), (0, -len(x) % rows)).view(-1, rows)
        totals = padded.sum(dim=1).cpu().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64) * totals[-1]
        block = torch.searchsorted(totals, draws).clamp_(max=len(totals) - 1)
        within = padded[block.to(x.device)].cpu().cumsum(1)  # (trials, rows)
        rest = (draws - torch.where(block > 0, totals[block - 1], 0.0)).unsqueeze(1)
        candidates = (block * rows + torch.searchsorted(within, rest).squeeze(1).clamp_(max=rows - 1)).clamp_(max=len(x) - 1).to(x.device)
        to_candidates = torch.addmm(norms[candidates], x, x[candidates].T, alpha=-2).add_(norms.unsqueeze(1)).clamp_(min=0)  # (N, trials)
        to_candidates = torch.minimum(to_candidates, distances.unsqueeze(1))
        best = int(to_candidates.sum(dim=0, dtype=torch.float64).argmin())
        distances = to_candidates[:, best].contiguous()
        chosen.append(int(candidates[best]))
    return x[torch.tensor(chosen, device=x.device)]


def _refill(sums: Tensor, counts: Tensor, x: Tensor, labels: Tensor, centers: Tensor) -> None:
    """Give each empty cluster the point farthest from its centre, taken out of a cluster that keeps others (in place)."""
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return
    distances = _squared_distances(x, labels, centers)
    for point in torch.sort(distances, descending=True, stable=True).indices.tolist():
        if not empty or distances[point] == 0:  # all that is left lies on its centre: fewer distinct points than clusters
            break
        donor = int(labels[point])
        if counts[donor] > 1:
            target = empty.pop(0)
            sums[donor] -= x[point]
            sums[target] = x[point].double()
            counts[donor] -= 1
            counts[target] = 1


def _lloyd(x: Tensor, centers: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor, float, int]:
    """One run of Lloyd's algorithm from `centers`: centres (K, D), labels (N,), inertia and number of iterations."""
    tolerance = tol * float(x.var(dim=0, correction=0).mean())
    labels = _assign(x, centers)
    n_iter = 0
    while n_iter < max_iter:
        n_iter += 1
        sums, counts = _sums(x, labels, len(centers))
        _refill(sums, counts, x, labels, centers)
        # a cluster that stays empty for want of distinct points keeps its centre
        moved = torch.where(counts.unsqueeze(1) > 0, sums / counts.clamp(min=1).unsqueeze(1), centers.double()).to(x.dtype)
        shift = float((moved - centers).square().sum())
        centers, previous, labels = moved, labels, _assign(x, moved)
        if torch.equal(labels, previous) or shift <= tolerance:
            break
    inertia = float(_squared_distances(x, labels, centers).sum(dtype=torch.float64))
    return centers, labels, inertia, n_iter
