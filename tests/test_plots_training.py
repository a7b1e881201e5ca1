"""Figures of training show the numbers they are given, and say what is missing."""

import hashlib

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score, silhouette_score

from lib import paths
from lib.plots import pipeline, style, training
from tests import figures as made
from tests.drawing import legend, rows, said
from tests.figures import LABEL, PUBLISHED, RUNS, classes, metrics, probes, xrays


def thin(axes):
    return [line for line in axes.lines if line.get_linewidth() == 0.5]


def marked(axes, marker):
    return next(x for x in axes.lines if x.get_marker() == marker and len(x.get_xdata()) > 1)


def dotted(axes):
    return next(line for line in axes.lines if line.get_linestyle() == ":")


def test_agreement_of_seeds_their_mean_and_the_published_curve_corrected_for_chance():
    figure = training.nmi_curves(RUNS, PUBLISHED, 0.2, LABEL)
    left, right = figure.axes
    titles = ["AlexNet\nrotation augmentation", "P4M\nno augmentation"]
    assert [axes.get_title() for axes in figure.axes] == titles
    mean = RUNS["p4m"].groupby("epoch")["ami_prev"].mean().dropna()
    np.testing.assert_allclose(marked(right, "s").get_xydata(), np.c_[mean.index, mean])
    assert f"P4M {mean.iloc[-1]:.2f}" in figure.get_suptitle()
    assert len(thin(right)) == 3
    known = PUBLISHED[(PUBLISHED["arm"] == "p4m") & (PUBLISHED["epoch"] <= 6)]
    np.testing.assert_allclose(dotted(right).get_ydata(), (known["nmi_prev"] - 0.2) / 0.8)
    bottom, top = left.get_ylim()
    assert right.get_ylim() == (bottom, top)
    assert bottom == 0 < top < 0.8, "no empty half"


def test_the_mean_uses_only_epochs_that_all_seeds_have():
    run = metrics(2, 6)
    unfinished = run[~((run["seed"] == 1) & (run["epoch"] > 4))]
    axes = training.loss_curves({"alexnet": unfinished}, PUBLISHED, 20, LABEL).axes[0]
    assert marked(axes, "o").get_xdata()[-1] == 4
    assert max(line.get_xdata()[-1] for line in thin(axes)) == 6


@pytest.mark.parametrize(
    ("runs", "text"),
    [({}, "no run"), ({"p4m": metrics(1, 1)}, "too few epochs"), ({"p4m": metrics(1, 2)}, "0.53")],
)
def test_curves_of_too_little_say_so_and_draw_nothing(runs, text):
    figure = training.nmi_curves(runs, PUBLISHED, 0.2, LABEL)
    assert text in said(figure)
    assert len(figure.axes) == 1
    assert not figure.axes[0].lines
    assert not figure.legends


def test_loss_is_in_units_of_ln_k_for_both_k():
    figure = training.loss_curves(RUNS, PUBLISHED, 20, LABEL)
    axes = figure.axes[0]
    mean = RUNS["alexnet"].groupby("epoch")["loss"].mean()
    np.testing.assert_allclose(marked(axes, "o").get_ydata(), mean / np.log(20))
    np.testing.assert_allclose(dotted(axes).get_ydata()[0], 6.31 / np.log(200))
    assert "3.00 here (K = 20), 5.30 published" in said(figure)


def test_known_classes_draw_seeds_and_mark_the_untrained_network():
    panels = {"upright": {"alexnet": classes(), "p4m": classes(1)}, "turned": {"p4m": classes()}}
    figure = training.known_classes(panels, LABEL, "digit")
    left, right = figure.axes[:2]
    shown = left.get_title(), right.get_title(), left.get_ylabel()
    assert shown == ("upright", "turned", "AMI with the digit")
    assert left.get_ylim()[0] <= 0 <= left.get_ylim()[1] <= 1.02
    hollow = [x for x in left.lines if x.get_markerfacecolor() == "white"]
    assert [(x.get_xdata()[0], x.get_color()) for x in hollow] == [(0, "#0072B2"), (0, "#D55E00")]
    assert hollow[0].get_ydata()[0] == pytest.approx(0.31)
    mean = classes().groupby("epoch")["ami"].mean()
    np.testing.assert_allclose(marked(right, "s").get_xydata(), np.c_[mean.index, mean])
    assert len(thin(right)) == 3
    assert {"untrained", "NMI, mean", style.arm("p4m").title} <= set(legend(figure))
    trained = classes()[lambda t: t["epoch"] > 0].drop(columns="nmi")
    plain = training.known_classes({"": {"p4m": trained}}, LABEL, "digit")
    assert not {"untrained", "NMI, mean"} & set(legend(plain))


def test_occupancy_rings_the_runs_that_collapsed():
    figure = training.occupancy(made.runs_table(), LABEL, 0.5)
    axes = figure.axes[0]
    assert "2 of 3 collapsed\nleast: 12 of 20 used, perplexity 19" in rows(axes)[0]
    assert "0 of 2 collapsed" in rows(axes)[1]
    *dots, rings = axes.collections
    assert sorted(x for d in dots for x, _ in d.get_offsets()) == [0.07, 0.08, 0.08, 0.55, 0.64]
    assert rings.get_offsets().tolist() == [[0.55, 0], [0.64, 0]]


def test_tsne_numbers_and_outlines_clusters_and_tells_the_silhouette_of_the_map():
    points, clusters, findings = made.maps()
    figure = training.tsne_maps(points, clusters, findings, LABEL)
    panels = figure.axes
    silhouette = silhouette_score(points["alexnet"], clusters["alexnet"])
    assert panels[0].get_title().endswith(f"mixed, silhouette {silhouette:.2f}")
    assert panels[0].get_xlabel() == "12 clusters"
    assert len(panels[0].patches) == 12
    assert {text.get_text() for text in panels[0].texts} == {str(i) for i in range(12)}
    for axes in panels:
        assert sum(len(dots.get_offsets()) for dots in axes.collections) == len(findings)
    # a turn: distances stay
    drawn = panels[0].collections[0].get_offsets()  # of the largest cluster
    own = points["alexnet"][clusters["alexnet"] == np.bincount(clusters["alexnet"]).argmax()]
    before = np.linalg.norm(own[0] - own[1])
    assert np.linalg.norm(drawn[0] - drawn[1]) == pytest.approx(before)
    counted = {"No Finding": "No Finding", "not stated": "", "several labels": "Effusion|Mass"}
    named = [f"{name} ({findings.count(text)})" for name, text in counted.items()]
    assert legend(figure)[:3] == named
    assert len(legend(figure)) == 4 + 6
    one = training.tsne_maps(points, dict.fromkeys(points, np.zeros(300)), findings, LABEL)
    assert "not defined" in one.axes[0].get_title()
    kinds = np.arange(60) // 20
    far = np.array([[0, 0], [50, 0], [0, 50]])[kinds] + np.random.default_rng(0).random((60, 2))
    above, below = training.tsne_maps({"p4m": far}, {"p4m": kinds}, ["a", "b"] * 30, LABEL).axes
    assert "\napart, silhouette 0.9" in above.get_title()
    assert "labels: mixed" in below.get_title()


def test_samples_prefer_images_with_one_label():
    images, findings = xrays()
    images[:] = np.arange(len(images), dtype=np.uint8)[:, None, None]  # pixels tell the image
    figure = training.samples(images, findings, LABEL, examples=12)
    by_name = {axes.get_title(loc="left"): axes for axes in figure.axes}
    names = [name for name in by_name if name]
    assert names == ["No Finding (10)", "Effusion (10)", "Mass (20)", "Nodule (10)"]
    mass = [int(image.get_array()[0, 0]) for image in by_name["Mass (20)"].images]
    assert [findings[i] for i in mass] == ["Mass"] * 10 + ["Mass|Nodule"] * 2
    assert len(set(mass)) == 12
    assert [text.get_text() for text in by_name["Mass (20)"].texts] == ["+", "+"]


def test_samples_outline_what_a_label_changes():
    figure = training.samples(*xrays(), LABEL, effect=made.effect)
    lines = {axes.get_title(loc="left")[:4]: len(axes.collections) for axes in figure.axes}
    assert (lines["Mass"], lines["Effu"]) == (4, 0)
    assert "outlined" in said(figure)


def test_clusters_show_the_largest_first_and_the_nearest_first():
    images = np.zeros((14, 64, 64), np.uint8) + np.arange(14, dtype=np.uint8)[:, None, None]
    embedding = np.array([0, 8, 1, 9, 5, 6, 7, 3, *range(10, 16)])[:, None] ** 2
    assignments = np.array([4, 4, 4, 4, 4, 1, 1, 1, 2, 3, 5, 6, 7, 8])
    figure = training.clusters(images, embedding, assignments, LABEL)
    pixels = [[float(image.get_array()[0, 0]) for image in axes.images] for axes in figure.axes]
    assert len(pixels) == 6 * 11
    assert pixels[:7] == [[2], [4], [1], [2], [0], [3], []]
    assert pixels[11:16] == [[6], [5], [6], [7], []]
    assert "6 largest of 8 clusters" in said(figure)


def test_probes_have_a_panel_per_target():
    figure = training.probe_bars(probes(), LABEL)
    found = {axes.get_title(loc="left"): axes.get_xlabel() for axes in figure.axes}
    measures = {"clusters": "accuracy", "label combinations": "accuracy", "findings": "mean AUROC"}
    assert found == measures
    for axes, (_, group) in zip(figure.axes, probes().groupby("target", sort=False), strict=True):
        drawn = np.concatenate([line.get_xdata() for line in axes.lines])
        assert set(group.iloc[:, 2:8].stack().dropna()) <= set(drawn)
    assert rows(figure.axes[2]) == ["P4M, untrained"]
    assert "not defined" in said(figure)
    assert "1 to 3" in said(figure)


def test_pipeline_names_every_step_and_draws_eight_different_poses():
    figure = pipeline.pipeline(xrays()[0][0], LABEL)
    for step in ("Sobel", "rotations", "P4M", "whitening", "L2", "K-means", "cross-entropy"):
        assert step in said(figure)
    pictures = [np.asarray(image.get_array()) for image in figure.axes[0].images]
    assert len({image.tobytes() for image in pictures if image.shape == (5, 5)}) == 8


def test_published_numbers_are_the_facts():
    values = PUBLISHED.to_csv(index=False, float_format="%.2f", lineterminator="\n")
    digest = "e3df228c22aebcf53611fdd48fda09babd2e394a16f048e398ae669fee457d33"
    assert hashlib.sha256(values.encode()).hexdigest() == digest
    numbers = paths.load_json(paths.ROOT / "data" / "published" / "numbers.json")
    probe, final = numbers["linear_probe"], numbers["final_assignments"]
    assert (probe["alexnet"], probe["p4m"]) == (0.5640, 0.5673)
    assert probe["p4m"] < probe["majority_baseline_recomputed"] == 0.590
    assert list(final["p4m"].values()) == [16258, 69, 12226]
    chance = numbers["chance"]
    random = np.random.default_rng(0).integers(chance["n_clusters"], size=(2, chance["n_images"]))
    expected = chance["nmi_of_two_random_assignments"]
    assert normalized_mutual_info_score(*random) == pytest.approx(expected, abs=0.002)
