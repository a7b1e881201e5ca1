"""Figures of a data set show its counts and means."""

import numpy as np
import pytest

from lib.plots import data
from tests.drawing import rows, said
from tests.figures import LABEL, people, textures


def test_cooccurrence_counts_images_and_leaves_rare_labels_blank():
    findings = ["Mass|Hernia"] * 10 + ["Mass"] * 5 + ["Edema|Mass", "No Finding", ""]
    axes = data.cooccurrence(findings, LABEL).axes[0]
    assert rows(axes) == ["Edema (1)", "Hernia (10)", "Mass (16)"]
    drawn = axes.collections[0].get_array()
    np.testing.assert_array_equal(drawn.mask, [[1, 1, 1], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_allclose(drawn.compressed(), [0, 1, 1 / 16, 10 / 16])
    assert [text.get_text() for text in axes.texts] == ["0", "10", "1", "10"]


def test_population_counts_patients_ages_and_views():
    figure = data.population(people(), LABEL)
    patients, ages, views = ([p.get_height() for p in axes.patches] for axes in figure.axes)
    assert patients == pytest.approx([1, 0, 13])
    assert sum(ages) == sum(views) == 40
    assert "median 50 years, 0 unknown" in said(figure)


def test_mean_images_are_means_and_their_differences():
    values = np.array([10] * 5 + [30] * 10 + [100, 60], np.uint8)
    images = np.zeros((17, 4, 4), np.uint8) + values[:, None, None]
    findings = ["Mass"] * 5 + ["Mass|Edema"] * 10 + ["No Finding", "Rare|No Finding"]
    figure = data.mean_images(images, findings, LABEL)
    drawn = [(axes.get_title(loc="left"), axes.images) for axes in figure.axes if axes.images]
    drawn = [(title, pictures[0].get_array()[0, 0]) for title, pictures in drawn]
    assert drawn[:3] == [("No Finding (2)", 80), ("Edema (10)", 30), ("", -50)]
    mass = pytest.approx((5 * 10 + 10 * 30) / 15)
    assert drawn[3:5] == [("Mass (15)", mass), ("", pytest.approx(mass.expected - 80))]
    assert drawn[5:] == [("Rare (1)", 60)]  # too few for a difference


def test_brightness_counts_what_is_flagged():
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8)
    images = np.stack([np.full((4, 4), 100, np.uint8), *noise])
    assert "1 of 4 images are flagged" in said(data.brightness(images, (10.0, 250.0, 2.0), LABEL))


def test_texture_has_a_panel_per_number_and_the_median_of_each_label():
    figure = data.texture_by_finding(textures(), LABEL)
    assert [axes.get_title() for axes in figure.axes] == ["contrast", "energy"]
    assert rows(figure.axes[0]) == ["No Finding (9)", "7 (1)", "Mass (3)"]
    dots = next(line for line in figure.axes[0].lines if line.get_marker() == "o")
    np.testing.assert_allclose(np.sort(dots.get_xdata()), [4, 10, 12])
