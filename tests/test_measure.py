"""Runs are measured once, and what is measured ends in one file that claims, tables and figures
read."""

import json
import shutil

import numpy as np
import pytest

from lib import data, paths
from lib.data.phantom import make_phantoms
from lib.deepcluster import fit
from lib.study import arms, claims, measure, parts, report, verdicts
from tests.test_arms import TINY
from tests.test_parts import EFFORT, metadata

PUBLISHED = paths.load_json(paths.ROOT / "data" / "published" / "numbers.json")
TRAINED = ("alexnet", "p4m", "p4m-untrained", "p4m-index")


def write(dataset, pictures, table, **source):
    """A data set as 01_preprocess leaves it."""
    folder = paths.dataset_dir(dataset)
    folder.mkdir(parents=True)
    table = table.assign(image_id=[f"{i:04d}.png" for i in range(len(table))])
    np.save(folder / "images.npy", pictures)
    table.to_csv(folder / "metadata.csv", index=False)
    paths.save_json(folder / "manifest.json", {"source": source, "attribution": "None."})


def train(dataset, names, seeds):
    pictures = data.load_images(paths.dataset_dir(dataset))
    for arm in names:
        for seed in seeds:
            config = arms.train_config(arm, TINY, seed, "cpu")
            fit(pictures, config, paths.run_dir(dataset, arm, seed), progress=False)


def values_of(results, arm):
    return results["arms"][arm]["seeds"]["0"]["values"]


def evaluate(dataset):
    """As 04_evaluate does."""
    found = measure.gather(dataset, effort=EFFORT)
    found["comparisons"] = claims.compare_all(found, measure.answers(found), n_boot=20)
    return measure.save(paths.runs_dir(dataset) / "results.json", found)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Four arms on 64 phantoms, two seeds, as 04_evaluate measures them."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CXR_DATA_DIR", str(tmp_path_factory.mktemp("study")))
    pictures, table = make_phantoms(64, 0)
    table = table.sort_values("image_id")
    split = ["test" if int(p) % 4 == 0 else "train" for p in table["patient_id"]]
    write("tiny", pictures[table.index], table.assign(split=split), kind="phantom", seed=0)
    train("tiny", TRAINED, (0, 1))
    yield evaluate("tiny")
    patch.undo()


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_what_must_hold_by_construction(results):
    assert set(results["arms"]) == {*TRAINED, *measure.BASELINES}
    assert all(set(entry["seeds"]) == {"0", "1"} for entry in results["arms"].values())
    names = ("p4m", "p4m-index", "alexnet", "pixels", "random")
    p4m, index, alexnet, pixels, chance = (values_of(results, name) for name in names)
    assert alexnet["kept_lattice"] < p4m["kept_lattice"] == 1
    assert p4m["distance_lattice"] < 1e-3
    assert p4m["tells_mirrored"] == p4m["tells_upside_down"] == 0.5
    assert 0 <= p4m["kept_drawn"] <= 1
    assert {"nmi_sd", "auroc_macro"} & set(pixels) == {"auroc_macro"}
    assert "auroc_macro" not in chance
    assert abs(chance["ami_final"]) < 0.2
    assert 2 <= index["settled_ami"] <= 3
    untrained = results["arms"]["p4m-untrained"]
    assert untrained["pseudo_labels"] == "nothing"
    assert values_of(results, "p4m-untrained")["nmi_final"] == "too few epochs"
    assert results["arms"]["p4m"]["parameters"] == arms.cost("p4m", 4, (1, 2, 4))["parameters"]
    assert any(line.startswith("cnn_flops: no finished run") for line in results["missing"])


def test_what_was_measured_is_a_small_file_and_is_not_measured_again(results, monkeypatch):
    path = paths.runs_dir("tiny") / "results.json"
    assert paths.load_json(path) == json.loads(path.read_text()) == results
    assert path.stat().st_size < 25_000 * len(TRAINED) * 2 + 100_000
    monkeypatch.setattr(parts, "PARTS", None)
    monkeypatch.setattr(measure, "turned_phantoms", None)
    again = measure.gather("tiny", effort=EFFORT)
    values, known = (values_of(some, "p4m") for some in (again, results))
    assert values.keys() == known.keys()
    assert values["silhouette"] == pytest.approx(known["silhouette"], rel=1e-5)


def test_kept_numbers_stand_in_for_runs_that_are_gone(results, tmp_path, monkeypatch):
    monkeypatch.setenv("CXR_FIGURES_DIR", str(tmp_path / "figures"))
    monkeypatch.setattr(parts, "PARTS", None)
    measure.keep(results)
    root = tmp_path / "data"
    for part in ("tiny", "runs/tiny/alexnet/seed0"):
        shutil.copytree(paths.data_root() / part, root / part)
    monkeypatch.setenv("CXR_DATA_DIR", str(root))
    again = measure.gather("tiny", effort=EFFORT)
    again["comparisons"] = claims.compare_all(again, measure.answers(again), n_boot=20)
    assert set(again["arms"]) == set(results["arms"])
    ours, theirs = ([c["verdicts"] for c in some["comparisons"]] for some in (again, results))
    assert [[v["n"] for v in of] for of in ours] == [[v["n"] for v in of] for of in theirs]
    silhouettes = (claims.values_of(some, "p4m", "silhouette") for some in (again, results))
    assert next(silhouettes) == pytest.approx(next(silhouettes), rel=1e-5)


def test_comparisons_hold_the_chance_of_the_patients(results):
    pairs = [(c["treatment"], c["reference"]) for c in results["comparisons"]]
    others = ("alexnet", "p4m-untrained", "p4m-index")
    assert pairs == [("p4m", other) for other in others]
    assert {v["verdict"] for c in results["comparisons"] for v in c["verdicts"]} == {"cannot tell"}
    auroc = next(e for e in results["comparisons"][0]["measures"] if e["measure"] == "auroc_macro")
    assert auroc["patient_se"] > 0


def test_curves_and_known_factors_are_tables_by_seed_and_epoch(results):
    curves = measure.curves(results)
    assert set(curves) == {"alexnet", "p4m", "p4m-index"}
    assert curves["p4m"][["seed", "epoch"]].to_numpy().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    known = measure.known(results)
    assert {"view_position", "sex", "brightness"} <= set(known)
    table = known["brightness"]["p4m"]
    assert table["epoch"].tolist() == [0, 1, 2] * 2  # the last: after all epochs
    assert table["ami"].between(-0.5, 1).all()
    rocs = measure.roc_curves(results)
    assert list(rocs)[-1] == "guess"
    assert len(rocs["p4m"]["micro"]) == len(parts.RATES)


def test_turned_phantoms_are_the_same_scenes(results):
    pictures = data.load_images(paths.dataset_dir("tiny"))
    turned = measure.turned_phantoms("tiny", pictures)
    assert turned.shape == pictures.shape
    assert not np.array_equal(turned, pictures)
    again = np.array(pictures)
    again[0] = 0
    assert measure.turned_phantoms("tiny", again) is None


def test_pages_and_tables_say_what_the_numbers_say(results):
    table = report.linear_probe_table(results, PUBLISHED)
    row = table[(table["arm"] == "p4m") & (table["target"] == "clusters")].iloc[0]
    values = claims.values_of(results, "p4m", "probe_clusters").values()
    assert row["accuracy"] == pytest.approx(np.mean(list(values)))
    assert row["published"] == PUBLISHED["linear_probe"]["p4m"]
    assert row["ci_low"] <= row["accuracy"] <= row["ci_high"]
    assert table["published"].notna().sum() == 4  # two arms, two targets
    pages = [report.summary(results, table, {"fig1": "A caption."}, "x")]
    pages += ["".join(verdicts.claims_pages(results, "x").values()), report.glance(results)]
    for text in pages:
        assert not {"nan", "None", "inf"} & set(text.replace("|", " ").split())
        tables = [b.splitlines() for b in text.split("\n\n") if b.startswith("|")]
        assert tables
        assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    kept = np.mean(list(claims.values_of(results, "alexnet", "kept_lattice").values()))
    assert all(f"{kept:.3f}" in text for text in pages[:3])
    assert all(f"### {number}. " in pages[0] for number in range(1, 6))
    assert "too few epochs" in pages[1]
    assert len(report.frame(results)) == 2 * (len(TRAINED) + len(measure.BASELINES))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"findings": ["COVID-19", "Normal"] * 16}, "2 labels, mean AUROC"),
        ({"findings": "", "split": "train", "patient_id": "ANONYMOUS"}, "not defined: no labels"),
    ],
)
def test_any_labels_and_patients_end_in_pages(tmp_path, monkeypatch, columns, said):
    """From runs to every page, on data of a user's own; test_parts.py has more that is odd."""
    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path))
    pictures = np.random.default_rng(0).integers(0, 256, (32, 64, 64), dtype=np.uint8)
    write("own", pictures, metadata(32, **columns), kind="folder")
    train("own", ("alexnet", "p4m"), (0,))
    results = evaluate("own")
    assert results["dataset"]["label"] == "own images, 32 images"
    table = report.linear_probe_table(results, PUBLISHED)
    text = report.summary(results, table, {}, "x")
    text += "".join(verdicts.claims_pages(results, "x").values())
    assert said in text
    single = "COVID-19" in str(columns)
    assert isinstance(values_of(results, "p4m")["ami_classes"], float) == single


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_processes_measure_what_one_measures(results):
    for arm in ("p4m", "pixels"):
        (paths.run_dir("tiny", arm, 0) / measure.NAME).unlink()
    again = measure.gather("tiny", jobs=2, effort=EFFORT)
    for arm in ("p4m", "pixels"):
        ours, theirs = (values_of(some, arm) for some in (results, again))
        assert ours["silhouette"] == pytest.approx(theirs["silhouette"], rel=1e-4)


def test_as_many_processes_as_memory_allows(results, monkeypatch):
    asked, real = [], measure.joblib.Parallel
    monkeypatch.setattr(measure.joblib, "Parallel", lambda n_jobs: asked.append(n_jobs) or real(1))
    for limit in (1e12, 2e9, 4e9):
        monkeypatch.setattr(measure, "memory", lambda limit=limit: limit)
        measure.gather("tiny", jobs=3, effort=EFFORT)
    assert asked == [3, 1, 3]
