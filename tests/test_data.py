"""lib.data: what is read of a finished data set, and its labels."""

import builtins
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import data
from lib.data import nih
from lib.data.preprocess import preprocess
from tests.xrays import make_folder


@pytest.fixture
def done(tmp_path):
    preprocess(make_folder(tmp_path / "in", 6), tmp_path / "out")
    return tmp_path / "out"


def test_training_opens_the_images_and_nothing_else(done, monkeypatch):
    opened, real = [], builtins.open

    def watched(*args, **options):
        opened.append(Path(args[0]))
        return real(*args, **options)

    monkeypatch.setattr(builtins, "open", watched)
    images = data.load_images(done)
    assert {path.name for path in opened} == {"images.npy"}
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
    ("name", "content", "word"),
    [
        ("images.npy", np.zeros((6, 64, 64), np.float32), "float32"),
        ("images.npy", np.zeros((6, 64, 32), np.uint8), "64, 32"),
        ("images.npy", np.zeros((0, 64, 64), np.uint8), "0, 64, 64"),
        ("images.npy", np.zeros((5, 64, 64), np.uint8), "6 rows.*5 images"),
        ("images.npy", "", "no array"),
        ("metadata.csv", "", "no CSV"),
        ("metadata.csv", "image_id,age\na,1\n", "no column patient_id, findings"),
    ],
)
def test_files_of_another_kind_are_refused(name, content, word, done):
    if isinstance(content, str):
        (done / name).write_text(content)
    else:
        np.save(done / name, content)
    with pytest.raises(ValueError, match=word):
        data.load(done)
    with pytest.raises(ValueError, match="manifest"):
        data.load(done, verify=True)


def test_labels():
    texts = ["Mass|Hernia", "No Finding", "", "COVID-19|Mass"]
    table = pd.DataFrame({"findings": texts}, index=[9, 8, 7, 6])
    assert data.label_set(table) == ("COVID-19", "Hernia", "Mass")
    assert data.label_set(table[1:3]) == ()
    assert data.label_set(pd.DataFrame({"findings": nih.FINDINGS[::-1]})) == nih.FINDINGS
    matrix = data.finding_matrix(table["findings"], ("Edema", "Hernia", "Mass"))
    assert matrix.dtype == bool
    assert matrix.astype(int).tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 1]]
    assert data.finding_matrix([], ("Edema",)).shape == (0, 1)
    assert data.finding_matrix(["Edema"], ()).shape == (1, 0)
    codes = data.label_combinations(pd.Series(["No Finding", "Mass", "", "Mass|Edema", "Mass"]))
    assert codes.dtype == np.int64
    assert codes.tolist() == [2, 0, -1, 1, 0]
    assert data.label_combinations([]).shape == (0,)


def test_an_image_of_no_known_patient_is_a_patient_of_its_own():
    table = pd.DataFrame({"patient_id": ["7", "", "7", "", None, "f"], "image_id": list("abcdef")})
    groups = data.patient_groups(table).tolist()
    assert groups == ["7", "image 1", "7", "image 3", "image 4", "f"]
    assert data.count_patients(table) == 1
