"""lib.data.preprocess: what becomes of a folder, bad input, and interruption at any point."""

import errno
import hashlib
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from lib import data, paths
from lib.data import decode, nih, preprocess
from tests.xrays import RAMP, REPORT, SAMPLE, dicom, make_folder, needs_pydicom, needs_sample, ramps

FILES = ("images.npy", "metadata.csv", "manifest.json")


def run(folder, out=None, **options):
    """The manifest, and the table by image_id."""
    out = out or folder.parent / "out"
    manifest = preprocess.preprocess(folder, out, **options)
    return manifest, data.load(out, verify=True)[1].set_index("image_id", drop=False)


def digest(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def gray(path):
    return np.asarray(Image.open(path).convert("L"))


def test_a_folder_in_nihs_layout(tmp_path):
    folder = make_folder(tmp_path / "in", 6)
    manifest, metadata = run(folder)
    assert list(metadata.columns) == list(nih.COLUMNS)
    assert metadata["image_id"].tolist() == sorted(path.name for path in folder.rglob("*.png"))
    assert metadata["patient_id"].tolist() == ["1", "1", "2", "2", "3", "3"]
    assert metadata["findings"].tolist() == ["Effusion|Mass", "No Finding"] * 3
    assert manifest["source"] == {"kind": "nih", "csv": "Data_Entry_2017.csv"}
    assert manifest["patients"] == 3
    assert manifest["findings"] == {"Effusion": 3, "Mass": 3, "No Finding": 3}
    assert manifest["attribution"] == nih.ATTRIBUTION
    assert not manifest["verification"]["checked"]
    for name, file in manifest["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for name, image in zip(metadata["image_id"], data.load_images(tmp_path / "out"), strict=True):
        np.testing.assert_array_equal(image, gray(folder / "images_001" / "images" / name))


def test_a_folder_of_ones_own_without_a_table(tmp_path):
    ramps(tmp_path / "in", "a.png", "b.PNG", "._c.png", "__MACOSX/d.png", ".hidden/e.png")
    manifest, metadata = run(tmp_path / "in")
    assert metadata["image_id"].tolist() == ["a.png", "b.PNG"]
    assert manifest["source"] == {"kind": "folder", "csv": None}
    assert (manifest["patients"], manifest["images_without_csv_row"]) == (0, 2)
    assert "NIH" not in manifest["attribution"]
    assert set(metadata["findings"]) == {""}
    assert sorted(metadata["split"]) == ["test", "train"]


def test_images_and_rows_need_not_match(tmp_path):
    folder = make_folder(tmp_path / "in", 6)
    images = folder / "images_001" / "images"
    (images / "00000001_000.png").unlink()
    os.rename(images / "00000002_001.png", images / "00000002_001.PNG")
    ramps(folder, "00000777_000.png", "holiday.jpg")
    manifest, metadata = run(folder)
    counts = ("images", "csv_rows", "csv_rows_without_image", "images_without_csv_row")
    assert [manifest[name] for name in counts] == [7, 6, 1, 2]
    assert metadata.loc["00000777_000.png", ["patient_id", "findings"]].tolist() == ["777", ""]
    assert metadata.loc["holiday.jpg", "patient_id"] == "holiday.jpg"
    assert metadata.loc["00000002_001.PNG", "findings"] == "No Finding"


def test_labels_and_columns_of_ones_own(tmp_path):
    ramps(tmp_path / "in", *(f"{i:08d}.png" for i in range(4)))
    rows = [f"{i};{label}\n" for i, label in enumerate(["COVID-19", "Normal"] * 2)]
    (tmp_path / "in" / "labels.csv").write_text("sep=;\nfile;diagnosis\n" + "".join(rows))
    options = {"csv": "labels.csv", "label_column": "diagnosis"}  # a path within the folder
    manifest, metadata = run(tmp_path / "in", **options)
    assert metadata["findings"].tolist() == ["COVID-19", "Normal"] * 2
    assert manifest["images_matched"] == {"without leading zeros": 4}
    assert data.label_set(metadata) == ("COVID-19", "Normal")
    (tmp_path / "in" / "labels.csv").unlink()
    for option, value in {"csv": "x", "label_column": "x", "fit": "x", "max_broken": 1.1}.items():
        with pytest.raises(ValueError, match=f"no such file|no table|{option}"):
            run(tmp_path / "in", **{option: value})


def test_a_table_that_matches_few_images_or_none_is_no_success(tmp_path):
    folder = ramps(tmp_path / "in", "a.png", "b.png", "c.png")
    (folder / "t.csv").write_text("file,findings\nx.png,Mass\n")
    with pytest.raises(ValueError, match=r"t\.csv .* none of 3 images.*'x\.png'.*'a\.png'"):
        run(folder)
    (folder / "t.csv").write_text("file,findings\na.png,Hernia\nx.png,Mass\n")
    with pytest.warns(UserWarning, match=r"1 of 3.*'x\.png'.*'b\.png'"):
        assert run(folder)[1].loc["a.png", "findings"] == "Hernia"


def test_names_that_are_repeated_or_that_no_csv_can_hold(tmp_path):
    folder = make_folder(tmp_path / "in", 4)
    ramps(folder, "images_002/00000001_000.png", "p1/frontal.png", "p2/frontal.png")
    with pytest.warns(UserWarning, match="1 images were left out"):
        manifest, metadata = run(folder)
    assert [item["file"] for item in manifest["dropped"]] == ["images_002/00000001_000.png"]
    assert metadata["image_id"].tolist()[-2:] == ["p1/frontal.png", "p2/frontal.png"]
    first = gray(folder / "images_001/images/00000001_000.png")
    np.testing.assert_array_equal(data.load_images(tmp_path / "out")[0], first)
    (folder := tmp_path / "odd").mkdir()
    try:
        for name in (b"line\nbreak.png", b"latin-\xe9.png", "äö, \"'.png".encode()):
            Image.fromarray(RAMP).save(os.fsdecode(os.path.join(os.fsencode(folder), name)))
    except OSError:
        pytest.skip("this file system refuses such names")
    assert list(run(folder)[1].index) == ["latin-\\udce9.png", "line\\nbreak.png", "äö, \"'.png"]


@needs_pydicom
def test_a_folder_as_on_a_hospitals_disc(tmp_path):
    folder = ramps(tmp_path / "in", "b.jpg")
    (folder / "study").mkdir(parents=True)
    header = {"PatientAge": "060Y", "PatientSex": "F", "ViewPosition": "PA"}
    dicom(folder / "study" / "IM0001", **header)
    dicom(folder / "study" / "1.2.840.7", PatientID="ID-4712", meta=False)
    dicom(folder / "study" / "wrong.png", **header)
    dicom(folder / "study" / "SR0001", **REPORT)
    (folder / "study" / "README").write_text("no image")
    (folder / "DICOMDIR").write_bytes((folder / "study" / "wrong.png").read_bytes())
    (folder / "labels.csv").write_text("Image Index,Finding Labels,Patient Age\nIM0001,Mass,50\n")
    with pytest.warns(UserWarning, match="describes 1 of 5"):
        manifest, metadata = run(folder)
    assert list(metadata.index) == ["1.2.840.7", "IM0001", "b.jpg", "wrong.png"]
    known = metadata.loc[["IM0001", "wrong.png"], ["findings", "age", "sex", "view_position"]]
    assert known.to_numpy().tolist() == [["Mass", 50.0, "F", "PA"], ["", 60.0, "F", "PA"]]
    ids = metadata["patient_id"]
    assert ids["IM0001"] == ids["wrong.png"] != ids["1.2.840.7"]
    assert manifest["image_modes"] == {"DICOM MONOCHROME2": 3, "L": 1}
    assert manifest["gray_scales"] == {"12 bits stored": 3, "8 bits": 1}
    assert (manifest["other_files"], manifest["dropped"]) == (3, [])
    assert [item["file"] for item in manifest["not_images"]] == ["study/SR0001"]
    for name in ("metadata.csv", "manifest.json"):
        text = (tmp_path / "out" / name).read_text()
        assert not any(word in text for word in ("Secret", "4711", "4712", "1950", str(tmp_path)))


@needs_pydicom
def test_one_patient_named_for_all_images(tmp_path):
    (tmp_path / "in").mkdir()
    dicom(tmp_path / "in" / "report.dcm", **REPORT)
    with pytest.raises(ValueError, match="no images"):
        run(tmp_path / "in")
    for number in range(10):
        dicom(tmp_path / "in" / f"{number}.dcm", PatientID="ANONYMOUS")
    with pytest.warns(UserWarning, match="one patient"):
        manifest, metadata = run(tmp_path / "in")
    split = manifest["split"]
    assert (split["train"], split["test"], manifest["patients"]) == (8, 2, 0)
    assert "one patient" in split["method"]
    assert len(set(data.patient_groups(metadata))) == 10


def test_broken_images_are_an_error_unless_allowed(tmp_path):
    folder = make_folder(tmp_path / "in", 30)
    place = folder / "images_001/images/00000002_000.png"
    place.write_bytes(place.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"1 of 30 .*2_000\.png: .*Truncated.*--max-broken 0\.05"):
        run(folder)
    manifest, metadata = run(folder, max_broken=0.05)
    assert [item["file"] for item in manifest["dropped"]] == ["images_001/images/00000002_000.png"]
    assert len(metadata) == 29
    for name, image in zip(metadata["image_id"], data.load_images(tmp_path / "out"), strict=True):
        np.testing.assert_array_equal(image, gray(place.with_name(name)))
    (tmp_path / "none").mkdir()
    place.rename(tmp_path / "none" / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: .* remove them$"):  # nothing can be allowed
        run(tmp_path / "none", max_broken=1.0)


@pytest.mark.parametrize("fit", decode.FITS)
def test_images_that_are_not_square_are_counted_and_warned_of(fit, tmp_path):
    folder = make_folder(tmp_path / "in", 3)
    Image.fromarray(np.full((40, 80), 200, np.uint8)).save(folder / "b.png")
    with pytest.warns(UserWarning, match="1 of 4 images are not square"):
        manifest, _ = run(folder, fit=fit)
    assert (manifest["not_square"], manifest["fit"], manifest["enlarged"]) == (1, fit, 1)
    wide = data.load_images(tmp_path / "out")[3]
    assert (wide[:16] == (0 if fit == "pad" else 200)).all()
    assert (wide[16:48] == 200).all()


def test_outliers_are_counted_and_dropped_if_asked(tmp_path):
    folder = make_folder(tmp_path / "in", 4)
    noise = np.random.default_rng(0).integers(0, 9, (64, 64))
    values = {"dark": noise, "bright": 247 + noise, "flat": np.full((64, 64), 90)}
    for name, image in values.items():
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{name}.png")
    manifest, _ = run(folder)
    assert {"too dark": 1, "too bright": 1, "constant": 1}.items() <= manifest["outliers"].items()
    with_all = np.array(data.load_images(tmp_path / "out"))
    manifest, _ = run(folder, drop_outliers=True)
    assert [item["file"] for item in manifest["dropped"]] == ["bright.png", "dark.png", "flat.png"]
    np.testing.assert_array_equal(data.load_images(tmp_path / "out"), with_all[:4])


def test_killed_at_any_rename_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, dies_at):
    """And no manifest vouches for files of two runs."""
    monkeypatch.setattr(preprocess, "CHUNK", 4)
    folder = make_folder(tmp_path / "in", 10)
    older = run(ramps(tmp_path / "other", "a.png"), tmp_path / "older")[0]
    (folder / "images_001/images/00000002_000.png").write_bytes(b"")
    preprocess.preprocess(folder, tmp_path / "whole", max_broken=0.2)
    real, decoded = decode.decode, []
    monkeypatch.setattr(decode, "decode", lambda *a, **k: decoded.append(a) or real(*a, **k))
    for stop in range(3 + 3 + 3):  # chunks, files written, files moved
        out = shutil.copytree(tmp_path / "older", tmp_path / f"out{stop}")
        with dies_at(stop), pytest.raises(KeyboardInterrupt):
            preprocess.preprocess(folder, out, max_broken=0.2)
        kept = (out / "manifest.json").exists()
        assert kept == (stop < 6)
        assert not kept or preprocess.preprocess(tmp_path / "other", out) == older
        decoded.clear()
        preprocess.preprocess(folder, out, max_broken=0.2)
        assert digest(out) == digest(tmp_path / "whole")
        assert {path.name for path in out.iterdir()} == set(FILES)
        assert len(decoded) == max(0, 10 - 4 * stop)  # whole chunks are not decoded again


def test_done_work_is_not_done_again(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "in", 4)
    with paths.alone(tmp_path / "out"), pytest.raises(paths.BusyError):  # another process's
        run(folder)
    manifest, _ = run(folder)
    with monkeypatch.context() as patched:
        patched.setattr(decode, "decode", lambda *a, **k: pytest.fail("decoded again"))
        assert run(folder)[0] == manifest
    before = digest(tmp_path / "out")
    (tmp_path / "out" / "images.npy").write_bytes(b"cut short")
    run(folder)
    assert digest(tmp_path / "out") == before
    ramps(folder / "images_001/images", "00000001_000.png")
    assert run(folder)[0]["files"] != manifest["files"]
    np.testing.assert_array_equal(data.load_images(tmp_path / "out")[0], RAMP)


def test_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def fsync(file):
        if os.fstat(file).st_size > 50_000:  # a chunk fits, images.npy does not
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(preprocess, "CHUNK", 10)
    folder = make_folder(tmp_path / "in", 40, size=8)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"could not write .*images\.npy: No space") as caught:
            run(folder)
    assert "\n" not in str(caught.value)
    assert not any((tmp_path / "out" / name).exists() for name in FILES)
    assert run(folder)[0]["images"] == 40


@needs_sample
@pytest.mark.slow
def test_real_sample(tmp_path):
    manifest, metadata = run(SAMPLE, tmp_path / "out")
    images = data.load_images(tmp_path / "out")
    assert manifest["dropped"] == []
    assert manifest["csv_rows_without_image"] == manifest["images_without_csv_row"] == 0
    assert metadata["split"].eq("test").mean() == pytest.approx(0.2, abs=0.01)
    assert images.std(axis=(1, 2)).min() > 5
    large = max(SAMPLE.rglob("*.png"), key=lambda path: path.stat().st_size)  # 1024 x 1024
    mean = gray(large).astype(float).reshape(64, 16, 64, 16).mean(axis=(1, 3))
    np.testing.assert_allclose(images[metadata.index.get_loc(large.name)], mean, atol=0.5)
