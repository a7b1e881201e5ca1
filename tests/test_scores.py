"""Scores of findings against scikit-learn's, planted effects and nulls."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from lib.study import scores
from tests.test_metrics import halves


def test_a_probe_s_penalty_means_the_same_for_repeated_features():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 8))
    targets = (x + rng.normal(size=x.shape) > 0)[:, :3]
    once, often = (
        scores.findings_auroc(np.tile(x, (1, times)), targets, *halves(300)) for times in (1, 10)
    )
    np.testing.assert_allclose(once, often, atol=1e-3)


# of each image: score, whether it has the finding, weight
rows = st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3))


@settings(deadline=None, max_examples=60)
@given(st.lists(rows, min_size=2, max_size=40))
def test_areas_and_precision_are_scikit_learn_s_ties_and_weights_included(rows):
    values, positive, weights = map(np.array, zip(*rows, strict=True))
    weights = np.stack([weights, np.ones_like(weights)])
    areas = scores.weighted_auroc(values, positive, weights)
    alone = values[:, None], positive[:, None], weights
    precisions = scores.multilabel_scores(*alone)["ap"][:, 0]
    for area, precision, weight in zip(areas, precisions, weights, strict=True):
        options = {"sample_weight": weight}
        if ups := weight[positive].sum():
            expected = average_precision_score(positive, values, **options)
            assert precision == pytest.approx(expected)
        if ups and weight[~positive].sum():
            assert area == pytest.approx(roc_auc_score(positive, values, **options))
        assert np.isnan(precision) == (not ups)
        assert np.isnan(area) == (not ups or not weight[~positive].sum())


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
    found = scores.findings_auroc(x, targets, train, test)
    assert found[0] > 0.97
    assert found[1] == pytest.approx(0.5, abs=0.15)
    assert np.isnan(found[2:]).all()
    answers = scores.finding_scores(x, targets, train, test)
    for finding in (0, 1):
        area = roc_auc_score(targets[test, finding], answers[:, finding])
        assert area == pytest.approx(found[finding])
    assert np.isnan(answers[:, 3:]).all()
    assert np.isnan(scores.findings_auroc(x, targets[:, 2:], train, test)).all()


def test_micro_average_flatters_a_guess_that_sees_no_image_and_macro_does_not():
    rng = np.random.default_rng(2)
    prevalence = np.array([0.5, 0.2, 0.02, 0.01])
    targets = rng.random((2000, 4)) < prevalence
    train, test = np.arange(1000), np.arange(1000, 2000)
    guess = np.tile(targets[train].mean(axis=0), (len(test), 1))
    found = scores.multilabel_scores(guess, targets[test])
    pairs = targets[test].ravel(), guess.ravel()
    assert found["auroc_macro"][0] == 0.5
    assert found["auroc_micro"][0] > 0.8
    assert found["auroc_micro"][0] == pytest.approx(roc_auc_score(*pairs))
    assert found["ap_micro"][0] == pytest.approx(average_precision_score(*pairs))
    assert found["ap_macro"][0] == pytest.approx(targets[test].mean(axis=0).mean())
    guess[:, 3] = np.nan
    assert np.isnan(scores.multilabel_scores(guess, targets[test])["auroc"][0, 3])


def test_relative_distance_is_0_for_no_change_and_1_for_another_image():
    rng = np.random.default_rng(3)
    f = rng.normal(size=(300, 5))
    found = scores.relative_distance(f, np.stack([f, rng.permutation(f)]))
    assert found[0] == 0
    assert found[1] == pytest.approx(1, abs=0.05)
    assert np.isnan(scores.relative_distance(np.ones((5, 3)), np.ones((1, 5, 3)))).all()


def test_finding_neighbourhood_finds_what_lies_together():
    rng = np.random.default_rng(4)
    targets = rng.random((400, 3)) < 0.2
    noise = rng.normal(size=(400, 2))
    assert abs(scores.finding_neighbourhood(noise, targets)) < 0.02
    assert scores.finding_neighbourhood(noise + 20 * targets[:, :2], targets[:, :2]) > 0.7
    assert np.isnan(scores.finding_neighbourhood(noise, np.zeros((400, 3), bool)))


def test_areas_of_averaged_roc_curves_are_the_averaged_areas():
    rng = np.random.default_rng(0)
    targets = rng.random((400, 4)) < [0.5, 0.3, 0.1, 0]  # the last label is never there: no curve
    probabilities = rng.random((400, 4)) * 0.6 + targets * [0.1, 0.3, 0.2, 0]
    probabilities[:, 0] = 0.5  # one threshold: the diagonal
    grid = np.linspace(0, 1, 4001)
    curves = scores.roc_curves(probabilities, targets, grid)
    areas = scores.multilabel_scores(probabilities, targets)
    for name, curve in curves.items():
        area = areas[f"auroc_{name}"][0]
        assert np.trapezoid(curve, grid) == pytest.approx(area, abs=1e-3)
    alone = scores.roc_curves(probabilities[:, :1], targets[:, :1], grid)["macro"]
    np.testing.assert_allclose(alone, grid)
    targets = np.array([[True], [False], [True]])
    perfect = scores.roc_curves(np.array([[0.9], [0.1], [0.8]]), targets, [0, 0.5, 1])
    assert perfect["micro"].tolist() == [1, 1, 1]
    nothing = scores.roc_curves(np.full((3, 1), np.nan), targets, [0, 1])
    assert all(np.isnan(curve).all() for curve in nothing.values())
