"""lib.data: every image mode and CSV quirk, bad input, interruption at any point, and the real
sample where it is.
"""

import builtins
import hashlib
import io
import itertools
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from lib import data, paths
from lib.data import decode, phantom, tables

SAMPLE = Path(os.environ.get("CXR_SAMPLE") or paths.ROOT.parent / "shared" / "nih-sample")
HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
)
FILES = ("images.npy", "metadata.csv", "manifest.json")
RAMP = np.add.outer(np.arange(64), np.arange(64) * 3).astype(np.uint8)


def write_png(path, values, bit_depth, colour_type=0):
    """A PNG of any bit depth and colour type, which Pillow cannot write: rows (h, w * channels) of
    samples.
    """
    rows = np.asarray(values)
    if bit_depth == 16:
        packed = [row.astype(">u2").tobytes() for row in rows]
    elif bit_depth == 8:
        packed = [row.astype(np.uint8).tobytes() for row in rows]
    else:
        bits = (rows[..., None] >> np.arange(bit_depth)[::-1]) & 1
        packed = [np.packbits(row.reshape(-1)).tobytes() for row in bits]
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour_type]

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(
        ">IIBBBBB", rows.shape[1] // channels, rows.shape[0], bit_depth, colour_type, 0, 0, 0
    )
    body = zlib.compress(b"".join(b"\0" + row for row in packed))
    Path(path).write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def make_folder(folder, n=6, size=64, table=True, seed=0):
    """`n` images of n/2 patients in Kaggle's layout."""
    rng = np.random.default_rng(seed)
    (folder / "images_001" / "images").mkdir(parents=True)
    rows = []
    for i in range(n):
        name = f"{i // 2 + 1:08d}_{i % 2:03d}.png"
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(
            folder / "images_001" / "images" / name
        )
        rows.append(
            f"{name},{'No Finding' if i % 2 else 'Effusion|Mass'},{i % 2},{i // 2 + 1},057Y,M,PA,64,64,0.1,0.1,\n"
        )
    if table:
        (folder / "Data_Entry_2017.csv").write_text(HEADER + "".join(rows))
    return folder


def digest(folder):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in FILES}


def one(tmp_path, name="a.png", **options):
    """Preprocess the single image in tmp_path/in and return its pixels."""
    data.preprocess(tmp_path / "in", tmp_path / "out", **options)
    return np.asarray(data.load_images(tmp_path / "out"))[0]


# --------------------------------------------------------------------------------------------------

MODES = {
    "gray": lambda p: Image.fromarray(RAMP).save(p),
    "RGB": lambda p: Image.fromarray(np.stack([RAMP] * 3, -1)).save(p),
    "RGBA, alpha 255 as in NIH's": lambda p: Image.fromarray(
        np.dstack([RAMP] * 3 + [np.full_like(RAMP, 255)])
    ).save(p),
    "RGBA, alpha 0 everywhere": lambda p: Image.fromarray(
        np.dstack([RAMP] * 3 + [np.zeros_like(RAMP)])
    ).save(p),
    "gray with alpha": lambda p: Image.fromarray(RAMP).convert("LA").save(p),
    "palette": lambda p: Image.fromarray(RAMP).convert("P").save(p),
    "reversed palette": lambda p: reversed_palette().save(p),
    "palette with transparency": lambda p: (
        Image.fromarray(RAMP).convert("P").save(p, transparency=bytes([255] * 256))
    ),
    "16-bit gray": lambda p: write_png(p, RAMP.astype(int) * 257, 16),
    "16-bit RGB": lambda p: write_png(p, np.repeat(RAMP.astype(int) * 257, 3, axis=1), 16, 2),
    "interlaced name with JPEG content": lambda p: Image.fromarray(RAMP).save(
        p, format="JPEG", quality=100
    ),
    "RGB JPEG": lambda p: (
        Image.fromarray(RAMP).convert("RGB").save(p, format="JPEG", quality=100, subsampling=0)
    ),
    "CMYK JPEG": lambda p: (
        Image.fromarray(RAMP).convert("RGB").convert("CMYK").save(p, format="JPEG", quality=100)
    ),
}


def reversed_palette():
    image = Image.fromarray(255 - RAMP, "L").convert("P")
    image.putpalette([255 - value for value in range(256) for _ in range(3)])
    return image


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_same_gray(mode, tmp_path):
    (tmp_path / "in").mkdir()
    MODES[mode](tmp_path / "in" / "a.png")
    np.testing.assert_allclose(one(tmp_path).astype(int), RAMP, atol=3 if "JPEG" in mode else 0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fewer_bits_span_the_whole_range(bits, tmp_path):
    (tmp_path / "in").mkdir()
    values = RAMP % 2**bits
    write_png(tmp_path / "in" / "a.png", values, bits)
    np.testing.assert_array_equal(one(tmp_path), values * (255 // (2**bits - 1)))


@pytest.mark.parametrize(
    ("top", "full"),
    [(4095, 4095), (3000, 4095), (65535, 65535), (1000, 1023), (200, 255), (0, 255)],
)
def test_16_bit_is_scaled_by_the_bits_in_use_and_not_clipped(top, full, tmp_path):
    (tmp_path / "in").mkdir()
    values = np.linspace(0, top, 64 * 64).round().astype(int).reshape(64, 64)
    write_png(tmp_path / "in" / "a.png", values, 16)
    np.testing.assert_array_equal(one(tmp_path), np.floor(values * 255 / full + 0.5))


def test_alpha_that_varies_is_laid_over_black(tmp_path):
    (tmp_path / "in").mkdir()
    alpha = np.where(np.arange(64) < 32, 0, 255)[None].repeat(64, 0).astype(np.uint8)
    Image.fromarray(np.dstack([RAMP] * 3 + [alpha])).save(tmp_path / "in" / "a.png")
    np.testing.assert_array_equal(one(tmp_path), np.where(alpha, RAMP, 0))


def test_exif_orientation_is_applied(tmp_path):
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.fromarray(RAMP).save(tmp_path / "in" / "a.jpg", quality=100, exif=exif)
    np.testing.assert_allclose(one(tmp_path).astype(int), np.rot90(RAMP, -1), atol=3)


@example(1, 3, 1, 0, "stretch")  # a tie that Pillow's own reduce rounds down
@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from([1, 7, 20]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(decode.FITS),
)
def test_resize_is_the_exact_area_mean_and_commutes_with_the_square(height, width, size, seed, fit):
    image = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    small = decode.shrink(Image.fromarray(image), size, fit)
    # Every old pixel as 2 x 2, so that a centre stands between pixels; then the canvas; then size x
    # size equal parts of each.
    canvas = image.repeat(2, 0).repeat(2, 1).astype(np.int64)
    if fit == "pad":
        canvas = np.pad(
            canvas, [(max(height, width) - height,) * 2, (max(height, width) - width,) * 2]
        )
    if fit == "crop":
        down, across = height - min(height, width), width - min(height, width)
        canvas = canvas[down : 2 * height - down, across : 2 * width - across]
    h, w = canvas.shape
    parts = canvas.repeat(size, 0).repeat(size, 1).reshape(size, h, size, w).sum(axis=(1, 3))
    np.testing.assert_array_equal(small, (2 * parts + h * w) // (2 * h * w))
    for turns, mirror in itertools.product(range(4), (False, True)):
        moved = np.rot90(np.fliplr(image) if mirror else image, turns)
        again = decode.shrink(Image.fromarray(np.ascontiguousarray(moved)), size, fit)
        np.testing.assert_array_equal(again, np.rot90(np.fliplr(small) if mirror else small, turns))


@pytest.mark.parametrize("height", [64, 128, 256, 1024])
def test_fast_paths_give_the_bytes_of_the_general_way(height):
    """Nothing to resample at 64 x 64, and Pillow's own mean at powers of two."""
    image = np.random.default_rng(height).integers(0, 256, (height, height), dtype=np.uint8)
    fast = decode.shrink(Image.fromarray(image), 64)
    for fit in decode.FITS:
        np.testing.assert_array_equal(fast, decode.area_mean(image, 64, fit))
    if height == 64:
        np.testing.assert_array_equal(fast, image)


@pytest.mark.parametrize(
    ("shape", "scale"),
    [((1024, 1024), 8), ((1016, 1024), 4), ((516, 1028), 4), ((250, 250), 1), ((257, 512), 1)],
)
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_reduced_jpeg_is_near_the_full_one(shape, scale, mode, tmp_path, monkeypatch):
    assert decode._draft_scale(*shape[::-1], 64) == (scale if shape != (1016, 1024) else 4)
    noise = np.random.default_rng(0).normal(0, 12, shape)
    image = np.clip(
        128
        + 100 * np.sin(np.add.outer(np.arange(shape[0]) / 90, np.arange(shape[1]) / 50))
        + noise,
        0,
        255,
    ).astype(np.uint8)
    Image.fromarray(image).convert(mode).save(tmp_path / "a.jpg", quality=95)
    reduced, record = decode.decode(tmp_path / "a.jpg")
    assert (record["width"], record["height"]) == shape[::-1]
    monkeypatch.setattr(decode, "_draft_scale", lambda *args: 1)
    full, _ = decode.decode(tmp_path / "a.jpg")
    assert np.abs(reduced.astype(int) - full).max() <= 2


@pytest.mark.parametrize(
    ("fit", "word"), [("pad", "padded"), ("crop", "cropped"), ("stretch", "stretched")]
)
def test_images_that_are_not_square_are_counted_and_warned_of(fit, word, tmp_path):
    folder = make_folder(tmp_path / "in", 3)
    Image.fromarray(np.full((40, 80), 200, np.uint8)).save(folder / "b.png")
    with pytest.warns(UserWarning, match=f"1 of 4 images are not square and were {word}"):
        manifest = data.preprocess(folder, tmp_path / "out", fit=fit)
    assert (manifest["not_square"], manifest["fit"], manifest["enlarged"]) == (1, fit, 1)
    wide = data.load_images(tmp_path / "out")[3]
    assert (wide[:16] == (0 if fit == "pad" else 200)).all()
    assert (wide[16:48] == 200).all()


@pytest.mark.parametrize(
    ("option", "valid"),
    [({"fit": "squeeze"}, "pad, crop, stretch"), ({"csv": "no.csv"}, "there is no such file")],
)
def test_options_that_do_not_exist(option, valid, tmp_path):
    with pytest.raises(ValueError, match=valid):
        data.preprocess(make_folder(tmp_path / "in", 2), tmp_path / "out", **option)


def test_outliers_are_counted_and_dropped_if_asked(tmp_path):
    folder = make_folder(tmp_path / "in", 4)
    noise = np.random.default_rng(0).integers(0, 9, (64, 64))
    for name, values in {
        "dark": noise,
        "bright": 247 + noise,
        "flat": np.full((64, 64), 90),
    }.items():
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{name}.png")
    kept = data.preprocess(folder, tmp_path / "out")
    assert kept["images"] == 7
    assert {
        name: kept["outliers"][name] for name in ("too dark", "too bright", "constant", "dropped")
    } == {
        "too dark": 1,
        "too bright": 1,
        "constant": 1,
        "dropped": False,
    }
    with_all = np.array(data.load_images(tmp_path / "out"))
    manifest = data.preprocess(folder, tmp_path / "out", drop_outliers=True)
    assert manifest["images"] == 4
    assert [item["file"] for item in manifest["dropped"]] == ["bright.png", "dark.png", "flat.png"]
    assert manifest["dropped"][2]["reason"] == "constant (standard deviation 0.0 of 255)"
    np.testing.assert_array_equal(data.load_images(tmp_path / "out"), with_all[:4])
    assert len(data.load(tmp_path / "out", verify=True)[1]) == 4


# --------------------------------------------------------------------------------------------------


def damaged():
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(
        png, "PNG"
    )
    png = png.getvalue()
    jpeg = io.BytesIO()
    Image.fromarray(RAMP).save(jpeg, "JPEG")
    gif = io.BytesIO()
    Image.fromarray(RAMP).save(gif, "GIF")
    bomb = png[:16] + struct.pack(">II", 100_000, 100_000) + png[24:29]
    large = png[:16] + struct.pack(">II", 8_200, 8_200) + png[24:29]
    return {
        "truncated.png": (png[: len(png) // 2], "truncated"),
        "truncated.jpg": (jpeg.getvalue()[:560], "truncated"),
        "empty.png": (b"", "empty file"),
        "text.png": (b"Image Index,Finding Labels", "not a PNG, JPEG or DICOM image"),
        "gif.png": (gif.getvalue(), "not a PNG, JPEG or DICOM image"),
        "flipped.png": (png[:3000] + bytes([png[3000] ^ 4]) + png[3001:], "checksum"),
        "bomb.png": (
            bomb + struct.pack(">I", zlib.crc32(bomb[12:])) + png[33:],
            "decompression bomb",
        ),
        "large.png": (
            large + struct.pack(">I", zlib.crc32(large[12:])) + png[33:],
            "8200 x 8200 pixels are too many",
        ),
    }


@pytest.mark.parametrize("name", damaged())
def test_a_broken_image_is_listed_with_its_reason_and_skipped(name, tmp_path, monkeypatch):
    monkeypatch.setattr(
        ImageFile, "LOAD_TRUNCATED_IMAGES", True
    )  # as another library may have left it
    content, reason = damaged()[name]
    folder = make_folder(tmp_path / "in", 4)
    (folder / name).write_bytes(content)
    with pytest.raises(
        ValueError,
        match=rf"1 of the first 5 of 5 images in .*{name}: (?i:.*({reason})).*max_broken=0\.01",
    ) as caught:
        data.preprocess(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    manifest = data.preprocess(folder, tmp_path / "out", max_broken=0.2)
    assert manifest["images"] == len(data.load_images(tmp_path / "out")) == 4
    assert [item["file"] for item in manifest["dropped"]] == [name]
    assert re.search(reason, manifest["dropped"][0]["reason"], re.IGNORECASE)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_one_truncated_among_a_hundred_is_skipped_by_default(tmp_path):
    folder = make_folder(tmp_path / "in", 99)
    good = (folder / "images_001/images/00000001_000.png").read_bytes()
    (folder / "images_001/images/00000002_005.png").write_bytes(good[:-300])
    manifest = data.preprocess(folder, tmp_path / "out")
    images, metadata = data.load(tmp_path / "out", verify=True)
    assert manifest["images"] == len(images) == 99
    assert manifest["dropped"][0]["file"] == "images_001/images/00000002_005.png"
    assert "00000002_005.png" not in set(metadata["image_id"])
    for image_id, image in zip(
        metadata["image_id"], images, strict=True
    ):  # the rows after the gap have moved up with their pixels
        np.testing.assert_array_equal(
            image, np.asarray(Image.open(folder / "images_001/images" / image_id))
        )


def test_none_readable_is_an_error_whatever_is_allowed(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.png: empty file"):
        data.preprocess(tmp_path, tmp_path / "out", max_broken=1.0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_pipes_and_dangling_links_do_not_hang(tmp_path):
    folder = make_folder(tmp_path / "in", 4)
    os.mkfifo(folder / "pipe.png")
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    manifest = data.preprocess(folder, tmp_path / "out", max_broken=0.5)
    assert {item["file"]: item["reason"] for item in manifest["dropped"]} == {
        "link.png": "No such file or directory",
        "pipe.png": "not a regular file",
    }


# --------------------------------------------------------------------------------------------------


def table(tmp_path, text, name="Data_Entry_2017.csv"):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return data.read_metadata(tmp_path)


def test_nih_2017_quirks(tmp_path):
    frame = table(
        tmp_path,
        "\ufeff"
        + HEADER
        + "00000001_000.png,Cardiomegaly|Emphysema,0,1,057Y,M,pa,2682,2749,0.1,0.1,\r\n"
        "00000002_000.png,No Finding,0,00000002,,,,,,,,\r\n"
        "00000003_000.png,Pleural Thickening|infiltrate|Rib Fracture,0,3.0,414,Female,AP,1,1,1,1,,,,\r\n"
        "00000004_000.png,,0,,007M,f,AP\r\n"
        ",Mass,,,,,,,,,,\r\n,,,,,,,,,,,\r\n"
        "00000001_000.png,Hernia,9,9,9,F,AP,1,1,1,1,\r\n",
    )
    assert list(frame["image_id"]) == [f"0000000{i}_000.png" for i in (1, 2, 3, 4)]
    assert list(frame["patient_id"]) == ["1", "2", "3", "4"]
    assert list(frame["findings"]) == [
        "Cardiomegaly|Emphysema",
        "No Finding",
        "Pleural_Thickening|Infiltration|Rib Fracture",
        "",
    ]
    assert list(frame["view_position"]) == ["PA", "", "AP", "AP"]
    assert list(frame["sex"]) == ["M", "", "F", "F"]
    np.testing.assert_array_equal(frame["age"], [57, np.nan, np.nan, 0])
    _, odd = tables.read_table(tmp_path / "Data_Entry_2017.csv")
    assert odd == {
        "csv_rows_without_name": 1,
        "csv_rows_repeated": 1,
        "ages_set_missing": 1,
        "unknown_findings": {"Rib Fracture": 1},
    }


@pytest.mark.parametrize(
    "name", ["Data_Entry_2017_v2020.csv", "sample_labels.csv", "my labels.CSV"]
)
def test_other_tables(name, tmp_path):
    (tmp_path / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000009_000.png,Infiltrate,1,2,3,4\n"
    )
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "all_labels.csv.gz").write_bytes(b"\x1f\x8b")
    frame = table(
        tmp_path,
        "Patient Sex,Image Index,Patient Age,Finding Labels,View Position\nF,images/00000007_001.png,060Y,Hernia,PA\n",
        name,
    )
    assert frame.to_dict("records") == [
        {
            "image_id": "00000007_001.png",
            "patient_id": "7",
            "findings": "Hernia",
            "view_position": "PA",
            "age": 60.0,
            "sex": "F",
        }
    ]


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("57", 57),
        ("060Y", 60),
        ("58.0", 58),
        ("023M", 1),
        ("010W", 0),
        ("400D", 1),
        ("120", 120),
        ("121", None),
        ("old", None),
        ("-3", None),
    ],
)
def test_ages(text, years):
    assert tables.clean_age(text) == ("" if years is None else str(years))


@pytest.mark.parametrize("name", ["Data_Entry_2017.csv", "mine.csv"])
def test_a_table_without_finding_labels_is_an_error_in_one_line(name, tmp_path):
    make_folder(tmp_path / "in", 2, table=False)
    (tmp_path / "in" / name).write_text("Image Index,Label,\nx.png,Mass,\n")
    with pytest.raises(
        ValueError,
        match=rf"^{name} has no column 'Finding Labels' \(it has: Image Index, Label\): rename .*$",
    ):
        data.preprocess(tmp_path / "in", tmp_path / "out")


def test_boxes_alone_are_no_metadata(tmp_path):
    folder = make_folder(tmp_path / "in", 2, table=False)
    (folder / "BBox_List_2017.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Infiltrate,1,2,3,4\n"
    )
    assert data.read_metadata(folder) is None
    assert data.preprocess(folder, tmp_path / "out")["source"]["csv"] is None


def test_two_tables_are_not_chosen_from(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("image,findings\nx.png,Mass\n")
    with pytest.raises(ValueError, match=r"2 CSV files could describe the images \(a.csv, b.csv\)"):
        data.read_metadata(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"Image Index,Finding Labels\n\xff\xfe,Mass\n",
        b'Image Index,Finding Labels\n"' + b"x" * 200_000,
    ],
)
def test_a_table_that_is_no_text_is_an_error(content, tmp_path):
    with pytest.raises(ValueError, match=r"Data_Entry_2017.csv is not CSV text in UTF-8"):
        table(tmp_path, content)


def test_images_and_rows_need_not_match(tmp_path):
    folder = make_folder(tmp_path / "in", 6)
    (folder / "images_001/images/00000001_000.png").unlink()
    Image.fromarray(RAMP).save(folder / "00000777_000.png")
    Image.fromarray(RAMP).save(folder / "holiday.jpg")
    os.rename(
        folder / "images_001/images/00000002_001.png", folder / "images_001/images/00000002_001.PNG"
    )  # found without the extension
    manifest = data.preprocess(folder, tmp_path / "out")
    counts = {
        key: manifest[key]
        for key in ("images", "csv_rows", "csv_rows_without_image", "images_without_csv_row")
    }
    assert counts == {
        "images": 7,
        "csv_rows": 6,
        "csv_rows_without_image": 1,
        "images_without_csv_row": 2,
    }
    metadata = data.load(tmp_path / "out")[1].set_index("image_id")
    assert list(metadata.index) == sorted(metadata.index)
    assert metadata.loc["00000777_000.png", ["patient_id", "findings"]].tolist() == ["777", ""]
    assert metadata.loc["holiday.jpg", ["patient_id", "findings"]].tolist() == ["holiday.jpg", ""]
    assert metadata.loc["00000002_001.PNG", ["patient_id", "findings"]].tolist() == [
        "2",
        "No Finding",
    ]


def test_a_folder_without_a_table(tmp_path):
    manifest = data.preprocess(make_folder(tmp_path / "in", 6, table=False), tmp_path / "out")
    metadata = data.load(tmp_path / "out")[1]
    assert manifest["source"] == {"kind": "nih", "csv": None}
    assert list(metadata["patient_id"]) == ["1", "1", "2", "2", "3", "3"]
    assert set(metadata["findings"]) == {""}
    assert metadata["age"].isna().all()
    assert not data.finding_matrix(metadata["findings"]).any()


def test_the_table_survives_the_way_through_files(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    names = ["NA.png", "null.png", 'qu"ote, comma.png', "0001.png", "äö.png", "1e5.png"]
    rows = [
        [
            "Image Index",
            "Finding Labels",
            "Patient ID",
            "Patient Age",
            "Patient Sex",
            "View Position",
        ]
    ]
    for place, name in enumerate(names):
        Image.fromarray(RAMP).save(folder / name)
        rows.append([name, "None", f"NA{place}", "", "", "NaN"])
    pd.DataFrame(rows[1:], columns=rows[0]).to_csv(folder / "labels.csv", index=False)
    data.preprocess(folder, tmp_path / "out")
    metadata = data.load(tmp_path / "out")[1]
    assert sorted(metadata["image_id"]) == sorted(names)
    assert set(metadata["findings"]) == {"None"}
    assert set(metadata["patient_id"]) == {f"NA{place}" for place in range(6)}
    assert set(metadata["sex"]) == {""}
    assert metadata.dtypes["age"] == np.float64


def test_names_that_no_csv_can_hold_are_escaped(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    try:
        for name in (b"line\nbreak.png", b"latin-\xe9.png"):
            Image.fromarray(RAMP).save(
                os.path.join(os.fsencode(folder), name).decode(errors="surrogateescape")
            )
    except OSError:
        pytest.skip("this file system refuses such names")
    data.preprocess(folder, tmp_path / "out")
    assert list(data.load(tmp_path / "out")[1]["image_id"]) == [
        "latin-\\udce9.png",
        "line\\nbreak.png",
    ]


def test_repeated_names_keep_the_first_and_say_so(tmp_path):
    folder = make_folder(tmp_path / "in", 4)
    (folder / "images_002").mkdir()
    Image.fromarray(RAMP).save(folder / "images_002" / "00000001_000.png")
    with pytest.warns(UserWarning, match="1 images were left out"):
        manifest = data.preprocess(folder, tmp_path / "out")
    assert manifest["dropped"] == [
        {"file": "images_002/00000001_000.png", "reason": "another image has the same file name"}
    ]
    first = np.asarray(Image.open(folder / "images_001/images/00000001_000.png"))
    np.testing.assert_array_equal(data.load_images(tmp_path / "out")[0], first)


def test_nih_names_that_are_no_identities_are_an_error(tmp_path):
    for copy in range(5):
        make_folder(tmp_path / "in" / str(copy), 1, table=False)
    with pytest.raises(ValueError, match="only 1 different file names among 5 images"):
        data.preprocess(tmp_path / "in", tmp_path / "out")


def test_other_names_that_repeat_are_told_apart_by_their_path(tmp_path):
    folder = tmp_path / "in"
    for patient in range(3):
        (folder / f"patient{patient}").mkdir(parents=True)
        Image.fromarray(RAMP).save(folder / f"patient{patient}" / "frontal.png")
    (folder / "labels.csv").write_text(
        "image,findings\npatient0/frontal.png,Mass\npatient2\\frontal.png,Edema\n"
    )
    manifest = data.preprocess(folder, tmp_path / "out")
    metadata = data.load(tmp_path / "out")[1]
    assert metadata["image_id"].tolist() == [
        f"patient{patient}/frontal.png" for patient in range(3)
    ]
    assert metadata["findings"].tolist() == ["Mass", "", "Edema"]
    assert manifest["dropped"] == []


def test_hidden_files_are_no_images(tmp_path):
    folder = make_folder(tmp_path / "in", 2)
    (folder / "__MACOSX").mkdir()
    for name in ("._00000001_000.png", "__MACOSX/x.png"):
        (folder / name).write_bytes(b"resource fork")
    assert data.preprocess(folder, tmp_path / "out")["images"] == 2


# --------------------------------------------------------------------------------------------------


def test_split_is_by_patient_seeded_and_near_its_share(tmp_path):
    folder = make_folder(tmp_path / "in", 60)
    splits = {}
    for seed in (0, 1):
        manifest = data.preprocess(folder, tmp_path / f"out{seed}", split_seed=seed)
        metadata = data.load(tmp_path / f"out{seed}")[1]
        assert metadata.groupby("patient_id")["split"].nunique().max() == 1
        assert manifest["split"] == {
            "method": "drawn by patient",
            "seed": seed,
            "test_share": 0.2,
            "train": 48,
            "test": 12,
            "images_in_lists": 0,
            "patients_on_both_sides": 0,
        }
        splits[seed] = list(metadata["split"])
    assert splits[0] != splits[1]
    assert [i for i in range(0, 60, 2) if splits[0][i] == "test"] == [
        6,
        18,
        30,
        46,
        50,
        54,
    ]  # the draw itself must never change


def test_official_lists_are_used_when_both_sides_are_there(tmp_path):
    folder = make_folder(tmp_path / "in", 8)
    (folder / "train_val_list.txt").write_text(
        "00000001_000.png\n00000001_001.png\n00000002_000.png\n"
    )
    (folder / "test_list.txt").write_text(
        "00000003_000.png\r\n00000003_001.png\r\n00009999_000.png"
    )
    manifest = data.preprocess(folder, tmp_path / "out", test_share=0.0)
    metadata = data.load(tmp_path / "out")[1]
    # 00000002_001 follows its patient; patient 4 is in no list and drawn with test_share 0
    assert list(metadata["split"]) == ["train"] * 4 + ["test"] * 2 + ["train"] * 2
    assert manifest["split"]["method"] == "NIH's lists"
    assert manifest["split"]["images_in_lists"] == 5

    (folder / "test_list.txt").write_text(
        "00009999_000.png"
    )  # none of these images: lists cannot split them
    assert data.preprocess(folder, tmp_path / "out")["split"]["method"] == "drawn by patient"

    (folder / "train_val_list.txt").write_text("00000001_000.png\n00000002_000.png")
    (folder / "test_list.txt").write_text("00000001_001.png")
    with pytest.warns(UserWarning, match="1 patients are on both sides"):
        assert (
            data.preprocess(folder, tmp_path / "out", test_share=0.0)["split"][
                "patients_on_both_sides"
            ]
            == 1
        )
    assert list(data.load(tmp_path / "out")[1]["split"]) == ["train", "test"] + ["train"] * 6


def test_a_small_share_still_has_a_patient(tmp_path):
    split = data.preprocess(make_folder(tmp_path / "in", 6), tmp_path / "out", test_share=0.01)[
        "split"
    ]
    assert (split["train"], split["test"]) == (4, 2)
    assert (
        data.preprocess(tmp_path / "in", tmp_path / "out", test_share=0.99)["split"]["train"] == 2
    )
    assert data.preprocess(tmp_path / "in", tmp_path / "out", test_share=0.0)["split"]["test"] == 0


# ----------------------------------------------------------------------------------------- interrup


class Killed(BaseException):
    pass


def test_killed_at_any_rename_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 4)
    folder = make_folder(tmp_path / "in", 10)
    (folder / "images_001/images/00000002_000.png").write_bytes(b"")
    options = {"max_broken": 0.2, "workers": 1}
    data.preprocess(folder, tmp_path / "whole", **options)
    replace, real = os.replace, decode.decode
    decoded = []
    monkeypatch.setattr(decode, "decode", lambda *args: decoded.append(args) or real(*args))
    for stop in itertools.count():
        out, calls = tmp_path / f"out{stop}", itertools.count()

        def dying(source, target, stop=stop, calls=calls):
            if next(calls) == stop:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", dying)
        finished = False
        try:
            data.preprocess(folder, out, **options)
            finished = True
        except Killed:
            assert not (out / "manifest.json").exists()
        monkeypatch.setattr(os, "replace", replace)
        decoded.clear()
        data.preprocess(folder, out, **options)
        assert digest(out) == digest(tmp_path / "whole")
        assert {path.name for path in out.iterdir()} == set(FILES)
        if finished:
            break
        assert len(decoded) == max(0, 10 - 4 * max(0, (stop - 1) // 2)) if stop < 7 else not decoded
    assert (
        stop == 1 + 2 * 3 + 3 + 3
    )  # plan, chunks and their records, three files made, three files moved


def test_no_manifest_vouches_for_files_of_two_runs(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "in", 4)
    data.preprocess(folder, tmp_path / "out")
    Image.fromarray(RAMP).save(folder / "images_001/images/00000001_000.png")
    replace = os.replace

    def dying(source, target):
        replace(source, target)
        if Path(target) == tmp_path / "out" / "images.npy":
            raise Killed

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        data.preprocess(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="preprocessing did not finish"):
        data.load(tmp_path / "out", verify=True)


def test_kill_9_and_resume(tmp_path, monkeypatch):
    """A process killed while decoding (not at a convenient point) leaves work that the next one
    takes up.
    """
    folder = make_folder(tmp_path / "in", 60, size=8)
    script = (
        "import sys, time; from lib import data; data._CHUNK = 10; decode = data.decode.decode\n"
        "def slow(*args):\n    time.sleep(0.01); print(args[0].name, flush=True); return decode(*args)\n"
        "data.decode.decode = slow; data.preprocess(sys.argv[1], sys.argv[2], workers=1)"
    )
    seen = []
    for wanted in (25, 15):
        command = [sys.executable, "-c", script, str(folder), str(tmp_path / "out")]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=paths.ROOT
        )
        seen.append([process.stdout.readline().strip() for _ in range(wanted)])
        process.kill()
        process.communicate()
        assert process.returncode != 0
        assert not any((tmp_path / "out" / name).exists() for name in FILES)
    monkeypatch.setattr(data, "_CHUNK", 10)
    real = decode.decode
    seen.append([])
    monkeypatch.setattr(
        decode, "decode", lambda path, *rest: seen[2].append(path.name) or real(path, *rest)
    )
    data.preprocess(folder, tmp_path / "out", workers=1)
    names = sorted(path.name for path in folder.rglob("*.png"))
    assert [part[0] for part in seen] == [
        names[0],
        names[20],
        names[30],
    ]  # what was whole by then is not done again
    assert seen[2] == names[30:]
    data.preprocess(folder, tmp_path / "whole", workers=1)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_bytes_do_not_depend_on_workers_and_done_work_is_not_done_again(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "in", 40, size=100)
    manifest = data.preprocess(folder, tmp_path / "one", workers=1)
    for workers in (2, 3, 5):
        data.preprocess(folder, tmp_path / "five", workers=workers, resume=False)
        assert digest(tmp_path / "one") == digest(tmp_path / "five")

    real = decode.decode
    monkeypatch.setattr(decode, "decode", lambda *args: pytest.fail("decoded again"))
    assert data.preprocess(folder, tmp_path / "one") == manifest
    monkeypatch.setattr(decode, "decode", real)
    data.preprocess(folder, tmp_path / "one", resume=False)
    assert digest(tmp_path / "one") == digest(tmp_path / "five")

    Image.fromarray(RAMP).save(
        folder / "images_001/images/00000001_000.png"
    )  # one image changes: the work is another one
    assert data.preprocess(folder, tmp_path / "one")["files"] != manifest["files"]
    np.testing.assert_array_equal(data.load_images(tmp_path / "one")[0], RAMP)
    assert data.preprocess(folder, tmp_path / "one", size=32)["size"] == 32
    (tmp_path / "one" / "images.npy").write_bytes(b"cut short")
    data.preprocess(folder, tmp_path / "one", size=32)
    assert data.load_images(tmp_path / "one", verify=True).shape == (40, 32, 32)


def test_memory_is_bounded_by_a_chunk(tmp_path, monkeypatch):
    """No more than one chunk of decoded images is held, and no more images than workers are being
    decoded.
    """
    monkeypatch.setattr(data, "_CHUNK", 8)
    folder = make_folder(tmp_path / "in", 40)
    real, lock, busy, peak = decode.decode, threading.Lock(), [0], [0]

    def counting(*args):
        with lock:
            busy[0] += 1
            peak[0] = max(peak[0], busy[0])
        time.sleep(0.002)
        result = real(*args)
        with lock:
            busy[0] -= 1
        return result

    monkeypatch.setattr(decode, "decode", counting)
    save, lengths = paths.save_npy, []
    monkeypatch.setattr(
        paths, "save_npy", lambda path, array: lengths.append(len(array)) or save(path, array)
    )
    data.preprocess(folder, tmp_path / "out", workers=3)
    assert lengths == [8] * 5
    assert peak[0] == 3


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no file size limits on this system")
def test_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(tmp_path):
    folder = make_folder(tmp_path / "in", 40, size=8)
    script = (
        "import resource, sys; from lib import data\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"  # images.npy needs 163,968 bytes
        "data._CHUNK = 10\n"  # a chunk fits
        "try: data.preprocess(sys.argv[1], sys.argv[2])\n"
        "except OSError as error: print(error); sys.exit(3)"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=paths.ROOT, check=False)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("\n") == 1
    assert "could not write" in done.stdout
    assert "free some space" in done.stdout
    assert not any((tmp_path / "out" / name).exists() for name in FILES)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert data.preprocess(folder, tmp_path / "out")["images"] == 40


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not write .*file.out.*CXR_DATA_DIR"):
        data.preprocess(make_folder(tmp_path / "in", 2), tmp_path / "file" / "out")


# --------------------------------------------------------------------------------------------------


def test_phantoms_pass_through_the_reader_of_real_xrays(tmp_path, monkeypatch):
    shown = data.fetch("phantom", tmp_path / "raw", n_phantoms=12, seed=3)
    assert {key: shown[key] for key in ("kind", "images", "csv")} == {
        "kind": "phantom",
        "images": 12,
        "csv": "Data_Entry_2017.csv",
    }
    assert str(tmp_path) not in json.dumps(shown)
    manifest = data.preprocess(tmp_path / "raw", tmp_path / "out")
    assert manifest["source"] == {"kind": "phantom", "csv": "Data_Entry_2017.csv", "seed": 3}
    assert manifest["attribution"] == data.PHANTOM_ATTRIBUTION
    assert "images_001/images" in (tmp_path / "raw").rglob("*.png").__next__().as_posix()

    made, truth = phantom.make_phantoms(12, 3)
    images, metadata = data.load(tmp_path / "out", verify=True)
    order = np.argsort(truth["image_id"].to_numpy())
    np.testing.assert_array_equal(images, made[order])
    truth = truth.iloc[order].reset_index(drop=True)
    assert list(metadata.columns) == [*data.COLUMNS, *data.EXTRA_COLUMNS]
    for name in ("image_id", "findings", "view_position", "sex", "side", "mirrored"):
        assert metadata[name].tolist() == truth[name].tolist()
    assert metadata["patient_id"].tolist() == truth["patient_id"].astype(str).tolist()
    np.testing.assert_array_equal(metadata[["age", "angle"]], truth[["age", "angle"]])

    make = phantom.make_phantoms
    monkeypatch.setattr(phantom, "make_phantoms", lambda *args: pytest.fail("drawn again"))
    assert data.fetch("phantom", tmp_path / "raw", n_phantoms=12, seed=3) == shown
    assert data.preprocess(tmp_path / "raw", tmp_path / "out") == manifest
    monkeypatch.setattr(phantom, "make_phantoms", make)
    data.fetch("phantom", tmp_path / "raw", n_phantoms=5, seed=3)
    assert data.preprocess(tmp_path / "raw", tmp_path / "out")["images"] == 5
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_phantoms_killed_while_written_are_made_anew(tmp_path, monkeypatch):
    replace = os.replace
    for stop in range(3):
        calls = itertools.count()

        def dying(source, target, stop=stop, calls=calls):
            if next(calls) == stop:
                raise Killed
            replace(source, target)

        data.fetch("phantom", tmp_path / "raw", n_phantoms=3, seed=0)
        monkeypatch.setattr(os, "replace", dying)
        with pytest.raises(Killed):
            data.fetch("phantom", tmp_path / "raw", n_phantoms=4, seed=0)
        monkeypatch.setattr(os, "replace", replace)
        data.fetch("phantom", tmp_path / "raw", n_phantoms=4, seed=0)
        assert len(list((tmp_path / "raw").rglob("*.png"))) == 4
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_phantoms_do_not_replace_what_is_not_theirs(tmp_path):
    folder = make_folder(tmp_path / "raw", 2)
    with pytest.raises(ValueError, match="holds files which are not phantoms"):
        data.fetch("phantom", folder)
    assert len(list(folder.rglob("*.png"))) == 2


def test_a_folder_stays_where_it_is(tmp_path):
    folder = make_folder(tmp_path / "xrays", 4)
    shown = data.fetch(folder, tmp_path / "raw")
    assert shown == {
        "kind": "nih",
        "images": 4,
        "csv": "Data_Entry_2017.csv",
        "folder": "(outside the project)/xrays",
        "attribution": data.ATTRIBUTION,
    }
    assert json.loads((tmp_path / "raw" / "source.json").read_text()) == {
        "kind": "nih",
        "path": str(folder.resolve()),
        "images": 4,
    }
    manifest = data.preprocess(tmp_path / "raw", tmp_path / "out")
    assert manifest["images"] == 4
    for name in ("metadata.csv", "manifest.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


def test_a_folder_of_ones_own_is_not_attributed_to_nih(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(RAMP).save(tmp_path / name)
    shown = data.fetch(tmp_path, tmp_path / "raw")
    assert shown["kind"] == "folder"
    assert "NIH" not in shown["attribution"]
    assert "not for clinical use" in shown["attribution"].lower()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", "there is no folder .*nowhere.*--data phantom"),
        (lambda p: p, "it is empty"),
        (
            lambda p: (p / "notes.txt").write_text("x") and p,
            r"holds no .png, .jpg or .jpeg but 1 .txt",
        ),
        (
            lambda p: (p / "x.zip").write_text("x") and p / "x.zip",
            "is a file, not a folder: unpack it",
        ),
    ],
)
def test_sources_that_are_none_end_in_one_line(make, message, tmp_path):
    source = make(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        data.fetch(source, tmp_path / "raw")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "raw").exists()
    with pytest.raises(ValueError, match=message):
        data.preprocess(source, tmp_path / "out")


def test_options_out_of_range(tmp_path):
    for option in ({"size": 0}, {"test_share": 1.0}, {"max_broken": -0.1}):
        with pytest.raises(ValueError, match=next(iter(option))):
            data.preprocess(tmp_path, tmp_path / "out", **option)
    with pytest.raises(ValueError, match="n is 0"):
        data.fetch("phantom", tmp_path / "raw", n_phantoms=0)


# --------------------------------------------------------------------------------------------------


@pytest.fixture
def done(tmp_path):
    data.preprocess(make_folder(tmp_path / "in", 6), tmp_path / "out")
    return tmp_path / "out"


def test_a_single_image_is_enough(tmp_path):
    manifest = data.preprocess(make_folder(tmp_path / "in", 1), tmp_path / "out")
    images, metadata = data.load(tmp_path / "out")
    assert images.shape == (1, 64, 64)
    assert metadata["split"].tolist() == ["train"]
    assert manifest["patients"] == 1


def test_training_opens_the_images_and_nothing_else(done, monkeypatch):
    opened, real_open = [], builtins.open
    monkeypatch.setattr(
        builtins,
        "open",
        lambda file, *args, **kwargs: (
            opened.append(os.fspath(file)) or real_open(file, *args, **kwargs)
        ),
    )
    images = data.load_images(done)
    assert {Path(file).name for file in opened} == {"images.npy"}
    assert isinstance(images, np.memmap)
    assert not images.flags.writeable


def test_files_agree_with_the_manifest(done):
    manifest = json.loads((done / "manifest.json").read_text())
    for name, file in manifest["files"].items():
        content = (done / name).read_bytes()
        assert file == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["findings"] == {"Effusion": 3, "Mass": 3, "No Finding": 3}
    assert set(manifest["versions"]) == {"python", "lib", "numpy", "pandas", "PIL"}


def test_missing_files_name_the_step_to_run(done):
    (done / "metadata.csv").unlink()
    data.load_images(done, verify=True)
    with pytest.raises(ValueError, match=r"metadata\.csv: run 01_preprocess first"):
        data.load(done)
    with pytest.raises(ValueError, match=r"images\.npy: run 01_preprocess first"):
        data.load_images(done / "nowhere")
    (done / "manifest.json").unlink()
    with pytest.raises(ValueError, match="preprocessing did not finish"):
        data.load_images(done, verify=True)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((6, 64, 64), np.float32), r"not float32 \(6, 64, 64\)"),
        (np.zeros((6, 64, 32), np.uint8), r"not uint8 \(6, 64, 32\)"),
        (np.zeros((0, 64, 64), np.uint8), r"not uint8 \(0, 64, 64\)"),
        (np.zeros((5, 64, 64), np.uint8), "6 rows for 5 images"),
    ],
)
def test_arrays_of_another_kind_are_refused(array, message, done):
    np.save(done / "images.npy", array)
    with pytest.raises(ValueError, match=message):
        data.load(done)


def test_changed_files_are_found(done):
    raw = bytearray((done / "images.npy").read_bytes())
    raw[-1] ^= 1
    (done / "images.npy").write_bytes(raw)
    data.load_images(done)
    with pytest.raises(ValueError, match="is not the file that the manifest was written for"):
        data.load_images(done, verify=True)
    for content, message in ((b"text", "is not a .npy array"), (b"", "is not a .npy array")):
        (done / "images.npy").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            data.load_images(done)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "is not a CSV"), ("image_id,age\na,1\n", "has no column patient_id, findings")],
)
def test_a_metadata_file_of_another_kind_is_refused(text, message, done):
    (done / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.load(done)


# --------------------------------------------------------------------------------------------------


def test_findings_are_nihs_14():
    names = "Atelectasis Cardiomegaly Consolidation Edema Effusion Emphysema Fibrosis Hernia"
    names += " Infiltration Mass Nodule Pleural_Thickening Pneumonia Pneumothorax"
    assert list(data.FINDINGS) == names.split()


def test_finding_matrix():
    matrix = data.finding_matrix(
        pd.Series(
            ["Mass|Hernia", "No Finding", "", "Rib Fracture|Edema", "Pneumothorax"],
            index=[9, 8, 7, 6, 5],
        )
    )
    assert matrix.dtype == bool
    assert matrix.shape == (5, 14)
    assert [[data.FINDINGS[k] for k in np.flatnonzero(row)] for row in matrix] == [
        ["Hernia", "Mass"],
        [],
        [],
        ["Edema"],
        ["Pneumothorax"],
    ]


def test_label_combinations():
    codes = data.label_combinations(pd.Series(["No Finding", "Mass", "", "Mass|Edema", "Mass"]))
    assert codes.dtype == np.int64
    assert codes.tolist() == [2, 0, -1, 1, 0]
    assert data.label_combinations([]).shape == (0,)


# --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not SAMPLE.is_dir(),
    reason=f"no real sample: set CXR_SAMPLE to a folder with NIH X-rays ({SAMPLE.name} is not there)",
)
def test_real_sample(tmp_path):
    shown = data.fetch(SAMPLE, tmp_path / "raw")
    manifest = data.preprocess(tmp_path / "raw", tmp_path / "out")
    images, metadata = data.load(tmp_path / "out", verify=True)
    assert shown["kind"] == manifest["source"]["kind"] == "nih"
    assert manifest["source"]["csv"] == "Data_Entry_2017.csv"
    assert len(images) == len(metadata) == manifest["images"] == shown["images"]
    assert manifest["dropped"] == []
    assert manifest["csv_rows_without_image"] == manifest["images_without_csv_row"] == 0
    assert manifest["unknown_findings"] == {}
    assert metadata.groupby("patient_id")["split"].nunique().max() == 1
    assert metadata["split"].eq("test").mean() == pytest.approx(0.2, abs=0.01)
    assert metadata["age"].dropna().between(0, 120).all()
    # Radiographs, not noise or blanks: neighbouring pixels agree, and every image has contrast.
    pixels = np.asarray(images, float)
    assert np.corrcoef(pixels[:, :, 1:].ravel(), pixels[:, :, :-1].ravel())[0, 1] > 0.95
    assert pixels.std(axis=(1, 2)).min() > 5
    large = max(
        SAMPLE.rglob("*.png"), key=lambda path: path.stat().st_size
    )  # one at NIH's own 1024 x 1024
    reference = (
        np.asarray(Image.open(large).convert("L"), float).reshape(64, 16, 64, 16).mean(axis=(1, 3))
    )
    row = metadata.index[metadata["image_id"] == large.name][0]
    np.testing.assert_allclose(images[row], reference, atol=0.5)


def test_an_image_of_no_known_patient_is_a_patient_of_its_own():
    table = pd.DataFrame({"patient_id": ["7", "", "7", "", None]})
    assert data.patient_groups(table).tolist() == ["7", "image 1", "7", "image 3", "image 4"]
    assert data.count_patients(table) == 1
    assert data.count_patients(table.iloc[[1, 3]]) == 0


WRITER = """
import sys
from lib import data
try:
    print(data.preprocess(sys.argv[1], sys.argv[2], workers=1)["files"]["images.npy"]["sha256"])
except OSError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_two_processes_that_preprocess_into_one_folder(tmp_path):
    """One does the work; the other waits for a moment and then ends with one line, or finds the
    work done.
    """
    folder = make_folder(tmp_path / "in", 4)
    command = [sys.executable, "-c", WRITER, str(folder), str(tmp_path / "out")]
    with paths.alone(tmp_path / "out"):
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=paths.ROOT, check=True, timeout=60
        )
        lines = done.stdout.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith(
            "BusyError: another process is at work in (outside the project)/out: wait until it is done"
        )
        assert [path.name for path in (tmp_path / "out").iterdir()] == [
            ".lock"
        ]  # nothing was begun
    both = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=paths.ROOT
        )
        for _ in range(2)
    ]
    answers = {process.communicate(timeout=60)[0].strip() for process in both}
    assert answers == {
        paths.load_json(tmp_path / "out" / "manifest.json")["files"]["images.npy"]["sha256"]
    }
