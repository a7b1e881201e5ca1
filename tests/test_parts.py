"""Planted answers are found, what cannot be known stands at chance, and what is not defined says
why."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from lib.runs import TrainConfig
from lib.study import parts
from lib.study.subjects import Effort, Material, Metadata

EFFORT = Effort(8, 80, 40, perplexities=(5,), map_seeds=(0,), n_neighbors=5, n_boot=50)


class Code:
    """A subject whose features are a function of the images."""

    seed, n_clusters, config = 0, 4, TrainConfig("p4m", 4, pca_dim=2)

    def __init__(self, pictures, function, assignments=None):
        self.extract = function
        self.features = self.embedding = function(pictures)
        self.assignments = np.arange(len(pictures)) % 4 if assignments is None else assignments

    def embed(self, features):
        return features

    def assign(self, features):
        return np.abs(features).argmax(axis=1)


def metadata(n, **columns):
    """Patients of two images, every fifth patient for testing."""
    table = {"findings": "No Finding", "view_position": "", "sex": "", "age": np.nan}
    table["patient_id"] = [f"p{i // 2}" for i in range(n)]
    table["split"] = ["test" if i // 2 % 5 == 0 else "train" for i in range(n)]
    return pd.DataFrame(table | columns, index=range(n))


def noise(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 64, 64), dtype=np.uint8)


def merged(subject, material, asked):
    """All that some parts find."""
    return {name: some for part in asked for name, some in part(subject, material).items()}


def planted(n=400):
    """Pictures, a code that reads labels off, one that reads noise, and the labels."""
    rng = np.random.default_rng(1)
    has = rng.random((n, 2)) < [0.4, 0.3]
    texts = ["|".join(np.array(["Effusion", "Mass"])[row]) or "No Finding" for row in has]
    codes = np.unique(texts, return_inverse=True)[1]
    told = np.eye(4, dtype=np.float32)[codes] + 0.1 * rng.normal(size=(n, 4)).astype(np.float32)
    untold = rng.normal(size=(n, 4)).astype(np.float32)
    material = Material(noise(n), metadata(n, findings=texts), effort=EFFORT)
    knows, guesses = (Code(material.images, lambda _, some=x: some, codes) for x in (told, untold))
    guesses.assignments = rng.permutation(codes)
    return material, knows, guesses


def test_planted_labels_are_read_and_noise_is_not():
    material, knows, guesses = planted()
    asked = (parts.combination_probe, parts.label_probe, parts.meaning)
    found = [merged(code, material, asked) for code in (knows, guesses)]
    known, guessed = found
    assert min(known["probe_combinations"], known["auroc_macro"]) > 0.98
    assert known["auroc_macro_n_classes"] == 2
    assert known["follows_findings"] == pytest.approx(1)
    assert guessed["probe_combinations"] < guessed["probe_combinations_majority"] + 0.1
    assert abs(guessed["auroc_macro"] - 0.5) < 0.15
    assert abs(guessed["follows_findings"]) < 0.03
    for values in found:
        assert values["auroc_macro_prevalence"] == 0.5
        assert values["auroc_micro_prevalence"] > 0.5
        for key in ("probe_combinations", "auroc_macro"):
            assert values[f"{key}_low"] <= values[key] <= values[f"{key}_high"]


def test_answers_image_by_image_are_of_the_test_images():
    material, knows, _ = planted(100)
    asked = (parts.cluster_probe, parts.combination_probe, parts.label_probe)
    found = merged(knows, material, asked)
    assert (material.metadata["split"].to_numpy()[found["test"]] == "test").all()
    assert found["clusters"].mean() == found["probe_clusters"]
    assert found["combinations"].mean() == found["probe_combinations"]
    assert found["findings"].shape == found["truth"].shape == (len(found["labelled_test"]), 2)


TWO = {"findings": ["COVID", "Normal"] * 20}
TESTED = [i // 2 % 5 == 0 for i in range(40)]  # as `metadata` splits
ODD = {
    "two classes of the user's own": (TWO, ""),
    "no finding at all": ({}, parts.FEW),
    "a single positive": ({"findings": ["Mass"] + ["No Finding"] * 39}, parts.FEW),
    "one class in training": ({"findings": np.where(TESTED, "Edema", "Mass")}, parts.FEW),
    "no labels": ({"findings": ""}, "no labels"),
    "no test set": ({"split": "train"}, "no test images"),
    "no training set": ({"split": "test"}, "no training images"),
    "no labels to test": ({"findings": np.where(TESTED, "", ["A", "B"] * 20)}, "no test images"),
    "one patient, split by image": (TWO | {"patient_id": "ANONYMOUS"}, ""),
    "no patients": (TWO | {"patient_id": ""}, ""),
}


def first_pixels(some):
    return some.reshape(len(some), -1)[:, :4] / 255.0


@pytest.mark.parametrize(("columns", "why"), ODD.values(), ids=ODD)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_defined_says_why_and_nothing_fails(columns, why):
    material = Material(noise(40), metadata(40, **columns), effort=EFFORT)
    code = Code(material.images, first_pixels)
    code.describe = code.extract
    found = merged(code, material, parts.PARTS)
    if why:
        assert why in found["auroc_macro"]
    else:
        assert 0 <= found["auroc_macro"] <= 1
        assert 0 <= found["probe_combinations"] <= 1
    assert isinstance(found["probe_clusters"], str) == ("split" in columns)
    assert isinstance(found["silhouette"], float)


def test_clusters_that_are_one_have_no_structure():
    material = Material(noise(40), metadata(40), effort=EFFORT)
    code = Code(material.images, first_pixels)
    code.assignments = np.zeros(40, int)
    found = parts.structure(code, material)
    assert (found["silhouette"], found["map_silhouette"]) == ("one cluster", "one cluster")
    assert (found["largest_cluster"], found["perplexity"]) == (1, 1)
    assert 0 < found["map_trust"] <= 1


def test_only_a_code_that_cannot_change_keeps_its_clusters():
    pictures = noise(8)
    pictures[:, :32] //= 2  # darker above
    material = Material(pictures, metadata(8), turned=noise(8, 1), effort=EFFORT)

    def halves(some):
        return np.stack([some[:, :32].mean((1, 2)), some[:, 32:].mean((1, 2))], 1)

    def invariant(some):
        return np.stack([some.mean((1, 2)), some.std((1, 2))], 1)

    found = {f.__name__: parts.invariance(Code(pictures, f), material) for f in (halves, invariant)}
    assert found["invariant"]["kept_lattice"] == found["invariant"]["kept_drawn"] == 1
    assert found["invariant"]["distance_lattice"] == pytest.approx(0, abs=1e-9)
    assert found["halves"]["kept_lattice"] < 0.8
    for values in found.values():
        assert values["symmetries"]["kept"][0] == 1
        assert len(values["angles"]["kept"]) == len(parts.ANGLES)
        free = values["angles"]["kept"][[a % 90 != 0 for a in parts.ANGLES]].mean()
        assert values["kept_free"] == pytest.approx(free)


def effusions(n=80, seed=0):
    """Films with one bright corner, left or right; more of one side than of the other, and brighter
    there."""
    rng = np.random.default_rng(seed)
    left = rng.random(n) < 0.7
    images = rng.integers(40, 60, (n, 64, 64), dtype=np.uint8)
    for image, side in zip(images, left, strict=True):
        image[48:, :16] += np.uint8(90 if side else 0)
        image[48:, 48:] += np.uint8(0 if side else 60)
    sides, split = np.where(left, "L", "R"), ["test" if i >= n // 2 else "train" for i in range(n)]
    table = metadata(n, findings="Effusion", side=sides, split=split)
    return Material(images, table, effort=EFFORT)


def apart(some):
    return np.stack([some[:, :, :32].mean((1, 2)), some[:, :, 32:].mean((1, 2))], 1)


def together(some):
    halves = apart(some)
    return np.stack([halves.sum(axis=1), halves.max(axis=1)], 1)


@pytest.mark.parametrize(("code", "low", "high"), [(apart, 0.99, 1.0), (together, 0.45, 0.55)])
def test_only_a_code_that_knows_left_tells_the_side_of_an_effusion(code, low, high):
    material = effusions()
    subject = Code(material.images, code)
    assert low <= parts.effusion_side(subject, material)["tells_effusion_side"] <= high
    mirrored = parts.laterality(subject, material)["tells_mirrored"]
    assert low <= mirrored <= high or code is apart
    few = effusions()
    few.metadata.loc[few.metadata.index >= 8, "findings"] = "Mass"
    assert "fewer than" in parts.effusion_side(subject, few)["tells_effusion_side"]


def test_factors_are_what_differs():
    texts = ["0", "1", "2", "3"] * 10
    digits = parts.factors(Material(noise(40), metadata(40, findings=texts)))
    assert list(digits) == ["classes", "brightness"]
    assert digits["classes"].tolist() == texts
    findings, views = ["Mass|Edema", "No Finding", "Mass", "Mass"] * 10, ["PA", "AP"] * 20
    films = parts.factors(Material(noise(40), metadata(40, findings=findings, view_position=views)))
    assert {"view_position", "brightness", "Mass", "Edema"} <= set(films)
    assert not {"classes", "sex"} & set(films)


def test_halves_agree_on_planted_clusters_and_not_on_noise():
    rng, kinds = np.random.default_rng(0), np.arange(600) % 4
    blobs = 8 * np.eye(4)[kinds] + rng.normal(size=(600, 4))
    material = Material(noise(600), metadata(600), effort=EFFORT)
    found = {}
    for name, features in {"blobs": blobs, "noise": rng.normal(size=(600, 4))}.items():
        code = Code(material.images, lambda _, some=features: some)
        code.config = TrainConfig("p4m", 4, pca_dim=3)
        found[name] = parts.halves(code, material)["ami_halves"]
    assert found["blobs"] > 0.9
    assert found["noise"] < 0.6
    few = Material(noise(9), metadata(9), effort=EFFORT)
    assert "fewer images" in parts.halves(Code(few.images, first_pixels), few)["ami_halves"]


def test_a_split_of_its_own_has_no_patient_on_both_sides():
    material = Material(noise(300), metadata(300, findings="Mass"), effort=EFFORT)
    train, test = material.own_rows(0)
    assert len(train) + len(test) == 300
    assert 0.1 < len(test) / 300 < 0.3
    assert not {*material.patients[train]} & {*material.patients[test]}
    assert not np.array_equal(test, material.own_rows(1)[1])


@pytest.mark.parametrize(
    ("loss", "perplexity", "settled"),
    [(0.5, 18.0, 2.8), (0.95, 18.0, 9.0), (0.5, 9.0, 9.0)],
    ids=["learns", "learns nothing", "collapsed"],
)
def test_who_learns_nothing_never_settles(loss, perplexity, settled):
    ami = [np.nan, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    table = pd.DataFrame({"ami_prev": ami, "nmi_prev": ami, "epoch": range(1, 9)})
    table = table.assign(loss=loss * np.log(20), perplexity=perplexity)
    known = {"config": TrainConfig("p4m", 20), "assignments": np.zeros((8, 40), int)}
    subject = SimpleNamespace(run=SimpleNamespace(metrics=table, **known))
    assert parts.training(subject, None)["settled_ami"] == pytest.approx(settled)


def test_what_view_and_sex_tell_needs_no_image():
    views = np.array(["PA", "AP"] * 100)
    table = metadata(200, findings=np.where(views == "AP", "Edema", "No Finding"))
    material = Material(noise(200), table.assign(view_position=views), effort=EFFORT)
    told = parts.label_probe(Metadata(material.metadata, Code.config), material)
    untold = parts.label_probe(Metadata(table, Code.config), material)
    assert told["auroc_macro"] > 0.99
    assert untold["auroc_macro"] == 0.5
