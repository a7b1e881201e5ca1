"""lib.data.decode: every kind of PNG and JPEG, DICOM as pydicom shows it, and damaged files."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lib.data import decode
from tests.xrays import RAMP, REPORT, V, chunk, dicom, needs_pydicom, png

pydicom = decode.pydicom  # None without the extra
FULL = np.floor(V * (255 / 4095) + 0.5)  # V as gray levels
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # decoders', of odd files


def decoded(folder, content=V, suffix="", **options):
    """Pixels and record of the content of a file, or of a DICOM file by its values and elements."""
    path = folder / f"file{suffix}"
    path.write_bytes(content) if isinstance(content, bytes) else dicom(path, content, **options)
    pixels, record = decode.decode(path)
    assert (pixels is None) == bool(record["reason"])
    assert "\n" not in record["reason"]
    return pixels, record


@pytest.fixture
def read(tmp_path):
    return lambda *args, **options: decoded(tmp_path, *args, **options)[0].astype(int)


@pytest.fixture
def reason(tmp_path):
    return lambda *args, **options: decoded(tmp_path, *args, **options)[1]["reason"]


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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
    "1 bit": png(RAMP // 128, 1),
    "4 bits": png(RAMP // 16, 4),
    "one byte too many": png(RAMP, 8, extra=b"\0"),
    "one row too many": png(RAMP, 8, extra=bytes(65)),
    "JPEG": saved(GRAY, "JPEG", quality=100),
    "RGB JPEG": saved(GRAY.convert("RGB"), "JPEG", quality=100, subsampling=0),
    "CMYK JPEG": saved(GRAY.convert("RGB").convert("CMYK"), "JPEG", quality=100),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_the_same_gray(mode, read):
    levels = {"1 bit": RAMP // 128 * 255, "4 bits": RAMP // 16 * 17}.get(mode, RAMP)
    np.testing.assert_allclose(read(MODES[mode]), levels, atol=3 if "JPEG" in mode else 0)


def samples(values, colour):  # of a PNG of a colour type, from gray values
    return np.repeat(values.astype(int)[..., None], {0: 1, 2: 3, 4: 2, 6: 4}[colour], axis=2)


@pytest.mark.parametrize("top", [4095, 3000, 65535, 1000, 200, 0])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_16_bits_are_scaled_by_the_bits_in_use(colour, top, read):
    values = np.linspace(0, top, 4096).round().astype(int).reshape(64, 64)
    channels = samples(values, colour)
    if colour >= 4:
        channels[..., -1] = 65535
    expected = np.floor(values * (255 / (2 ** max(8, top.bit_length()) - 1)) + 0.5)
    np.testing.assert_array_equal(read(png(channels.reshape(64, -1), 16, colour)), expected)


def test_alpha_that_varies_is_laid_over_black_and_colours_have_pillows_weights(read):
    for colour, bits in itertools.product((4, 6), (8, 16)):
        channels = samples(RAMP, colour)
        channels[..., -1] = np.where(np.arange(64) < 32, 0, 255)
        content = png(channels.reshape(64, -1) * (257 if bits == 16 else 1), bits, colour)
        np.testing.assert_array_equal(read(content), np.where(np.arange(64) < 32, 0, RAMP))
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 3))
    colours[0, 0] = 255
    wide = read(png(colours.reshape(64, -1) * 257, 16, 2))
    narrow = np.asarray(Image.fromarray(colours.astype(np.uint8)).convert("L")).astype(int)
    assert np.abs(wide - narrow).max() <= 1


@needs_pydicom
@pytest.mark.parametrize("bright", [4096, 65535])
def test_a_hot_pixel_or_a_burnt_in_letter_does_not_set_the_scale(bright, read):
    plain, hot, letter = (np.full((64, 64), 2000) for _ in range(3))
    plain[:, :8] = hot[:, :8] = letter[:, :8] = 100
    hot[5, 5] = bright
    letter[2:12, 30:38] = 65535
    for values in (hot, letter):
        same = values == plain
        for got in (read(png(values, 16)), read(values.astype("u2"), BitsStored=16)):
            np.testing.assert_array_equal(got[same], read(png(plain, 16))[same])
            assert (got[~same] == 255).all()


def test_orientation_is_applied_and_damaged_notes_do_no_harm(read):
    exif, deep, content = Image.Exif(), png(RAMP.astype(int) * 257, 16), MODES["JPEG"]
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    note = chunk(b"eXIf", exif.tobytes()[6:])
    for some in (saved(GRAY, "JPEG", quality=100, exif=exif), deep[:33] + note + deep[33:]):
        np.testing.assert_allclose(read(some), np.rot90(RAMP, -1), atol=3)
    broken = saved(GRAY, "JPEG", quality=100, exif=b"Exif\0\0MM\0*\0\0\xff")
    note = b"MPF\0MM\0*\0\0\0\x08\0\x01\xb0\x01\0\x04\0\0\0\x02"  # of further pictures
    segment = b"\xff\xe2" + (len(note) + 2).to_bytes(2, "big") + note
    for some in (broken, content[:2] + segment + content[2:]):
        np.testing.assert_allclose(read(some), RAMP, atol=3)


SIDE = st.integers(1, 80)


@example(1, 3, 1, 0, "stretch")  # a tie that Pillow's own reduce rounds down
@example(80, 80, 20, 0, "pad")  # a power of two, for which Pillow's own is taken
@settings(max_examples=60, deadline=None)
@given(SIDE, SIDE, st.sampled_from([1, 7, 20]), st.integers(0, 999), st.sampled_from(decode.FITS))
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


WHOLE = saved(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        *((WHOLE[: len(WHOLE) // 2], "truncated"), (WHOLE[:-12], "truncated"), (b"", "empty")),
        (saved(GRAY, "JPEG")[:560], "truncated"),
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
        pixels, _ = decoded(tmp_path, bytes(changed[:cut]))
        if pixels is not None and content[:4] == b"\x89PNG":
            np.testing.assert_array_equal(pixels, true)


def lut(entries, descriptor):
    item = pydicom.Dataset()
    item.LUTDescriptor = descriptor
    packed = isinstance(entries, bytes)
    item.add_new("LUTData", "OW" if packed else "US", entries if packed else list(entries))
    return [item]


def cases():
    """Elements of a DICOM file by name, with the gray levels of V that they ask for."""
    mono1 = {"PhotometricInterpretation": "MONOCHROME1"}
    inverse = {"PresentationLUTShape": "INVERSE"}
    empty = {"RescaleSlope": "", "RescaleIntercept": "", "WindowCenter": "", "WindowWidth": ""}
    window = {"VOILUTSequence": [pydicom.Dataset()], "WindowCenter": 2048, "WindowWidth": 4096}
    eighths = [i // 16 for i in range(4096)]
    signed = V.astype("i2")
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    of_13_bits, of_5119 = np.floor(V * (255 / 8191) + 0.5), np.floor(V * (255 / 5119) + 0.5)
    from_1000 = np.floor(np.clip(V.astype(int) - 1000, 0, 1023) * (255 / 1023) + 0.5)
    windowed = np.floor(np.clip((V - 2047.5) / 4095 + 0.5, 0, 1) * 255 + 0.5)
    two = {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": [1500, 1]}
    two |= {"WindowWidth": [1001, 2], "VOILUTFunction": "SIGMOID"}
    sigmoid = np.floor(255 / (1 + np.exp(-4 * (V * 2.0 - 2500) / 1001)) + 0.5)
    exact = two | {"RescaleSlope": -1, "RescaleIntercept": 4095, "VOILUTFunction": "LINEAR_EXACT"}
    falling = np.floor(np.clip((2595 - V.astype(float)) / 1001 + 0.5, 0, 1) * 255 + 0.5)
    return {
        "12 bits": ({}, FULL),
        "LUT of 16 bits": ({"VOILUTSequence": lut(range(4096), [4096, 0, 16])}, FULL),
        "modality LUT": ({"ModalityLUTSequence": lut(range(4096), [4096, 0, 16])}, FULL),
        "LUT packed": ({"VOILUTSequence": lut(bytes(eighths), [4096, 0, 8])}, V // 16),
        "LUT of 8 bits in words": ({"VOILUTSequence": lut(eighths, [4096, 0, 8])}, V // 16),
        "LUT from 1000": ({"VOILUTSequence": lut(range(1024), [1024, 1000, 10])}, from_1000),
        "LUT too short": ({"VOILUTSequence": lut(range(4096), [0, 0, 12])}, FULL),
        "LUT without items, and window": (window, windowed),
        "first of two windows, after rescale": (two, sigmoid),
        "first of two windows, after rescale that inverts": (exact, falling),
        "slope without intercept": ({"RescaleSlope": 2}, FULL),
        "intercept without slope": ({"RescaleIntercept": -1000}, FULL),
        "empty elements": (empty, FULL),
        "rescale that inverts": ({"RescaleSlope": -1, "RescaleIntercept": 4095}, 255 - FULL),
        "window without width": ({"WindowCenter": 100}, FULL),
        "MONOCHROME1": (mono1, 255 - FULL),
        "inverse": (inverse, 255 - FULL),
        "MONOCHROME1 and inverse": (mono1 | inverse, 255 - FULL),
        "16 bits stored": ({"BitsStored": 16}, FULL),
        "13 bits stored": ({"BitsStored": 13}, of_13_bits),
        "int16, 16 bits stored": ({"content": signed, "BitsStored": 16}, FULL),
        "int16, 14 bits stored": ({"content": signed, "BitsStored": 14}, FULL),
        "int16 with negative values": ({"content": signed - 2048}, FULL),
        "int16 of a CT": ({"content": signed - 1024, "BitsStored": 16}, of_5119),
        "half as many bits": ({"content": V // 64}, V // 64),
        "high bit 15": ({"content": V * 16, "HighBit": 15}, FULL),
        "high bit 13": ({"content": V * 4 + 3, "HighBit": 13}, FULL),
        "8 bits": ({"content": RAMP}, RAMP),
        "run-length": ({"syntax": "1.2.840.10008.1.2.5"}, FULL),
        "without meta": ({"meta": False}, FULL),
        "without meta, implicit": ({"meta": False, "implicit": True}, FULL),
        "colour": (colour | {"content": RGB}, RAMP),
    }


@needs_pydicom
@pytest.mark.parametrize("name", cases() if pydicom else ["12 bits"])
def test_dicom_is_shown_as_the_standard_says(name, read):
    """PS3.3, C.11.1 and C.11.2: modality LUT or rescale, VOI LUT or window, presentation."""
    options, expected = cases()[name]
    np.testing.assert_array_equal(read(**options), expected)


@needs_pydicom
def test_padding_is_black_and_does_not_set_the_scale(read):
    values, upper = V.copy(), np.arange(64)[:, None] < 8
    values[:8] = 65535
    options = {"BitsStored": 16, "PixelPaddingValue": 65535}
    np.testing.assert_array_equal(read(values, **options), np.where(upper, 0, FULL))
    values[:4] = 60000
    options |= {"PixelPaddingRangeLimit": 60000, "PhotometricInterpretation": "MONOCHROME1"}
    np.testing.assert_array_equal(read(values, **options), np.where(upper, 0, 255 - FULL))


@needs_pydicom
def test_the_files_that_come_with_pydicom():
    """Each gray image of one frame is read as pydicom's own steps show it, or has a reason."""
    root = Path(pydicom.__file__).parent / "data"
    files = [*(root / "test_files").rglob("*"), *(root / "charset_files").rglob("*.dcm")]
    compared = 0
    for path in filter(Path.is_file, files):
        pixels, record = decode.decode(path, size=32, fit="stretch")
        assert (pixels is None) == bool(record["reason"])
        dataset = pydicom.dcmread(path, force=True)
        if pixels is None or pixels.std() <= 2 or "MONOCHROME" not in record["mode"]:
            continue
        shown = pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset)
        shown = pydicom.pixels.apply_voi_lut(shown, dataset).astype(float)
        shown = -shown if "MONOCHROME1" in record["mode"] else shown
        gray = ((shown - shown.min()) * (255 / np.ptp(shown))).astype(np.uint8)
        shown = decode.shrink(gray, 32, "stretch")
        if shown.std() > 2:  # else there is nothing to compare
            assert np.corrcoef(pixels.ravel(), shown.ravel())[0, 1] > 0.99, path.name
            compared += 1
    assert compared > 50


@needs_pydicom
@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"content": np.stack([V, V]), "Rows": 64, "Columns": 64, "NumberOfFrames": 2}, "2 frames"),
        *(({"Rows": 0}, "'Rows' value of '0'"), ({"Rows": 640}, "pixel data"), (REPORT, "SR")),
        ({"WindowCenter": 1, "WindowWidth": 0}, "Window Width"),
        ({"RescaleSlope": 0}, "RescaleSlope (0028,1053) is 0"),
        ({"content": RAMP, "PhotometricInterpretation": "PALETTE COLOR"}, "PALETTE COLOR"),
        ({"PhotometricInterpretation": None}, "without PhotometricInterpretation"),
        ({"PixelData": None}, "without PixelData"),
    ],
)
def test_what_cannot_be_shown_is_refused_with_its_reason(options, word, reason):
    assert word in reason(**options)


@needs_pydicom
def test_a_decimal_comma_is_named_with_its_element_and_an_odd_header_says_nothing(tmp_path, reason):
    numbers = {"WindowCenter": 1, "WindowWidth": 9, "RescaleSlope": 2}
    for keyword in numbers:
        content = dicom(tmp_path / "a", **numbers | {keyword: "25.5"}).read_bytes()
        text = reason(content.replace(b"25.5", b"25,5"))
        assert f"{keyword} (0028,1" in text
        assert "'25,5'" in text
    odd = decoded(tmp_path, PatientID="", PatientSex="X", PatientAge="")[1]
    assert (odd["patient_id"], odd["age"], odd["sex"]) == ("", "", "")


def test_without_pydicom_the_reason_is_how_to_install_it(monkeypatch, reason):
    monkeypatch.setattr(decode, "pydicom", None)
    assert "pip install" in reason(bytes(128) + b"DICM", ".dcm")
    assert "DICOM header" in reason(b"text", ".dcm")
    assert "No such file" in decode.decode(Path("nowhere.png"))[1]["reason"]
