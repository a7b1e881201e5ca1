"""Planted associations of clusters are found, noise is not, and a patient's images together are
told from chance.
"""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lib.study import enrichment
from lib.study.enrichment import CLINICAL, NUISANCE, attributes, drivers, patient_together


def cohort(n=600, seed=0):
    rng = np.random.default_rng(seed)
    images = np.clip(rng.normal(120, 30, (n, 1, 1)) + rng.normal(0, 5, (n, 8, 8)), 0, 255).astype(
        np.uint8
    )
    has = rng.random((n, 2)) < 0.3
    table = pd.DataFrame(
        {
            "patient_id": np.arange(n) // 3,
            "findings": [
                "|".join(np.array(["Effusion", "Mass"])[row]) or "No Finding" for row in has
            ],
            "view_position": rng.choice(["AP", "PA"], n),
            "sex": rng.choice(["F", "M", ""], n),
            "age": np.where(rng.random(n) < 0.1, np.nan, rng.integers(10, 90, n)),
        }
    )
    return images, table


def test_a_planted_finding_and_a_planted_view_are_found_and_nothing_else():
    images, table = cohort()
    effusion, ap = (
        table["findings"].str.contains("Effusion").to_numpy(),
        (table["view_position"] == "AP").to_numpy(),
    )
    frame = enrichment.enrichment(2 * effusion + ap, attributes(images, table))
    hits = set(frame[frame["q"] < 1e-6]["property"])
    assert hits == {"Effusion", "AP view"}
    assert (
        frame[(frame["property"] == "Effusion") & (frame["cluster"] == 3)]["log2_odds"].item() > 3
    )
    noise = enrichment.enrichment(
        np.random.default_rng(5).integers(8, size=600), attributes(images, table)
    )
    assert (noise["q"] <= 0.05).sum() == 0
    assert set(noise["kind"]) == {CLINICAL, NUISANCE}


def test_numbers_are_fishers_and_benjamini_and_hochbergs():
    images, table = cohort(90)
    clusters = np.arange(90) % 3
    frame = enrichment.enrichment(clusters, attributes(images, table))
    row = frame[(frame["property"] == "female") & (frame["cluster"] == 1)].iloc[0]
    known, female = (table["sex"] != "").to_numpy(), (table["sex"] == "F").to_numpy()
    inside = clusters == 1
    counts = [
        [(part & known & (female == value)).sum() for value in (True, False)]
        for part in (inside, ~inside)
    ]
    assert row["p"] == pytest.approx(stats.fisher_exact(counts).pvalue)
    assert row["n"] == (inside & known).sum()
    assert frame["q"].to_numpy() == pytest.approx(stats.false_discovery_control(frame["p"]))
    with pytest.raises(ValueError, match="'Effusion' is of 90 images, the assignments of 10"):
        enrichment.enrichment(np.zeros(10, int), attributes(images, table))


def test_properties_that_all_or_none_have_are_left_out():
    images, table = cohort(60)
    found = attributes(images, table.assign(view_position="PA", sex=""))
    assert "AP view" not in found
    assert "female" not in found
    assert "Hernia" not in found
    assert {"Effusion", "darkest quarter", "age under 40"} <= set(found)


def test_patients_together():
    patients = np.arange(300) // 3
    by_patient = patient_together(patients % 10, patients)
    assert by_patient["share"] == 1
    assert by_patient["p"] < 0.01
    by_chance = patient_together(np.random.default_rng(0).permutation(300) % 10, patients)
    assert by_chance["share"] == pytest.approx(by_chance["expected"], abs=0.05)
    assert by_chance["p"] > 0.01
    assert by_chance["pairs"] == 300
    assert np.isnan(patient_together(np.zeros(5, int), np.arange(5))["share"])


def test_drivers_tell_what_clusters_follow():
    images, table = cohort()
    view = np.unique(table["view_position"], return_inverse=True)[1]
    found = drivers(view, images, table)
    assert found["view_position"] == pytest.approx(1)
    assert all(abs(value) < 0.05 for name, value in found.items() if name != "view_position")
    quarters = np.searchsorted(
        np.quantile(enrichment.brightness(images), (0.25, 0.5, 0.75)), enrichment.brightness(images)
    )
    assert drivers(quarters, images, table)["brightness"] == pytest.approx(1)
    assert np.isnan(drivers(view, images, table.assign(sex=""))["sex"])


def test_the_reading_counts():
    images, table = cohort()
    effusion = table["findings"].str.contains("Effusion").to_numpy().astype(int)
    frame = enrichment.enrichment(effusion, attributes(images, table))
    (line,) = enrichment.reading({"p4m": frame}, {"p4m": "P4M"})
    assert line.startswith("P4M: at a false-discovery rate of 0.05, clusters differ in ")
    assert "of 2 findings" in line
