"""lib.data.decode: every kind of PNG and JPEG, DICOM as pydicom shows it, and damaged files."""

import io
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lib.data import decode
from tests.xrays import RAMP, V, chunk, dicom, png

try:
    import pydicom
    from pydicom.dataset import Dataset
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
except ImportError:
    pydicom = None

needs_pydicom = pytest.mark.skipif(pydicom is None, reason="the extra 'dicom' is not installed")
FULL = np.floor(V * (255 / 4095) + 0.5)  # V as gray levels


@pytest.fixture
def read(tmp_path):
    """Gray levels of the content of a file, or of a DICOM file by its elements."""

    def gray(content=None, **options):
        path = tmp_path / "file"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            dicom(path, **({} if content is None else {"values": content}), **options)
        pixels, record = decode.decode(path)
        assert record["reason"] == ""
        assert record["image"]
        return pixels.astype(int)

    return gray


@pytest.fixture
def reason(tmp_path):
    """Why a file is not read."""

    def why(content=None, suffix=".png", **options):
        path = tmp_path / f"file{suffix}"
        path.write_bytes(content) if isinstance(content, bytes) else dicom(path, **options)
        pixels, record = decode.decode(path)
        assert pixels is None
        assert "\n" not in record["reason"]
        return record["reason"]

    return why


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------- PNG and JPEG

GRAY = Image.fromarray(RAMP)
RGB, ALPHA = np.dstack([RAMP] * 3), np.full_like(RAMP, 255)
REVERSED = Image.fromarray(255 - RAMP).convert("P")
REVERSED.putpalette([255 - value for value in range(256) for _ in range(3)])
MODES = {
    "gray": saved(GRAY),
    "RGB": saved(Image.fromarray(RGB)),
    "RGBA, alpha 255 as in NIH's": saved(Image.fromarray(np.dstack([RGB, ALPHA]))),
    "RGBA, alpha 0 everywhere": saved(Image.fromarray(np.dstack([RGB, 0 * ALPHA]))),
    "gray with alpha": saved(GRAY.convert("LA")),
    "palette": saved(GRAY.convert("P")),
    "reversed palette": saved(REVERSED),
    "palette with transparency": saved(GRAY.convert("P"), transparency=bytes([255] * 256)),
    "16-bit gray": png(RAMP.astype(int) * 257, 16),
    "one byte too many": png(RAMP, 8, extra=b"\0"),
    "one row too many": png(RAMP, 8, extra=bytes(65)),
    "JPEG": saved(GRAY, "JPEG", quality=100),
    "RGB JPEG": saved(GRAY.convert("RGB"), "JPEG", quality=100, subsampling=0),
    "CMYK JPEG": saved(GRAY.convert("RGB").convert("CMYK"), "JPEG", quality=100),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_same_gray(mode, read):
    np.testing.assert_allclose(read(MODES[mode]), RAMP, atol=3 if "JPEG" in mode else 0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_fewer_bits_span_the_whole_range(bits, read):
    values = RAMP % 2**bits
    np.testing.assert_array_equal(read(png(values, bits)), values * (255 // (2**bits - 1)))


@pytest.mark.parametrize("top", [4095, 3000, 65535, 1000, 200, 0])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_16_bits_are_scaled_by_the_bits_in_use(colour, top, read):
    values = np.linspace(0, top, 4096).round().astype(int).reshape(64, 64)
    full = 2 ** max(8, top.bit_length()) - 1
    samples = np.repeat(values[..., None], {0: 1, 2: 3, 4: 2, 6: 4}[colour], axis=2)
    if colour >= 4:
        samples[..., -1] = 65535
    expected = np.floor(values * (255 / full) + 0.5)
    np.testing.assert_array_equal(read(png(samples.reshape(64, -1), 16, colour)), expected)


@pytest.mark.parametrize("colour", [4, 6])
@pytest.mark.parametrize("bits", [8, 16])
def test_alpha_that_varies_is_laid_over_black(bits, colour, read):
    samples = np.repeat(RAMP.astype(int)[..., None], {4: 2, 6: 4}[colour], axis=2)
    samples[..., -1] = np.where(np.arange(64) < 32, 0, 255)
    content = png(samples.reshape(64, -1) * (257 if bits == 16 else 1), bits, colour)
    np.testing.assert_array_equal(read(content), np.where(np.arange(64) < 32, 0, RAMP))


def test_colours_of_16_bits_have_pillows_weights(read):
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    colours[0, 0] = 255
    wide = read(png(colours.reshape(64, -1) * 257, 16, 2))
    narrow = np.asarray(Image.fromarray(colours.astype(np.uint8)).convert("L")).astype(int)
    assert np.abs(wide - narrow).max() <= 1


@pytest.mark.parametrize("bright", [4096, 65535])
def test_a_hot_pixel_or_a_burnt_in_letter_does_not_set_the_scale(bright, read):
    plain, hot, letter = (np.full((64, 64), 2000) for _ in range(3))
    plain[:, :8] = hot[:, :8] = letter[:, :8] = 100
    hot[5, 5] = bright
    letter[2:12, 30:38] = 65535
    for values in (hot, letter):
        for content in (png(values, 16), values.astype(np.uint16)):
            options = {} if isinstance(content, bytes) else {"BitsStored": 16}
            got, same = read(content, **options), values == plain
            np.testing.assert_array_equal(got[same], read(png(plain, 16))[same])
            assert (got[~same] == 255).all()


def test_exif_orientation_is_applied_and_a_damaged_one_is_not(read):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    turned = np.rot90(RAMP, -1)
    content = saved(GRAY, "JPEG", quality=100, exif=exif)
    np.testing.assert_allclose(read(content), turned, atol=3)
    deep = png(RAMP.astype(int) * 257, 16)
    note = chunk(b"eXIf", exif.tobytes()[6:])
    np.testing.assert_array_equal(read(deep[:33] + note + deep[33:]), turned)
    broken = saved(GRAY, "JPEG", quality=100, exif=b"Exif\0\0MM\0*\0\0\xff")
    np.testing.assert_allclose(read(broken), RAMP, atol=3)


def test_a_malformed_note_of_further_pictures_is_no_error(read):
    content = saved(GRAY, "JPEG", quality=100)
    note = b"MPF\0MM\0*\0\0\0\x08\0\x01\xb0\x01\0\x04\0\0\0\x02"
    segment = b"\xff\xe2" + (len(note) + 2).to_bytes(2, "big") + note
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_allclose(read(content[:2] + segment + content[2:]), RAMP, atol=3)


@example(1, 3, 1, 0, "stretch")  # a tie that Pillow's own reduce rounds down
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(1, 80),
    st.sampled_from([1, 7, 20]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(decode.FITS),
)
def test_shrinking_is_the_exact_area_mean_and_commutes_with_the_square(h, w, size, seed, fit):
    image = np.random.default_rng(seed).integers(0, 256, (h, w), dtype=np.uint8)
    small = decode.shrink(image, size, fit)
    # Each pixel as 2 x 2, so that a centre may lie between pixels; then the canvas; then size x
    # size equal parts of each.
    canvas = image.repeat(2, 0).repeat(2, 1).astype(np.int64)
    if fit == "pad":
        canvas = np.pad(canvas, [(max(h, w) - h,) * 2, (max(h, w) - w,) * 2])
    if fit == "crop":
        down, across = h - min(h, w), w - min(h, w)
        canvas = canvas[down : 2 * h - down, across : 2 * w - across]
    h, w = canvas.shape
    parts = canvas.repeat(size, 0).repeat(size, 1).reshape(size, h, size, w).sum(axis=(1, 3))
    np.testing.assert_array_equal(small, (2 * parts + h * w) // (2 * h * w))
    for turns, mirror in itertools.product(range(4), (False, True)):
        moved = np.rot90(np.fliplr(image) if mirror else image, turns)
        again = decode.shrink(np.ascontiguousarray(moved), size, fit)
        np.testing.assert_array_equal(again, np.rot90(np.fliplr(small) if mirror else small, turns))


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 16])
def test_the_mean_of_whole_blocks(factor):
    image = np.random.default_rng(0).integers(0, 256, (64 * factor,) * 2, dtype=np.uint8)
    sums = image.reshape(64, factor, 64, factor).sum(axis=(1, 3))
    expected = (2 * sums + factor**2) // (2 * factor**2)
    for fit in decode.FITS:
        np.testing.assert_array_equal(decode.shrink(image, 64, fit), expected)


WHOLE = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (WHOLE[: len(WHOLE) // 2], "truncated"),
        (WHOLE[:-12], "truncated"),
        (saved(GRAY, "JPEG")[:560], "truncated"),
        (b"", "empty"),
        (b"Image Index,Finding Labels", "not a PNG, JPEG or DICOM"),
        (saved(GRAY, "GIF"), "not a PNG, JPEG or DICOM"),
        (WHOLE[:3000] + bytes([WHOLE[3000] ^ 4]) + WHOLE[3001:], "broken PNG"),
        (b"\x89PNG\r\n\x1a\n", "damaged header"),
        (png(RAMP[:0].reshape(0, 64), 8), ""),
    ],
)
def test_a_damaged_picture_has_a_reason(content, word, reason):
    assert word.lower() in reason(content).lower()


def test_random_damage_ends_in_a_reason_or_in_the_right_pixels(tmp_path):
    """PNGs have checksums: one that is read at all has its true pixels."""
    rng, path = np.random.default_rng(0), tmp_path / "file"
    files = [WHOLE, saved(GRAY, "JPEG"), png(V, 16)]
    files += [dicom(path).read_bytes()] if pydicom else []
    for number, content in enumerate(files * 60):
        path.write_bytes(content)
        true = decode.decode(path)[0]
        changed = bytearray(content)
        for _ in range(rng.integers(1, 9)):
            changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
        cut = rng.integers(len(changed)) if number % 3 == 0 else None
        path.write_bytes(changed[:cut])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels, record = decode.decode(path)
        assert (pixels is None) == bool(record["reason"])
        assert "\n" not in record["reason"]
        if pixels is not None and content[:4] == b"\x89PNG":
            np.testing.assert_array_equal(pixels, true)


# ----------------------------------------------------------------------------------------- DICOM


def lut(data, descriptor):
    item = Dataset()
    item.LUTDescriptor = descriptor
    item.add_new("LUTData", "OW" if isinstance(data, bytes) else "US", data)
    return [item]


CASES = {  # name: elements, and the gray levels of V
    "12 bits": ({}, FULL),
    "LUT that claims 16 bits": ({"VOILUTSequence": (range(4096), [4096, 0, 16])}, FULL),
    "modality LUT that does": ({"ModalityLUTSequence": (range(4096), [4096, 0, 16])}, FULL),
    "LUT of 8 bits, packed": (
        {"VOILUTSequence": (bytes(i // 16 for i in range(4096)), [4096, 0, 8])},
        V // 16,
    ),
    "LUT of 8 bits, in words": (
        {"VOILUTSequence": ([i // 16 for i in range(4096)], [4096, 0, 8])},
        V // 16,
    ),
    "LUT that begins at 1000": ({"VOILUTSequence": (range(1024), [1024, 1000, 10])}, None),
    "LUT shorter than it claims": ({"VOILUTSequence": (range(4096), [0, 0, 12])}, FULL),
    "LUT without items, and window": (
        {"VOILUTSequence": [Dataset()], "WindowCenter": 2048, "WindowWidth": 4096},
        np.floor(np.clip((V - 2047.5) / 4095 + 0.5, 0, 1) * 255 + 0.5),
    ),
    "slope without intercept": ({"RescaleSlope": 2}, FULL),
    "intercept without slope": ({"RescaleIntercept": -1000}, FULL),
    "empty rescale": ({"RescaleSlope": "", "RescaleIntercept": ""}, FULL),
    "rescale that inverts": ({"RescaleSlope": -1, "RescaleIntercept": 4095}, 255 - FULL),
    "window without width": ({"WindowCenter": 100}, FULL),
    "empty window": ({"WindowCenter": "", "WindowWidth": ""}, FULL),
    "MONOCHROME1": ({"PhotometricInterpretation": "MONOCHROME1"}, 255 - FULL),
    "inverse": ({"PresentationLUTShape": "INVERSE"}, 255 - FULL),
    "MONOCHROME1 and inverse": (
        {"PhotometricInterpretation": "MONOCHROME1", "PresentationLUTShape": "INVERSE"},
        255 - FULL,
    ),
    "16 bits stored": ({"BitsStored": 16}, FULL),
    "13 bits stored": ({"BitsStored": 13}, np.floor(V * (255 / 8191) + 0.5)),
    "int16, 16 bits stored": ({"values": V.astype("i2"), "BitsStored": 16}, FULL),
    "int16, 14 bits stored": ({"values": V.astype("i2"), "BitsStored": 14}, FULL),
    "int16 with negative values": ({"values": V.astype("i2") - 2048}, FULL),
    "int16 of a CT": (
        {"values": V.astype("i2") - 1024, "BitsStored": 16},
        np.floor(V * (255 / 5119) + 0.5),
    ),
    "half as many bits": ({"values": V // 64}, np.floor((V // 64) + 0.5)),
    "high bit 15": ({"values": V * 16, "HighBit": 15}, FULL),
    "high bit 13": ({"values": V * 4 + 3, "HighBit": 13}, FULL),
    "8 bits": ({"values": RAMP}, RAMP),
    "run-length": ({"syntax": "1.2.840.10008.1.2.5"}, FULL),
    "deflated": ({"syntax": "1.2.840.10008.1.2.1.99"}, FULL),
    "without meta": ({"meta": False}, FULL),
    "without meta, implicit": ({"meta": False, "implicit": True}, FULL),
    "colour": (
        {
            "values": RGB,
            "SamplesPerPixel": 3,
            "PhotometricInterpretation": "RGB",
            "PlanarConfiguration": 0,
        },
        RAMP,
    ),
}


@needs_pydicom
@pytest.mark.parametrize("name", CASES)
def test_dicom_is_shown_as_the_standard_says(name, read):
    """PS3.3, C.11.1 and C.11.2: modality LUT or rescale, VOI LUT or window, presentation."""
    options, expected = dict(CASES[name][0]), CASES[name][1]
    for sequence in ("VOILUTSequence", "ModalityLUTSequence"):
        if isinstance(options.get(sequence), tuple):
            data, descriptor = options[sequence]
            data = data if isinstance(data, bytes) else list(data)
            options[sequence] = lut(data, descriptor)
    if expected is None:
        expected = np.floor(np.clip(V.astype(int) - 1000, 0, 1023) * (255 / 1023) + 0.5)
    np.testing.assert_array_equal(read(options.pop("values", V), **options), expected)


@needs_pydicom
@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", "", None])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2, -1000), (0.5, 100), (-1, 4095)])
def test_window_after_rescale(slope, intercept, function, read):
    x, c, w = V * float(slope) + intercept, 1500, 1001
    share = {
        "LINEAR_EXACT": (x - c) / w + 0.5,
        "SIGMOID": 1 / (1 + np.exp(-4 * (x - c) / w)),
    }.get(function, (x - c + 0.5) / (w - 1) + 0.5)
    windows = {"WindowCenter": [c, 1], "WindowWidth": [w, 2], "VOILUTFunction": function}
    got = read(RescaleSlope=slope, RescaleIntercept=intercept, **windows)
    np.testing.assert_array_equal(got, np.floor(np.clip(share, 0, 1) * 255 + 0.5))


@needs_pydicom
def test_padding_is_black_and_does_not_set_the_scale(read):
    values = V.copy()
    values[:8] = 65535
    options = {"BitsStored": 16, "PixelPaddingValue": 65535}
    expected = np.where(np.arange(64)[:, None] < 8, 0, FULL)
    np.testing.assert_array_equal(read(values, **options), expected)
    values[:4] = 60000
    np.testing.assert_array_equal(read(values, PixelPaddingRangeLimit=60000, **options), expected)
    inverse = np.where(np.arange(64)[:, None] < 8, 0, 255 - FULL)
    options["PhotometricInterpretation"] = "MONOCHROME1"
    np.testing.assert_array_equal(read(values, PixelPaddingRangeLimit=60000, **options), inverse)


@needs_pydicom
def test_the_files_that_come_with_pydicom(tmp_path):
    """Each gray image of one frame is read as pydicom's own steps show it, or has a reason."""
    root = Path(pydicom.__file__).parent / "data"
    files = [*(root / "test_files").rglob("*"), *(root / "charset_files").rglob("*.dcm")]
    compared = 0
    for path in sorted(file for file in files if file.is_file()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels, record = decode.decode(path, size=32, fit="stretch")
            assert (pixels is None) == bool(record["reason"])
            assert len(record["reason"]) <= 300
            dataset = pydicom.dcmread(path, force=True)
            try:
                values = dataset.pixel_array
            except Exception:  # no image, or no decoder
                assert pixels is None or "TransferSyntaxUID" not in dataset.file_meta, path.name
                continue
            single = int(dataset.get("NumberOfFrames") or 1) == 1
            if not single or not dataset.PhotometricInterpretation.startswith("MONOCHROME"):
                continue
            shown = apply_voi_lut(apply_modality_lut(values, dataset), dataset).astype(float)
        assert pixels is not None, (path.name, record["reason"])
        shown = -shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown
        spread = max(float(np.ptp(shown)), 1)
        gray = np.round((shown - shown.min()) * (255 / spread)).astype(np.uint8)
        shown = decode.shrink(gray, 32, "stretch")
        if min(pixels.std(), shown.std()) > 2:  # else there is nothing to compare
            assert np.corrcoef(pixels.ravel(), shown.ravel())[0, 1] > 0.99, path.name
            compared += 1
    assert compared > 50


@needs_pydicom
@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"values": np.stack([V, V]), "Rows": 64, "Columns": 64, "NumberOfFrames": 2}, "2 frames"),
        ({"Rows": 0}, "Rows 0"),
        ({"Rows": 640}, "pixel data"),
        ({"WindowCenter": 1, "WindowWidth": 0}, "Window Width"),
        ({"RescaleSlope": 0}, "RescaleSlope (0028,1053) is 0"),
        ({"values": RAMP, "PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
        ({"PhotometricInterpretation": None}, "without PhotometricInterpretation"),
        ({"PixelData": None}, "without PixelData"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_its_reason(options, word, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert word in reason(**options)


@needs_pydicom
@pytest.mark.parametrize("keyword", ["WindowCenter", "WindowWidth", "RescaleSlope"])
def test_a_decimal_comma_is_named_with_its_element(keyword, tmp_path, reason):
    numbers = {"WindowCenter": "25.5", "WindowWidth": "15.5", "RescaleSlope": "35.5"}
    content = dicom(tmp_path / "a", **numbers).read_bytes()
    wrong = numbers[keyword].replace(".", ",")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = reason(content.replace(numbers[keyword].encode(), wrong.encode()))
    assert f"{keyword} (0028,1" in text
    assert repr(wrong) in text


@needs_pydicom
def test_a_missing_decoder_is_named(tmp_path):
    dataset = pydicom.dcmread(dicom(tmp_path / "a.dcm", RAMP))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xd9"])
    dataset["PixelData"].VR = "OB"
    dataset.save_as(tmp_path / "a.dcm")
    pixels, record = decode.decode(tmp_path / "a.dcm")
    assert pixels is None
    assert "JPEG-LS" in record["reason"]
    assert "decoders" in record["reason"]


@needs_pydicom
def test_a_structured_report_is_not_an_image(tmp_path):
    report = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11", "PixelData": None, "Rows": None}
    pixels, record = decode.decode(dicom(tmp_path / "a", **report))
    assert pixels is None
    assert not record["image"]
    assert "SR" in record["reason"]


@needs_pydicom
def test_the_header_gives_away_no_name(tmp_path):
    path = dicom(tmp_path / "a", PatientAge="060Y", PatientSex="F", ViewPosition="PA")
    record = decode.decode(path)[1]
    number = record.pop("patient_id")
    assert number.startswith("sha256-")
    assert "4711" not in number
    assert (record["age"], record["sex"], record["view_position"]) == ("060Y", "F", "PA")
    assert not any(word in str(record) for word in ("Secret", "4711", "1950"))
    odd = decode.decode(dicom(tmp_path / "a", PatientID="", PatientSex="X", PatientAge=""))[1]
    assert (odd["patient_id"], odd["age"], odd["sex"]) == ("", "", "")


def test_what_is_dicom(tmp_path):
    path = tmp_path / "a"
    for content, expected in ((bytes(128) + b"DICM", True), (b"", False), (b"Read me", False)):
        path.write_bytes(content)
        assert decode.is_dicom(path) is expected
    assert not decode.is_dicom(tmp_path / "nowhere")
    if pydicom:
        assert decode.is_dicom(dicom(path, meta=False))


def test_without_pydicom_the_reason_is_how_to_install_it(monkeypatch, reason):
    monkeypatch.setattr(decode, "pydicom", None)
    assert "pip install" in reason(bytes(128) + b"DICM", ".dcm")
    assert "DICOM header" in reason(b"text", ".dcm")


def test_a_file_that_cannot_be_read_is_listed(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    assert "No such file" in decode.decode(tmp_path / "link.png")[1]["reason"]
