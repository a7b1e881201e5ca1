"""One image file to one small gray image: PNG, JPEG or DICOM in, (size, size) uint8 out."""

import functools
import hashlib
import io
import math
import re
import struct
from collections.abc import MutableSequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

try:
    import pydicom.pixels
    from pydicom import uid
    from pydicom.tag import Tag
except ImportError:
    pydicom = None

SIZE = 64
FITS = ("pad", "crop", "stretch")
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_ROWS = 256  # rows turned into float64 at a time: a large image is never held as floats


def decode(path: Path, size: int = SIZE, fit: str = "pad") -> tuple[np.ndarray | None, dict]:
    """Read a PNG, JPEG or DICOM file as a small gray image. No file makes this raise an error.

    The content decides what the file is, not its name. Each new pixel is the mean gray value over
    its area, exact in integers and rounded half up, so it commutes with quarter turns and mirrors.
    An image that is not square is centred on a black square (`fit` ``"pad"``), reduced to the
    square in its middle (``"crop"``), or scaled along each axis by itself (``"stretch"``).

    Returns pixels, uint8 (size, size), or None; and a record: reason (empty if the image was read);
    image (False if the file is whole but holds none); mode, width and height of the original;
    scale, which values became black and white; from DICOM also what `_header` says."""
    record: dict = {"reason": "", "image": True, "mode": "", "width": 0, "height": 0}
    try:
        content = path.read_bytes()
        if content.startswith((_PNG, _JPEG)):
            gray = _picture(content, record)
        elif is_dicom(path):
            gray = _dicom(content, record)
        elif content and path.suffix.lower() in (".dcm", ".dicom"):
            raise ValueError("no DICOM header")
        else:
            raise ValueError("not a PNG, JPEG or DICOM image" if content else "empty file")
        return shrink(gray, size, fit), record
    except Exception as error:  # a damaged file may raise anything, and must not stop the others
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        text = "damaged header" if isinstance(error, Image.UnidentifiedImageError) else text
        record["reason"] = re.sub(r"\W*\s*\n\s*", "; ", text.strip())[:300]
    return None, record


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM: by the mark behind a preamble, or else a data element."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(132).ljust(8)
    except OSError:
        return False
    elements = (struct.unpack_from(f"{order}HHL", head) for order in "<>")
    text = re.match(rb"[A-Z]{2}", head[4:6])  # the type of an element, or else its length
    first = (0x02, 0x08, 0x10, 0x18, 0x20, 0x28)
    begins = any(group in first and (text or length < 1024) for group, _, length in elements)
    return begins or head[128:] == b"DICM"


def _picture(content: bytes, record: dict) -> np.ndarray:
    """A PNG or JPEG as gray, upright. Alpha that varies is laid over black, the colour of air."""
    if content.startswith(_PNG):
        with Image.open(io.BytesIO(content)) as image:
            image.verify()  # the checksum of every chunk, and that there is an end
    with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
        record |= {"mode": image.mode, "width": image.width, "height": image.height}
        channels = _channels_of_16_bits(content, image)
        if channels is None:
            gray, record["scale"] = _gray(image), "8 bits"
        else:
            values, alpha = _luminance(channels), channels[..., -1]
            if channels.shape[2] in (2, 4) and alpha.min() < alpha.max():
                values = values * alpha // alpha.max()
            *ends, record["scale"] = _range(values)
            gray = Image.fromarray(_to_8_bits(values, *ends))
            gray.info = image.info
    with suppress(Exception):  # a damaged note on orientation beside whole pixels
        gray = ImageOps.exif_transpose(gray)
    return np.asarray(gray)


def _gray(image: Image.Image) -> Image.Image:
    """An image of 8 bits or fewer as gray."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        low, high = image.getchannel("A").getextrema()
        if low != high:  # alpha that is the same everywhere, as in NIH's RGBA files, is dropped
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")  # CMYK and palettes know no direct way to gray
    return image.convert("L")


def _channels_of_16_bits(content: bytes, image: Image.Image) -> np.ndarray | None:
    """Channels (H, W, C) of a 16-bit PNG, of which Pillow keeps only the upper bytes; else None."""
    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.int64)[..., None]
    raw = str(image.tile[0].args) if image.format == "PNG" else ""
    if not raw.endswith(";16B"):
        return None
    # Both bytes of gray and of alpha are four channels of 8 bits; of RGB(A) the reader for files
    # of the other byte order finds the lower bytes.
    halves = []
    for reader in ("RGBA",) if raw.startswith("LA") else (raw, raw.replace("16B", "16L")):
        with Image.open(io.BytesIO(content)) as half:
            half.tile = [half.tile[0]._replace(args=reader)]
            halves.append(np.asarray(half).astype(np.int64))
    upper, lower = halves if len(halves) == 2 else (halves[0][..., ::2], halves[0][..., 1::2])
    return 256 * upper + lower


def _luminance(channels: np.ndarray) -> np.ndarray:
    """Gray (H, W) of (H, W, 1 to 4) of any depth, with Pillow's weights (ITU-R 601)."""
    if channels.shape[2] < 3:
        return channels[..., 0]
    red, green, blue = (channels[..., place].astype(np.int64) for place in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16


def _range(values: np.ndarray, stored: int = 0, signed: bool = False) -> tuple[int, int, str]:
    """Values that become black and white, from the bits in use, and a text that says so.

    No single pixel decides: the middle 99.8 % are in use; if the brightest 3 % begin two bits or
    more above all others (a burnt-in letter), they are not counted. The number of bits that the
    file states, `stored`, is taken if it is no more than one above the bits in use (of signed
    values without a negative one: if it is equal). Low is 0, or a power of two below negative ones.
    """
    last = values.size - 1
    places = [-int(-0.001 * last // 1), int(0.97 * last), int(0.999 * last)]
    low, most, high = (int(value) for value in np.partition(values, places, axis=None)[places])
    bits, letters = (max(min(8, stored or 8), max(v, 0).bit_length()) for v in (high, most))
    bits = letters if bits - letters >= 2 else bits
    below = (-low - 1).bit_length() if low < 0 else 0
    stated = stored - signed
    if 0 <= stated - max(bits, below) <= (low < 0 or not signed):
        return -(2**stated) if low < 0 else 0, 2**stated - 1, f"{stored} bits stored"
    clipped = ", brighter pixels clipped" if values.max() >= 2**bits else ""
    return -(2**below) if low < 0 else 0, 2**bits - 1, f"{bits} bits in use{clipped}"


def _to_8_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`values` as uint8: `low` becomes 0, `high` 255; rounded half up, clipped."""
    result = np.empty(values.shape, np.uint8)
    for start in range(0, len(values), _ROWS):
        part = (values[start : start + _ROWS].astype(np.float64) - low) * (255 / (high - low))
        result[start : start + _ROWS] = np.floor(np.clip(part, 0, 255) + 0.5)
    return result


def shrink(image: np.ndarray, size: int = SIZE, fit: str = "pad") -> np.ndarray:
    """Gray (H, W) uint8 to (size, size) uint8: the mean over the area of each new pixel, rounded
    half up. `fit` as in `decode`; without effect on a square image."""
    height, width = image.shape
    factor = height // size
    if height == width == factor * size and factor.bit_count() == 1:
        # The same in a fraction of the time; Pillow's mean is exact for powers of two only.
        return np.asarray(Image.fromarray(image).reduce(factor))
    side = max(image.shape) if fit == "pad" else min(image.shape)
    spans = (height, width) if fit == "stretch" else (side, side)
    down, across = _overlap(height, spans[0], size), _overlap(width, spans[1], size).T
    # Sums of products of integers below 2^53: exact in float64 in whatever order they are added.
    total = np.zeros((size, size))
    for start in range(0, height, _ROWS):
        rows = slice(start, start + _ROWS)
        total += down[:, rows] @ (image[rows].astype(np.float64) @ across)
    area = 4 * spans[0] * spans[1]
    return ((2 * total.astype(np.int64) + area) // (2 * area)).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def _overlap(length: int, span: int, size: int) -> np.ndarray:
    """Overlap of `size` new pixels, which cover `span` old ones with the same centre, with each of
    `length` old ones: (size, length), in units of 1 / (2 size) of an old pixel."""
    new = 2 * np.arange(size + 1)[:, None] * span + size * (length - span)
    old = 2 * np.arange(length + 1)[None] * size
    overlap = np.minimum(new[1:], old[:, 1:]) - np.maximum(new[:-1], old[:, :-1])
    return np.clip(overlap, 0, None).astype(np.float64)


def _dicom(content: bytes, record: dict) -> np.ndarray:
    """DICOM as a screen shows it: rescaled, through its window, bright where the body is dense."""
    if pydicom is None:
        raise ValueError('DICOM needs pydicom: python -m pip install "pydicom>=3"')
    dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    if "PixelData" not in dataset:
        kind = dataset.get("SOPClassUID") or dataset.file_meta.get("MediaStorageSOPClassUID")
        record["image"] = not kind or "Image" in kind.name  # else a structured report or the like
        raise ValueError(f"DICOM {kind.name if kind else 'file'} without PixelData")
    kind = str(dataset.get("PhotometricInterpretation") or "without PhotometricInterpretation")
    width, height = int(_number(dataset, "Columns", 0)), int(_number(dataset, "Rows", 0))
    record |= {"mode": f"DICOM {kind}", "width": width, "height": height, **_header(dataset)}
    frames, samples = (_number(dataset, name, 1) for name in ("NumberOfFrames", "SamplesPerPixel"))
    if frames > 1:
        raise ValueError(f"multi-frame DICOM ({frames:g} frames): export the frame that you need")
    colour = samples == 3 and kind.startswith(("RGB", "YBR"))
    if not colour and (samples != 1 or kind not in ("MONOCHROME1", "MONOCHROME2")):
        raise ValueError(f"DICOM {kind} with {samples:g} samples per pixel is no radiograph")
    values = _stored_values(dataset)
    values = _luminance(values) if colour else values  # pydicom has made RGB of YBR
    padding = np.zeros(values.shape, bool)
    if (first := _number(dataset, "PixelPaddingValue")) is not None:
        low, high = sorted((first, _number(dataset, "PixelPaddingRangeLimit", first)))
        padding = (values >= low) & (values <= high)
        padding &= not padding.all()
    gray, record["scale"] = _presentation(dataset, values, values[~padding])
    if kind == "MONOCHROME1" or dataset.get("PresentationLUTShape") == "INVERSE":
        gray = 255 - gray
    gray[padding] = 0
    return gray


def _stored_values(dataset: Any) -> np.ndarray:
    """Pixels as stored, (H, W) or (H, W, 3): BitsStored bits that end at HighBit."""
    if "TransferSyntaxUID" not in dataset.file_meta:
        implicit, little = dataset.original_encoding
        explicit = uid.ExplicitVRLittleEndian if little else uid.ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian if implicit else explicit
    allocated = _number(dataset, "BitsAllocated", 8)
    stored = int(_number(dataset, "BitsStored", allocated))
    high = int(_number(dataset, "HighBit", 0))
    shift = high + 1 - stored if stored <= high < allocated else 0
    dataset.BitsStored = stored + shift  # pydicom clears what is above
    values = dataset.pixel_array >> shift
    dataset.BitsStored = stored
    return values


def _presentation(dataset: Any, values: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, str]:
    """Stored values to gray 0..255, and by what: modality LUT or rescale, then VOI LUT or the first
    window (DICOM PS3.3, C.11.1 and C.11.2); without either the range of the values `inside`."""
    slope, intercept = _number(dataset, "RescaleSlope", 1), _number(dataset, "RescaleIntercept", 0)
    center, width = _number(dataset, "WindowCenter"), _number(dataset, "WindowWidth")
    if slope == 0:
        raise ValueError(f"DICOM RescaleSlope {Tag('RescaleSlope')} is 0")
    sequences = (dataset.get(name) or () for name in ("ModalityLUTSequence", "VOILUTSequence"))
    whole = ([i for i in items if "LUTData" in i and "LUTDescriptor" in i] for items in sequences)
    modality, voi = (next(iter(items), None) for items in whole)
    shown, little = values * float(slope) + float(intercept), dataset.original_encoding[1]
    if modality is not None:
        shown, black, white = _look_up(modality, values, little)
    if voi is not None:
        return _to_8_bits(*_look_up(voi, shown, little)), "VOI LUT"
    if center is not None and width is not None:
        window = pydicom.Dataset()
        window.PhotometricInterpretation, window.PixelRepresentation = "MONOCHROME2", 0
        window.BitsStored, window.WindowCenter, window.WindowWidth = 8, center, width
        window.VOILUTFunction = dataset.get("VOILUTFunction") or "LINEAR"
        with np.errstate(over="ignore"):  # exp of a sigmoid far from its centre
            return _to_8_bits(pydicom.pixels.apply_windowing(shown, window), 0, 255), "window"
    if modality is not None:
        return _to_8_bits(shown, black, white), "modality LUT"
    signed = bool(_number(dataset, "PixelRepresentation", 0))
    *ends, text = _range(inside, int(dataset.BitsStored), signed)
    return _to_8_bits(values, *(ends if slope > 0 else ends[::-1])), text


def _look_up(item: Any, values: np.ndarray, little: bool) -> tuple[np.ndarray, int, int]:
    """What a lookup table makes of `values`, its black, and its white: all bits that it uses, since
    many claim 16 and end at 4095. pydicom's own function cannot read two entries of 8 bits a word.
    """
    count, first, bits = (int(number) for number in item.LUTDescriptor)
    count = count or 2**16
    words = item.LUTData
    if isinstance(words, bytes):
        words = np.frombuffer(words[: len(words) & -2], "<u2" if little else ">u2")
    entries = np.atleast_1d(np.asarray(words)).astype("<u2")
    if bits <= 8 and len(entries) < count:
        entries = entries.view(np.uint8)
    entries = entries[:count]
    places = np.clip((values - first).astype(np.int64), 0, len(entries) - 1)
    return entries[places], 0, 2 ** max(8, int(entries.max()).bit_length()) - 1


def _number(dataset: Any, keyword: str, default: float | None = None) -> float | None:
    """First value of an element, or `default` if it is empty. ValueError if it is no number."""
    try:
        value = dataset.get(keyword)
        value = next(iter(value), None) if isinstance(value, MutableSequence) else value
        if value is None or value == "":
            return default
        if math.isfinite(float(value)):
            return value
    except (TypeError, ValueError):
        value = dataset.get_item(keyword).value
    value = value.decode("ascii", "replace") if isinstance(value, bytes) else value
    raise ValueError(f"DICOM {keyword} {Tag(keyword)} is {value!r}, which is no number")


def _header(dataset: Any) -> dict[str, str]:
    """What a header may say of its image, without names, dates and numbers.

    patient_id begins the number's SHA-256, without salt, so that two runs agree; who can guess the
    numbers can undo it: the table stays as private as the files."""
    number = str(dataset.get("PatientID") or "").strip().encode("utf-8", "surrogatepass")
    found = {"patient_id": f"sha256-{hashlib.sha256(number).hexdigest()[:16]}" if number else ""}
    valid = {"view_position": ("ViewPosition", "[A-Z]{1,8}"), "sex": ("PatientSex", "[MFO]")}
    valid["age"] = ("PatientAge", "[0-9]{3}[YMWD]")
    for name, (keyword, pattern) in valid.items():
        text = str(dataset.get(keyword) or "").strip().upper()
        found[name] = text if re.fullmatch(pattern, text) else ""
    return found
