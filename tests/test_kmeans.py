"""K-means: both engines find what is planted, agree with scikit-learn, and give the same bits
twice.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.cluster
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from lib import kmeans
from lib.features import PCAWhiten
from lib.kmeans import KMeans

both_engines = pytest.mark.parametrize("engine", ["sklearn", "torch"])
both_kinds = pytest.mark.parametrize(
    "kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"]
)


def blobs(n=2000, k=10, d=16, seed=0):
    x, y = make_blobs(n, d, centers=k, random_state=seed)
    return x.astype(np.float32), y


def network_like(n=3000, d=64, seed=0):
    """Whitened features as a narrow network gives them: rectified, correlated, without clear
    clusters.
    """
    rng = np.random.default_rng(seed)
    hidden = np.maximum(rng.normal(size=(n, 12)) @ rng.normal(size=(12, d)) + rng.normal(size=d), 0)
    return PCAWhiten(16).fit_transform((hidden + 0.1 * rng.normal(size=(n, d))).astype(np.float32))


@both_engines
@both_kinds
def test_planted_blobs_are_found(engine, kind):
    x, y = blobs()
    model = KMeans(10, engine=engine).fit(kind(x))
    reference = sklearn.cluster.KMeans(10, n_init=5, random_state=1).fit(x)
    assert adjusted_rand_score(y, np.asarray(model.labels_)) == 1.0
    assert model.inertia_ == pytest.approx(reference.inertia_, rel=0.01)
    assert isinstance(model.labels_, type(kind(x)))
    assert isinstance(model.cluster_centers_, type(kind(x)))
    assert np.asarray(model.labels_).dtype == np.int64
    assert model.cluster_centers_.shape == (10, 16)
    assert 1 <= model.n_iter_ <= 100


@both_engines
def test_inertia_on_features_without_clear_clusters_is_within_one_percent_of_scikit_learn(engine):
    x = network_like()
    ours = [KMeans(20, seed=s, engine=engine).fit(x).inertia_ for s in range(4)]
    theirs = [
        sklearn.cluster.KMeans(20, n_init=1, max_iter=100, random_state=s).fit(x).inertia_
        for s in range(4, 8)
    ]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.01)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torch_lloyd_walks_the_same_way_as_scikit_learn_from_the_same_start(dtype):
    x = network_like().astype(dtype)
    start = x[np.random.default_rng(3).choice(len(x), 20, replace=False)]
    reference = sklearn.cluster.KMeans(20, init=start, n_init=1, max_iter=100, tol=0.01).fit(x)
    centers, labels, inertia, n_iter = kmeans._lloyd(
        torch.from_numpy(x), torch.from_numpy(start), 100, 0.01
    )
    np.testing.assert_array_equal(labels.numpy(), reference.labels_)
    np.testing.assert_allclose(centers.numpy(), reference.cluster_centers_, atol=1e-5)
    assert inertia == pytest.approx(reference.inertia_, rel=1e-5)
    assert (
        n_iter == reference.n_iter_ < 100
    )  # stopped by the tolerance, as not all labels are at rest


def test_smaller_blocks_change_nothing():
    x = network_like(n=700)
    whole = KMeans(20, engine="torch").fit(x)
    budget = 13_000  # rows of 20 + 16 float64
    assert len(kmeans._blocks(torch.from_numpy(x), 36, budget)) == 16
    blocked = KMeans(20, engine="torch", budget_bytes=budget).fit(x)
    np.testing.assert_array_equal(blocked.labels_, whole.labels_)
    np.testing.assert_allclose(blocked.cluster_centers_, whole.cluster_centers_, atol=1e-5)


@both_engines
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 60), d=st.integers(1, 5), k=st.integers(1, 60), seed=st.integers(0, 99))
def test_a_converged_solution_is_a_fixed_point(engine, n, d, k, seed):
    """Each point has its nearest centre, each centre is the mean of its points, all clusters are in
    use, inertia is what it says.
    """
    k = min(n, k)
    x = np.random.default_rng(seed).normal(size=(n, d))
    model = KMeans(k, seed=seed, engine=engine, tol=0.0, max_iter=300).fit(x)
    distances = ((x[:, None] - model.cluster_centers_) ** 2).sum(axis=2)
    np.testing.assert_allclose(
        distances[np.arange(n), model.labels_], distances.min(axis=1), atol=1e-9
    )
    assert set(model.labels_) == set(range(k))
    means = np.stack([x[model.labels_ == c].mean(axis=0) for c in range(k)])
    np.testing.assert_allclose(model.cluster_centers_, means, atol=1e-9)
    assert model.inertia_ == pytest.approx(distances.min(axis=1).sum(), abs=1e-9)
    np.testing.assert_array_equal(model.predict(x), model.labels_)


def lopsided(d=5):
    """70 points near 0 that vary most along axis 2, 20 near 10 and 10 near -10: and centres of
    which the last three have no point.
    """
    rng = np.random.default_rng(2)
    x = rng.normal(size=(100, d)) * 0.1
    x[:70, 2] += rng.choice([-1.0, 1.0], 70)
    x[70:90] += 10
    x[90:] -= 10
    start = np.array([[0.0], [10.0], [-10.0], [500.0], [600.0], [700.0]]) * np.ones(d)
    return x, start


@both_engines
def test_centres_without_points_take_half_of_the_largest_cluster(engine):
    x, start = lopsided()
    model = KMeans(4, engine=engine, init=start[:4]).fit(x)
    upper = np.flatnonzero(
        x[:70, 2] > 0
    )  # the largest is cut across the axis in which it varies most; scikit-learn takes one far point
    np.testing.assert_array_equal(np.flatnonzero(model.labels_ == 3), upper)
    assert np.bincount(model.labels_).tolist() == [70 - len(upper), 20, 10, len(upper)]
    np.testing.assert_allclose(model.cluster_centers_[3], x[upper].mean(axis=0), atol=1e-9)


@both_engines
def test_several_empty_clusters_are_filled_by_the_same_rule_on_both_engines(engine):
    x, start = lopsided()
    found, expected = (KMeans(6, engine=e, init=start, tol=0.0).fit(x) for e in (engine, "torch"))
    assert (np.bincount(found.labels_, minlength=6) > 0).all()
    np.testing.assert_array_equal(found.labels_, expected.labels_)
    np.testing.assert_allclose(found.cluster_centers_, expected.cluster_centers_, atol=1e-9)
    assert found.inertia_ == pytest.approx(expected.inertia_)
    partition = np.repeat([0, 1, 2], [70, 20, 10])  # the same partition, given as labels
    np.testing.assert_array_equal(
        KMeans(6, engine=engine, init=partition, tol=0.0).fit(x).labels_, expected.labels_
    )


@both_engines
def test_a_cluster_emptied_by_the_last_assignment_is_filled_too(engine, monkeypatch):
    """Planted by a run that ends with centres of which one has no point, as one stopped by
    `max_iter` may.
    """
    x, start = lopsided()
    end = torch.from_numpy(start[:4])

    def stopped(points, *_):
        centers = (
            end - points.new_zeros(())
            if engine == "sklearn"
            else end - torch.from_numpy(x).mean(dim=0)
        )
        return centers, kmeans.assign(points, centers), -1.0, 1

    if engine == "torch":
        monkeypatch.setattr(kmeans, "_lloyd", stopped)
    else:
        real = KMeans._fit_sklearn

        def planted(self, points):
            real(self, points)
            return stopped(points)

        monkeypatch.setattr(KMeans, "_fit_sklearn", planted)
    model = KMeans(4, engine=engine).fit(x)
    np.testing.assert_array_equal(np.flatnonzero(model.labels_ == 3), np.flatnonzero(x[:70, 2] > 0))
    np.testing.assert_array_equal(model.predict(x), model.labels_)
    assert model.inertia_ == pytest.approx(((x - model.cluster_centers_[model.labels_]) ** 2).sum())


def test_centres_in_use_are_told_from_those_without_points():
    x = torch.from_numpy(network_like(n=40_000))
    centers = x[:60].clone()
    centers[7] = x.sum(dim=0)  # an outlier: only its own row, far behind the first rows, is near it
    x[39_990] = centers[7] + 0.01
    assert kmeans.assign(x, centers).bincount(minlength=60)[7] == 1
    assert kmeans._all_used(x, centers, kmeans.BUDGET)
    centers[9] = (
        centers[7] + 10
    )  # the outlier is nearest to 9 of all rows, but 9 is not its nearest centre
    assert not kmeans._all_used(x, centers, kmeans.BUDGET)


def test_a_cluster_of_equal_points_is_not_cut_but_the_next_largest_is():
    x = torch.tensor([[5.0, 0.0]] * 10 + [[0.0, 0.1], [0.0, 0.9]])
    labels = torch.tensor([0] * 10 + [1, 1])
    centers, filled = kmeans.fill_by_splitting(
        x, torch.tensor([[5.0, 0.0], [0.0, 0.5], [99.0, 99.0], [99.0, 98.0]]), labels
    )
    assert filled.tolist() == [0] * 10 + [1, 2]  # and nothing is left to cut for the last one
    torch.testing.assert_close(
        centers, torch.tensor([[5.0, 0.0], [0.0, 0.1], [0.0, 0.9], [99.0, 98.0]])
    )
    assert labels.tolist() == [0] * 10 + [1, 1]


@both_engines
@both_kinds
@pytest.mark.parametrize("as_labels", [False, True])
def test_a_warm_start_goes_on_where_it_was(engine, kind, as_labels):
    x = network_like()
    cold = KMeans(20, engine=engine, tol=0.0, max_iter=500).fit(kind(x))
    warm = KMeans(
        20, engine=engine, tol=0.0, init=cold.labels_ if as_labels else cold.cluster_centers_
    ).fit(kind(x))
    assert warm.n_iter_ <= 2 < cold.n_iter_
    np.testing.assert_array_equal(np.asarray(warm.labels_), np.asarray(cold.labels_))
    turned = np.ascontiguousarray(
        x[:, ::-1] * -1
    )  # new features whose axes are others: labels carry over, centres do not
    if as_labels:
        np.testing.assert_array_equal(
            np.asarray(KMeans(20, engine=engine, init=cold.labels_).fit(kind(turned)).labels_),
            cold.labels_,
        )


@both_engines
@pytest.mark.parametrize(
    ("init", "message"),
    [
        (np.zeros((3, 16)), r"must have 2 centres of 16 columns, got shape \(3, 16\)"),
        (np.full((2, 16), np.nan), "init holds NaN"),
        (np.zeros(49, dtype=int), "50 integer labels from 0 to 1, got torch.int64 of shape"),
        (np.full(50, 2), "50 integer labels from 0 to 1"),
        (np.zeros(50), "50 integer labels from 0 to 1, got torch.float64"),
        (
            np.broadcast_to(np.int64(5), 50),
            "50 integer labels from 0 to 1, got torch.int64",
        ),  # memory that must not be written
    ],
)
def test_a_start_that_fits_neither_is_refused(engine, init, message):
    with pytest.raises(ValueError, match=message):
        KMeans(2, engine=engine, init=init).fit(blobs(n=50)[0])


def test_scikit_learn_stops_by_the_same_tolerance_as_without_this_wrapper():
    x = network_like()
    start = x[np.random.default_rng(3).choice(len(x), 20, replace=False)]
    reference = sklearn.cluster.KMeans(20, init=start, n_init=1, tol=0.01, max_iter=300).fit(x)
    model = KMeans(20, init=start, tol=0.01, max_iter=300).fit(x)
    assert model.n_iter_ == reference.n_iter_
    np.testing.assert_array_equal(model.labels_, reference.labels_)
    assert model.n_iter_ < KMeans(20, init=start, tol=0.0, max_iter=300).fit(x).n_iter_


def test_large_finite_values_are_not_taken_for_infinite_ones():
    x = np.full((10, 3), 2e38, dtype=np.float32)  # their sum overflows
    assert torch.isinf(torch.from_numpy(x).sum())
    assert len(kmeans.checked_rows(x)) == 10


def test_a_refill_takes_the_point_out_of_a_cluster_that_keeps_others():
    x = torch.tensor([[9.0], [1.0], [2.0], [6.0]])
    labels, centers = torch.tensor([0, 1, 1, 1]), torch.tensor([[0.0], [2.0], [50.0]])
    sums, counts = kmeans.cluster_sums(x, labels, 3)
    kmeans._refill(
        sums, counts, x, labels, centers
    )  # the farthest point, 9, is all that its cluster has
    assert sums.flatten().tolist() == [9.0, 3.0, 6.0]
    assert counts.tolist() == [1.0, 2.0, 1.0]


def test_start_takes_distinct_points_of_the_data_one_from_each_blob():
    x, y = blobs(k=30, d=32)
    starts = kmeans._plus_plus(torch.from_numpy(x), 30, torch.Generator().manual_seed(0)).numpy()
    indices = [int(np.flatnonzero((x == start).all(axis=1))[0]) for start in starts]
    assert (
        len(set(y[indices])) >= 28
    )  # greedy k-means++ on well separated blobs; 30 uniform draws would hit 19
    late = torch.cat([torch.zeros(3000), torch.arange(1.0, 7.0), torch.zeros(500)]).unsqueeze(
        1
    )  # a point on a centre is never drawn
    assert kmeans._plus_plus(
        late, 7, torch.Generator().manual_seed(0)
    ).flatten().sort().values.tolist() == [0, 1, 2, 3, 4, 5, 6]


@both_engines
def test_as_many_clusters_as_points_and_a_single_cluster(engine):
    x, _ = blobs(n=40)
    assert KMeans(40, engine=engine).fit(x).inertia_ == pytest.approx(0, abs=1e-3)
    one = KMeans(1, engine=engine).fit(x)
    np.testing.assert_allclose(one.cluster_centers_[0], x.mean(axis=0), rtol=1e-5)
    assert KMeans(1, engine=engine).fit(x[:1]).labels_.tolist() == [0]


@both_engines
def test_fewer_distinct_points_than_clusters_is_said_plainly(engine):
    x = np.repeat(np.arange(3.0), 20)[:, None]
    with pytest.warns(
        RuntimeWarning,
        match="only 3 of n_clusters=5 clusters hold points: the 60 points have 3 distinct values",
    ) as caught:
        model = KMeans(5, engine=engine).fit(x)
    assert len(caught) == 1
    assert model.inertia_ == pytest.approx(0)
    assert np.isfinite(model.cluster_centers_).all()
    assert adjusted_rand_score(x[:, 0], model.labels_) == 1.0


@both_engines
def test_best_of_several_starts(engine):
    x = network_like(n=500)
    assert (
        KMeans(20, n_init=8, engine=engine).fit(x).inertia_
        < KMeans(20, n_init=1, engine=engine).fit(x).inertia_
    )


def digest(model):
    return hashlib.sha256(
        model.cluster_centers_.tobytes()
        + model.labels_.tobytes()
        + np.float64(model.inertia_).tobytes()
    ).hexdigest()


@both_engines
def test_a_seed_gives_the_same_bits_again_and_leaves_the_data_alone(engine):
    x = network_like()
    x.setflags(write=False)
    before = x.copy()
    first, again, other = (KMeans(20, seed=seed, engine=engine).fit(x) for seed in (1, 1, 2))
    assert digest(first) == digest(again) != digest(other)
    np.testing.assert_array_equal(x, before)


def test_scikit_learns_engine_gives_the_same_bits_whatever_the_number_of_threads_at_hand():
    """With 8 threads scikit-learn's sums come in another order in each run (`threads=None` fails
    here); with two they cannot.
    """
    script = (
        "import hashlib, numpy as np; from threadpoolctl import threadpool_limits; from lib.kmeans import KMeans\n"
        "x = np.random.default_rng(0).normal(size=(8_000, 16)).astype(np.float32)\n"
        "for threads in (1, 2, 8, 8, 8):\n"
        "    with threadpool_limits(threads):\n"
        "        print(hashlib.sha256(KMeans(30, max_iter=10).fit(x).cluster_centers_.tobytes()).hexdigest())"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "8"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = run.stdout.split()
    assert len(found) == 5
    assert len(set(found)) == 1


@both_engines
@both_kinds
def test_predict_takes_new_points_to_the_nearest_centre(engine, kind):
    x, _ = blobs()
    new, _ = blobs(n=300, seed=5)
    model = KMeans(10, engine=engine).fit(kind(x))
    expected = ((new[:, None] - np.asarray(model.cluster_centers_)) ** 2).sum(axis=2).argmin(axis=1)
    found = model.predict(kind(new))
    assert isinstance(found, type(kind(new)))
    np.testing.assert_array_equal(np.asarray(found), expected)
    np.testing.assert_array_equal(np.asarray(model.fit_predict(kind(x))), np.asarray(model.labels_))
    model.predict(kind(new.astype(np.float64)))


@both_engines
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_with_their_row(engine, value):
    x, _ = blobs(n=50)
    x[17, 3] = value
    with pytest.raises(ValueError, match="NaN or infinite values, first in row 17"):
        KMeans(3, engine=engine).fit(x)


@both_engines
def test_more_clusters_than_points_is_refused_with_both_numbers(engine):
    with pytest.raises(ValueError, match="n_clusters=21 is larger than the number of points, 20"):
        KMeans(21, engine=engine).fit(blobs(n=20)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_clusters": 0}, "n_clusters must be at least 1, got 0"),
        ({"n_clusters": 2, "max_iter": 0}, "max_iter must be at least 1, got 0"),
        ({"n_clusters": 2, "n_init": -1}, "n_init must be at least 1, got -1"),
        ({"n_clusters": 2, "threads": 0}, "threads must be at least 1 or None, got 0"),
        ({"n_clusters": 2, "budget_bytes": 0}, "budget_bytes must be at least 1, got 0"),
        ({"n_clusters": 2, "engine": "faiss"}, "'auto', 'sklearn' or 'torch', got 'faiss'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KMeans(**options)


def test_wrong_use_of_an_estimator():
    x, _ = blobs(n=50)
    with pytest.raises(RuntimeError, match="not fitted"):
        KMeans(3).predict(x)
    with pytest.raises(ValueError, match="9 columns, but the centres have 16"):
        KMeans(3).fit(x).predict(x[:, :9])
    with pytest.raises(ValueError, match=r"shape \(N, D\), got \(50,\)"):
        KMeans(3).fit(x[:, 0])
