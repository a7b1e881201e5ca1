"""Figures and texture of a data set: what they say, that nothing is cut off, and that the same data
give the same bytes.
"""

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from lib.data import phantom, texture
from lib.plots import data as plots_data
from lib.plots import style
from tests.drawing import drawn_texts

LABEL = "synthetic phantom, 60 images"
IMAGES, TABLE = phantom.make_phantoms(60, 0)
TABLE = TABLE.assign(age=TABLE["age"].astype(float), patient_id=TABLE["patient_id"].astype(str))
FINDINGS = TABLE["findings"].tolist()
TEXTURES = texture.texture_by_finding(IMAGES, FINDINGS, most=10)
FIGURES = {
    "cooccurrence": lambda: plots_data.cooccurrence(FINDINGS, LABEL),
    "population": lambda: plots_data.population(TABLE, LABEL),
    "population, nothing known": lambda: plots_data.population(
        TABLE.assign(age=np.nan, sex="", view_position="", patient_id=""), LABEL
    ),
    "mean_images": lambda: plots_data.mean_images(IMAGES, FINDINGS, LABEL),
    "mean_images, no labels": lambda: plots_data.mean_images(IMAGES, [""] * 60, LABEL),
    "brightness": lambda: plots_data.brightness(IMAGES, (90.0, 150.0, 2.0), LABEL),
    "brightness of one": lambda: plots_data.brightness(IMAGES[:1], (16.0, 239.0, 2.0), LABEL),
    "texture": lambda: plots_data.texture_by_finding(TEXTURES, LABEL),
    "sobel": lambda: plots_data.sobel(IMAGES[:6], FINDINGS[:6], LABEL),
    "sobel of a black image": lambda: plots_data.sobel(
        np.zeros((1, 64, 64), np.uint8), ["black"], LABEL
    ),
}


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]


@pytest.mark.parametrize("name", FIGURES)
def test_names_its_dataset_and_cuts_nothing_off(name, monkeypatch):
    figure = FIGURES[name]()
    assert any(LABEL in text for text in texts(figure))
    assert figure.get_figwidth() in style.COLUMN_INCHES.values()
    assert figure.get_figheight() < 8
    drawn_texts(figure, monkeypatch)


@pytest.mark.parametrize("name", ["cooccurrence", "brightness"])
def test_the_same_data_give_the_same_bytes(name, tmp_path):
    for folder in ("a", "b"):
        style.save(FIGURES[name](), tmp_path / folder / "figure")
    for suffix in (".png", ".svg"):
        assert (tmp_path / "a" / f"figure{suffix}").read_bytes() == (
            tmp_path / "b" / f"figure{suffix}"
        ).read_bytes()


def test_cooccurrence_counts_images():
    figure = plots_data.cooccurrence(
        ["Mass|Hernia", "Mass", "Mass|Edema|Hernia", "No Finding", ""], LABEL
    )
    axes = figure.axes[0]
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["Edema", "Hernia", "Mass"]
    numbers = np.array([text.get_text() for text in axes.texts]).reshape(3, 3).astype(int)
    np.testing.assert_array_equal(numbers, [[1, 1, 1], [1, 2, 2], [1, 2, 3]])
    share = np.asarray(axes.images[0].get_array().filled(np.nan))
    np.testing.assert_allclose(share[2, :2], [1 / 3, 2 / 3])
    with pytest.raises(ValueError, match="no image has a finding"):
        plots_data.cooccurrence(["No Finding", ""], LABEL)


def test_mean_images_are_means_and_their_differences():
    images = np.stack([np.full((4, 4), value, np.uint8) for value in (10, 30, 100, 60)])
    figure = plots_data.mean_images(
        images, ["Mass", "Mass|Edema", "No Finding", "No Finding"], LABEL
    )
    drawn = {
        axes.get_title(loc="left"): axes.images[0].get_array()[0, 0]
        for axes in figure.axes
        if axes.images
    }
    assert {key: value for key, value in drawn.items() if key} == {
        "Edema (1)": 30,
        "Mass (2)": 20,
        "No Finding (2)": 80,
    }
    assert sorted(
        axes.images[0].get_array()[0, 0]
        for axes in figure.axes
        if axes.images and not axes.get_title(loc="left")
    ) == [-60, -50]


def test_brightness_counts_outliers():
    images = np.stack(
        [
            np.full((4, 4), 100, np.uint8),
            *np.random.default_rng(0).integers(0, 256, (3, 4, 4), dtype=np.uint8),
        ]
    )
    figure = plots_data.brightness(images, (10.0, 250.0, 2.0), LABEL)
    assert "1 of 4 images are outliers" in texts(figure)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots_data.mean_images(IMAGES, FINDINGS[:3], LABEL), "one entry of findings each"),
        (lambda: plots_data.brightness(IMAGES[0], (1, 2, 3), LABEL), r"\(N, H, W\)"),
        (lambda: plots_data.texture_by_finding(TEXTURES[:0], LABEL), "has no rows"),
        (lambda: plots_data.sobel(IMAGES, FINDINGS, LABEL), "1 to 8 images"),
        (lambda: plots_data.cooccurrence(FINDINGS, " "), "dataset_label"),
        (lambda: texture.texture(IMAGES.astype(float)), "uint8"),
        (lambda: texture.texture(IMAGES, levels=1), "2 to 256"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --------------------------------------------------------------------------------------------------


def test_texture_is_that_of_haralick_by_hand():
    """A board of two gray levels: across and down every pair differs, along the diagonals none
    does.
    """
    board = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)
    row = texture.texture(board[None], levels=2).iloc[0]
    # across and down: contrast 1, homogeneity 1/2, correlation -1; diagonals: 0, 1, 1; energy
    # sqrt(1/2) but for the odd diagonal counts
    assert row["contrast"] == pytest.approx(0.5)
    assert row["homogeneity"] == pytest.approx(0.75)
    assert row["correlation"] == pytest.approx(0)
    assert row["energy"] == pytest.approx(
        (2 * np.sqrt(0.5) + 2 * np.sqrt(24**2 + 25**2) / 49) / 2 / 2, abs=1e-3
    )
    flat = texture.texture(np.full((1, 8, 8), 9, np.uint8)).iloc[0]
    assert flat.tolist() == [0, 1, 1, 1]


def test_texture_does_not_change_with_a_quarter_turn_or_a_mirror():
    plain = texture.texture(IMAGES[:3])
    for moved in (np.rot90(IMAGES[:3], 1, (1, 2)), IMAGES[:3, :, ::-1]):
        pd.testing.assert_frame_equal(texture.texture(np.ascontiguousarray(moved)), plain)
    noisy = IMAGES[:3] ^ np.random.default_rng(0).integers(0, 64, (3, 64, 64), dtype=np.uint8)
    assert (texture.texture(noisy)["homogeneity"] < plain["homogeneity"]).all()


def test_texture_by_finding_draws_from_each_and_measures_once():
    assert TEXTURES.groupby("finding").size().max() <= 10
    counts = TABLE["findings"].str.split("|").explode().value_counts()
    assert TEXTURES.groupby("finding").size().to_dict() == counts.clip(upper=10).to_dict()
    for _, row in TEXTURES.iloc[::7].iterrows():
        assert row["finding"] in FINDINGS[row["image"]].split("|")
        assert row["contrast"] == pytest.approx(
            texture.texture(IMAGES[[row["image"]]])["contrast"][0]
        )
    pd.testing.assert_frame_equal(TEXTURES, texture.texture_by_finding(IMAGES, FINDINGS, most=10))
    assert texture.texture_by_finding(IMAGES, [""] * 60).empty


def test_edges_of_a_step():
    step = np.zeros((8, 8), np.uint8)
    step[:, 4:] = 255
    found = texture.edges(step)
    assert found[4, 3] > 0.5
    assert found[4, 1] == 0
