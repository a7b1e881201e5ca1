"""lib.data.tables and lib.data.nih: dialects, matching, the split, and published counts."""

import gzip
import itertools

import numpy as np
import pandas as pd
import pytest

from lib.data import finding_matrix, nih, tables
from tests.xrays import HEADER, SAMPLE

needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="no real sample (CXR_SAMPLE)")


def write(path, text, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def rows(path, *columns, **options):
    return tables.read_table(path, *columns, **options)[0].to_dict("records")


# -------------------------------------------------------------------------------------- to read

ROW = {
    "path": "00000001_000.png",
    "patient_id": "1",
    "findings": "Mass|Müller",
    "view_position": "PA",
    "age": "60",
    "sex": "F",
}
PLAIN = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position\n"
    "00000001_000.png,Mass|Müller,0,1,060Y,F,PA\n"
)
WIDE = PLAIN.replace("View Position", "View Position,OriginalImage[Width,Height],").replace(
    "PA\n", "PA,2000,2000,\n"
)
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
    "Macintosh line ends": PLAIN.replace("\n", "\r"),
    "semicolons": SEMICOLONS,
    "tabs": PLAIN.replace(",", "\t"),
    "bars": PLAIN.replace("Mass|Müller", '"Mass|Müller"').replace(",", "|"),
    "sep=;": "sep=;\r\n" + SEMICOLONS,
    "blank first line": "\n" + PLAIN,
    "empty cells in the first line": ";;;;;;\n\n" + SEMICOLONS,
    "UTF-16": PLAIN.encode("utf-16"),
    "UTF-16, big-endian": b"\xfe\xff" + PLAIN.encode("utf-16-be"),
    "UTF-16 without mark": PLAIN.encode("utf-16-le"),
    "Windows-1252": PLAIN.encode("cp1252"),
    "other order": "Sex,Path,AGE,finding_labels,view-position\n"
    "Female,.\\00000001_000.png,60.0,Mass|Müller,pa\n",
    "longer rows": PLAIN.replace("PA\n", "PA,,,,\n"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_say_the_same(dialect, tmp_path):
    found = rows(write(tmp_path / "t.csv", DIALECTS[dialect]))
    patient = "" if dialect == "other order" else "1"
    assert found == [ROW | {"patient_id": patient}]


def test_nih_2017_quirks(tmp_path):
    text = (
        "00000001_000.png,Cardiomegaly|Emphysema,0,1,057Y,M,pa,2682,2749,0.1,0.1,\n"
        "00000002_000.png,No Finding,0,00000002,,,,,,,,\n"
        "00000003_000.png,Pleural Thickening|infiltrate|Rib Fracture,0,3.0,414,Female,AP,1,1,,\n"
        "00000004_000.png,,0,,007M,f,AP\n"
        ",Mass,,,,,,,,,,\n,,,,,,,,,,,\n"
    )
    frame, notes = tables.read_table(write(tmp_path / "t.csv", HEADER + text))
    assert frame["patient_id"].tolist() == ["1", "2", "3", ""]
    assert frame["findings"].tolist() == [
        "Cardiomegaly|Emphysema",
        "No Finding",
        "Pleural_Thickening|Infiltration|Rib Fracture",
        "",
    ]
    assert frame["age"].tolist() == ["57", "", "", "0"]
    assert frame["sex"].tolist() == ["M", "", "F", "F"]
    assert notes == {"csv_rows_without_name": 1, "ages_set_missing": 1}


def test_ages():
    texts = ["57", "060Y", "58.0", "023M", "010W", "400D", "120", "121", "old", "-3"]
    assert [tables.clean_age(text) for text in texts] == [
        "57",
        "60",
        "58",
        "1",
        "0",
        "1",
        "120",
    ] + [""] * 3


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_columns_named_by_the_user(separator, tmp_path):
    inside = "Mass | rib fracture" if separator == ";" else '"Mass ; rib fracture, infiltrate"'
    text = "id,Scan,DX\n1,x/a.png,@\n2,b,\n".replace(",", separator).replace("@", inside)
    found = rows(write(tmp_path / "t.csv", text), "scan", "DX")
    assert [row["path"] for row in found] == ["x/a.png", "b"]
    assert found[0]["findings"].startswith("Mass|rib fracture")
    assert found[1]["findings"] == ""


def test_columns_that_are_not_there_are_named_with_those_that_are(tmp_path):
    table = write(tmp_path / "t.csv", "id,where,file,what\n1,x,a.png,Mass\n")
    for columns, words in (
        (("Scan", "what"), ("'Scan'", "--image-column")),
        (("file", "DX"), ("'DX'", "--label-column")),
        ((), ("'Finding Labels'", "--label-column")),
    ):
        with pytest.raises(ValueError, match="no column") as caught:
            tables.read_table(table, *columns)
        assert all(word in str(caught.value) for word in (*words, "t.csv", "'id', 'where'"))


def test_a_table_that_is_no_text_is_an_error(tmp_path):
    for text in ('image,findings\n"' + "x" * 200_000, b"image,findings\n\x81,Mass"):
        with pytest.raises(ValueError, match=r"t\.csv"):
            tables.read_table(write(tmp_path / "t.csv", text))


def test_truth_of_phantoms_is_kept_if_asked(tmp_path):
    table = write(tmp_path / "t.csv", "file,findings,side,Notes\na.png,Mass,L,secret\n")
    assert "side" not in rows(table)[0]
    assert rows(table, extra_columns=True)[0]["side"] == "L"
    assert "Notes" not in rows(table, extra_columns=True)[0]


def test_text_of_a_table_is_only_text(tmp_path):
    """Formulas, templates and words for nothing come out as they went in."""
    texts = ["=cmd' /C calc'!A0", "$(touch pwned)", "{0.__class__}", "NA", "null", "None", "1e5"]
    cells = pd.DataFrame({"file": [f"{i}.png" for i in range(len(texts))], "Patient ID": texts})
    cells.assign(findings=texts).to_csv(tmp_path / "t.csv", index=False)
    found = rows(tmp_path / "t.csv")
    assert [row["patient_id"] for row in found] == texts
    assert [row["findings"] for row in found] == texts


# --------------------------------------------------------------------------------------- to find


def found_in(folder, **files):
    for name, text in files.items():
        write(folder / f"{name.replace('_', ' ')}.csv", text)
    names = sorted(path.name for path in folder.iterdir())
    table = tables.find_metadata(folder, names)
    return table and table.name


def test_the_table_is_found_among_others(tmp_path):
    boxes = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Infiltrate,1,2,3,4\n"
    assert found_in(tmp_path, boxes=boxes) is None
    assert found_in(tmp_path, sizes="image,width\na.png,9\n") == "sizes.csv"
    assert found_in(tmp_path, mine="file;findings\na.png;Mass\n", x="a,b\n1,2\n") == "mine.csv"
    with pytest.raises(ValueError, match=r"2 tables.*mine\.csv, other\.csv.*--csv"):
        found_in(tmp_path, other="file,findings\na.png,Mass\n")
    write(tmp_path / "data_entry_2017.csv", PLAIN)
    assert found_in(tmp_path) == "data_entry_2017.csv"


def test_a_table_that_is_not_used_is_named_with_the_reason(tmp_path):
    with pytest.warns(UserWarning, match=r"labels\.csv has no column that names images.*bild"):
        assert found_in(tmp_path, labels="bild,befund\na.png,Mass\n") is None
    table = tables.find_metadata(tmp_path, ["labels.csv"], "bild")
    assert table == tmp_path / "labels.csv"
    write(tmp_path / "labels.xlsx", b"PK")
    with pytest.warns(UserWarning, match=r"labels\.xlsx.*labels\.csv"):
        assert found_in(tmp_path, labels=b"image,findings\n\x81\n") is None


# -------------------------------------------------------------------------------------- to match

FRONTAL = "train/patient1/study1/view1_frontal.jpg"
SECOND = "train/patient2/study1/view1_frontal.jpg"


@pytest.mark.parametrize(
    ("files", "paths", "expected"),
    [
        (["a.png", "b.png"], ["b.png", "a.png"], [[1], [0]]),
        (["a.png"], ["A"], [[0]]),
        (["a.png", "a.jpg"], ["a.jpg", "a"], [[1], [0]]),
        (["00000001.png", "00000012.png"], ["1", "12.0"], [[0], [1]]),
        (["x/a.png"], ["C:/data/x/a.png"], [[0]]),
        (["01.png", "001.png"], ["1"], [None, None]),
        (["1.png", "0001.png"], ["1"], [[0], None]),
        ([FRONTAL, SECOND], ["CheXpert-v1.0-small/" + SECOND, "x/" + FRONTAL], [[1], [0]]),
        ([FRONTAL, SECOND], ["/home/me/" + FRONTAL], [[0], None]),
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


def test_the_way_of_matching_is_counted():
    _found, ways = tables.match({"01.png": "01.png", "b.png": "b.png"}, ["1", "b.png"])
    assert ways == {"by name": 1, "without leading zeros": 1}


def test_a_table_of_other_images_is_no_success():
    images = {name: name for name in ("a.png", "b.png", "c.png")}
    with pytest.raises(ValueError, match=r"t\.csv.*'x\.png'.*'a\.png'"):
        tables.check_match("t.csv", images, ["x.png"], {})
    with pytest.warns(UserWarning, match=r"1 of 3.*'x\.png'.*'b\.png'"):
        tables.check_match("t.csv", images, ["a.png", "x.png"], {"a.png": [0]})
    tables.check_match("t.csv", images, ["a.png", "b.png"], {"a.png": [0], "b.png": [1]})


def test_rows_of_one_image_are_joined(tmp_path):
    text = (
        "image,findings,Patient ID,sex\na.png,Mass|Edema,,F\na.png,No Finding,7,M\n"
        "a.png,Hernia|Mass,8,\nb.png,No Finding,,\nb.png,No Finding,,\n00000003_001.png,,,\n"
    )
    table = tables.read_table(write(tmp_path / "t.csv", text))[0]
    found = {"a.png": [0, 1, 2], "b.png": [3, 4], "00000003_001.png": [5]}
    headers = [{}, {"patient_id": "sha256-1", "sex": "F", "age": "012M"}, {}, {"age": "old"}]
    frame = tables.join([*found, "d.png"], headers, table, found)
    assert frame.drop(columns="view_position").to_numpy().tolist() == [
        ["a.png", "7", "Mass|Edema|Hernia", "", "F"],
        ["b.png", "sha256-1", "No Finding", "1", "F"],
        ["00000003_001.png", "3", "", "", ""],
        ["d.png", "d.png", "", "", ""],
    ]


# -------------------------------------------------------------------------------------- to split


def patients(n, each=2):
    names = [f"{i // each + 1:08d}_{i % each:03d}.png" for i in range(n)]
    ids = [str(i // each + 1) for i in range(n)]
    return pd.DataFrame({"image_id": names, "patient_id": ids})


def test_split_is_by_patient_seeded_and_near_its_share():
    frame, drawn = patients(60), {}
    for seed in (0, 1):
        parts, split = tables.split_patients(frame, {}, seed)
        assert frame.assign(part=parts).groupby("patient_id")["part"].nunique().max() == 1
        assert (split["train"], split["test"], split["method"]) == (48, 12, "drawn by patient")
        drawn[seed] = [i for i in range(0, 60, 2) if parts[i] == "test"]
    assert drawn[0] == [6, 18, 30, 46, 50, 54]  # the draw itself must never change
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("n", "share", "test"), [(6, 0.01, 2), (6, 0.99, 4), (6, 0.0, 0), (2, 0.2, 0)]
)
def test_neither_part_is_empty_if_patients_allow_it(n, share, test):
    assert tables.split_patients(patients(n), {}, 0, share)[1]["test"] == test


def test_official_lists_are_used_when_both_parts_are_there(tmp_path):
    names = patients(8)["image_id"].tolist()
    write(tmp_path / "train_val_list.txt", "\n".join(names[:3]) + "\n")
    assert tables.read_lists(tmp_path, ["train_val_list.txt"]) == {}
    write(tmp_path / "test_list.txt", "\r\n".join([*names[4:6], "00009999_000.png"]))
    files = ["test_list.txt", "train_val_list.txt"]
    lists = tables.read_lists(tmp_path, files)
    parts, split = tables.split_patients(patients(8), lists, 0, test_share=0.0)
    # The second image of patient 2 follows its patient; patient 4 is in no list, and is drawn.
    assert parts == ["train"] * 4 + ["test"] * 2 + ["train"] * 2
    assert (split["method"], split["images_in_lists"]) == ("NIH's lists", 5)
    other = tables.split_patients(patients(4), lists, 0)[1]  # nothing of the test part
    assert other["method"] == "drawn by patient"
    both = dict(zip(names[:3], ("train", "test", "train"), strict=True))
    parts, split = tables.split_patients(patients(8), both, 0, test_share=0.0)
    assert parts[:2] == ["train", "test"]
    assert split["patients_on_both_sides"] == 1


# ---------------------------------------------------------------------------------- NIH's numbers


def published():
    """A table with exactly the published numbers."""
    texts = [nih.NO_FINDING] * nih.COUNTS[nih.NO_FINDING]
    pool = [name for name in nih.FINDINGS for _ in range(nih.COUNTS[name])]
    sick = nih.IMAGES - len(texts)
    texts += ["|".join(pool[start::sick]) for start in range(sick)]
    ids = np.minimum(np.arange(nih.IMAGES), nih.PATIENTS - 1).astype(str)
    names = [f"{i:08d}_000.png" for i in range(nih.IMAGES)]
    return pd.DataFrame({"path": names, "patient_id": ids, "findings": texts})


def test_findings_are_nihs_14_in_alphabetical_order():
    assert len(nih.FINDINGS) == 14
    assert list(nih.FINDINGS) == sorted(set(nih.COUNTS) - {nih.NO_FINDING})


def test_the_published_numbers_have_no_difference_and_any_other_is_named():
    full = published()
    assert nih.differences(full) == []
    assert nih.verify(list(full["path"]), full) == {"checked": True, "differences": []}
    changed = full.copy()
    changed.loc[0, "findings"] = "Hernia"
    changed.loc[1, "findings"] = "No Finding|Mass|Rib Fracture"
    changed.loc[2, "patient_id"] = "new"
    lines = nih.differences(changed.iloc[:-1])
    assert "images: 112,119, published 112,120 (-1)" in lines
    assert "No Finding: 60,360, published 60,361 (-1)" in lines
    assert any(line.startswith("Rib Fracture: 1 images") for line in lines)
    assert any(line.startswith("1 images have No Finding beside") for line in lines)
    assert not any("patients" in line for line in lines)  # one gone and one new


def test_what_is_as_large_as_the_full_set_is_checked():
    full, few = published(), ["00000001_000.png"]
    assert not nih.verify(few, full[:10])["checked"]
    assert not nih.verify(few, None)["checked"]
    assert "112,119 of the 112,120" in str(nih.verify(few, full))
    assert "no table" in str(nih.verify(list(full["path"]), None))
    assert "images: 100,000" in str(nih.verify(list(full["path"]), full[:100_000]))


@needs_sample
@pytest.mark.slow
def test_real_tables(tmp_path):
    early = gzip.decompress((SAMPLE / "all_labels.csv.gz").read_bytes())
    frame, notes = tables.read_table(write(tmp_path / "all.csv", early))
    assert len(frame) == nih.IMAGES
    assert frame["patient_id"].nunique() == nih.PATIENTS
    named = {line.partition(":")[0] for line in nih.differences(frame)}
    counts = finding_matrix(frame["findings"], nih.FINDINGS).sum(0)
    pairs = zip(nih.FINDINGS, counts, strict=True)
    assert named - {nih.NO_FINDING} == {name for name, n in pairs if n != nih.COUNTS[name]}
    first = gzip.decompress((SAMPLE / "Data_Entry_2017_first40k.csv.gz").read_bytes())
    frame, notes = tables.read_table(write(tmp_path / "first.csv", first))
    assert len(frame) == 40_000
    assert notes["ages_set_missing"] == (frame["age"] == "").sum()
    assert (set(frame["sex"]), set(frame["view_position"])) == ({"M", "F"}, {"PA", "AP"})
    labels = set(itertools.chain(*frame["findings"].str.split("|")))
    assert labels <= {*nih.FINDINGS, nih.NO_FINDING}
