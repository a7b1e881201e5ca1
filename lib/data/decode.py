"""One image file to one small gray image: PNG, JPEG or DICOM in, (size, size) uint8 out, or the
reason why not.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageFile, ImageOps

try:
    from isal import isal_zlib as fast_zlib  # does what zlib does, in less than half of the time
except ImportError:
    fast_zlib = zlib

MAX_PIXELS = 2**26  # 8192 x 8192; the largest original radiograph has about 3000 x 3000
FITS = ("pad", "crop", "stretch")

_PNG, _JPEG, _DICM = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"DICM"
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_RLE = "1.2.840.10008.1.2.5"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by the colour type of a PNG
# Left, top and the steps across and down of an interlaced PNG's seven passes (PNG specification,
# section 8.2)
_ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
_STEP = 2**14  # bytes of deflated data at a time: what they give mostly fits into a block
_STORED = 65535  # bytes that a block of a zlib stream may hold as they are
_INFLATED = 2**24  # bytes of image data that are kept inflated
_KEPT_BLOCKS = 8  # of 16 MiB at most; see Pillow's documentation, "Block allocator"
_BLOCK = 256  # rows turned into float64 at a time: a large image is never held as floats


def decode(
    path: Path, size: int = 64, fit: str = "pad", root: Path | None = None
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Read one file as a small gray image.

    The content decides what the file is, not its name. Every pixel of the result is the mean gray
    value over its area, exact in integers and rounded half up, so it commutes with quarter turns
    and mirrors. A JPEG many times larger than `size` is decoded at a half, a quarter or an eighth
    of its size, which gives gray values within a few levels of the full decode.

    Parameters
    ----------
    path : Path
        PNG, JPEG, or DICOM (with the package pydicom).
    size : int
        Height and width of the result.
    fit : str
        For images that are not square, ``"pad"``: centred on a black square; ``"crop"``: the square
        in the middle; ``"stretch"``: each axis is scaled by itself.
    root : Path, optional
        Folder, without links in its own path, out of which no link may lead.

    Returns
    -------
    pixels : ndarray, shape (size, size), uint8, or None
    record : dict
        reason (empty if read), mode, width, height of the original; from DICOM also patient_id (see
        `_header`), view_position, age and sex. This function raises nothing that a file can cause.
    """
    record: dict[str, Any] = {"reason": "", "mode": "", "width": 0, "height": 0}
    try:
        content = _read(path, root)
        if content[:8] == _PNG or content[:3] == _JPEG:
            return _decode_picture(content, size, fit, record), record
        if content[128:132] == _DICM:
            return _decode_dicom(content, size, fit, record), record
        raise ValueError("not a PNG, JPEG or DICOM image" if content else "empty file")
    except PIL.UnidentifiedImageError:
        record["reason"] = "damaged header: not a PNG or JPEG image"
    except Exception as error:  # damaged files raise nearly anything in a decoder, and one file must not stop the others
        lines = (
            getattr(error, "strerror", None) or str(error) or type(error).__name__
        ).splitlines()
        record["reason"] = (
            "".join(c if c.isprintable() else "?" for c in lines[0])[:200] or type(error).__name__
        )
    return None, record


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark, for the many DICOM files whose name has no extension."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with open(path, "rb") as handle:
            return handle.read(132)[128:] == _DICM
    except OSError:
        return False


def dicom_reader() -> str | None:
    """Version of pydicom, None without it: work that lacked it is done again once it is there."""
    try:
        return version("pydicom")
    except PackageNotFoundError:
        return None


@contextmanager
def strict() -> Iterator[None]:
    """Pillow's warnings become errors of the file at hand, and truncated files are refused whatever
    another library has set.

    What pydicom warns of (a value that breaks its own rules) is left to pydicom's repair. Pillow
    keeps the memory of a few images for the next ones: taking it anew from the system costs a tenth
    of the time. Enter it before threads start: all are settings of the whole process."""
    before, blocks = ImageFile.LOAD_TRUNCATED_IMAGES, Image.core.get_blocks_max()
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.core.set_blocks_max(max(blocks, _KEPT_BLOCKS))
    try:
        with warnings.catch_warnings():
            for category in (UserWarning, RuntimeWarning):  # the second has the decompression bombs
                warnings.filterwarnings("error", category=category, module=r"PIL\b")
            warnings.filterwarnings("ignore", module=r"pydicom\b")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
        Image.core.set_blocks_max(blocks)


def _read(path: Path, root: Path | None) -> bytes:
    if root is not None and path.is_symlink() and not path.resolve().is_relative_to(root):
        raise ValueError("a link that leads out of the folder: copy the file itself into it")
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
        raise ValueError("not a regular file")
    if status.st_size > 8 * MAX_PIXELS:
        raise ValueError(f"file of {status.st_size} bytes is too large")
    return path.read_bytes()


def _check_area(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"{width} x {height} pixels: there is no image in it")
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels are too many (more than {MAX_PIXELS}): it may be a decompression bomb"
        )


# --------------------------------------------------------------------------------------------------


def _decode_picture(content: bytes, size: int, fit: str, record: dict[str, Any]) -> np.ndarray:
    if content[:8] == _PNG:
        content = _checked_png(content)
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
        record |= {"mode": image.mode, "width": image.width, "height": image.height}
        _check_area(*image.size)
        if image.format == "JPEG" and (scale := _draft_scale(*image.size, size)) > 1:
            image.draft("L", (image.width // scale, image.height // scale))
        return shrink(_to_gray(image), size, fit)


def _checked_png(content: bytes) -> bytes:
    """A PNG after everything that decoders pass over has been checked: every checksum, its end, and
    that its data fill the image exactly.

    A decoder that meets damaged or missing data may hand out what it has so far, half an image, as
    if it were whole. So the data are inflated here first, which also is most of the work. They are
    handed on as they then are, unpacked: isal inflates more than twice as fast as the zlib within a
    decoder. Only the data of very large images are thrown away again, to bound the memory."""
    view, place, size, first, last, parts = memoryview(content), 8, None, 0, 0, []
    while True:
        if place + 12 > len(content):
            raise ValueError("truncated: the PNG has no end")
        length, kind = struct.unpack_from(">I4s", view, place)
        end = place + 8 + length
        if end + 4 > len(content):
            raise ValueError(f"truncated inside the PNG chunk {kind!r}")
        if fast_zlib.crc32(view[place + 4 : end]) != struct.unpack_from(">I", view, end)[0]:
            raise ValueError(f"wrong checksum of the PNG chunk {kind!r}: the file is damaged")
        if (kind == b"IHDR") != (size is None) or (kind == b"IHDR" and length != 13):
            raise ValueError("damaged header: a PNG begins with one IHDR")
        if kind == b"IHDR":
            size = _data_size(*struct.unpack_from(">IIBBBBB", view, place + 8))
        elif kind == b"IDAT" and place == (
            last or place
        ):  # a decoder reads the first that follow on each other
            first, last = first or place, end + 4
            parts.append(view[place + 8 : end])
        elif kind == b"IEND":
            break
        place = end + 4
    blocks, checksum = _inflate(b"".join(parts), size)
    if not blocks:
        return content
    data = [b"IDAT", b"\x78\x01", *blocks, b"\x01\0\0\xff\xff", struct.pack(">I", checksum)]
    length, crc = (
        sum(map(len, data)) - 4,
        functools.reduce(lambda value, part: fast_zlib.crc32(part, value), data, 0),
    )
    return b"".join(
        [view[:first], struct.pack(">I", length), *data, struct.pack(">I", crc), view[last:]]
    )


def _data_size(
    width: int,
    height: int,
    depth: int,
    colour: int,
    _compression: int,
    _filter: int,
    interlaced: int,
) -> int:
    """Bytes that the image data of a PNG inflate to: each row of each pass, and a byte before it
    that names its filter.
    """
    _check_area(width, height)  # before Pillow, whose own limit differs, sees it
    if colour not in _CHANNELS or depth not in (1, 2, 4, 8, 16):
        raise ValueError(
            f"damaged header: there is no PNG of colour type {colour} and {depth} bits"
        )
    size = 0
    for left, top, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        size += rows * (1 + (columns * depth * _CHANNELS[colour] + 7) // 8) if columns > 0 else 0
    return size


def _inflate(data: bytes, size: int) -> tuple[list[bytes], int]:
    """Inflate what must be `size` bytes, and give them back as blocks that a zlib stream may hold
    as they are, with their Adler-32.

    No blocks if they are many. ValueError if the stream is damaged, or ends early or late: its own
    Adler-32 must be right, too."""
    blocks, length, checksum, inflater = [], 0, 1, fast_zlib.decompressobj()
    for start in range(0, len(data), _STEP):
        piece, out = data[start : start + _STEP], b""
        while (piece or len(out) == _STORED) and not inflater.eof:
            try:
                out = inflater.decompress(piece, _STORED)
            except fast_zlib.error:
                raise ValueError("damaged: the image data of the PNG cannot be inflated") from None
            piece, length = inflater.unconsumed_tail, length + len(out)
            if length > size:  # a bomb, perhaps: nobody knows where it would end
                raise ValueError("damaged: the PNG holds more data than its image has")
            if size <= _INFLATED:
                checksum = fast_zlib.adler32(out, checksum)
                blocks += [struct.pack("<BHH", 0, len(out), len(out) ^ _STORED), out]
    if length < size or not inflater.eof:
        raise ValueError("truncated: the image data of the PNG end early")
    return blocks, checksum


def _draft_scale(width: int, height: int, size: int) -> int:
    """By how much a JPEG can be reduced as it is decoded and still be twice as large as asked for,
    with every new pixel whole.
    """
    for scale in (8, 4, 2):
        if width % scale == height % scale == 0 and min(width, height) // scale >= 2 * size:
            return scale
    return 1


def _to_gray(image: Image.Image) -> Image.Image:
    """Any PNG or JPEG as 8-bit gray (mode L), upright.

    16-bit gray is scaled from the bits it uses, as files from 12-bit detectors would otherwise be
    black: from 0..4095 if its maximum needs 12 bits. Alpha that is the same everywhere (as in NIH's
    RGBA files) is dropped; other alpha is laid over black, the colour of air."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        values = np.asarray(image)
        full = 2 ** max(8, int(values.max()).bit_length()) - 1
        return Image.fromarray(
            _by_rows(values, lambda rows: (2 * 255 * rows.astype(np.int64) + full) // (2 * full))
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        low, high = image.getchannel("A").getextrema()
        if low != high:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    if image.mode == "L":
        image.load()
        return image  # convert would copy it
    if image.mode != "1":
        image = image.convert("RGB")  # CMYK and palettes know no direct way to gray
    return image.convert("L")


def _by_rows(values: np.ndarray, gray: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`gray` of blocks of rows, as uint8: what it computes with is many times larger than an image."""
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _BLOCK):
        result[start : start + _BLOCK] = gray(values[start : start + _BLOCK])
    return result


# --------------------------------------------------------------------------------------------------


def shrink(image: Image.Image, size: int, fit: str = "pad") -> np.ndarray:
    """Mean gray value over the area of each new pixel, rounded half up.

    Parameters
    ----------
    image : Image
        Mode L, of any size.
    size : int
    fit : str
        See `decode`; without effect on a square image.

    Returns
    -------
    ndarray, shape (size, size), uint8
    """
    width, height = image.size
    if (width, height) == (size, size):
        return np.array(image)  # nothing to resample
    factors = width // size, height // size
    plain = fit == "stretch" or width == height
    if (
        plain
        and (width, height) == (factors[0] * size, factors[1] * size)
        and math.prod(factors).bit_count() == 1
    ):
        return np.asarray(
            image.reduce(factors)
        )  # the same mean in a fraction of the time; exact for powers of two only
    return area_mean(np.asarray(image), size, fit)


def area_mean(image: np.ndarray, size: int, fit: str = "pad") -> np.ndarray:
    """What `shrink` computes, in the general way: two products with overlaps, in integers.

    Parameters
    ----------
    image : ndarray, shape (H, W), uint8
    size : int
    fit : str
        The new image covers the square of the longer side (``"pad"``, black outside the image) or
        of the shorter side (``"crop"``), in both cases with the same centre, or the whole image by
        each axis (``"stretch"``).

    Returns
    -------
    ndarray, shape (size, size), uint8
    """
    height, width = image.shape
    spans = {
        "pad": (max(image.shape),) * 2,
        "crop": (min(image.shape),) * 2,
        "stretch": (height, width),
    }[fit]
    down, across = _overlap(height, spans[0], size), _overlap(width, spans[1], size).T
    # Sums of products of integers below 2^53: exact in float64 in whatever order a BLAS adds them.
    total = np.zeros((size, size))
    for start in range(0, height, _BLOCK):
        total += down[:, start : start + _BLOCK] @ (
            image[start : start + _BLOCK].astype(np.float64) @ across
        )
    area = 4 * spans[0] * spans[1]
    return ((2 * total.astype(np.int64) + area) // (2 * area)).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def _overlap(length: int, span: int, size: int) -> np.ndarray:
    """Overlap of `size` new pixels, which cover `span` old ones with the same centre, with each of
    `length` old ones: (size, length).

    The unit is 1 / (2 size) of an old pixel, in which every edge is a whole number.
    """
    new = 2 * np.arange(size + 1)[:, None] * span + size * (length - span)
    old = 2 * np.arange(length + 1)[None] * size
    return np.clip(
        np.minimum(new[1:], old[:, 1:]) - np.maximum(new[:-1], old[:, :-1]), 0, None
    ).astype(np.float64)


# --------------------------------------------------------------------------------------------------


def _decode_dicom(content: bytes, size: int, fit: str, record: dict[str, Any]) -> np.ndarray:
    """DICOM as a screen would show it: rescaled, through its window if it has one, and bright where
    the body is dense.
    """
    try:
        import pydicom
    except ImportError:
        raise ValueError(
            'a DICOM file, which needs pydicom: python -m pip install "pydicom>=3"'
        ) from None
    if _DEFLATED in content[:1024]:  # pydicom would inflate all of it, however much that is
        raise ValueError("deflated DICOM is not read: write it uncompressed")
    dataset = pydicom.dcmread(io.BytesIO(content))
    if "PixelData" not in dataset:
        raise ValueError("DICOM without an image (no PixelData)")
    frames, samples = (
        int(dataset.get("NumberOfFrames") or 1),
        int(dataset.get("SamplesPerPixel") or 1),
    )
    kind, width, height = (
        str(dataset.PhotometricInterpretation),
        int(dataset.Columns),
        int(dataset.Rows),
    )
    record |= {"mode": f"DICOM {kind}", "width": width, "height": height, **_header(dataset)}
    if frames > 1:
        raise ValueError(
            f"multi-frame DICOM ({frames} frames): export the frame you mean as a file of its own"
        )
    _check_area(width, height)
    syntax = dataset.file_meta.TransferSyntaxUID
    if (
        syntax == _RLE
        and len(content) > 2 * width * height * samples * (int(dataset.BitsAllocated) // 8) + 65536
    ):
        raise ValueError(
            "more run-length data than its image can hold"
        )  # each byte of it may stand for 64
    try:
        values = dataset.pixel_array
    except (
        RuntimeError
    ) as error:  # pydicom's word for a compression that none of its installed decoders knows
        if syntax.is_compressed and "plugin" in str(error):
            raise ValueError(
                f"DICOM compressed as {syntax.name}, which needs: python -m pip install pylibjpeg[all]"
            ) from error
        raise
    if (
        samples == 3 and kind.startswith(("RGB", "YBR")) and values.dtype == np.uint8
    ):  # pydicom has made RGB of YBR
        gray = np.asarray(Image.fromarray(values).convert("L"))
    elif samples == 1 and kind in ("MONOCHROME1", "MONOCHROME2"):
        gray = _by_rows(values, _presentation(dataset, values))
    else:
        raise ValueError(f"DICOM {kind} of {samples} samples a pixel is no radiograph's")
    return shrink(Image.fromarray(255 - gray if kind == "MONOCHROME1" else gray), size, fit)


def _presentation(dataset: Any, values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Stored values to gray 0..255: modality LUT or rescale, then VOI LUT or the first window
    (DICOM PS3.3, C.11.1 and C.11.2).

    Without a window the range of the values is that of the bits in use, as for 16-bit PNG: nothing
    is stretched to one image's extremes."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing

    bits = int(dataset.BitsStored)
    if dataset.get("VOILUTSequence"):
        ends = np.array([0.0, 2.0 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1])
    elif dataset.get("WindowCenter") is not None and dataset.get("WindowWidth") is not None:
        with np.errstate(over="ignore"):
            ends = apply_windowing(
                np.array([-1e12, 1e12]), dataset
            )  # black and white, whatever the rescale
    elif dataset.get("ModalityLUTSequence"):
        ends = np.array([0.0, 2.0 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1])
    else:
        signed = int(dataset.PixelRepresentation) == 1
        top = 2 ** (bits - 1) - 1 if signed else 2 ** max(8, int(values.max()).bit_length()) - 1
        slope, intercept = (
            float(dataset.get(name, default))
            for name, default in (("RescaleSlope", 1), ("RescaleIntercept", 0))
        )
        ends = np.sort(np.array([-top - 1 if signed else 0, top]) * slope + intercept)
    low, high = float(ends[0]), float(ends[1])
    if not (math.isfinite(low) and math.isfinite(high)) or low == high:
        raise ValueError(f"DICOM window or rescale that spans nothing ({low:g} to {high:g})")

    def gray(rows: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            shown = apply_voi_lut(apply_modality_lut(rows, dataset), dataset).astype(np.float64)
        return np.floor(np.clip((shown - low) / (high - low), 0, 1) * 255 + 0.5)

    return gray


def _header(dataset: Any) -> dict[str, str]:
    """What a header may tell of its image. Names, dates and numbers of a patient are never taken
    over.

    The patient's number is used to group images only, as the first 16 hexadecimal digits of its
    SHA-256. It has no salt, so that two runs agree; whoever can guess the numbers can undo it, so
    the table stays as private as the files."""
    number = str(dataset.get("PatientID") or "").strip()
    found = {
        "patient_id": "sha256-"
        + hashlib.sha256(number.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        if number
        else "",
        "view_position": str(dataset.get("ViewPosition") or "").strip().upper(),
        "age": str(dataset.get("PatientAge") or "").strip(),
        "sex": str(dataset.get("PatientSex") or "").strip().upper(),
    }
    pattern = {"view_position": r"[A-Z]{1,8}", "sex": r"[MFO]", "age": r"\d{3}[YMWD]"}
    return {
        key: text if key == "patient_id" or re.fullmatch(pattern[key], text, re.ASCII) else ""
        for key, text in found.items()
    }
