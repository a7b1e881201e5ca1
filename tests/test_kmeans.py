"""K-means: both engines find what is planted, agree with scikit-learn, and give the same bits twice."""

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
both_kinds = pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])


def blobs(n=2000, k=10, d=16, seed=0):
    x, y = make_blobs(n, d, centers=k, random_state=seed)
    return x.astype(np.float32), y


def network_like(n=3000, d=64, seed=0):
    """Whitened features as a narrow network gives them: rectified, correlated, without clear clusters."""
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
    theirs = [sklearn.cluster.KMeans(20, n_init=1, max_iter=100, random_state=s).fit(x).inertia_ for s in range(4, 8)]
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.01)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_torch_lloyd_walks_the_same_way_as_scikit_learn_from_the_same_start(dtype):
    x = network_like().astype(dtype)
    start = x[np.random.default_rng(3).choice(len(x), 20, replace=False)]
    reference = sklearn.cluster.KMeans(20, init=start, n_init=1, max_iter=100, tol=0.01).fit(x)
    centers, labels, inertia, n_iter = kmeans._lloyd(torch.from_numpy(x), torch.from_numpy(start), 100, 0.01)
    np.testing.assert_array_equal(labels.numpy(), reference.labels_)
    np.testing.assert_allclose(centers.numpy(), reference.cluster_centers_, atol=1e-5)
    assert inertia == pytest.approx(reference.inertia_, rel=1e-5)
    assert n_iter == reference.n_iter_ < 100  # stopped by the tolerance, as not all labels are at rest


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
    """Each point has its nearest centre, each centre is the mean of its points, all clusters are in use, inertia is what it says."""
    k = min(n, k)
    x = np.random.default_rng(seed).normal(size=(n, d))
    model = KMeans(k, seed=seed, engine=engine, tol=0.0, max_iter=300).fit(x)
    distances = ((x[:, None] - model.cluster_centers_) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances[np.arange(n), model.labels_], distances.min(axis=1), atol=1e-9)
    assert set(model.labels_) == set(range(k))
    means = np.stack([x[model.labels_ == c].mean(axis=0) for c in range(k)])
    np.testing.assert_allclose(model.cluster_centers_, means, atol=1e-9)
    assert model.inertia_ == pytest.approx(distances.min(axis=1).sum(), abs=1e-9)
    np.testing.assert_array_equal(model.predict(x), model.labels_)


def test_empty_clusters_are_given_the_farthest_points():
    x = torch.cat([torch.zeros(30, 2), torch.ones(30, 2), torch.tensor([[9.0, 9.0], [-9.0, 9.0]])]) + torch.rand(62, 2) * 0.1
    start = torch.tensor([[0.0, 0.0], [1.0, 1.0], [500.0, 0.0], [500.0, 0.0]])  # nothing is near the last two
    centers, labels, _, _ = kmeans._lloyd(x, start, 10, 1e-4)
    assert labels.bincount(minlength=4).tolist() == [30, 30, 1, 1]
    torch.testing.assert_close(centers[2:].sort(dim=0).values, x[60:].sort(dim=0).values)


def test_a_refill_takes_the_point_out_of_a_cluster_that_keeps_others():
    x = torch.tensor([[9.0], [1.0], [2.0], [6.0]])
    labels, centers = torch.tensor([0, 1, 1, 1]), torch.tensor([[0.0], [2.0], [50.0]])
    sums, counts = kmeans._sums(x, labels, 3)
    kmeans._refill(sums, counts, x, labels, centers)  # the farthest point, 9, is all that its cluster has
    assert sums.flatten().tolist() == [9.0, 3.0, 6.0]
    assert counts.tolist() == [1.0, 2.0, 1.0]


def test_start_takes_distinct_points_of_the_data_one_from_each_blob():
    x, y = blobs(k=30, d=32)
    starts = kmeans._plus_plus(torch.from_numpy(x), 30, torch.Generator().manual_seed(0)).numpy()
    indices = [int(np.flatnonzero((x == start).all(axis=1))[0]) for start in starts]
    assert len(set(y[indices])) >= 28  # greedy k-means++ on well separated blobs; 30 uniform draws would hit 19
    late = torch.cat([torch.zeros(3000), torch.arange(1.0, 7.0), torch.zeros(500)]).unsqueeze(1)  # a point on a centre is never drawn
    assert kmeans._plus_plus(late, 7, torch.Generator().manual_seed(0)).flatten().sort().values.tolist() == [0, 1, 2, 3, 4, 5, 6]


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
    with pytest.warns(RuntimeWarning, match="only 3 of n_clusters=5 clusters hold points: the 60 points have 3 distinct values") as caught:
        model = KMeans(5, engine=engine).fit(x)
    assert len(caught) == 1
    assert model.inertia_ == pytest.approx(0)
    assert np.isfinite(model.cluster_centers_).all()
    assert adjusted_rand_score(x[:, 0], model.labels_) == 1.0


@both_engines
def test_best_of_several_starts(engine):
    x = network_like(n=500)
    assert KMeans(20, n_init=8, engine=engine).fit(x).inertia_ < KMeans(20, n_init=1, engine=engine).fit(x).inertia_


def digest(model):
    return hashlib.sha256(model.cluster_centers_.tobytes() + model.labels_.tobytes() + np.float64(model.inertia_).tobytes()).hexdigest()


@both_engines
def test_a_seed_gives_the_same_bits_again_and_leaves_the_data_alone(engine):
    x = network_like()
    x.setflags(write=False)
    before = x.copy()
    first, again, other = (KMeans(20, seed=seed, engine=engine).fit(x) for seed in (1, 1, 2))
    assert digest(first) == digest(again) != digest(other)
    np.testing.assert_array_equal(x, before)


def test_scikit_learns_engine_gives_the_same_bits_whatever_the_number_of_threads_at_hand():
    """With 8 threads scikit-learn's sums come in another order in each run (`threads=None` fails here); with two they cannot."""
    script = (
        "import hashlib, numpy as np; from threadpoolctl import threadpool_limits; from lib.kmeans import KMeans\n"
        "x = np.random.default_rng(0).normal(size=(8_000, 16)).astype(np.float32)\n"
        "for threads in (1, 2, 8, 8, 8):\n"
        "    with threadpool_limits(threads):\n"
        "        print(hashlib.sha256(KMeans(30, max_iter=10).fit(x).cluster_centers_.tobytes()).hexdigest())"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env={**os.environ, "OMP_NUM_THREADS": "8"}, capture_output=True, text=True, check=True
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
