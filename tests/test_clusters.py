"""Planted associations of clusters are found and noise is not; the atlas describes what is planted
and follows clusters through new numbers."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib.study import clusters
from lib.study.clusters import CLINICAL, NUISANCE, attributes, drivers, enrichment


def cohort(n=600, seed=0, names=("Effusion", "Mass")):
    rng = np.random.default_rng(seed)
    gray = rng.normal(120, 30, (n, 1, 1)) + rng.normal(0, 5, (n, 8, 8))
    has = rng.random((n, 2)) < 0.3
    table = pd.DataFrame(
        {
            "patient_id": (np.arange(n) // 3).astype(str),
            "findings": ["|".join(np.array(names)[row]) or "No Finding" for row in has],
            "view_position": rng.choice(["AP", "PA"], n),
            "sex": rng.choice(["F", "M", ""], n),
            "age": np.where(rng.random(n) < 0.1, np.nan, rng.integers(10, 90, n)),
        }
    )
    return np.clip(gray, 0, 255).astype(np.uint8), table


def test_a_planted_finding_and_a_planted_view_are_found_and_nothing_else():
    images, table = cohort()
    effusion = table["findings"].str.contains("Effusion").to_numpy()
    ap = (table["view_position"] == "AP").to_numpy()
    frame = enrichment(2 * effusion + ap, attributes(images, table))
    assert set(frame[frame["q"] < 1e-6]["property"]) == {"Effusion", "AP view"}
    both = (frame["property"] == "Effusion") & (frame["cluster"] == 3)
    assert frame[both]["log2_odds"].item() > 3
    noise = enrichment(np.random.default_rng(5).integers(8, size=600), attributes(images, table))
    assert (noise["q"] <= 0.05).sum() == 0
    assert set(noise["kind"]) == {CLINICAL, NUISANCE}


def test_numbers_are_fishers_and_benjamini_and_hochbergs():
    images, table = cohort(90)
    assignments = np.arange(90) % 3
    frame = enrichment(assignments, attributes(images, table))
    row = frame[(frame["property"] == "female") & (frame["cluster"] == 1)].iloc[0]
    known = table[table["sex"] != ""]
    counts = pd.crosstab(assignments[known.index] != 1, known["sex"] != "F").to_numpy()
    assert row["p"] == pytest.approx(stats.fisher_exact(counts).pvalue)
    assert row["n"] == counts[0].sum()
    assert (row["share"], row["elsewhere"]) == tuple(counts[:, 0] / counts.sum(axis=1))
    assert frame["q"].to_numpy() == pytest.approx(stats.false_discovery_control(frame["p"]))


def test_any_labels_do_and_no_view_sex_age_or_patient_need_be_known():
    images, table = cohort(60)
    found = attributes(images, table.assign(view_position="PA", sex=""))  # all or none have it
    assert not {"AP view", "PA view", "female", "Hernia"} & set(found)
    assert {"Effusion", "darkest quarter", "brightest quarter", "age under 40"} <= set(found)
    images, table = cohort(90, names=("COVID-19", "Pneumothorax, old"))
    bare = table[["findings"]].assign(patient_id="")
    known = attributes(images, bare)
    found = {name for name, (kind, *_) in known.items() if kind == CLINICAL}
    assert found == {"COVID-19", "Pneumothorax, old"}
    assert set(known) - found == {"darkest quarter", "brightest quarter"}
    follows = drivers(np.arange(90) % 3, images, bare)
    unknown = {name for name, value in follows.items() if np.isnan(value)}
    assert unknown == {"view_position", "sex", "age", "patient"}
    unlabelled = attributes(images, bare.assign(findings=""))
    assert {kind for kind, *_ in unlabelled.values()} == {NUISANCE}
    assert enrichment(np.zeros(90, int), {}).empty
    lateral = table.assign(view_position=np.array(["AP", "PA", "LL"])[np.arange(90) % 3])
    assert {"AP view", "PA view", "LL view"} <= set(attributes(images, lateral))


def test_drivers_tell_what_clusters_follow():
    images, table = cohort()
    view = np.unique(table["view_position"], return_inverse=True)[1]
    gray = clusters.brightness(images)
    quarters = np.searchsorted(np.quantile(gray, (0.25, 0.5, 0.75)), gray)
    planted = {"view_position": view, "brightness": quarters, "patient": np.arange(600) // 3}
    for name, assignments in planted.items():
        assert drivers(assignments, images, table)[name] == pytest.approx(1)
    found = drivers(view, images, table)
    assert all(abs(value) < 0.05 for name, value in found.items() if name != "view_position")


def test_the_reading_counts():
    images, table = cohort()
    effusion = table["findings"].str.contains("Effusion").to_numpy().astype(int)
    (line,) = clusters.reading({"p4m": enrichment(effusion, attributes(images, table))}, {})
    assert "in 1 of 2 findings (2 of 4 cells) and in 0 of " in line.removeprefix("p4m: ")


def planted(sizes=(30, 20, 10)):
    """Clusters around the axes of space; the second is where the effusions are."""
    assignments, known = np.repeat(np.arange(3), sizes), np.ones(sum(sizes), bool)
    noise = np.random.default_rng(0).normal(size=(sum(sizes), 3))
    images = (20 * assignments[:, None, None] + np.zeros((1, 64, 64))).astype(np.uint8)
    effusion, ap = (CLINICAL, assignments == 1, known), (NUISANCE, assignments == 2, known)
    properties = {"Effusion": effusion, "AP view": ap}
    return images, np.eye(3)[assignments] + 0.05 * noise, assignments, properties


def test_clusters_are_described_the_largest_first():
    images, embedding, assignments, properties = planted()
    found = clusters.atlas(images, embedding, assignments, properties, n_nearest=4)
    assert [(c.number, c.size) for c in found] == [(0, 30), (1, 20), (2, 10)]
    for cluster in found:
        members = np.flatnonzero(assignments == cluster.number)
        total = [np.linalg.norm(embedding[members] - embedding[i], axis=1).sum() for i in members]
        assert cluster.medoid == members[np.argmin(total)]
        distance = np.linalg.norm(embedding[members] - embedding[members].mean(axis=0), axis=1)
        expected = [i for i in members[np.argsort(distance)] if i != cluster.medoid][:4]
        assert cluster.nearest.tolist() == expected
        assert (cluster.mean == 20 * cluster.number).all()
    assert [[name for name, *_ in c.enriched] for c in found] == [[], ["Effusion"], ["AP view"]]
    name, share, elsewhere, q = found[1].enriched[0]
    assert (name, share, elsewhere) == ("Effusion", 1.0, 0.0)
    assert q < 1e-6


def test_one_image_per_cluster():
    images, embedding, assignments, properties = planted((1, 1, 1))
    found = clusters.atlas(images, embedding, assignments, properties)
    assert [len(c.nearest) for c in found] == [0, 0, 0]


def test_clusters_are_followed_through_new_numbers():
    rng = np.random.default_rng(0)
    final = rng.integers(0, 6, 300)
    epochs = np.array([rng.permutation(6)[final] for _ in range(4)] + [final])
    assert (clusters.follow(epochs) == final).all()
    epochs[1, :30] = rng.integers(0, 6, 30)
    followed = clusters.follow(epochs)
    assert (followed[:, 30:] == final[30:]).all()
    pairs = [set(zip(a, b, strict=True)) for a, b in zip(epochs, followed, strict=True)]
    assert [len(pair) for pair in pairs] == [6] * 5, "a renaming, nothing else"


def test_stability_is_the_best_jaccard_index():
    assignments = np.array([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2], [1, 1, 1, 0, 2, 2]])
    found = clusters.stability(assignments)
    np.testing.assert_allclose(found, [[1 / 4, 3 / 4, 1], [1 / 2, 2 / 3, 1], [1, 1, 1]])
    assert np.isnan(clusters.stability(np.array([[0, 1, 2], [0, 0, 2]]))[:, 1]).all()
