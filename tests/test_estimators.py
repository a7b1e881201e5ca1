"""The estimators pass scikit-learn's own checks: clone, get_params, pipelines, odd input."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator

from lib.features import PCAWhiten
from lib.kmeans import GraphClusters
from lib.metrics import nmi
from tests.test_kmeans import planted

NOT_APPLICABLE = {
    "check_array_api_input": "arrays of other libraries are tensors here, see test_features.py",
}


@pytest.mark.filterwarnings("ignore")  # of data sets that hold fewer components or a flat graph
@pytest.mark.parametrize("estimator", [PCAWhiten(), PCAWhiten(2), GraphClusters()], ids=str)
def test_scikit_learns_checks(estimator):
    results = check_estimator(estimator, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] != "passed"}
    assert failed.keys() <= NOT_APPLICABLE.keys(), failed
    assert len(results) > 40


@pytest.mark.parametrize("last", [KMeans(6, n_init=1, random_state=0), GraphClusters(6)], ids=str)
def test_in_a_pipeline(last):
    points, labels = planted()
    pipeline = make_pipeline(PCAWhiten(5), last).set_params(pcawhiten__n_components=4)
    assert nmi(pipeline.fit_predict(points), labels) > 0.95
    assert pipeline[:-1].transform(points).shape == (len(points), 4)
    assert pipeline[0].n_features_in_ == points.shape[1]
    with pytest.raises(ValueError, match=r"row 3"):
        pipeline[0].transform(np.where(np.arange(len(points))[:, None] == 3, np.nan, points))
