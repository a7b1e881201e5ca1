"""Metrics against values known by hand or from scikit-learn, laws that hold for all inputs, and
planted effects and nulls.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.datasets import make_blobs
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    davies_bouldin_score,
    roc_auc_score,
    silhouette_score,
)
from sklearn.metrics.cluster import contingency_matrix, expected_mutual_information

from lib import metrics

labellings = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 7), min_size=n, max_size=n)] * 2)
)


def halves(n):
    """Index sets of the first 70 % and of the rest."""
    return np.arange(int(0.7 * n)), np.arange(int(0.7 * n), n)


# ---------------------------------------------------------------- agreement


def test_agreement_of_known_clusterings():
    a = [0, 0, 1, 1]
    assert metrics.nmi(a, [5, 5, 2, 2]) == metrics.ami(a, ["x", "x", "y", "y"]) == 1.0
    assert metrics.nmi(a, [0, 1, 0, 1]) == 0.0  # independent
    # b splits one cluster of a: I = H(a) = ln 2, H(b) = 1.5 ln 2
    assert metrics.nmi(a, [0, 0, 1, 2]) == pytest.approx(1 / 1.25)
    assert metrics.nmi([0] * 4, a) == 0.0


@settings(deadline=None, max_examples=60)
@given(labellings, st.permutations(range(8)), st.randoms(use_true_random=False))
def test_agreement_is_symmetric_in_range_and_blind_to_names_and_order(pair, names, random):
    a, b = map(np.array, pair)
    order = np.array(random.sample(range(len(a)), len(a)))
    assert 0 <= metrics.nmi(a, b) <= 1 + 1e-12
    for measure in (metrics.nmi, metrics.ami):
        value = measure(a, b)
        assert value <= 1 + 1e-9
        assert measure(b, a) == pytest.approx(value, abs=1e-9)
        assert measure(np.array(names)[a], b) == pytest.approx(value, abs=1e-9)
        assert measure(a[order], b[order]) == pytest.approx(value, abs=1e-9)
        assert measure(a, a) == pytest.approx(1)


def test_chance_level_at_the_paper_s_size_is_the_exact_expectation():
    """Two unrelated clusterings of 16,258 images into 200: NMI 0.217, AMI 0."""
    a, b = np.random.default_rng(0).integers(200, size=(2, 16_258))
    expected = expected_mutual_information(
        contingency_matrix(a, b, sparse=True), len(a)
    )  # hypergeometric (Vinh et al. 2010)
    exact = expected / np.mean([entropy(np.bincount(labels)) for labels in (a, b)])
    assert exact == pytest.approx(0.217, abs=5e-4)
    assert metrics.chance_nmi(a, b, seed=0) == pytest.approx(exact, abs=1e-3)
    assert metrics.chance_nmi(a, a, seed=0) == pytest.approx(exact, abs=1e-3)
    assert metrics.ami(a, b) == pytest.approx(0, abs=2e-3)
    assert (
        metrics.chance_nmi(a, b, seed=0)
        == metrics.chance_nmi(a, b, seed=0)
        != metrics.chance_nmi(a, b, seed=1)
    )


@pytest.mark.parametrize(
    "measure", [metrics.nmi, metrics.ami, lambda a, b: metrics.chance_nmi(a, b, 0)]
)
@pytest.mark.parametrize(("a", "b"), [([0, 1], [0, 1, 1]), ([], []), ([[0, 1]], [[0, 1]])])
def test_labellings_that_do_not_fit_are_refused(measure, a, b):
    with pytest.raises(ValueError, match=r"two labellings \(N,\)"):
        measure(a, b)


def test_occupancy_of_known_sizes():
    assert metrics.occupancy([0] * 8, 4) == {
        "clusters_used": 1,
        "largest_cluster": 1.0,
        "perplexity": 1.0,
    }
    even = metrics.occupancy(np.repeat(np.arange(4), 3), 4)
    assert even == {"clusters_used": 4, "largest_cluster": 0.25, "perplexity": pytest.approx(4)}
    skew = metrics.occupancy([0, 0, 2, 3], 5)  # entropy 1.5 ln 2
    assert skew == {"clusters_used": 3, "largest_cluster": 0.5, "perplexity": pytest.approx(2**1.5)}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=50))
def test_perplexity_lies_between_one_and_the_clusters_used(labels):
    found = metrics.occupancy(labels, 6)
    assert 1 - 1e-9 <= found["perplexity"] <= found["clusters_used"] + 1e-9
    assert 1 / found["clusters_used"] <= found["largest_cluster"] + 1e-9
    assert found["perplexity"] >= 1 / found["largest_cluster"] - 1e-9


@pytest.mark.parametrize("labels", [[0, 4], [-1, 0], [], [[0, 1]]])
def test_occupancy_refuses_assignments_outside_the_clusters(labels):
    with pytest.raises(ValueError, match=r"lie in 0\.\.3"):
        metrics.occupancy(labels, 4)


def test_kept_share_counts_by_transformation():
    reference = np.array([0, 1, 2, 3])
    np.testing.assert_array_equal(
        metrics.kept_share(reference, [[0, 1, 2, 3], [0, 1, 0, 0], [1, 2, 3, 0]]), [1.0, 0.5, 0.0]
    )
    with pytest.raises(ValueError, match=r"\(4,\) and \(2, 3\)"):
        metrics.kept_share(reference, np.zeros((2, 3)))


# ---------------------------------------------------------------- probes


def test_probe_reads_a_planted_label_and_not_a_random_one():
    x, y = make_blobs(600, 20, centers=6, random_state=0)
    train, test = halves(600)
    planted = metrics.probe(x, y, train, test)
    assert planted["accuracy"] == 1.0
    assert (planted["n_classes"], planted["n_train"], planted["n_test"], planted["unseen"]) == (
        6,
        420,
        180,
        0,
    )
    assert planted["converged"]
    noise = metrics.probe(np.random.default_rng(0).normal(size=(600, 20)), y, train, test)
    assert noise["low"] <= 1 / 6 <= noise["high"]
    assert noise["chance"] == pytest.approx(1 / 6, abs=0.02)


def test_probe_s_baselines_and_unseen_classes_by_hand():
    labels = np.array(list("aaabbc") + list("aabz"))
    x = (labels[:, None] == np.array(list("abcz"))).astype(float)
    found = metrics.probe(x, labels, np.arange(6), np.arange(6, 10))
    assert found["accuracy"] == 0.75  # z cannot be answered
    assert found["unseen"] == 1
    assert found["majority"] == 0.5
    assert found["chance"] == pytest.approx((3 / 6 + 3 / 6 + 2 / 6 + 0) / 4)
    assert found["n_classes"] == 3


def test_probe_with_one_class_in_training_answers_it():
    labels = np.array([1] * 10 + [1, 1, 2, 3])
    found = metrics.probe(
        np.random.default_rng(0).normal(size=(14, 3)), labels, np.arange(10), np.arange(14) >= 10
    )
    assert found["accuracy"] == found["majority"] == 0.5
    assert found["unseen"] == 2
    assert found["converged"]


def test_probe_learns_nothing_from_the_test_images():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 40)), rng.integers(3, size=300)
    train, test = halves(300)
    moved = x.copy()
    moved[test[1:]] *= 1e6  # would change scaling and PCA if these were fitted on all images
    assert metrics._standardised(x, train, test, 10, 0)[1][0] == pytest.approx(
        metrics._standardised(moved, train, test, 10, 0)[1][0]
    )
    y_moved = y.copy()
    y_moved[test] = 0
    first, second = metrics.probe(x, y, train, test), metrics.probe(x, y_moved, train, test)
    assert first["majority"] != second["majority"]
    assert first["n_classes"] == second["n_classes"] == 3


def test_probe_of_many_features_keeps_what_the_first_components_hold():
    rng = np.random.default_rng(0)
    latent = rng.normal(size=(500, 5))
    wide = (latent @ rng.normal(size=(5, 700)) + 0.1 * rng.normal(size=(500, 700))).astype(
        np.float32
    )
    found = metrics.probe(wide, latent[:, 0] > 0, *halves(500), max_dim=20)
    assert found["accuracy"] > 0.9
    assert found == metrics.probe(wide, latent[:, 0] > 0, *halves(500), max_dim=20)


def test_a_probe_s_penalty_means_the_same_for_repeated_features():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 8))
    targets = (x + rng.normal(size=x.shape) > 0)[:, :3]
    once, often = (
        metrics.findings_auroc(np.tile(x, (1, times)), targets, *halves(300), n_boot=0)
        for times in (1, 10)
    )
    np.testing.assert_allclose(once["per_finding"], often["per_finding"], atol=1e-3)


def test_a_probe_that_does_not_converge_says_so():
    x, y = make_blobs(200, 5, centers=4, cluster_std=5, random_state=0)
    with pytest.warns(RuntimeWarning, match="did not converge in 1 iterations"):
        _, converged = metrics._fitted(LogisticRegression(max_iter=1, tol=1e-9), x, y)
    assert not converged


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test": np.arange(5, 20)}, "5 patients .* in both train and test"),
        ({"groups": np.repeat(np.arange(5), 4)}, "1 patients .* in both train and test, first 2"),
        ({"train": []}, "both sets must hold images, got 0"),
        ({"labels": np.zeros(19)}, "one row an image"),
        ({"features": np.where(np.arange(40).reshape(20, 2) == 7, np.nan, 0.0)}, "first in row 3"),
    ],
    ids=["overlap", "patient", "empty", "length", "nan"],
)
def test_splits_that_would_mislead_are_refused(change, message):
    given_values = {
        "features": np.zeros((20, 2)),
        "labels": np.arange(20) % 2,
        "train": np.arange(10),
        "test": np.arange(10, 20),
    } | change
    with pytest.raises(ValueError, match=message):
        metrics.probe(**given_values)


def test_bootstrap_over_patients_covers_the_truth_and_over_images_does_not():
    """Images of a patient share their fate: of 300 studies with true accuracy 0.7, about 95 % of
    the patient-wise intervals hold it.
    """
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(80), 5)
    features = np.zeros((401, 1))
    covered = {"patients": 0, "images": 0}
    for study in range(300):
        # one class in training: always answered, so the labels alone decide what is correct
        labels = np.concatenate([[1], np.repeat(rng.random(80) < 0.7, 5)]).astype(int)
        for name, groups in (("patients", np.concatenate([[-1], patients])), ("images", None)):
            found = metrics.probe(
                features, labels, [0], np.arange(1, 401), groups, seed=study, n_boot=200
            )
            covered[name] += found["low"] <= 0.7 <= found["high"]
    assert 0.90 <= covered["patients"] / 300 <= 0.98
    assert covered["images"] / 300 < 0.75


def test_no_interval_without_a_bootstrap_or_with_a_single_patient():
    labels = np.array([0, 0, 1, 0, 1, 0])
    for options in ({"n_boot": 0}, {"groups": [0, 0, 1, 1, 1, 1]}):
        found = metrics.probe(np.eye(6), labels, [0, 1], [2, 3, 4, 5], **options)
        assert math.isnan(found["low"])
        assert math.isnan(found["high"])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40
    ),
)
def test_weighted_auroc_is_scikit_learn_s_ties_and_weights_included(rows):
    scores, positive, weights = map(np.array, zip(*rows, strict=True))
    found = metrics.weighted_auroc(
        scores.astype(float), positive, np.stack([weights, np.ones_like(weights)])
    )
    for value, weight in zip(found, (weights, np.ones_like(weights)), strict=True):
        if weight[positive].sum() and weight[~positive].sum():
            assert value == pytest.approx(roc_auc_score(positive, scores, sample_weight=weight))
        else:
            assert np.isnan(value)


def test_findings_auroc_of_planted_random_and_missing_findings():
    rng = np.random.default_rng(0)
    n = 1200
    x = rng.normal(size=(n, 10))
    train, test = halves(n)
    targets = np.zeros((n, 5), dtype=bool)
    targets[:, 0] = x[:, 0] > 1  # readable
    targets[:, 1] = rng.random(n) < 0.1  # noise
    targets[train[:20], 2] = True  # none to test on
    targets[test[:20], 3] = True  # none to learn from
    targets[:, 4] = True  # never absent
    found = metrics.findings_auroc(x, targets, train, test)
    assert found["per_finding"][0] > 0.97
    assert found["per_finding"][1] == pytest.approx(0.5, abs=0.15)
    assert (found["per_finding_low"][:2] < found["per_finding"][:2]).all()
    assert (found["per_finding"][:2] < found["per_finding_high"][:2]).all()
    for name in ("per_finding", "per_finding_low", "per_finding_high"):
        assert np.isnan(found[name][2:]).all(), name
    assert found["n_findings"] == 2
    assert found["mean"] == pytest.approx(found["per_finding"][:2].mean())
    assert found["low"] < found["mean"] < found["high"]
    assert found["converged"]


def test_findings_auroc_without_any_usable_finding_is_nan():
    found = metrics.findings_auroc(np.eye(10), np.zeros((10, 3), dtype=bool), *halves(10))
    assert found["n_findings"] == 0
    assert all(math.isnan(found[name]) for name in ("mean", "low", "high"))
    with pytest.raises(ValueError, match=r"bool \(N, F\)"):
        metrics.findings_auroc(np.eye(10), np.zeros((10, 3)), *halves(10))


# ---------------------------------------------------------------- intervals and curves


def test_seed_interval_by_hand():
    mean, low, high = metrics.seed_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (high - mean, mean - low) == pytest.approx(
        (4.302653 / math.sqrt(3),) * 2
    )  # t(0.975, 2) = 4.302653
    assert metrics.seed_interval([5.0])[0] == 5.0
    assert all(map(math.isnan, metrics.seed_interval([5.0])[1:]))
    assert metrics.paired_interval([3.0, 5.0, 7.0], [2.0, 3.0, 4.0]) == metrics.seed_interval(
        [1.0, 2.0, 3.0]
    )
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(1,\)"):
        metrics.paired_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one seed"):
        metrics.seed_interval([])


def test_seed_interval_covers_a_planted_mean_with_three_seeds():
    studies = np.random.default_rng(0).normal(0.6, 0.1, size=(1000, 3))
    covered = np.mean([low <= 0.6 <= high for _, low, high in map(metrics.seed_interval, studies)])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize(
    ("curve", "epoch"),
    [
        ([0.1, 0.5, 0.79, 0.8, 0.8, 0.8, 0.8, 0.8], 3),
        ([0.8] * 5, 1),
        ([0.8, 0.1, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8], 3),
        ([0.1, 0.9], 2),
        ([0.7], 1),
        ([0.0, 0.5, 0.0, 0.5, 0.0, 0.5, 0.0, 0.5], math.nan),
    ],
)
def test_convergence_epoch_by_hand(curve, epoch):
    assert metrics.convergence_epoch(curve) == pytest.approx(epoch, nan_ok=True)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 0.5))
def test_convergence_epoch_is_the_first_from_which_the_curve_stays(curve, tolerance):
    final = np.mean(curve[-math.ceil(len(curve) / 4) :])
    inside = [abs(value - final) <= tolerance for value in curve]
    stays = [epoch for epoch in range(1, len(curve) + 1) if all(inside[epoch - 1 :])]
    assert metrics.convergence_epoch(curve, tolerance) == pytest.approx(
        stays[0] if stays else math.nan, nan_ok=True
    )


def test_stability_and_increases_by_hand():
    assert metrics.stability([9.0, 0.0, 1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert metrics.stability([9.0, 5.0, 1.0, 2.0, 3.0]) == pytest.approx(
        1.0
    )  # of five values, the last three
    assert math.isnan(metrics.stability([1.0]))
    assert metrics.increases([5.0, 4.0, 4.5, 4.5, 5.5, 1.0]) == (2, pytest.approx(1.5))
    assert metrics.increases([3.0, 2.0, 1.0]) == (0, 0.0)
    for measure in (metrics.convergence_epoch, metrics.stability, metrics.increases):
        with pytest.raises(ValueError, match="leave out epochs that have no value"):
            measure([math.nan, 0.5])


# ---------------------------------------------------------------- structure


def test_cluster_structure_is_scikit_learn_s_and_tells_blobs_from_noise():
    x, y = make_blobs(400, 8, centers=5, random_state=0)
    found = metrics.cluster_structure(x, y)
    assert found == {
        "silhouette": pytest.approx(silhouette_score(x, y)),
        "davies_bouldin": pytest.approx(davies_bouldin_score(x, y)),
    }
    random = metrics.cluster_structure(x, np.random.default_rng(0).permutation(y))
    assert random["silhouette"] < 0 < 0.5 < found["silhouette"]
    assert random["davies_bouldin"] > found["davies_bouldin"]
    sampled = metrics.cluster_structure(x, y, max_samples=200)
    assert sampled["silhouette"] == pytest.approx(found["silhouette"], abs=0.03)
    assert sampled == metrics.cluster_structure(x, y, max_samples=200)


@pytest.mark.parametrize("labels", [np.zeros(20, dtype=int), np.arange(20)])
def test_cluster_structure_is_nan_where_it_is_not_defined(labels):
    found = metrics.cluster_structure(np.random.default_rng(0).normal(size=(20, 3)), labels)
    assert all(map(math.isnan, found.values()))
    with pytest.raises(ValueError, match=r"\(20, 3\) and \(19,\)"):
        metrics.cluster_structure(np.zeros((20, 3)), labels[:19])


def test_label_neighbourhood_finds_a_planted_label_and_no_random_one():
    points, y = make_blobs(300, 2, centers=3, cluster_std=0.1, random_state=0)
    planted = metrics.label_neighbourhood(points, np.array(["a", "b", "c"])[y])
    assert planted["purity"] == 1.0
    assert planted["baseline"] == pytest.approx(3 * 100 * 99 / (300 * 299))
    assert planted["low"] < planted["baseline"] < planted["high"] < 0.5
    assert planted["p"] == pytest.approx(1 / 201)
    rare = np.random.default_rng(0).random((40, 300)) < 0.1
    nulls = [
        metrics.label_neighbourhood(points, labels, repeats=60, seed=k)
        for k, labels in enumerate(rare)
    ]
    assert np.mean([null["p"] <= 0.05 for null in nulls]) <= 0.15
    assert np.mean([null["purity"] - null["baseline"] for null in nulls]) == pytest.approx(
        0, abs=0.005
    )
    with pytest.raises(ValueError, match="n_neighbors < N"):
        metrics.label_neighbourhood(points, y, n_neighbors=300)


def test_trustworthiness_of_a_true_and_a_shuffled_map():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 2))
    assert metrics.trustworthiness(x @ rng.normal(size=(2, 6)), x @ np.diag([2.0, 2.0])) > 0.8
    assert metrics.trustworthiness(x, 3 * x) == 1.0
    assert metrics.trustworthiness(x, rng.permutation(x)) == pytest.approx(0.5, abs=0.05)
    assert metrics.trustworthiness(x, 3 * x, max_samples=100) == 1.0
    with pytest.raises(ValueError, match="400 and 399"):
        metrics.trustworthiness(x, x[1:])


# --- answers image by image, averages over labels, neighbourhoods of findings


def test_scores_and_probabilities_are_those_of_the_probes():
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(200, 6)), rng.random((200, 3)) < 0.3
    targets[:, 2] = False
    train, test = np.arange(150), np.arange(150, 200)
    scores = metrics.finding_scores(x, targets, train, test)
    areas = metrics.findings_auroc(x, targets, train, test, n_boot=0)["per_finding"]
    for finding in (0, 1):
        assert roc_auc_score(targets[test, finding], scores[:, finding]) == pytest.approx(
            areas[finding]
        )
    assert np.isnan(scores[:, 2]).all()
    labels = rng.integers(4, size=200)
    probabilities, classes = metrics.class_probabilities(x, labels, train, test)
    assert probabilities.sum(axis=1) == pytest.approx(1)
    right = classes[probabilities.argmax(axis=1)] == labels[test]
    assert right.mean() == metrics.probe(x, labels, train, test, n_boot=0)["accuracy"]


def test_average_precision_is_sklearns_also_with_ties_and_weights():
    rng = np.random.default_rng(1)
    positive, scores = rng.random(80) < 0.3, rng.integers(6, size=80).astype(float)
    weights = rng.integers(0, 4, size=(5, 80))
    found = metrics.weighted_average_precision(scores, positive, weights)
    for row, value in zip(weights, found, strict=True):
        assert value == pytest.approx(average_precision_score(positive, scores, sample_weight=row))
    assert np.isnan(metrics.weighted_average_precision(scores, np.zeros(80, bool), weights)).all()


def test_micro_average_flatters_a_guess_that_sees_no_image_and_macro_does_not():
    rng = np.random.default_rng(2)
    prevalence = np.array([0.5, 0.2, 0.02, 0.01])
    targets = rng.random((2000, 4)) < prevalence
    train, test = np.arange(1000), np.arange(1000, 2000)
    guess = metrics.prevalence_guess(targets, train, test)
    found = metrics.multilabel_scores(guess, targets[test])
    assert found["auroc_macro"][0] == 0.5
    assert found["auroc_micro"][0] > 0.8
    assert found["auroc_micro"][0] == pytest.approx(
        roc_auc_score(targets[test].ravel(), guess.ravel())
    )
    assert found["ap_micro"][0] == pytest.approx(
        average_precision_score(targets[test].ravel(), guess.ravel())
    )
    assert found["ap_macro"][0] == pytest.approx(targets[test].mean(axis=0).mean())
    guess[:, 3] = np.nan
    assert np.isnan(metrics.multilabel_scores(guess, targets[test])["auroc"][0, 3])
    with pytest.raises(ValueError, match="bool targets"):
        metrics.multilabel_scores(guess, targets[test].astype(int))


def test_relative_distance_is_0_for_no_change_and_1_for_another_image():
    rng = np.random.default_rng(3)
    f = rng.normal(size=(300, 5))
    found = metrics.relative_distance(f, np.stack([f, rng.permutation(f)]))
    assert found[0] == 0
    assert found[1] == pytest.approx(1, abs=0.05)
    assert np.isnan(metrics.relative_distance(np.ones((5, 3)), np.ones((1, 5, 3)))).all()
    with pytest.raises(ValueError, match="moved"):
        metrics.relative_distance(f, f)


def test_finding_neighbourhood_finds_what_lies_together():
    rng = np.random.default_rng(4)
    targets = rng.random((400, 3)) < 0.2
    noise = rng.normal(size=(400, 2))
    assert abs(metrics.finding_neighbourhood(noise, targets)) < 0.02
    assert metrics.finding_neighbourhood(noise + 20 * targets[:, :2], targets[:, :2]) > 0.7
    assert np.isnan(metrics.finding_neighbourhood(noise, np.zeros((400, 3), bool)))
    with pytest.raises(ValueError, match="n_neighbors"):
        metrics.finding_neighbourhood(noise, targets, 400)


def test_areas_of_averaged_roc_curves_are_the_averaged_areas():
    rng = np.random.default_rng(0)
    targets = rng.random((400, 4)) < [
        0.5,
        0.3,
        0.1,
        0.0,
    ]  # the last label has no positive: it has no curve
    probabilities = rng.random((400, 4)) * 0.6 + targets * [0.1, 0.3, 0.2, 0]
    probabilities[:, 0] = 0.5  # one threshold: the diagonal
    grid = np.linspace(0, 1, 4001)
    curves = metrics.roc_curves(probabilities, targets, grid)
    areas = metrics.multilabel_scores(probabilities, targets)
    for name in ("macro", "micro"):
        assert np.trapezoid(curves[name], grid) == pytest.approx(
            areas[f"auroc_{name}"][0], abs=1e-3
        )
    alone = metrics.roc_curves(probabilities[:, :1], targets[:, :1], grid)["macro"]
    np.testing.assert_allclose(alone, grid)


def test_roc_curves_start_where_the_perfect_answer_starts_and_are_nan_without_labels():
    targets = np.array([[True], [False], [True]])
    assert metrics.roc_curves(np.array([[0.9], [0.1], [0.8]]), targets, [0.0, 0.5, 1.0])[
        "micro"
    ].tolist() == [1, 1, 1]
    nothing = metrics.roc_curves(np.full((3, 1), np.nan), targets, np.array([0.0, 1.0]))
    assert all(np.isnan(curve).all() for curve in nothing.values())
