"""Clusterers by name: all find planted clusters and give what the loop asks of them."""

import sys

import numpy as np
import pytest
from sklearn.base import clone

from lib.kmeans import CLUSTERERS, GraphClusters, make_clusterer, nearest
from lib.metrics import nmi


def planted(n=400, k=6, d=8, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % k
    centres = 6 * rng.normal(size=(k, d))
    return (centres[labels] + rng.normal(size=(n, d))).astype(np.float32), labels


def made(name, k=6, seed=0):
    if name == "graph":
        pytest.importorskip("igraph")
    return make_clusterer(name, k, seed)


@pytest.mark.parametrize("name", CLUSTERERS)
def test_planted_clusters_are_found(name):
    points, labels = planted()
    clusterer = made(name)
    found = clusterer.fit_predict(points)
    assert nmi(found, labels) > 0.95
    assert len(np.unique(found)) == 6
    means = np.stack([points[found == c].mean(0) for c in range(6)])
    np.testing.assert_allclose(clusterer.cluster_centers_, means, atol=0.1)
    np.testing.assert_array_equal(made(name).fit_predict(points), found)  # same seed, same bits


@pytest.mark.parametrize("name", CLUSTERERS)
def test_estimators_can_be_cloned(name):
    clusterer = clone(made(name))
    assert clusterer.get_params()["n_clusters"] == 6


def test_an_unknown_clusterer_is_named():
    with pytest.raises(ValueError, match="spectral"):
        make_clusterer("spectral", 2, 0)


def test_nearest_centroid():
    rng = np.random.default_rng(0)
    points, centroids = rng.normal(size=(50, 4)), rng.normal(size=(7, 4))
    distances = np.linalg.norm(points[:, None] - centroids, axis=2)
    np.testing.assert_array_equal(nearest(points, centroids), distances.argmin(1))


@pytest.mark.parametrize("k", [2, 37, 400])
def test_the_graph_gives_k_clusters(k):
    pytest.importorskip("igraph")
    points, _ = planted()
    assert len(np.unique(GraphClusters(k).fit_predict(points))) == k


def test_points_outside_the_graph_go_to_the_nearest_mean():
    pytest.importorskip("igraph")
    points, labels = planted(600)
    assert nmi(GraphClusters(6, max_points=200).fit_predict(points), labels) > 0.95


def test_without_igraph_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "igraph", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        GraphClusters(2).fit(planted(20)[0])
