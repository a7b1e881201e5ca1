"""lib.data.decode: DICOM as a screen would show it, and 2,000 damaged files, each read rightly or
refused with its reason.
"""

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from lib import data, paths
from lib.data import decode
from tests.test_data import RAMP, make_folder, write_png

try:
    import pydicom
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, RLELossless
except ImportError:
    pydicom = None

needs_pydicom = pytest.mark.skipif(pydicom is None, reason="the extra 'dicom' is not installed")
VALUES = np.linspace(0, 4095, 64 * 64).round().astype(np.uint16).reshape(64, 64)


def dicom(path, values=VALUES, syntax=None, **elements):
    """A DICOM file of 12-bit gray, with other elements as named."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = (
        "1.2.840.10008.5.1.4.1.1.1.1",
        "1.2.3",
    )
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = Dataset()
    ds.file_meta = meta
    ds.SOPClassUID, ds.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = "Secret^Name", "ID-4711", "19500101"
    ds.Rows, ds.Columns = values.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = (
        1,
        "MONOCHROME2",
        int(values.dtype.kind == "i"),
    )
    ds.BitsAllocated, ds.BitsStored = 8 * values.itemsize, 12 if values.itemsize == 2 else 8
    ds.HighBit = ds.BitsStored - 1
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.PixelData = values.tobytes()
    if syntax is not None:
        ds.compress(syntax)
    ds.save_as(path, enforce_file_format=True)
    return path


def gray(path, **options):
    pixels, record = decode.decode(path, **options)
    assert record["reason"] == ""
    return pixels.astype(int)


def rounded(share):
    return np.floor(np.clip(share, 0, 1) * 255 + 0.5)


# --------------------------------------------------------------------------------------------------


@needs_pydicom
def test_without_a_window_the_bits_in_use_are_the_range(tmp_path):
    np.testing.assert_array_equal(gray(dicom(tmp_path / "a.dcm")), rounded(VALUES / 4095.0))
    np.testing.assert_array_equal(
        gray(dicom(tmp_path / "b.dcm", (VALUES // 8).astype(np.uint16))),
        rounded(VALUES // 8 / 511.0),
    )
    signed = (VALUES.astype(int) - 2048).astype(np.int16)
    np.testing.assert_array_equal(
        gray(dicom(tmp_path / "c.dcm", signed)), rounded((signed + 2048.0) / 4095)
    )
    np.testing.assert_array_equal(gray(dicom(tmp_path / "d.dcm", RAMP)), RAMP)


@needs_pydicom
def test_monochrome1_is_inverted(tmp_path):
    plain, inverse = (
        dicom(tmp_path / "a.dcm"),
        dicom(tmp_path / "b.dcm", PhotometricInterpretation="MONOCHROME1"),
    )
    np.testing.assert_array_equal(gray(inverse), 255 - gray(plain))


@needs_pydicom
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2, -1000), (0.5, 100), (-1, 4095)])
def test_window_and_rescale_are_applied(slope, intercept, tmp_path):
    """DICOM PS3.3, C.11.2.1.2.1: y = (x - (c - 0.5)) / (w - 1) + 0.5 of the rescaled value."""
    path = dicom(
        tmp_path / "a.dcm",
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        WindowCenter=[1500, 1],
        WindowWidth=[1001, 2],
    )
    np.testing.assert_array_equal(
        gray(path), rounded((slope * VALUES.astype(float) + intercept - 1499.5) / 1000 + 0.5)
    )
    rescaled = dicom(tmp_path / "b.dcm", RescaleSlope=slope, RescaleIntercept=intercept)
    np.testing.assert_array_equal(
        gray(rescaled), rounded(VALUES / 4095.0 if slope > 0 else 1 - VALUES / 4095.0)
    )


@needs_pydicom
def test_run_length_needs_no_further_package(tmp_path):
    np.testing.assert_array_equal(
        gray(dicom(tmp_path / "a.dcm", syntax=RLELossless)), gray(dicom(tmp_path / "b.dcm"))
    )


@needs_pydicom
def test_what_cannot_be_shown_is_refused_with_its_reason(tmp_path):
    stack = np.stack([VALUES, VALUES])
    cases = {
        "frames": (
            dicom(tmp_path / "frames.dcm", stack, Rows=64, Columns=64, NumberOfFrames=2),
            "multi-frame DICOM (2 frames)",
        ),
        "zero": (dicom(tmp_path / "zero.dcm", Rows=0), "64 x 0 pixels"),
        "large": (
            dicom(tmp_path / "large.dcm", Rows=60_000, Columns=60_000),
            "pixels are too many",
        ),
        "window": (dicom(tmp_path / "window.dcm", WindowCenter=1, WindowWidth=0), "Window Width"),
        "palette": (
            dicom(tmp_path / "palette.dcm", RAMP, PhotometricInterpretation="PALETTE COLOR"),
            "is no radiograph's",
        ),
        "short": (dicom(tmp_path / "short.dcm", Rows=640), "pixel data"),
    }
    dataset = pydicom.dcmread(dicom(tmp_path / "jpeg.dcm", RAMP))
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "jpeg.dcm")
    cases["jpeg"] = (tmp_path / "jpeg.dcm", "pip install pylibjpeg[all]")
    del dataset.PixelData
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(tmp_path / "report.dcm")
    cases["report"] = (tmp_path / "report.dcm", "DICOM without an image")
    for name, (path, reason) in cases.items():
        pixels, record = decode.decode(path)
        assert pixels is None, name
        assert reason.lower() in record["reason"].lower(), (name, record["reason"])


@needs_pydicom
def test_colour_dicom_is_gray(tmp_path):
    path = dicom(
        tmp_path / "a.dcm",
        np.repeat(RAMP[..., None], 3, -1),
        SamplesPerPixel=3,
        PhotometricInterpretation="RGB",
        PlanarConfiguration=0,
    )
    np.testing.assert_array_equal(gray(path), RAMP)


@needs_pydicom
def test_a_folder_of_dicom_png_and_jpeg_gives_away_no_name(tmp_path):
    folder = tmp_path / "in"
    (folder / "study" / "series").mkdir(parents=True)
    header = {"PatientAge": "060Y", "PatientSex": "F", "ViewPosition": "PA"}
    dicom(folder / "study" / "series" / "IM0001", **header)
    dicom(folder / "study" / "series" / "1.2.840.7", PatientID="ID-4712")
    dicom(folder / "study" / "wrong.png", **header)
    Image.fromarray(RAMP).save(folder / "b.jpg")
    (folder / "study" / "README").write_text("no image")
    (folder / "study" / "DICOMDIR").write_bytes((folder / "study" / "wrong.png").read_bytes())
    (folder / "labels.csv").write_text("Image Index,Finding Labels,Patient Age\nIM0001,Mass,50\n")
    manifest = data.preprocess(folder, tmp_path / "out")
    metadata = data.load(tmp_path / "out")[1].set_index("image_id")
    assert list(metadata.index) == ["1.2.840.7", "IM0001", "b.jpg", "wrong.png"]
    assert metadata.loc["IM0001", ["findings", "age", "sex", "view_position"]].tolist() == [
        "Mass",
        50.0,
        "F",
        "PA",
    ]
    assert metadata.loc["wrong.png", ["findings", "age"]].tolist() == ["", 60.0]
    assert (
        metadata.loc["IM0001", "patient_id"]
        == metadata.loc["wrong.png", "patient_id"]
        != metadata.loc["1.2.840.7", "patient_id"]
    )
    assert metadata.loc["b.jpg", "patient_id"] == "b.jpg"
    assert manifest["image_modes"] == {"DICOM MONOCHROME2": 3, "L": 1}
    assert manifest["other_files"] == {".csv": 1, "no extension": 2}
    for name in ("metadata.csv", "manifest.json"):
        text = (tmp_path / "out" / name).read_text()
        assert not any(word in text for word in ("Secret", "4711", "4712", "1950"))


def test_without_pydicom_the_line_to_install_it_is_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    folder = make_folder(tmp_path / "in", 4)
    (folder / "a.dcm").write_bytes(bytes(128) + b"DICM")
    manifest = data.preprocess(folder, tmp_path / "out", max_broken=0.5)
    assert manifest["dropped"] == [
        {
            "file": "a.dcm",
            "reason": 'a DICOM file, which needs pydicom: python -m pip install "pydicom>=3"',
        }
    ]


# --------------------------------------------------------------------------------------------------


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width, height, body=b""):
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", body or zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def seeds(folder):
    """Whole files of every kind, with the pixels they must give if they are read at all."""
    rng = np.random.default_rng(1)
    image = np.clip(RAMP + rng.integers(0, 40, RAMP.shape), 0, 255).astype(np.uint8)
    found = {}
    for name, options in {
        "g.png": {},
        "i.png": {"compress_level": 0},
        "j.jpg": {"quality": 90},
        "p.jpg": {"progressive": True},
    }.items():
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG" if name.endswith("png") else "JPEG", **options)
        found[name] = buffer.getvalue()
    write_png(folder / "seed", image.astype(int) * 257, 16)
    found["w.png"] = (folder / "seed").read_bytes()
    if pydicom is not None:
        found["d.dcm"] = dicom(folder / "seed").read_bytes()
        found["r.dcm"] = dicom(folder / "seed", syntax=RLELossless).read_bytes()
    (folder / "seed").unlink()
    return found


def write_damaged(folder, n=2000, seed=0):
    """`n` files in `folder`: names as bytes, and what each is."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, whole = np.random.default_rng(seed), seeds(folder)
    bomb = zlib.compress(bytes(8_000_000), 9)  # 8 kB that inflate to 8 MB
    fixed = [
        png_claiming(0, 64),
        png_claiming(64, 0),
        png_claiming(100_000, 100_000),
        png_claiming(100_000, 1),
        png_claiming(2**31, 2**31),
    ]
    fixed += [
        png_claiming(8192, 8192, bomb),
        png_claiming(64, 64, bomb),
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        bytes(128) + b"DICM",
    ]
    text = chunk(
        b"zTXt", b"a\0\0" + zlib.compress(bytes(64_000_000), 9)
    )  # 62 kB of comment that inflate to 64 MB
    good = whole["g.png"]
    fixed += [
        good[:33] + text + good[33:],
        b"GIF89a" + bytes(50),
        b"BM" + bytes(200),
        b"<svg/>",
        b"II*\0" + bytes(99),
    ]
    outside = folder.parent / "outside.png"
    outside.write_bytes(good)
    kinds = {}
    names = list(whole)
    for number in range(n):
        kind = (
            "flip",
            "flip",
            "cut",
            "zero",
            "insert",
            "extension",
            "fixed",
            "noise",
            "link",
            "name",
        )[number % 10]
        name = names[rng.integers(len(names))]
        content = bytearray(whole[name])
        if kind == "flip":
            for _ in range(rng.integers(1, 9)):
                content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        elif kind == "cut":
            content = content[: rng.integers(len(content))]
        elif kind == "zero":
            start = rng.integers(len(content))
            content[start : start + 200] = bytes(min(200, len(content) - start))
        elif kind == "insert":
            start = rng.integers(len(content))
            content[start:start] = rng.bytes(int(rng.integers(1, 300)))
        elif kind == "fixed":
            content = fixed[(number // 10) % len(fixed)]
        elif kind == "noise":
            content = bytes(content[:4]) + rng.bytes(int(rng.integers(0, 4000)))
        suffix = {"extension": (".png", ".jpg", ".dcm")[rng.integers(3)]}.get(kind, name[1:])
        file = f"{number:05d}{suffix}".encode()
        if kind == "name":
            file = (
                f"{number:05d}".encode()
                + (b"\n", b"\xff\xfe", b"\t;$(id)`", b"\xe2\x80\xae")[rng.integers(4)]
                + suffix.encode()
            )
        path = os.path.join(os.fsencode(folder), file)
        if kind == "link":
            target = (os.fsencode(outside), b"/dev/zero", b"nowhere.png", b"../outside.png", None)[
                number // 10 % 5
            ]
            os.mkfifo(path) if target is None else os.symlink(target, path)
        else:
            with open(path, "wb") as handle:
                handle.write(content)
        kinds[file.decode("utf-8", "backslashreplace") if kind != "name" else f"{number:05d}"] = (
            kind,
            name,
        )
    return kinds, whole


SCRIPT = """
import json, resource, sys, time
from lib import data
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.monotonic()
manifest = data.preprocess(sys.argv[1], sys.argv[2], max_broken=1.0, workers=2)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"grown": (peak - before) * 1024 // (1024 if sys.platform == "darwin" else 1), "seconds": time.monotonic() - begin}))
"""


@pytest.mark.skipif(
    os.name != "posix", reason="links and names of any bytes need a POSIX file system"
)
def test_two_thousand_damaged_files(tmp_path):
    """In a process of its own, whose memory grows by less than 400 MB: the largest image that is
    allowed has 64 MB.
    """
    try:
        kinds, whole = write_damaged(tmp_path / "in")
    except OSError:
        pytest.skip("this file system refuses such names")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "in"), str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=paths.ROOT, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["grown"] < 400e6
    images, metadata = data.load(tmp_path / "out", verify=True)
    manifest = paths.load_json(tmp_path / "out" / "manifest.json")
    dropped = {item["file"]: item["reason"] for item in manifest["dropped"]}
    assert len(images) + len(dropped) == len(kinds) == 2000
    assert not set(dropped) & set(metadata["image_id"])
    assert all(
        reason and reason.isprintable() and len(reason) <= 200 for reason in dropped.values()
    )

    expected = {}
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
        expected[name], _ = decode.decode(tmp_path / name)
    read = dict(zip(metadata["image_id"], images, strict=True))
    for image_id, image in read.items():
        kind, name = kinds.get(image_id) or kinds[image_id[:5]]
        assert kind != "link", image_id
        if kind in ("extension", "name") or (
            name.endswith(".png") and kind in ("flip", "zero", "cut", "insert")
        ):
            # whole content is read whatever its name; a PNG has checksums, so that what is read at
            # all has its true pixels
            np.testing.assert_array_equal(image, expected[name], err_msg=image_id)
    whole_kinds = [key for key, (kind, _) in kinds.items() if kind in ("extension", "name")]
    assert sum(kinds.get(i, kinds.get(i[:5]))[0] in ("extension", "name") for i in read) == len(
        whole_kinds
    )
    reasons = " ".join(dropped.values())
    for words in (
        "out of the folder",
        "too many",
        "no image in it",
        "checksum",
        "truncated",
        "empty file",
        "No such file",
        "not a regular",
    ):
        assert words in reasons, words


def repack(content, change):
    """A PNG with right checksums around what `change` makes of its compressed data."""
    place, first, last, data = 8, 0, 0, b""
    while place < len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if kind == b"IDAT":
            first, last, data = (
                first or place,
                place + 12 + length,
                data + content[place + 8 : place + 8 + length],
            )
        place += 12 + length
    return content[:first] + chunk(b"IDAT", change(data)) + content[last:]


def every_png(folder):
    """A PNG of each colour type, depth and size of row, interlaced too, with the filters that an
    encoder chooses.
    """
    rng = np.random.default_rng(3)
    gray = np.clip(
        np.add.outer(np.arange(70), np.arange(61)) + rng.integers(0, 9, (70, 61)), 0, 255
    ).astype(np.uint8)
    image = Image.fromarray(gray)
    rgb = Image.merge("RGB", [image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image])
    for name, kind in (
        ("1", image.convert("1")),
        ("L", image),
        ("P", rgb.quantize(13)),
        ("RGB", rgb),
        ("LA", image.convert("LA")),
    ):
        kind.save(folder / f"{name}.png", optimize=True)
    rgb.convert("RGBA").save(folder / "RGBA.png")
    write_png(folder / "16.png", gray.astype(int) * 257, 16)
    rows = b"".join(
        b"\0" + np.ascontiguousarray(gray[top::down, left::across][row]).tobytes()
        for left, top, across, down in decode._ADAM7
        for row in range(len(range(top, 70, down)))
    )
    head = struct.pack(">IIBBBBB", 61, 70, 8, 0, 0, 0, 1)
    interlaced = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    (folder / "interlaced.png").write_bytes(interlaced)
    return sorted(folder.glob("*.png"))


def test_every_kind_of_png_gives_the_pixels_that_pillow_alone_reads(tmp_path, monkeypatch):
    files = every_png(tmp_path)
    assert len(files) == 8
    for path in files:
        pixels, record = decode.decode(path)
        assert record["reason"] == "", path.name
        with Image.open(path) as image:
            np.testing.assert_array_equal(
                pixels, decode.shrink(decode._to_gray(image), 64), err_msg=path.name
            )
        monkeypatch.setattr(
            decode, "_INFLATED", 0
        )  # as for images so large that the inflated data are not kept
        np.testing.assert_array_equal(decode.decode(path)[0], pixels, err_msg=path.name)
        monkeypatch.undo()


def test_damaged_data_under_right_checksums_are_no_half_image(tmp_path):
    """Each file here has the right CRC everywhere; only its compressed data tell."""
    flipped = 0
    for path in every_png(tmp_path):
        content, bad = path.read_bytes(), tmp_path / "bad"
        rng = np.random.default_rng(len(content))

        def flip(data, rng=rng):
            changed = bytearray(data)
            changed[rng.integers(2, len(data))] ^= 1 << rng.integers(8)
            return bytes(changed)

        faults = {
            "cannot be inflated": [flip] * 20 + [lambda data: data[:-1] + bytes([data[-1] ^ 1])],
            "end early": [
                lambda data: data[:-1],
                lambda data: data[: len(data) // 2],
                lambda data: b"",
            ],
            "more data": [
                lambda data: zlib.compress(zlib.decompress(data) + b"\0"),
                lambda data: zlib.compress(bytes(10**7)),
            ],
        }
        faults["end early"].append(lambda data: zlib.compress(zlib.decompress(data)[:-1]))
        for words, changes in faults.items():
            for change in changes:
                bad.write_bytes(repack(content, change))
                pixels, record = decode.decode(bad)
                assert pixels is None, (path.name, words)
                assert words in record["reason"] or change is flip, (
                    path.name,
                    words,
                    record["reason"],
                )
                flipped += change is flip
    assert flipped == 160


@pytest.mark.skipif(decode.fast_zlib is zlib, reason="the extra 'fast' is not installed")
def test_isal_and_zlib_give_the_same_answers(tmp_path, monkeypatch):
    """Whole, damaged and cut streams: the same pixels, or the same reason."""
    rng, answers = np.random.default_rng(5), {}
    for number, path in enumerate(every_png(tmp_path) * 40):
        content = path.read_bytes()

        def change(data, number=number):
            changed = bytearray(data)
            if number % 4:
                changed[rng.integers(len(data))] ^= 1 << rng.integers(8)
            return bytes(changed[: rng.integers(1, len(data))] if number % 4 == 1 else changed)

        file = tmp_path / f"{number}.bin"
        file.write_bytes(repack(content, change))
        answers[file] = decode.decode(file)
    monkeypatch.setattr(decode, "fast_zlib", zlib)
    reasons = set()
    for file, (pixels, record) in answers.items():
        plain = decode.decode(file)
        assert plain[1] == record, file.name
        np.testing.assert_array_equal(plain[0], pixels)
        reasons.add(record["reason"])
    assert len(reasons) >= 3


def test_pillows_settings_are_as_they_were():
    before = (Image.core.get_blocks_max(), ImageFile.LOAD_TRUNCATED_IMAGES)
    with decode.strict():
        assert Image.core.get_blocks_max() > 0
    assert (Image.core.get_blocks_max(), ImageFile.LOAD_TRUNCATED_IMAGES) == before


def test_a_file_that_may_not_be_read_is_listed(tmp_path):
    if os.name != "posix" or os.geteuid() == 0:
        pytest.skip("root, and Windows, read any file")
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    assert decode.decode(tmp_path / "a.png")[1]["reason"] == "Permission denied"


def test_a_file_that_fails_while_it_is_read_is_listed(tmp_path, monkeypatch):
    """What root can test of it: the error of the disk, or of the rights, is the reason."""
    folder = make_folder(tmp_path / "in", 4)
    real = Path.read_bytes

    def failing(path):
        if path.name == "00000001_001.png":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    manifest = data.preprocess(folder, tmp_path / "out", max_broken=0.5)
    assert manifest["dropped"] == [
        {"file": "images_001/images/00000001_001.png", "reason": "Permission denied"}
    ]


def test_links_inside_the_folder_are_followed(tmp_path):
    folder = make_folder(tmp_path / "in", 2, table=False)
    (folder / "linked.png").symlink_to("images_001/images/00000001_000.png")
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    assert data.preprocess(tmp_path / "link", tmp_path / "out")["images"] == 3
