"""Embeddings as input: files of them are read, clustered and measured as runs are."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import lib.__main__ as command
from lib import data, metrics, paths
from lib.data import embeddings, nih
from lib.explore import explorer
from lib.notebooks import read_preset
from lib.runs import TrainConfig
from lib.study import arms, given
from tests.test_kmeans import planted
from tests.test_parts import EFFORT

N, K = 96, 4
LABELS = ("No Finding", "Mass", "Edema|Mass", "Hernia")


def columns():
    """Four kinds of X-ray as embeddings, two images per patient."""
    points, kinds = planted(N, K, 6)
    known = {"ids": [f"{i}.png" for i in range(N)], "labels": [LABELS[k] for k in kinds]}
    known |= {"patients": np.arange(N) // 2, "age": np.linspace(20, 80, N), "view": ["PA"] * N}
    return {"embeddings": points} | known


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Write columns to a file in a new folder."""
    monkeypatch.setenv("CXR_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CXR_FIGURES_DIR", str(tmp_path / "figures"))

    def write(name="given.npz", **changes):
        some = {k: v for k, v in (columns() | changes).items() if v is not None}
        if name.endswith(".npz"):
            np.savez(tmp_path / name, **some)
        else:
            some["embeddings"] = list(some["embeddings"])
            pd.DataFrame(some).to_parquet(tmp_path / name)
        return tmp_path / name

    return write


def read(path):
    manifest = embeddings.preprocess(path, path.parent / "out")
    return manifest, *embeddings.load(path.parent / "out")


@pytest.mark.parametrize("name", ["given.npz", "given.parquet"])
def test_a_file_is_read_as_a_table_of_xrays_is(file, name):
    listed = [text.split("|") for text in columns()["labels"]] if "parquet" in name else None
    manifest, points, metadata = read(file(name, **({"labels": listed} if listed else {})))
    np.testing.assert_array_equal(points, columns()["embeddings"])
    assert metadata["findings"].tolist() == columns()["labels"]
    assert metadata["image_id"].tolist() == columns()["ids"]
    assert metadata["age"].iloc[[0, -1]].tolist() == [20, 80]
    assert set(metadata["view_position"]) == {"PA"}
    assert (manifest["images"], manifest["patients"], manifest["size"]) == (N, N // 2, 6)
    sides = metadata.groupby("split")["patient_id"].agg(set)
    assert not sides["train"] & sides["test"]


def test_only_embeddings_are_needed_and_a_split_is_kept(file):
    alone = dict.fromkeys([*columns()][1:])
    _, _, metadata = read(file(**alone))
    assert metadata["image_id"].is_unique
    assert data.count_patients(metadata) == 0
    assert set(metadata["findings"]) == {""}
    split = np.where(np.arange(N) < 10, "test", "val")
    _, _, metadata = read(file(**alone, split=split))
    assert metadata["split"].tolist() == ["test"] * 10 + ["train"] * (N - 10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"embeddings": None}, "embeddings"), ({"embeddings": np.zeros(N)}, r"\(96,\)")),
        ({"embeddings": np.full((N, 2), np.nan)}, "row 0"),
        ({"embeddings": np.array([["a"] * 2] * N)}, "embeddings"),
        *(({"ids": ["same"] * N}, "'same'"), ({"ids": [""] + ["x"] * (N - 1)}, "unique")),
        ({"labels": ["Mass"]}, r"labels.*\(1,\)"),
        ({"labels": np.array(["Mass"] * N, dtype=object)}, "pickle"),
    ],
)
def test_what_cannot_be_read_is_named(file, changes, message):
    with pytest.raises(ValueError, match=message):
        read(file(**changes))


def test_pictures_are_those_that_the_paths_name(file, tmp_path):
    Image.new("L", (128, 128), 77).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_text("no image")
    names = np.array(["a.png", "", str(tmp_path / "a.png"), *["bad.png"] * (N - 3)])
    with pytest.warns(UserWarning, match=r"2 of 5 pictures that given.npz .*'bad.png': not a PNG"):
        found, there = embeddings.pictures(file(paths=names), np.array([0, 1, 2, 3, 9]))
    assert there.tolist() == [True, False, True, False, False]
    assert (found == np.where(there, 77, 0)[:, None, None]).all()
    assert not embeddings.pictures(file(), np.arange(4))[1].any()


NUMBERS = np.arange(5) % 3


@pytest.fixture
def clustering(tmp_path):
    """Write a clustering of five images in any form and read it for a run with K = 3."""
    np.save(tmp_path / "images.npy", np.zeros((5, 64, 64), np.uint8))
    names = pd.DataFrame({"image_id": [*"abcde"]}).reindex(columns=list(nih.COLUMNS))
    names.to_csv(tmp_path / "metadata.csv", index=False)

    def there_and_back(name, values, kind="given"):
        if name.endswith(".csv"):
            pd.DataFrame(values).to_csv(tmp_path / name, index=False)
        else:
            (np.savez if name.endswith(".npz") else np.save)(tmp_path / name, values)
        config = TrainConfig("p4m", 3, pseudo_labels=kind)
        return embeddings.read_clusters(tmp_path / name, tmp_path / "images.npy", config)

    return there_and_back


def test_a_clustering_is_read_in_the_order_of_the_images(clustering):
    turned = {"image_id": [*"edcbax"], "seed0": [*NUMBERS[::-1], 9], "seed1": [7] * 6}
    forms = {"a.npy": NUMBERS, "a.npz": NUMBERS.astype(float), "a.csv": {"k": NUMBERS}}
    for name, values in (forms | {"b.csv": turned}).items():
        found = clustering(name, values)
        assert (found.tolist(), found.dtype) == (NUMBERS.tolist(), np.int64)
    assert clustering("a.npy", NUMBERS + 70, "patients").max() == 72


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        *(("a.npy", NUMBERS[1:], "4 numbers for 5"), ("a.npy", NUMBERS + 1, "3 for image 2: ")),
        *(("a.npz", NUMBERS / 2, "0.5 for image 1"), ("a.npy", -NUMBERS, "-1 for image 1")),
        *(("a.csv", {"k": ["", *NUMBERS[1:]]}, "for image 0"), ("a.npy", np.eye(5), "1-dim")),
        ("a.csv", {"image_id": [*"abcd"], "k": NUMBERS[1:]}, r"\['e'\] not in index"),
        ("a.csv", {"image_id": [*"abcdea"], "k": [0] * 6}, "6 numbers for 5"),
        ("a.npy", np.array([{}] * 5), "pickle"),
    ],
)
def test_a_clustering_that_does_not_fit_is_named(clustering, name, values, message):
    with pytest.raises(ValueError, match=rf"^{name} has .*{message}"):
        clustering(name, values)


@pytest.mark.slow
def test_planted_clusters_are_found_and_measured(file, monkeypatch):
    preset = read_preset("smoke") | {"n_clusters": K, "seeds": [0, 1], "n_map": 40}
    preset |= {"pca_dim": 4, "command": "COMMAND"}
    monkeypatch.setattr(given, "Effort", lambda **_: EFFORT)
    text, folder = explorer.of_file(file(), "given", preset), paths.figures_dir("given")
    kinds = np.arange(N) % K
    assert metrics.nmi(pd.read_csv(folder / "clusters.csv")["seed1"].to_numpy(), kinds) > 0.95
    found = paths.load_json(folder / "results.json")
    assert set(found["arms"]) == set(given.MEASURED)
    values = found["arms"]["given"]["seeds"]["0"]["values"]
    assert values["auroc_macro"] > 0.95
    names = ("follows_findings", "ami_seeds", "ami_halves")
    assert min(values[name] for name in names) > 0.9 > 0.2 > values["follows_age"]
    assert found["arms"]["metadata"]["seeds"]["0"]["values"]["auroc_macro"] < 0.8
    table = pd.read_csv(folder / "enrichment.csv")
    assert not table["property"].str.contains("quarter").any()
    page = (folder / "given.md").read_text(encoding="utf-8")
    assert arms.ARMS["given"].title in page
    monkeypatch.setattr(given.measure, "MADE", None)
    again = explorer.of_file(file(), "given", preset)  # read, not measured again
    assert "given embeddings" in (folder / "explorer.html").read_text(encoding="utf-8")
    assert again == text
    assert text.startswith(page)
    with pytest.raises(ValueError, match="n_clusters=97"):
        given.measure_file(file(), "given", preset | {"n_clusters": N + 1})


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.npz", "embeddings"), ("A.PARQUET", "embeddings"), ("b.npz", "chestmnist")],
)
def test_files_are_told_apart_by_what_they_hold(tmp_path, name, kind):
    np.savez(tmp_path / "a.npz", embeddings=np.zeros((2, 2)))
    np.savez(tmp_path / "b.npz", train_images=np.zeros(2))
    (tmp_path / "A.PARQUET").touch()
    assert command.parse(["--data", str(tmp_path / name)]).data == f"{kind}:{tmp_path / name}"


def test_the_command(file, monkeypatch, capsys):
    path, asked = file(), {}
    words = ["run", "--preset", "smoke", "--data", str(path)]
    with pytest.raises(SystemExit):
        command.parse(["study", *words[1:]])
    with monkeypatch.context() as patch:
        patch.setattr(explorer, "of_file", lambda *some: asked.update(some[2]) or "THE PAGE")
        assert command.main([*words, "--seeds", "3,4", "--clusterer", "graph"]) == 0
    assert "THE PAGE" in capsys.readouterr().out
    assert (asked["seeds"], asked["clusterer"]) == ([3, 4], "graph")
    path.write_bytes(path.read_bytes()[:-200])
    assert command.main([*words[:-1], f"embeddings:{path}"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
