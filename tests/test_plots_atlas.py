"""The pages of the atlas hold every cluster once, inside the page."""

import numpy as np
import pytest

from lib.data.phantom import make_phantoms
from lib.plots import atlas as plots_atlas
from lib.plots import style
from lib.study.clusters import CLINICAL, atlas


def planted(sizes=(30, 20, 10), seed=0):
    """Three clusters around the axes of space; the second is where the effusions are."""
    rng = np.random.default_rng(seed)
    assignments = np.repeat(np.arange(len(sizes)), sizes)
    embedding = np.eye(3)[assignments] + 0.05 * rng.normal(size=(sum(sizes), 3))
    images = (20 * assignments[:, None, None] + np.zeros((1, 64, 64))).astype(np.uint8)
    known = np.ones(sum(sizes), bool)
    properties = {
        "Effusion": (CLINICAL, assignments == 1, known),
    }
    return images, embedding, assignments, properties


@pytest.mark.parametrize(("rows", "pages"), [(20, 1), (2, 2), (1, 3)])
def test_every_cluster_is_on_one_page(rows, pages):
    images, embedding, assignments, properties = planted()
    found = atlas(images, embedding, assignments, properties)
    figures = list(
        plots_atlas.pages(images, found, 60, "a run", "synthetic phantom, 60 images", rows)
    )
    assert len(figures) == pages
    texts = [
        text.get_text()
        for figure in figures
        for text in figure.findobj(lambda a: hasattr(a, "get_text"))
    ]
    for text in ("30 (50.0%)", "20 (33.3%)", "10 (16.7%)", "Effusion 100% / 0%"):
        assert texts.count(text) == 1
    for figure in figures:
        inside = [text.get_window_extent() for text in figure.texts]
        width, height = figure.bbox.width, figure.bbox.height
        assert all(
            box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height for box in inside
        )
        assert any(
            "synthetic phantom, 60 images" in text.get_text()
            for text in figure.findobj(lambda a: hasattr(a, "get_text"))
        )


def test_a_page_is_saved_with_the_same_bytes(tmp_path):
    images = make_phantoms(40, 0)[0]
    rng = np.random.default_rng(0)
    clusters = atlas(images, rng.normal(size=(40, 4)), np.arange(40) % 3, {}, n_nearest=3)
    for name in ("a", "b"):
        style.save(
            next(plots_atlas.pages(images, clusters, 40, "run", "synthetic phantom, 40 images")),
            tmp_path / name,
        )
    for suffix in ("png", "svg"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_pages_without_clusters_or_rows():
    with pytest.raises(ValueError, match="no cluster"):
        next(plots_atlas.pages(np.zeros((1, 64, 64), np.uint8), [], 1, "run", "x"))
    images, embedding, assignments, properties = planted()
    with pytest.raises(ValueError, match="at least 1, got 0"):
        next(
            plots_atlas.pages(
                images,
                atlas(images, embedding, assignments, properties),
                60,
                "run",
                "x",
                rows=0,
            )
        )
