"""lib.data.tables: a table with any columns, boxes, and the full data set held against its
published numbers.
"""

import gzip
import itertools

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib import data
from lib.data import tables
from tests.test_data import RAMP, SAMPLE, make_folder

needs_sample = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason="no real sample: set CXR_SAMPLE to a folder with NIH X-rays"
)


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def published():
    """A table with exactly the published numbers: findings in turn, and an image a patient but for
    the last.
    """
    texts = ["No Finding"] * tables.FULL_COUNTS["No Finding"]
    pool = [
        name for name, n in tables.FULL_COUNTS.items() if name != "No Finding" for _ in range(n)
    ]
    sick = tables.FULL_IMAGES - len(texts)
    texts += ["|".join(pool[start::sick]) for start in range(sick)]
    patients = np.minimum(np.arange(tables.FULL_IMAGES), tables.FULL_PATIENTS - 1).astype(str)
    return pd.DataFrame(
        {
            "image_id": [f"{i:08d}_000.png" for i in range(len(texts))],
            "patient_id": patients,
            "findings": texts,
        }
    )


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_named_by_the_user(delimiter, tmp_path):
    inside = " ; ".join(["Mass", "rib fracture"]) if delimiter != ";" else "Mass | rib fracture"
    table = write(
        tmp_path / "t.csv",
        f"id{delimiter}Scan{delimiter}DX\n1{delimiter}x/a.png{delimiter}{inside}\n2{delimiter}b{delimiter}\n",
    )
    frame, odd = tables.read_table(table, "scan", "DX")
    assert frame["image_id"].tolist() == ["a.png", "b"]
    assert frame["findings"].tolist() == ["Mass|rib fracture", ""]
    assert odd["unknown_findings"] == {"rib fracture": 1}


def test_labels_between_commas(tmp_path):
    table = write(tmp_path / "t.csv", 'scan,dx\na.png,"Mass, Infiltrate,pleural thickening"\n')
    assert tables.read_table(table, "scan", "dx")[0]["findings"].tolist() == [
        "Mass|Infiltration|Pleural_Thickening"
    ]


@pytest.mark.parametrize(
    ("columns", "option"),
    [(("Scan", "DX"), "--image-column 'Scan'"), (("id", "DX"), "--label-column 'DX'")],
)
def test_a_column_that_is_not_there_lists_those_that_are(columns, option, tmp_path):
    table = write(tmp_path / "t.csv", "id,where,what\n1,a.png,Mass\n")
    with pytest.raises(
        ValueError, match=rf"^{option}: t.csv has no such column; it has 'id', 'where', 'what'$"
    ):
        tables.read_table(table, *columns)


def test_a_table_from_anywhere_describes_a_folder(tmp_path):
    folder = make_folder(tmp_path / "in", 4)
    for name in ("a.csv", "b.csv"):
        write(folder / name, "image,findings\nx.png,Mass\n")
    (folder / "Data_Entry_2017.csv").unlink()
    table = write(tmp_path / "mine.csv", "scan,dx,Patient ID\n00000001_000.png,Hernia,77\n")
    with pytest.raises(ValueError, match="choose it with --csv"):
        data.fetch(folder, tmp_path / "raw")
    assert data.fetch(folder, tmp_path / "raw", csv=table)["csv"] == "mine.csv"
    options = {"csv": table, "image_column": "scan", "label_column": "dx"}
    manifest = data.preprocess(tmp_path / "raw", tmp_path / "out", **options)
    metadata = data.load(tmp_path / "out")[1]
    assert metadata.loc[0, ["patient_id", "findings"]].tolist() == ["77", "Hernia"]
    assert (manifest["images_without_csv_row"], manifest["other_files"]) == (3, {".csv": 2})
    write(table, "scan,dx\n00000001_000.png,Mass\n")  # another table: another result
    assert data.preprocess(tmp_path / "raw", tmp_path / "out", **options)["findings"] == {"Mass": 1}
    (folder / "a.csv").unlink()
    (folder / "b.csv").unlink()
    with pytest.raises(ValueError, match=r"a column is named \('dx'\), but there is no CSV"):
        data.preprocess(tmp_path / "raw", tmp_path / "out", label_column="dx")


def test_text_of_a_table_is_only_text(tmp_path, monkeypatch):
    """Formulas, commands and templates come out as they went in."""
    hostile = [
        "=cmd|' /C calc'!A0",
        "$(touch pwned)",
        "`id`",
        "{0.__class__}",
        "__import__('os').system('id')",
        "'; DROP TABLE x; --",
    ]
    (tmp_path / "in").mkdir()
    rows = [["Image Index", "Finding Labels", "Patient ID", "Patient Age"]]
    for number, text in enumerate(hostile):
        Image.fromarray(RAMP).save(tmp_path / "in" / f"{number}.png")
        rows.append([f"{number}.png", text.replace("|", "/"), text, text])
    pd.DataFrame(rows[1:], columns=rows[0]).to_csv(tmp_path / "in" / "t.csv", index=False)
    monkeypatch.chdir(tmp_path)
    for name in ("system", "popen"):
        monkeypatch.setattr(f"os.{name}", lambda *args: pytest.fail("a shell was called"))
    manifest = data.preprocess(tmp_path / "in", tmp_path / "out")
    metadata = data.load(tmp_path / "out")[1]
    assert metadata["patient_id"].tolist() == hostile
    assert metadata["findings"].tolist() == [text.replace("|", "/") for text in hostile]
    assert manifest["ages_set_missing"] == len(hostile)
    assert not (tmp_path / "pwned").exists()


# --------------------------------------------------------------------------------------------------


def test_boxes(tmp_path):
    text = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000002_000.png,Infiltrate,1.5,2,3,4,,,\n,,,,,,,,\na.png,Mass,0,0,1,1\n"
    boxes = tables.read_boxes(write(tmp_path / "BBox_List_2017.csv", text))
    assert boxes.to_dict("split")["data"] == [
        ["00000002_000.png", "Infiltration", 1.5, 2, 3, 4],
        ["a.png", "Mass", 0, 0, 1, 1],
    ]
    assert boxes.columns.tolist() == ["image_id", "finding", "x", "y", "w", "h"]


@pytest.mark.parametrize(
    "row", ["a.png,Mass,1,2,3", "a.png,Mass,1,2,3,nan", "a.png,Mass,1,2,-3,4", "a.png,Mass,x,2,3,4"]
)
def test_a_box_that_is_none_is_named_by_its_row(row, tmp_path):
    with pytest.raises(ValueError, match=r"b\.csv, row 3: .* is no box"):
        tables.read_boxes(
            write(
                tmp_path / "b.csv",
                f"Image Index,Finding Label,Bbox [x,y,w,h]\na.png,Mass,1,2,3,4\n{row}\n",
            )
        )
    with pytest.raises(ValueError, match=r"c\.csv is no list of boxes: .* has image, findings"):
        tables.read_boxes(write(tmp_path / "c.csv", "image,findings\n"))


@needs_sample
def test_real_boxes():
    boxes = tables.read_boxes(SAMPLE / "BBox_List_2017.csv")
    assert len(boxes) == 984
    assert boxes["image_id"].nunique() == 880
    assert set(boxes["finding"]) <= set(tables.FINDINGS)
    assert len(set(boxes["finding"])) == 8
    assert (boxes["x"] + boxes["w"]).max() <= 1024.5


# --------------------------------------------------------------------------------------------------


def test_the_published_numbers_have_no_difference_and_any_other_is_named():
    full = published()
    assert tables.compare_with_published(full) == []
    assert tables.verify_full_set("nih", [], full["image_id"], full) == {
        "checked": True,
        "differences": [],
    }
    changed = full.copy()
    changed.loc[0, "findings"] = "Hernia"
    changed.loc[1, "findings"] = "No Finding|Mass|Rib Fracture"
    changed.loc[2, "patient_id"] = "new"
    changed = changed.iloc[:-1]
    lost = full["findings"].iloc[-1].split("|")
    differences = tables.compare_with_published(changed)
    assert "images: 112,119, published 112,120 (-1)" in differences
    assert "No Finding: 60,360, published 60,361 (-1)" in differences
    assert "Rib Fracture: 1 images, and no such finding is published" in differences
    assert "1 images have No Finding beside a finding" in differences
    assert any(text.startswith("Hernia: ") for text in differences) or "Hernia" in lost
    assert not any("patients" in text for text in differences)  # one gone and one new
    assert any(
        "patients: 30,806" in text
        for text in tables.compare_with_published(
            full.assign(patient_id=[*full["patient_id"][:-1], "x"])
        )
    )


def test_who_claims_to_be_the_full_set_is_checked():
    full, few = published(), ["00000001_000.png"]
    parts = [f"images_{number:03d}/images/x.png" for number in range(1, 13)]
    assert not tables.verify_full_set("nih", parts[:11], few, full[:10])["checked"]
    assert not tables.verify_full_set("phantom", parts, few, full)["checked"]
    assert "112,119 of the 112,120 images of the table are not here" in str(
        tables.verify_full_set("nih", [], few, full)
    )
    assert "there is no table" in str(tables.verify_full_set("nih", parts, few, None))
    short = tables.verify_full_set("nih", parts, list(full["image_id"]), full[:100_000])[
        "differences"
    ]
    assert "images: 100,000, published 112,120 (-12,120)" in short


def test_a_difference_stands_in_the_manifest_and_is_warned_of(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FULL_IMAGES", 6)
    monkeypatch.setattr(tables, "FULL_PATIENTS", 3)
    monkeypatch.setattr(tables, "FULL_COUNTS", {"No Finding": 3, "Effusion": 3, "Mass": 2})
    with pytest.warns(
        UserWarning, match=r"not ChestX-ray14 as published: Mass: 3, published 2 \(\+1\)"
    ):
        manifest = data.preprocess(make_folder(tmp_path / "in", 6), tmp_path / "out")
    assert manifest["verification"] == {
        "checked": True,
        "differences": ["Mass: 3, published 2 (+1)"],
    }


@needs_sample
def test_an_early_release_of_the_labels_is_told_from_the_final_one(tmp_path):
    path = tmp_path / "all_labels.csv"
    path.write_bytes(gzip.decompress((SAMPLE / "all_labels.csv.gz").read_bytes()))
    frame, odd = tables.read_table(path)
    assert len(frame) == tables.FULL_IMAGES
    assert frame["patient_id"].nunique() == tables.FULL_PATIENTS
    assert odd["unknown_findings"] == {}
    differences = tables.verify_full_set("nih", [], frame["image_id"], frame)["differences"]
    named = {text.partition(":")[0] for text in differences}
    counted = data.finding_matrix(frame["findings"]).sum(0)
    expected = {
        name
        for name, n in zip(tables.FINDINGS, counted, strict=True)
        if n != tables.FULL_COUNTS[name]
    }
    assert named - {"No Finding"} == expected != set()


@needs_sample
def test_the_real_metadata_file(tmp_path):
    path = tmp_path / "Data_Entry_2017.csv"
    path.write_bytes(gzip.decompress((SAMPLE / "Data_Entry_2017_first40k.csv.gz").read_bytes()))
    frame, odd = tables.read_table(path)
    assert len(frame) == 40_000
    ages = tables.typed(frame)["age"]
    assert odd["ages_set_missing"] == ages.isna().sum()
    assert ages.max() <= 120
    assert set(frame["sex"]) == {"M", "F"}
    assert set(frame["view_position"]) == {"PA", "AP"}
    assert odd["unknown_findings"] == {}


def test_dialects_say_the_same(tmp_path):
    cells = {
        "index": "00000001_000.png",
        "labels": "Mass|Hernia",
        "age": "60",
        "sex": "F",
        "view": "PA",
    }
    headers = {
        "2017": (
            "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],",
            "60",
        ),
        "v2020": (
            "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Sex,View Position,OriginalImage[Width,Height]",
            "60",
        ),
        "sample": (
            "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImageWidth,",
            "060Y",
        ),
    }
    frames = []
    for name, (header, age) in headers.items():
        row = (
            f"{cells['index']},{cells['labels']},0,1,{age},{cells['sex']},{cells['view']},2000,2000"
        )
        frames.append(tables.read_table(write(tmp_path / f"{name}.csv", f"{header}\n{row}\n"))[0])
    for first, second in itertools.pairwise(frames):
        pd.testing.assert_frame_equal(first, second)
    assert frames[0].iloc[0].tolist() == ["00000001_000.png", "1", "Mass|Hernia", "PA", "60", "F"]
