"""Clusterers by name: all find planted clusters and give what the loop asks of them. The estimators
pass scikit-learn's own checks: clone, get_params, odd input."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.utils.estimator_checks import check_estimator

from lib.features import PCAWhiten
from lib.kmeans import CLUSTERERS, GraphClusters, make_clusterer
from lib.metrics import nmi


def planted(n=400, k=6, d=8, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % k
    centres = 6 * rng.normal(size=(k, d))
    return (centres[labels] + rng.normal(size=(n, d))).astype(np.float32), labels


@pytest.mark.parametrize("name", CLUSTERERS)
def test_planted_clusters_are_found(name):
    points, labels = planted()
    clusterer = clone(make_clusterer(name, 6, 0))
    found = clusterer.fit_predict(points)
    assert nmi(found, labels) > 0.95
    assert len(np.unique(found)) == 6
    means = np.stack([points[found == c].mean(0) for c in range(6)])
    np.testing.assert_allclose(clusterer.cluster_centers_, means, atol=0.1)
    again = make_clusterer(name, 6, 0).fit_predict(points)
    np.testing.assert_array_equal(again, found)  # same seed, same bits


@pytest.mark.parametrize("k", [2, 37, 400])
def test_the_graph_gives_k_clusters(k):
    points, _ = planted()
    assert len(np.unique(make_clusterer("graph", k, 0).fit_predict(points))) == k


@pytest.mark.filterwarnings("ignore")  # of data sets that hold fewer components or a flat graph
@pytest.mark.parametrize("estimator", [PCAWhiten(), PCAWhiten(2), GraphClusters()], ids=str)
def test_scikit_learns_checks(estimator):
    results = check_estimator(estimator, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}
    # other libraries' arrays: tensors, see test_features.py
    assert failed.keys() <= {"check_array_api_input"}, failed
    assert len(results) > 40
