"""Over the shards of several processes, whitening and K-means end as in one process."""

import threading
import warnings

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing

from lib import kmeans
from lib.features import CovarianceSums, PCAWhiten, covariance_sums
from lib.kmeans import KMeans

K = 12


def rows(n=900, d=20, seed=0):
    """Correlated rows around 8 centres, in the order of their centres: shards differ as much as
    they can.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, d)) * 2
    return (
        np.repeat(centres, -(-n // 8), axis=0)[:n]
        + rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / 3
    )


class Together:
    """A sum over threads, in the order of their ranks."""

    def __init__(self, world):
        self.barrier, self.slots = threading.Barrier(world, timeout=20), [None] * world

    def reduce_of(self, rank):
        def reduce(tensor):
            assert tensor.dtype == torch.float64
            self.slots[rank] = tensor
            self.barrier.wait()
            total = sum(self.slots)
            self.barrier.wait()
            return total

        return reduce


def in_threads(shards, job):
    """``job(rank, reduce, shard)`` for each shard at once: results, or errors."""
    together, results = Together(len(shards)), [None] * len(shards)

    def run(rank):
        try:
            results[rank] = job(rank, together.reduce_of(rank), shards[rank])
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def cluster(x, reduce=None, rank=0, world=1, **options):
    return KMeans(K, seed=3, engine="torch", reduce=reduce, shard=(rank, world), **options).fit(x)


@pytest.mark.parametrize(
    "cuts", [[450], [100, 130], [0]], ids=["halves", "three uneven", "an empty shard"]
)
@pytest.mark.parametrize("init", ["k-means++", "centres", "labels"])
def test_shards_end_as_one_process_does(cuts, init):
    x = rows()
    start = (
        None
        if init == "k-means++"
        else x[::75].copy()
        if init == "centres"
        else np.arange(900) % (K - 1)
    )  # the last label is unused
    if init == "centres":
        start[4:] += 900  # far from all: filled by splitting
    whole = cluster(x, init=start)
    shards = np.split(np.arange(900), cuts)
    parts = in_threads(
        shards,
        lambda rank, f, own: cluster(
            x[own], f, rank, len(shards), init=start[own] if init == "labels" else start
        ),
    )
    np.testing.assert_array_equal(np.concatenate([part.labels_ for part in parts]), whole.labels_)
    for part in parts:
        np.testing.assert_array_equal(part.cluster_centers_, parts[0].cluster_centers_)
        np.testing.assert_allclose(part.cluster_centers_, whole.cluster_centers_, atol=1e-10)
        assert part.inertia_ == pytest.approx(whole.inertia_, rel=1e-12)
        assert part.n_iter_ == whole.n_iter_ > 2


def test_the_farthest_point_is_found_on_any_shard():
    """A cluster that empties between iterations is given a point, wherever it lies."""
    x = torch.tensor([[0.0], [1.0], [9.0], [9.5], [30.0]], dtype=torch.float64)
    labels, centers = (
        torch.tensor([0, 0, 1, 1, 1]),
        torch.tensor([[0.5], [9.2], [500.0]], dtype=torch.float64),
    )

    def job(rank, reduce, own):
        shards = kmeans.Shards(reduce, rank, 2)
        sums, counts = kmeans.cluster_sums(x[own], labels[own], 3, shards=shards)
        kmeans._refill(sums, counts, x[own], labels[own], centers, shards=shards)
        return sums, counts

    for sums, counts in in_threads([slice(0, 2), slice(2, 5)], job):
        assert sums.flatten().tolist() == [1.0, 18.5, 30.0]
        assert counts.tolist() == [2.0, 2.0, 1.0]


def test_bad_rows_of_one_shard_stop_all():
    x = rows()
    x[500, 3] = np.nan
    for job in (
        lambda rank, f, own: cluster(own, f, rank, 2),
        lambda rank, f, own: PCAWhiten(5, reduce=f).fit(own),
    ):
        errors = in_threads([x[:450], x[450:]], job)
        assert "in the rows of another process" in str(errors[0])
        assert "first in row 50" in str(errors[1])


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_whitening_over_shards_is_that_of_all_rows(kind):
    x = rows() + 50.0
    whole = PCAWhiten(10).fit(kind(x))
    parts = in_threads(
        [x[:100], x[100:]], lambda rank, f, own: PCAWhiten(10, reduce=f).fit(kind(own))
    )
    for part in parts:
        for name in ("mean_", "components_", "explained_variance_", "explained_variance_ratio_"):
            assert isinstance(getattr(part, name), type(kind(x)))
            np.testing.assert_allclose(getattr(part, name), getattr(whole, name), atol=1e-10)


def test_whitening_from_sums_that_were_added():
    x = (rows() + 50.0).astype(np.float32)
    shift = x[:10].mean(axis=0)
    sums = CovarianceSums(
        *(
            a + b
            for a, b in zip(
                covariance_sums(x[:100], shift), covariance_sums(x[100:], shift), strict=True
            )
        )
    )
    found, whole = PCAWhiten(10).fit_from_sums(sums, shift), PCAWhiten(10).fit(x)
    np.testing.assert_allclose(found.mean_, whole.mean_, rtol=1e-12)
    np.testing.assert_allclose(found.components_, whole.components_, atol=1e-9)
    np.testing.assert_allclose(found.transform(x), whole.transform(x), atol=1e-6)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        PCAWhiten(2).fit_from_sums(covariance_sums(x[:1], shift), shift)
    with pytest.raises(ValueError, match="sums hold NaN"):
        PCAWhiten(2).fit_from_sums(covariance_sums(x * np.nan, shift), shift)
    with pytest.warns(
        RuntimeWarning,
        match="keeps 20 components instead of n_components=64: 900 rows of 20 features",
    ):
        PCAWhiten(64).fit_from_sums(sums, shift)


def gloo_rank(rank, folder):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )

    def reduce(tensor):
        torch.distributed.all_reduce(tensor)
        return tensor

    own = rows().astype(np.float32)[[slice(0, 370), slice(370, 900)][rank]]
    z = PCAWhiten(10, reduce=reduce).fit_transform(own)
    np.save(f"{folder}/labels{rank}.npy", cluster(z, reduce, rank, 2).labels_)
    torch.distributed.destroy_process_group()


def test_two_gloo_processes_give_the_assignments_of_one(tmp_path):
    torch.multiprocessing.spawn(gloo_rank, args=(tmp_path.as_posix(),), nprocs=2)
    found = np.concatenate([np.load(tmp_path / f"labels{rank}.npy") for rank in range(2)])
    np.testing.assert_array_equal(
        found, cluster(PCAWhiten(10).fit_transform(rows().astype(np.float32))).labels_
    )


def test_options_that_do_not_fit_shards_are_refused():
    with pytest.raises(ValueError, match="reduce needs the torch engine"):
        KMeans(3, engine="sklearn", reduce=lambda t: t)
    for shard in ((2, 2), (-1, 2), (0, 2)):
        with pytest.raises(ValueError, match=r"shard must be \(rank, number of processes\)"):
            KMeans(3, reduce=None if shard == (0, 2) else lambda t: t, shard=shard)
