"""What the page leaves for later: the mathematics of each switch, and a stopped run with it."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from lib.beyond import labels
from lib.beyond.clusterers import SinkhornClusters, balanced
from lib.beyond.networks import TEMPERATURE, CentroidLayer
from lib.deepcluster import TrainConfig, labels_to_train_on
from lib.metrics import ami
from lib.models import build
from lib.runs import RunMismatchError
from lib.study.arms import ARMS, GROUPS, choose_arms, cost
from tests.test_deepcluster import bytes_of, changed, run
from tests.test_models import changes, images, trained_statistics

PATIENTS = np.arange(40) // 4
SWITCHES = {
    "centroids": ({"head": "centroids"}, None),
    "graph": ({"clusterer": "graph"}, None),
    "sinkhorn": ({"clusterer": "sinkhorn"}, None),
    "committee": ({"clusterer": "consensus"}, None),
    "vote": ({"pseudo_labels": "consensus"}, None),
    "given": ({"pseudo_labels": "given"}, PATIENTS % 4),
    "refined": ({"pseudo_labels": "refined"}, PATIENTS % 4),
    "patients": ({"pseudo_labels": "patients"}, PATIENTS),
    "mirror": ({"backbone": "mirror", "width": (1, 2, 4)}, None),
}


def noisy(truth, share, rng):
    """A clustering (N,) with shuffled names, of which a share of the images is anywhere."""
    wrong = rng.random(len(truth)) < share
    return rng.permutation(truth.max() + 1)[np.where(wrong, rng.permutation(truth), truth)]


def test_the_balanced_plan_has_its_marginals_and_is_the_cheapest():
    cost = np.random.default_rng(0).random((300, 7)) * 20
    plan = balanced(cost, tolerance=1e-9, rounds=20_000)
    np.testing.assert_allclose(plan.sum(1), 1 / 300, rtol=1e-12)
    np.testing.assert_allclose(plan.sum(0), 1 / 7, rtol=1e-8)
    # the optimum has the form u_i exp(-cost) v_j: double differences of log plan + cost vanish
    potential = np.log(plan) + cost
    rest = potential - potential[:1] - potential[:, :1] + potential[0, 0]
    assert np.abs(rest).max() < 1e-8


def test_balanced_cells_are_even_where_kmeans_cells_are_not():
    rng, sizes = np.random.default_rng(0), [500, 40, 30, 30]
    points = np.concatenate([rng.normal(4 * k, 1, (n, 3)) for k, n in enumerate(sizes)])
    found = SinkhornClusters(4, random_state=0).fit(points)
    largest = (np.bincount(c).max() for c in (found.labels_, KMeans(4).fit_predict(points)))
    assert next(largest) < 1.2 * len(points) / 4 < next(largest)
    means = np.stack([points[found.labels_ == k].mean(0) for k in range(4)])
    np.testing.assert_allclose(found.cluster_centers_, means)


def test_a_vote_recovers_what_was_planted():
    rng, truth = np.random.default_rng(1), np.arange(600) % 8
    renamed = np.array([3, 5, 0, 1, 2, 4, 7, 6])[truth]
    np.testing.assert_array_equal(labels.aligned(renamed, truth), truth)
    rows = [noisy(truth, 0.3, rng) for _ in range(9)]
    found = labels.vote(rows)
    assert ami(found, truth) > 0.97 > 0.8 > max(ami(row, truth) for row in rows)
    assert (found == rows[-1]).mean() > 0.6  # its names
    np.testing.assert_array_equal(labels.vote(rows[:1]), rows[0])
    np.testing.assert_array_equal(labels.vote(rows[:2]), rows[1])  # a tie


def test_patients_share_the_most_frequent_label():
    found = labels.shared(np.array([2, 2, 1, 0, 3, 1, 1]), np.array([7, 7, 7, 4, 4, 9, 9]))
    np.testing.assert_array_equal(found, [2, 2, 2, 0, 0, 1, 1])  # a tie: that of the first image


def test_labels_to_train_on():
    rng, none = np.random.default_rng(0), np.empty((0, 40), int)
    found, given = rng.integers(0, 4, 40), PATIENTS % 4
    earlier = np.stack([found, found, (found + 1) % 4])

    def chosen(name, before):
        return labels_to_train_on(found, before, changed(pseudo_labels=name), given)

    np.testing.assert_array_equal(chosen("given", earlier), given)
    np.testing.assert_array_equal(chosen("refined", none), given)
    np.testing.assert_array_equal(chosen("refined", earlier), found)
    for before in (none, earlier):
        np.testing.assert_array_equal(chosen("consensus", before), found)


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        *(("given", None, "40 whole numbers"), ("clusters", PATIENTS, "take no groups")),
        *(("patients", PATIENTS[:9], r"\(9,\)"), ("given", PATIENTS / 2, "float64")),
        *(("given", PATIENTS, "go up to 9, but n_clusters is 4"), ("patients", -PATIENTS, "whole")),
    ],
)
def test_groups_that_do_not_fit_are_named(tmp_path, name, groups, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, changed(pseudo_labels=name), groups=groups)
    assert not any(tmp_path.iterdir())


def test_logits_are_cosines_by_the_temperature():
    layer = CentroidLayer(6, 4)
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * 3 + 5
    clusters = np.arange(50) % 3  # the fourth is empty
    layer.follow(x, clusters)
    unit = torch.nn.functional.normalize((x - x.mean(0)) / x.std(0, correction=0), dim=1)
    means = torch.stack([unit[clusters == k].mean(0) for k in range(3)])
    at_one = means / means.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer.weight[:3], at_one, atol=1e-4, rtol=0)
    cosine = torch.nn.functional.cosine_similarity(unit[:, None], means[None], dim=2)
    torch.testing.assert_close(layer(7 * unit)[:, :3], cosine / TEMPERATURE, atol=2e-3, rtol=0)
    assert layer(unit)[:, 3].abs().max() == 0
    assert not any(p.requires_grad for p in layer.parameters())


def test_the_body_starts_as_with_any_head():
    a, b = (build("p4m", 5, (2, 4, 8), 3, head).state_dict() for head in ("centroids", "linear"))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_mirror_features_know_no_left_and_no_right():
    model = trained_statistics(build("mirror", 5, (2, 4, 8)).double())
    moved = changes(model, images(4, 9, torch.float64))
    assert moved[6] < 1e-12  # left and right swapped
    assert min(moved[1:6] + moved[7:]) > 1e-3


@pytest.mark.parametrize("width", [(4, 8, 32), (8, 16, 32), (64, 128, 256)])
def test_parameters_are_those_of_p4m(width):
    wanted = cost("p4m", 20, width)["parameters"]
    for backbone in ("p4_params", "mirror", "cnn_params"):
        assert abs(cost(backbone, 20, width)["parameters"] / wanted - 1) < 0.03


@pytest.mark.parametrize("name", SWITCHES)
def test_a_run_that_was_stopped_ends_like_the_unbroken_one(tmp_path, name):
    settings, groups = SWITCHES[name]
    config = TrainConfig(**{**vars(changed(epochs=3)), **settings})
    whole = run(tmp_path / "whole", config, groups=groups)
    run(tmp_path / "parts", TrainConfig(**{**vars(config), "epochs": 1}), groups=groups)
    assert bytes_of(run(tmp_path / "parts", config, groups=groups).path) == bytes_of(whole.path)


def test_a_run_with_other_groups_is_refused(tmp_path):
    config = changed(pseudo_labels="patients", epochs=1)
    run(tmp_path, config, groups=PATIENTS)
    with pytest.raises(RunMismatchError, match="groups"):
        run(tmp_path, config, groups=PATIENTS[::-1].copy())


def test_the_arms_are_a_group_of_their_own():
    assert not set(GROUPS["all"]) & set(GROUPS["beyond"])
    assert choose_arms("beyond") == list(GROUPS["beyond"])
    grouped = [name for name, arm in ARMS.items() if arm.pseudo_labels in labels.GROUPED]
    assert grouped == [name for name, arm in ARMS.items() if arm.kind == "grouped"]
    with pytest.raises(ValueError, match="is unknown"):
        choose_arms("p4m-patients")  # a study has no groups to give
