"""A finished run used again: the same numbers as in training, from the export too; errors that
quote; far images are called far.
"""

import json
import re

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
import safetensors
from PIL import Image

from lib import data, paths, runs
from lib.data.phantom import make_phantoms
from lib.explore import reuse
from lib.run import Options, parse_args
from lib.run import main as run_main
from tests import finished


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("reuse")


@pytest.fixture(scope="module")
def images(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXR_DATA_DIR", str(root))
        return np.array(finished.make())


@pytest.fixture(autouse=True)
def _here(root, images, monkeypatch):
    monkeypatch.setenv("CXR_DATA_DIR", str(root))
    monkeypatch.setenv("CXR_CALLED_FROM", str(root))


def folder(arm="p4m"):
    return paths.run_dir(finished.DATASET, arm, 0)


@pytest.mark.parametrize("arm", ["alexnet", "p4m"])
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


@pytest.mark.parametrize("arm", ["alexnet", "p4m"])
def test_export_holds_the_same_model(arm, images, tmp_path):
    written = reuse.export(folder(arm), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in written}
    one, other = reuse.load(folder(arm)), reuse.load(tmp_path / "out")
    new = make_phantoms(20, 5)[0]
    np.testing.assert_array_equal(one.embed(new), other.embed(new))
    np.testing.assert_array_equal(one.assign(new), other.assign(new))
    assert one.novelty(new).sentence == other.novelty(new).sentence
    np.testing.assert_array_equal(one.sizes, other.sizes)


def test_every_exported_file_says_what_it_is(images, tmp_path):
    reuse.export(folder(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    with safetensors.safe_open(tmp_path / "model.safetensors", "numpy") as weights:
        notes = [config, weights.metadata()]
    tables = [
        pyarrow.parquet.read_table(tmp_path / name)
        for name in (reuse.ASSIGNMENTS, reuse.EMBEDDINGS)
    ]
    notes += [
        {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        for table in tables
    ]
    for note in notes:
        assert note["notice"] == "Not for clinical use."
        assert note["attribution"] == data.PHANTOM_ATTRIBUTION
        assert note["dataset"] == "synthetic phantom, 72 images"
    assignments, embeddings = (table.to_pydict() for table in tables)
    ids = data.load(paths.dataset_dir(finished.DATASET))[1]["image_id"].tolist()
    assert assignments["image_id"] == embeddings["image_id"] == ids
    run = runs.load_run(folder())
    assert assignments["cluster"] == run.final_assignments.tolist()
    np.testing.assert_allclose(
        embeddings["embedding"], runs.embed(run, np.asarray(run.features)), atol=1e-4
    )
    assert not {"patient_id", "findings", "age", "sex"} & (set(assignments) | set(embeddings))
    assert str(tmp_path) not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert pd.read_parquet(tmp_path / reuse.ASSIGNMENTS).shape == (72, 3)


def test_export_of_other_images_is_refused(images, tmp_path):
    data.fetch("phantom", tmp_path / "raw", 72, 1)
    data.preprocess(tmp_path / "raw", tmp_path / "other")
    with pytest.raises(ValueError, match=r"other holds other images than .*seed0 clustered"):
        reuse.export(folder(), tmp_path / "out", tmp_path / "other")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is the run itself"):
        reuse.export(folder(), folder())


GRAY = np.zeros((2, 64, 64), np.uint8)
HOLE = np.zeros((2, 64, 64), np.float32)
HOLE[1, 3, 4] = np.nan


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 32, 32), np.uint8), r"got shape \(3, 32, 32\)"),
        (np.zeros((3, 64, 64, 3), np.uint8), r"got shape \(3, 64, 64, 3\)"),
        (GRAY[0], r"one image of shape \(64, 64\): give images\[None\]"),
        (GRAY[:0], r"got shape \(0, 64, 64\)"),
        (np.full((1, 64, 64), -0.5, np.float32), r"got float32 from -0.5 to -0.5"),
        (GRAY.astype(np.int64) + 7, r"got int64 from 7 to 7"),
        (HOLE, r"value at \(1, 3, 4\) is nan"),
        (np.full((1, 64, 64), np.inf), r"value at \(0, 0, 0\) is inf"),
        ("x.png", r"got <U5"),
    ],
)
def test_wrong_images_are_quoted(given, message):
    model = reuse.load(folder())
    for method in (model.embed, model.assign, model.novelty):
        with pytest.raises(ValueError, match=message):
            method(given)


def test_far_images_are_called_far_and_the_runs_own_are_not(images):
    model = reuse.load(folder())
    own = model.novelty(images)
    assert own.share <= own.expected < 0.1
    assert "no more than chance" in own.sentence
    noise = model.novelty(np.random.default_rng(0).integers(0, 256, (40, 64, 64)).astype(np.uint8))
    assert noise.share > max(reuse.MANY, 5 * own.expected)
    assert noise.p < 1e-6
    assert "unlike what the run has seen" in noise.sentence
    assert noise.distance.shape == noise.spread.shape == (40,)


def test_broken_and_missing_folders_are_named(tmp_path, images):
    with pytest.raises(FileNotFoundError, match="nothing holds no finished run"):
        reuse.load(tmp_path / "nothing")
    reuse.export(folder(), tmp_path)
    weights = (tmp_path / reuse.WEIGHTS).read_bytes()
    (tmp_path / reuse.WEIGHTS).write_bytes(weights[:200])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        reuse.load(tmp_path)
    (tmp_path / reuse.WEIGHTS).write_bytes(weights)
    config = json.loads((tmp_path / reuse.CONFIG).read_text(encoding="utf-8"))
    (tmp_path / reuse.CONFIG).write_text(json.dumps(config | {"format": 9}), encoding="utf-8")
    with pytest.raises(ValueError, match="is of format 9, this code reads 1"):
        reuse.load(tmp_path)
    (tmp_path / reuse.CONFIG).unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        reuse.load(tmp_path)


def test_a_folder_is_assigned_from_the_command_line(root, images, capsys):
    mine = root / "My Films"
    mine.mkdir()
    for number, image in enumerate(make_phantoms(12, 3)[0]):
        Image.fromarray(image).resize((128, 128), Image.Resampling.NEAREST).save(
            mine / f"film{number:02d}.png"
        )
    status = run_main(["--data", "My Films", "--reuse", "phantom-tiny/p4m/seed0"])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    out = root / "runs" / "my-films" / "reuse" / "phantom-tiny-p4m-seed0"
    table = pd.read_csv(out / "assignments.csv")
    expected = reuse.load(folder()).assign(make_phantoms(12, 3)[0])
    assert table["cluster"].tolist() == expected.tolist()
    assert table["image_id"].tolist() == [f"film{number:02d}.png" for number in range(12)]
    assert (
        pyarrow.parquet.read_table(out / reuse.ASSIGNMENTS).column("cluster").to_pylist()
        == expected.tolist()
    )
    text = (out / "summary.md").read_text(encoding="utf-8")
    assert text in shown.out
    assert "12 images in the clusters of phantom-tiny/p4m/seed0" in text
    assert "of 12 images" in text
    assert "Not for clinical use." in text
    assert str(root) not in text
    counts = {
        int(row[0]): int(row[1])
        for row in re.findall(r"^\| (\d+) \| ([\d,]+) \|", text, re.MULTILINE)
    }
    assert counts == dict(enumerate(np.bincount(expected, minlength=4)))


def test_the_export_is_a_run_for_the_command_line(root, images, capsys):
    assert reuse.main(["--reuse", "phantom-tiny/alexnet/seed0", "--export", "shared-run"]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert reuse.find_run("shared-run", root) == root / "shared-run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--reuse", "phantom-tiny/p4m/seed9", "--data", "."],
            "seed9' is no run; finished runs: phantom-tiny/alexnet/seed0, ",
        ),
        (
            ["--reuse", "phantom-tiny/p4m/seed0", "--data", "nowhere"],
            "--data 'nowhere' is not there",
        ),
        (
            ["--reuse", "phantom-tiny/p4m/seed0", "--data", "phantom"],
            "not --data phantom: give its path",
        ),
        (["--reuse", "phantom-tiny/p4m/seed0"], "one of the arguments --data --export is required"),
        (["--data", "."], "--reuse"),
    ],
)
def test_bad_options_say_what_is_wrong(arguments, message, capsys):
    assert reuse.main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_run_hands_the_command_line_over():
    arguments = ["--data", "x", "--reuse", "phantom/p4m/seed0"]
    assert parse_args(arguments) == Options(reuse=tuple(arguments))
