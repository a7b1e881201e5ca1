"""Clusterings behind one interface: each finds what is planted with exactly K clusters, and gives
the same bits twice.
"""

import random
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import make_blobs
from sklearn.metrics import adjusted_rand_score

from lib.clusterers import (
    CLUSTERERS,
    GraphClusters,
    HierarchicalKMeans,
    make_clusterer,
    proportional_shares,
)


def name_param(name):
    installed = name != "graph" or __import__("importlib.util").util.find_spec("igraph")
    return pytest.param(
        name, marks=() if installed else pytest.mark.skip(reason="igraph is not installed")
    )


every = pytest.mark.parametrize("name", [name_param(name) for name in CLUSTERERS])


def blobs(n=1500, k=9, d=12, seed=0):
    x, y = make_blobs(n, d, centers=k, random_state=seed)
    return x.astype(np.float32), y


@every
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["array", "tensor"])
def test_planted_blobs_are_found(name, kind):
    x, y = blobs()
    model = make_clusterer(name, 9, 4)
    labels = model.fit_predict(kind(x))
    assert isinstance(labels, type(kind(x)))
    assert isinstance(model.cluster_centers_, type(kind(x)))
    labels, centers = np.asarray(labels), np.asarray(model.cluster_centers_)
    assert labels.dtype == np.int64
    assert adjusted_rand_score(y, labels) > (
        0.7 if name == "hierarchical" else 0.99
    )  # two levels may cut a blob
    assert centers.shape == (9, 12)
    assert model.inertia_ == pytest.approx(((x - centers[labels]) ** 2).sum(), rel=1e-4)
    assert model.n_iter_ >= 1
    np.testing.assert_array_equal(np.asarray(model.predict(kind(x))), labels)


@every
@pytest.mark.parametrize("k", [1, 2, 7, 60])
def test_there_are_exactly_k_clusters(name, k):
    x = np.random.default_rng(0).normal(size=(60 if k == 60 else 500, 5)).astype(np.float32)
    labels = make_clusterer(name, k).fit_predict(x)
    assert set(labels) == set(range(k))


@every
def test_a_seed_gives_the_same_bits_again_and_leaves_the_data_alone(name):
    x = np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32)
    x.setflags(write=False)
    before, state = x.copy(), random.getstate()
    first, again, other = (make_clusterer(name, 20, seed).fit(x) for seed in (1, 1, 2))
    assert (
        first.cluster_centers_.tobytes()
        == again.cluster_centers_.tobytes()
        != other.cluster_centers_.tobytes()
    )
    np.testing.assert_array_equal(first.labels_, again.labels_)
    np.testing.assert_array_equal(x, before)
    assert random.getstate() == state


@pytest.mark.parametrize(
    "name", ["kmeans", "minibatch", "hierarchical"]
)  # a graph may put equal points into two communities
def test_fewer_distinct_points_than_clusters_is_said_plainly(name):
    x = np.repeat(np.arange(3.0), 20)[:, None]
    with pytest.warns(
        RuntimeWarning,
        match="only 3 of n_clusters=5 clusters hold points: the 60 points have 3 distinct values",
    ) as caught:
        model = make_clusterer(name, 5).fit(x)
    assert len(caught) == 1
    assert model.inertia_ == pytest.approx(0)


@every
def test_wrong_use_of_an_estimator(name):
    x, _ = blobs(n=50)
    with pytest.raises(RuntimeError, match="not fitted"):
        make_clusterer(name, 3).predict(x)
    with pytest.raises(ValueError, match="5 columns, but the centres have 12"):
        make_clusterer(name, 3).fit(x).predict(x[:, :5])
    with pytest.raises(ValueError, match="n_clusters=51 is larger than the number of points, 50"):
        make_clusterer(name, 51).fit(x)
    with pytest.raises(ValueError, match="n_clusters must be at least 1, got 0"):
        make_clusterer(name, 0)
    x[17, 3] = np.inf
    with pytest.raises(ValueError, match="first in row 17"):
        make_clusterer(name, 3).fit(x)


def test_unknown_names_and_options_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError,
        match="no clusterer 'dbscan': choose one of 'kmeans', 'minibatch', 'hierarchical', 'graph'",
    ):
        make_clusterer("dbscan", 3)
    with pytest.raises(
        TypeError, match="'minibatch' has no option 'init': it takes batch_size, max_iter, threads"
    ):
        make_clusterer("minibatch", 3, init=None)
    assert make_clusterer("minibatch", 3, batch_size=77).batch_size == 77
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make_clusterer("minibatch", 3, batch_size=0)
    with pytest.raises(ValueError, match="n_coarse must be from 1 to n_clusters=4, got 5"):
        make_clusterer("hierarchical", 4, n_coarse=5)
    with pytest.raises(ValueError, match="max_iter must be at least 1, got 0"):
        make_clusterer("hierarchical", 4, max_iter=0)


def test_a_missing_igraph_is_named_with_its_command_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "igraph", None)
    with pytest.raises(ModuleNotFoundError, match=r'needs igraph: pip install "igraph>=0\.11"'):
        make_clusterer("graph", 3)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any), data=st.data())
def test_shares_are_proportional_whole_and_within_bounds(sizes, data):
    sizes = np.array(sizes)
    total = data.draw(st.integers(int((sizes > 0).sum()), int(sizes.sum())))
    shares = proportional_shares(sizes, total)
    assert shares.sum() == total
    assert ((shares >= (sizes > 0)) & (shares <= sizes)).all()
    assert (
        np.diff(shares[np.argsort(sizes, kind="stable")]) >= -1
    ).all()  # a larger group has no fewer, but for a seat of rounding
    assert proportional_shares(np.array([10, 30, 60]), 10).tolist() == [1, 3, 6]


def test_a_hierarchy_costs_less_than_all_centres_and_predicts_down_its_tree():
    x = np.random.default_rng(0).normal(size=(3000, 6)).astype(np.float32)
    model = HierarchicalKMeans(49, tol=0.0, max_iter=500).fit(x)
    assert len(model._shares) == 7
    np.testing.assert_array_equal(model.predict(x), model.labels_)
    counts = np.bincount(model._coarse.labels_)
    assert (np.abs(model._shares - counts / counts.sum() * 49) < 1).all()
    parent = np.repeat(np.arange(7), model._shares)
    np.testing.assert_array_equal(parent[model.labels_], model._coarse.labels_)


@pytest.mark.skipif(
    "not __import__('importlib.util').util.find_spec('igraph')", reason="igraph is not installed"
)
class TestGraph:
    def test_a_graph_finds_clusters_that_are_not_round(self):
        rng = np.random.default_rng(0)
        angle = rng.uniform(0, 2 * np.pi, 800)
        truth = np.arange(800) % 2
        x = (
            np.stack([np.cos(angle), np.sin(angle)], 1) * (1 + 2 * truth[:, None])
            + 0.05 * rng.normal(size=(800, 2))
        ).astype(np.float32)
        found = GraphClusters(2, n_neighbors=10).fit(x)
        assert (
            adjusted_rand_score(truth, found.labels_) < 1
        )  # rings, joined by their means: no better than round
        many = GraphClusters(16, n_neighbors=10).fit_predict(x)
        assert all(
            len(set(truth[many == k])) == 1 for k in range(16)
        )  # but no community spans both

    def test_points_outside_the_graph_go_to_the_nearest_mean(self):
        x, y = blobs()
        model = GraphClusters(9, max_points=300).fit(x)
        assert adjusted_rand_score(y, model.labels_) > 0.99
        np.testing.assert_allclose(
            model.cluster_centers_,
            np.stack([x[model.labels_ == k].mean(axis=0) for k in range(9)]),
            atol=1e-4,
        )

    def test_too_few_points_for_the_clusters_are_refused(self):
        with pytest.raises(ValueError, match="max_points=5 is smaller than n_clusters=9"):
            GraphClusters(9, max_points=5)
