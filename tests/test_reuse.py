"""A finished run used again: the same numbers as in training, from the export too; errors that
quote; far images are called far."""

import json

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import safetensors
from PIL import Image

from lib import data, paths, runs
from lib.data import phantom, preprocess, sources
from lib.deepcluster import TrainConfig, fit
from lib.explore import reuse
from tests import finished


@pytest.fixture(scope="module", autouse=True)
def images(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_DATA_DIR", str(tmp_path_factory.mktemp("reuse")))
        yield np.array(finished.make())


def folder(arm="p4m"):
    return paths.run_dir(finished.DATASET, arm, 0)


@pytest.mark.parametrize("arm", finished.WIDTHS)
def test_a_run_gives_its_own_numbers_again(arm, images):
    model, run = reuse.load(folder(arm)), runs.load_run(folder(arm))
    features = np.asarray(run.features)
    np.testing.assert_allclose(model.features(images), features, atol=1e-5)
    np.testing.assert_allclose(model.embed(images), runs.embed(run, features), atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(model.embed(images[:5]), axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(model.assign(images), run.final_assignments)
    np.testing.assert_array_equal(model.assign(images[::-1][:7]), run.final_assignments[::-1][:7])
    assert model.name == f"phantom-tiny/{arm}/seed0"
    assert model.sizes.sum() == len(images)


@pytest.mark.parametrize("arm", [*finished.WIDTHS, "linear"])
def test_export_holds_the_same_model(arm, images, tmp_path):
    if arm == "linear":
        options = {"epochs": 1, "batch_size": 32, "width": (1, 2, 4), "device": "cpu"}
        config = TrainConfig("p4m", 4, pca_dim=4, head="linear", **options)
        fit(images, config, folder(arm), progress=False)
    written = reuse.export(folder(arm), tmp_path)
    assert set(tmp_path.iterdir()) == set(written)
    models, new = (reuse.load(folder(arm)), reuse.load(tmp_path)), phantom.make_phantoms(20, 5)[0]
    (embedded, assigned, novel), others = (model.look(new) for model in models)
    np.testing.assert_array_equal(embedded, others[0])
    np.testing.assert_array_equal(assigned, others[1])
    assert novel.sentence == others[2].sentence
    np.testing.assert_array_equal(*(model.sizes for model in models))


def test_every_exported_file_says_what_it_is(images, tmp_path):
    reuse.export(folder(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as weights:
        notes = [config, weights.metadata()]
    names = (reuse.ASSIGNMENTS, reuse.EMBEDDINGS)
    for name in names:
        kept = pyarrow.parquet.read_schema(tmp_path / name).metadata.items()
        notes.append({key.decode(): value.decode() for key, value in kept})
    for note in notes:
        assert note["notice"] == "Not for clinical use."
        assert note["attribution"] == phantom.ATTRIBUTION
        assert note["dataset"] == "synthetic phantom, 72 images"
    assignments, embeddings = (pd.read_parquet(tmp_path / name) for name in names)
    assert [*assignments] == ["image_id", "cluster", "distance"]
    assert [*embeddings] == ["image_id", "embedding"]
    ids = data.load(paths.dataset_dir(finished.DATASET))[1]["image_id"].tolist()
    assert assignments["image_id"].tolist() == embeddings["image_id"].tolist() == ids
    run = runs.load_run(folder())
    assert assignments["cluster"].tolist() == run.final_assignments.tolist()
    expected = runs.embed(run, np.asarray(run.features))
    np.testing.assert_allclose(np.stack(embeddings["embedding"]), expected, atol=1e-4)
    assert str(tmp_path) not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_export_of_other_images_is_refused(images, tmp_path):
    sources.fetch("phantom", tmp_path / "raw", 72, 1)
    preprocess.preprocess(tmp_path / "raw", tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds other images than .*seed0 clustered"):
        reuse.export(folder(), tmp_path / "out", tmp_path / "other")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is the run itself"):
        reuse.export(folder(), folder())


def test_wrong_images_are_quoted():
    model, gray = reuse.load(folder()), np.zeros((2, 64, 64), np.uint8)
    for given, quoted in (
        *((gray[..., None], r"\(2, 64, 64, 1\)"), (gray[0], r"images\[None\]"), ("x.png", "<U5")),
        *((gray[:0], r"\(0, 64, 64\)"), (gray.astype(np.int64) + 7, "int64 .* up to 7")),
        (gray / np.float32(255) + 0.5, "float32 .* up to 0.5"),
    ):
        with pytest.raises(ValueError, match=quoted):
            model.embed(given)


def test_far_images_are_called_far_and_the_runs_own_are_not(images):
    model = reuse.load(folder())
    own = model.novelty(images)
    assert own.share <= own.expected < 0.1
    assert "unlike" not in own.sentence
    pixels = np.random.default_rng(0).integers(256, size=(40, 64, 64), dtype=np.uint8)
    noise = model.novelty(pixels)
    assert noise.share > max(reuse.MANY, 5 * own.expected)
    assert noise.p < 1e-6
    assert "unlike" in noise.sentence
    assert noise.distance.shape == noise.spread.shape == (40,)


def test_broken_and_missing_folders_are_named(tmp_path, images):
    with pytest.raises(FileNotFoundError, match="nothing"):
        reuse.load(tmp_path / "nothing")
    reuse.export(folder(), tmp_path / "out")
    weights = tmp_path / "out" / reuse.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[:200])
    with pytest.raises(ValueError, match="out holds no export"):
        reuse.load(tmp_path / "out")
    weights.write_bytes(whole)
    (tmp_path / "out" / reuse.CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        reuse.load(tmp_path / "out")


def test_a_folder_is_assigned_with_its_own_table(tmp_path):
    mine, out = tmp_path / "My Films", tmp_path / "assigned"
    mine.mkdir()
    films = phantom.make_phantoms(12, 3)[0]
    names = [f"film{number:02d}.png" for number in range(12)]
    for name, film in zip(names, films, strict=True):
        Image.fromarray(film).save(mine / name)
    pd.DataFrame({"file": names, "diagnosis": "COVID-19"}).to_csv(mine / "labels.csv", index=False)
    (mine / "other.csv").write_text("nothing\n", encoding="utf-8")
    model = reuse.load(folder())
    given = {"csv": "labels.csv", "image_column": "file", "label_column": "diagnosis"}
    table, novelty, text = reuse.assign_folder(mine, model, out, "the command", **given)
    expected = model.assign(films)
    assert table["cluster"].tolist() == expected.tolist()
    assert table["image_id"].tolist() == names
    assert table["far"].sum() == novelty.far.sum()
    pd.testing.assert_frame_equal(pd.read_csv(out / "assignments.csv"), table, rtol=1e-5)
    pd.testing.assert_frame_equal(pd.read_parquet(out / reuse.ASSIGNMENTS), table)
    assert (out / "summary.md").read_text(encoding="utf-8") == text
    for part in (model.name, "the command", novelty.sentence, "Not for clinical use."):
        assert part in text
    assert str(tmp_path) not in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    counts = {int(row[0].strip("| ")): int(row[1]) for row in rows}
    assert counts == dict(enumerate(np.bincount(expected, minlength=4)))
