"""Figures of the claims draw what they are given, name dataset and seeds, and stand missing arms
and single seeds.
"""

import math

import numpy as np
import pandas as pd
import pytest

from lib.plots import claims as plots_claims
from lib.plots import style
from lib.study import claims
from lib.study.enrichment import enrichment
from tests.drawing import drawn_texts
from tests.test_claims import HEAD, entry, simulated_study

LABEL = "synthetic phantom, 64 images"


def texts(figure):
    found = [
        t.get_text()
        for axes in figure.axes
        for t in axes.findobj(match=lambda a: hasattr(a, "get_text"))
    ]
    found += [t.get_text() for legend in figure.legends for t in legend.get_texts()]
    return "\n".join([*found, figure._supxlabel.get_text()])


def assembled(n_seeds):
    values = simulated_study(np.random.default_rng(3), n_seeds, {"kept_free": 30})
    values = {"p4m": values["a"], "alexnet": values["b"]}
    return claims.assemble(HEAD, {arm: entry(arm) for arm in values}, values, {}, [])


@pytest.mark.parametrize("n_seeds", [1, 2, 5])
def test_forest(n_seeds, tmp_path):
    figure = plots_claims.forest(assembled(n_seeds))
    told = texts(figure)
    assert f"({n_seeds} seed{'s' * (n_seeds > 1)})" in told
    assert HEAD["dataset_label"] in told
    assert ("supported" in told) is (n_seeds == 5)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        c.title for c in claims.CLAIMS
    ]
    assert {p.suffix for p in style.save(figure, tmp_path / "fig5")} == {".png", ".svg"}


def test_forest_without_a_pair():
    assert "no two arms" in texts(plots_claims.forest({**assembled(3), "comparisons": []}))


def curve(n_seeds, height):
    rows = [
        {"epoch": e, "seed": s, "nmi_prev": math.nan if e == 1 else height + 0.01 * s}
        for e in range(1, 6)
        for s in range(n_seeds)
    ]
    return pd.DataFrame(rows)


def test_controls_stand_in_the_same_axes():
    curves = {"p4m": curve(3, 0.5), "p4m-index": curve(2, 0.7), "p4m-shuffled": curve(1, 0.6)}
    figure = plots_claims.control_curves(
        curves, {"p4m": 0.1}, {"p4m": "P4M", "alexnet": "AlexNet"}, LABEL
    )
    left, right = figure.axes
    assert "no run of this arm" in "\n".join(t.get_text() for t in left.texts)
    assert [t.get_text() for t in right.get_legend().get_texts()] == [
        "on its clusters (n = 3)",
        "on index mod K (n = 2)",
        "on labels shuffled once (n = 1)",
        "chance",
    ]
    heights = [line.get_ydata()[0] for line in right.get_lines()]
    assert heights[:3] == pytest.approx([0.51, 0.705, 0.6])


def test_invariance_closes_the_circle_and_draws_the_price():
    angles = [0, 90, 180, 270]
    curves = {
        arm: {"kept": [1, 0.5, 0.4, None], "distance": [0, 0.2, 0.3, 0.2]}
        for arm in ("p4m", "alexnet")
    }
    numbers = {"tells_mirrored": {"mean": 0.5, "n": 2, "by_seed": {0: 0.5, 1: 0.5}}}
    arms = {arm: {**entry(arm), "seeds": [0, 1], "measures": numbers} for arm in curves}
    figure = plots_claims.invariance(curves, arms, angles, LABEL, 96)
    kept = figure.axes[0].get_lines()[0]
    assert kept.get_xdata().tolist() == [0, 90, 180, 270, 360]
    assert kept.get_ydata()[-1] == 1
    assert "means over 2 seeds" in texts(figure)
    assert [p.get_height() for p in figure.axes[2].patches] == [0.5, 0.5]
    arms = {arm: {**a, "measures": {}} for arm, a in arms.items()}
    assert "no patients to test on" in texts(
        plots_claims.invariance(curves, arms, angles, LABEL, 96)
    )


def test_roc_names_every_arm_the_guess_and_the_areas(monkeypatch):
    grid = np.linspace(0, 1, 11)
    curves = {arm: {"macro": grid**0.5, "micro": grid**0.2} for arm in ("p4m", "pixels", "guess")}
    arms = {
        arm: {**entry(arm), "title": f"title of {arm}", "seeds": [0, 1, 2]}
        for arm in ("p4m", "pixels")
    }
    for number, arm in enumerate(arms.values(), 1):
        areas = {
            "macro": 0.1 * number,
            "micro": 0.2 * number,
            "macro_prevalence": 0.5,
            "micro_prevalence": 0.9,
        }
        arm["measures"] = {f"auroc_{name}": {"mean": value} for name, value in areas.items()}
    figure = plots_claims.roc(curves, arms, grid, LABEL, 321)
    told = texts(figure)
    assert all(
        text in told
        for text in (
            "title of p4m",
            "title of pixels",
            "guess: how frequent",
            "321 test images",
            "means over 3 seeds",
        )
    )
    areas_told = [[t.get_text() for t in axes.get_legend().get_texts()] for axes in figure.axes]
    assert areas_told == [["0.100", "0.200", "0.500"], ["0.200", "0.400", "0.900"]]
    assert figure.axes[1].get_lines()[0].get_ydata().tolist() == (grid**0.2).tolist()
    drawn_texts(figure, monkeypatch)
    assert "no findings to test on" in texts(plots_claims.roc({}, {}, grid, LABEL, 0))


def test_enrichment_dots_mark_the_discoveries(monkeypatch):
    rng = np.random.default_rng(0)
    clusters = rng.integers(5, size=300)
    known = np.ones(300, bool)
    rare = np.arange(300) < 4
    properties = {"Mass": ("finding", clusters == 1, known), "Hernia": ("finding", rare, known)}
    properties |= {"AP view": ("should not matter", rng.random(300) < 0.5, known)}
    table = enrichment(clusters, properties)
    figure = plots_claims.enrichment_maps({"p4m": table}, {"p4m": "P4M"}, LABEL)
    dots = figure.axes[0].get_lines()[0]
    assert len(dots.get_xdata()) == (table["q"] <= 0.05).sum() > 0
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["Mass", "Hernia", "AP view"]
    drawn = figure.axes[0].get_images()[0].get_array()
    assert drawn.mask.all(axis=1).tolist() == [
        False,
        True,
        False,
    ]  # of four images a ratio says nothing
    assert "gray: fewer than 5 images" in texts(figure)
    drawn_texts(figure, monkeypatch)
    assert "no clusters" in texts(plots_claims.enrichment_maps({}, {}, LABEL))


def test_retrieval_tells_the_same_patient_apart():
    images = np.random.default_rng(0).integers(0, 255, (6, 64, 64), dtype=np.uint8)
    findings = ["Mass", "Mass|Edema", "No Finding", "Edema", "Mass", ""]
    figure = plots_claims.retrieval_panels(
        images,
        [0],
        {"p4m": np.array([[1, 2, 4, -1]])},
        findings,
        [1, 2, 3, 4, 1, 6],
        {"p4m": "P4M, no augmentation"},
        LABEL,
    )
    told = [axes.get_xlabel() for axes in figure.axes]
    assert told == ["Mass", "Edema, Mass", "no finding", "Mass (same patient)", ""]
    assert plots_claims.retrieval_panels(images, [], {}, findings, range(6), {}, LABEL)


@pytest.mark.parametrize(
    "draw",
    [plots_claims.forest, lambda r: plots_claims.control_curves({}, {}, {}, r["dataset_label"])],
)
def test_a_figure_without_a_dataset_is_refused(draw):
    with pytest.raises(ValueError, match="dataset_label must name the dataset"):
        draw({**assembled(3), "dataset_label": ""})
