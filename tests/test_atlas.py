"""The atlas finds what is planted, follows clusters through new numbers, and its pages hold every
cluster once.
"""

import numpy as np
import pytest

from lib.data.phantom import make_phantoms
from lib.plots import atlas as plots_atlas
from lib.plots import style
from lib.study import atlas
from lib.study.enrichment import CLINICAL, NUISANCE


def planted(sizes=(30, 20, 10), seed=0):
    """Three clusters around the axes of space; the second is where the effusions are."""
    rng = np.random.default_rng(seed)
    assignments = np.repeat(np.arange(len(sizes)), sizes)
    embedding = np.eye(3)[assignments] + 0.05 * rng.normal(size=(sum(sizes), 3))
    images = (20 * assignments[:, None, None] + np.zeros((1, 64, 64))).astype(np.uint8)
    known = np.ones(sum(sizes), bool)
    properties = {
        "Effusion": (CLINICAL, assignments == 1, known),
        "AP view": (NUISANCE, assignments == 2, known),
    }
    return images, embedding, assignments, properties


def test_clusters_are_described_the_largest_first():
    images, embedding, assignments, properties = planted()
    found = atlas.atlas(images, embedding, assignments, properties, n_nearest=4)
    assert [(c.number, c.size) for c in found] == [(0, 30), (1, 20), (2, 10)]
    for cluster in found:
        members = np.flatnonzero(assignments == cluster.number)
        total = [np.linalg.norm(embedding[members] - embedding[i], axis=1).sum() for i in members]
        assert cluster.medoid == members[np.argmin(total)]
        assert set(cluster.nearest) <= set(members) - {cluster.medoid}
        distance = np.linalg.norm(embedding[members] - embedding[members].mean(axis=0), axis=1)
        expected = [i for i in members[np.argsort(distance)] if i != cluster.medoid][:4]
        assert cluster.nearest.tolist() == expected
        assert (cluster.mean == 20 * cluster.number).all()
    assert [[name for name, *_ in c.enriched] for c in found] == [[], ["Effusion"], []]
    name, share, elsewhere, q = found[1].enriched[0]
    assert (name, share, elsewhere) == ("Effusion", 1.0, 0.0)
    assert q < 1e-6


def test_findings_by_chance_are_not_named():
    images, embedding, assignments, _ = planted((100, 100, 100))
    rng = np.random.default_rng(1)
    properties = {f"f{i}": (CLINICAL, rng.random(300) < 0.3, np.ones(300, bool)) for i in range(14)}
    assert (
        sum(len(c.enriched) for c in atlas.atlas(images, embedding, assignments, properties)) <= 1
    )


def test_a_medoid_of_many_points_is_that_of_the_definition():
    points = (
        np.random.default_rng(0).normal(size=(1500, 2)) ** 3
    )  # skew: the medoid is not the point nearest to the mean
    total = [np.linalg.norm(points - p, axis=1).sum() for p in points]
    assert atlas.medoid(points) == int(np.argmin(total))
    assert atlas.medoid(points[:1]) == 0


def test_one_image_a_cluster_and_errors():
    images, embedding, assignments, properties = planted((1, 1, 1))
    found = atlas.atlas(images, embedding, assignments, properties)
    assert [len(c.nearest) for c in found] == [0, 0, 0]
    with pytest.raises(ValueError, match="3 images, 2 rows of the embedding and 3 assignments"):
        atlas.atlas(images, embedding[:2], assignments, properties)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        atlas.atlas(images, embedding, assignments, properties, n_nearest=-1)


def test_clusters_are_followed_through_new_numbers():
    rng = np.random.default_rng(0)
    final = rng.integers(0, 6, 300)
    epochs = [rng.permutation(6)[final] for _ in range(4)] + [final]
    followed = atlas.follow(np.array(epochs))
    assert (followed == final).all()
    noisy = np.array(epochs)
    noisy[1, :30] = rng.integers(0, 6, 30)
    followed = atlas.follow(noisy)
    assert (followed[:, 30:] == final[30:]).all()
    assert [len(set(zip(a, b, strict=True))) for a, b in zip(noisy, followed, strict=True)] == [
        6
    ] * 5  # a renaming, nothing else


def test_stability_is_the_best_jaccard_index():
    assignments = np.array([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2], [1, 1, 1, 0, 2, 2]])
    found = atlas.stability(assignments)
    assert found.shape == (3, 3)
    np.testing.assert_allclose(found[2], 1)
    np.testing.assert_allclose(found[1], [1 / 2, 2 / 3, 1])
    np.testing.assert_allclose(found[0], [1 / 4, 3 / 4, 1])
    assert np.isnan(atlas.stability(np.array([[0, 1, 2], [0, 0, 2]]))[:, 1]).all()


@pytest.mark.parametrize(("rows", "pages"), [(20, 1), (2, 2), (1, 3)])
def test_every_cluster_is_on_one_page(rows, pages):
    images, embedding, assignments, properties = planted()
    found = atlas.atlas(images, embedding, assignments, properties)
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
    clusters = atlas.atlas(images, rng.normal(size=(40, 4)), np.arange(40) % 3, {}, n_nearest=3)
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
                atlas.atlas(images, embedding, assignments, properties),
                60,
                "run",
                "x",
                rows=0,
            )
        )
