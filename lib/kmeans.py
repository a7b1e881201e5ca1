"""K-means by Lloyd's algorithm: scikit-learn's engine on a CPU, a torch engine with the same rules
on a GPU or over several processes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import sklearn
import sklearn.cluster
import torch
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits
from torch import Tensor

from lib.features import as_kind, as_rows, first_bad_row

BUDGET = 64 * 2**20


class KMeans:
    """K-means with scikit-learn's attributes, on arrays and tensors, in one process or over the
    shards of several.

    Both engines follow the same rules; they draw different random numbers, so their solutions
    differ as two seeds do.

    *Start*: greedy k-means++, or `init`. *Stop*: no label changes, or the centres move by less than
    `tol`. *Empty clusters*: before the first iteration and after the last, an empty cluster takes
    half of the largest one, which is cut at its mean across the feature in which it varies most (Su
    and Dy 2007, section 3, Var-Part); the largest that can be cut, so that no cluster is empty
    unless there are fewer distinct points than clusters. Given centres that no point is near, as a
    warm start on moved features has them, meet this rule. If an iteration in between empties a
    cluster, which is rare, it takes the point farthest from its own centre: that is scikit-learn's
    rule and cannot be changed there, so the torch engine follows it.

    Parameters
    ----------
    n_clusters : int
        K, from 1 to the number of points.
    max_iter : int
        Largest number of Lloyd iterations.
    seed : int
        Seed of the k-means++ start; equal seeds give equal bits on one machine (see `threads`).
    tol : float
        Converged when the squared movement of all centres together is at most `tol` times the mean
        variance of a feature.
    n_init : int
        Starts; the one of least inertia is kept. One where `init` is given.
    init : None, (n_clusters, D) or (N,) of int
        Warm start: centres, or a label for each point, whose clusters' means are taken. Labels of
        the last epoch carry over to new features, whose axes may be others; centres do not. A warm
        start saves iterations and makes two epochs agree more: NMI between consecutive epochs then
        says less about the network (``tests/bench/kmeans.py`` prints by how much).
    engine : {"auto", "sklearn", "torch"}
        ``auto``: torch for tensors on a GPU and for shards, else scikit-learn.
    threads : int or None
        Threads of scikit-learn's engine; None takes all cores. scikit-learn adds the threads'
        partial sums in the order in which they finish. Two sums are the same in either order, more
        are not: up to 2 threads give the same bits each time, more do not. On a machine with one
        core it runs one thread, whose sums are rounded otherwise, unless the variable
        OMP_NUM_THREADS is set.
    budget_bytes : int
        Most bytes of a temporary block of the torch engine: rows are taken so many at a time that
        distances to all centres and a float64 copy of the rows stay below it together. Results
        depend on it only by rounding.
    reduce : callable or None
        Torch engine over several processes: ``reduce(tensor)`` gets a float64 tensor on the data's
        device and returns its sum over all processes (it may work in place), the same bits on each,
        as ``torch.distributed.all_reduce`` does. Every process then calls `fit` with its own rows
        and the same options, and ends with its own labels and the same centres, inertia and number
        of iterations. The k-means++ start is shared in the same way and walks through the rows in
        the order of the ranks, so the result is that of one process on all rows in that order, up
        to rounding.
    shard : (int, int)
        Rank of this process and number of processes, with `reduce`.

    Attributes
    ----------
    cluster_centers_ : (n_clusters, D)
    labels_ : (N,), int64, 0 to n_clusters - 1
        Both arrays after fitting an array, tensors on the data's device after fitting a tensor.
    inertia_ : float
        Sum of squared distances of the points to their centres; over all shards.
    n_iter_ : int
        Iterations run; `max_iter` if it did not converge.

    References
    ----------
    Lloyd 1982, *Least squares quantization in PCM*; Arthur and Vassilvitskii 2007, *k-means++: the
    advantages of careful seeding*; Su and Dy 2007, *In search of deterministic methods for
    initializing K-means and Gaussian mixture clustering*."""

    def __init__(
        self,
        n_clusters: int,
        max_iter: int = 100,
        seed: int = 0,
        tol: float = 1e-4,
        n_init: int = 1,
        *,
        init: np.ndarray | Tensor | None = None,
        engine: str = "auto",
        threads: int | None = 2,
        budget_bytes: int = BUDGET,
        reduce: Callable[[Tensor], Tensor] | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        for name, value in (
            ("n_clusters", n_clusters),
            ("max_iter", max_iter),
            ("n_init", n_init),
            ("budget_bytes", budget_bytes),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1 or None, got {threads}")
        if engine not in ("auto", "sklearn", "torch"):
            raise ValueError(f"engine must be 'auto', 'sklearn' or 'torch', got {engine!r}")
        if reduce is not None and engine == "sklearn":
            raise ValueError(
                "reduce needs the torch engine: scikit-learn's runs in one process only"
            )
        if not 0 <= shard[0] < shard[1] or (shard[1] > 1 and reduce is None):
            raise ValueError(
                f"shard must be (rank, number of processes) with 0 <= rank < number, and come with reduce, got {shard}"
            )
        self.n_clusters = n_clusters
        self.max_iter = max_iter
        self.seed = seed
        self.tol = tol
        self.n_init = n_init
        self.init = init
        self.engine = engine
        self.threads = threads
        self.budget_bytes = budget_bytes
        self.reduce = reduce
        self.shard = shard

    def fit(self, points: np.ndarray | Tensor) -> KMeans:
        """Cluster `points`.

        Parameters
        ----------
        points : ndarray or Tensor, shape (N, D)
            float64 is kept, all else becomes float32. With `reduce`, the rows of this process.

        Raises
        ------
        ValueError
            Not two axes, more clusters than points, an `init` that fits neither, or NaN or infinite
            values.

        Warns
        -----
        RuntimeWarning
            Fewer clusters hold points than asked for, which happens when there are fewer than
            `n_clusters` distinct points.
        """
        shards = Shards(self.reduce, *self.shard)
        x = checked_rows(points, shards)
        total = round(float(shards.sum(x.new_tensor(len(x), dtype=torch.float64))[0]))
        if self.n_clusters > total:
            raise ValueError(
                f"n_clusters={self.n_clusters} is larger than the number of points, {total}: ask for fewer clusters"
            )
        on_torch = self.engine == "torch" or (
            self.engine == "auto" and (x.is_cuda or self.reduce is not None)
        )
        self._sklearn = None
        if on_torch:
            with full_precision():
                mean = _mean(x, self.budget_bytes, shards)
                centred = x - mean  # distances from products lose fewer digits near the origin
                runs = [
                    _lloyd(centred, start, self.max_iter, self.tol, self.budget_bytes, shards)
                    for start in self._starts(centred, mean, shards)
                ]
            centers, labels, self.inertia_, self.n_iter_ = min(runs, key=lambda run: run[2])
            centers = centers + mean
        else:
            x = x.cpu()
            centers, labels, self.inertia_, self.n_iter_ = self._fit_sklearn(x)

        counts = _counts(labels, self.n_clusters, shards)
        if (counts == 0).any():  # the last assignment may have emptied a cluster
            centers, labels = fill_by_splitting(x, centers, labels, shards, self.budget_bytes)
            self.inertia_ = float(
                shards.sum(
                    squared_distances(x, labels, centers, self.budget_bytes).sum(
                        dtype=torch.float64
                    )
                )[0]
            )
            counts = _counts(labels, self.n_clusters, shards)
            if self._sklearn is not None:
                self._sklearn.cluster_centers_ = centers.numpy()
        self.cluster_centers_ = as_kind(centers, points)
        self.labels_ = as_kind(labels, points)
        used = int((counts > 0).sum())
        if used < self.n_clusters:
            distinct = (
                f": the {total} points have {len(x.unique(dim=0))} distinct values"
                if self.reduce is None
                else ""
            )
            warnings.warn(
                f"only {used} of n_clusters={self.n_clusters} clusters hold points{distinct}",
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
        x = checked_rows(points)
        centers = torch.as_tensor(self.cluster_centers_, dtype=x.dtype, device=x.device)
        if x.shape[1] != centers.shape[1]:
            raise ValueError(
                f"points have {x.shape[1]} columns, but the centres have {centers.shape[1]}"
            )
        if self._sklearn is None:
            with full_precision():
                return as_kind(assign(x, centers, self.budget_bytes), points)
        with threadpool_limits(self.threads), sklearn.config_context(assume_finite=True):
            labels = self._sklearn.predict(
                x.cpu().numpy().astype(self._sklearn.cluster_centers_.dtype, copy=False)
            )
        return as_kind(torch.from_numpy(labels.astype(np.int64)), points)

    def fit_predict(self, points: np.ndarray | Tensor) -> np.ndarray | Tensor:
        """``fit(points).labels_``."""
        return self.fit(points).labels_

    def _starts(self, centred: Tensor, mean: Tensor, shards: Shards) -> Iterator[Tensor]:
        """Centres to start from, in coordinates about `mean`."""
        if self.init is None:
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(self.n_init):
                yield _plus_plus(centred, self.n_clusters, generator, shards)
        else:
            yield self._given_start(centred, mean, shards)

    def _given_start(self, x: Tensor, mean: Tensor | float, shards: Shards) -> Tensor:
        """Centres (K, D) of `init`, less `mean`, none of them without points of `x`."""
        init = (
            self.init if isinstance(self.init, Tensor) else torch.from_numpy(np.array(self.init))
        ).to(x.device)
        if init.ndim == 1:
            if (
                len(init) != len(x)
                or init.is_floating_point()
                or (len(init) and not 0 <= int(init.min()) <= int(init.max()) < self.n_clusters)
            ):
                raise ValueError(
                    f"init must be centres ({self.n_clusters}, {x.shape[1]}) or {len(x)} integer labels from 0 to {self.n_clusters - 1}, "
                    f"got {init.dtype} of shape {tuple(init.shape)}"
                )
            sums, counts = cluster_sums(x, init.long(), self.n_clusters, self.budget_bytes, shards)
            centers = (sums / counts.clamp(min=1).unsqueeze(1)).to(x.dtype)
            return (
                fill_by_splitting(
                    x, centers, init.long(), shards, self.budget_bytes, reassign=False
                )[0]
                if (counts == 0).any()
                else centers
            )
        if init.shape != (self.n_clusters, x.shape[1]):
            raise ValueError(
                f"init must have {self.n_clusters} centres of {x.shape[1]} columns, got shape {tuple(init.shape)}"
            )
        if not torch.isfinite(init).all():
            raise ValueError("init holds NaN or infinite values")
        centers = init.to(x.dtype) - mean
        if shards.world == 1 and _all_used(x, centers, self.budget_bytes):
            return centers
        labels = assign(x, centers, self.budget_bytes)
        if (_counts(labels, self.n_clusters, shards) == 0).any():
            centers, _ = fill_by_splitting(
                x, centers, labels, shards, self.budget_bytes, reassign=False
            )
        return centers

    def _fit_sklearn(self, x: Tensor) -> tuple[Tensor, Tensor, float, int]:
        init, n_init = "k-means++", self.n_init
        with (
            warnings.catch_warnings(),
            threadpool_limits(self.threads),
            sklearn.config_context(assume_finite=True),
        ):
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # fewer distinct points than clusters: said in fit, for both engines
            if self.init is not None:
                init, n_init = self._given_start(x, 0.0, Shards()).numpy(), 1
            engine = _SklearnLloyd(
                self.n_clusters,
                init=init,
                n_init=n_init,
                max_iter=self.max_iter,
                tol=self.tol,
                random_state=self.seed,
                algorithm="lloyd",
            )
            engine.budget = self.budget_bytes
            self._sklearn = engine.fit(x.numpy())
        centers, labels = (
            torch.from_numpy(engine.cluster_centers_),
            torch.from_numpy(engine.labels_.astype(np.int64)),
        )
        return centers, labels, float(engine.inertia_), int(engine.n_iter_)


def checked_rows(points: np.ndarray | Tensor, shards: Shards | None = None) -> Tensor:
    """`points` as a tensor (N, D) of float32 or float64, shared where it can be; ValueError if it
    holds NaN or infinite values.
    """
    x = as_rows(points, "points")
    # one sum is cheaper than a mask of all values; it may overflow without a bad value, so the mask
    # has the last word
    bad = -1 if math.isfinite(float(x.sum())) else first_bad_row(x)
    # every process must know, or the others wait for the one that stopped
    anywhere = (
        bad >= 0 if shards is None else float(shards.sum(x.new_tensor(float(bad >= 0)))[0]) > 0
    )
    if anywhere:
        where = f", first in row {bad}" if bad >= 0 else " in the rows of another process"
        raise ValueError(f"points hold NaN or infinite values{where}")
    return x


class Shards:
    """What one process knows of the others: a sum over all of them, its rank, and how many there
    are.
    """

    def __init__(
        self, reduce: Callable[[Tensor], Tensor] | None = None, rank: int = 0, world: int = 1
    ) -> None:
        self.reduce, self.rank, self.world = reduce, rank, world

    def sum(self, *tensors: Tensor) -> list[Tensor]:
        """Sums over all processes, float64, in one call of the hook."""
        tensors = [tensor.double() for tensor in tensors]
        if self.reduce is None:
            return tensors
        flat = self.reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]))
        return [
            part.view(t.shape)
            for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)
        ]

    def gather(self, row: Tensor) -> Tensor:
        """`row` of every process, (world, \\*row.shape), float64: a sum of tensors that are zero
        but for the own row.
        """
        if self.world == 1:
            return row.double().unsqueeze(0)
        slots = torch.zeros(self.world, *row.shape, dtype=torch.float64, device=row.device)
        slots[self.rank] = row
        return self.sum(slots)[0]


class full_precision:
    """Context in which float32 products are not rounded to TF32, whatever is set for training:
    labels hang on small differences.
    """

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        if self.before != "highest":
            torch.set_float32_matmul_precision("highest")

    def __exit__(self, *_: object) -> None:
        if self.before != "highest":
            torch.set_float32_matmul_precision(self.before)


class _SklearnLloyd(sklearn.cluster.KMeans):
    """scikit-learn's K-means with the tolerance of large data found block by block.

    scikit-learn takes np.var, which holds another copy of all the data, where they are large. Where
    a later scikit-learn has no such method, this class is its K-means."""

    budget = BUDGET

    def _check_params_vs_input(self, X: np.ndarray, *args: object, **options: object) -> None:
        if X.nbytes <= 2**28:  # a copy of which does no harm
            super()._check_params_vs_input(X, *args, **options)
            return
        tol, self.tol = self.tol, 0.0
        try:
            super()._check_params_vs_input(X, *args, **options)
        finally:
            self.tol = tol
        self._tol = _tolerance(torch.from_numpy(X), tol, self.budget, Shards())


def _blocks(x: Tensor, width: int, budget: int) -> tuple[Tensor, ...]:
    """Rows of `x` in blocks of which a float64 matrix (rows, width) has at most `budget` bytes."""
    return x.split(max(1, budget // (8 * width)))


def _mean(x: Tensor, budget: int, shards: Shards) -> Tensor:
    """Mean (D,) of the rows of all shards, summed in float64."""
    total = torch.zeros(x.shape[1], dtype=torch.float64, device=x.device)
    for block in _blocks(x, x.shape[1], budget):
        total += block.sum(dim=0, dtype=torch.float64)
    total, count = shards.sum(total, x.new_tensor(len(x), dtype=torch.float64))
    return (total / count).to(x.dtype)


def _tolerance(x: Tensor, tol: float, budget: int, shards: Shards) -> float:
    """`tol` times the mean variance of a feature, about the mean of each."""
    if tol == 0:
        return 0.0
    budget = (
        budget if x.is_cuda else min(budget, 2**21)
    )  # a float64 copy that stays in a CPU's cache
    mean = _mean(x, budget, shards).double()
    squares = torch.zeros((), dtype=torch.float64, device=x.device)
    for block in _blocks(x, x.shape[1], budget):
        squares += (block.double() - mean).square_().sum()
    squares, count = shards.sum(squares, x.new_tensor(x.numel(), dtype=torch.float64))
    return tol * float(squares / count)


def assign(x: Tensor, centers: Tensor, budget: int = BUDGET) -> Tensor:
    """Index (N,) of the nearest centre: argmin_k ||c_k||^2 - 2 x.c_k, block by block; the first of
    equal ones.
    """
    norms = (centers**2).sum(dim=1)
    blocks = _blocks(x, len(centers) + x.shape[1], budget)
    return torch.cat(
        [torch.addmm(norms, block, centers.T, alpha=-2).argmin(dim=1) for block in blocks]
    )


def _all_used(x: Tensor, centers: Tensor, budget: int) -> bool:
    """Whether each centre is surely the nearest of some row, for less than an assignment of all
    rows; False if that cannot be told.

    The first rows show most centres in use; for each of the others, its own nearest row is looked
    at."""
    seen = torch.zeros(len(centers), dtype=torch.bool, device=x.device)
    for block in x[: max(2**14, 64 * len(centers))].split(4096):
        seen[assign(block, centers, budget)] = True
        if seen.all():
            return True
    unseen = (~seen).nonzero().flatten()
    if len(unseen) > len(centers) // 4:
        return False
    others = centers[unseen]
    closest = torch.full((len(others),), torch.inf, dtype=x.dtype, device=x.device)
    witness = torch.zeros_like(unseen)
    start = 0
    for block in x.split(4096):
        distances = torch.addmm(
            torch.linalg.vector_norm(block, dim=1).square_().unsqueeze(1), block, others.T, alpha=-2
        )
        nearest, row = distances.min(dim=0)
        witness = torch.where(nearest < closest, row + start, witness)
        closest = torch.minimum(nearest, closest)
        start += len(block)
    return torch.equal(assign(x[witness], centers, budget), unseen)


def _counts(labels: Tensor, n_clusters: int, shards: Shards) -> Tensor:
    """Number (K,) of rows of each label over all shards, float64."""
    return shards.sum(torch.bincount(labels, minlength=n_clusters))[0]


def cluster_sums(
    x: Tensor, labels: Tensor, n_clusters: int, budget: int = BUDGET, shards: Shards | None = None
) -> tuple[Tensor, Tensor]:
    """Sum (K, D) and number (K,) of the points of each cluster over all shards, float64.

    By products with one-hot labels, added block after block: an index_add on a GPU adds in the
    order in which threads arrive. In float64, so that neither the blocks nor the shards can be seen
    in the centres."""
    sums = torch.zeros(n_clusters, x.shape[1], dtype=torch.float64, device=x.device)
    counts = torch.zeros(n_clusters, dtype=torch.float64, device=x.device)
    width = n_clusters + x.shape[1]
    for block, label in zip(_blocks(x, width, budget), _blocks(labels, width, budget), strict=True):
        one_hot = torch.zeros(
            len(block), n_clusters, dtype=torch.float64, device=x.device
        ).scatter_(1, label.unsqueeze(1), 1.0)
        sums.addmm_(one_hot.T, block.double())
        counts += one_hot.sum(dim=0)
    sums, counts = (shards or Shards()).sum(sums, counts)
    return sums, counts


def squared_distances(x: Tensor, labels: Tensor, centers: Tensor, budget: int = BUDGET) -> Tensor:
    """Squared distance (N,) of each point to its own centre."""
    blocks = zip(_blocks(x, x.shape[1], budget), _blocks(labels, x.shape[1], budget), strict=True)
    return torch.cat([((block - centers[label]) ** 2).sum(dim=1) for block, label in blocks])


def _plus_plus(
    x: Tensor,
    n_clusters: int,
    generator: torch.Generator,
    shards: Shards | None = None,
    rows: int = 1024,
) -> Tensor:
    """Greedy k-means++ start (K, D): of a few points drawn in proportion to their squared distance,
    the one that lowers the inertia most.

    The draw inverts the cumulated distances in three steps, over the shards, over blocks of `rows`
    points and within one, on the CPU: few numbers leave a GPU, and its own cumulative sum need not
    give the same bits twice."""
    shards = shards or Shards()
    trials = 2 + int(math.log(n_clusters))  # as scikit-learn
    ends = shards.gather(torch.tensor(len(x), device=x.device)).cpu().cumsum(0)  # (world,)
    norms = (x**2).sum(dim=1)

    def fetch(local: Tensor, mine: Tensor) -> Tensor:
        """Rows (trials, D) of which those marked in `mine` lie here, at the indices `local`."""
        found = torch.zeros(len(mine), x.shape[1], dtype=torch.float64, device=x.device)
        found[mine.to(x.device)] = x[local.to(x.device)].double()
        return shards.sum(found)[0].to(x.dtype)

    first = torch.randint(int(ends[-1]), (1,), generator=generator)
    before = int(ends[shards.rank]) - len(x)
    mine = (first >= before) & (first < before + len(x))
    chosen = [fetch(first[mine] - before, mine)]
    distances = (x - chosen[0]).square().sum(dim=1)  # (N,)
    for _ in range(1, n_clusters):
        padded = torch.nn.functional.pad(distances.double(), (0, -len(x) % rows)).view(-1, rows)
        totals = torch.cat(
            [torch.zeros(1, dtype=torch.float64), padded.sum(dim=1).cpu().cumsum(0)]
        )  # from 0: a shard may be empty
        shares = shards.gather(totals[-1].to(x.device)).cpu().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64) * shares[-1]
        owner = torch.searchsorted(shares, draws).clamp_(max=shards.world - 1)
        mine = owner == shards.rank
        rest = draws[mine] - (shares[shards.rank - 1] if shards.rank else 0.0)
        block = torch.searchsorted(totals[1:].contiguous(), rest).clamp_(
            max=max(len(totals) - 2, 0)
        )
        within = padded[block.to(x.device)].cpu().cumsum(1)  # (mine, rows)
        column = (
            torch.searchsorted(within, (rest - totals[block]).unsqueeze(1))
            .squeeze(1)
            .clamp_(max=rows - 1)
        )
        candidates = fetch((block * rows + column).clamp_(max=max(len(x) - 1, 0)), mine)
        # (N, trials)
        to_candidates = (
            torch.addmm((candidates**2).sum(dim=1), x, candidates.T, alpha=-2)
            .add_(norms.unsqueeze(1))
            .clamp_(min=0)
        )
        to_candidates = torch.minimum(to_candidates, distances.unsqueeze(1))
        best = int(shards.sum(to_candidates.sum(dim=0, dtype=torch.float64))[0].argmin())
        distances = to_candidates[:, best].contiguous()
        chosen.append(candidates[best : best + 1])
    return torch.cat(chosen)


def fill_by_splitting(
    x: Tensor,
    centers: Tensor,
    labels: Tensor,
    shards: Shards | None = None,
    budget: int = BUDGET,
    *,
    reassign: bool = True,
) -> tuple[Tensor, Tensor]:
    """Give each empty cluster half of the largest one (Su and Dy 2007, section 3, Var-Part).

    The largest cluster is cut at its mean across the feature of its greatest variance; the upper
    half goes to the empty cluster, both get the means of their halves as centres. A cluster whose
    points are all equal cannot be cut: the next largest is.

    Parameters
    ----------
    x : Tensor, shape (N, D)
    centers : Tensor, shape (K, D)
    labels : Tensor, shape (N,), int64
        Neither is changed.
    reassign : bool
        Take each point to its nearest centre afterwards, if that leaves no cluster empty.

    Returns
    -------
    centers, labels : Tensor
    """
    shards = shards or Shards()
    centers, labels = centers.clone(), labels.clone()
    counts = _counts(labels, len(centers), shards)
    whole: set[int] = set()  # clusters of equal points
    for empty in (counts == 0).nonzero().flatten().tolist():
        while True:
            sizes = counts.tolist()
            donors = [k for k in range(len(sizes)) if sizes[k] > 1 and k not in whole]
            if not donors:
                return centers, labels
            donor = max(donors, key=lambda k: (sizes[k], -k))
            members = (labels == donor).nonzero().flatten()
            rows = x[members].double()
            mean = shards.sum(rows.sum(dim=0))[0] / sizes[donor]
            feature = int(shards.sum((rows - mean).square().sum(dim=0))[0].argmax())
            upper = rows[:, feature] > mean[feature]
            sums, size = shards.sum(rows[upper].sum(dim=0), upper.sum())
            if 0 < float(size) < sizes[donor]:
                break
            whole.add(donor)
        labels[members[upper]] = empty
        centers[empty] = (sums / size).to(x.dtype)
        centers[donor] = ((mean * sizes[donor] - sums) / (sizes[donor] - size)).to(x.dtype)
        counts[empty], counts[donor] = size, sizes[donor] - size
    if reassign:
        nearest = assign(x, centers, budget)
        if (_counts(nearest, len(centers), shards) > 0).all():
            labels = nearest
    return centers, labels


def _refill(
    sums: Tensor,
    counts: Tensor,
    x: Tensor,
    labels: Tensor,
    centers: Tensor,
    budget: int = BUDGET,
    shards: Shards | None = None,
) -> None:
    """Give each empty cluster the point farthest from its centre, taken out of a cluster that keeps
    others (in place).
    """
    empty = (counts == 0).nonzero().flatten().tolist()
    if not empty:
        return
    shards = shards or Shards()
    distances = squared_distances(x, labels, centers, budget).double()
    for target in empty:
        offer = torch.zeros(
            x.shape[1] + 2, dtype=torch.float64, device=x.device
        )  # distance, donor, point
        point = None
        eligible = torch.where(counts[labels] > 1, distances, -1.0)
        if len(x) and float(eligible.max()) > 0:
            point = int(eligible.argmax())
            offer[0], offer[1], offer[2:] = (
                distances[point],
                labels[point].double(),
                x[point].double(),
            )
        offers = shards.gather(offer)
        winner = int(offers[:, 0].argmax())
        if (
            offers[winner, 0] == 0
        ):  # all that is left lies on its centre: fewer distinct points than clusters
            break
        if winner == shards.rank and point is not None:
            distances[point] = -1.0
        donor = int(offers[winner, 1])
        sums[donor] -= offers[winner, 2:]
        sums[target] = offers[winner, 2:]
        counts[donor] -= 1
        counts[target] = 1


def _lloyd(
    x: Tensor,
    centers: Tensor,
    max_iter: int,
    tol: float,
    budget: int = BUDGET,
    shards: Shards | None = None,
) -> tuple[Tensor, Tensor, float, int]:
    """One run of Lloyd's algorithm from `centers`: centres (K, D), labels (N,), inertia and number
    of iterations.
    """
    shards = shards or Shards()
    tolerance = _tolerance(x, tol, budget, shards)
    labels = assign(x, centers, budget)
    n_iter = 0
    while n_iter < max_iter:
        n_iter += 1
        sums, counts = cluster_sums(x, labels, len(centers), budget, shards)
        _refill(sums, counts, x, labels, centers, budget, shards)
        # a cluster that stays empty for want of distinct points keeps its centre
        moved = torch.where(
            counts.unsqueeze(1) > 0, sums / counts.clamp(min=1).unsqueeze(1), centers.double()
        ).to(x.dtype)
        shift = float((moved - centers).square().sum())
        centers, previous, labels = moved, labels, assign(x, moved, budget)
        changed = float(shards.sum((labels != previous).sum())[0])
        if changed == 0 or shift <= tolerance:
            break
    inertia = float(
        shards.sum(squared_distances(x, labels, centers, budget).sum(dtype=torch.float64))[0]
    )
    return centers, labels, inertia, n_iter
