"""lib.data.tables and lib.data.nih: dialects, matching, the split, and published counts."""

import pandas as pd
import pytest

from lib.data import nih, tables
from tests.xrays import HEADER


def write(path, text, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def rows(path, *columns, **options):
    return tables.read_table(path, *columns, **options)[0].to_dict("records")


ROW = {
    "path": "00000001_000.png", "patient_id": "1", "findings": "Mass|Müller",
    "view_position": "PA", "age": "60", "sex": "F",
}  # fmt: skip
PLAIN = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    "00000001_000.png,Mass|Müller,0,1,060Y,F,PA\n"
)
WIDE = PLAIN.replace("View Position", "View Position,OriginalImage[Width,Height],")
WIDE = WIDE.replace("PA\n", "PA,2000,2000,\n")
SEMICOLONS = (
    "Image Index;Finding Labels;Patient ID;Patient Age;Patient Gender;View Position;"
    "OriginalImage[Width,Height];\n00000001_000.png;Mass|Müller;1;60;F;PA;2000,2000;\n"
)
DIALECTS = {
    "plain": PLAIN,
    "2017": WIDE,
    "2020": WIDE.replace("Gender", "Sex").replace("060Y", "60"),
    "byte order mark": "\ufeff" + PLAIN,
    "Windows line ends": PLAIN.replace("\n", "\r\n"),
    "semicolons": SEMICOLONS,
    "tabs": PLAIN.replace(",", "\t"),
    "bars": PLAIN.replace("Mass|Müller", '"Mass|Müller"').replace(",", "|"),
    "sep=;": "sep=;\r\n" + SEMICOLONS,
    "empty cells in the first line": ";;;;;;\n\n" + SEMICOLONS,
    "UTF-16": PLAIN.encode("utf-16"),
    "UTF-16 without mark": PLAIN.encode("utf-16-le"),
    "Windows-1252": PLAIN.encode("cp1252"),
    "other order": "Sex,Path,AGE,finding_labels,view-position,patient\n"
    "Female,.\\00000001_000.png,60.0,Mass|Müller,pa,1.0\n",
    "longer rows": PLAIN.replace("PA\n", "PA,,,,\n"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_say_the_same(dialect, tmp_path):
    assert rows(write(tmp_path / "t.csv", DIALECTS[dialect])) == [ROW]


def test_nih_2017_quirks(tmp_path):
    text = (
        "00000001_000.png,Cardiomegaly|Emphysema,0,1,057Y,M,pa,2682,2749,0.1,0.1,\n"
        "00000002_000.png,No Finding,0,00000002,,,,,,,,\n"
        "00000003_000.png,Pleural Thickening|infiltrate|Rib Fracture,0,3.0,414,Female,AP,1,1,,\n"
        "00000004_000.png,,0,,007M,f,AP\n"
        ",Mass,,,,,,,,,,\n,,,,,,,,,,,\n"
    )
    frame, counts = tables.read_table(write(tmp_path / "t.csv", HEADER + text))
    assert frame[["patient_id", "findings", "age", "sex"]].to_numpy().tolist() == [
        ["1", "Cardiomegaly|Emphysema", "57", "M"],
        ["2", "No Finding", "", ""],
        ["3", "Pleural_Thickening|Infiltration|Rib Fracture", "", "F"],
        ["", "", "0", "F"],
    ]
    assert counts == {"ages_set_missing": 1}
    texts, years = "57 060Y 58.0 023M 010W 400D 120 121 old -3", "57 60 58 1 0 1 120"
    assert [tables.clean_age(text) for text in texts.split()] == [*years.split(), "", "", ""]


def test_columns_named_by_the_user_and_those_that_are_not_there(tmp_path):
    text = 'id;Scan;DX\n1;x/a.png;"Mass ; rib fracture, infiltrate"\n2;b;\n'
    found = rows(write(tmp_path / "t.csv", text), "scan", "DX")
    assert [row["path"] for row in found] == ["x/a.png", "b"]
    assert [row["findings"] for row in found] == ["Mass|rib fracture|Infiltration", ""]
    table = write(tmp_path / "t.csv", "id,where,file,what\n1,x,a.png,Mass\n")
    for columns, word in (
        (("Scan", "what"), "'Scan'.*--image-column"),
        (("file", "DX"), "'DX'.*--label-column"),
        ((), "'Finding Labels'.*--label-column"),
    ):
        with pytest.raises(ValueError, match=rf"t\.csv has no column {word}.*'id', 'where'"):
            tables.read_table(table, *columns)
    for text in ('image,findings\n"' + "x" * 200_000, b"image,findings\n\x81,Mass"):
        with pytest.raises(ValueError, match=r"t\.csv"):
            tables.read_table(write(tmp_path / "t.csv", text))


def test_text_of_a_table_is_only_text(tmp_path):
    """Formulas, templates and words for nothing come out as they went in; truth only if asked."""
    texts = ["=cmd' /C calc'!A0", "$(touch pwned)", "{0.__class__}", "NA", "null", "None", "1e5"]
    cells = pd.DataFrame({"file": [f"{i}.png" for i in range(len(texts))], "Patient ID": texts})
    cells.assign(findings=texts, side="L", Notes="x").to_csv(tmp_path / "t.csv", index=False)
    found = rows(tmp_path / "t.csv")
    assert [row["patient_id"] for row in found] == [row["findings"] for row in found] == texts
    assert "side" not in found[0]
    more = rows(tmp_path / "t.csv", extra_columns=True)[0]
    assert (more["side"], more.get("Notes")) == ("L", None)


def found_in(folder, **files):
    for name, text in files.items():
        write(folder / f"{name}.csv", text)
    table = tables.find_metadata(folder, sorted(path.name for path in folder.iterdir()))
    return table and table.name


def test_the_table_is_found_among_others(tmp_path):
    boxes = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Infiltrate,1,2,3,4\n"
    assert found_in(tmp_path, boxes=boxes) is None
    assert found_in(tmp_path, sizes="image,width\na.png,9\n") == "sizes.csv"
    assert found_in(tmp_path, mine="file;findings\na.png;Mass\n", x="a,b\n1,2\n") == "mine.csv"
    with pytest.raises(ValueError, match=r"2 tables.*mine\.csv, other\.csv.*--csv"):
        found_in(tmp_path, other="file,findings\na.png,Mass\n")
    assert found_in(tmp_path, data_entry_2017=PLAIN) == "data_entry_2017.csv"


def test_a_table_that_is_not_used_is_named_with_the_reason(tmp_path):
    with pytest.warns(UserWarning, match=r"labels\.csv has no column that names images.*bild"):
        assert found_in(tmp_path, labels="bild,befund\na.png,Mass\n") is None
    table = tables.find_metadata(tmp_path, ["labels.csv"], "bild")
    assert table == tmp_path / "labels.csv"
    write(tmp_path / "labels.xlsx", b"PK")
    with pytest.warns(UserWarning, match=r"labels\.xlsx.*labels\.csv"):
        assert found_in(tmp_path, labels=b"image,findings\n\x81\n") is None


FRONTAL = "train/patient1/study1/view1_frontal.jpg"
SECOND = "train/patient2/study1/view1_frontal.jpg"


@pytest.mark.parametrize(
    ("files", "paths", "expected"),
    [
        *((["a.png", "b.png"], ["b.png", "a.png"], [[1], [0]]), (["a.png"], ["A"], [[0]])),
        *((["a.png", "a.jpg"], ["a.jpg", "a"], [[1], [0]]), (["x/a.png"], ["C:/x/a.png"], [[0]])),
        (["00000001.png", "00000012.png"], ["1", "12.0"], [[0], [1]]),
        (["01.png", "001.png"], ["1"], [None, None]),
        (["1.png", "0001.png"], ["1"], [[0], None]),
        ([FRONTAL, SECOND], ["CheXpert-v1.0-small/" + SECOND, "x/" + FRONTAL], [[1], [0]]),
        ([FRONTAL, SECOND], ["/films/" + FRONTAL], [[0], None]),
        (["data/" + FRONTAL, "data/" + SECOND], [SECOND], [None, [0]]),
        (["images_001/images/a.png"], ["/elsewhere/a.png"], [[0]]),
        (["p1/a.png", "p2/a.png"], ["a.png"], [None, None]),
        (["p2/a.png"], ["p1/a.png", "p2/a.png"], [[1]]),
        (["a.png"], ["x/a.png", "y/a.png"], [None]),
        (["a.png", "b.png"], ["a.png", "a.png", "c.png"], [[0, 1], None]),
        (["IM0001", "1.2.840.7"], ["IM0001.dcm", "1.2.840.7"], [[0], [1]]),
    ],
)
def test_rows_belong_to_the_image_with_the_longest_common_end(files, paths, expected):
    found, ways = tables.match(dict(zip(files, files, strict=True)), paths)
    assert [found.get(file) for file in files] == expected
    assert sum(ways.values()) == len(found)


def test_rows_of_one_image_are_joined(tmp_path):
    text = (
        "image,findings,Patient ID,sex\na.png,Mass|Edema,,F\na.png,No Finding,7,M\n"
        "a.png,Hernia|Mass,8,\nb.png,No Finding,,\nb.png,No Finding,,\n00000003_001.png,,,\n"
    )
    table = tables.read_table(write(tmp_path / "t.csv", text))[0]
    found = {"a.png": [0, 1, 2], "b.png": [3, 4], "00000003_001.png": [5]}
    header = {"patient_id": "sha256-1", "sex": "F", "age": "012M"}
    records = {"a.png": {}, "b.png": header, "00000003_001.png": {}, "d.png": {"age": "old"}}
    frame = tables.join(records, table, found)
    assert frame.drop(columns="view_position").to_numpy().tolist() == [
        ["a.png", "7", "Mass|Edema|Hernia", "", "F"],
        ["b.png", "sha256-1", "No Finding", "1", "F"],
        ["00000003_001.png", "3", "", "", ""],
        ["d.png", "d.png", "", "", ""],
    ]


def patients(n, each=2):
    names = [f"{i // each + 1:08d}_{i % each:03d}.png" for i in range(n)]
    empty = dict.fromkeys(nih.COLUMNS[2:-1], "")
    ids = [str(i // each + 1) for i in range(n)]
    return pd.DataFrame({"image_id": names, "patient_id": ids} | empty)


def split(frame, lists=None, seed=0):
    frame, facts = tables.split_patients(frame, lists or {}, seed)
    return frame["split"].tolist(), facts


def test_split_is_by_patient_seeded_and_near_its_share():
    drawn = {}
    for seed in (0, 1):
        parts, facts = split(patients(60), seed=seed)
        assert patients(60).assign(part=parts).groupby("patient_id")["part"].nunique().max() == 1
        assert (facts["train"], facts["test"], facts["method"]) == (48, 12, "drawn by patient")
        drawn[seed] = [i for i in range(0, 60, 2) if parts[i] == "test"]
    assert drawn[0] == [6, 18, 30, 46, 50, 54]  # the draw itself must never change
    assert drawn[0] != drawn[1]
    for n, test in ((4, 2), (1, 0)):  # neither part is empty if patients allow it
        assert split(patients(n))[1]["test"] == test


def test_official_lists_are_used_when_both_parts_are_there(tmp_path, monkeypatch):
    names = patients(8)["image_id"].tolist()
    write(tmp_path / "train_val_list.txt", "\n".join(names[:3]) + "\n")
    assert tables.read_lists(tmp_path, ["train_val_list.txt"]) == {}
    write(tmp_path / "test_list.txt", "\r\n".join([*names[4:6], "00009999_000.png"]))
    lists = tables.read_lists(tmp_path, ["test_list.txt", "train_val_list.txt"])
    monkeypatch.setattr(tables, "TEST_SHARE", 0.0)
    parts, facts = split(patients(8), lists)
    # The second image of patient 2 follows its patient; patient 4 is in no list, and is drawn.
    assert parts == ["train"] * 4 + ["test"] * 2 + ["train"] * 2
    assert facts["method"] == "NIH's lists"
    other = split(patients(4), lists)[1]  # nothing of the test part
    assert other["method"] == "drawn by patient"
    both = dict(zip(names[:3], ("train", "test", "train"), strict=True))
    with pytest.warns(UserWarning, match="1 patients are in both lists"):
        parts, facts = split(patients(8), both)
    assert parts[:2] == ["train", "test"]
    assert facts["patients_on_both_sides"] == 1


def test_any_difference_from_the_published_numbers_is_named(monkeypatch):
    assert len(nih.FINDINGS) == 14
    assert list(nih.FINDINGS) == sorted(nih.FINDINGS)
    counts = {"Mass": 1, "Hernia": 1, "No Finding": 2}
    for name, value in {"IMAGES": 3, "PATIENTS": 2, "COUNTS": counts}.items():
        monkeypatch.setattr(nih, name, value)
    names, findings = ["a.png", "b.png", "c.png"], ["Mass|Hernia", "No Finding", "No Finding"]
    full = pd.DataFrame({"path": names, "patient_id": ["1", "1", "2"], "findings": findings})
    assert nih.verify("nih", names, full) == {"checked": True, "differences": []}
    assert not nih.verify("nih", names[:2], full[:2])["checked"]
    assert not nih.verify("nih", names[:2], None)["checked"]
    assert not nih.verify("folder", names, full)["checked"]
    other, added = ["Mass|Effusion", "Hernia", "No Finding"], "Effusion: 1, published 0 (+1)"
    for ids, table, lines in (
        (names[:1], full, ["images read: 1, published 3 (-2)"]),
        (names, None, ["there is no table Data_Entry_2017.csv"]),
        (names, full.assign(patient_id="1"), ["patients: 1, published 2 (-1)"]),
        (names, full.assign(findings=other), ["No Finding: 1, published 2 (-1)", added]),
    ):
        with pytest.warns(UserWarning, match="this is not ChestX-ray14 as published"):
            assert nih.verify("nih", ids, table)["differences"] == lines
