"""lib.data: what is read of a finished data set, and its labels."""

import builtins
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import data
from lib.data import nih, sources
from lib.data.preprocess import preprocess
from tests.xrays import make_folder


@pytest.fixture
def done(tmp_path):
    preprocess(make_folder(tmp_path / "in", 6), tmp_path / "out")
    return tmp_path / "out"


def test_training_opens_the_images_and_nothing_else(done, monkeypatch):
    opened, real = [], builtins.open
    monkeypatch.setattr(
        builtins,
        "open",
        lambda file, *a, **k: opened.append(os.fspath(file)) or real(file, *a, **k),
    )
    images = data.load_images(done)
    assert {Path(file).name for file in opened} == {"images.npy"}
    assert isinstance(images, np.memmap)
    assert not images.flags.writeable


def test_missing_files_name_the_step_to_run(done):
    (done / "metadata.csv").unlink()
    data.load_images(done, verify=True)
    for call in (lambda: data.load(done), lambda: data.load_images(done / "nowhere")):
        with pytest.raises(ValueError, match="run 01_preprocess"):
            call()
    (done / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest.*run 01_preprocess"):
        data.load_images(done, verify=True)


@pytest.mark.parametrize(
    ("array", "word"),
    [
        (np.zeros((6, 64, 64), np.float32), "float32"),
        (np.zeros((6, 64, 32), np.uint8), "64, 32"),
        (np.zeros((0, 64, 64), np.uint8), "0, 64, 64"),
        (np.zeros((5, 64, 64), np.uint8), "6 rows.*5 images"),
    ],
)
def test_arrays_of_another_kind_are_refused(array, word, done):
    np.save(done / "images.npy", array)
    with pytest.raises(ValueError, match=word):
        data.load(done)


def test_changed_files_are_found(done):
    raw = bytearray((done / "images.npy").read_bytes())
    raw[-1] ^= 1
    (done / "images.npy").write_bytes(raw)
    data.load_images(done)
    with pytest.raises(ValueError, match="manifest"):
        data.load_images(done, verify=True)
    for content in (b"text", b""):
        (done / "images.npy").write_bytes(content)
        with pytest.raises(ValueError, match="no array"):
            data.load_images(done)


def test_a_metadata_file_of_another_kind_is_refused(done):
    for text, word in (("", "no CSV"), ("image_id,age\na,1\n", "no column patient_id, findings")):
        (done / "metadata.csv").write_text(text)
        with pytest.raises(ValueError, match=word):
            data.load(done)


def test_phantoms_come_back_with_their_ground_truth(tmp_path):
    sources.fetch("phantom", tmp_path / "raw", n_phantoms=12, seed=3)
    manifest = preprocess(tmp_path / "raw", tmp_path / "out")
    images, metadata = data.load(tmp_path / "out", verify=True)
    assert (manifest["source"]["kind"], manifest["source"]["seed"]) == ("phantom", 3)
    assert manifest["attribution"] == sources.ATTRIBUTIONS["phantom"]
    assert len(images) == 12
    kinds = {"side": "O", "angle": "f", "mirrored": "b", "age": "f"}
    for name, kind in kinds.items():
        assert metadata[name].to_numpy().dtype.kind in kind
    assert set(metadata["side"]) <= {"L", "R", "B", ""}


def test_label_set():
    table = pd.DataFrame({"findings": ["Mass|Hernia", "No Finding", "", "COVID-19|Mass"]})
    assert data.label_set(table) == ("COVID-19", "Hernia", "Mass")
    assert data.label_set(table[1:3]) == ()
    assert data.label_set(pd.DataFrame({"findings": nih.FINDINGS[::-1]})) == nih.FINDINGS


def test_finding_matrix():
    texts = pd.Series(["Mass|Hernia", "No Finding", "", "Rib Fracture|Edema"], index=[9, 8, 7, 6])
    matrix = data.finding_matrix(texts, ("Edema", "Hernia", "Mass"))
    assert matrix.dtype == bool
    assert matrix.astype(int).tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    assert data.finding_matrix([], ("Edema",)).shape == (0, 1)
    assert data.finding_matrix(["Edema"], ()).shape == (1, 0)


def test_label_combinations():
    codes = data.label_combinations(pd.Series(["No Finding", "Mass", "", "Mass|Edema", "Mass"]))
    assert codes.dtype == np.int64
    assert codes.tolist() == [2, 0, -1, 1, 0]
    assert data.label_combinations([]).shape == (0,)


def test_an_image_of_no_known_patient_is_a_patient_of_its_own():
    table = pd.DataFrame({"patient_id": ["7", "", "7", "", None, "f"], "image_id": list("abcdef")})
    groups = data.patient_groups(table).tolist()
    assert groups == ["7", "image 1", "7", "image 3", "image 4", "f"]
    assert data.count_patients(table) == 1
