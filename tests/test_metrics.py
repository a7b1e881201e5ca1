"""Metrics against values known by hand, planted effects and nulls."""

import math

import numpy as np
import pytest
from scipy.stats import entropy
from sklearn.datasets import make_blobs
from sklearn.metrics import davies_bouldin_score, silhouette_score
from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

from lib import metrics


def halves(n):
    """Index sets of the first 70 % and of the rest."""
    return np.arange(int(0.7 * n)), np.arange(int(0.7 * n), n)


def test_nmi_divides_by_the_mean_of_the_entropies():
    # the second splits a cluster of the first: I = H(a) = ln 2, H(b) = 1.5 ln 2
    assert metrics.nmi([0, 0, 1, 1], [0, 0, 1, 2]) == pytest.approx(1 / 1.25)


def test_chance_level_at_the_paper_s_size_is_the_exact_expectation():
    """Two unrelated clusterings of 16,258 images into 200: NMI 0.217, AMI 0."""
    a, b = np.random.default_rng(0).integers(200, size=(2, 16_258))
    # hypergeometric (Vinh et al. 2010)
    expected = expected_mutual_information(contingency_matrix(a, b, sparse=True), len(a))
    exact = expected / np.mean([entropy(np.bincount(labels)) for labels in (a, b)])
    assert exact == pytest.approx(0.217, abs=5e-4)
    first, again, other = (metrics.chance_nmi(a, b, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert [first, other, metrics.chance_nmi(a, a, 0)] == pytest.approx([exact] * 3, abs=1e-3)
    assert metrics.ami(a, b) == pytest.approx(0, abs=2e-3)


def test_occupancy_of_known_sizes():
    one = {"clusters_used": 1, "largest_cluster": 1.0, "perplexity": 1.0}
    assert metrics.occupancy([0] * 8, 4) == one
    even = metrics.occupancy(np.repeat(np.arange(4), 3), 4)
    assert even == {"clusters_used": 4, "largest_cluster": 0.25, "perplexity": pytest.approx(4)}
    skew = metrics.occupancy([0, 0, 2, 3], 5)  # entropy 1.5 ln 2
    assert skew == {"clusters_used": 3, "largest_cluster": 0.5, "perplexity": pytest.approx(2**1.5)}
    for labels in ([0, 4], [-1, 0], [], [[0, 1]]):
        with pytest.raises(ValueError, match="assignments"):
            metrics.occupancy(labels, 4)


def test_probe_reads_a_planted_label_and_not_a_random_one():
    x, y = make_blobs(600, 20, centers=6, random_state=0)
    train, test = halves(600)
    planted = metrics.probe(x, y, train, test)
    assert planted["accuracy"] == 1.0
    assert (planted["n_classes"], len(planted["correct"])) == (6, 180)
    assert planted["probabilities"].sum(axis=1) == pytest.approx(1)
    answers = planted["classes"][planted["probabilities"].argmax(axis=1)]
    assert (planted["correct"] == (answers == y[test])).all()
    noise = metrics.probe(np.random.default_rng(0).normal(size=(600, 20)), y, train, test)
    assert noise["low"] <= 1 / 6 <= noise["high"]
    assert noise["chance"] == pytest.approx(1 / 6, abs=0.02)


def test_probe_s_baselines_and_unseen_classes_by_hand():
    labels = np.array(list("aaabbc") + list("aabz"))
    x = (labels[:, None] == np.array(list("abcz"))).astype(float)
    found = metrics.probe(x, labels, np.arange(6), np.arange(6, 10))
    assert found["accuracy"] == 0.75  # z cannot be answered
    assert found["majority"] == 0.5
    assert found["chance"] == pytest.approx((3 / 6 + 3 / 6 + 2 / 6 + 0) / 4)
    assert found["n_classes"] == 3
    one = np.array([1] * 10 + [1, 1, 2, 3])  # one class in training: it is the answer
    features = np.random.default_rng(0).normal(size=(14, 3))
    found = metrics.probe(features, one, np.arange(10), np.arange(14) >= 10)
    assert found["accuracy"] == found["majority"] == found["chance"] == 0.5


def test_probe_learns_nothing_from_the_test_images(monkeypatch):
    monkeypatch.setattr(metrics, "MAX_FEATURES", 10)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 40)), rng.integers(3, size=300)
    train, test = halves(300)
    moved, y_moved = x.copy(), y.copy()
    moved[test[1:]] *= 1e6  # would change scaling and PCA if these were fitted on all images
    y_moved[test[1:]] = 0
    first, second = metrics.probe(x, y, train, test), metrics.probe(moved, y_moved, train, test)
    assert first["probabilities"].shape == (90, 3)
    assert first["probabilities"][0] == pytest.approx(second["probabilities"][0])
    assert first["majority"] != second["majority"]


def test_probe_of_many_features_keeps_what_the_first_components_hold():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(500, 5))
    wide = latent @ rng.normal(size=(5, 700)) + 0.1 * rng.normal(size=(500, 700))
    found, again = (metrics.probe(wide, latent[:, 0] > 0, *halves(500)) for _ in range(2))
    assert found["accuracy"] > 0.9
    assert all(np.array_equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": np.arange(5, 20)}, "5 patients"),
        ({"groups": np.repeat(np.arange(5), 4)}, "1 patients .* as 2"),
        ({"train": np.arange(0)}, "0 to train"),
    ],
    ids=["overlap", "patient", "empty"],
)
def test_splits_that_would_mislead_are_refused(change, message):
    values = {"features": np.zeros((20, 2)), "labels": np.arange(20) % 2}
    values |= {"train": np.arange(10), "test": np.arange(10, 20)} | change
    with pytest.raises(ValueError, match=message):
        metrics.probe(**values)


def test_bootstrap_over_patients_covers_the_truth_and_over_images_does_not():
    """Images of a patient share their fate: of 150 studies with true accuracy 0.7, about 95 % of
    the patient-wise intervals hold it."""
    rng, n = np.random.default_rng(0), 150
    patients = np.concatenate([[-1], np.repeat(np.arange(80), 5)])
    features, rows, covered = np.zeros((401, 1)), ([0], np.arange(1, 401)), np.zeros(2)
    for study in range(n):
        # one class in training: always answered, so the labels alone decide what is correct
        labels = np.concatenate([[1], np.repeat(rng.random(80) < 0.7, 5)]).astype(int)
        for place, groups in enumerate((patients, None)):
            found = metrics.probe(features, labels, *rows, groups, seed=study, n_boot=200)
            covered[place] += found["low"] <= 0.7 <= found["high"]
    assert 0.90 <= covered[0] / n <= 0.98
    assert covered[1] / n < 0.75


def test_no_interval_without_a_bootstrap_or_with_a_single_patient():
    for options in ({"n_boot": 0}, {"groups": [0, 0, 1, 1, 1, 1]}):
        found = metrics.probe(np.eye(6), [0, 0, 1, 0, 1, 0], [0, 1], [2, 3, 4, 5], **options)
        assert np.isnan([found["low"], found["high"]]).all()


def test_seed_interval_by_hand():
    mean, low, high = metrics.seed_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    half = 4.302653 / math.sqrt(3)  # t(0.975, 2) = 4.302653
    assert (high - mean, mean - low) == pytest.approx((half, half))
    assert metrics.seed_interval([5.0]) == pytest.approx((5, math.nan, math.nan), nan_ok=True)
    assert metrics.seed_interval([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="at least one seed"):
        metrics.seed_interval([])


def test_cluster_structure_tells_blobs_from_noise():
    x, y = make_blobs(400, 8, centers=5, random_state=0)
    found, sampled = metrics.cluster_structure(x, y), metrics.cluster_structure(x, y, 0, 200)
    random = metrics.cluster_structure(x, np.random.default_rng(0).permutation(y))
    assert random["silhouette"] < 0 < 0.5 < found["silhouette"] == silhouette_score(x, y)
    assert random["davies_bouldin"] > found["davies_bouldin"] == davies_bouldin_score(x, y)
    assert sampled["silhouette"] == pytest.approx(found["silhouette"], abs=0.03)
    for labels in (np.zeros(400, int), np.arange(400)):
        assert np.isnan(list(metrics.cluster_structure(x, labels).values())).all()
