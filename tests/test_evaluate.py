"""Evaluation of a run: planted answers are found, what the data cannot tell is None, and the tables
say what the numbers say.
"""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from lib import paths
from lib.data import FINDINGS
from lib.deepcluster import TrainConfig, fit
from lib.study import evaluate, report
from tests.test_deepcluster import pictures

PUBLISHED = {
    "linear_probe": {"alexnet": 0.564, "p4m": 0.5673, "majority_baseline_recomputed": 0.59}
}


def metadata(n, seed=0):
    """Patients of four images, two findings, 80/20."""
    rng = np.random.default_rng(seed)
    patient = np.arange(n) // 4
    test = rng.permutation(patient.max() + 1) < (patient.max() + 1) // 5
    has = rng.random((n, 2)) < [0.4, 0.3]
    findings = ["|".join(np.array(["Effusion", "Mass"])[row]) or "No Finding" for row in has]
    return pd.DataFrame(
        {
            "patient_id": patient,
            "findings": findings,
            "split": np.where(test[patient], "test", "train"),
        }
    )


def test_planted_findings_are_read_and_noise_is_not():
    n, rng = 600, np.random.default_rng(0)
    table = metadata(n)
    noise = rng.normal(size=(n, 8)).astype(np.float32)
    codes = np.unique(table["findings"], return_inverse=True)[1]
    told = evaluate.evaluate_features(
        np.eye(4, dtype=np.float32)[codes] + 0.1 * noise[:, :4], noise, codes, table, n_boot=50
    )
    assert told["label_combinations"]["accuracy"] > 0.98
    assert told["findings"]["mean"] > 0.98
    assert told["labels"]["nmi"] == pytest.approx(1)
    assert told["labels"]["nmi_permuted"] < 0.1
    untold = evaluate.evaluate_features(noise, noise, rng.permutation(codes), table, n_boot=50)
    assert untold["label_combinations"]["accuracy"] < untold["label_combinations"]["majority"] + 0.1
    assert abs(untold["findings"]["mean"] - 0.5) < 0.12
    assert abs(untold["labels"]["ami"]) < 0.02
    assert set(np.flatnonzero(np.isfinite(told["findings"]["per_finding"]))) == {
        FINDINGS.index("Effusion"),
        FINDINGS.index("Mass"),
    }


def test_what_the_data_cannot_tell_is_none():
    n = 40
    features = np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32)
    unlabelled = metadata(n).assign(findings="")
    numbers = evaluate.evaluate_features(
        features, features, np.arange(n) % 3, unlabelled, n_boot=10
    )
    assert numbers["label_combinations"] is numbers["findings"] is numbers["labels"] is None
    assert numbers["clusters"] is not None
    numbers = evaluate.evaluate_features(
        features, features, np.arange(n) % 3, metadata(n).assign(split="train"), n_boot=10
    )
    assert numbers["clusters"] is None


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Both arms, two seeds, on 80 small pictures."""
    images, table = pictures(80), metadata(80)
    folder = tmp_path_factory.mktemp("study")
    results = {
        "dataset": "pictures",
        "dataset_label": "test pictures, 80 images",
        "attribution": "None.",
        "n_images": 80,
        "n_patients": 20,
        "n_test": 16,
        "n_clusters": 4,
        "seeds": [0, 1],
        "arms": {},
    }
    for arm, width in (("alexnet", (4, 8, 8, 8, 8, 16)), ("p4m", (2, 2, 4))):
        seeds = {}
        for seed in (0, 1):
            config = TrainConfig(
                arm,
                n_clusters=4,
                pca_dim=3,
                epochs=4,
                batch_size=16,
                width=width,
                seed=seed,
                device="cpu",
            )
            run = fit(images, config, folder / f"{arm}{seed}", progress=False)
            seeds[seed] = {
                "features": evaluate.evaluate_run(run, table, n_boot=20),
                "training": evaluate.evaluate_training(run, seed),
                "symmetry": evaluate.evaluate_symmetry(run, images, sample=30, seed=seed),
                "ln_k": np.log(4),
            }
        results["arms"][arm] = {
            "parameters": 1,
            "config": dataclasses.asdict(config),
            "seeds": seeds,
        }
    pixels = {
        seed: {
            "features": evaluate.evaluate_pixels(
                images, table, dataclasses.replace(config, seed=seed), n_boot=20
            )
        }
        for seed in (0, 1)
    }
    results["arms"]["pixels"] = {"parameters": 0, "config": {}, "seeds": pixels}
    return results


def test_only_the_equivariant_network_keeps_clusters_under_symmetries(study):
    for seed in (0, 1):
        p4m, alexnet = (study["arms"][arm]["seeds"][seed]["symmetry"] for arm in ("p4m", "alexnet"))
        assert p4m["symmetries"] == [1.0] * 8
        assert alexnet["symmetries"][0] == 1
        assert alexnet["lattice"] < 0.9
        assert 0 <= p4m["free"] <= 1
        assert p4m["n"] == 30


def test_stored_results_fit_their_schema_and_what_does_not_is_named(study, tmp_path):
    paths.save_json(tmp_path / "results.json", study)
    stored = paths.load_json(tmp_path / "results.json")
    assert list(evaluate.validate(stored)) == []
    stored["arms"]["p4m"]["seeds"]["0"]["features"]["clusters"]["accuracy"] = None
    del stored["n_test"]
    assert list(evaluate.validate(stored)) == [
        "results.n_test is missing",
        "results.arms.p4m.seeds.0.features.clusters.accuracy is None, not a number",
    ]


def test_training_numbers(study):
    training = study["arms"]["alexnet"]["seeds"][0]["training"]
    assert 0 <= training["nmi_chance"] < training["nmi_final"] <= 1
    assert np.isnan(training["converged_at"]) or 2 <= training["converged_at"] <= 4
    assert training["clusters_used"] <= 4


def test_rows_and_table(study):
    rows = report.results_rows(study)
    assert len(rows) == 3 * 2 * 3  # arms, seeds, targets
    assert (
        (rows["patients_low"] <= rows["value"] + 1e-9)
        & (rows["value"] - 1e-9 <= rows["patients_high"])
    ).all()
    table = report.linear_probe_table(study, PUBLISHED)
    row = table[(table["arm"] == "p4m") & (table["target"] == "clusters")].iloc[0]
    values = rows[(rows["arm"] == "p4m") & (rows["target"] == "clusters")]["value"]
    assert row["accuracy"] == pytest.approx(values.mean())
    assert row["published"] == 0.5673
    assert row["n_seeds"] == 2
    assert row["ci_low"] <= row["accuracy"] <= row["ci_high"]
    assert (
        table["published"].notna().sum() == 4
    )  # two arms, two targets: not the findings, not the baselines


def test_summary_says_what_the_numbers_say(study):
    table = report.linear_probe_table(study, PUBLISHED)
    text = report.summary(study, table, {"fig1": "A caption."}, "./run_all.sh")
    assert text.startswith("# Summary: test pictures, 80 images")
    for number in range(1, 6):
        assert f"### {number}. " in text
    lattice = np.mean(
        [study["arms"]["alexnet"]["seeds"][seed]["symmetry"]["lattice"] for seed in (0, 1)]
    )
    line = next(line for line in text.splitlines() if "7 turns and mirrors" in line)
    assert f"{lattice:.3f} (" in line
    assert "1.000 (1.000 to 1.000, n = 2)" in line
    assert "0.564" in text
    assert "majority" in text
    assert "nan" not in text
    changed = {
        **study,
        "arms": {
            **study["arms"],
            "p4m": {**study["arms"]["p4m"], "seeds": {0: study["arms"]["p4m"]["seeds"][0]}},
        },
    }
    assert "1.000 (n = 1)" in report.summary(changed, table, {}, "x")


def test_markdown_tables_have_as_many_cells_as_columns(study):
    text = report.linear_probe_markdown(report.linear_probe_table(study, PUBLISHED), "x")
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 3
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)


def test_dataset_label():
    assert report.dataset_label("phantom", 2000) == "synthetic phantom, 2,000 images"
    assert report.dataset_label("nih", 1617) == "NIH ChestX-ray14, 1,617 images"
    assert report.dataset_label("folder", 1) == "own images, 1 images"
