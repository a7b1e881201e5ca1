"""Figures of the claims and the atlas draw what they are given, and say what is missing."""

import numpy as np
import pytest

from lib.plots import atlas, claims, style
from tests.drawing import legend, rows, said
from tests.figures import ANGLES, LABEL, arms, cluster, enrichment, metrics, result


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_forest_draws_differences_in_the_unit_of_the_measure(n_seeds):
    figure = claims.forest(result(n_seeds))
    names = ("More structured representations", "Stability")
    titles = [f"{name}: cannot tell" for name in names]
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles
    assert {"P4M better", "the other better"} <= {text.get_text() for text in figure.axes[0].texts}
    assert f"n = {n_seeds}, exploratory" in {text.get_text() for text in figure.axes[1].texts}
    # P4M minus AlexNet is 0.1, P4M minus the CNN -0.3; the second measure is better if low
    for axes, sign in zip(figure.axes, (1, -1), strict=True):
        dots = [line for line in axes.lines if line.get_markersize() == 2]
        drawn = [line.get_xdata() for line in dots]
        np.testing.assert_allclose(drawn, [[sign * 0.1] * n_seeds, [sign * -0.3] * n_seeds])
        colours = [line.get_color() for line in dots]
        assert colours == [style.arm("alexnet").colour, style.arm("cnn_params").colour]
        intervals = [x for x in axes.lines if x.get_marker() == "None" and x.get_ydata()[0] == 1]
        assert len(intervals) == (n_seeds > 1)
        assert axes.patches[0].get_extents().width > 0
    assert legend(figure)[0] == "P4M against AlexNet, rotation augmentation"


def test_verdict_matrix_has_a_cell_per_comparison_and_claim():
    axes = claims.verdict_matrix(result()).axes[0]
    assert len(axes.patches) == len(axes.texts) == 4
    assert {text.get_text() for text in axes.texts} == {"cannot tell\n+0.100"}
    assert rows(axes)[1] == "P4M, no augmentation\nagainst plain CNN, P4M's parameters (3)"
    assert "compared" in said(claims.verdict_matrix({**result(), "comparisons": []}))


def test_what_clusters_follow_is_a_row_per_property():
    known = {name: {**arm, "measures": {}} for name, arm in arms().items()}
    by_seed = {"0": 0.1, "1": 0.3}
    known["p4m"]["measures"] = {"follows_sex": {"mean": 0.2, "by_seed": by_seed}}
    axes = claims.follows(known, ("p4m", "alexnet", "nobody"), LABEL).axes[0]
    dots, mean = axes.lines[:2]
    assert rows(axes) == ["sex"]
    assert (list(dots.get_xdata()), list(mean.get_xdata())) == ([0.1, 0.3], [0.2])
    assert "nothing is known" in said(claims.follows({}, ("p4m",), LABEL))


def test_controls_are_in_the_same_panel_as_the_clusters():
    curves = {"p4m": metrics(), "p4m-index": metrics(2, level=0.7), "alexnet": metrics()}
    figure = claims.control_curves(curves, {"p4m": 0.1}, LABEL)
    left, right = figure.axes
    assert "no control" in left.texts[0].get_text()
    assert not left.lines
    assert right.get_title() == "P4M\nno augmentation"
    thick = [line for line in right.lines if line.get_linewidth() > 1]
    colours = [style.arm(name).colour for name in ("p4m", "p4m-index")]
    assert [line.get_color() for line in thick] == colours
    mean = curves["p4m-index"].groupby("epoch")["nmi_prev"].mean().dropna()
    np.testing.assert_allclose(thick[1].get_ydata(), mean)
    assert "seeds per arm: 2 to 3" in said(figure)


def test_invariance_closes_the_circle_and_draws_the_price():
    known = {name: arms()[name] for name in ("p4m", "alexnet")}
    kept = np.linspace(1, 0.2, len(ANGLES)).tolist()
    curves = {name: {"ami": [*kept[:-1], None], "distance": kept} for name in known}
    figure = claims.invariance(curves, known, ANGLES, LABEL, 96)
    line = figure.axes[0].lines[0]
    assert line.get_xdata().tolist() == [*ANGLES, 360]
    assert line.get_ydata()[0] == line.get_ydata()[-1] == 1
    assert "AMI" in figure.axes[0].get_ylabel()
    means = [x.get_ydata()[0] for x in figure.axes[2].lines if x.get_markersize() == 5]
    np.testing.assert_allclose(means, [0.61, 0.61, 0.51, 0.51])
    bare = {name: {**arm, "measures": {}} for name, arm in known.items()}
    assert "no patients" in said(claims.invariance(curves, bare, ANGLES, LABEL, 96))


def test_roc_names_every_arm_the_guess_and_the_areas():
    grid = np.linspace(0, 1, 11)
    curves = {name: {"macro": grid**0.5, "micro": grid**0.2} for name in ("p4m", "p4", "guess")}
    known = arms()
    prevalence = {f"auroc_{name}_prevalence": {"mean": 0.9} for name in ("macro", "micro")}
    known["p4m"]["measures"] = {**known["p4m"]["measures"], **prevalence}
    figure = claims.roc(curves, known, grid, LABEL, 321)
    areas = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert areas == ["0.610", "0.810", "0.900"]
    assert legend(figure) == [style.arm(name).title for name in curves]
    np.testing.assert_array_equal(figure.axes[1].lines[0].get_ydata(), grid**0.2)
    assert "321 test images; means; seeds per arm: 3" in said(figure)


def test_findings_are_rows_by_frequency_with_intervals():
    areas = {"p4m": np.array([[0.6, 0.5, 0.7], [np.nan] * 3, [0.8, 0.7, 0.9]])}
    figure = claims.by_finding(areas, ["Mass", "Hernia", "Pleural_Thickening"], [5, 1, 9], LABEL)
    axes = figure.axes[0]
    assert rows(axes) == ["Pleural Thickening (9)", "Mass (5)"]
    assert axes.lines[0].get_xdata().tolist() == [0.8, 0.6]
    assert "no findings" in said(claims.by_finding({"p4m": areas["p4m"][1:2]}, ["a"], [0], LABEL))


def test_enrichment_marks_discoveries_and_hides_what_is_too_rare():
    figure = claims.enrichment_maps({"p4m": enrichment()}, LABEL)
    axes = figure.axes[0]
    assert rows(axes) == ["Mass", "Hernia", "AP view"]
    light, dark = axes.lines[:2]  # the largest cluster, number 3, is the first column
    assert (light.get_color(), dark.get_color()) == ("white", style.DARK)
    assert light.get_xydata().tolist() == [[2, 0]]
    assert not len(dark.get_xdata())
    assert axes.images[0].get_array().mask.all(axis=1).tolist() == [False, True, False]
    assert axes.get_title() == "P4M, no augmentation\nrows with a dot: finding 1 of 2, no 0 of 1"
    assert [bar.get_width() for bar in figure.axes[1].patches] == [0.2, 0, 0]


def test_retrieval_puts_what_is_shared_first_and_marks_the_same_patient():
    images = np.random.default_rng(0).integers(0, 255, (6, 64, 64), dtype=np.uint8)
    findings = ["Mass", "Edema|Mass", "No Finding", "Edema", "Mass", ""]
    arguments = images, [0], {"p4m": np.array([[1, 2, 4, -1]])}, findings, [1, 2, 3, 4, 1, 6]
    figure = claims.retrieval_panels(*arguments, {"p4m": 0.0123}, LABEL)
    assert "precision at 4 above chance, mean of the findings: P4M 0.012" in said(figure)
    texts = [axes.get_xlabel() for axes in figure.axes]
    assert texts == ["Mass", "Mass, Edema", "no finding", "same patient: Mass", ""]
    styles = [axes.spines["left"].get_linestyle() for axes in figure.axes[:4]]
    assert styles == ["-", "-", "-", "--"]


@pytest.mark.parametrize(("rows", "pages"), [(20, 1), (2, 2)])
def test_every_cluster_is_on_one_page_of_the_atlas(rows, pages):
    images = np.zeros((40, 64, 64), np.uint8)
    clusters = [cluster(3, 30), cluster(5, 20), cluster(7, 10)]
    figures = list(atlas.pages(images, clusters, 60, "a run", LABEL, rows))
    assert len(figures) == pages
    text = "\n".join(said(figure) for figure in figures)
    for words in ("30 (50.0%)", "20 (33.3%)", "10 (16.7%)", "and 2 more"):
        assert text.count(words) == 1
    overall = (30 * 30 + 50 * 20 + 70 * 10) / 60  # of the means 30, 50 and 70
    first = next(axes.images[0].get_array()[0, 0] for axes in figures[0].axes if axes.images)
    assert first == pytest.approx(30 - overall)
